"""What every store of journals promises, whatever keeps them."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import count
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs
from tests.servers import Postgres

from dayfly_pool.errors import NameTaken, StoreFailed, TooManyWishes
from dayfly_pool.store.journals import (
    PAGE_BYTES_MAX,
    ROW_BYTES_MAX,
    SWEEP_ENTRIES,
    WISHES_MAX,
    Append,
    Entry,
    Journal,
    JournalId,
    NewEntry,
    Size,
    Store,
    Wish,
)
from dayfly_pool.store.memory_journals import MemoryJournals
from dayfly_pool.store.postgres_journals import PostgresJournals
from dayfly_pool.store.sqlite_journals import SqliteJournals

J1, J2, J3, J4 = (JournalId(f"{n:032x}") for n in range(1, 5))
KINDS = ("memory", "sqlite", "postgres")
LONG = bytes(range(256)) * (ROW_BYTES_MAX // 256 + 1)


@pytest.fixture(scope="session")
def dsn() -> Iterator[str]:
    """A PostgreSQL of the session."""
    with Postgres() as started:
        yield started.dsn


fresh = count()


def make(kind: str, folder: Path, dsn: str) -> Store:
    """An empty one."""
    if kind == "memory":
        return MemoryJournals()
    if kind == "sqlite":
        return SqliteJournals(folder / "journals.sqlite", folder / "bodies")
    name = f"journals_{next(fresh)}"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return PostgresJournals(dsn.replace("dbname=postgres", f"dbname={name}"))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def store(kind: str, tmp_path: Path, dsn: str) -> AsyncIterator[Store]:
    made = make(kind, tmp_path, dsn)
    await made.open("us")
    yield made
    await made.close()


def journal(id_: JournalId = J1, **changed: object) -> Journal:
    made = Journal(
        id=id_,
        kind="job",
        namespace="default",
        name=f"name-{int(id_, 16)}",
        created_at=100.0,
        head=b"head",
        spec=b"spec",
    )
    return structs.replace(made, **changed)


def new(*bodies: bytes, part: int = 0) -> tuple[NewEntry, ...]:
    return tuple(NewEntry(part=part, low=n, high=n, body=body) for n, body in enumerate(bodies))


async def bodies(store: Store, id_: JournalId = J1) -> list[bytes]:
    return [entry.body for entry in await store.entries(id_)]


async def ours(store: Store, id_: JournalId = J1, **changed: object) -> Journal:
    """One that is owned by us."""
    return await store.create(journal(id_, **changed), is_ours=True)


def append(to: Journal, *entries: bytes, after: int | None = None, **more: object) -> Append:
    made = Append(
        id=to.id,
        fence=to.fence,
        after=to.last if after is None else after,
        entries=new(*entries),
    )
    return structs.replace(made, **more)


async def again(store: Store, id_: JournalId = J1) -> Journal:
    found = await store.get(id_)
    assert found is not None
    return found


# ---- a life -------------------------------------------------------------------------------------


async def test_a_journal_is_claimed_written_read_and_ends(store: Store):
    made = await store.create(journal(), new(b"first"))
    assert (made.owner, made.fence, made.last) == ("", 0, 1)
    (claimed,) = await store.claim("job", 10)
    assert (claimed.owner, claimed.fence, claimed.last) == ("us", 1, 1)
    assert (claimed.head, claimed.spec, claimed.damage) == (b"head", b"spec", "")
    assert await store.claim("job", 10) == []

    assert await store.append([append(claimed, b"second", b"third", head=b"new")]) == set()
    assert await store.entries(J1) == [
        Entry(1, 0, 0, 0, b"first"),
        Entry(2, 0, 0, 0, b"second"),
        Entry(3, 0, 1, 1, b"third"),
    ]
    assert await store.append([append(claimed, after=3, ended_at=200.0)]) == set()
    over = await again(store)
    assert (over.is_over, over.ended_at, over.owner, over.head) == (True, 200.0, "", b"new")
    assert await store.claim("job", 10) == []


async def test_a_journal_can_be_ours_from_the_first(store: Store):
    made = await ours(store)

    assert (made.owner, made.fence) == ("us", 1)
    assert await store.append([append(made, b"x")]) == set()
    assert await store.claim("job", 10) == []


async def test_the_oldest_are_claimed_first_of_one_kind_and_no_more_than_wanted(store: Store):
    for id_ in (J3, J1, J2):
        await store.create(journal(id_))
    await store.create(journal(J4, kind="run"))

    assert [each.id for each in await store.claim("job", 2)] == [J1, J2]
    assert [each.id for each in await store.claim("job", 2)] == [J3]
    assert [each.id for each in await store.claim("run", 2)] == [J4]


async def test_no_two_have_the_same_name_until_one_is_deleted(store: Store):
    await ours(store, name="same")
    with pytest.raises(NameTaken):
        await store.create(journal(J2, name="same", spec=LONG), new(b"x"))
    assert await store.get(J2) is None
    await store.create(journal(J2, name="same", kind="run"))
    await store.create(journal(J3, name="same", namespace="other"))
    assert await store.delete(J1) is False  # it is open

    await store.append([append(await again(store), ended_at=200.0)])
    assert await store.delete(J1) is True
    assert await store.delete(J1) is False
    await store.create(journal(J4, name="same"))
    found = await store.find("job", "default", "same")
    assert found is not None
    assert found.id == J4
    assert await store.find("job", "none", "same") is None


async def test_what_was_created_already_is_not_created_again(store: Store):
    """Whoever does not know whether it was tries it once more."""
    made = await store.create(journal(), new(b"x"), is_ours=True)
    await store.append([append(made, b"y")])

    assert await store.create(journal(), new(b"x"), is_ours=True) == await again(store)
    assert await bodies(store) == [b"x", b"y"]


# ---- drafts -------------------------------------------------------------------------------------


async def test_a_draft_is_filled_in_pieces_and_nobody_has_it_before_it_is_published(store: Store):
    draft = await store.create(journal(is_draft=True))
    assert (draft.owner, draft.fence, draft.is_draft) == ("us", 1, True)
    assert await store.append([append(draft, b"one")]) == set()
    assert await store.append([append(draft, b"two", after=1)]) == set()
    assert await store.release() == 0
    assert await store.fence("us") == 0
    assert await store.claim("job", 10) == []
    assert await store.page("job") == []
    assert await store.wish(J1, b"cancel") == 0

    published = await store.publish(J1)
    assert published is not None
    assert (published.is_draft, published.owner, published.last) == (False, "", 2)
    assert await store.append([append(draft, b"three", after=2)]) == {J1}
    (claimed,) = await store.claim("job", 10)
    assert (claimed.fence, await bodies(store)) == (3, [b"one", b"two"])


async def test_a_draft_can_be_ours_when_it_is_published(store: Store):
    await store.create(journal(is_draft=True))
    published = await store.publish(J1, is_ours=True)
    assert published is not None

    assert (published.owner, published.fence) == ("us", 2)
    assert await store.publish(J1) == published
    assert await store.publish(J2) is None


async def test_who_takes_a_draft_goes_on_and_the_other_is_late(store: Store):
    draft = await store.create(journal(is_draft=True))
    taken = await store.take(J1)
    assert taken is not None

    assert await store.append([append(draft, b"old")]) == {J1}
    assert await store.append([append(taken, b"new")]) == set()
    await store.publish(J1)
    assert await store.take(J1) is None
    assert await store.take(J2) is None


async def test_a_draft_that_nobody_publishes_is_forgotten(store: Store):
    await store.create(journal(is_draft=True), new(b"x"))
    await ours(store, J2)
    await sweep(store, 149.0, draft_s=50.0)
    assert await store.get(J1) is not None
    await sweep(store, 150.0, draft_s=50.0)

    assert await store.get(J1) is None
    assert await store.get(J2) is not None


# ---- who may write ------------------------------------------------------------------------------


async def test_who_lost_a_journal_comes_too_late_and_the_others_go_on(store: Store):
    """Of what came too late nothing is written; what it knows of the journal is old."""
    first, second = await ours(store, J1), await ours(store, J2)
    assert await store.release({(J2, 1)}) == 1
    (new_one,) = await store.claim("job", 10)
    lost = append(first, b"old", head=b"old", ended_at=150.0)

    assert await store.append([lost, append(second, b"x")]) == {J1}
    assert await store.append([append(new_one, b"new")]) == set()
    assert (await bodies(store, J1), await bodies(store, J2)) == ([b"new"], [b"x"])
    assert ((await again(store)).head, (await again(store)).is_over) == (b"head", False)
    assert await store.append([structs.replace(append(first), id=J3)]) == {J3}


async def test_who_was_fenced_off_is_late_at_once_though_nobody_has_it_yet(store: Store):
    made = await ours(store)
    assert await store.fence("us") == 1

    assert await store.append([append(made, b"x")]) == {J1}
    (claimed,) = await store.claim("job", 10)
    assert claimed.fence == 3


async def test_what_was_appended_already_is_there_once(store: Store):
    """After a failure nobody knows: so the same is written once more."""
    made = await ours(store)
    await store.wish(J1, b"w")
    parts = append(made, b"a", b"b", b"c", head=b"h", replaces=(2,))
    end = append(made, b"d", after=3, ended_at=200.0)
    for _ in range(2):
        assert await store.append([parts]) == set()
    for _ in range(2):
        assert await store.append([end]) == set()

    assert [(e.number, e.body) for e in await store.entries(J1)] == [
        (1, b"a"),
        (3, b"c"),
        (4, b"d"),
    ]
    assert ((await again(store)).last, (await again(store)).ended_at) == (4, 200.0)


async def test_who_leaves_out_an_entry_is_refused(store: Store):
    """It takes something for written that is not there."""
    made = await ours(store)

    assert await store.append([append(made, b"x", after=1)]) == {J1}
    assert await bodies(store) == []


async def test_what_is_replaced_goes_with_what_comes_instead(store: Store):
    made = await ours(store)
    await store.append([append(made, b"a", LONG, b"c", LONG)])
    assert await store.append([append(made, b"abc", after=4, replaces=(1, 2, 3))]) == set()

    assert [(e.number, e.body) for e in await store.entries(J1)] == [(4, LONG), (5, b"abc")]
    assert await store.size(J1) == Size(2, len(LONG) + 3)
    await sweep(store)
    assert await bodies(store) == [LONG, b"abc"]


async def test_many_journals_are_appended_to_at_once(store: Store):
    """More than one statement can hold."""
    ids = [JournalId(f"{n:032x}") for n in range(150)]
    made = [await ours(store, id_) for id_ in ids]
    many = [append(each, *(b"%d" % n for n in range(3))) for each in made]
    assert await store.append(many) == set()

    for id_ in (ids[0], ids[-1]):
        assert await bodies(store, id_) == [b"0", b"1", b"2"]


async def test_all_of_ours_can_be_released_but_some(store: Store):
    """The answer to a claim may be lost, though it was done."""
    first, second = await ours(store, J1), await ours(store, J2)
    await ours(store, J3)
    assert await store.release({(J1, first.fence), (J2, second.fence - 1)}) == 2

    assert [each.id for each in await store.claim("job", 10)] == [J2, J3]
    await store.close()
    await store.open("them")
    assert await store.release() == 0


async def test_an_owner_that_lives_says_so_and_one_that_is_fenced_is_forgotten(store: Store):
    await ours(store)
    assert await store.beat() == {"us": 1}
    await store.close()
    await store.open("them")
    assert await store.beat() == {"us": 1, "them": 1}
    assert await store.claim("job", 10) == []

    assert await store.fence("us") == 1
    assert await store.beat() == {"them": 2}
    assert [each.id for each in await store.claim("job", 10)] == [J1]


async def test_who_was_forgotten_and_claims_something_is_known_again(store: Store):
    """Else nobody would find out that it is silent."""
    await store.create(journal())
    await store.close()
    await store.open("them")
    await store.fence("us")
    await store.close()
    await store.open("us")
    await store.fence("them")
    await store.claim("job", 10)
    await store.close()
    await store.open("them")

    assert (await store.beat()).keys() == {"us", "them"}


# ---- wishes -------------------------------------------------------------------------------------


async def test_a_wish_waits_for_the_owner_until_it_was_heard(store: Store):
    await store.create(journal())
    first, second = await store.wish(J1, b"suspend"), await store.wish(J1, b"cancel")
    assert 0 < first < second
    assert await store.wishes() == {}
    (claimed,) = await store.claim("job", 10)
    assert await store.wishes() == {J1: [Wish(first, b"suspend"), Wish(second, b"cancel")]}

    await store.append([append(claimed, b"suspended", heard=first)])
    assert await store.wishes() == {J1: [Wish(second, b"cancel")]}
    await store.append([append(claimed, after=1, ended_at=200.0)])
    assert await store.wishes() == {}
    assert await store.wish(J1, b"again") == 0
    assert await store.wish(J2, b"none") == 0


async def test_there_are_not_too_many_wishes(store: Store):
    await ours(store, J1)
    await ours(store, J2)
    for _ in range(WISHES_MAX):
        await store.wish(J1, b"x")
    with pytest.raises(TooManyWishes):
        await store.wish(J1, b"x")

    assert len((await store.wishes())[J1]) == WISHES_MAX
    assert await store.wish(J2, b"x")


# ---- looking ------------------------------------------------------------------------------------


async def test_a_page_has_the_newest_first_without_specs(store: Store):
    for id_ in (J1, J2, J3):
        await store.create(journal(id_))
    await store.create(journal(J4, namespace="other"))
    await store.create(journal(JournalId("f" * 32), kind="run"))
    (first,) = await store.claim("job", 1)
    await store.append([append(first, ended_at=200.0)])

    page = await store.page("job", limit=3)
    assert [each.id for each in page] == [J4, J3, J2]
    assert {(each.head, each.spec, each.damage) for each in page} == {(b"head", b"", "")}
    assert [each.id for each in await store.page("job", before=J2)] == [J1]
    assert [each.id for each in await store.page("job", "other")] == [J4]
    assert [each.id for each in await store.page("job", "default", is_over=True)] == [J1]
    assert [each.id for each in await store.page("job", is_over=False)] == [J4, J3, J2]


async def test_entries_are_found_by_part_number_and_what_they_cover(store: Store):
    made = await ours(store)
    entries = (
        NewEntry(1, 0, 9, b"a"),
        NewEntry(0, 0, 0, b"log"),
        NewEntry(1, 10, 19, b"b"),
        NewEntry(1, -(1 << 63), (1 << 63) - 1, b"all"),
    )
    await store.append([append(made, entries=entries)])

    async def found(*asked: object, **more: object) -> list[bytes]:
        return [entry.body for entry in await store.entries(J1, *asked, **more)]

    assert await found(1) == [b"a", b"b", b"all"]
    assert await found(1, 1, 1) == [b"b"]
    assert await found(after=2) == [b"b", b"all"]
    assert await found(1, covering=9) == [b"a", b"all"]
    assert await found(1, covering=10) == [b"b", b"all"]
    assert await found(covering=0) == [b"a", b"log", b"all"]
    assert await found(2) == []
    assert await store.entries(J2) == []
    assert await store.size(J1) == Size(4, 8)
    assert await store.size(J2) == Size(0, 0)


async def test_entries_come_in_pages_of_so_many_bytes_and_one_at_least(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    made = await ours(store)
    third = b"x" * (PAGE_BYTES_MAX // 3)
    long = b"y" * (PAGE_BYTES_MAX + 1)
    await store.append([append(made, third, third, third, long, b"z")])

    pages, after = [], 0
    while page := await store.entries(J1, after=after):
        pages.append([entry.number for entry in page])
        after = page[-1].number
    assert pages == [[1, 2, 3], [4], [5]]


@pytest.mark.parametrize("size", [0, ROW_BYTES_MAX, ROW_BYTES_MAX + 1, 2_000_000])
async def test_long_bodies_and_specs_come_back_whole(store: Store, size: int):
    body = (LONG * (size // len(LONG) + 1))[:size]
    made = await ours(store, spec=body)
    await store.append([append(made, body, body[::-1])])
    await store.close()
    await store.open("us")

    assert await bodies(store) == [body, body[::-1]]
    assert (await again(store)).spec == made.spec == body


# ---- what is forgotten --------------------------------------------------------------------------


async def sweep(store: Store, now: float = 0.0, over_s: float = 1e9, draft_s: float = 1e9) -> int:
    """Until nothing is left to do; how often that took."""
    for times in count():
        if not await store.sweep(now, over_s, draft_s):
            return times
    raise AssertionError


async def test_what_ended_long_ago_is_forgotten_with_its_entries_and_nothing_else(store: Store):
    for id_, ended_at in ((J1, 110.0), (J2, 111.0), (J3, None)):
        made = await ours(store, id_, spec=LONG)
        await store.append([append(made, LONG, b"x", ended_at=ended_at)])
        await store.wish(id_, b"wish")
    await sweep(store, 160.0, over_s=50.0)

    assert [each.id for each in await store.page("job")] == [J3, J2]
    assert await store.size(J1) == Size(0, 0)
    assert [await bodies(store, id_) for id_ in (J2, J3)] == [[LONG, b"x"]] * 2
    assert (await again(store, J2)).spec == LONG
    assert list(await store.wishes()) == [J3]


async def test_a_long_journal_goes_in_pieces(kind: str, store: Store):
    """So nobody waits long for it."""
    made = await ours(store, J1)
    await store.append([append(made, *[b"x"] * (2 * SWEEP_ENTRIES + 1), ended_at=110.0)])
    assert await store.delete(J1)
    assert await store.get(J1) is None
    times = await sweep(store)

    assert times >= 3 or kind == "memory"
    await ours(store, J1)
    assert await bodies(store) == []


# ---- what survives ------------------------------------------------------------------------------


async def test_what_was_written_is_there_after_it_was_opened_again(store: Store):
    made = await ours(store)
    await store.append([append(made, b"a", b"b", head=b"h", heard=1)])
    number = await store.wish(J1, b"w")
    before = await again(store), await store.entries(J1)
    await store.close()
    await store.open("us")

    assert (await again(store), await store.entries(J1)) == before
    assert await store.wishes() == {J1: [Wish(number, b"w")]}


@pytest.fixture
async def shared(tmp_path: Path, dsn: str) -> AsyncIterator[PostgresJournals]:
    """A store that several use at once."""
    made = make("postgres", tmp_path, dsn)
    assert isinstance(made, PostgresJournals)
    await made.open("us")
    yield made
    await made.close()


async def test_who_listens_hears_of_what_is_free_and_of_wishes_for_it(shared: PostgresJournals):
    other = PostgresJournals(shared._postgres.dsn)
    await other.open("other")
    heard = asyncio.Event()
    listening = asyncio.ensure_future(other.listen(heard.set))

    async def told(of: str) -> None:
        async with asyncio.timeout(10):
            await heard.wait()
        heard.clear()

    for number in range(5, 500):
        await shared.create(journal(JournalId(f"{number:032x}")))
        await asyncio.sleep(0.01)
        if heard.is_set():
            break
    heard.clear()
    await ours(shared, J1)
    theirs = (await other.claim("job", 1))[0]
    assert await shared.wish(J1, b"for us") > 0
    await shared.wish(theirs.id, b"for them")
    await told("a wish")
    assert theirs.id in await other.wishes()
    await shared.release()
    await told("what is free")
    listening.cancel()
    await asyncio.wait({listening})
    await other.close()


async def test_two_that_claim_at_once_never_get_the_same(shared: PostgresJournals):
    other = PostgresJournals(shared._postgres.dsn)
    await other.open("other")
    for number in range(60):
        await shared.create(journal(JournalId(f"{number:032x}")))
    got = await asyncio.gather(*(s.claim("job", 7) for _ in range(9) for s in (shared, other)))
    claimed = [each.id for some in got for each in some]
    await other.close()

    assert len(claimed) == len(set(claimed)) == 60


async def test_a_connection_that_is_cut_is_made_again(shared: PostgresJournals, dsn: str):
    """What was under way failed, and nobody knows; the same again then works."""
    made = await ours(shared)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid != pg_backend_pid()"
        )
    with pytest.raises(StoreFailed):
        await shared.append([append(made, b"x")])

    assert await shared.append([append(made, b"x")]) == set()
    assert await bodies(shared) == [b"x"]


async def test_what_a_damaged_database_gives_is_told(shared: PostgresJournals):
    await ours(shared, J1)
    await ours(shared, J2)
    await shared.append([append(await again(shared, J1), b"a", b"b")])
    with psycopg.connect(shared._postgres.dsn, autocommit=True) as connection:
        connection.execute("UPDATE dayfly.journal_entries SET body = 'x' WHERE number = 1")
        connection.execute("UPDATE dayfly.journals SET spec = 'x' WHERE row = 1")
        connection.execute("UPDATE dayfly.journals SET head = 'x' WHERE row = 2")
    damaged, well = await shared.entries(J1)

    assert (damaged.body, bool(damaged.damage), well.body, well.damage) == (b"", True, b"b", "")
    assert (await again(shared, J1)).damage.startswith("its spec")
    assert [each.damage[:8] for each in await shared.page("job")] == ["its head", ""]


async def test_a_name_that_postgresql_cannot_keep_is_refused(shared: PostgresJournals):
    """PostgreSQL keeps none: whoever asks is told, and the next one is served."""
    with pytest.raises(StoreFailed):
        await shared.create(journal(name="a\0b"))

    assert (await ours(shared)).fence == 1


# ---- any order of things ------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *("create", "draft", "publish", "take", "claim", "append", "again", "end"),
                *("wish", "hear", "release", "fence", "delete", "sweep", "replace"),
            ]
        ),
        st.integers(0, 7),
    ),
    max_size=40,
)


async def play(store: Store, steps: Sequence[tuple[str, int]]) -> list[object]:
    """What is to be seen after each step."""
    seen: list[object] = []
    held: dict[JournalId, Journal] = {}
    last = Append(id=J1, fence=1, after=0)
    now = 100.0
    for number, (what, which) in enumerate(steps, start=1):
        now += 1
        id_ = JournalId(f"{which % 4:032x}")
        mine = held.get(id_)
        match what:
            case "create" | "draft":
                one = journal(JournalId(f"{which:032x}"), name=f"n-{which % 5}", created_at=now)
                one = structs.replace(one, is_draft=what == "draft")
                try:
                    made = await store.create(one, new(b"0"), is_ours=which % 2 == 0)
                    seen.append(made)
                    held[made.id] = made
                except NameTaken:
                    seen.append("taken")
            case "publish" | "take":
                found = await (
                    store.take(id_) if what == "take" else store.publish(id_, is_ours=which > 3)
                )
                seen.append(found)
                if found is not None:
                    held[id_] = found
            case "claim":
                claimed = await store.claim("job", which)
                held |= {each.id: each for each in claimed}
                seen.append(claimed)
            case "append" | "replace" if mine:
                last = append(mine, b"%d" % number, head=b"%d" % number if which > 3 else None)
                if what == "replace":
                    last = structs.replace(last, replaces=tuple(range(1, which)))
                late = await store.append([last])
                seen.append(late)
                if not late:
                    held[id_] = structs.replace(mine, last=last.last)
            case "again":
                seen.append(await store.append([last]))
            case "end" if mine:
                seen.append(await store.append([append(mine, ended_at=now)]))
            case "wish":
                seen.append(await store.wish(id_, b"%d" % number) > 0)
            case "hear" if mine:
                wished = (await store.wishes()).get(id_, ())
                seen.append([wish.body for wish in wished])
                heard = wished[0].number if wished else 0
                seen.append(await store.append([append(mine, heard=heard)]))
            case "release":
                seen.append(await store.release([(id_, which)]))
            case "fence":
                seen.append(await store.fence("us"))
            case "delete":
                seen.append(await store.delete(id_))
            case "sweep":
                await sweep(store, now, 5.0, 5.0)
        seen.append(await store.page("job"))
        seen.append([await store.get(JournalId(f"{n:032x}")) for n in range(8)])
        seen.append([await store.entries(JournalId(f"{n:032x}")) for n in range(4)])
    return seen


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=STEPS)
def test_the_fake_and_the_real_ones_agree(
    steps: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory, dsn: str
):
    with psycopg.connect(dsn, autocommit=True) as connection:  # quicker than a new database
        connection.execute("DROP SCHEMA IF EXISTS dayfly CASCADE")
    folder = tmp_path_factory.mktemp("journals")
    sqlite = make("sqlite", folder, dsn)

    async def all_of_them() -> None:
        seen = []
        for store in (MemoryJournals(), sqlite, PostgresJournals(dsn)):
            await store.open("us")
            try:
                seen.append(await play(store, steps))
            finally:
                await store.close()
        assert seen[0] == seen[1]
        assert seen[0] == seen[2]

    asyncio.run(all_of_them())
