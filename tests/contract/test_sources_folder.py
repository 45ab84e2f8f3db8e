"""What the adapter of folders promises besides what all of them do."""

import asyncio
import errno
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from msgspec import structs
from tests.contract.test_sources import LONG_S, fetched, opened

from dayfly_gateway.triggers import folder
from dayfly_gateway.triggers.folder import Source
from dayfly_gateway.triggers.source import Delivery, SourceFailed, Topic
from dayfly_pool.brokers import FolderSource

pytestmark = pytest.mark.waits

SETTLE_S = 0.05


class Place:
    """A folder of the test, with a declaration of its own."""

    topic_spec = None

    def __init__(self, path: Path, **declared: str | float) -> None:
        declared = {"settle_seconds": SETTLE_S, **declared}
        self.spec = FolderSource(path=str(path), **declared)  # type: ignore[arg-type]

    async def publish(self, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """See `tests.brokers.Place`."""
        raise NotImplementedError

    def source(self, lease_s: float = 30.0, call_s: float = 10.0) -> Source:
        """See `tests.brokers.Place`."""
        return Source(self.spec, "folder", lease_s=lease_s, call_s=call_s)

    def topic(self) -> Topic:
        """See `tests.brokers.Place`."""
        raise NotImplementedError


async def drained(source: Source) -> None:
    """Take what comes, until that fails."""
    while True:
        for delivery in await source.fetch(9, LONG_S):
            await source.ack(delivery)


def paths(found: list[Delivery]) -> list[str]:
    return sorted(delivery.headers["file-path"] for delivery in found)


async def test_a_file_says_what_it_is(tmp_path: Path):
    (tmp_path / "below" / "it").mkdir(parents=True)
    (tmp_path / "below" / "it" / "a.csv").write_bytes(b"1,2")
    os.utime(tmp_path / "below" / "it" / "a.csv", ns=(0, 1_500_000_000_250_000_000))
    async with opened(Place(tmp_path)) as source:
        (delivery,) = await fetched(source, 1)

        assert delivery.body == b"1,2"
        assert delivery.headers == {
            "content-type": "text/csv",
            "file-path": "below/it/a.csv",
            "file-size": "3",
            "file-modified": "1500000000.250000",
        }
        assert delivery.at == pytest.approx(1_500_000_000.25)


async def test_only_files_that_match_and_are_no_links_are_given(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "a.csv").write_bytes(b"secret")
    inbox = tmp_path / "inbox"
    (inbox / "sub.csv").mkdir(parents=True)
    (inbox / ".done").mkdir()
    (inbox / "link.csv").symlink_to(secret / "a.csv")
    (inbox / "links").symlink_to(secret)
    os.mkfifo(inbox / "pipe.csv")
    for name in ("b.txt", ".hidden.csv", ".done/old.csv"):
        (inbox / name).write_bytes(b"no")
    for name in ("a.csv", "sub.csv/b.csv"):
        (inbox / name).write_bytes(b"yes")
    async with opened(Place(inbox, pattern="*.csv")) as source:
        found = await fetched(source, 2)

        assert paths(found) == ["a.csv", "sub.csv/b.csv"]
        assert await source.fetch(9, 2 * SETTLE_S) == []
        assert await source.lag() == 0


async def test_a_folder_that_becomes_a_link_is_not_followed(tmp_path: Path):
    """Between the scan and the reading, whoever may write there may do that."""
    (tmp_path / "inbox" / "sub").mkdir(parents=True)
    (tmp_path / "inbox" / "sub" / "a").write_bytes(b"ours")
    (tmp_path / "secret").mkdir()
    os.link(tmp_path / "inbox" / "sub" / "a", tmp_path / "secret" / "a")
    ((file,), _, _) = folder._scan(str(tmp_path / "inbox"), "*")
    known = folder._Known(file, 0.0)
    assert isinstance(folder._read(str(tmp_path / "inbox"), known), Delivery)
    (tmp_path / "inbox" / "sub").rename(tmp_path / "away")
    (tmp_path / "inbox" / "sub").symlink_to(tmp_path / "secret")

    assert folder._read(str(tmp_path / "inbox"), known) is None
    spec = FolderSource(path=str(tmp_path / "inbox"), afterwards="delete")
    folder._finish(spec, file)
    assert (tmp_path / "secret" / "a").exists()


async def test_a_file_that_is_still_written_is_not_given(tmp_path: Path):
    settle_s = 0.5
    async with opened(Place(tmp_path, settle_seconds=settle_s)) as source:
        loop, now = asyncio.get_running_loop(), 0.0
        with (tmp_path / "a").open("wb", buffering=0) as file:
            for _ in range(4):
                file.write(b"x")
                now = loop.time()
                found = await source.fetch(1, settle_s / 4)
                assert found == [] or loop.time() - now > settle_s  # we were asleep
        if not found:
            (delivery,) = await fetched(source, 1)

            assert delivery.body == b"xxxx"
            assert loop.time() - now >= settle_s


async def test_what_is_kept_is_given_once_until_it_changes(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"1")
    async with opened(Place(tmp_path)) as source:
        (first,) = await fetched(source, 1)
        assert await source.fetch(1, 2 * SETTLE_S) == []
        await source.ack(first)
        assert await source.fetch(1, 2 * SETTLE_S) == []
        (tmp_path / "a").write_bytes(b"22")
        (second,) = await fetched(source, 1)

        assert second.body == b"22"
        assert second.id != first.id
    async with opened(Place(tmp_path)) as source:
        (third,) = await fetched(source, 1)

        assert third.id == second.id


async def test_what_is_moved_writes_over_nothing(tmp_path: Path):
    name = "ä" * 127
    async with opened(Place(tmp_path, afterwards="move")) as source:
        for body in (b"1", b"2", b"3"):
            (tmp_path / name).write_bytes(body)
            os.utime(tmp_path / name, (0, 0))  # all the same, but for the inode
            (delivery,) = await fetched(source, 1)
            await source.ack(delivery)

        assert os.listdir(tmp_path) == [".done"]
        assert sorted(p.read_bytes() for p in (tmp_path / ".done").iterdir()) == [b"1", b"2", b"3"]


@pytest.mark.parametrize("afterwards", ["move", "delete"])
async def test_what_changed_meanwhile_is_neither_moved_nor_deleted(tmp_path: Path, afterwards: str):
    (tmp_path / "a").write_bytes(b"old")
    async with opened(Place(tmp_path, afterwards=afterwards)) as source:
        (old,) = await fetched(source, 1)
        (tmp_path / "a").write_bytes(b"newer")
        await source.ack(old)
        (new,) = await fetched(source, 1)
        assert new.body == b"newer"
        await source.ack(new)
        await source.ack(new)

        assert not (tmp_path / "a").exists()
        assert (tmp_path / ".done").exists() == (afterwards == "move")


async def test_a_done_folder_that_is_a_link_is_not_used(tmp_path: Path):
    (tmp_path / "inbox").mkdir()
    (tmp_path / "inbox" / "a").write_bytes(b"1")
    (tmp_path / "inbox" / ".done").symlink_to(tmp_path)
    async with opened(Place(tmp_path / "inbox", afterwards="move")) as source:
        (delivery,) = await fetched(source, 1)
        with pytest.raises(SourceFailed):
            await source.ack(delivery)

    assert (tmp_path / "inbox" / "a").exists()


async def test_a_file_that_is_too_long_is_said_to_be(tmp_path: Path):
    with (tmp_path / "long").open("wb") as file:
        file.truncate(folder.BODY_BYTES_MAX + 1)
    async with opened(Place(tmp_path)) as source:
        (delivery,) = await fetched(source, 1)

        assert (delivery.body, delivery.unread) == (b"", folder.BODY_BYTES_MAX + 1)


async def test_a_file_that_nobody_has_read_is_not_deleted(tmp_path: Path):
    with (tmp_path / "long").open("wb") as file:
        file.truncate(folder.BODY_BYTES_MAX + 1)
    async with opened(Place(tmp_path, afterwards="delete")) as source:
        (delivery,) = await fetched(source, 1)
        await source.ack(delivery)

        assert (tmp_path / "long").exists()
        assert await source.fetch(1, 0.0) == []


async def test_a_fetch_reads_no_more_than_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(folder, "FETCH_BYTES_MAX", 5)
    for name in "abc":
        (tmp_path / name).write_bytes(b"xx")
    async with opened(Place(tmp_path)) as source:
        await asyncio.sleep(2 * SETTLE_S)
        first = await source.fetch(9, LONG_S)
        second = await source.fetch(9, LONG_S)

        assert (paths(first), paths(second)) == (["a", "b"], ["c"])


async def test_names_of_any_bytes_are_survived(tmp_path: Path):
    name = b"a\xff\n\xe2\x80\xa8b"
    (tmp_path / os.fsdecode(name)).write_bytes(b"1")
    async with opened(Place(tmp_path, afterwards="delete")) as source:
        (delivery,) = await fetched(source, 1)
        await source.ack(delivery)

        assert delivery.headers["file-path"] == r"a\udcff\n\u2028b"
        assert os.listdir(tmp_path) == []


async def test_too_many_entries_are_told_when_nothing_can_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(folder, "ENTRIES_MAX", 3)
    for number in range(5):
        (tmp_path / f"{number}").write_bytes(b"1")
    async with opened(Place(tmp_path, afterwards="move")) as source:
        for _ in range(5):
            (delivery,) = await fetched(source, 1)
            await source.ack(delivery)
    for number in range(5):
        (tmp_path / f"{number}").write_bytes(b"1")
    async with opened(Place(tmp_path, pattern="*.csv", afterwards="move")) as source:
        with pytest.raises(SourceFailed, match="over 3 entries"):
            await source.fetch(1, LONG_S)
    async with opened(Place(tmp_path)) as source:
        with pytest.raises(SourceFailed, match="over 3 entries"):
            await drained(source)


async def test_what_may_not_be_read_is_named_when_nothing_else_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As root everything may be read: so the system's answer is given here."""
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    real = os.open

    def refusing(path: object, *arguments: int, **more: int) -> int:
        if path == "a":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *arguments, **more)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(os, "open", refusing)
    async with opened(Place(tmp_path)) as source:
        (delivery,) = await fetched(source, 1)
        assert delivery.body == b"2"
        await source.ack(delivery)
        with pytest.raises(SourceFailed, match="a: Permission denied"):
            await source.fetch(1, LONG_S)


