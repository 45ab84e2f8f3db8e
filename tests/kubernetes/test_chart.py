"""The chart: what it renders is valid, asks for few rights, and is locked down."""

import base64
import functools
import http.server
import ipaddress
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import msgspec
import pytest
import yaml
from tests.kubernetes.tools import Missing, tool

import dayfly
from dayfly_gateway import cli
from dayfly_pool.pods import Pods

HERE = Path(__file__).parent
CHART = HERE.parents[1] / "charts/dayfly"
VALUES = {"defaults": [], **{p.stem: ["-f", str(p)] for p in HERE.glob("values/*.yaml")}}
VERSIONS = [f"1.{minor}" for minor in range(28, 38)]
OTHERS = {"cert-manager.io/v1", "monitoring.coreos.com/v1"}
METRICS = (
    "pool/dayfly_pool/metrics.py",
    "pool/dayfly_pool/batch/metrics.py",
    "gateway/dayfly_gateway/proxy.py",
)

every_values = pytest.mark.parametrize("values", sorted(VALUES))


@pytest.fixture(autouse=True, scope="module")
def needs_helm() -> None:
    try:
        tool("helm")
    except Missing as missing:
        pytest.skip(str(missing))


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool("helm"), *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@functools.cache
def rendered(*arguments: str) -> list[dict[str, Any]]:
    done = helm("template", "web", str(CHART), "--namespace", "release", *arguments)

    assert done.returncode == 0, done.stderr
    return [item for item in yaml.safe_load_all(done.stdout) if item]


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {item["metadata"]["name"]: item for item in objects if item["kind"] == kind}


