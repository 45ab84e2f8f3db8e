"""Who is there and who leads, when servers fall silent and the API server is away."""

import asyncio
import contextlib
from typing import Any

import pytest
from tests.kubernetes.fake_api import FakeApi, Fault
from tests.kubernetes.waiting import running, until

from dayfly_pool.cluster import api as api_module
from dayfly_pool.cluster import leases as leases_module
from dayfly_pool.cluster import reflector as reflector_module
from dayfly_pool.cluster.api import LEASE, Api, NotFound
from dayfly_pool.cluster.leases import LIFE, Leader, Member, Members, alive
from dayfly_pool.errors import NameTaken

RENEW_S = 0.05


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflector_module, "WAIT_S_MAX", 0.05)
    monkeypatch.setattr(api_module, "WAIT_S_MAX", 0.02)
    monkeypatch.setattr(leases_module, "LOOK_S", 0.01)


class Hand:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def member(api: Api, name: str, **more: Any) -> Member:
    return Member(api, name, f"10.0.0.1:{name}", renew_s=RENEW_S, **more)


async def silent(api: Api, name: str) -> None:
    """A lease whose holder has died."""
    with contextlib.suppress(asyncio.CancelledError):
        async with asyncio.TaskGroup() as group:
            one = member(api, name)
            task = group.create_task(one.run())
            await until(lambda: one._uid)
            one._uid = ""  # so that it does not take its leave
            task.cancel()


# ---- members ------------------------------------------------------------------------------------


async def test_who_comes_and_goes_is_seen(api: Api):
    told: list[dict[str, str]] = []
    members = Members(api, changed=lambda live: told.append(dict(live)))
    async with running(members.run()):
        await members.synced()
        async with running(member(api, "s0").run(), member(api, "s1").run()):
            await until(lambda: len(members.live) == 2)
        await until(lambda: not members.live)

    assert {"s0": "10.0.0.1:s0", "s1": "10.0.0.1:s1"} in told
    assert told[-1] == {}


async def test_what_others_should_know_is_with_the_lease(api: Api):
    members = Members(api)
    one = member(api, "s0", annotations={"dayfly.dev/zone": "a"})
    async with running(members.run(), one.run()):
        await until(lambda: members.live)

        lease = members.reflector.objects["default/s0"]
        assert lease["metadata"]["annotations"]["dayfly.dev/zone"] == "a"


async def test_who_falls_silent_while_others_speak_is_gone(api: Api):
    hand = Hand()
    members = Members(api, clock=hand)
    await silent(api, "s0")
    async with running(members.run(), member(api, "s1").run()):
        await until(lambda: len(members.live) == 2 and members.reflector._heard_at)
        hand.now += leases_module.DURATION_S + 1
        await until(lambda: len(members.live) == 1)

        assert list(members.live) == ["s1"]


async def test_while_the_api_server_is_away_members_stay(fake: FakeApi, api: Api):
    """And are given their time after it: they could not renew either."""
    hand = Hand()
    members = Members(api, clock=hand)
    async with running(members.run(), member(api, "s0").run(), member(api, "s1").run()):
        await until(lambda: len(members.live) == 2)
        await fake.down()
        await until(lambda: members.reflector._is_failing)
        hand.now += 120
        members._judge()
        assert len(members.live) == 2
        heard_s = members.reflector.heard_s
        await fake.up()
        await until(lambda: not members.reflector._is_failing)
        members._judge()
        assert len(members.live) == 2
        hand.now += 1
        await until(lambda: members.reflector.heard_s > heard_s)
        assert len(members.live) == 2


async def test_on_a_stream_that_says_nothing_nobody_is_judged(fake: FakeApi, api: Api):
    hand = Hand()
    members = Members(api, clock=hand)
    async with running(members.run(), member(api, "s0").run()):
        await until(lambda: members.live)
        fake.freeze_streams()
        hand.now += 120
        members._judge()

        assert list(members.live) == ["s0"]


async def test_a_member_holds_on_while_the_api_server_is_away(fake: FakeApi, api: Api):
    one = member(api, "s0")
    async with running(one.run()):
        await until(lambda: one._version)
        await fake.down()
        await until(lambda: one._is_failing)
        await fake.up()
        await until(lambda: not one._is_failing)
        await api.delete(LEASE, "s0")
        await until(lambda: api.requests["post", "leases"] > 1)


async def test_a_renewal_whose_answer_was_lost_is_no_quarrel(fake: FakeApi, api: Api):
    one = member(api, "s0")
    async with running(one.run()):
        await until(lambda: one._version)
        fake.faults.append(Fault("patch", lost=True))
        await until(lambda: api.requests["get", "leases"] > 0)
        version = one._version
        await until(lambda: one._version != version)


async def test_of_two_lives_with_one_name_the_later_goes_on(api: Api):
    earlier, later = member(api, "s0"), member(api, "s0")

    async def ends() -> None:
        with pytest.raises(NameTaken):
            await earlier.run()

    async with asyncio.TaskGroup() as group:
        group.create_task(ends())
        await until(lambda: earlier._version)
        task = group.create_task(later.run())
        await until(lambda: later._version)
        lease = await api.get(LEASE, "s0")
        assert lease["metadata"]["annotations"][LIFE] == later._life
        await until(lambda: not earlier._uid)
        await api.get(LEASE, "s0")
        task.cancel()


