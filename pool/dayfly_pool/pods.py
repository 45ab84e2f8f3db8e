"""What sandboxes are as pods: the operator's settings, and the manifests made from them. Pure."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec
from msgspec import Meta

from dayfly.context import FOLDERS
from dayfly_pool.declared import Model
from dayfly_pool.models import (
    BASE,
    Container,
    Environment,
    Function,
    FunctionId,
    Limits,
    Mold,
    function_id,
)

DOMAIN: Final = "dayfly.dev"
SHARD: Final = f"{DOMAIN}/shard"
"""The label that says whose a pod is."""

NETWORK: Final = f"{DOMAIN}/network"
"""`none` or `egress`: what a NetworkPolicy selects by."""

MOLD: Final = f"{DOMAIN}/mold"
"""The annotation that says what it is made of."""

NAMESPACE, FUNCTION, VERSION = f"{DOMAIN}/namespace", f"{DOMAIN}/function", f"{DOMAIN}/version"
"""What it holds: written when it has been loaded, when nobody waits for that any more."""

RESERVED: Final = f"{DOMAIN}/"
SANDBOX: Final = "sandbox"
"""The component that pods are."""

SECRET_FOLDER, SECRET_FILE = "/run/dayfly", "secret"
ENVIRONMENT: Final = "/environment"
"""Where an environment's libraries are: its image has them there, or the pool sends them."""

HEADROOM_MB: Final = 32
"""What porter and guest use themselves, on top of what a function may."""

ENDS_S: Final = 30
"""What is running in a pod that is to end has so long to finish."""


CONTAINER_ENDS_S: Final = 10
"""What a user's own container has after SIGTERM."""

TASK: Final = f"{DOMAIN}/task"
"""The annotation of a pod that runs to its end: whose task it is."""

RESULT_FILE: Final = "/dev/termination-log"
"""What is written there the API server tells as the container's last message."""


class PodClass(Model, frozen=True):
    """A size that pods are made in: requests and limits alike."""

    memory_mb: Annotated[int, Meta(ge=16, le=1 << 20)]
    cpu: Annotated[float, Meta(ge=0.01, le=256)] = 1.0
    ephemeral_mb: Annotated[int, Meta(ge=16, le=1 << 20)] = 512
    """For code that is unpacked."""

    steps_mb: Annotated[int, Meta(ge=16, le=1 << 20)] = 1024
    """For the folders of a step, all together; only pods for steps have it."""

    resources: dict[str, str] = {}
    """What else it has, as `nvidia.com/gpu: "1"`."""


CLASSES: Final = tuple(PodClass(memory_mb=mb) for mb in (128, 256, 512, 1024, 2048, 4096))


class Images(Model, frozen=True):
    """What pods of users' own images may do."""

    run_as_non_root: bool = True
    """Images whose user is root, or a name, are refused by the nodes."""

    run_as_user: Annotated[int, Meta(ge=0)] = 0
    """Instead of the image's own; 0: that one."""


