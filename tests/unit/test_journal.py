"""The journals that are ours, with a store that fails in every way, and keepers that remember."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from dayfly_pool import journal as module
from dayfly_pool.errors import BodyTooLarge, Late, NameTaken, QueueFull, StoreFailed
from dayfly_pool.journal import Journals, Keep, merged
from dayfly_pool.store.journals import (
    Append,
    Entry,
    Journal,
    JournalId,
    Kind,
    NewEntry,
    Wish,
)
from dayfly_pool.store.memory_journals import MemoryJournals

J1, J2, J3 = (JournalId(f"{n:032x}") for n in range(1, 4))
SOON_S = 5.0
GONE = StoreFailed("the disk is gone")


class Kept:
    """A keeper that writes down what it is told."""

    def __init__(self, places: int = 100) -> None:
        self.places = places
        self.seen: list[tuple[str, JournalId, int | bytes]] = []
        self.has: dict[JournalId, Journal] = {}

    def room(self) -> int:
        return self.places - len(self.has)

    def adopt(self, journal: Journal) -> None:
        self.seen.append(("adopt", journal.id, journal.fence))
        assert journal.id not in self.has, "two at once"
        self.has[journal.id] = journal

    def wished(self, id_: JournalId, wish: Wish) -> None:
        self.seen.append(("wish", id_, wish.body))

    def lost(self, id_: JournalId) -> None:
        self.seen.append(("lost", id_, 0))
        del self.has[id_]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REPAIR_S", "DEFECT_S", "BEAT_S", "LOOK_S"):
        monkeypatch.setattr(module, name, 0.001)


@asynccontextmanager
async def running(
    store: MemoryJournals | None = None, keeper: Kept | None = None, **more: Any
) -> AsyncIterator[Journals]:
    journals = Journals(store or MemoryJournals(), **{"owner": "us"} | more)
    journals.keep("job", keeper or Kept())
    async with asyncio.timeout(SOON_S), journals.running():
        yield journals


def journal(id_: JournalId = J1, **changed: Any) -> Journal:
    kind: Kind = "job"
    made = Journal(id=id_, kind=kind, namespace="default", name=id_, created_at=100.0)
    return structs.replace(made, **changed)


def one(body: bytes) -> list[NewEntry]:
    return [NewEntry(body=body)]


async def bodies(store: MemoryJournals, id_: JournalId = J1) -> list[bytes]:
    return [entry.body for entry in await store.entries(id_)]


async def eventually(question: Callable[[], object]) -> None:
    """Let everybody else go on until it is so; the test's own deadline ends it."""
    while not question():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


# ---- writing ------------------------------------------------------------------------------------


async def test_what_was_appended_is_written_when_it_returns_and_has_numbers():
    store, keeper = MemoryJournals(), Kept()
    async with running(store, keeper) as journals:
        await journals.create(journal(), one(b"first"))
        assert keeper.seen == [("adopt", J1, 1)]
        assert await journals.append(J1, [*one(b"a"), *one(b"b")], head=b"h") == 2
        assert await journals.append(J1, one(b"c"), ended_at=200.0, replaces=(2, 3)) == 4

        assert [(e.number, e.body) for e in await store.entries(J1)] == [(1, b"first"), (4, b"c")]
        over = await store.get(J1)
        assert over is not None
        assert (over.head, over.ended_at, over.owner) == (b"h", 200.0, "")
        with pytest.raises(Late):
            await journals.append(J1, one(b"after the end"))


async def test_what_comes_together_is_one_write():
    store = MemoryJournals()
    ids = [JournalId(f"{n:032x}") for n in range(64)]
    async with running(store) as journals:
        for id_ in ids:
            await journals.create(journal(id_))
        await asyncio.gather(
            *(journals.append(id_, one(b"%d" % n)) for n in range(3) for id_ in ids)
        )

        assert store.writes <= 2
        for id_ in ids:
            assert await bodies(store, id_) == [b"0", b"1", b"2"]


