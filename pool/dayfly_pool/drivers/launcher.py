"""The launcher: a small process that starts sandboxes for the linux driver and buries them.

It starts them with bwrap, or has a zygote (itself started with bwrap) fork them.

A process of its own, because forking the server would copy its page tables for every sandbox, and
because as root the sandboxes are started from a private mount namespace in which their sources are
reachable by an unprivileged uid (the interpreter may well live below a closed home). It knows no
policy, reads no frame of a guest, and dies with the server; every sandbox dies with it.

Standard library and `dayfly.lockdown` only. Requests and answers are JSON datagrams on
descriptor 3.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from typing import Any, Final, NamedTuple

from dayfly import lockdown
from dayfly_pool.drivers import cgroups, idmaps

CONTROL: Final = 3
DATAGRAM_BYTES_MAX: Final = 128 * 1024
DESCRIPTORS_MAX: Final = 1 << 20
PRIVATE: Final = "/mnt"
MAPPED: Final = (f"{PRIVATE}/steps", f"{PRIVATE}/layers")
"""What sandboxes for steps see as their own."""

OOM_SCORE_ADJ: Final = {False: "500", True: "400"}
"""Of a sandbox and of a zygote: the kernel kills the sandboxes first."""

GUEST_SOCKET, GUEST_ARGUMENTS = 3, 4
DYING_S_MAX: Final = 2.0


class _Child(NamedTuple):
    """What bwrap was started for."""

    sandbox: str
    folders: list[str]


class _Forked(NamedTuple):
    """A sandbox that a zygote forked: *pid* is its pid 1, as we see it, and *pidfd* the same."""

    zygote: str
    folders: list[str]
    pid: int
    pidfd: int


class _Grave(NamedTuple):
    """The groups of a sandbox that has ended, *since* when they could not be removed."""

    folders: list[str]
    zygote: str
    since: float


class Launcher:
    """Serves create, zygote, fork, retire, terminate and kill.

    Reports created, refused and exited, and of zygotes ready and unfit.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, _Child] = {}
        self._pids: dict[str, int] = {}
        self._zygotes: dict[str, socket.socket] = {}
        self._retired: set[str] = set()
        self._asked: dict[str, tuple[str, list[str]]] = {}
        """(zygote, groups) of the sandboxes that are being forked."""

        self._forked: dict[str, _Forked] = {}
        self._codes: dict[str, int] = {}
        self._selector = selectors.DefaultSelector()
        self._unburied: list[_Grave] = []
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
        self._selector.register(self._control, selectors.EVENT_READ, self._serve)
        self._selector.register(wakened, selectors.EVENT_READ, lambda: bool(wakened.recv(4096)))
        while True:
            for key, _ in self._selector.select(0.05 if self._unburied else None):
                if not key.data():
                    self._end()
                    return
            self._reap()

    def _serve(self) -> bool:
        """One request of the server's; False when it has closed the connection."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, DATAGRAM_BYTES_MAX, 1)
        except ConnectionResetError:
            return False  # and it had not heard all that it was told
        if not data:
            return False
        request = json.loads(data)
        match request["do"]:
            case "create":
                self._create(request, descriptors[0])
            case "zygote":
                self._create_zygote(request)
            case "fork":
                self._fork(request, descriptors)
            case "retire":
                self._retire(request["sandbox"])
            case "terminate":
                self._signal(request["sandbox"], signal.SIGTERM, depth=2)
            case "kill":
                self._signal(request["sandbox"], signal.SIGKILL, depth=1)
        return True

    def _create(self, request: dict[str, Any], guest: int) -> None:
        sandbox, folders = request["sandbox"], request["folders"]
        arguments = os.memfd_create("arguments", 0)
        clones: list[int] = []
        try:
            os.write(arguments, b"".join(a.encode() + b"\0" for a in request["arguments"]))
            os.lseek(arguments, 0, os.SEEK_SET)
            cgroups.create(folders, background=request["background"])
            if request["owner"] is not None:
                clones = idmaps.clones([*MAPPED], request["owner"], request["uid"])
            pid = os.fork()
            if pid == 0:
                self._become(request, guest, arguments, clones)
        except OSError as error:
            cgroups.remove(folders)
            self._tell({"say": "refused", "sandbox": sandbox, "why": str(error)})
            return
        finally:
            for descriptor in (guest, arguments, *clones):
                os.close(descriptor)
        self._children[pid] = _Child(sandbox, folders)
        self._pids[sandbox] = pid
        self._tell({"say": "created", "sandbox": sandbox, "pid": pid})

    def _create_zygote(self, request: dict[str, Any]) -> None:
        self._create(request, self._connect(request["sandbox"]))

    def _connect(self, zygote: str) -> int:
        """The zygote's end of a connection that it will be asked on."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._zygotes[zygote] = ours
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._hear(zygote) or True)
        return theirs.detach()

    def _fork(self, request: dict[str, Any], descriptors: list[int]) -> None:
        """Have a zygote fork; the answer comes to `_hear`.

        With `keep` it forks another zygote, of a function; see `dayfly.keeper`.
        """
        sandbox, zygote, folders = request["sandbox"], request["zygote"], request["folders"]
        try:
            if zygote not in self._zygotes or zygote in self._retired:
                raise OSError(f"{zygote} is gone")
            cgroups.create(folders, background=request["background"])
            if request["keep"]:
                descriptors.append(self._connect(sandbox))
            descriptors += cgroups.entries(folders)
            asked = {name: request[name] for name in ("do", "sandbox", "keep")}
            ask = json.dumps(asked).encode()
            socket.send_fds(self._zygotes[zygote], [ask], descriptors)
        except OSError as error:
            cgroups.remove(folders)
            self._tell({"say": "refused", "sandbox": sandbox, "why": str(error)})
        else:
            self._asked[sandbox] = zygote, folders
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _retire(self, zygote: str) -> None:
        if zygote in self._zygotes:
            self._retired.add(zygote)
            try:
                self._zygotes[zygote].send(json.dumps({"do": "retire"}).encode())
            except OSError:
                pass  # it is gone already

    def _hear(self, zygote: str) -> bool:
        """Take one thing that a zygote, or one of its sandboxes' pid 1, says; False: nothing."""
        if zygote not in self._zygotes:
            return False  # a sandbox of its was buried just now, and that told it
        try:
            data, descriptors, _, _ = socket.recv_fds(self._zygotes[zygote], 4096, 1)
        except BlockingIOError:
            return False
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._lose(zygote)
            return True
        try:
            self._note(zygote, json.loads(data), descriptors)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            os.write(2, f"launcher: {zygote} says nonsense: {error!r}\n"[:500].encode())
            self._lose(zygote)
        for descriptor in descriptors:
            os.close(descriptor)
        return True

    def _note(self, zygote: str, answer: dict[str, Any], descriptors: list[int]) -> None:
        """Believe what is about the zygote itself, or about a sandbox that was asked of it.

        Descriptors that it takes are removed from *descriptors*.
        """
        sandbox = answer.get("sandbox", zygote)
        asked = sandbox in self._asked and self._asked[sandbox][0] == zygote
        forked = self._forked.get(sandbox)
        match answer["say"]:
            case "ready" | "unfit":
                self._tell(answer | {"sandbox": zygote})
            case "forked" if len(descriptors) == 1:
                self._take(sandbox, zygote, descriptors.pop(), is_wanted=asked)
            case "refused" | "forked" if asked:  # the latter without: we have no room for one
                self._refuse(sandbox, answer.get("why", "the launcher has too many files open"))
            case "exited" if asked:
                self._codes.setdefault(sandbox, int(answer["code"]))
            case "exited" if forked is not None and forked.zygote == zygote:
                self._codes.setdefault(sandbox, int(answer["code"]))
                self._kill(forked)  # whom a function's zygote forked left its init

    def _take(self, sandbox: str, zygote: str, pidfd: int, *, is_wanted: bool) -> None:
        """It has been forked, and may be dead already."""
        if not is_wanted:  # it was given up meanwhile
            with contextlib.suppress(OSError):  # it is dead, or no process at all
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
            return
        _, folders = self._asked.pop(sandbox)
        pid = _pid_of(pidfd)
        self._forked[sandbox] = _Forked(zygote, folders, pid, pidfd)
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._bury(sandbox))
        self._pids[sandbox] = pid
        self._tell({"say": "created", "sandbox": sandbox, "pid": pid})

    def _lose(self, zygote: str) -> None:
        """The zygote is gone: what was asked of it will not come."""
        control = self._zygotes.pop(zygote)
        self._retired.discard(zygote)
        self._selector.unregister(control)
        control.close()
        for sandbox, (asked, _) in list(self._asked.items()):
            if asked == zygote:
                self._refuse(sandbox, f"{zygote} died")

    def _refuse(self, sandbox: str, why: str) -> None:
        """It was asked of a zygote, and will not come, or is not wanted any more."""
        if sandbox not in self._asked:
            return
        asked, folders = self._asked.pop(sandbox)
        self._codes.pop(sandbox, None)
        if not cgroups.remove(folders):
            self._unburied.append(_Grave(folders, asked, time.monotonic()))
        self._tell({"say": "refused", "sandbox": sandbox, "why": why})

    def _bury(self, sandbox: str) -> bool:
        """A forked sandbox is dead to its last process."""
        forked = self._forked[sandbox]  # until it has been heard: what is not there says nothing
        self._selector.unregister(forked.pidfd)
        while sandbox not in self._codes and forked.zygote in self._zygotes:
            if not self._hear(forked.zygote):
                break  # whatever its pid 1 had to say, it said before it died
        del self._forked[sandbox]
        os.close(forked.pidfd)
        code = self._codes.pop(sandbox, -signal.SIGKILL)
        self._exited(sandbox, forked.folders, code, forked.zygote)
        return True

    def _become(
        self, request: dict[str, Any], guest: int, arguments: int, clones: list[int]
    ) -> None:
        """In the forked child: take the sandbox's identity, then be bwrap."""
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)  # what is ignored stays so through execve
            cgroups.enter(request["folders"])
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write(OOM_SCORE_ADJ[request["do"] == "zygote"])
            if clones:
                lockdown.unshare(lockdown.CLONE_NEWNS)
                for place, clone in zip(MAPPED, clones, strict=True):
                    idmaps.attach(clone, place)
            for descriptor in (0, 1):
                os.dup2(self._null, descriptor)
            high = [os.dup(d) for d in (guest, arguments)]
            while max(high) <= GUEST_ARGUMENTS or min(high) <= GUEST_ARGUMENTS:
                high = [os.dup(d) for d in high]
            os.dup2(high[0], GUEST_SOCKET)
            os.dup2(high[1], GUEST_ARGUMENTS)
            os.closerange(GUEST_ARGUMENTS + 1, DESCRIPTORS_MAX)
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
            if number == signal.SIGKILL:
                self._refuse(sandbox, "it was killed before its zygote had forked it")
            return
        target = pid
        if forked := self._forked.get(sandbox):
            depth -= 1  # what a zygote forks is pid 1 itself
            if number == signal.SIGKILL:
                self._codes.setdefault(sandbox, -signal.SIGKILL)
                self._kill(forked)
                return
        for _ in range(depth):
            children = _guests(target, forked) or _children(target)
            if not children:
                break
            target = children[0]
        if number == signal.SIGTERM and target == pid:
            return  # not up yet: there is nobody to ask
        try:
            os.kill(target, number)
        except ProcessLookupError:
            pass

    def _kill(self, forked: _Forked) -> None:
        """All of it, by its pid 1."""
        try:
            signal.pidfd_send_signal(forked.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass  # dead by itself; that is the next thing to be read

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
            self._exited(child.sandbox, child.folders, os.waitstatus_to_exitcode(status))
        self._unburied = [grave for grave in self._unburied if not cgroups.remove(grave.folders)]
        for grave in self._unburied:
            is_haunted = time.monotonic() - grave.since > DYING_S_MAX
            if is_haunted and (keeper := self._forked.get(grave.zygote)):
                self._kill(keeper)  # a hostile zygote's processes come back: all of it goes

    def _exited(self, sandbox: str, folders: list[str], code: int, zygote: str = "") -> None:
        self._pids.pop(sandbox, None)
        death = cgroups.autopsy(folders)
        for folder in folders:
            cgroups.kill(folder)  # who is there is dying, or was put there by a hostile zygote
        self._unburied.append(_Grave(folders, zygote, time.monotonic()))
        self._tell(
            {
                "say": "exited",
                "sandbox": sandbox,
                "code": code,
                "oom_kills": death.oom_kills,
                "peak_bytes": death.peak_bytes,
            }
        )

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
        groups = [child.folders for child in self._children.values()]
        groups += [grave.folders for grave in self._unburied]
        groups += [forked.folders for forked in self._forked.values()]
        groups += [folders for _, folders in self._asked.values()]
        for folders in groups:
            cgroups.remove(folders)
        roots = {os.path.dirname(folder) for folders in groups for folder in folders}
        for root in roots | {cgroups.counterpart(root) for root in roots}:
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


def _guests(init: int, forked: _Forked | None) -> list[int]:
    """The guest of a sandbox that a function's zygote forked: its parent is not in the sandbox."""
    if forked is None or not forked.folders:
        return []
    within = {init, *cgroups.members(forked.folders[0])}
    return [pid for pid in within - {init} if _parent(pid) not in within]


def _parent(pid: int) -> int:
    """0 when it is dead."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _pid_of(pidfd: int) -> int:
    """The process's number, as this process sees it; 0 when it is dead and buried."""
    with open(f"/proc/self/fdinfo/{pidfd}") as file:
        pids = [int(line.split()[1]) for line in file if line.startswith("Pid:")]
    return max(0, *pids, 0)


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