class Pods(Model, frozen=True):
    """How pods are made, as the file says that `--kubernetes` names."""

    image: Annotated[str, Meta(min_length=1)]
    environments: dict[str, str] = {}
    """Images by environment, `NAMESPACE/NAME` or `NAME`: their libraries are in /environment."""

    environment_images: bool = False
    """Whether foreign namespaces may name images for their environments, too."""

    images: Images = Images()
    classes: Annotated[tuple[PodClass, ...], Meta(min_length=1)] = CLASSES
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    runtime_class_name: str = ""
    node_selector: dict[str, str] = {}
    tolerations: tuple[dict[str, Any], ...] = ()
    affinity: dict[str, Any] = {}
    priority_class_name: str = ""
    service_account_name: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    namespace: str = ""
    """Where they are made; empty: where the pool is."""

    kubeconfig: str = ""
    """How the cluster is reached; empty: as a pod of it, or as $KUBECONFIG says."""

    port: Annotated[int, Meta(ge=1, le=65535)] = 7000
    uid_first: Annotated[int, Meta(ge=1)] = 3_000_000
    uid_count: Annotated[int, Meta(ge=1)] = 1_000_000
    """Each pod runs as another uid of these, so that limits by uid are its own."""

    owner: str = ""
    """What goes with us when it is deleted, and everything that we made with it: KIND/NAME."""

    def __post_init__(self) -> None:
        for name in (*self.labels, *self.annotations):
            if name.startswith(RESERVED):
                raise ValueError(f"{name} is ours to set: choose another name")
        sizes = [each.memory_mb for each in self.classes]
        if sizes != sorted(set(sizes)):
            raise ValueError("classes must be in the order of memoryMb, each of another one")

    def fitting(self, limits: Limits) -> PodClass | None:
        """The smallest class that has the memory, if there is one."""
        return next((each for each in self.classes if each.memory_mb >= limits.memory_mb), None)

    def of(self, memory_mb: int) -> PodClass:
        """The class of that size; of one that there is no more, the next larger, or the largest."""
        return next((c for c in self.classes if c.memory_mb >= memory_mb), self.classes[-1])


class Key(msgspec.Struct, frozen=True):
    """Where a pod's secret is: an entry of a Secret."""

    secret: str
    entry: str


def pod(
    pods: Pods,
    *,
    name: str,
    shard: str,
    owner: Mapping[str, Any],
    mold: Mold,
    command: list[str],
    environment: Environment,
    key: Key,
    uid: int,
) -> dict[str, Any]:
    """A generic sandbox's manifest: restricted Pod Security, no token, one size, one tenant."""
    size = pods.of(mold.memory_mb)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "labels": pods.labels | _labels(shard, mold),
            "annotations": pods.annotations | {MOLD: written(mold)},
            "ownerReferences": [dict(owner)] if owner else [],
        },
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": ENDS_S,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": uid,
                "runAsGroup": uid,
                "fsGroup": uid,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [_container(pods, size, mold, command, environment)],
            "volumes": _volumes(size, mold, key, _room_mb(environment)),
        }
        | _placed(pods),
    }


def container_pod(
    pods: Pods,
    *,
    name: str,
    shard: str,
    owner: Mapping[str, Any],
    function: Function,
    container: Container,
    env: Mapping[str, str],
) -> dict[str, Any]:
    """The manifest of a pod of a user's own image: its function's from the beginning."""
    mold, images = function.mold, pods.images
    whose = held(function) if container.port else {}
    noted = {MOLD: written(mold)} | ({} if container.port else {TASK: function.id})
    security: dict[str, Any] = {
        "runAsNonRoot": images.run_as_non_root,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    if images.run_as_user:
        security["runAsUser"] = images.run_as_user
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "labels": pods.labels | _labels(shard, mold) | whose,
            "annotations": pods.annotations | noted,
            "ownerReferences": [dict(owner)] if owner else [],
        },
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": CONTAINER_ENDS_S,
            "securityContext": security,
            "containers": [_own_container(pods, pods.of(mold.memory_mb), container, env)],
        }
        | _placed(pods),
    }


def _own_container(
    pods: Pods, size: PodClass, container: Container, env: Mapping[str, str]
) -> dict[str, Any]:
    """Nothing of it is expanded: what looks like `$(NAME)` stays as it is."""
    asked = {what: str(n) for what, n in container.resources.items()}
    amounts = _amounts(size, size.memory_mb, size.ephemeral_mb) | asked
    variables = {**container.env, **env}
    if container.port:
        variables["PORT"] = str(container.port)
    else:
        variables["DAYFLY_RESULT"] = RESULT_FILE
    optional = {
        "command": [_plain(word) for word in container.command],
        "args": [_plain(word) for word in container.args],
        "ports": [{"name": "http", "containerPort": container.port}] if container.port else [],
    }
    return {
        "name": "sandbox",
        "image": container.image,
        "imagePullPolicy": pods.image_pull_policy,
        "env": [{"name": n, "value": _plain(value)} for n, value in variables.items()],
        "resources": {"requests": amounts, "limits": amounts},
        "terminationMessagePath": RESULT_FILE,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
    } | {field: value for field, value in optional.items() if value}


