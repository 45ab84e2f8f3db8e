"""Requests that fail: which are repeated, for how long, and what their callers hear."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.kubernetes.fake_api import FakeApi, Fault

from dayfly_pool.cluster import api as api_module
from dayfly_pool.cluster.api import (
    CONFIG_MAP,
    TRIES_MAX,
    Api,
    ApiError,
    Exists,
    NoCluster,
    Unreachable,
)


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_module, "WAIT_S_MAX", 0.02)


def config(**metadata: str) -> dict[str, object]:
    return {"metadata": metadata}


@pytest.mark.parametrize("fault", [Fault(status=503, times=2), Fault(cut=True, times=2)])
async def test_what_may_be_repeated_is(fake: FakeApi, api: Api, fault: Fault):
    fault.times = 2
    fake.faults.append(fault)

    await api.create(CONFIG_MAP, config(name="a"))

    assert api.writes == 3
    assert len(fake.requests) == 3


async def test_a_creation_whose_answer_was_lost_is_told_to_exist(fake: FakeApi, api: Api):
    fake.faults.append(Fault("post", lost=True))

    with pytest.raises(Exists):
        await api.create(CONFIG_MAP, config(name="a"))


async def test_what_the_server_names_is_not_made_twice(fake: FakeApi, api: Api):
    fake.faults.append(Fault("post", lost=True))

    with pytest.raises(Unreachable):
        await api.create(CONFIG_MAP, config(generateName="a-"))
    assert len((await api.page(CONFIG_MAP))["items"]) == 1


async def test_a_deletion_whose_answer_was_lost_is_done(fake: FakeApi, api: Api):
    await api.create(CONFIG_MAP, config(name="a"))
    fake.faults.append(Fault("delete", lost=True))

    await api.delete(CONFIG_MAP, "a")


async def test_who_has_too_much_to_do_is_asked_again_when_it_says(fake: FakeApi, api: Api):
    """Nothing was done then: so also what is not repeated otherwise."""
    fake.faults.append(Fault(status=429, retry_after_s=0, times=2))

    await api.create(CONFIG_MAP, config(generateName="a-"))

    assert api.requests["post", "configmaps"] == 3


async def test_a_wait_that_is_too_long_is_the_callers(fake: FakeApi, api: Api):
    fake.faults.append(Fault(status=429, retry_after_s=3600))

    with pytest.raises(ApiError) as refused:
        await api.page(CONFIG_MAP)
    assert (refused.value.status, refused.value.retry_after_s) == (429, 3600)
    assert len(fake.requests) == 1


async def test_tries_have_an_end(fake: FakeApi, api: Api):
    fake.faults.append(Fault(status=500, times=100))

    with pytest.raises(ApiError) as failed:
        await api.page(CONFIG_MAP)
    assert failed.value.status == 500
    assert len(fake.requests) == TRIES_MAX


async def test_a_server_that_is_away_is_unreachable(fake: FakeApi, api: Api):
    await fake.down()

    with pytest.raises(Unreachable):
        await api.page(CONFIG_MAP)


async def test_a_server_that_says_nothing_is_given_up(
    fake: FakeApi, api: Api, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(api_module, "READ_S_MAX", 0.05)
    fake.faults.append(Fault(slow_s=1.0, times=TRIES_MAX))

    with pytest.raises(Unreachable):
        await api.page(CONFIG_MAP)


async def test_who_is_not_let_in_hears_why(fake: FakeApi, api: Api):
    fake.token = "another"

    with pytest.raises(ApiError) as refused:
        await api.page(CONFIG_MAP)
    assert (refused.value.status, refused.value.detail) == (401, "Unauthorized")
    assert "fake-token" not in repr(refused.value) + repr(api)


async def test_a_token_that_changes_is_read_again(
    fake: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(api_module, "CREDENTIALS_S", 0.0)
    token = tmp_path / "token"
    token.write_text(fake.token)
    configuration = json.loads(fake.kubeconfig.read_text())
    configuration["users"][0]["user"] = {"tokenFile": str(token)}
    fake.kubeconfig.write_text(json.dumps(configuration))
    api = await Api.connect(str(fake.kubeconfig))
    await api.page(CONFIG_MAP)

    fake.token = "another"
    token.write_text(fake.token)

    await api.page(CONFIG_MAP)
    await api.close()


@pytest.mark.parametrize("text", [None, "", "{}", "no: [yaml"])
async def test_a_configuration_that_is_none_is_refused(tmp_path: Path, text: str | None):
    path = tmp_path / "kubeconfig"
    if text is not None:
        path.write_text(text)

    with pytest.raises(NoCluster):
        await Api.connect(str(path))


def test_the_client_is_imported_only_when_somebody_connects():
    code = "import sys, dayfly_pool.cluster.leases; sys.exit('kubernetes' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
