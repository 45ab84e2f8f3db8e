"""Which idle sandbox goes first: greedy-dual by uses, cost of a start and memory; and when."""

import math

import pytest

from dayfly_pool import memory
from dayfly_pool.commands import Command, Create, Destroy, Specialize
from dayfly_pool.models import Function, InvocationId
from dayfly_pool.state import PoolState
from dayfly_pool.testing import function

MIB = 1 << 20


class Machine:
    """A pool whose sandboxes start and load at once; *cost_s* and *mib* are the function's."""

    def __init__(self, sandboxes_max: int) -> None:
        self.state = PoolState(generic_max=0, sandboxes_max=sandboxes_max, starts_max=8)
        self.evicted: list[str] = []
        self.costs: dict[str, tuple[float, int]] = {}
        self.now = 0.0
        self._number = 0

    def deploy(self, name: str, *, cost_s: float = 1.0, mib: int = 4, **spec: object) -> Function:
        each = function(name, keep_alive_seconds=86400, **spec)
        self.costs[each.id] = cost_s, mib * MIB
        self.carry_out(self.state.deploy(each, self.now))
        return each

    def use(self, each: Function, times: int = 1) -> None:
        """*times* invocations, one after the other, each answered at once."""
        for _ in range(times):
            self.now += 1
            self._number += 1
            invocation = InvocationId(f"i{self._number}")
            self.carry_out(self.state.submit(invocation, each.id, self.now))
            (box,) = [b for b in self.state.sandboxes.values() if invocation in b.running]
            self.carry_out(self.state.finished(box.id, invocation, 0.001, self.now))

    def tick(self, *, is_short: bool) -> None:
        self.now += 1
        self.carry_out(self.state.tick(self.now, is_short_of_memory=is_short))

    def carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Create(sandbox):
                    self.carry_out(self.state.ready(sandbox, self.now))
                case Specialize(sandbox, each):
                    cost_s, size = self.costs[each.id]
                    self.now += cost_s
                    self.carry_out(self.state.loaded(sandbox, 1, self.now, memory_bytes=size))
                case Destroy(_, "evicted"):
                    self.evicted.append(command.sandbox)

    def homes(self) -> set[str]:
        """The names of the functions that have a sandbox."""
        return {b.function.name for b in self.state.sandboxes.values() if b.function}


def test_of_equals_the_one_idle_longest_goes():
    machine = Machine(sandboxes_max=2)
    first, second, third = (machine.deploy(name) for name in ("a", "b", "c"))
    machine.use(first)
    machine.use(second)
    machine.use(third)

    assert machine.homes() == {"b", "c"}


def test_what_is_used_often_stays():
    machine = Machine(sandboxes_max=2)
    often, seldom, new = (machine.deploy(name) for name in ("often", "seldom", "new"))
    machine.use(often, 10)
    machine.use(seldom)
    machine.use(new)

    assert machine.homes() == {"often", "new"}


def test_what_is_dear_to_load_stays():
    machine = Machine(sandboxes_max=2)
    dear, cheap = machine.deploy("dear", cost_s=200.0), machine.deploy("cheap")
    new = machine.deploy("new")
    machine.use(dear)
    machine.use(cheap)
    machine.use(new)

    assert machine.homes() == {"dear", "new"}


def test_what_takes_much_memory_goes():
    machine = Machine(sandboxes_max=2)
    large, small = machine.deploy("large", mib=400), machine.deploy("small")
    new = machine.deploy("new")
    machine.use(small)
    machine.use(large)
    machine.use(new)

    assert machine.homes() == {"small", "new"}


def test_no_fame_lasts_for_ever():
    """What was used often long ago goes at last, because what is evicted raises the clock."""
    machine = Machine(sandboxes_max=2)
    famous = machine.deploy("famous", cost_s=5.0)
    machine.use(famous, 10)
    for i in range(200):
        machine.use(machine.deploy(f"new{i}"))
        if "famous" not in machine.homes():
            break

    assert "famous" not in machine.homes()
    assert i > 1


def test_fame_ends_with_the_last_sandbox():
    machine = Machine(sandboxes_max=1)
    often, other = machine.deploy("often"), machine.deploy("other")
    machine.use(often, 50)
    machine.use(other)

    assert machine.state.functions[often.id].uses == 0


def test_deleting_and_deploying_again_leaves_nothing_in_the_ranking():
    machine = Machine(sandboxes_max=4)
    for _ in range(20):
        each = machine.deploy("a")
        machine.use(each)
        machine.carry_out(machine.state.remove(each.id, machine.now))

    assert machine.state._shelf._ranking == []
    assert machine.state._shelf._ranked == set()


def test_the_ranking_holds_a_function_once_however_often_it_falls_idle():
    machine = Machine(sandboxes_max=4)
    each = machine.deploy("a")
    machine.use(each, 100)

    assert len(machine.state._shelf._ranking) == 1


def test_a_machine_short_of_memory_sheds_the_least_valuable_and_refills_nothing():
    machine = Machine(sandboxes_max=100)
    for i in range(40):
        machine.use(machine.deploy(f"f{i}"), i + 1)
    machine.tick(is_short=True)

    assert "f0" not in machine.homes()
    assert "f39" in machine.homes()
    assert len(machine.evicted) == 2  # a share of forty
    assert machine.state.add_mold(function("f0").mold, 2, machine.now) == []
    for _ in range(200):
        machine.tick(is_short=True)
    assert machine.homes() == set()
    machine.use(machine.deploy("late"))
    assert machine.homes() == {"late"}


def test_a_minimum_is_kept_though_memory_is_short():
    machine = Machine(sandboxes_max=100)
    machine.use(machine.deploy("kept", min_scale=1))
    machine.use(machine.deploy("other"))
    for _ in range(50):
        machine.tick(is_short=True)

    assert machine.homes() == {"kept"}


def test_when_nothing_else_is_idle_even_a_minimum_makes_room():
    machine = Machine(sandboxes_max=1)
    machine.use(machine.deploy("kept", min_scale=1))
    other = machine.deploy("other")
    machine.use(other)

    assert machine.homes() == {"other"}
    assert machine.state._shelf._clock < math.inf


def test_memory_is_read_from_the_kernel(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """And taken for plenty where the kernel does not say."""
    said = tmp_path / "meminfo"
    said.write_text("MemTotal:  100 kB\nMemAvailable:      12 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", str(said))
    assert memory.available_bytes() == 12 * 1024
    said.write_text("nothing\n")
    assert memory.available_bytes() == memory.PLENTY
    monkeypatch.setattr(memory, "MEMINFO", str(tmp_path / "none"))
    assert memory.available_bytes() == memory.PLENTY
