"""Libraries in pods, on the cluster that DAYFLY_TEST_KUBECONFIG names: sent by the pool, or in an
image. DAYFLY_TEST_IMAGE_LOADER brings the images there.
"""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.harness import ROOT, Server
from tests.kubernetes import images
from tests.kubernetes.conftest import REAL

from dayfly_pool.cluster.api import POD, Api

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(images.LOADER not in os.environ, reason="no way to bring images there"),
]

RUNTIME, NAMED = "dayfly-runtime:environments-test", "dayfly-named:environments-test"
SIX = """
import six
def handler(event, context):
    try:
        open("/environment/mine", "w").close()
    except OSError as error:
        return [six.__version__, six.__file__, error.strerror]
"""
WHO = "import named\ndef handler(event, context):\n    return named.WHO\n"


@pytest.fixture(scope="module", autouse=True)
def loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The runtime's image, and one with a library on top."""
    image = images.runtime(tmp_path_factory.mktemp("images") / "runtime", RUNTIME)
    images.load(image)
    (image.root / "environment").mkdir()
    (image.root / "environment/named.py").write_text("WHO = 'an image'\n")
    images.load(image._replace(name=NAMED))


def pods(namespace: str) -> list[dict[str, Any]]:
    async def listed() -> list[dict[str, Any]]:
        api = await Api.connect(REAL, namespace)
        try:
            return list((await api.page(POD))["items"])
        finally:
            await api.close()

    return asyncio.run(listed())


def server(folder: Path, namespace: str, *arguments: str) -> Server:
    """One that makes small pods there."""
    folder.mkdir(exist_ok=True)
    how = {
        "image": RUNTIME,
        "imagePullPolicy": "Never",
        "namespace": namespace,
        "kubeconfig": REAL,
        "classes": [{"memoryMb": 256, "cpu": 0.05, "ephemeralMb": 32}],
        "environments": {"named": NAMED},
    }
    (folder / "pods.yaml").write_text(yaml.safe_dump(how))
    few = ["--generic-min", "0", "--kubernetes", str(folder / "pods.yaml")]
    return Server(folder / "data", *few, *arguments, driver="kubernetes")


def build(server: Server, name: str, **spec: object) -> dict[str, Any]:
    reply = server.ask("PUT", f"/namespaces/default/environments/{name}", spec, timeout_s=110)
    assert reply.status == 200, reply.body
    last: dict[str, Any] = json.loads(reply.body.splitlines()[-1])
    assert "environment" in last, last
    return last["environment"]


def test_libraries_are_sent_to_pods_or_are_in_their_image(tmp_path: Path, namespace: str):
    """And the example that has some runs as it does on one machine."""
    with server(tmp_path / "one", namespace) as one:
        build(one, "six", requirements="six==1.17.0", preload=["six"], genericMin=0)
        build(one, "humanize", genericMin=0, requirements=text("requirements.txt"))
        build(one, "named", preload=["named"], genericMin=0)
        one.deploy("six", "six", files={"main.py": SIX}, environment="six")
        one.deploy("humanize", "humanize", files={"main.py": text("main.py")},
                   environment="humanize")  # fmt: skip
        one.deploy("who", "who", files={"main.py": WHO}, environment="named")

        version, file, why = one.invoke("six").json()
        assert (version, why) == ("1.17.0", "Permission denied")
        assert file == "/environment/six.py"
        assert one.call("humanize").json()["said"] == "5.0 GiB"
        assert one.invoke("who").json() == "an image"
        run = {pod["spec"]["containers"][0]["image"] for pod in pods(namespace)}
        assert run == {RUNTIME, NAMED}
        assert not [line for line in one.log if "preload failed" in line]


def text(name: str) -> str:
    return (ROOT / "examples/humanize" / name).read_text()
