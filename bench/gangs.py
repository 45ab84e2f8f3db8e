"""Gangs: two that each need 60 % of the machine, in 10,000 orders of arrival.

    python -m bench.gangs [ORDERS]

Each order is the policy that the server has (`dayfly_pool.batch.queues`) on a machine of ten
processors that is simulated, with a clock that moves when nothing else does: the gangs come in
queues and at moments of chance, up to five small jobs among them, tasks end when chance has it, and
some jobs are cancelled. After every command it is looked at what runs: a gang of which some tasks
may run and others not is a partial hold; jobs that wait while nothing runs and nothing comes any
more, however long, are a deadlock. The orders come of one seed: each run of it sees the same.
"""

import sys
import time
from collections import Counter
from random import Random

from bench import harness
from dayfly_pool.batch.queues import Admission, Ask, Command, Evict, Grant, Shrink

PROCESSORS, GANG = 10, 6
PASSED_MAX = 4
"""After so many jobs that were let pass, who waits goes first."""

SMALL_MAX, WAITS_MAX = 5, 100


class Machine:
    """Runs what is granted, and ends what is evicted at once."""

    def __init__(self) -> None:
        self.policy = Admission({"cpu": PROCESSORS * 1000}, passed_max=PASSED_MAX)
        self.asks: dict[str, Ask] = {}
        self.left: dict[str, int] = {}
        """Tasks that have not ended."""

        self.may: Counter[str] = Counter()
        self.running: Counter[str] = Counter()
        self.now = 0.0
        self.partial_holds = self.overfull = 0

    def submit(self, ask: Ask) -> None:
        """A job comes."""
        self.asks[ask.id], self.left[ask.id] = ask, ask.count
        self._carry_out(self.policy.submit(ask, self.now))

    def wait(self) -> None:
        """A second passes."""
        self.now += 1
        self._carry_out(self.policy.tick(self.now))

    def end(self, id_: str) -> None:
        """One of a job's tasks ends; all of them of a gang."""
        if self.asks[id_].min_count > 1 or self.left[id_] == 1:
            self.finish(id_)
            return
        self.left[id_] -= 1
        self.running[id_] -= 1
        if self.left[id_] < self.may[id_]:
            self._carry_out(self.policy.change(id_, self.now, count=self.left[id_]))
        if self.running[id_] >= self.may[id_]:
            self._carry_out(self.policy.released(id_, 1, self.now))
        self._start(id_)

    def finish(self, id_: str) -> None:
        """A job has ended, or was cancelled."""
        del self.asks[id_]
        self.running[id_] = self.may[id_] = self.left[id_] = 0
        self._carry_out(self.policy.finished(id_, self.now))

    def _carry_out(self, commands: list[Command]) -> None:
        todo = list(commands)
        while todo:
            command = todo.pop(0)
            match command:
                case Grant(id=id_, tasks=tasks):
                    self.may[id_] = tasks
                    self._start(id_)
                case Shrink(id=id_, tasks=tasks):
                    self.may[id_] = tasks
                case Evict(id=id_, tasks=tasks):
                    self.running[id_] -= tasks
                    self.may[id_] = min(self.may[id_], self.running[id_])
                    todo += self.policy.released(id_, tasks, self.now)
        self._look()

    def _start(self, id_: str) -> None:
        self.running[id_] = max(self.running[id_], min(self.may[id_], self.left[id_]))

    def _look(self) -> None:
        self.overfull += sum(self.running.values()) > PROCESSORS
        for id_, ask in self.asks.items():
            held = self.may[id_], self.running[id_]
            self.partial_holds += ask.min_count > 1 and not {*held} <= {0, ask.count}


def order(random: Random, machine: Machine) -> bool:
    """Whether all jobs of one order of arrival have ended."""
    one = {"cpu": 1000}
    asks = [
        Ask(id=f"gang{n}", queue=random.choice("ab"), request=one, count=GANG, min_count=GANG)
        for n in range(2)
    ]
    for number in range(random.randrange(SMALL_MAX + 1)):
        count, queue = random.randrange(1, 5), random.choice("abc")
        asks.append(Ask(id=f"small{number}", queue=queue, request=one, count=count))
    random.shuffle(asks)
    cancelled = {ask.id for ask in asks if random.random() < 0.1}
    waited = 0
    while asks or machine.asks:
        running = [id_ for id_ in machine.asks if machine.running[id_]]
        if asks and random.random() < 0.5:
            machine.submit(asks.pop())
        elif running:
            machine.end(random.choice(running))
        elif not asks:
            if waited == WAITS_MAX:
                return False
            waited += 1
            machine.wait()
            continue
        waited = 0
        if random.random() < 0.1:
            for id_ in sorted(cancelled & machine.asks.keys()):
                machine.finish(id_)
    return True


def main(orders: int) -> None:
    """Simulate and report."""
    report = harness.Report("gangs")
    random = Random(1)
    ended = partial_holds = overfull = 0
    started = time.perf_counter()
    for _ in range(orders):
        machine = Machine()
        ended += order(random, machine)
        partial_holds += machine.partial_holds
        overfull += machine.overfull
    took_s = time.perf_counter() - started
    report.row(
        "orders of arrival", n=orders, seconds=round(took_s, 1), per_s=round(orders / took_s)
    )
    report.bar("deadlocks", orders - ended, 0)
    report.bar("partial holds", partial_holds, 0)
    report.bar("moments with more running than there is room", overfull, 0)
    report.bar("orders of which all ended", ended, orders, at_least=True)
    report.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