async def test_a_file_below_is_found_without_a_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(folder, "RESCAN_S", 0.05)
    (tmp_path / "below").mkdir()
    async with opened(Place(tmp_path)) as source:
        waiting = asyncio.create_task(source.fetch(1, LONG_S))
        await asyncio.sleep(0)
        (tmp_path / "below" / "a").write_bytes(b"1")

        assert paths(await waiting) == ["below/a"]


async def test_a_folder_that_is_not_there_or_goes_is_named(tmp_path: Path):
    inbox = tmp_path / "inbox"
    source = Place(inbox).source()
    with pytest.raises(SourceFailed, match=r"inbox: .*No such file"):
        await source.open()
    await source.close()
    inbox.mkdir()
    async with opened(Place(inbox)) as source:
        inbox.rmdir()
        with pytest.raises(SourceFailed, match=r"inbox: .*No such file"):
            await source.fetch(1, LONG_S)


async def test_nothing_is_left_of_a_source_that_was_closed(tmp_path: Path):
    before = asyncio.all_tasks()
    async with opened(Place(tmp_path)) as source:
        fetching = asyncio.create_task(source.fetch(1, LONG_S))
        await asyncio.wait((fetching,), timeout=0.05)
        fetching.cancel()
        await asyncio.wait((fetching,))
        (tmp_path / "a").write_bytes(b"1")
        (delivery,) = await fetched(source, 1)
        again = structs.replace(delivery)

    assert asyncio.all_tasks() == before
    for call in (source.ack(again), source.fetch(1, 0.0)):
        with pytest.raises(SourceFailed):
            await call
