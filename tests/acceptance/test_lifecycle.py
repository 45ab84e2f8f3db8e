"""A function from its first version to its last sandbox."""

import threading

from tests.harness import Reply, Server, eventually, eventually_none, together


def version(number: int) -> dict[str, str]:
    return {"main.py": f"def handler(event, context):\n    return {number}\n"}


def test_after_an_update_no_response_comes_from_the_old_version(anywhere: Server):
    """Under load: once PUT has returned, a request that starts then sees the new code only."""
    name = anywhere.deploy("updated", files=version(0))
    current, stale, failed = 0, [], []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            least = current
            reply = anywhere.invoke(name)
            if reply.status != 200:
                failed.append(reply)
            elif reply.json() < least:
                stale.append((least, reply.json()))

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    for number in range(1, 9):
        anywhere.deploy("updated", files=version(number))
        current = number
    over.set()
    for asker in askers:
        asker.join()

    assert not stale
    assert not failed
    assert anywhere.invoke(name).json() == 8


def test_a_change_of_env_alone_is_a_new_version(server: Server):
    """What a function sees is all of its declaration; the same declaration again is no change."""
    name = server.deploy("instance", env={"VERSION": "1"})
    first = server.invoke(name).json()
    server.deploy("instance", env={"VERSION": "1"})
    same = server.invoke(name).json()
    server.deploy("instance", env={"VERSION": "2"})
    other = server.invoke(name).json()

    assert (same["instance"], same["calls"]) == (first["instance"], 2)
    assert (other["version"], other["calls"]) == ("2", 1)
    assert server.describe(name)["status"]["version"] == 2


def test_an_invocation_that_runs_during_an_update_ends_well(server: Server):
    """The old sandbox finishes what it has begun, then it is gone."""
    name = server.deploy("wait", "replaced")
    replies: list[Reply] = []
    running = threading.Thread(target=lambda: replies.append(server.invoke(name, {"seconds": 0.7})))
    running.start()
    eventually(lambda: server.describe(name)["status"]["busy"])
    server.deploy("replaced", files=version(2))
    fresh = server.invoke(name)
    running.join()

    assert [reply.status for reply in replies] == [200]
    assert fresh.json() == 2
    assert len(eventually(lambda: len(server.sandboxes(name)) == 1 and server.sandboxes(name))) == 1


def test_a_deleted_function_is_gone_at_once(anywhere: Server):
    """404 on both planes, its sandboxes destroyed, its second deletion 404."""
    name = anywhere.deploy("hello", "short-lived")
    anywhere.call(name)

    assert anywhere.delete(name).status == 204
    assert anywhere.call(name).status == 404
    assert anywhere.delete(name).status == 404
    assert not eventually_none(lambda: anywhere.sandboxes(name))


def test_an_idle_function_goes_to_zero_and_comes_back(anywhere: Server):
    """After keepAliveSeconds no sandbox of it is left; the next call starts anew."""
    name = anywhere.deploy("instance", "sleeper", keepAliveSeconds=0.2)
    first = anywhere.call(name).json()["instance"]

    assert not eventually_none(lambda: anywhere.sandboxes(name))
    again = anywhere.call(name)
    assert again.status == 200
    assert again.json()["instance"] != first
    assert again.headers["Dayfly-Start"] != "warm"


def test_min_scale_keeps_sandboxes_loaded_before_the_first_call(server: Server):
    """The first call is a warm one, and idleness does not end them."""
    name = server.deploy("instance", "kept", minScale=2, keepAliveSeconds=0.1)
    eventually(lambda: [b["phase"] for b in server.sandboxes(name)] == ["idle", "idle"])

    assert server.call(name).headers["Dayfly-Start"] == "warm"
    assert len(server.sandboxes(name)) == 2
    server.delete(name)


def test_a_killed_sandbox_of_min_scale_is_replaced(server: Server):
    """The minimum holds whatever happens."""
    code = "import os\ndef handler(event, context):\n    os._exit(1)\n"
    name = server.deploy("phoenix", files={"main.py": code}, minScale=1)
    before = eventually(lambda: [b["id"] for b in server.sandboxes(name) if b["phase"] == "idle"])
    assert server.call(name).status == 502

    after = eventually(
        lambda: [
            b["id"]
            for b in server.sandboxes(name)
            if b["phase"] == "idle" and b["id"] not in before
        ]
    )

    assert after
    server.delete(name)


def test_max_scale_bounds_the_sandboxes_of_a_function(server: Server):
    """Eight calls at once in at most two sandboxes; all are answered."""
    name = server.deploy("wait", "bounded", maxScale=2)

    replies = together(8, lambda _: server.invoke(name, {"seconds": 0.05}))

    assert {reply.status for reply in replies} == {200}
    assert len(server.sandboxes(name)) <= 2


def test_a_full_queue_is_429_with_retry_after(anywhere: Server):
    """One runs, one waits, the others are told to come back; none of them is lost in silence."""
    name = anywhere.deploy("wait", "crowded", maxScale=1, queueMax=1)
    anywhere.invoke(name, {"seconds": 0})

    replies = together(6, lambda _: anywhere.invoke(name, {"seconds": 0.6}))
    refused = [reply for reply in replies if reply.status == 429]

    assert sorted({reply.status for reply in replies}) == [200, 429]
    assert len(refused) == 4
    assert all(reply.headers["Retry-After"] == "1" for reply in refused)
    assert refused[0].headers["Content-Type"] == "application/problem+json"


def test_two_hundred_functions_called_at_once_all_answer_as_themselves(new_server):
    """Each one's first call, at the same moment: nobody gets another's answer."""
    server = new_server("--generic-min", "4", "--sandboxes-max", "64")
    name = server.deploy("instance", "one-0", env={"VERSION": "0"}, keepAliveSeconds=1)
    spec = server.describe(name)["spec"]
    number = 200
    for i in range(1, number):
        one = spec | {"env": {"VERSION": str(i)}}
        assert server.ask("PUT", f"/namespaces/default/functions/one-{i}", one).status == 200

    replies = together(number, lambda i: server.call(f"one-{i}"))
    answers = [reply.json() for reply in replies]

    assert [(answer["version"], answer["calls"]) for answer in answers] == [
        (str(i), 1) for i in range(number)
    ]
    assert len({answer["instance"] for answer in answers}) == number
    assert server.metric("dayfly_sandboxes_created_total") >= number
