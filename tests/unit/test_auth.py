"""Who may use the admin plane."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import pytest
from multidict import CIMultiDict

from dayfly_gateway.auth import CrossSite, Unauthorized, check

TOKEN = "s3cret-ü"
FINE = nullcontext()


@dataclass
class Request:
    """What `check` looks at."""

    path: str
    headers: CIMultiDict[str]


def visit(token: str, path: str = "/v1/functions", **headers: str) -> None:
    """One request on the admin plane, checked."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    check(Request(path, CIMultiDict(named)), token)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer ", "Bearer s3cret", "Bearer s3cret-u",
                                   "Basic czNjcmV0", "Bearer \udcff", "\0"])  # fmt: skip
def test_a_wrong_token_is_refused(given: str):
    """Also one that is no Unicode: it is wrong, not an error of ours."""
    with pytest.raises(Unauthorized):
        visit(TOKEN, Authorization=given, Host="127.0.0.1:8081")


def test_a_missing_token_is_refused():
    with pytest.raises(Unauthorized):
        visit(TOKEN, Host="127.0.0.1:8081")


def test_the_token_opens_from_anywhere():
    """A browser page of another site does not know it."""
    visit(TOKEN, Authorization=f"Bearer {TOKEN}", Host="example.com", Origin="https://example.com")


@pytest.mark.parametrize("path", ["/live", "/ready"])
def test_probes_need_no_token(path: str):
    visit(TOKEN, path, Host="10.0.0.1")


@pytest.mark.parametrize("path", ["/live/x", "/livex", "/metrics", "//live"])
def test_everything_else_does(path: str):
    with pytest.raises(Unauthorized):
        visit(TOKEN, path, Host="10.0.0.1")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1:8081", FINE),
        ("localhost:8081", FINE),
        ("[::1]:8081", FINE),
        ("localhost", FINE),
        ("127.0.0.1", FINE),
        ("[::1]", FINE),
        ("evil.example.com:8081", pytest.raises(CrossSite)),
        ("evil.example.com", pytest.raises(CrossSite)),  # DNS rebinding, on port 80
        ("localhost.evil.com", pytest.raises(CrossSite)),
        ("127.0.0.1.evil.com:8081", pytest.raises(CrossSite)),
        ("localhost@evil.com", pytest.raises(CrossSite)),
        ("", pytest.raises(CrossSite)),
    ],
)
def test_without_a_token_only_this_machine_by_its_own_names(
    host: str, expected: AbstractContextManager[object]
):
    """A page may make its own name mean 127.0.0.1; the Host header gives it away."""
    with expected:
        visit("", Host=host)


@pytest.mark.parametrize("origin", ["https://evil.com", "null", "http://localhost:8081", ""])
def test_without_a_token_no_page_of_any_site(origin: str):
    with pytest.raises(CrossSite):
        visit("", Host="localhost:8081", Origin=origin)