def _plain(text: str) -> str:
    """*text* as Kubernetes makes it out of this."""
    return text.replace("$", "$$")


def _room_mb(environment: Environment) -> int:
    """For what is sent of the environment."""
    return (environment.parcel.room_bytes >> 20) + 1 if environment.parcel is not None else 0


def _volumes(size: PodClass, mold: Mold, key: Key, room_mb: int) -> list[dict[str, Any]]:
    secret = {
        "secretName": key.secret,
        "defaultMode": 0o440,
        "items": [{"key": key.entry, "path": SECRET_FILE}],
    }
    sent = {"name": "environment", "emptyDir": {"sizeLimit": f"{room_mb}Mi"}}
    return [
        *([sent] if room_mb else []),
        {"name": "code", "emptyDir": {"sizeLimit": f"{size.ephemeral_mb}Mi"}},
        {"name": "tmp", "emptyDir": {"medium": "Memory"}},
        {"name": "secret", "secret": secret},
        *(
            {"name": name, "emptyDir": {"sizeLimit": f"{size.steps_mb}Mi"}}
            for name in _step_folders(mold)
        ),
    ]


def _step_folders(mold: Mold) -> list[str]:
    """The top folders that hold a step's: what they are sent is on the node's disk."""
    return [place.strip("/") for place in FOLDERS] if mold.steps else []


def _placed(pods: Pods) -> dict[str, Any]:
    """Where it may run, and with what: the operator's part."""
    optional = {
        "runtimeClassName": pods.runtime_class_name,
        "nodeSelector": pods.node_selector,
        "tolerations": list(pods.tolerations),
        "affinity": pods.affinity,
        "priorityClassName": pods.priority_class_name,
        "serviceAccountName": pods.service_account_name,
        "imagePullSecrets": [{"name": name} for name in pods.image_pull_secrets],
    }
    return {field: value for field, value in optional.items() if value}


def _container(
    pods: Pods, size: PodClass, mold: Mold, command: list[str], environment: Environment
) -> dict[str, Any]:
    room_mb = _room_mb(environment)
    disk_mb = size.ephemeral_mb + room_mb + (size.steps_mb if mold.steps else 0)
    amounts = _amounts(size, size.memory_mb + HEADROOM_MB, disk_mb)
    return {
        "name": "sandbox",
        "image": image_of(pods, environment),
        "imagePullPolicy": pods.image_pull_policy,
        "command": command,
        "ports": [{"name": "pool", "containerPort": pods.port}],
        "resources": {"requests": amounts, "limits": amounts},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            *([{"name": "environment", "mountPath": ENVIRONMENT}] if room_mb else []),
            {"name": "code", "mountPath": "/code"},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "secret", "mountPath": SECRET_FOLDER, "readOnly": True},
            *({"name": name, "mountPath": f"/{name}"} for name in _step_folders(mold)),
        ],
    }


def _amounts(size: PodClass, memory_mb: int, disk_mb: int) -> dict[str, str]:
    return {
        "cpu": f"{round(size.cpu * 1000)}m",
        "memory": f"{memory_mb}Mi",
        "ephemeral-storage": f"{disk_mb}Mi",
    } | size.resources


def labels(component: str, shard: str = "") -> dict[str, str]:
    """Those of what we make in a cluster: of one shard, or what every shard's have."""
    return {
        "app.kubernetes.io/name": "dayfly",
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/managed-by": "dayfly",
    } | ({SHARD: shard} if shard else {})


def selector(component: str, shard: str = "") -> str:
    """What lists all that has these labels."""
    return ",".join(f"{name}={value}" for name, value in labels(component, shard).items())