async def test_one_write_has_a_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BATCH_MAX", 3)
    monkeypatch.setattr(module, "BATCH_BYTES_MAX", 10)
    store = MemoryJournals()
    async with running(store) as journals:
        await journals.create(journal())
        await asyncio.gather(*(journals.append(J1, one(b"%d" % n)) for n in range(6)))
        assert store.writes == 2
        await asyncio.gather(*(journals.append(J1, one(b"%d" % n * 9)) for n in range(3)))

        assert store.writes == 5


async def test_a_write_that_fails_is_tried_until_it_is_done():
    store = MemoryJournals()
    async with running(store) as journals:
        await journals.create(journal())
        store.broken = GONE
        first = asyncio.ensure_future(journals.append(J1, one(b"a")))
        await eventually(lambda: journals.failure)
        second = asyncio.ensure_future(journals.append(J1, one(b"b")))
        with pytest.raises(StoreFailed, match="gone"):
            await journals.create(journal(J2))
        assert not first.done()
        store.broken = None

        assert [await first, await second] == [1, 2]
        assert (await bodies(store), journals.failure) == ([b"a", b"b"], "")


class Unsure(MemoryJournals):
    """What it does fails, before or after it was done, as *fails* says of each."""

    def __init__(self, fails: Callable[[str], str] = lambda what: "") -> None:
        super().__init__()
        self.fails = fails

    async def _maybe(self, what: str, work: Callable[[], Any]) -> Any:
        how = self.fails(what)
        await asyncio.sleep(0)
        if how == "before":
            raise GONE
        done = await work()
        if how == "after":
            raise GONE
        return done

    async def append(self, appends: Sequence[Append]) -> set[JournalId]:
        return await self._maybe("append", lambda: MemoryJournals.append(self, appends))

    async def claim(self, kind: Kind, most: int) -> list[Journal]:
        return await self._maybe("claim", lambda: MemoryJournals.claim(self, kind, most))

    async def create(
        self, journal: Journal, entries: Sequence[NewEntry] = (), *, is_ours: bool = False
    ) -> Journal:
        return await self._maybe(
            "create", lambda: MemoryJournals.create(self, journal, entries, is_ours=is_ours)
        )

    async def publish(self, id_: JournalId, *, is_ours: bool = False) -> Journal | None:
        return await self._maybe(
            "publish", lambda: MemoryJournals.publish(self, id_, is_ours=is_ours)
        )


def once(what: str, how: str = "after") -> Callable[[str], str]:
    """The first such call fails."""
    left = [what]

    def fails(asked: str) -> str:
        return left.pop() and how if left == [asked] else ""

    return fails


async def test_a_write_that_was_done_and_looked_failed_is_done_once():
    store, keeper = Unsure(once("append")), Kept()
    async with running(store, keeper) as journals:
        await journals.create(journal())
        assert await journals.append(J1, one(b"a"), ended_at=200.0) == 1

        assert await bodies(store) == [b"a"]
        assert keeper.seen == [("adopt", J1, 1)]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_every_journal_has_what_was_appended_once_and_in_order(seed: int):
    """Whatever fails meanwhile, before it was done or after."""
    draw = random.Random(seed)
    store = Unsure(lambda what: draw.choice(["before", "after", "", ""]))
    ids = [JournalId(f"{n:032x}") for n in range(5)]

    async def write(journals: Journals, id_: JournalId) -> None:
        for number in range(1, 9):
            for _ in range(draw.randrange(3)):
                await asyncio.sleep(0)
            assert await journals.append(id_, one(b"%d" % number)) == number

    async def all_of_them() -> None:
        keeper = Kept()
        async with running(store, keeper) as journals:
            for id_ in ids:
                with_ = journal(id_)
                while id_ not in keeper.has:
                    try:
                        await journals.create(with_)
                    except StoreFailed:
                        await asyncio.sleep(0.001)
            await asyncio.gather(*(write(journals, id_) for id_ in ids))
        for id_ in ids:
            assert await bodies(store, id_) == [b"%d" % number for number in range(1, 9)]

    old, module.REPAIR_S = module.REPAIR_S, 0.0  # type: ignore[misc]
    try:
        asyncio.run(all_of_them())
    finally:
        module.REPAIR_S = old  # type: ignore[misc]