def pods(objects: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for item in objects:
        name = f"{item['kind']}/{item['metadata']['name']}"
        if item["kind"] == "Pod":
            yield name, item["spec"]
        elif "template" in item.get("spec", {}):
            yield name, item["spec"]["template"]["spec"]


# ---- valid --------------------------------------------------------------------------------------


@every_values
def test_the_chart_has_nothing_that_helm_objects_to(values: str):
    done = helm("lint", "--strict", str(CHART), *VALUES[values])

    assert done.returncode == 0, done.stdout + done.stderr


@every_values
def test_every_version_of_kubernetes_takes_what_is_rendered(values: str):
    """Unknown fields too are refused: the API server would drop them without a word."""
    objects = [item for item in rendered(*VALUES[values]) if item["apiVersion"] not in OTHERS]

    assert len(objects) > 10
    for version in VERSIONS if values == "everything" else VERSIONS[-1:]:
        for item in objects:
            kubernetes_validate.validate(item, version, strict=True)


@every_values
def test_no_object_is_rendered_twice(values: str):
    """Of two, one would be lost."""
    ids = [
        (item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"])
        for item in rendered(*VALUES[values])
    ]

    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("gateway.replicaz=2", "replicaz"),
        ("pool.replicas=0", "replicas"),
        ("pool.genericMin=33", "genericMin <= genericMax"),
        ("pool.sandboxesMax=31", "genericMax <= sandboxesMax"),
        ("sandboxes.labels.dayfly\\.dev/shard=mine", "dayfly.dev/shard"),
        ("sandboxes.image.pullPolicy=Sometimes", "pullPolicy"),
        ("postgresql.enabled=false", "database.existingSecret"),
        ("database.existingSecret=mine", "postgresql.enabled=false"),
        ("tls.poolSecret=mine", "give both"),
        ("tls.certManager.enabled=true", "issuerRef.name"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(given: str, said: str):
    done = helm("template", "web", str(CHART), "--set", given)

    assert done.returncode != 0
    assert said in done.stderr


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ([{"memoryMb": 256}, {"memoryMb": 128}], "order of memoryMb"),
        ([{"memoryMb": 128}, {"memoryMb": 128}], "order of memoryMb"),
        ([{"memoryMb": 128, "cpu": 0.001}], "cpu"),
        ([{"memoryMb": 2 << 20}], "memoryMb"),
        ([{"memoryMb": 128, "resources": {"nvidia.com/gpu": 1}}], "want string"),
    ],
)
def test_sizes_that_the_pool_would_refuse_are_refused(classes: list[dict[str, Any]], said: str):
    """Before there is a release whose pool does not start."""
    whole = json.dumps([{"cpu": 1, "ephemeralMb": 64} | each for each in classes])
    done = helm("template", "web", str(CHART), f"--set-json=sandboxes.classes={whole}")

    assert done.returncode != 0
    assert said in done.stderr


def test_each_value_that_there_is_is_in_the_schema():
    """And the other way round: nothing is taken that has no default to read."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def check(node: dict[str, Any], value: dict[str, Any], where: str) -> None:
        assert node.get("properties", {}).keys() - {"global"} == value.keys(), where
        for name, inner in value.items():
            if "properties" in (below := node["properties"][name]):
                check(below, inner, f"{where}.{name}")

    check(schema, values, "values")


def test_the_chart_has_the_version_of_the_package():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())

    assert (chart["version"], chart["appVersion"]) == (dayfly.__version__, dayfly.__version__)


def test_a_number_of_gateways_is_not_set_where_it_is_scaled():
    """An upgrade would undo what the autoscaler did."""
    scaled = rendered("--set", "gateway.autoscaling.enabled=true")

    assert of_kind(scaled, "HorizontalPodAutoscaler")
    assert "replicas" not in of_kind(scaled, "Deployment")["web-dayfly-gateway"]["spec"]


# ---- rights -------------------------------------------------------------------------------------


@every_values
def test_rights_end_at_a_namespace_unless_more_was_asked_for(values: str):
    cluster = {
        k for k in ("ClusterRole", "ClusterRoleBinding") if of_kind(rendered(*VALUES[values]), k)
    }

    assert cluster == ({"ClusterRole", "ClusterRoleBinding"} if values == "external" else set())


@every_values
def test_rights_name_what_they_are_for(values: str):
    """No wildcard, no secret but those of the sandboxes' namespace, nothing that gives more."""
    objects = rendered(*VALUES[values])
    for role in [*of_kind(objects, "Role").values(), *of_kind(objects, "ClusterRole").values()]:
        for rule in role["rules"]:
            words = {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}

            assert not {"*", "escalate", "bind", "impersonate"} & words
            assert not {"pods/exec", "serviceaccounts/token", "nodes", "roles"} & words
            if "secrets" in rule["resources"]:
                assert role["metadata"]["name"].endswith("-sandboxes")
                assert {*rule["verbs"]} == {"get", "list", "create", "delete"}


def test_the_gateway_may_read_leases_and_nothing_else():
    roles = of_kind(rendered(), "Role")
    bound = [
        item["roleRef"]["name"]
        for item in of_kind(rendered(), "RoleBinding").values()
        if any(subject["name"] == "web-dayfly-gateway" for subject in item["subjects"])
    ]

    assert bound == ["web-dayfly-gateway"]
    assert roles["web-dayfly-gateway"]["rules"] == [
        {
            "apiGroups": ["coordination.k8s.io"],
            "resources": ["leases"],
            "verbs": ["list", "watch"],
        }
    ]


def test_pods_are_made_in_the_sandboxes_namespace_only():
    """Who may create pods in a namespace may mount every secret of it."""
    roles = of_kind(rendered(), "Role").values()
    where = {
        role["metadata"].get("namespace", "release")
        for role in roles
        for rule in role["rules"]
        if "pods" in rule["resources"]
    }

    assert where == {"release-sandboxes"}


def test_each_custom_resource_may_be_read_and_told_its_status():
    of_controller = of_kind(rendered(), "Role")["web-dayfly-controller"]["rules"]
    may = {resource for rule in of_controller for resource in rule["resources"]}
    for path in (CHART / "crds").glob("*.yaml"):
        for crd in yaml.safe_load_all(path.read_text()):
            plural = crd["spec"]["names"]["plural"]

            assert {plural, f"{plural}/status"} <= may


# ---- locked down --------------------------------------------------------------------------------


@every_values
def test_every_pod_keeps_the_restricted_standard(values: str):
    """Pod Security Standards, restricted; and a root file system that nobody can write to."""
    found = list(pods(rendered(*VALUES[values])))

    assert len(found) >= 3
    for name, spec in found:
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not any("hostPath" in volume for volume in spec.get("volumes", ())), name
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert container["resources"]["limits"]["memory"], name


def test_only_who_talks_to_the_api_server_has_a_token():
    tokens = {
        name for name, spec in pods(rendered()) if spec.get("automountServiceAccountToken", True)
    }
    accounts = of_kind(rendered(), "ServiceAccount")

    assert tokens == {"Deployment/web-dayfly-gateway", "StatefulSet/web-dayfly-pool"}
    assert accounts["web-dayfly-sandbox"]["automountServiceAccountToken"] is False


@every_values
def test_no_secret_is_in_a_command_or_a_variable(values: str):
    """Both can be read by whoever may see the pod."""
    for name, spec in pods(rendered(*VALUES[values])):
        text = json.dumps([[c.get("command"), c.get("env")] for c in spec["containers"]])

        assert "secretKeyRef" not in text, name
        assert "postgresql://" not in text, name


def test_a_sandbox_is_reached_by_the_pool_and_reaches_nothing():
    policies = of_kind(rendered(), "NetworkPolicy")
    deny = policies["web-dayfly-sandboxes"]
    allow = policies["web-dayfly-sandboxes-pool"]["spec"]

    assert deny["metadata"]["namespace"] == "release-sandboxes"
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert allow["policyTypes"] == ["Ingress"]
    assert [peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
            for rule in allow["ingress"] for peer in rule["from"]] == ["pool"]  # fmt: skip


@pytest.mark.parametrize(
    ("phases", "fails_with"), [({"generic": 1}, ""), ({"starting": 4}, "no generic sandbox")]
)
def test_helm_test_fails_where_no_sandbox_starts(
    phases: dict[str, int], fails_with: str, tmp_path: Path
):
    """Its program, with a gateway on this machine."""

    class Both(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_known = self.headers["Authorization"] == "Bearer secret"
            answers = {"/ready": 200, "/fn/nobody-has-this": 404, "/pool": 200 if is_known else 401}
            self.send_response(answers[self.path])
            self.end_headers()
            self.wfile.write(json.dumps({"phases": phases}).encode())

        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "token").write_text("secret\n")
    (pod,) = of_kind(rendered(), "Pod").values()
    *python, program = pod["spec"]["containers"][0]["command"]
    program = program.replace("/etc/dayfly/admin", str(tmp_path)).replace("+ 240", "+ 0")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Both) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"127.0.0.1:{server.server_port}"
        program = re.sub(r"web-dayfly-(admin:8081|gateway:80)\b", here, program)
        done = subprocess.run(
            [sys.executable, *python[1:], program],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        server.shutdown()

    assert (done.returncode == 0) == (not fails_with), done.stderr
    assert fails_with in done.stderr


@pytest.mark.parametrize("values", ["defaults", "everything"])
def test_the_pod_of_helm_test_is_let_in(values: str):
    """Whoever else is."""
    objects = rendered(*VALUES[values])
    (labels,) = [pod["metadata"]["labels"] for pod in of_kind(objects, "Pod").values()]
    (gateway,) = [
        policy["spec"]
        for name, policy in of_kind(objects, "NetworkPolicy").items()
        if name.endswith("-gateway")
    ]

    for rule in gateway["ingress"]:
        selectors = [p["podSelector"] for p in rule.get("from", ()) if p.keys() == {"podSelector"}]
        assert "from" not in rule or any(
            labels.items() >= selector.get("matchLabels", {}).items() for selector in selectors
        )


@pytest.mark.parametrize(
    "address",
    ["10.244.7.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254", "168.63.129.16",
     "127.0.0.1", "224.0.0.1", "0.0.0.0", "fd00::1", "fe80::1", "::1", "::ffff:10.0.0.1",
     "64:ff9b::a00:1", "2002:a00:1::", "203.0.113.9", "2001:db8::1"],
)  # fmt: skip
def test_a_function_with_a_network_reaches_only_what_is_public(address: str):
    spec = of_kind(rendered(*VALUES["everything"]), "NetworkPolicy")["web-df-sandboxes-egress"][
        "spec"
    ]

    assert spec["podSelector"]["matchLabels"] == {"dayfly.dev/network": "egress"}
    assert not _allowed(spec, address)
    assert _allowed(spec, "1.1.1.1")
    assert _allowed(spec, "2606:4700::1111")


def _allowed(spec: dict[str, Any], address: str) -> bool:
    there = ipaddress.ip_address(address)
    blocks = [p["ipBlock"] for rule in spec["egress"] for p in rule["to"] if "ipBlock" in p]
    return any(
        there in ipaddress.ip_network(block["cidr"])
        and not any(there in ipaddress.ip_network(inner) for inner in block["except"])
        for block in blocks
    )


def test_in_a_shared_namespace_policies_are_for_sandboxes_alone():
    """Another pod of the release's namespace keeps its network."""
    policies = of_kind(rendered(*VALUES["external"]), "NetworkPolicy")
    sandboxes = {"matchExpressions": [{"key": "dayfly.dev/shard", "operator": "Exists"}]}

    assert policies["web-dayfly-sandboxes"]["spec"]["podSelector"] == sandboxes


# ---- what it says of others ---------------------------------------------------------------------


def known_metrics() -> set[str]:
    root = HERE.parents[1]
    code = "".join((root / path).read_text() for path in METRICS)
    known = {*re.findall(r'"dayfly_([a-z_]+)"', code), *re.findall(r'_counter\("([a-z_]+)"', code)}
    return known | {f"events_{name}" for name in re.findall(r'^ +\("([a-z_]+)", "', code, re.M)}


def test_the_dashboard_asks_for_metrics_that_there_are():
    board = json.loads((CHART / "dashboards/dayfly.json").read_text())
    text = json.dumps([target["expr"] for p in board["panels"] for target in p["targets"]])
    asked = {
        re.sub(r"_(total|bucket)$", "", name) for name in re.findall(r"dayfly_([a-z_]+)", text)
    }

    assert len(asked) > 8
    assert asked <= known_metrics()


def test_the_guide_names_metrics_and_values_that_there_are():
    text = (HERE.parents[1] / "docs/kubernetes.md").read_text()
    metrics = {re.sub(r"_total$", "", name) for name in re.findall(r"\bdayfly_([a-z_]+)", text)}
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    assert len(metrics) > 8
    assert metrics <= known_metrics()
    for top, path in re.findall(rf"`({'|'.join(values)})\.(?!crt|key)([A-Za-z.]+)", text):
        here = values[top]
        for name in path.split("."):
            assert isinstance(here, dict), f"{top}.{path}"
            assert name in here, f"{top}.{path}"
            here = here[name]


def test_the_settings_of_pods_are_the_values():
    """What the pool is told to make sandboxes of."""
    text = of_kind(rendered(*VALUES["everything"]), "ConfigMap")["web-df-pods"]["data"]["pods.yaml"]
    told = yaml.safe_load(text)

    assert told["namespace"] == "release-sandboxes"
    assert told["image"] == f"dayfly-runtime:{dayfly.__version__}"
    assert told["environments"] == {"science": "registry.example.com/science:1"}
    assert told["classes"][0] == {"memoryMb": 128, "cpu": 0.25, "ephemeralMb": 512}
    assert told["runtimeClassName"] == "gvisor"
    assert told["labels"]["team"] == "x"

    settings = msgspec.convert(told, Pods)
    assert settings.classes[1].resources == {"nvidia.com/gpu": "1"}
    assert settings.affinity


def test_the_pool_understands_what_it_is_given(monkeypatch: pytest.MonkeyPatch):
    """Its options and its variables, as its command line reads them."""
    pool = of_kind(rendered(*VALUES["everything"]), "StatefulSet")["web-df-pool"]
    container = pool["spec"]["template"]["spec"]["containers"][0]
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable.get("value", ""))
    with cli.pool.make_context("pool", container["command"][2:]) as context:
        given = context.params

    assert given["foreign_namespaces"] == ("teams", "guests")
    assert given["watch_namespaces"] == "release teams"
    assert (given["generic_min"], given["generic_max"], given["sandboxes_max"]) == (4, 32, 128)


