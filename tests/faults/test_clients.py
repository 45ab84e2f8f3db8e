"""Clients that mean harm, or are only slow: they lose their own connection, nobody else notices."""

import contextlib
import os
import resource
import select
import socket
import time

import pytest
from tests.harness import Server, eventually, status, together

MIB = 1 << 20


@pytest.fixture(scope="module")
def name(server: Server) -> str:
    return server.deploy("echo", "target")


def answer(connection: socket.socket, within_s: float = 15) -> bytes:
    """All that comes until the other end closes; it must close in time."""
    connection.settimeout(within_s)
    got = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(65536):
            got += data
    return got


def first_line(server: Server, request: bytes) -> bytes:
    """The status line of the answer to *request*, after which the server closes."""
    with server.connection() as connection:
        connection.sendall(request)
        return answer(connection).partition(b"\r\n")[0]


def resident_bytes(server: Server) -> int:
    return int(status(server.pid)["VmRSS"].split()[0]) * 1024


def test_a_body_over_the_limit_is_refused_before_it_is_sent(server: Server, name: str):
    """413 on the header alone; the client may keep its 10 MiB."""
    head = f"POST /fn/{name} HTTP/1.1\r\nHost: x\r\nContent-Length: {10 * MIB}\r\n\r\n".encode()

    assert first_line(server, head) == b"HTTP/1.1 413 Request Entity Too Large"


def test_ten_bodies_over_the_limit_take_no_memory(server: Server, name: str):
    """10 MiB each, sent in earnest: refused, and the server does not grow by as much as one."""
    before = resident_bytes(server)

    replies = together(10, lambda _: refused(server, name, 10 * MIB))

    assert set(replies) == {413}
    assert resident_bytes(server) - before < 10 * MIB


def refused(server: Server, name: str, size: int) -> int:
    """The status of the answer to a body of *size* bytes, which the server need not read."""
    with server.connection() as connection:
        head = f"POST /fn/{name} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n"
        connection.sendall(head.encode())
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"x" * size)
        return int(answer(connection).split(b" ", 2)[1])


def test_a_body_without_end_is_cut_off_at_the_limit(server: Server, name: str):
    """Chunked, no length told: 413 after 6 MiB, and the connection is closed."""
    before, sent, end = resident_bytes(server), 0, time.monotonic() + 10
    chunk = b"%x\r\n" % 65536 + b"x" * 65536 + b"\r\n"
    with server.connection() as connection:
        connection.sendall(
            f"POST /fn/{name} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        connection.settimeout(20)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < end:
                connection.sendall(chunk)
                sent += 65536
        got = answer(connection)
        cut_off = time.monotonic() < end

    assert cut_off
    assert sent > 6 * MIB
    assert not got or got.startswith(b"HTTP/1.1 413")
    assert resident_bytes(server) - before < 32 * MIB


def test_the_largest_body_allowed_is_served(server: Server, name: str):
    """The limit itself is not over the limit; it comes back in the event."""
    code = "def handler(event, context):\n    return len(event['body'])\n"
    sized = server.deploy("sized", files={"main.py": code})
    headers = {"Content-Type": "text/plain"}

    assert server.call(sized, b"x" * (6 * MIB), headers=headers).json() == 6 * MIB
    assert server.call(sized, b"x" * (6 * MIB + 1), headers=headers).status == 413


@pytest.mark.parametrize(
    "slow", ["nothing", "half a line", "half a header", "a header at a time", "after a request"]
)
def test_clients_that_are_slow_with_their_header_are_closed(impatient: Server, slow: str):
    """Fifty of them hold nothing for long, and meanwhile others are served."""
    name = impatient.deploy("hello", "unhurried")
    impatient.call(name)
    whole = f"GET /fn/{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    begin = {
        "nothing": b"",
        "half a line": b"GET /fn/",
        "half a header": b"GET / HTTP/1.1\r\nHost: x\r\nX-A",
        "a header at a time": b"GET / HTTP/1.1\r\n",
        "after a request": whole + b"GET / HT",
    }[slow]
    with contextlib.ExitStack() as stack:
        slow_ones = [stack.enter_context(impatient.connection()) for _ in range(50)]
        for connection in slow_ones:
            connection.sendall(begin)
        served = [impatient.call(name).status for _ in range(20)]
        if slow == "a header at a time":
            for i in range(30):
                with contextlib.suppress(ConnectionError):
                    slow_ones[0].sendall(b"X-%d: 1\r\n" % i)
                eventually(lambda: False, 0.1)

        left = [answer(connection, 10) for connection in slow_ones]
    assert served == [200] * 20
    if slow == "after a request":
        assert all(got.startswith(b"HTTP/1.1 200") for got in left)