async def test_a_defect_costs_the_journal_over_which_it_comes_and_no_other():
    class Defective(MemoryJournals):
        async def append(self, appends: Sequence[Append]) -> set[JournalId]:
            if any(entry.body == b"bad" for a in appends for entry in a.entries):
                raise ArithmeticError("what nobody thought of")
            return await super().append(appends)

    store, keeper = Defective(), Kept()
    async with running(store, keeper) as journals:
        for id_ in (J1, J2, J3):
            await journals.create(journal(id_))
        done = await asyncio.gather(
            journals.append(J1, one(b"a")),
            journals.append(J2, one(b"bad")),
            journals.append(J3, one(b"c")),
            return_exceptions=True,
        )
        assert (done[0], done[2]) == (1, 1)
        assert isinstance(done[1], StoreFailed)
        assert keeper.seen[-1] == ("lost", J2, 0)
        with pytest.raises(Late):
            await journals.append(J2, one(b"x"))

        assert await journals.append(J1, one(b"b")) == 2


async def test_there_is_a_limit_to_everything(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "WAITING_MAX", 1)
    monkeypatch.setattr(module, "ENTRY_BYTES_MAX", 10)
    monkeypatch.setattr(module, "SMALL_BYTES_MAX", 5)
    async with running() as journals:
        await journals.create(journal())
        with pytest.raises(BodyTooLarge, match="entry has 11 bytes, the limit is 10"):
            await journals.append(J1, one(b"x" * 11))
        with pytest.raises(BodyTooLarge, match="head"):
            await journals.append(J1, head=b"x" * 6)
        with pytest.raises(BodyTooLarge, match="wish"):
            await journals.wish(J1, b"x" * 6)
        done = await asyncio.gather(
            *(journals.append(J1, one(b"x")) for _ in range(2)), return_exceptions=True
        )

        assert done[0] == 1
        assert isinstance(done[1], QueueFull)


# ---- whose it is --------------------------------------------------------------------------------


async def test_who_lost_its_journal_is_told_and_all_that_waits_with_it():
    store, keeper = MemoryJournals(), Kept(places=1)
    async with running(store, keeper) as journals:
        await journals.create(journal())
        await store.fence("us")
        done = await asyncio.gather(
            *(journals.append(J1, one(b"x")) for _ in range(3)), return_exceptions=True
        )
        assert [type(each) for each in done] == [Late] * 3
        assert (keeper.seen[-1], journals.late) == (("lost", J1, 0), 1)
        assert await bodies(store) == []

        journals.look()
        await eventually(lambda: keeper.has)
        assert await journals.append(J1, one(b"y")) == 1


async def test_a_journal_that_comes_back_was_lost_before():
    """It was given to us anew: whoever went on with it stops, and then it begins."""
    store, keeper = MemoryJournals(), Kept()
    async with running(store, keeper) as journals:
        await journals.create(journal())
        await store.fence("us")
        journals.look()
        await eventually(lambda: len(keeper.seen) == 3)

        assert keeper.seen == [("adopt", J1, 1), ("lost", J1, 0), ("adopt", J1, 3)]


@pytest.mark.parametrize("how", ["before", "after"])
async def test_a_claim_that_seemed_to_fail_is_found_out(how: str):
    store, keeper = Unsure(once("claim", how)), Kept()
    await MemoryJournals.create(store, journal())
    async with running(store, keeper):
        await eventually(lambda: keeper.has)

        assert [what for what, *_ in keeper.seen] == ["adopt"]