async def test_who_ends_takes_its_lease_away(api: Api):
    one = member(api, "s0")
    async with running(one.run()):
        await until(lambda: one._version)

    with pytest.raises(NotFound):
        await api.get(LEASE, "s0")


def test_a_lease_without_a_holder_is_nobodys():
    lease = {"metadata": {"name": "a"}, "spec": {"holderIdentity": "", "leaseDurationSeconds": 1}}

    assert alive({"a": lease}, {"a": 0.0}, 0.0) == {}


# ---- leaders ------------------------------------------------------------------------------------


class Term:
    """Notes what it is told, and leads until it is stopped."""

    def __init__(self, others: "list[Term] | None" = None) -> None:
        self.epochs: list[int] = []
        self.leads = 0
        self.others = others or []
        self.others.append(self)

    async def __call__(self, epoch: int) -> None:
        self.epochs.append(epoch)
        self.leads += 1
        assert sum(other.leads for other in self.others) == 1
        try:
            await asyncio.Event().wait()
        finally:
            self.leads -= 1


def leader(api: Api, name: str, **more: Any) -> Leader:
    return Leader(api, "controller", name, retry_s=0.02, **{"duration_s": 15} | more)


async def test_one_leads_and_the_next_when_it_has_gone(api: Api):
    term, next_term = Term(), Term()
    async with running(leader(api, "b").run(next_term)) as (waiting,):
        await until(lambda: next_term.leads)
        async with running(leader(api, "a").run(term)):
            waiting.cancel()
            await until(lambda: term.leads)

    assert (next_term.epochs, term.epochs) == ([1], [2])
    assert (await api.get(LEASE, "controller"))["spec"]["holderIdentity"] == ""


async def test_only_a_lease_that_stands_still_for_its_time_is_taken(api: Api):
    hand, term = Hand(), Term()
    spec = {"holderIdentity": "dead", "leaseDurationSeconds": 15, "leaseTransitions": 7,
            "renewTime": "2001-01-01T00:00:00.000000Z"}  # fmt: skip
    await api.create(LEASE, {"metadata": {"name": "controller"}, "spec": spec})
    async with running(leader(api, "a", clock=hand).run(term)):
        await until(lambda: api.requests["get", "leases"] > 2)
        hand.now += 14
        asked = api.requests["get", "leases"]
        await until(lambda: api.requests["get", "leases"] > asked + 2)
        assert term.epochs == []
        hand.now += 2
        await until(lambda: term.leads)

    assert term.epochs == [8]


async def test_a_leader_that_cannot_renew_stops_before_another_may_begin(fake: FakeApi, api: Api):
    term = Term()
    one = leader(api, "a", duration_s=1)
    async with running(one.run(term)):
        await until(lambda: term.leads)
        await fake.down()
        await until(lambda: not term.leads)
        assert not one.is_leading
        await fake.up()
        await until(lambda: term.leads)

    assert term.epochs == [1, 2]


async def test_a_leader_that_was_replaced_stops(api: Api):
    term = Term()
    async with running(leader(api, "a", duration_s=1).run(term)):
        await until(lambda: term.leads)
        stolen = {"holderIdentity": "thief", "leaseTransitions": 2, "leaseDurationSeconds": 60}
        await api.merge(LEASE, "controller", {"spec": stolen})
        await until(lambda: not term.leads)

    assert term.epochs == [1]


async def test_who_writes_something_else_on_the_lease_deposes_nobody(api: Api):
    term = Term()
    one = leader(api, "a", duration_s=1)
    async with running(one.run(term)):
        await until(lambda: term.leads)
        await api.merge(LEASE, "controller", {"metadata": {"labels": {"x": "y"}}})
        asked = api.requests["get", "leases"]
        await until(lambda: api.requests["get", "leases"] > asked)
        patched = api.requests["patch", "leases"]
        await until(lambda: api.requests["patch", "leases"] > patched + 1)

    assert term.epochs == [1]


async def test_what_goes_wrong_while_it_leads_is_raised_and_the_lease_given_back(api: Api):
    async def fails(epoch: int) -> None:
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        await leader(api, "a").run(fails)
    assert (await api.get(LEASE, "controller"))["spec"]["holderIdentity"] == ""


@pytest.mark.waits
async def test_never_do_two_lead_at_once(fake: FakeApi, api: Api):
    """Through outages, and lost answers: and epochs only grow."""
    first = Term()
    terms = first.others
    while len(terms) < 3:
        Term(terms)
    leaders = [leader(api, f"l{n}", duration_s=1) for n in range(3)]
    runs = [one.run(term) for one, term in zip(leaders, terms, strict=True)]
    async with running(*runs):
        for number in range(3):
            await until(lambda: any(term.leads for term in terms))
            fake.faults.append(Fault("patch", lost=True, times=2))
            await fake.down() if number % 2 else None
            ended = sum(len(term.epochs) for term in terms)
            if number % 2:
                await until(lambda: not any(term.leads for term in terms))
                await fake.up()
                await until(lambda e=ended: sum(len(term.epochs) for term in terms) > e)

    epochs = [epoch for term in terms for epoch in term.epochs]
    assert len(epochs) == len(set(epochs)) > 1
