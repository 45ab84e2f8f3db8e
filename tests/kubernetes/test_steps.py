"""Batch jobs and workflows in pods, on the cluster that DAYFLY_TEST_KUBECONFIG names."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from tests.harness import DAYFLY, ROOT, Server
from tests.kubernetes.clusters import runtime_image
from tests.kubernetes.conftest import REAL, a_namespace

from dayfly_pool import pods as manifests
from dayfly_pool.models import BASE, Environment, Mold
from dayfly_pool.pods import Key, PodClass, Pods

SITE: Final = """
apiVersion: dayfly.dev/v1
kind: Workflow
metadata: {name: site}
spec:
  workspaces: [site]
  steps:
    - name: begin
      workspaces: {site: site}
      script: |
        cd $(workspaces.site.path)
        mkdir pages old; echo base > pages/index; echo x > old/gone; echo y > old/kept
    - name: page
      runAfter: [begin]
      workspaces: {site: site}
      matrix:
        params: {name: [about, imprint]}
      script: |
        cd $(workspaces.site.path)
        echo $(params.name) > pages/$(params.name); echo $(params.name) >> pages/index
        if [ $(params.name) = about ]; then rm old/gone; mv old kept; fi
    - name: list
      runAfter: [page]
      merge: reduce
      workspaces: {site: site}
      script: |
        cd $(workspaces.site.path)
        cat $(workspaces.site.path).branches/*/pages/index > pages/index
        if echo no > $(workspaces.site.path).branches/0/new; then exit 3; fi
        (find . -type f | sort; cat $(workspaces.site.path).conflicts pages/index) | xargs > $(results.all.path)
      results: [{name: all}]
  results: {all: $(steps.list.results.all)}
---
apiVersion: dayfly.dev/v1
kind: Workflow
metadata: {name: stream}
spec:
  steps:
    - name: make
      script: seq 200000 > $(outputs.data.path)
      outputs: [{name: data, stream: true}]
    - name: use
      inputs: {data: $(steps.make.outputs.data)}
      script: |
        if echo >> $(inputs.data.path) || rm -f $(inputs.data.path); then exit 3; fi
        tail -1 $(inputs.data.path) > $(results.last.path)
      results: [{name: last}]
    - name: pipe
      onError: continue
      script: mkfifo $(outputs.data.path)
      outputs: [{name: data}]
  results: {last: $(steps.use.results.last)}
"""  # noqa: E501


def test_pods_for_steps_have_room_for_their_folders_and_others_have_none():
    def made(mold: Mold) -> dict[str, Any]:
        pods = Pods(image="i", classes=(PodClass(256, 0.1, 64, steps_mb=300),))
        found: dict[str, Any] = manifests.pod(
            pods,
            name="n",
            shard="s",
            owner={},
            mold=mold,
            command=[],
            environment=Environment(BASE),
            key=Key("s", "k"),
            uid=7,
        )["spec"]
        return found

    plain, steps = made(Mold(BASE)), made(Mold(BASE, steps=True))
    new = {v["name"]: v["emptyDir"] for v in steps["volumes"] if v not in plain["volumes"]}
    places = {v["mountPath"] for v in steps["containers"][0]["volumeMounts"]}
    disk = [s["containers"][0]["resources"]["limits"]["ephemeral-storage"] for s in (plain, steps)]

    assert set(new) == {"in", "out", "workspaces"}
    assert all(volume == {"sizeLimit": "300Mi"} for volume in new.values())
    assert {"/in", "/out", "/workspaces"} <= places
    assert disk == ["64Mi", "364Mi"]
    assert not {"in", "out"} & {v["name"] for v in plain["volumes"]}


class Cluster:
    """A server whose sandboxes are pods, and its command line."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def __call__(self, *words: str) -> str:
        env = os.environ | {"DAYFLY_URL": f"http://{self._server.admin}"}
        done = subprocess.run(
            [str(DAYFLY), *words], env=env, capture_output=True, text=True, timeout=200, check=False
        )
        assert not done.returncode, (words, done.stdout, done.stderr, self._server.log[-5:])
        return done.stdout

    def results(self, workflow: str) -> dict[str, Any]:
        """Of a run of *workflow*."""
        self("run", "start", workflow, "--name", f"{workflow}-run")
        status = json.loads(self("run", "show", f"{workflow}-run", "--json"))["status"]
        found: dict[str, Any] = status["results"]
        return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    data = tmp_path_factory.mktemp("steps")
    settings = {
        "image": runtime_image(),
        "imagePullPolicy": "Never",
        "kubeconfig": REAL,
        "classes": [{"memoryMb": 256, "cpu": 0.1, "ephemeralMb": 64, "stepsMb": 256}],
    }
    pods = data / "pods.yaml"
    arguments = ("--kubernetes", str(pods), "--generic-min", "0", "--sandboxes-max", "6")
    with a_namespace() as namespace:
        pods.write_text(json.dumps(settings | {"namespace": namespace}))
        with Server(data / "data", *arguments, driver="kubernetes") as server:
            yield Cluster(server)


@pytest.mark.cluster
def test_the_pipeline_of_the_examples_runs(cluster: Cluster):
    cluster("workflow", "deploy", str(ROOT / "examples/pipeline/main.py"))
    found = cluster.results("houses")

    assert found["model"] == "neighbours"
    assert "# Houses" in cluster("artifact", "get", found["report"]["uri"], "-o", "-")


@pytest.mark.cluster
def test_workspaces_and_streams_are_as_on_one_machine(cluster: Cluster, tmp_path: Path):
    (tmp_path / "all.yaml").write_text(SITE)
    cluster("apply", "-f", str(tmp_path / "all.yaml"))

    assert cluster.results("site")["all"].split() == [
        *("./kept/kept", "./pages/about", "./pages/imprint", "./pages/index"),
        *("pages/index", "base", "about", "base", "imprint"),
    ]
    assert cluster.results("stream")["last"] == "200000"
    assert "data is a pipe" in cluster("run", "show", "stream-run")


@pytest.mark.cluster
def test_jobs_of_scripts_commands_and_functions_run(cluster: Cluster, tmp_path: Path):
    (tmp_path / "sum.sh").write_text(
        "seq $JOB_INDEX 9 | awk '{s += $1} END {print s}' > $DAYFLY_RESULT"
    )
    array = ROOT / "examples" / "array_job"
    cluster("deploy", str(array), "--name", "array-job")
    cluster("job", "run", "--name", "sums", "--script", str(tmp_path / "sum.sh"), "--size", "3")
    cluster("job", "run", "--name", "said", "--size", "1", "--", "python3", "-c", "print(6 * 7)")
    cluster("job", "run", "-f", str(array / "job.yaml"))

    lines = map(json.loads, cluster("job", "results", "sums").splitlines())
    assert [line["result"] for line in lines] == [45, 45, 44]
    assert "42" in cluster("job", "logs", "said")
    primes = map(json.loads, cluster("job", "results", "primes").splitlines())
    assert sum(line["result"] for line in primes) == 78498
