"""What we rely on of an API server: held by the fake always, by a real one when it is named."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from dayfly_pool.cluster.api import (
    CONFIG_MAP,
    CRD,
    LEASE,
    POD,
    SECRET,
    Api,
    ApiError,
    Conflict,
    Exists,
    Expired,
    Kind,
    NotFound,
)
from dayfly_pool.errors import BadInput

Object = dict[str, Any]


def config(name: str, **more: Any) -> Object:
    return {"metadata": {"name": name, **more}, "data": {"colour": "red"}}


def pod(name: str, **more: Any) -> Object:
    container = {"name": "c", "image": "none/such:1", "imagePullPolicy": "Never"}
    spec = {"containers": [container], "nodeSelector": {"no": "node"}}
    return {"metadata": {"name": name, **more}, "spec": spec}


async def names(api: Api, kind: Kind = CONFIG_MAP, **selectors: str) -> list[str]:
    page = await api.page(kind, **selectors)
    return [i["metadata"]["name"] for i in page["items"] if not _is_its_own(i)]


def _is_its_own(obj: Object) -> bool:
    """Real clusters put a certificate and a token into every namespace."""
    name = obj["metadata"]["name"]
    return name == "kube-root-ca.crt" or name.startswith("default-token")


async def seen(
    api: Api, since: str, number: int, kind: Kind = CONFIG_MAP, **more: str
) -> list[Any]:
    """The next *number* events, without bookmarks and what a real cluster adds."""
    found: list[Any] = []
    async with asyncio.timeout(10):
        async with aclosing(api.watch(kind, since=since, timeout_s=10, **more)) as events:
            async for what, obj in events:
                if what != "BOOKMARK" and not _is_its_own(obj):
                    found.append((what, obj))
                if len(found) == number:
                    break
    return found


# ---- objects ------------------------------------------------------------------------------------


async def test_what_is_created_has_an_identity_and_a_version(server: Api):
    made = await server.create(CONFIG_MAP, config("a"))

    assert made["metadata"]["uid"]
    assert int(made["metadata"]["resourceVersion"]) > 0
    assert made["metadata"]["creationTimestamp"].endswith("Z")
    assert made["metadata"]["namespace"] == server.namespace
    assert (made["apiVersion"], made["kind"]) == ("v1", "ConfigMap")
    found = await server.get(CONFIG_MAP, "a")
    made["metadata"].pop("managedFields", None)
    found["metadata"].pop("managedFields", None)
    assert found == made


async def test_a_name_is_taken_once_a_kind_and_namespace(server: Api):
    await server.create(CONFIG_MAP, config("a"))
    await server.create(SECRET, {"metadata": {"name": "a"}})

    with pytest.raises(Exists):
        await server.create(CONFIG_MAP, config("a"))


async def test_a_name_can_be_left_to_the_server(server: Api):
    one = await server.create(CONFIG_MAP, {"metadata": {"generateName": "g-"}})
    other = await server.create(CONFIG_MAP, {"metadata": {"generateName": "g-"}})

    assert one["metadata"]["name"].startswith("g-")
    assert one["metadata"]["name"] != other["metadata"]["name"]


async def test_what_is_not_there_is_not_found(server: Api):
    with pytest.raises(NotFound):
        await server.get(CONFIG_MAP, "a")
    with pytest.raises(NotFound):
        await server.merge(CONFIG_MAP, "a", {"data": {}})
    with pytest.raises(NotFound):
        await server.create(CONFIG_MAP, config("a"), namespace="there-is-no-such")


async def test_deleting_what_is_gone_already_is_well(server: Api):
    await server.create(CONFIG_MAP, config("a"))

    await server.delete(CONFIG_MAP, "a")
    await server.delete(CONFIG_MAP, "a")
    assert await names(server) == []


async def test_deleting_an_earlier_object_of_that_name_spares_the_present_one(server: Api):
    earlier = await server.create(CONFIG_MAP, config("a"))
    await server.delete(CONFIG_MAP, "a")
    await server.create(CONFIG_MAP, config("a"))

    await server.delete(CONFIG_MAP, "a", uid=earlier["metadata"]["uid"])

    assert await names(server) == ["a"]


@pytest.mark.parametrize("name", ["", ".", ".."])
async def test_a_name_never_means_another_path(server: Api, name: str):
    """An empty one would delete them all."""
    with pytest.raises(BadInput):
        await server.delete(CONFIG_MAP, name)


@pytest.mark.parametrize("name", ["A", "a_b", "-a", "a" * 254, "a/../b"])
async def test_a_name_that_is_none_is_refused(server: Api, name: str):
    with pytest.raises(ApiError) as refused:
        await server.create(CONFIG_MAP, config(name))

    assert refused.value.status == 422


async def test_a_pod_without_containers_is_refused(server: Api):
    with pytest.raises(ApiError) as refused:
        await server.create(POD, {"metadata": {"name": "a"}, "spec": {"containers": []}})

    assert (refused.value.status, refused.value.reason) == (422, "Invalid")


async def test_a_pod_waits_until_somebody_runs_it(server: Api):
    made = await server.create(POD, pod("a"))

    assert made["status"]["phase"] == "Pending"
    assert made["spec"]["restartPolicy"] == "Always"
    await server.delete(POD, "a", grace_s=0)
    with pytest.raises(NotFound):
        await server.get(POD, "a")


async def test_of_a_pod_only_little_may_change(server: Api):
    await server.create(POD, pod("a"))

    with pytest.raises(ApiError) as refused:
        await server.merge(POD, "a", {"spec": {"restartPolicy": "Never"}})
    labelled = await server.merge(POD, "a", {"metadata": {"labels": {"x": "y"}}})

    assert refused.value.status == 422
    assert labelled["metadata"]["labels"] == {"x": "y"}


# ---- patches ------------------------------------------------------------------------------------


async def test_a_merge_patch_changes_what_it_names(server: Api):
    made = await server.create(CONFIG_MAP, config("a", labels={"x": "y"}))

    patched = await server.merge(CONFIG_MAP, "a", {"data": {"colour": None, "size": "1"}})

    assert patched["data"] == {"size": "1"}
    assert patched["metadata"]["labels"] == {"x": "y"}
    assert patched["metadata"]["uid"] == made["metadata"]["uid"]
    assert patched["metadata"]["resourceVersion"] != made["metadata"]["resourceVersion"]


async def test_a_patch_that_changes_nothing_makes_no_new_version(server: Api):
    made = await server.create(CONFIG_MAP, config("a"))

    patched = await server.merge(CONFIG_MAP, "a", {"data": {"colour": "red"}})

    assert patched["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]


async def test_a_patch_of_an_earlier_version_is_a_conflict(server: Api):
    made = await server.create(CONFIG_MAP, config("a"))
    version = {"resourceVersion": made["metadata"]["resourceVersion"]}
    await server.merge(CONFIG_MAP, "a", {"metadata": version, "data": {"colour": "blue"}})

    with pytest.raises(Conflict):
        await server.merge(CONFIG_MAP, "a", {"metadata": version, "data": {"colour": "green"}})
    assert (await server.get(CONFIG_MAP, "a"))["data"] == {"colour": "blue"}


async def test_apply_makes_and_changes_and_takes_back_what_it_named(server: Api):
    await server.apply(CONFIG_MAP, config("a") | {"data": {"mine": "1", "old": "1"}})
    await server.merge(CONFIG_MAP, "a", {"data": {"theirs": "1"}})

    applied = await server.apply(CONFIG_MAP, config("a") | {"data": {"mine": "2"}})

    assert applied["data"] == {"mine": "2", "theirs": "1"}


async def test_apply_takes_from_another_manager_only_by_force(server: Api):
    await server.apply(CONFIG_MAP, config("a"), manager="one")
    other = config("a") | {"data": {"colour": "blue"}}

    with pytest.raises(Conflict):
        await server.apply(CONFIG_MAP, other, manager="two", force=False)
    applied = await server.apply(CONFIG_MAP, other, manager="two")

    assert applied["data"] == {"colour": "blue"}


async def test_a_lease_is_kept_as_it_was_written(server: Api):
    spec = {
        "holderIdentity": "me",
        "leaseDurationSeconds": 10,
        "leaseTransitions": 1,
        "renewTime": "2026-01-02T03:04:05.000006Z",
    }
    made = await server.create(LEASE, {"metadata": {"name": "a"}, "spec": spec})

    assert made["spec"] == spec


# ---- finalizers and owners ----------------------------------------------------------------------


async def test_what_has_a_finalizer_is_there_until_it_has_none(server: Api):
    await server.create(CONFIG_MAP, config("a", finalizers=["dayfly.dev/test"]))

    await server.delete(CONFIG_MAP, "a")
    waiting = await server.get(CONFIG_MAP, "a")
    await server.merge(CONFIG_MAP, "a", {"metadata": {"finalizers": None}})

    assert waiting["metadata"]["deletionTimestamp"]
    assert await names(server) == []


async def test_what_an_owner_leaves_is_deleted(server: Api):
    owner = await server.create(CONFIG_MAP, config("owner"))
    reference = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "name": "owner",
        "uid": owner["metadata"]["uid"],
    }
    await server.create(CONFIG_MAP, config("owned", ownerReferences=[reference]))
    since = (await server.page(CONFIG_MAP))["metadata"]["resourceVersion"]

    await server.delete(CONFIG_MAP, "owner")
    gone = await seen(server, since, 2)

    assert [(what, obj["metadata"]["name"]) for what, obj in gone] == [
        ("DELETED", "owner"),
        ("DELETED", "owned"),
    ]


# ---- lists --------------------------------------------------------------------------------------


async def test_labels_select_objects(server: Api):
    await server.create(CONFIG_MAP, config("a", labels={"x": "1"}))
    await server.create(CONFIG_MAP, config("b", labels={"x": "2", "y": ""}))

    assert await names(server, labels="x=1") == ["a"]
    assert await names(server, labels="x") == ["a", "b"]
    assert await names(server, labels="x!=1,x") == ["b"]
    assert await names(server, labels="x in (1, 2),!y") == ["a"]
    assert await names(server, labels="x notin (1),y") == ["b"]


async def test_fields_select_or_are_refused(server: Api):
    await server.create(CONFIG_MAP, config("a"))
    await server.create(CONFIG_MAP, config("b"))
    await server.create(POD, pod("p"))

    assert await names(server, fields="metadata.name=b") == ["b"]
    assert await names(server, POD, fields="status.phase=Pending") == ["p"]
    assert await names(server, POD, fields="status.phase!=Pending") == []
    with pytest.raises(ApiError) as refused:
        await server.page(CONFIG_MAP, fields="data.colour=red")
    assert refused.value.status == 400


async def test_pages_are_of_one_moment(server: Api):
    for name in ("a", "b", "c"):
        await server.create(SECRET, {"metadata": {"name": name, "labels": {"t": "1"}}})

    first = await server.page(SECRET, labels="t=1", limit=2)
    await server.create(SECRET, {"metadata": {"name": "d", "labels": {"t": "1"}}})
    second = await server.page(SECRET, labels="t=1", limit=2, after=first["metadata"]["continue"])

    assert [i["metadata"]["name"] for i in first["items"] + second["items"]] == ["a", "b", "c"]
    assert first["metadata"]["resourceVersion"] == second["metadata"]["resourceVersion"]
    assert not second["metadata"].get("continue")
    assert first["items"][0]["kind"] == "Secret"


# ---- watches ------------------------------------------------------------------------------------


async def test_a_watch_goes_on_from_a_list(server: Api):
    await server.create(CONFIG_MAP, config("before"))
    since = (await server.page(CONFIG_MAP))["metadata"]["resourceVersion"]
    made = await server.create(CONFIG_MAP, config("a"))
    changed = await server.merge(CONFIG_MAP, "a", {"data": {"colour": "blue"}})
    await server.delete(CONFIG_MAP, "a")

    found = await seen(server, since, 3)

    assert [what for what, _ in found] == ["ADDED", "MODIFIED", "DELETED"]
    versions = [obj["metadata"]["resourceVersion"] for _, obj in found]
    assert versions[:2] == [x["metadata"]["resourceVersion"] for x in (made, changed)]
    assert versions == sorted(versions, key=int)
    assert len(set(versions)) == 3
    assert found[2][1]["data"] == {"colour": "blue"}


async def test_a_watch_shows_only_what_is_selected(server: Api):
    """What is no more selected is deleted, for who watches."""
    since = (await server.page(CONFIG_MAP))["metadata"]["resourceVersion"]
    await server.create(CONFIG_MAP, config("other"))
    await server.create(CONFIG_MAP, config("a"))
    await server.merge(CONFIG_MAP, "a", {"metadata": {"labels": {"x": "1"}}})
    await server.merge(CONFIG_MAP, "a", {"metadata": {"labels": {"x": "2"}}})

    found = await seen(server, since, 2, labels="x=1")

    assert [(what, obj["metadata"]["name"]) for what, obj in found] == [
        ("ADDED", "a"),
        ("DELETED", "a"),
    ]


async def test_the_server_ends_a_watch_at_its_time(server: Api):
    """With bookmarks on the way, or without: 1.20 sends none on a short watch."""
    since = (await server.page(LEASE))["metadata"]["resourceVersion"]
    await server.create(CONFIG_MAP, config("later"))

    async with asyncio.timeout(10):
        events = [event async for event in server.watch(LEASE, since=since, timeout_s=1)]

    agreed = {"kind": "Lease", "metadata": {"resourceVersion": since}}
    assert events[0] == ("BOOKMARK", agreed)
    assert {what for what, _ in events} == {"BOOKMARK"}
    assert int(events[-1][1]["metadata"]["resourceVersion"]) >= int(since)


async def test_a_watch_from_the_distant_past_is_expired(server: Api):
    await server.create(CONFIG_MAP, config("a"))

    with pytest.raises(Expired):
        await seen(server, "1", 1)


# ---- custom resources ---------------------------------------------------------------------------


SPEC = {
    "type": "object",
    "required": ["handler"],
    "properties": {
        "handler": {"type": "string", "minLength": 1},
        "scale": {"type": "integer", "minimum": 0, "default": 1},
        "port": {"x-kubernetes-int-or-string": True},
        "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
    },
}


def definition(group: str, spec: Object = SPEC) -> Object:
    status = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    schema = {"type": "object", "properties": {"spec": spec, "status": status}}
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
        "subresources": {"status": {}},
    }
    return {
        "metadata": {"name": f"things.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"plural": "things", "singular": "thing", "kind": "Thing"},
            "versions": [version],
        },
    }


@pytest.fixture
async def thing(server: Api) -> AsyncIterator[Kind]:
    """A kind of our own, served."""
    group = f"t{os.urandom(4).hex()}.dayfly.dev"
    await server.create(CRD, definition(group))
    kind = Kind(group, "v1", "things", "Thing")
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(NotFound):
                await server.create(kind, {"metadata": {"name": "x"}, "spec": {"handler": "x"}})
                break
            await asyncio.sleep(0.1)
    await server.delete(kind, "x")
    yield kind
    await server.delete(CRD, f"things.{group}")


async def test_a_schema_is_enforced_pruned_and_its_defaults_set(server: Api, thing: Kind):
    spec = {"handler": "h", "unknown": 1, "port": "http", "free": {"any": 1}}
    made = await server.create(thing, {"metadata": {"name": "a"}, "spec": spec})

    assert made["spec"] == {"handler": "h", "port": "http", "free": {"any": 1}, "scale": 1}
    for wrong in ({"handler": ""}, {"handler": "h", "scale": -1}, {}):
        with pytest.raises(ApiError) as refused:
            await server.create(thing, {"metadata": {"name": "b"}, "spec": wrong})
        assert refused.value.status == 422


async def test_the_status_and_the_rest_are_written_apart(server: Api, thing: Kind):
    obj = {"metadata": {"name": "a"}, "spec": {"handler": "h"}, "status": {"ready": 9}}
    made = await server.create(thing, obj)
    told = await server.merge(
        thing, "a", {"status": {"ready": 1}, "spec": {"scale": 5}}, status=True
    )
    changed = await server.merge(thing, "a", {"status": {"ready": 2}, "spec": {"scale": 3}})

    assert "status" not in made
    assert (told["status"], told["spec"]["scale"]) == ({"ready": 1}, 1)
    assert (changed["status"], changed["spec"]["scale"]) == ({"ready": 1}, 3)
    generations = [x["metadata"]["generation"] for x in (made, told, changed)]
    assert generations == [1, 1, 2]


async def test_a_schema_without_a_type_is_refused(server: Api):
    spec = {"type": "object", "properties": {"handler": {"minLength": 1}}}

    with pytest.raises(ApiError) as refused:
        await server.create(CRD, definition("untyped.dayfly.dev", spec))
    assert refused.value.status == 422


async def test_custom_objects_are_watched_as_others_are(server: Api, thing: Kind):
    since = (await server.page(thing))["metadata"]["resourceVersion"]
    await server.create(thing, {"metadata": {"name": "a"}, "spec": {"handler": "h"}})
    await server.apply(thing, {"metadata": {"name": "a"}, "spec": {"handler": "i"}})

    found = await seen(server, since, 2, thing)

    assert [(what, obj["spec"]["handler"]) for what, obj in found] == [
        ("ADDED", "h"),
        ("MODIFIED", "i"),
    ]
    assert found[0][1]["kind"] == "Thing"
