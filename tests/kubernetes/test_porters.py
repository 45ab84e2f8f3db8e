"""Who may speak to a pod, and what a pod's manifest promises: without a cluster."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import json as msgjson
from msgspec import structs

from dayfly import greeting
from dayfly_pool import pods as manifests
from dayfly_pool.config import Config
from dayfly_pool.driver import Exit
from dayfly_pool.drivers import kubernetes, porters
from dayfly_pool.errors import SandboxStartFailed
from dayfly_pool.models import BASE, Environment, Limits, Mold, Mounts, SandboxId
from dayfly_pool.pods import Key, PodClass, Pods
from dayfly_pool.testing import function

SECRET, OTHER = b"s" * 32, b"o" * 32
OURS, THEIRS = b"p" * 16, b"q" * 16
kinds = st.sampled_from(greeting.KINDS)
OWNER = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "name": "x", "uid": "u"}


def answered(kind: int, *, has_function: bool = False, secret: bytes = SECRET) -> bytes:
    return greeting.answer(secret, kind, OURS, THEIRS, has_function=has_function)


# ---- greeting -----------------------------------------------------------------------------------


@given(kind=kinds, has_function=st.booleans())
def test_who_knows_the_secret_is_let_in_and_told_the_truth(kind: int, has_function: bool):
    said, nonce = greeting.read_opening(greeting.opening(kind, OURS))
    answer = greeting.answer(SECRET, said, nonce, THEIRS, has_function=has_function)
    found, proof = greeting.read_answer(SECRET, kind, OURS, answer)

    assert (said, found) == (kind, has_function)
    assert greeting.is_pool(SECRET, kind, OURS, THEIRS, proof, has_function=has_function)
    assert SECRET not in answer + proof


@given(kind=kinds, has_function=st.booleans(), bit=st.integers(0, greeting.ANSWER.size * 8 - 1))
def test_an_answer_with_any_bit_flipped_is_an_impostors(kind: int, has_function: bool, bit: int):
    """Above all that of the state: a guest with a function is never taken for a generic one."""
    answer = bytearray(answered(kind, has_function=has_function))
    answer[bit // 8] ^= 1 << bit % 8

    with pytest.raises(ValueError, match="does not know"):
        greeting.read_answer(SECRET, kind, OURS, bytes(answer))


@given(kind=kinds, has_function=st.booleans(), bit=st.integers(0, greeting.MAC_BYTES * 8 - 1))
def test_a_proof_with_any_bit_flipped_is_no_pools(kind: int, has_function: bool, bit: int):
    answer = answered(kind, has_function=has_function)
    proof = bytearray(greeting.read_answer(SECRET, kind, OURS, answer)[1])
    proof[bit // 8] ^= 1 << bit % 8

    assert not greeting.is_pool(SECRET, kind, OURS, THEIRS, bytes(proof), has_function=has_function)


@given(data=st.binary(min_size=greeting.OPENING.size, max_size=greeting.OPENING.size))
def test_any_other_opening_is_refused(data: bytes):
    is_one = data[:6] == greeting.MAGIC and data[6] in greeting.KINDS
    if is_one:
        assert greeting.read_opening(data) == (data[6], data[7:])
    else:
        with pytest.raises(ValueError, match="no pool"):
            greeting.read_opening(data)


@given(kind=kinds, has_function=st.booleans())
def test_what_one_end_has_said_proves_nothing_of_the_other(kind: int, has_function: bool):
    """Nor does what was said for another kind, state, nonce or pod."""
    answer = answered(kind, has_function=has_function)
    porters = answer[-greeting.MAC_BYTES :]
    _, pools = greeting.read_answer(SECRET, kind, OURS, answer)
    other = greeting.LINE if kind == greeting.GUEST else greeting.GUEST

    def is_pool(proof: bytes, **but: Any) -> bool:
        said = {"kind": kind, "theirs": OURS, "ours": THEIRS, "secret": SECRET} | but
        state = said.pop("has_function", has_function)
        return greeting.is_pool(proof=proof, has_function=state, **said)

    assert is_pool(pools)
    assert not is_pool(porters)
    swapped = {"theirs": THEIRS, "ours": OURS}
    others: list[dict[str, Any]] = [{"kind": other}, {"has_function": not has_function}]
    others += [{"ours": OURS}, {"theirs": THEIRS}, swapped, {"secret": OTHER}]
    for but in others:
        assert not is_pool(pools, **but), but
    reflected = greeting.ANSWER.pack(THEIRS, has_function, pools)
    for told in (reflected, answered(other, has_function=has_function),
                 answered(kind, has_function=has_function, secret=OTHER)):  # fmt: skip
        with pytest.raises(ValueError, match="does not know"):
            greeting.read_answer(SECRET, kind, OURS, told)
    with pytest.raises(ValueError, match="does not know"):  # an answer of another time
        greeting.read_answer(SECRET, kind, os.urandom(16), answer)


# ---- manifests ----------------------------------------------------------------------------------


FULL = Pods(
    image="registry.example/dayfly@sha256:" + "0" * 64,
    image_pull_secrets=("pull",),
    runtime_class_name="gvisor",
    node_selector={"pool": "sandboxes"},
    tolerations=({"key": "sandboxes", "operator": "Exists", "effect": "NoSchedule"},),
    affinity={"podAntiAffinity": {}},
    priority_class_name="low",
    service_account_name="nobody",
    labels={"team": "a"},
    annotations={"note": "b"},
    classes=(PodClass(memory_mb=128, cpu=0.1, resources={"nvidia.com/gpu": "1"}),),
)


PLAIN, MOLD = Pods(image="i"), Mold(BASE, memory_mb=128)


def manifest(pods: Pods = PLAIN, mold: Mold = MOLD) -> dict[str, Any]:
    return manifests.pod(
        pods, name="dayfly-1", shard="dayfly", owner=OWNER, mold=mold, command=["python3", "{}"],
        environment=Environment(digest=BASE), key=Key("keys", "k7"), uid=3_000_007,
    )  # fmt: skip


@pytest.mark.parametrize("version", ["1.25", "1.30", "1.37"])
@pytest.mark.parametrize("pods", [Pods(image="i"), FULL], ids=["plain", "full"])
def test_manifests_are_what_kubernetes_takes(pods: Pods, version: str):
    kubernetes_validate.validate(manifest(pods), version, strict=True)


@pytest.mark.parametrize("pods", [Pods(image="i"), FULL], ids=["plain", "full"])
def test_pods_keep_to_the_restricted_pod_security_standard(pods: Pods):
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    spec = manifest(pods)["spec"]
    (container,) = spec["containers"]
    inside = container["securityContext"]

    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & spec.keys()
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert inside["allowPrivilegeEscalation"] is False
    assert inside["capabilities"] == {"drop": ["ALL"]}
    assert inside["readOnlyRootFilesystem"] is True
    assert not {"privileged", "procMount"} & inside.keys()
    assert all("hostPort" not in port for port in container["ports"])
    assert {kind for v in spec["volumes"] for kind in v if kind != "name"} <= {"emptyDir", "secret"}
    assert spec["automountServiceAccountToken"] is False
    assert container["resources"]["requests"] == container["resources"]["limits"]


def test_a_pod_sees_one_secret_and_can_be_read_back():
    mold = Mold(BASE, "host", memory_mb=512)
    made = json.loads(json.dumps(manifest(mold=mold)))
    (secret,) = [v["secret"] for v in made["spec"]["volumes"] if "secret" in v]
    held = function("greet", version="7")
    made["metadata"]["labels"] |= manifests.held(held)

    assert [item["key"] for item in secret["items"]] == ["k7"]
    assert manifests.key_of(made) == Key("keys", "k7")
    assert manifests.mold_of(made) == mold
    assert manifests.holds(manifest()) is None
    assert manifests.holds(made) == (held.id, "7")


@pytest.mark.parametrize("text", ["", "{", "null", '{"environment": 1}'])
def test_a_mold_that_nobody_knows_is_none(text: str):
    made = manifest()
    made["metadata"]["annotations"] = {manifests.MOLD: text}

    assert manifests.mold_of(made) is None
    assert manifests.mold_of({"metadata": {}}) is None


@pytest.mark.parametrize("name", ["dayfly.dev/shard", "dayfly.dev/x"])
@pytest.mark.parametrize("field", ["labels", "annotations"])
def test_what_is_ours_to_say_no_operator_says(field: str, name: str):
    text = msgjson.encode({"image": "i", field: {name: "other"}})

    with pytest.raises(ValueError, match="choose another name"):
        manifests.read(text)


def test_classes_are_chosen_by_memory():
    pods = Pods(image="i", classes=(PodClass(memory_mb=128), PodClass(memory_mb=512)))

    assert [pods.fitting(Limits(memory_mb=mb)) for mb in (16, 128, 129, 512, 513)] == [
        pods.classes[0], pods.classes[0], pods.classes[1], pods.classes[1], None
    ]  # fmt: skip
    assert [pods.of(mb).memory_mb for mb in (0, 128, 256, 4096)] == [128, 128, 512, 512]
    for wrong in ([512, 128], [128, 128]):
        with pytest.raises(ValueError, match="in the order"):
            structs.replace(pods, classes=tuple(PodClass(memory_mb=mb) for mb in wrong))


def test_the_image_is_the_environments_own_if_it_has_one():
    pods = Pods(image="runtime")

    assert manifests.image_of(pods, Environment(digest=BASE)) == "runtime"
    assert manifests.image_of(pods, Environment(digest="e" * 64, image="own")) == "own"


@pytest.mark.parametrize(
    ("status", "why", "is_hopeless"),
    [
        ({}, "", False),
        ({"phase": "Pending"}, "", False),
        ({"phase": "Failed", "reason": "Evicted"}, "Evicted", True),
        ({"phase": "Succeeded"}, "Succeeded", True),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ErrImageNeverPull"}}}]},
         "ErrImageNeverPull", True),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff"}}}]},
         "ImagePullBackOff", False),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]},
         "", False),
        ({"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/1 nodes"}]},
         "0/1 nodes", False),
    ],
)  # fmt: skip
def test_troubles_are_told(status: dict[str, Any], why: str, is_hopeless: bool):
    told, hopeless = manifests.trouble({"status": status})

    assert why in told
    assert bool(told) == bool(why)
    assert hopeless is is_hopeless


@pytest.mark.parametrize(
    ("state", "ended"),
    [
        ({"running": {}}, None),
        ({"terminated": {"exitCode": 3, "reason": "Error"}}, (3, "Error", "")),
        ({"terminated": {"exitCode": 137, "reason": "OOMKilled"}}, (137, "OOMKilled", "")),
    ],
)
def test_how_a_container_has_ended_is_read(state: dict[str, Any], ended: Any):
    assert manifests.ended({"status": {"containerStatuses": [{"state": state}]}}) == ended
    assert manifests.ended({}) is None


@pytest.mark.parametrize("shard", ["", "Big", "a,b", "a_b", "-a", "a-", "a" * 64, "a\n"])
def test_a_shard_that_no_label_can_be_is_refused(shard: str, tmp_path: Any):
    """It would choose other pods than its own, or none could be made."""
    with pytest.raises(ValueError, match="shard"):
        Config(data=tmp_path, shard=shard)


# ---- what runs in a pod against its porter ------------------------------------------------------

GUEST = """
import sys, time
from dayfly import porter

