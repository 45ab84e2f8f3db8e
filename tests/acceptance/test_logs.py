"""What functions write: each line with the invocation that wrote it."""

import http.client
import json

from tests.harness import Server, eventually


def test_every_way_of_writing_ends_in_the_log_with_its_invocation(anywhere: Server):
    """print, stderr, logging, a thread, a child process and bare descriptors alike."""
    name = anywhere.deploy("talkative")
    reply = anywhere.invoke(name, "x")
    id_ = reply.headers["Dayfly-Invocation"]

    def lines() -> set[tuple[str, str]]:
        found = anywhere.logs(name)
        return {(line["stream"], line["text"]) for line in found if line["invocation"] == id_}

    wanted = {
        ("stdout", "by print x"),
        ("stderr", "by stderr"),
        ("stderr", "by logging"),
        ("stdout", "by a child"),
        ("stdout", "by descriptor 1"),
        ("stderr", "by descriptor 2"),
        ("stdout", "without a newline"),
    }
    eventually(lambda: wanted <= lines())

    assert wanted <= lines()
    assert "by a thread" in {line["text"] for line in anywhere.logs(name)}


def test_a_chatty_function_is_not_a_broken_one(anywhere: Server):
    """20,000 short lines in one invocation: the rate may drop some, the sandbox lives on."""
    code = "def handler(event, context):\n    for i in range(20000):\n        print(i)\n"
    name = anywhere.deploy("chatty", files={"main.py": code})

    replies = [anywhere.invoke(name, i) for i in range(2)]

    assert [reply.status for reply in replies] == [200, 200]
    assert replies[1].headers["Dayfly-Start"] == "warm"
    assert "19999" in {line["text"] for line in anywhere.logs(name)}


def test_lines_of_overlapping_invocations_keep_their_owners(anywhere: Server):
    """Ten at once in one process, and each line still says whose it is."""
    from tests.harness import together

    name = anywhere.deploy("overlap", "overlap-logs", concurrency=10, maxScale=1)
    replies = together(10, lambda _: anywhere.call(name))
    expected = {(f"passed {r.json()['place']}", r.json()["id"]) for r in replies}

    def lines() -> set[tuple[str, str]]:
        return {(line["text"], line["invocation"]) for line in anywhere.logs(name)}

    eventually(lambda: expected <= lines())

    assert expected <= lines()


def test_a_follower_sees_new_lines_as_they_come(server: Server):
    """Server-sent events, until the client goes away."""
    name = server.deploy("talkative", "followed")
    host, _, port = server.admin.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    connection.request("GET", f"/namespaces/default/functions/{name}/logs?tail=0&follow")
    stream = connection.getresponse()

    server.invoke(name, "live")
    seen = []
    while not seen or seen[-1]["text"] != "by print live":
        line = stream.readline()
        if line.startswith(b"data: "):
            seen.append(json.loads(line[6:]))
    connection.close()

    assert stream.headers["Content-Type"].startswith("text/event-stream")
    assert seen[-1]["function"] == f"default/{name}"


def test_followers_that_have_gone_are_not_counted(server: Server):
    """A hundred may follow one function; those that hung up while it was silent take no place."""
    name = server.deploy("talkative", "popular")
    path = f"/namespaces/default/functions/{name}/logs?tail=0&follow"
    host, _, port = server.admin.rpartition(":")
    for _ in range(100):
        gone = http.client.HTTPConnection(host, int(port), timeout=20)
        gone.request("GET", path)
        gone.getresponse().close()
        gone.close()

    def is_followed() -> bool:
        late = http.client.HTTPConnection(host, int(port), timeout=20)
        late.request("GET", path)
        stream = late.getresponse()
        server.invoke(name, "heard")
        heard = stream.readline()
        stream.close()
        late.close()
        return heard.startswith(b"data: ")

    assert eventually(is_followed)


def test_a_failure_is_explained_in_the_log(server: Server):
    """The user's traceback from the first frame of their own, said by the platform."""
    code = "def handler(event, context):\n    return 1 / 0\n"
    name = server.deploy("divides", files={"main.py": code})
    server.call(name)

    text = "\n".join(line["text"] for line in server.logs(name) if line["stream"] == "platform")

    assert "Raised: ZeroDivisionError: division by zero" in text
    assert "return 1 / 0" in text
    assert "invoker.py" not in text


def test_a_function_without_network_is_told_why_it_cannot_connect(server: Server):
    """The hint names the setting that would change it."""
    code = "import urllib.request\ndef handler(event, context):\n    urllib.request.urlopen('http://example.org')\n"
    name = server.deploy("lonely", files={"main.py": code})

    assert server.call(name).status == 502
    assert any("network: none" in line["text"] for line in server.logs(name))