def test_clients_that_are_slow_with_their_body_are_408(impatient: Server):
    """At least 1 KiB/s after the grace, or the request ends; the function never sees it."""
    name = impatient.deploy("hello", "unhurried")
    impatient.call(name)
    before = impatient.metric(
        'dayfly_invocations_total{function="default/unhurried",outcome="Success"}'
    )
    head = f"POST /fn/{name} HTTP/1.1\r\nHost: x\r\nContent-Length: 10000\r\n\r\nx".encode()
    with contextlib.ExitStack() as stack:
        slow_ones = [stack.enter_context(impatient.connection()) for _ in range(50)]
        for connection in slow_ones:
            connection.sendall(head)
        served = [impatient.call(name).status for _ in range(20)]
        left = [answer(connection, 10) for connection in slow_ones]

    after = impatient.metric(
        'dayfly_invocations_total{function="default/unhurried",outcome="Success"}'
    )
    assert served == [200] * 20
    assert {got.partition(b"\r\n")[0] for got in left} == {b"HTTP/1.1 408 Request Timeout"}
    assert after - before == 20


def test_clients_that_do_not_read_are_cut_off(impatient: Server):
    """A response of 4 MiB to each of twenty that take nothing; their memory is used again."""
    code = "def handler(event, context):\n    return 'x' * (4 << 20)\n"
    name = impatient.deploy("large", files={"main.py": code})
    impatient.call(name)
    before = resident_bytes(impatient)
    for _ in range(3):
        ignore_responses(impatient, f"/fn/{name}", 20)

    assert impatient.call(name).status == 200
    assert resident_bytes(impatient) - before < 200 * MIB  # 240 and more if they were kept
    impatient.delete(name)


def test_clients_that_ask_for_a_result_and_do_not_read_it_are_cut_off(impatient: Server):
    code = "def handler(event, context):\n    return 'x' * (4 << 20)\n"
    name = impatient.deploy("large-later", files={"main.py": code})
    where = impatient.call(name, headers={"Prefer": "respond-async"}).headers["Location"]
    wait = {"Prefer": "wait=30"}
    told = impatient.ask("GET", where, headers=wait, plane="http").json()
    ignore_responses(impatient, where, 5)

    assert told["state"] == "succeeded"
    impatient.delete(name)


def ignore_responses(impatient: Server, path: str, number: int) -> None:
    """Ask *number* times at once, read nothing, and wait until the server has given up on all."""
    host, _, port = impatient.http.rpartition(":")
    cut_off = select.poll()
    with contextlib.ExitStack() as stack:
        for _ in range(number):
            deaf = stack.enter_context(socket.socket())
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((host, int(port)))
            cut_off.register(deaf, 0)  # errors and hang-ups only
            deaf.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert eventually(lambda: len(cut_off.poll(0)) == number)


