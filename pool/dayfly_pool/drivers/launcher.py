"""The launcher: a small process that starts bwrap for the linux driver and buries what it started.

A process of its own, because forking the server would copy its page tables for every sandbox, and
because as root the sandboxes are started from a private mount namespace in which their sources are
reachable by an unprivileged uid (the interpreter may well live below a closed home). It knows no
policy, reads no frame of a guest, and dies with the server; every sandbox dies with it.

Standard library and `dayfly.lockdown` only. Requests and answers are JSON datagrams on
descriptor 3.
"""

import json
import os
import selectors
import signal
import socket
import sys
from typing import Any, Final, NamedTuple

from dayfly import lockdown
from dayfly_pool.drivers import cgroups

CONTROL: Final = 3
DATAGRAM_BYTES_MAX: Final = 128 * 1024
PRIVATE: Final = "/mnt"
OOM_SCORE_ADJ: Final = "500"
GUEST_SOCKET, GUEST_ARGUMENTS = 3, 4


class _Child(NamedTuple):
    sandbox: str
    folders: list[str]


class Launcher:
    """Serves create, terminate and kill; reports created, refused and exited."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, _Child] = {}
        self._pids: dict[str, int] = {}
        self._unburied: list[list[str]] = []
        self._null = os.open("/dev/null", os.O_RDWR)

    def run(self) -> None:
        """Serve until the server closes the control socket; then kill what is left."""
        wake, wakened = socket.socketpair()
        for end in (wake, wakened):
            end.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for ignored in (signal.SIGINT, signal.SIGTERM):
            signal.signal(ignored, signal.SIG_IGN)  # the server decides when to end
        selector = selectors.DefaultSelector()
        selector.register(self._control, selectors.EVENT_READ)
        selector.register(wakened, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(0.05 if self._unburied else None):
                if key.fileobj is wakened:
                    wakened.recv(4096)
                elif not self._serve():
                    self._end()
                    return
            self._reap()

    def _serve(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._control, DATAGRAM_BYTES_MAX, 1)
        if not data:
            return False
        request = json.loads(data)
        match request["do"]:
            case "create":
                self._create(request, descriptors[0])
            case "terminate":
                self._signal(request["sandbox"], signal.SIGTERM, depth=2)
            case "kill":
                self._signal(request["sandbox"], signal.SIGKILL, depth=1)
        return True

    def _create(self, request: dict[str, Any], guest: int) -> None:
        sandbox, folders = request["sandbox"], request["folders"]
        arguments = os.memfd_create("arguments", 0)
        try:
            os.write(arguments, b"".join(a.encode() + b"\0" for a in request["arguments"]))
            os.lseek(arguments, 0, os.SEEK_SET)
            cgroups.create(folders)
            pid = os.fork()
            if pid == 0:
                self._become(request, guest, arguments)
        except OSError as error:
            cgroups.remove(folders)
            self._tell({"say": "refused", "sandbox": sandbox, "why": str(error)})
            return
        finally:
            os.close(guest)
            os.close(arguments)
        self._children[pid] = _Child(sandbox, folders)
        self._pids[sandbox] = pid
        self._tell({"say": "created", "sandbox": sandbox, "pid": pid})

    def _become(self, request: dict[str, Any], guest: int, arguments: int) -> None:
        """In the forked child: take the sandbox's identity, then be bwrap."""
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)  # what is ignored stays so through execve
            cgroups.enter(request["folders"])
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write(OOM_SCORE_ADJ)
            for descriptor in (0, 1):
                os.dup2(self._null, descriptor)
            high = [os.dup(d) for d in (guest, arguments)]
            while max(high) <= GUEST_ARGUMENTS or min(high) <= GUEST_ARGUMENTS:
                high = [os.dup(d) for d in high]
            os.dup2(high[0], GUEST_SOCKET)
            os.dup2(high[1], GUEST_ARGUMENTS)
            os.closerange(GUEST_ARGUMENTS + 1, 4096)
            if request["uid"] is not None:
                os.setgroups([])
                os.setresgid(request["uid"], request["uid"], request["uid"])
                os.setresuid(request["uid"], request["uid"], request["uid"])
            command = [request["bwrap"], "--args", str(GUEST_ARGUMENTS), "--", *request["command"]]
            os.execve(request["bwrap"], command, {})
        except BaseException as error:
            os.write(2, f"launcher: {error!r}\n".encode())
        os._exit(127)

    def _signal(self, sandbox: str, number: signal.Signals, *, depth: int) -> None:
        """Signal bwrap's pid 1 inside (depth 1: everything there dies with it) or the guest (2)."""
        pid = self._pids.get(sandbox)
        if pid is None:
            return
        target = pid
        for _ in range(depth):
            children = _children(target)
            if not children:
                break
            target = children[0]
        if number == signal.SIGTERM and target == pid:
            return  # not up yet: there is nobody to ask
        try:
            os.kill(target, number)
        except ProcessLookupError:
            pass

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                pid, status = 0, 0
            if pid == 0:
                break
            child = self._children.pop(pid, None)
            if child is None:
                continue  # a sandbox's pid 1 that outlived bwrap by a moment
            self._pids.pop(child.sandbox, None)
            death = cgroups.autopsy(child.folders)
            self._unburied.append(child.folders)
            self._tell(
                {
                    "say": "exited",
                    "sandbox": child.sandbox,
                    "code": os.waitstatus_to_exitcode(status),
                    "oom_kills": death.oom_kills,
                    "peak_bytes": death.peak_bytes,
                }
            )
        self._unburied = [folders for folders in self._unburied if not cgroups.remove(folders)]

    def _end(self) -> None:
        """The server is gone: nothing of it may stay."""
        for pid in list(self._children):
            for target in (*_children(pid), pid):
                try:
                    os.kill(target, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        while True:
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        for folders in [child.folders for child in self._children.values()] + self._unburied:
            cgroups.remove(folders)
        for root in {os.path.dirname(f) for c in self._children.values() for f in c.folders}:
            cgroups.remove_tree(root)

    def _tell(self, answer: dict[str, Any]) -> None:
        try:
            self._control.send(json.dumps(answer).encode())
        except OSError:
            pass  # the server is going away; `_serve` will see it


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except OSError:
        return []


def expose(sources: dict[str, str]) -> None:
    """In a mount namespace of our own, bind each source at /mnt/NAME, open to every uid."""
    lockdown.unshare(lockdown.CLONE_NEWNS)
    lockdown.mount("", "/", None, lockdown.MS_REC | lockdown.MS_PRIVATE)
    # opened now, because /mnt may cover one of them; and not before, because a bind takes only
    # what was opened in its own namespace
    opened = {name: os.open(path, os.O_PATH) for name, path in sources.items()}
    lockdown.mount("dayfly", PRIVATE, "tmpfs", lockdown.MS_NOSUID | lockdown.MS_NODEV, "mode=755")
    for name, descriptor in opened.items():
        target = f"{PRIVATE}/{name}"
        os.mkdir(target, 0o755)
        flags = lockdown.MS_BIND | lockdown.MS_REC
        lockdown.mount(f"/proc/self/fd/{descriptor}", target, None, flags)
        os.close(descriptor)


def main() -> None:
    """Entry point; the last argument is a JSON map of the sources to expose, or null."""
    sources = json.loads(sys.argv[-1])
    lockdown.prctl(lockdown.PR_SET_CHILD_SUBREAPER, 1)
    lockdown.prctl(lockdown.PR_SET_PDEATHSIG, signal.SIGKILL)
    if sources is not None:
        expose(sources)
    control = socket.socket(fileno=CONTROL)
    Launcher(control).run()


if __name__ == "__main__":
    main()