line = porter.serve(porter.Post(port=int(sys.argv[1]), secret=sys.argv[2], host="127.0.0.1"))
line.take()
line.taken()
print("taken", flush=True)
time.sleep(60)
"""


async def test_a_porter_that_is_told_to_leave_again_and_again_says_so_once(
    tmp_path: Path, unused_tcp_port: int
):
    """Where the kernel lets user code signal pid 1, this was a flood of reports to the pool."""
    (tmp_path / "secret").write_bytes(SECRET)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", GUEST, str(unused_tcp_port), str(tmp_path / "secret"),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(20):
            assert process.stdout is not None
            place = ("127.0.0.1", unused_tcp_port)
            words = (place, SECRET)
            line = await porters.greeted(*words, greeting.LINE, has_function=False)
            (await porters.greeted(*words, greeting.GUEST, has_function=False)).close()
            assert await process.stdout.readline() == b"taken\n"

            reader, writer = await asyncio.open_connection(sock=line)
            said = []
            for _ in range(20):
                process.send_signal(signal.SIGTERM)
                # whoever is let in afterwards was heard after the signal
                (await porters.greeted(*words, greeting.GUEST, has_function=True)).close()
            writer.write(greeting.KILL)
            while data := await reader.read(4096):
                said.append(data)
            whats = [what for what, *_ in greeting.REPORT.iter_unpack(b"".join(said))]
            assert whats == [greeting.LEAVING, greeting.ENDED]
            writer.close()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_pod_that_says_that_it_leaves_is_heard_once():
    told: list[str] = []
    pod = kubernetes._Pod(SandboxId("sb-1"), "p", lambda: told.append("leaves"))

    for _ in range(3):
        pod.reported(greeting.LEAVING, Exit(0))

    assert told == ["leaves"]


async def test_a_step_whose_porter_lets_nobody_in_holds_no_carrier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """User code with a network can call its own porter so often that it turns the pool away."""
    monkeypatch.setattr(kubernetes, "LET_IN_S_MAX", 0.1, raising=False)

    def turn_away(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    server = await asyncio.start_server(turn_away, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    driver = kubernetes.KubernetesDriver(
        Config(data=tmp_path, driver="kubernetes", pods=structs.replace(PLAIN, port=port))
    )
    sandbox = SandboxId("sb-1")
    pod = driver._known[sandbox] = kubernetes._Pod(sandbox, "p", lambda: None)
    pod.secret = SECRET
    pod.running.set_result("127.0.0.1")

    async with server, asyncio.timeout(5):
        with pytest.raises(SandboxStartFailed, match="let nobody in"):
            await driver.collect(sandbox, Mounts(step="s"))
    assert driver._carrying._value == kubernetes.CARRIERS_MAX