FF = b"\xff" * 7000
BAD_REQUESTS = {
    "two lengths": b"POST {} HTTP/1.1\r\nHost: x\r\n"
    b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "length and chunks": b"POST {} HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n",
    "odd coding": b"POST {} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked twice": b"POST {} HTTP/1.1\r\nHost: x\r\n"
    b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "negative length": b"POST {} HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    "length with a plus": b"POST {} HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\na",
    "huge length": b"POST {} HTTP/1.1\r\nHost: x\r\n"
    b"Content-Length: 99999999999999999999999\r\n\r\n",
    "bad chunk": b"POST {} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "space before the colon": b"GET {} HTTP/1.1\r\nHost: x\r\nX-A : 1\r\n\r\n",
    "a folded header": b"GET {} HTTP/1.1\r\nHost: x\r\nX-A: 1\r\n 2\r\n\r\n",
    "a nul": b"GET {} HTTP/1.1\r\nHost: x\r\nX-A: \0\r\n\r\n",
    "a lone return": b"GET {} HTTP/1.1\r\nHost: x\r\nX-A: 1\rX-B: 2\r\n\r\n",
    "no version": b"GET {}\r\n\r\n",
    "version 9": b"GET {} HTTP/9.9\r\nHost: x\r\n\r\n",
    "a strange method": b"G@T {} HTTP/1.1\r\nHost: x\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64,
    "http 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a long line": b"GET {}?" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a long header": b"GET {} HTTP/1.1\r\nHost: x\r\nX-A: " + b"x" * 100_000 + b"\r\n\r\n",
    "many headers": b"GET {} HTTP/1.1\r\nHost: x\r\n" + b"X-A: 1\r\n" * 5000 + b"\r\n",
    "heavy headers": b"GET {} HTTP/1.1\r\nHost: x\r\n"
    + b"X-A: "
    + b"x" * 7000
    + b"\r\n" * 1
    + (b"X-B: " + b"x" * 7000 + b"\r\n") * 9
    + b"Connection: close\r\n\r\n",
    "headers that grow": b"GET {} HTTP/1.1\r\nHost: x\r\n"
    + (b"X-A: " + FF + b"\r\n") * 4
    + b"Connection: close\r\n\r\n",
    "raw bytes in the path": b"GET {}/\xff\xfe HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "raw bytes in the query": b"GET {}?\xff HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "raw bytes in the host": b"GET {} HTTP/1.1\r\nHost: \xff\xfe\r\nConnection: close\r\n\r\n",
    "an absolute target": b"GET http://evil.test/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "a strange target": b"GET http://[::1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "a star": b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "connect": b"CONNECT evil.test:443 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
}


@pytest.mark.parametrize("case", sorted(BAD_REQUESTS))
def test_requests_that_are_none_are_refused_and_hold_no_sandbox(
    server: Server, name: str, case: str
):
    """4xx (200 where it is merely odd) and a closed connection; never a 5xx, nor a place lost."""
    server.call(name)

    line = first_line(server, BAD_REQUESTS[case].replace(b"{}", b"/fn/" + name.encode()))
    code = int(line.split(b" ")[1]) if line else 0

    assert code in (0, 200, *range(400, 500)), line
    assert eventually(lambda: server.describe(name)["status"]["busy"] == 0)
    assert not server.errors()


def test_a_smuggled_request_is_never_served(server: Server, name: str):
    """What follows a body whose length is in doubt is not taken for a request."""
    smuggled = BAD_REQUESTS["length and chunks"].replace(b"{}", b"/fn/" + name.encode())
    with server.connection() as connection:
        connection.sendall(smuggled)
        got = answer(connection)

    assert got.count(b"HTTP/1.") == 1
    assert got.split(b" ")[1] == b"400"


def test_more_query_parameters_than_sense_do_not_end_a_sandbox(server: Server, name: str):
    """As many as a request line holds."""
    reply = server.call(name, path="?" + "a&" * 4000)

    assert reply.status == 200
    assert server.call(name).headers["Dayfly-Start"] == "warm"


def test_a_server_without_descriptors_recovers_when_it_has_some_again(new_server):
    """Connections beyond the limit are turned away; then it serves, and starts sandboxes."""
    server: Server = new_server()
    name = server.deploy("hello")
    assert server.call(name).status == 200
    used = len(os.listdir(f"/proc/{server.pid}/fd"))
    _, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (used + 20, hard))
    host, _, port = server.http.rpartition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            hog = stack.enter_context(socket.socket())
            hog.setblocking(False)
            hog.connect_ex((host, int(port)))
        eventually(lambda: len(os.listdir(f"/proc/{server.pid}/fd")) >= used + 18, 5)
        cpu = os.times().elapsed, float(sum(map(int, stat_times(server.pid))))
        eventually(lambda: False, 0.5)
        spun = float(sum(map(int, stat_times(server.pid)))) - cpu[1]
    assert server.is_ready or eventually(lambda: server.is_ready)

    replies = [server.call(name) for _ in range(5)]
    fresh = server.deploy("instance", "fresh")

    assert [reply.status for reply in replies] == [200] * 5
    assert eventually(lambda: server.call(fresh).status == 200)
    assert eventually(lambda: server.call(server.deploy("echo", "fresher")).status == 200)
    assert spun < 45, "hundredths of a second of work in half a second of waiting"


def stat_times(pid: int) -> list[str]:
    """User and system time, in ticks."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(") ")[2].split()[11:13]


def test_a_thousand_idle_connections_change_nothing(server: Server, name: str):
    """They are held, and others are served as before."""
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(server.connection())
        served = [server.call(name).status for _ in range(50)]

    assert served == [200] * 50