async def test_what_was_created_and_looked_failed_is_gone_on_with():
    store, keeper = Unsure(once("create")), Kept()
    async with running(store, keeper) as journals:
        with pytest.raises(StoreFailed):
            await journals.create(journal())
        await eventually(lambda: keeper.has)
        assert (await journals.create(journal())).id == J1
        assert [what for what, *_ in keeper.seen] == ["adopt"]

        assert await journals.append(J1, one(b"x")) == 1


async def test_the_next_start_goes_on_with_what_is_not_over():
    store, keeper = MemoryJournals(), Kept()
    await store.open("an earlier life")
    await store.create(journal(), one(b"x"), is_ours=True)
    async with running(store, keeper) as journals:
        await eventually(lambda: keeper.has)

        assert await journals.append(J1, one(b"y")) == 2


async def test_no_more_is_claimed_than_there_is_room_for():
    store, keeper = MemoryJournals(), Kept(places=2)
    async with running(store, keeper) as journals:
        for id_ in (J1, J2, J3):
            await journals.create(journal(id_))
        assert list(keeper.has) == [J1, J2]
        await journals.append(J1, ended_at=200.0)
        del keeper.has[J1]
        journals.look()
        await eventually(lambda: J3 in keeper.has)
        journals.hold()

        await journals.create(journal(JournalId("f" * 32)))
        assert len(keeper.has) == 2


async def test_a_name_that_is_taken_is_told_and_nothing_is_doubtful():
    async with running() as journals:
        await journals.create(journal())
        with pytest.raises(NameTaken):
            await journals.create(journal(J2, name=J1))

        assert await journals.append(J1, one(b"x")) == 1


async def test_a_draft_is_filled_and_adopted_when_it_is_published():
    store, keeper = MemoryJournals(), Kept()
    async with running(store, keeper) as journals:
        await journals.create(journal(is_draft=True))
        assert [await journals.append(J1, one(b"%d" % n)) for n in range(3)] == [1, 2, 3]
        assert keeper.seen == []
        await journals.publish(J1)
        assert keeper.seen == [("adopt", J1, 2)]
        assert await journals.append(J1, one(b"x")) == 4

        assert await journals.publish(J2) is None


@pytest.mark.parametrize("how", ["before", "after"])
async def test_a_draft_that_was_perhaps_published_can_be_published_again(how: str):
    store, keeper = Unsure(once("publish", how)), Kept()
    async with running(store, keeper) as journals:
        await journals.create(journal(is_draft=True))
        with pytest.raises(StoreFailed):
            await journals.publish(J1)
        await journals.publish(J1)
        await eventually(lambda: keeper.has)

        assert [what for what, *_ in keeper.seen] == ["adopt"]


async def test_a_draft_of_another_server_can_be_filled_here():
    store = MemoryJournals()
    await store.open("other")
    await store.create(journal(is_draft=True), one(b"x"))
    async with running(store) as journals:
        with pytest.raises(Late):
            await journals.append(J1, one(b"y"))
        await journals.take(J1)
        assert await journals.append(J1, one(b"y")) == 2
        assert await journals.delete(J1)

        with pytest.raises(Late):
            await journals.append(J1, one(b"z"))


# ---- wishes -------------------------------------------------------------------------------------


async def test_a_wish_is_passed_on_once_and_to_the_next_owner_until_it_was_heard():
    store, keeper = MemoryJournals(), Kept()
    async with running(store, keeper) as journals:
        await journals.create(journal())
        first = await journals.wish(J1, b"suspend")
        second = await journals.wish(J1, b"cancel")
        await eventually(lambda: len(keeper.seen) == 3)
        await journals.append(J1, one(b"suspended"), heard=first)
        assert first < second
        assert keeper.seen[1:] == [("wish", J1, b"suspend"), ("wish", J1, b"cancel")]
        assert await journals.wish(J2, b"none") == 0

    after = Kept()
    async with running(store, after, owner="the next"):
        await eventually(lambda: len(after.seen) == 2)

        assert after.seen == [("adopt", J1, 3), ("wish", J1, b"cancel")]


