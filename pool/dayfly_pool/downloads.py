"""Packages that lie elsewhere: fetched by URL, and taken only if their digest is what was said."""

import asyncio
import hashlib
import io
import ipaddress
import socket
from collections.abc import Callable, Collection
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

import aiohttp

from dayfly_pool.errors import BadInput, FetchFailed

BYTES_MAX: Final = 256 << 20
FETCH_S_MAX: Final = 50.0
SILENT_S_MAX: Final = 20.0
HOPS_MAX: Final = 5
CHUNK_BYTES: Final = 256 << 10
WORLD: Final = ipaddress.ip_network("2000::/3")
"""Where IPv6 is public. The rest reaches nobody, or IPv4 by another name (`64:ff9b::/96`)."""

NEIGHBOURS: Final = tuple(
    map(
        ipaddress.ip_network,
        (
            "2001::/32",  # IPv4 by another name
            "2002::/16",  # the same
            "192.0.0.0/24",  # a cloud's metadata service
            "192.88.99.0/24",  # leads to 2002::/16
            "168.63.129.16/32",  # a cloud's agent of its machines
        ),
    )
)
"""Not for all the world, though Python's `is_global` says so."""


async def fetch(url: str, digest: str, hosts: Collection[str] = ()) -> bytes:
    """What is at *url*, which has this sha256; no more than 256 MiB, within 50 s.

    Only by https and only from public addresses, but for *hosts*: from these by http too, wherever
    they are. Raises `BadInput` for what is not allowed or not what it should be, `FetchFailed`.
    """
    try:
        async with asyncio.timeout(FETCH_S_MAX):
            data = await _followed(url, hosts)
    except TimeoutError:
        raise FetchFailed(f"{_shown(url)} did not send it all in {FETCH_S_MAX:g} s") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        why = str(error) or type(error).__name__
        raise FetchFailed(f"{_shown(url)}: {why.replace(url, _shown(url))[:500]}") from None
    found = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
    if found != digest:
        raise BadInput(f"spec.packageUrl has sha256 {found}, and spec.package says {digest}")
    return data


async def _followed(url: str, hosts: Collection[str]) -> bytes:
    """Its bytes, by way of at most so many redirections, each of them judged like the first."""
    for _ in range(HOPS_MAX):
        is_known = urlsplit(url).hostname in hosts
        if urlsplit(url).scheme != "https" and not is_known:
            raise BadInput(f"spec.packageUrl leads to {_shown(url)}: https only")
        connector = aiohttp.TCPConnector(socket_factory=_socket if is_known else _public_socket)
        async with (
            aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=None, sock_read=SILENT_S_MAX),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            ) as session,
            session.get(
                url, allow_redirects=False, headers={"Accept-Encoding": "identity"}
            ) as answer,
        ):
            if answer.status == 200:
                return await _body(answer)
            if answer.status not in (301, 302, 303, 307, 308) or "Location" not in answer.headers:
                raise FetchFailed(f"{_shown(url)} answered with status {answer.status}")
            url = urljoin(url, answer.headers["Location"])
    raise FetchFailed(f"{_shown(url)} is behind more than {HOPS_MAX - 1} redirections")


async def _body(answer: aiohttp.ClientResponse) -> bytes:
    found = io.BytesIO()  # which gives its bytes away without copying them
    async for chunk in answer.content.iter_chunked(CHUNK_BYTES):
        found.write(chunk)
        if found.tell() > BYTES_MAX:
            raise BadInput(f"what is at spec.packageUrl is over {BYTES_MAX >> 20} MiB")
    return found.getvalue()


_Address = tuple[Any, Any, int, str, Any]
_socket: Final[Callable[[_Address], socket.socket]] = lambda found: socket.socket(*found[:3])  # noqa: E731


def _public_socket(found: _Address) -> socket.socket:
    """A socket for an address that all the world can reach; judged here, after names are known."""
    address = ipaddress.ip_address(found[4][0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    if not _is_public(address):
        raise BadInput(
            f"spec.packageUrl leads to {address}, which is not public: the operator allows such a "
            "host with --package-host"
        )
    return _socket(found)


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and address not in WORLD:
        return False
    if any(address in network for network in NEIGHBOURS):
        return False
    return address.is_global and not address.is_multicast


def _shown(url: str) -> str:
    """Without its query, which may be a signature."""
    return url.partition("?")[0][:200]