@pytest.mark.parametrize("name", ["pool", "postgresql"])
def test_a_data_folder_is_a_volume_of_its_own_only_where_that_was_asked_for(name: str):
    def claimed_and_emptied(values: str, whole: str) -> tuple[list[str], list[str]]:
        spec = of_kind(rendered(*VALUES[values]), "StatefulSet")[f"{whole}-{name}"]["spec"]
        claims = [claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", ())]
        volumes = spec["template"]["spec"]["volumes"]
        return claims, [v["name"] for v in volumes if v["name"] == "data"]

    assert claimed_and_emptied("everything", "web-df") == (["data"], [])
    assert claimed_and_emptied("defaults", "web-dayfly") == ([], ["data"])


def test_the_address_of_the_database_holds_any_password():
    secret = of_kind(rendered(*VALUES["everything"]), "Secret")["web-df-postgresql"]["data"]
    dsn = base64.b64decode(secret["dsn"]).decode()

    assert dsn == "postgresql://dayfly:p%40ss%2Fword@web-df-postgresql.release.svc:5432/dayfly"


def test_shards_have_the_secrets_of_triggers_and_the_volumes_that_were_given():
    """A Secret that is not there yet holds nothing up."""
    spec = of_kind(rendered(*VALUES["everything"]), "StatefulSet")["web-df-pool"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["template"]["spec"]["volumes"]}
    theirs = volumes[mounts["/etc/dayfly/secrets/team-a"]["name"]]["secret"]

    assert "--secrets=/etc/dayfly/secrets" in container["command"]
    assert (theirs["secretName"], theirs["optional"]) == ("theirs", True)
    assert mounts["/etc/dayfly/secrets/team-a"]["readOnly"]
    assert volumes[mounts["/inbox"]["name"]]["nfs"]["path"] == "/inbox"