# ---- with others --------------------------------------------------------------------------------


async def test_who_shares_its_store_goes_on_with_what_a_silent_owner_left(
    monkeypatch: pytest.MonkeyPatch,
):
    store, keeper = MemoryJournals(), Kept()
    await store.open("silent")
    await store.create(journal(), is_ours=True)
    async with running(store, keeper, is_alone=False):
        await asyncio.sleep(0.01)
        assert keeper.seen == []
        monkeypatch.setattr(module, "LEASE_S", 0.01)
        await eventually(lambda: keeper.has)

        assert keeper.seen == [("adopt", J1, 3)]


async def test_what_others_leave_is_claimed_at_once():
    """Nobody waits for the next look."""
    store, keeper = MemoryJournals(), Kept()
    async with running(store, keeper, is_alone=False):
        await eventually(lambda: store._listeners)
        await store.create(journal())
        await eventually(lambda: keeper.has)
        await store.wish(J1, b"w")
        await eventually(lambda: len(keeper.seen) == 2)


async def test_who_was_fenced_off_notices_that_though_it_writes_nothing():
    """Else two would go on with the same."""
    store, keeper = MemoryJournals(), Kept()
    async with running(store, keeper, is_alone=False) as journals:
        await journals.create(journal())
        await eventually(lambda: store._beats["us"] > 1)
        store._owner = "other"
        await store.fence("us")
        await store.claim("job", 1)
        store._owner = "us"
        await eventually(lambda: not keeper.has)

        assert keeper.seen[-1] == ("lost", J1, 0)


async def test_old_ones_are_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SWEEP_S", 0.001)
    store = MemoryJournals()
    async with running(store, keep_for=Keep(over_s=0.0)) as journals:
        await journals.create(journal())
        await journals.append(J1, ended_at=journals.clock.now())
        while await store.get(J1) is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


# ---- the end ------------------------------------------------------------------------------------


async def test_what_came_before_the_end_is_written_and_everything_is_free():
    store = MemoryJournals()
    async with running(store) as journals:
        await journals.create(journal())
        last = asyncio.ensure_future(journals.append(J1, one(b"last")))
        await asyncio.sleep(0)

    assert await last == 1
    with pytest.raises(StoreFailed, match="goes down"):
        await journals.append(J1, one(b"later"))
    free = await store.get(J1)
    assert free is not None
    assert (free.owner, await bodies(store)) == ("", [b"last"])


async def test_what_cannot_be_written_at_the_end_is_told():
    store = MemoryJournals()
    async with running(store) as journals:
        await journals.create(journal())
        store.broken = GONE
        last = asyncio.ensure_future(journals.append(J1, one(b"last")))
        await eventually(lambda: journals.failure)

    with pytest.raises(StoreFailed, match="goes down"):
        await last


# ---- several as one -----------------------------------------------------------------------------

ONES = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.one_of(st.none(), st.binary(max_size=2)),
        st.lists(st.integers(1, 9), max_size=3),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=100, deadline=None)
@given(ones=ONES)
def test_several_appends_as_one_come_to_the_same(
    ones: list[tuple[int, bytes | None, list[int]]],
):
    appends, last = [], 0
    for number, head, replaces in ones:
        known = tuple(n for n in replaces if n <= last)
        new = tuple(NewEntry(body=b"%d" % n) for n in range(number))
        appends.append(Append(id=J1, fence=1, after=last, entries=new, head=head, replaces=known))
        last += number

    async def come_to(some: Sequence[Append]) -> tuple[Journal | None, list[Entry]]:
        store = MemoryJournals()
        await store.open("us")
        await store.create(journal(), is_ours=True)
        for append in some:
            assert await store.append([append]) == set()
        return await store.get(J1), await store.entries(J1)

    assert asyncio.run(come_to(appends)) == asyncio.run(come_to(merged(appends)))