def _labels(shard: str, mold: Mold) -> dict[str, str]:
    return labels(SANDBOX, shard) | {NETWORK: "none" if mold.network == "none" else "egress"}


def held(function: Function) -> dict[str, str]:
    """The labels of a pod that holds *function*."""
    return {NAMESPACE: function.namespace, FUNCTION: function.name, VERSION: function.version}


def holds(obj: Mapping[str, Any]) -> tuple[FunctionId, str] | None:
    """(function id, version) by a pod's labels; None for a generic one."""
    labels = obj["metadata"].get("labels") or {}
    if FUNCTION not in labels:
        return None
    id_ = function_id(labels.get(NAMESPACE, ""), labels[FUNCTION])
    return id_, labels.get(VERSION, "")


def written(mold: Mold) -> str:
    """As its annotation has it."""
    return msgspec.json.encode(mold).decode()


def mold_of(obj: Mapping[str, Any]) -> Mold | None:
    """What a pod is made of; None if it does not say so in a way that we know."""
    annotations = obj["metadata"].get("annotations") or {}
    try:
        return msgspec.json.decode(annotations.get(MOLD, ""), type=Mold)
    except msgspec.DecodeError:
        return None


def key_of(obj: Mapping[str, Any]) -> Key | None:
    """Where a pod has its secret from."""
    for volume in obj["spec"].get("volumes") or ():
        if volume["name"] == "secret" and (items := volume["secret"].get("items")):
            return Key(volume["secret"]["secretName"], items[0]["key"])
    return None


def image_of(pods: Pods, environment: Environment) -> str:
    """What a pod for *environment* runs: its own image, or the runtime's."""
    if environment.digest == BASE:
        return pods.image
    return environment.image or pods.image


def trouble(obj: Mapping[str, Any]) -> tuple[str, bool]:
    """(why a pod does not run, whether waiting longer is in vain); empty when it is on its way."""
    status = obj.get("status") or {}
    if status.get("phase") in ("Failed", "Succeeded"):
        return f"the pod has ended: {status.get('reason') or status['phase']}", True
    for container in status.get("containerStatuses") or ():
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason = waiting.get("reason", "")
        if reason in HOPELESS:
            return f"{reason}: {waiting.get('message', '')}"[:500], True
        if reason and reason != "ContainerCreating":
            return f"{reason}: {waiting.get('message', '')}"[:500], False
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"not scheduled: {condition.get('message', '')}"[:500], False
    return "", False


class End(NamedTuple):
    """How a container ended: *why* in the kubelet's words, *said* in its own."""

    code: int
    why: str = ""
    said: str = ""


def ended(obj: Mapping[str, Any]) -> End | None:
    """How a pod's container has ended, if it has."""
    status = obj.get("status") or {}
    for container in status.get("containerStatuses") or ():
        if found := (container.get("state") or {}).get("terminated"):
            why, said = found.get("reason") or "", found.get("message") or ""
            return End(int(found.get("exitCode") or 0), why, said)
    if status.get("phase") in ("Failed", "Succeeded"):  # evicted, or its node is gone
        return End(KILLED, status.get("reason") or "", status.get("message") or "")
    return None


def is_unpullable(obj: Mapping[str, Any]) -> bool:
    """Whether the kubelet has tried more than once to get its image."""
    statuses = (obj.get("status") or {}).get("containerStatuses") or ()
    states = [(each.get("state") or {}).get("waiting") or {} for each in statuses]
    return any(state.get("reason") == "ImagePullBackOff" for state in states)


KILLED: Final = -9
HOPELESS: Final = frozenset(
    {
        "CreateContainerConfigError",
        "ErrImageNeverPull",
        "ImageInspectError",
        "InvalidImageName",
        "RunContainerError",
    }
)
"""What no waiting mends."""


def read(text: bytes) -> Pods:
    """The settings in a YAML file. Raises ValueError with what is wrong with them."""
    import yaml

    try:
        return msgspec.convert(yaml.safe_load(text), Pods)
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise ValueError(str(error)) from None
