"""A real API server takes our custom resources, and every manifest that we show.

It is DAYFLY_TEST_KUBECONFIG's; puts the definitions there and takes them away again.
"""

import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from tests.kubernetes.tools import tool

from dayfly_pool.cluster import crds

ROOT: Final = Path(__file__).parents[2]
CRDS: Final = ROOT / "charts/dayfly/crds"
KUBECONFIG: Final = os.environ.get("DAYFLY_TEST_KUBECONFIG", "")
pytestmark = pytest.mark.cluster


def kubectl(*words: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (tool("kubectl"), "--kubeconfig", KUBECONFIG, *words),
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def did(*words: str, text: str = "") -> str:
    done = kubectl(*words, text=text)
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    name = f"crds-{secrets.token_hex(4)}"
    did("apply", "-f", str(CRDS))
    did("wait", "--for=condition=Established", "-f", str(CRDS))
    did("create", "namespace", name)
    yield name
    did("delete", "namespace", name)
    did("delete", "-f", str(CRDS))


def test_what_we_show_is_applied_and_applied_again_unchanged(namespace: str):
    files = [word for file in sorted(ROOT.glob("examples/*/*.yaml")) for word in ("-f", str(file))]
    did("-n", namespace, "apply", *files)
    assert not [
        line
        for line in did("-n", namespace, "apply", *files).splitlines()
        if not line.endswith(" unchanged")
    ]
    shown = did("-n", namespace, "get", "fn")
    assert shown.split("\n")[0].split() == ["NAME", "VERSION", "URL", "READY", "REASON", "AGE"]
    for resource in crds.RESOURCES:
        did("-n", namespace, "get", resource.short)
    assert "trigger.dayfly.dev/on-nats" in did("-n", namespace, "get", "dayfly")


def test_nothing_is_written_that_nobody_said(namespace: str):
    """No defaults: `kubectl diff` shows what is different, and a new release's defaults count."""
    manifest = function("plain", "handler: m:h")
    did("-n", namespace, "apply", "-f", "-", text=manifest)
    spec = did("-n", namespace, "get", "fn", "plain", "-o", "jsonpath={.spec}")
    assert spec == '{"handler":"m:h"}'


def function(name: str, spec: str) -> str:
    head = "apiVersion: dayfly.dev/v1\nkind: Function\n"
    return f"{head}metadata: {{name: {name}}}\nspec:\n  {spec}\n"


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        # from kubectl, or from the server if kubectl has not got the new definitions yet
        ("timeoutSeconds: 1", 'missing required field "handler"|spec.handler: Required value'),
        ("{handler: m:h, memory: 5}", 'unknown field "memory"'),
        ("{handler: m:h, maxScale: 0}", "spec.maxScale in body should be greater than or equal"),
        ("{handler: m:h, network: wide}", 'supported values: "host", "none"'),
        ("{handler: m:h, onFailure: {}}", "must validate one and only one schema"),
    ],
)
def test_a_bad_manifest_is_refused_with_its_reason(namespace: str, spec: str, why: str):
    done = kubectl("-n", namespace, "apply", "-f", "-", text=function("bad", spec))
    assert done.returncode
    assert re.search(why, done.stderr), done.stderr


def test_kubectl_explains_what_is_left_out(namespace: str):
    assert "Default: 100." in did(
        "explain", "functions.spec.maxScale", "--api-version=dayfly.dev/v1"
    )
