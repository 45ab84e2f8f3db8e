"""Who may use the admin plane: a bearer token, compared in constant time; same-origin otherwise."""

import hmac
import re
from collections.abc import Awaitable, Callable

from aiohttp import web

from dayfly_pool.errors import PlatformError


class Unauthorized(PlatformError):
    """The admin token is missing or wrong.

    Give it with DAYFLY_TOKEN or --token-file.
    """

    status = 401


class CrossSite(PlatformError):
    """A browser page of another site may not use the admin plane.

    Use the dayfly command, or a token.
    """

    status = 403


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_PORT = re.compile(r":\d*\Z")
OPEN = frozenset({"/live", "/ready"})


def check(request: web.Request, token: str) -> None:
    """Raises `Unauthorized` or `CrossSite` when *request* may not be served."""
    if request.path in OPEN:
        return
    if token:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(errors="replace"), token.encode()):
            raise Unauthorized
        return
    # without a token only loopback is served, and there a browser is the attacker's way in
    host = _PORT.sub("", request.headers.get("Host", "localhost"))
    if host not in ("localhost", "127.0.0.1", "[::1]") or "Origin" in request.headers:
        raise CrossSite
