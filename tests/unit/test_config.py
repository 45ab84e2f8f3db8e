"""Settings are checked at birth: a server that starts is one that can work."""

from pathlib import Path
from typing import Any

import pytest

from dayfly_gateway.config import Address, GatewayConfig
from dayfly_pool.config import Config

DATA = Path("/data")


def test_the_defaults_are_valid():
    config = Config(data=DATA)

    assert config.driver == "linux"
    assert config.generic_min <= config.generic_max <= config.sandboxes_max


@pytest.mark.parametrize(
    "wrong",
    [
        {"generic_min": -1},
        {"generic_min": 5, "generic_max": 4},
        {"generic_max": 5, "sandboxes_max": 4},
        {"generic_min": 0, "generic_max": 0, "sandboxes_max": 0},
        {"starts_max": 0},
        {"start_timeout_s": 0},
        {"init_timeout_s": -1},
        {"grace_s": 0},
        {"tick_s": 0},
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=r"generic-min|at least 1|above 0"):
        Config(data=DATA, **wrong)


def test_a_pool_without_refills_is_allowed():
    assert Config(data=DATA, generic_min=0, generic_max=0, sandboxes_max=1).sandboxes_max == 1


def test_a_config_cannot_change():
    with pytest.raises(AttributeError):
        Config(data=DATA).generic_min = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080),
        (":80", "127.0.0.1", 80),
        ("localhost:0", "localhost", 0),
        ("0.0.0.0:65535", "0.0.0.0", 65535),
        ("[::1]:8080", "::1", 8080),
        ("[::]:8080", "::", 8080),
    ],
)
def test_an_address_is_host_and_port(text: str, host: str, port: int):
    """Without a host it is this machine's own, never all of its interfaces."""
    assert Address.parse(text) == Address(host, port)


@pytest.mark.parametrize("text", ["", "localhost", "localhost:", "a:b", "h:65536", "h:-1", "h:1.5"])
def test_a_malformed_address_is_refused(text: str):
    with pytest.raises(ValueError, match="HOST:PORT"):
        Address.parse(text)


@pytest.mark.parametrize("text", ["127.0.0.1:8080", "[::1]:8080", "example.com:80"])
def test_an_address_shows_as_it_was_given(text: str):
    assert str(Address.parse(text)) == text


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.1", False),
        ("example.com", False),
        ("localhost.example.com", False),
    ],
)
def test_only_loopback_is_this_machine_alone(host: str, is_loopback: bool):
    """A name may mean any address, so none but localhost counts."""
    assert Address(host, 1).is_loopback is is_loopback


def test_the_admin_plane_is_not_served_to_others_without_a_token():
    """Whoever reaches it runs code here."""
    with pytest.raises(ValueError, match="--admin-token"):
        GatewayConfig(admin=Address("0.0.0.0", 8081))
    GatewayConfig(admin=Address("0.0.0.0", 8081), admin_token="secret")
    GatewayConfig(http=Address("0.0.0.0", 8080))
