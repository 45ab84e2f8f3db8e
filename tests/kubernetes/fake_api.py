"""A small API server that keeps Kubernetes' promises, and breaks them when a test says so.

`test_api_contract.py` holds it to what a real one does. Simplified on purpose:

* apply owns what a manager's last apply named; lists are one value; conflicts are by value;
* strategic merge knows lists by `name` only, as containers, env and volumes are;
* nothing schedules or runs pods: `kubelet` is called with them, `set_status` and `remove` are its;
* namespaces, and what owners leave, are deleted at once; who has the token may do everything.

Every method may be called from any thread.
"""

import asyncio
import copy
import json
import re
import secrets
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import jsonschema
from aiohttp import web

Object = dict[str, Any]
NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
BOOKMARK_S = 60.0
TOKEN = "fake-token"
KEPT = ("name", "namespace", "uid", "creationTimestamp", "generation", "deletionTimestamp")
POD_FIELDS = ("spec.nodeName", "spec.restartPolicy", "spec.schedulerName",
              "spec.serviceAccountName", "status.phase", "status.podIP")  # fmt: skip


@dataclass(frozen=True)
class Resource:
    """A kind that is served. *schema* is of one version; *counts* its generation."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    has_status: bool = False
    counts: bool = False
    schema: Object | None = None

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


APPS, CRDS = "apps", "apiextensions.k8s.io"
BUILTIN = [
    Resource("", "v1", "pods", "Pod", has_status=True),
    Resource("", "v1", "secrets", "Secret"),
    Resource("", "v1", "configmaps", "ConfigMap"),
    Resource("", "v1", "services", "Service", has_status=True),
    Resource("", "v1", "serviceaccounts", "ServiceAccount"),
    Resource("", "v1", "events", "Event"),
    Resource("", "v1", "nodes", "Node", namespaced=False, has_status=True),
    Resource("", "v1", "namespaces", "Namespace", namespaced=False, has_status=True),
    Resource("coordination.k8s.io", "v1", "leases", "Lease"),
    Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", counts=True),
    Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", counts=True),
    Resource(APPS, "v1", "deployments", "Deployment", has_status=True, counts=True),
    Resource(APPS, "v1", "statefulsets", "StatefulSet", has_status=True, counts=True),
    Resource(CRDS, "v1", "customresourcedefinitions", "CustomResourceDefinition",
             namespaced=False, has_status=True, counts=True),
]  # fmt: skip


class Refused(Exception):
    """What the server answers instead."""

    def __init__(self, code: int, reason: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.body = {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "reason": reason, "code": code, "details": details,
        }  # fmt: skip


def not_found(resource: Resource, name: str) -> Refused:
    return Refused(404, "NotFound", f'{resource.plural} "{name}" not found', name=name)


def invalid(message: str) -> Refused:
    return Refused(422, "Invalid", message)


def expired(message: str = "too old resource version") -> Refused:
    return Refused(410, "Expired", message)


@dataclass
class Fault:
    """What happens to the next *times* requests of *verb* on *plural* (any, when empty).

    With *status* they are answered so; *lost* ones are carried out and the connection is cut
    instead of an answer; *cut* ones are not even carried out; *slow_s* passes before.
    """

    verb: str = ""
    plural: str = ""
    times: int = 1
    status: int = 0
    retry_after_s: int | None = None
    lost: bool = False
    cut: bool = False
    slow_s: float = 0.0


@dataclass
class Event:
    """One change: *what* became of an object that was *before* and is *after*."""

    revision: int
    what: str
    before: Object | None
    after: Object


@dataclass
class Stream:
    """One watch. *frozen* sends nothing and does not end; *ending* is sent, and ends it."""

    resource: Resource
    wake: asyncio.Event
    frozen: bool = False
    ending: Object | None = None
    cut: bool = False
    extra: list[Object] = field(default_factory=list)


# ---- selectors ----------------------------------------------------------------------------------


def label_selector(text: str) -> Callable[[Object], bool]:
    """As `kubectl -l` takes it."""
    tests: list[Callable[[dict[str, str]], bool]] = []
    for part in filter(None, re.split(r",(?![^(]*\))", text)):
        part = part.strip()
        if found := re.fullmatch(r"(\S+)\s+(in|notin)\s+\((.*)\)", part):
            key, word, listed = found.groups()
            values = {value.strip() for value in listed.split(",")}
            wanted = word == "in"
            tests.append(
                lambda labels, k=key, v=values, w=wanted: (
                    (k in labels and labels[k] in v) if w else labels.get(k) not in v
                )
            )
        elif found := re.fullmatch(r"([^!=\s]+)\s*(!=|==|=)\s*(\S*)", part):
            key, word, value = found.groups()
            wanted = word != "!="
            tests.append(lambda labels, k=key, v=value, w=wanted: (labels.get(k) == v) is w)
        elif found := re.fullmatch(r"(!?)([\w./-]+)", part):
            wanted, key = not found[1], found[2]
            tests.append(lambda labels, k=key, w=wanted: (k in labels) is w)
        else:
            raise Refused(400, "BadRequest", f"unable to parse requirement: {part}")
    return lambda obj: all(test(obj["metadata"].get("labels") or {}) for test in tests)


def field_selector(resource: Resource, text: str) -> Callable[[Object], bool]:
    """Only by what the kind can be selected by."""
    tests = []
    known = ("metadata.name", "metadata.namespace")
    known += POD_FIELDS if resource.plural == "pods" else ()
    known += ("type",) if resource.plural == "secrets" else ()
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"([\w.]+)(!=|==|=)(.*)", part)
        if not found or found[1] not in known:
            raise Refused(400, "BadRequest", f"field label not supported: {part}")
        tests.append((found[1].split("."), found[2] != "!=", found[3]))
    return lambda obj: all((at(obj, path) == value) is wanted for path, wanted, value in tests)


def at(obj: Any, path: list[str]) -> str:
    for part in path:
        obj = obj.get(part, "") if isinstance(obj, dict) else ""
    return str(obj)


# ---- patches ------------------------------------------------------------------------------------


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def strategic_patch(target: Any, patch: Any) -> Any:
    """A merge patch for which lists of what has a name are sets by name."""
    if (
        isinstance(patch, list)
        and patch
        and all(isinstance(x, dict) and "name" in x for x in patch)
    ):
        merged = {x["name"]: x for x in target or []}
        for x in patch:
            gone = x.get("$patch") == "delete"
            merged.pop(x["name"], None) if gone else merged.update(
                {x["name"]: strategic_patch(merged.get(x["name"]), x)}
            )
        return list(merged.values())
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = strategic_patch(merged.get(key), value)
    return merged


def json_patch(target: Any, operations: list[Object]) -> Any:
    """RFC 6902, without move and copy."""
    target = copy.deepcopy(target)
    for operation in operations:
        path = [p.replace("~1", "/").replace("~0", "~") for p in operation["path"].split("/")[1:]]
        try:
            _operate(target, operation, path)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise invalid(f"the server rejected our request: {operation}: {error!r}") from error
    return target


def _operate(target: Any, operation: Object, path: list[str]) -> None:
    *parents, last = path
    for part in parents:
        target = target[int(part)] if isinstance(target, list) else target[part]
    op = operation["op"]
    key: Any = int(last) if isinstance(target, list) and last != "-" else last
    if op == "test" and target[key] != operation["value"]:
        raise ValueError("test failed")
    if op == "remove":
        del target[key]
    elif op == "add" and isinstance(target, list):
        target.insert(len(target) if key == "-" else key, operation["value"])
    elif op in ("add", "replace"):
        if op == "replace":
            target[key]
        target[key] = operation["value"]
    elif op != "test":
        raise ValueError(f"unknown operation {op}")


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif path:
        yield path, value


def drop(obj: Any, path: tuple[str, ...]) -> None:
    """Remove a leaf, and what is empty then."""
    if not isinstance(obj, dict) or path[0] not in obj:
        return
    if len(path) > 1:
        drop(obj[path[0]], path[1:])
        if obj[path[0]] == {}:
            del obj[path[0]]
    else:
        del obj[path[0]]


# ---- schemas ------------------------------------------------------------------------------------


def prune(value: Any, schema: Object) -> Any:
    """What the schema does not name goes, and what it has defaults for comes."""
    if isinstance(value, list) and "items" in schema:
        return [prune(item, schema["items"]) for item in value]
    if not isinstance(value, dict):
        return value
    known, more = schema.get("properties", {}), schema.get("additionalProperties")
    kept = {}
    for key, inner in value.items():
        if key in known:
            kept[key] = prune(inner, known[key])
        elif isinstance(more, dict):
            kept[key] = prune(inner, more)
        elif more is True or schema.get("x-kubernetes-preserve-unknown-fields"):
            kept[key] = inner
    for key, inner_schema in known.items():
        if "default" in inner_schema and kept.get(key) is None:
            kept[key] = prune(copy.deepcopy(inner_schema["default"]), inner_schema)
    return kept


def json_schema(schema: Any) -> Any:
    """A structural schema as a JSON Schema."""
    if isinstance(schema, list):
        return [json_schema(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: json_schema(inner) for key, inner in schema.items() if key[:2] != "x-"}
    if schema.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
    if schema.get("nullable") and "type" in found:
        found["type"] = [found["type"], "null"]
    return found


def structural(schema: Object, path: str = "openAPIV3Schema") -> None:
    """Every level has a type, or the definition is refused."""
    free = schema.get("x-kubernetes-preserve-unknown-fields")
    if not schema.get("type") and not free and not schema.get("x-kubernetes-int-or-string"):
        raise invalid(f"spec.versions[0].schema.{path}.type: Required value: must not be empty")
    for name, inner in schema.get("properties", {}).items():
        structural(inner, f"{path}.properties[{name}]")
    if isinstance(schema.get("additionalProperties"), dict):
        structural(schema["additionalProperties"], f"{path}.additionalProperties")
    if "items" in schema:
        structural(schema["items"], f"{path}.items")


# ---- the state ----------------------------------------------------------------------------------


class State:
    """Objects, their history, and who watches. Everything under one lock."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.revision = 100
        self.oldest = 100
        self.history: list[Event] = []
        self.window_max = 10_000
        self.objects: dict[tuple[str, str], dict[tuple[str, str], Object]] = {}
        self.resources = {(r.group, r.version, r.plural): r for r in BUILTIN}
        self.applied: dict[tuple[str, str], Object] = {}
        self.pages: dict[str, tuple[int, list[Object]]] = {}
        self.streams: list[Stream] = []
        self.kubelet: Callable[[str, Object], None] = lambda what, pod: None
        self.has_kubelet = False
        self.changed: Callable[[], None] = lambda: None
        for name in ("default", "kube-system"):
            self.create(self.resources["", "v1", "namespaces"], "", {"metadata": {"name": name}})

    def of(self, resource: Resource) -> dict[tuple[str, str], Object]:
        return self.objects.setdefault((resource.group, resource.plural), {})

    def resource(self, group: str, version: str, plural: str) -> Resource:
        if not (found := self.resources.get((group, version, plural))):
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        return found

    def get(self, resource: Resource, namespace: str, name: str) -> Object:
        if not (found := self.of(resource).get((namespace, name))):
            raise not_found(resource, name)
        return found

    def select(
        self, resource: Resource, namespace: str | None, chosen: Callable[[Object], bool]
    ) -> list[Object]:
        found = sorted(self.of(resource).items())
        return [o for (space, _), o in found if namespace in (None, space) and chosen(o)]

    # -- writes

    def create(self, resource: Resource, namespace: str, obj: Object) -> Object:
        obj = self._checked(resource, namespace, copy.deepcopy(obj))
        metadata = obj["metadata"]
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = metadata["generateName"] + secrets.token_hex(3)[:5]
        name = metadata.get("name", "")
        if not name:
            raise invalid("metadata.name: Required value: name or generateName is required")
        if len(name) > 253 or not NAME.fullmatch(name):
            raise invalid(f'metadata.name: Invalid value: "{name}"')
        spaces = self.objects.get(("", "namespaces"), {})
        if resource.namespaced and ("", namespace) not in spaces:
            raise Refused(404, "NotFound", f'namespaces "{namespace}" not found')
        if metadata.get("resourceVersion"):
            raise Refused(500, "", "resourceVersion should not be set on objects to be created")
        if (namespace, name) in self.of(resource):
            raise Refused(409, "AlreadyExists", f'{resource.plural} "{name}" already exists')
        metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": now()}
        if resource.counts:
            metadata["generation"] = 1
        if resource.has_status:
            obj.pop("status", None)
        self._defaults(resource, obj)
        obj = self._store(resource, "ADDED", None, obj)
        if resource.plural == "customresourcedefinitions":
            self._define(obj)
        if resource.plural == "pods":
            self.kubelet("created", obj)
        return obj

    def _checked(self, resource: Resource, namespace: str, obj: Object) -> Object:
        metadata = obj.setdefault("metadata", {})
        given = metadata.get("namespace", namespace)
        if resource.namespaced and given != namespace:
            raise Refused(400, "BadRequest", "the namespace of the object does not match")
        if resource.namespaced:
            metadata["namespace"] = namespace
        kind = (obj.get("apiVersion", resource.api_version), obj.get("kind", resource.kind))
        if kind != (resource.api_version, resource.kind):
            raise Refused(400, "BadRequest", f"{kind} is not {resource.kind}")
        obj |= {"apiVersion": resource.api_version, "kind": resource.kind}
        if resource.schema:
            known = {k: obj[k] for k in ("apiVersion", "kind", "metadata")}
            obj = prune({k: v for k, v in obj.items() if k not in known}, resource.schema) | known
            self._validate(resource, obj)
        if resource.plural == "pods":
            containers = obj.get("spec", {}).get("containers")
            if not containers or not all(c.get("name") and c.get("image") for c in containers):
                raise invalid("spec.containers: Required value")
        return obj

    def _validate(self, resource: Resource, obj: Object) -> None:
        checker = jsonschema.Draft7Validator(json_schema(resource.schema))
        for error in checker.iter_errors(obj):
            path = ".".join(str(part) for part in error.absolute_path)
            raise invalid(f'{resource.kind} "" is invalid: {path}: {error.message}'[:500])

    def _defaults(self, resource: Resource, obj: Object) -> None:
        match resource.plural:
            case "pods":
                defaults = {
                    "restartPolicy": "Always", "terminationGracePeriodSeconds": 30,
                    "dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler",
                    "serviceAccountName": "default", "securityContext": {},
                }  # fmt: skip
                obj["spec"] = defaults | obj["spec"]
                obj["status"] = {"phase": "Pending", "qosClass": "BestEffort"}
            case "namespaces":
                obj["spec"] = {"finalizers": ["kubernetes"]}
                obj["status"] = {"phase": "Active"}
            case "secrets":
                obj.setdefault("type", "Opaque")
                if plain := obj.pop("stringData", None):
                    import base64

                    coded = {k: base64.b64encode(v.encode()).decode() for k, v in plain.items()}
                    obj["data"] = obj.get("data", {}) | coded

    def update(
        self, resource: Resource, before: Object, after: Object, status: bool = False
    ) -> Object:
        """*after* instead of *before*, of which only the status or all the rest counts."""
        after = copy.deepcopy(after)
        given = after.get("metadata", {}).get("resourceVersion")
        metadata = before["metadata"]
        if given and given != metadata["resourceVersion"]:
            name = metadata["name"]
            raise Refused(
                409, "Conflict",
                f'Operation cannot be fulfilled on {resource.plural} "{name}": the object has been '
                "modified; please apply your changes to the latest version and try again",
            )  # fmt: skip
        if (uid := after["metadata"].get("uid", metadata["uid"])) != metadata["uid"]:
            raise Refused(409, "Conflict", f"Precondition failed: UID in precondition: {uid}")
        if status:
            after = before | {"status": after.get("status", {})}
        elif resource.has_status:
            after.pop("status", None)
            after |= {"status": before["status"]} if "status" in before else {}
        after = copy.deepcopy(after)
        after["metadata"] |= {key: metadata[key] for key in KEPT if key in metadata}
        after["metadata"]["resourceVersion"] = metadata["resourceVersion"]
        after = self._checked(resource, metadata.get("namespace", ""), after)
        self._defaults(resource, after) if resource.plural == "secrets" else None
        is_spec = resource.plural == "pods" and not status
        if is_spec and mutable(before["spec"]) != mutable(after["spec"]):
            raise invalid("spec: Forbidden: pod updates may not change fields other than image")
        if after == before:
            return before
        if resource.counts and rest(before) != rest(after):
            after["metadata"]["generation"] += 1
        after = self._store(resource, "MODIFIED", before, after)
        is_last = "deletionTimestamp" in metadata and not after["metadata"].get("finalizers")
        if is_last and resource.plural != "pods":
            self.remove_object(resource, after)
        if resource.plural == "customresourcedefinitions" and not status:
            self._define(after)
        return after

    def delete(self, resource: Resource, obj: Object, options: Object) -> Object:
        uid = options.get("preconditions", {}).get("uid", obj["metadata"]["uid"])
        if uid != obj["metadata"]["uid"]:
            message = f"the UID in the precondition ({uid}) does not match the UID in record"
            raise Refused(409, "Conflict", message)
        grace = options.get("gracePeriodSeconds")
        is_pod = resource.plural == "pods"
        if is_pod and grace is None:
            grace = obj["spec"].get("terminationGracePeriodSeconds", 30)
        waits = is_pod and self.has_kubelet and bool(grace) and bool(obj["spec"].get("nodeName"))
        if obj["metadata"].get("finalizers") or waits:
            if "deletionTimestamp" in obj["metadata"]:
                return obj
            marked = copy.deepcopy(obj)
            marked["metadata"] |= {
                "deletionTimestamp": now(),
                "deletionGracePeriodSeconds": grace or 0,
            }
            marked = self._store(resource, "MODIFIED", obj, marked)
            if is_pod:
                self.kubelet("deleted", marked)
            return marked
        return self.remove_object(resource, obj, options.get("propagationPolicy", "Background"))

    def remove_object(self, resource: Resource, obj: Object, policy: str = "Background") -> Object:
        gone = self._store(resource, "DELETED", obj, copy.deepcopy(obj))
        if resource.plural == "pods":
            self.kubelet("removed", gone)
        uid, name = gone["metadata"]["uid"], gone["metadata"]["name"]
        if resource.plural == "customresourcedefinitions":
            self._undefine(gone)
        for other in list(self.resources.values()):
            for (space, _), one in list(self.of(other).items()):
                if resource.plural == "namespaces" and other.namespaced and space == name:
                    self.delete(other, one, {"gracePeriodSeconds": 0})
                elif policy != "Orphan":
                    self._collect(other, one, uid)
        return gone

    def _collect(self, resource: Resource, obj: Object, uid: str) -> None:
        """Delete what had only that owner."""
        owners = obj["metadata"].get("ownerReferences") or []
        if not any(owner["uid"] == uid for owner in owners):
            return
        there = {one["metadata"]["uid"] for kind in self.objects.values() for one in kind.values()}
        if not any(owner["uid"] in there for owner in owners):
            self.delete(resource, obj, {})

    def _store(self, resource: Resource, what: str, before: Object | None, obj: Object) -> Object:
        self.revision += 1
        metadata = obj["metadata"]
        metadata["resourceVersion"] = str(self.revision)
        key = (metadata.get("namespace", ""), metadata["name"])
        if what == "DELETED":
            del self.of(resource)[key]
        else:
            self.of(resource)[key] = obj
        self.history.append(Event(self.revision, what, before, obj))
        if len(self.history) > self.window_max:
            self.oldest = self.history.pop(0).revision
        self.changed()
        return obj

    # -- definitions

    def _define(self, crd: Object) -> None:
        spec = crd["spec"]
        names = spec["names"]
        if crd["metadata"]["name"] != f"{names['plural']}.{spec['group']}":
            del self.objects[CRDS, "customresourcedefinitions"]["", crd["metadata"]["name"]]
            raise invalid("metadata.name: Invalid value: must be spec.names.plural+.+spec.group")
        for version in spec["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            try:
                structural(schema)
            except Refused:
                del self.objects[CRDS, "customresourcedefinitions"]["", crd["metadata"]["name"]]
                raise
            self.resources[spec["group"], version["name"], names["plural"]] = Resource(
                spec["group"], version["name"], names["plural"], names["kind"],
                namespaced=spec.get("scope") == "Namespaced",
                has_status="status" in version.get("subresources", {}), counts=True, schema=schema,
            )  # fmt: skip
        kind = self.resources[CRDS, "v1", "customresourcedefinitions"]
        conditions = [{"type": t, "status": "True"} for t in ("NamesAccepted", "Established")]
        status = {"conditions": conditions, "acceptedNames": names}
        self.update(kind, crd, crd | {"status": status}, status=True)

    def _undefine(self, crd: Object) -> None:
        spec = crd["spec"]
        for version in spec["versions"]:
            resource = self.resources[spec["group"], version["name"], spec["names"]["plural"]]
            for obj in list(self.of(resource).values()):
                self.remove_object(resource, obj)
        for version in spec["versions"]:
            del self.resources[spec["group"], version["name"], spec["names"]["plural"]]

    # -- apply

    def apply(
        self, resource: Resource, before: Object | None, obj: Object, manager: str, force: bool,
        status: bool = False,
    ) -> Object:  # fmt: skip
        """Server-side apply, simplified as the module says."""
        if not manager:
            raise Refused(400, "BadRequest", "fieldManager is required for apply patch")
        if before is None:
            made = self.create(resource, obj["metadata"].get("namespace", ""), obj)
            self.applied[made["metadata"]["uid"], manager] = obj
            return made
        uid = before["metadata"]["uid"]
        wanted = dict(leaves(obj))
        have = dict(leaves(before))
        for (of, other), theirs in list(self.applied.items()):
            is_other = of == uid and other != manager
            for path, value in list(leaves(theirs)) if is_other else ():
                if path[0] not in ("apiVersion", "kind") and path[:2] != ("metadata", "name"):
                    is_taken = path in wanted and wanted[path] != have.get(path) == value
                    if is_taken and not force:
                        message = f'Apply failed with 1 conflict: conflict with "{other}"'
                        raise Refused(409, "Conflict", message)
                    if is_taken:
                        drop(theirs, path)
        after = copy.deepcopy(before)
        for path, _ in leaves(self.applied.get((uid, manager), {})):
            if path not in wanted and path[:2] not in (("metadata", "name"), ("metadata", "uid")):
                drop(after, path)
        self.applied[uid, manager] = copy.deepcopy(obj)
        return self.update(resource, before, merge_patch(after, obj), status)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def rest(obj: Object) -> Object:
    return {key: value for key, value in obj.items() if key not in ("metadata", "status")}


def mutable(spec: Object) -> Object:
    """What of a pod's may not change."""
    kept = {k: v for k, v in spec.items() if k not in ("tolerations", "activeDeadlineSeconds")}
    kept.pop("nodeName", None)
    kept["containers"] = [{**c, "image": ""} for c in kept["containers"]]
    return kept


# ---- the server ---------------------------------------------------------------------------------


class FakeApi:
    """The server, in the loop of who enters it, or by `running()` in a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.state = State()
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.token = TOKEN
        self.port = 0
        self.kubeconfig = folder / "kubeconfig"
        self.duplicates = False
        self.bookmark_s = BOOKMARK_S
        self.state.changed = self._wake
        self._loop: asyncio.AbstractEventLoop | None = None
        self._runner: web.AppRunner | None = None

    def __repr__(self) -> str:
        return f"<FakeApi {self.port} at {self.state.revision}>"

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        await self.up()
        server = f"http://127.0.0.1:{self.port}"
        named = {"name": "fake"}
        self.kubeconfig.write_text(
            json.dumps(
                {
                    "apiVersion": "v1", "kind": "Config", "current-context": "fake",
                    "clusters": [named | {"cluster": {"server": server}}],
                    "users": [named | {"user": {"token": self.token}}],
                    "contexts": [named | {"context": {"cluster": "fake", "user": "fake"}}],
                }
            )
        )  # fmt: skip
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.down()

    async def up(self) -> None:
        """Listen, at the same port as before."""
        app = web.Application(client_max_size=8 << 20)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def down(self) -> None:
        """Cut every connection and listen no more; objects stay."""
        self.drop_streams()
        if self._runner:
            await self._runner.cleanup()
            self._runner = None

    # -- what tests do

    def set_status(
        self, name: str, status: Object, namespace: str = "default", **spec: Any
    ) -> None:
        """As a kubelet does; *spec* sets `nodeName`."""
        with self.state.lock:
            pods = self.state.resource("", "v1", "pods")
            pod = copy.deepcopy(before := self.state.get(pods, namespace, name))
            pod["status"] |= status
            pod["spec"] |= spec
            self.state._store(pods, "MODIFIED", before, pod)

    def run_pod(self, name: str, ip: str = "127.0.0.1", namespace: str = "default") -> None:
        """Scheduled, started and ready."""
        status = {
            "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "hostIP": "127.0.0.1",
            "conditions": [{"type": t, "status": "True"} for t in ("Initialized", "Ready")],
        }  # fmt: skip
        self.set_status(name, status, namespace, nodeName="fake")

    def remove(self, name: str, namespace: str = "default") -> None:
        """A pod that has ended is gone."""
        with self.state.lock:
            pods = self.state.resource("", "v1", "pods")
            if pod := self.state.of(pods).get((namespace, name)):
                self.state.remove_object(pods, pod)

    def attach(self, kubelet: Callable[[str, Object], None]) -> None:
        """*kubelet* hears of pods that are created, deleted (with a grace) and removed."""
        self.state.kubelet, self.state.has_kubelet = kubelet, True

    def compact(self) -> None:
        """Forget all history: watches and lists that go on from before are refused with 410."""
        with self.state.lock:
            self.state.revision += 1
            self.state.oldest = self.state.revision
            self.state.history.clear()
            self.state.pages.clear()

    def drop_streams(self) -> None:
        """Cut the connections of all watches."""
        self._streams(lambda stream: setattr(stream, "cut", True))

    def freeze_streams(self) -> None:
        """Those that there are never say anything again."""
        self._streams(lambda stream: setattr(stream, "frozen", True))

    def fail_streams(self, code: int = 410, reason: str = "Expired") -> None:
        """An ERROR in each, which ends it. With 410 history is forgotten too."""
        if code == 410:
            self.compact()
        ending = {"type": "ERROR", "object": Refused(code, reason, "as the test wants").body}
        self._streams(lambda stream: setattr(stream, "ending", ending))

    def send(self, what: str, obj: Object) -> None:
        """An event that never was, on every stream."""
        self._streams(lambda stream: stream.extra.append({"type": what, "object": obj}))

    def bookmark(self) -> None:
        """Now."""

        def add(stream: Stream) -> None:
            stream.extra.append(self._bookmark(stream.resource))

        self._streams(add)

    @property
    def streams(self) -> int:
        """Watches under way that are not frozen."""
        with self.state.lock:
            return sum(not s.frozen and not s.cut for s in self.state.streams)

    def _bookmark(self, resource: Resource) -> Object:
        metadata = {"resourceVersion": str(self.state.revision), "creationTimestamp": None}
        obj = {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata}
        return {"type": "BOOKMARK", "object": obj}

    def _streams(self, action: Callable[[Stream], None]) -> None:
        with self.state.lock:
            for stream in self.state.streams:
                action(stream)
        self._wake()

    def _wake(self) -> None:
        def wake() -> None:
            for stream in self.state.streams:
                stream.wake.set()

        if self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(wake)

    # -- requests

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        parts = [part for part in request.path.split("/") if part]
        if request.headers.get("authorization", "").lower() != f"bearer {self.token}":
            return self._refusal(Refused(401, "Unauthorized", "Unauthorized"))
        try:
            if (found := self._discovery(parts)) is not None:
                return web.json_response(found)
            resource, namespace, name, sub = self._target(parts)
            verb = (
                "watch" if request.query.get("watch") in ("true", "1") else request.method.lower()
            )
            self.requests.append((verb, resource.plural))
            fault = self._fault(verb, resource.plural)
            if fault:
                await asyncio.sleep(fault.slow_s)
                if fault.status:
                    return self._faulty(fault)
                if fault.cut:
                    return self._cut(request)
            if verb == "watch":
                return await self._watch(request, resource, namespace)
            body = await request.json() if request.can_read_body else {}
            with self.state.lock:
                code, answer = self._handle(request, resource, namespace, name, sub, body)
            if fault and fault.lost:
                return self._cut(request)
            return web.json_response(answer, status=code)
        except Refused as refused:
            return self._refusal(refused)
        except json.JSONDecodeError:
            return self._refusal(Refused(400, "BadRequest", "the body is no JSON"))

    def _fault(self, verb: str, plural: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.verb in ("", verb) and fault.plural in ("", plural):
                fault.times -= 1
                return fault
        return None

    def _faulty(self, fault: Fault) -> web.Response:
        reason = {429: "TooManyRequests", 410: "Expired"}.get(fault.status, "InternalError")
        headers = {} if fault.retry_after_s is None else {"Retry-After": str(fault.retry_after_s)}
        body = Refused(fault.status, reason, "as the test wants").body
        return web.json_response(body, status=fault.status, headers=headers)

    def _cut(self, request: web.Request) -> web.Response:
        if request.transport:
            request.transport.abort()
        return web.Response()

    def _refusal(self, refused: Refused) -> web.Response:
        return web.json_response(refused.body, status=refused.body["code"])

    def _target(self, parts: list[str]) -> tuple[Resource, str | None, str, str]:
        """Resource, namespace (None: all), name, subresource."""
        if parts[:1] == ["api"] and len(parts) > 2:
            group, version, path = "", parts[1], parts[2:]
        elif parts[:1] == ["apis"] and len(parts) > 3:
            group, version, path = parts[1], parts[2], parts[3:]
        else:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        namespace = None
        if path[0] == "namespaces" and len(path) > 2 and path[2] != "status":
            namespace, path = path[1], path[2:]
        resource = self.state.resource(group, version, path[0])
        if not resource.namespaced:
            namespace = ""
        return resource, namespace, *[*path[1:], "", ""][:2]  # type: ignore[return-value]

    def _discovery(self, parts: list[str]) -> Object | None:
        groups = sorted({(r.group, r.version) for r in self.state.resources.values() if r.group})
        match parts:
            case ["version"]:
                return {"major": "1", "minor": "20", "gitVersion": "v1.20.2-fake"}
            case ["api"]:
                return {"kind": "APIVersions", "versions": ["v1"]}
            case ["apis"]:
                found = []
                for group, version in groups:
                    one = {"groupVersion": f"{group}/{version}", "version": version}
                    found.append({"name": group, "versions": [one], "preferredVersion": one})
                return {"kind": "APIGroupList", "apiVersion": "v1", "groups": found}
            case ["api", "v1"]:
                return self._resources("", "v1")
            case ["apis", group, version] if (group, version) in groups:
                return self._resources(group, version)
        return None

    def _resources(self, group: str, version: str) -> Object:
        verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
        found = []
        for r in self.state.resources.values():
            if (r.group, r.version) == (group, version):
                one = {"singularName": r.kind.lower(), "namespaced": r.namespaced, "kind": r.kind}
                found.append({"name": r.plural, "verbs": verbs} | one)
        named = f"{group}/{version}" if group else version
        return {"kind": "APIResourceList", "groupVersion": named, "resources": found}

    def _handle(
        self, request: web.Request, resource: Resource, namespace: str | None, name: str, sub: str,
        body: Any,
    ) -> tuple[int, Object]:  # fmt: skip
        state, status = self.state, sub == "status"
        if sub and not (status and resource.has_status):
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        if request.method == "GET" and not name:
            return 200, self._list(request, resource, namespace)
        if request.method == "POST" and not name:
            return 201, state.create(resource, namespace or "", body)
        if request.method == "PATCH" and "apply" in request.content_type:
            query = request.query
            body["metadata"] = body.get("metadata", {}) | {"name": name}
            if namespace:
                body["metadata"]["namespace"] = namespace
            before = state.of(resource).get((namespace or "", name))
            force = query.get("force") == "true"
            made = state.apply(resource, before, body, query.get("fieldManager", ""), force, status)
            return 200 if before else 201, made
        obj = state.get(resource, namespace or "", name)
        match request.method:
            case "GET":
                return 200, obj
            case "PUT":
                if not body.get("metadata", {}).get("resourceVersion") and resource.schema:
                    raise invalid("metadata.resourceVersion: Invalid value: must be specified")
                return 200, state.update(resource, obj, body, status)
            case "PATCH":
                return 200, state.update(
                    resource, obj, self._patched(request, resource, obj, body), status
                )
            case "DELETE":
                return 200, state.delete(resource, obj, body)
        raise Refused(405, "MethodNotAllowed", "the server does not allow this method")

    def _patched(self, request: web.Request, resource: Resource, obj: Object, body: Any) -> Object:
        unversioned = copy.deepcopy(obj)
        match request.content_type:
            case "application/merge-patch+json":
                return merge_patch(unversioned, body)  # type: ignore[no-any-return]
            case "application/json-patch+json":
                return json_patch(unversioned, body)  # type: ignore[no-any-return]
            case "application/strategic-merge-patch+json" if not resource.schema:
                return strategic_patch(unversioned, body)  # type: ignore[no-any-return]
        raise Refused(
            415, "UnsupportedMediaType", "the body of the request was in an unknown format"
        )

    def _chosen(self, request: web.Request, resource: Resource) -> Callable[[Object], bool]:
        labels = label_selector(request.query.get("labelSelector", ""))
        fields = field_selector(resource, request.query.get("fieldSelector", ""))
        return lambda obj: labels(obj) and fields(obj)

    def _list(self, request: web.Request, resource: Resource, namespace: str | None) -> Object:
        """All, or a page of what there was when the first was asked for."""
        state, token = self.state, request.query.get("continue", "")
        limit = int(request.query.get("limit", "0"))
        if token:
            if token not in state.pages:
                raise expired("The provided continue parameter is too old")
            revision, found = state.pages[token]
        else:
            revision = state.revision
            found = state.select(resource, namespace, self._chosen(request, resource))
        metadata: Object = {"resourceVersion": str(revision)}
        if limit and len(found) > limit:
            metadata["continue"] = secrets.token_urlsafe(8)
            metadata["remainingItemCount"] = len(found) - limit
            state.pages[metadata["continue"]] = (revision, found[limit:])
            found = found[:limit]
        bare = [{k: v for k, v in o.items() if k not in ("kind", "apiVersion")} for o in found]
        items = found if resource.schema else bare
        named = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version}
        return named | {"metadata": metadata, "items": items}

    # -- watches

    async def _watch(
        self, request: web.Request, resource: Resource, namespace: str | None
    ) -> web.StreamResponse:
        chosen, since = self._chosen(request, resource), request.query.get("resourceVersion", "")
        stream = Stream(resource, asyncio.Event())
        first: list[Object] = []
        with self.state.lock:
            at_ = int(since or 0) or self.state.revision
            if int(since or 0) and at_ < self.state.oldest:
                raise expired()
            if not int(since or 0):
                first = self.state.select(resource, namespace, chosen)
            self.state.streams.append(stream)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        try:
            await response.prepare(request)
            for obj in first:
                await self._send(response, {"type": "ADDED", "object": obj})
            await self._stream(request, response, stream, namespace, chosen, at_)
        except ConnectionError:
            pass
        finally:
            with self.state.lock:
                self.state.streams.remove(stream)
        return response

    async def _stream(
        self, request: web.Request, response: web.StreamResponse, stream: Stream,
        namespace: str | None, chosen: Callable[[Object], bool], at_: int,
    ) -> None:  # fmt: skip
        loop = asyncio.get_running_loop()
        until = loop.time() + float(request.query.get("timeoutSeconds") or 1800)
        marks = request.query.get("allowWatchBookmarks") == "true"
        mark_at = min(loop.time() + self.bookmark_s, until - 2.0)
        while not stream.cut:
            stream.wake.clear()
            with self.state.lock:
                events = self._events(stream.resource, namespace, chosen, at_)
                at_, extra = self.state.revision, stream.extra[:]
                stream.extra.clear()
                if marks and loop.time() >= mark_at:
                    extra.append(self._bookmark(stream.resource))
                    mark_at = min(loop.time() + self.bookmark_s, max(until - 2.0, loop.time() + 1))
            if not stream.frozen:
                for event in [*events, *extra, *([stream.ending] if stream.ending else [])]:
                    await self._send(response, event)
                if stream.ending or loop.time() >= until:
                    return
            due = min(until, mark_at) if marks else until
            wait_s = None if stream.frozen else max(0.0, due - loop.time())
            try:
                async with asyncio.timeout(wait_s):
                    await stream.wake.wait()
            except TimeoutError:
                continue
        if request.transport:
            request.transport.abort()

    def _events(
        self, resource: Resource, namespace: str | None, chosen: Callable[[Object], bool], at_: int
    ) -> list[Object]:
        """Since *at_*, as one sees them who watches what is chosen."""
        found = []
        for event in reversed(self.state.history):
            if event.revision <= at_:
                break
            obj = event.after
            if (obj["kind"], obj["apiVersion"]) != (resource.kind, resource.api_version):
                continue
            if namespace is not None and obj["metadata"].get("namespace", "") != namespace:
                continue
            was = event.before is not None and chosen(event.before)
            is_ = event.what != "DELETED" and chosen(obj)
            if was or is_:
                what = ("MODIFIED" if was else "ADDED") if is_ else "DELETED"
                if what == "DELETED" and event.what != "DELETED" and event.before:
                    version = obj["metadata"]["resourceVersion"]
                    obj = event.before | {
                        "metadata": event.before["metadata"] | {"resourceVersion": version}
                    }
                found += [{"type": what, "object": obj}] * (1 + self.duplicates)
        return found[::-1]

    async def _send(self, response: web.StreamResponse, event: Object) -> None:
        await response.write(json.dumps(event).encode() + b"\n")


@contextmanager
def running(folder: Path) -> Iterator[FakeApi]:
    """In a thread of its own, for tests that have no loop."""
    fake, ready, over = FakeApi(folder), threading.Event(), threading.Event()

    async def serve() -> None:
        async with fake:
            ready.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="fake-api")
    thread.start()
    try:
        assert ready.wait(10)
        yield fake
    finally:
        over.set()
        thread.join(10)
