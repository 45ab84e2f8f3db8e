"""Packages by URL: only what the digest says, only from where it may come."""

import asyncio
import hashlib
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from dayfly_pool import downloads
from dayfly_pool.errors import BadInput, FetchFailed

DATA = b"a package"
DIGEST = hashlib.sha256(DATA).hexdigest()
HERE = ("127.0.0.1",)


@asynccontextmanager
async def serving(handler: object) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/{path:.*}", handler)  # type: ignore[arg-type]
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def give(request: web.Request) -> web.Response:
    return web.Response(body=DATA)


async def test_what_its_digest_says_is_taken():
    async with serving(give) as url:
        assert await downloads.fetch(f"{url}/a.zip", DIGEST, HERE) == DATA


async def test_anything_else_is_refused():
    async with serving(give) as url:
        with pytest.raises(BadInput, match=f"has sha256 {DIGEST}"):
            await downloads.fetch(url, "0" * 64, HERE)


async def test_redirections_are_followed_a_few_times():
    async def there(request: web.Request) -> web.Response:
        left = int(request.match_info["path"])
        if not left:
            return web.Response(body=DATA)
        raise web.HTTPFound(f"/{left - 1}")

    async with serving(there) as url:
        assert await downloads.fetch(f"{url}/4", DIGEST, HERE) == DATA
        with pytest.raises(FetchFailed, match="redirections"):
            await downloads.fetch(f"{url}/5", DIGEST, HERE)


async def test_a_redirection_leads_nowhere_that_is_not_allowed():
    async def elsewhere(request: web.Request) -> web.Response:
        raise web.HTTPFound("http://169.254.169.254/latest")

    async with serving(elsewhere) as url:
        with pytest.raises(BadInput, match="https only"):
            await downloads.fetch(url, DIGEST, HERE)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "10.0.0.1", "[::1]", "[::ffff:10.0.0.1]", "169.254.169.254",
        "192.0.0.192", "168.63.129.16", "[64:ff9b::a00:1]", "[64:ff9b:1::a00:1]",
        "[2002:a00:1::1]", "[::10.0.0.1]", "[::ffff:0:a00:1]", "[fec0::1]",
    ],
)  # fmt: skip
async def test_addresses_that_are_not_public_are_not_asked(host: str):
    with pytest.raises(BadInput, match=r"which is not public: .* --package-host"):
        await downloads.fetch(f"https://{host}/a.zip", DIGEST)


async def test_plain_http_is_refused():
    with pytest.raises(BadInput, match="https only"):
        await downloads.fetch("http://example.org/a.zip", DIGEST)


async def test_what_is_too_long_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(downloads, "BYTES_MAX", 8)
    async with serving(give) as url:
        with pytest.raises(BadInput, match="is over"):
            await downloads.fetch(url, DIGEST, HERE)


async def test_a_large_one_is_held_once():
    """Several come at once, and a shard has a gigabyte in all."""
    size = 32 << 20

    async def much(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(size >> 20):
            await response.write(bytes(1 << 20))
        return response

    digest = hashlib.sha256(bytes(size)).hexdigest()
    async with serving(much) as url:
        tracemalloc.start()
        try:
            await downloads.fetch(url, digest, HERE)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 1.6 * size


async def test_a_server_that_says_nothing_more_is_left(monkeypatch: pytest.MonkeyPatch):
    is_left = asyncio.Event()

    async def begin(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "9"})
        await response.prepare(request)
        await response.write(b"a")
        await is_left.wait()
        return response

    monkeypatch.setattr(downloads, "FETCH_S_MAX", 0.2)
    async with serving(begin) as url:
        with pytest.raises(FetchFailed, match=r"in 0\.2 s"):
            await downloads.fetch(url, DIGEST, HERE)
        is_left.set()


async def test_what_goes_wrong_is_told_without_the_urls_signature():
    async def missing(request: web.Request) -> web.Response:
        raise web.HTTPNotFound

    async with serving(missing) as url:
        with pytest.raises(FetchFailed) as told:
            await downloads.fetch(f"{url}/a.zip?sig=secret", DIGEST, HERE)
    assert "status 404" in str(told.value)
    assert "secret" not in str(told.value)
    with pytest.raises(FetchFailed) as told:
        await downloads.fetch(f"{url}/a.zip?sig=secret", DIGEST, HERE)  # it is gone
    assert "secret" not in str(told.value)
