"""A function's zygote: it has imported user code, so nothing that it says or does is trusted.

It may fork, and may enter namespaces that it is handed; it can make none, and mount nothing. What
needs such rights is done by its keeper, which runs only Dayfly's code:

    environment's zygote -- fork --> keeper (pid 1 of the jail) -- fork --> the function's zygote
                                       |                                      | imports, waits
                                       | fork                                 | fork
                                       v                                      v
                                     pid 1 of a sandbox  - - hands over - ->  the guest enters
                                     (namespaces, mounts, groups)             (`Seat.serve` returns)

The launcher asks the keeper as it asks any zygote. The zygote hears only of sandboxes to fork for,
and is believed about nothing but how these have ended.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # see `zygote`
import _socket
import json
import os
import select

from dayfly import lockdown, zygote

TYPE_CHECKING = False  # see `record`
if TYPE_CHECKING:
    from typing import Any, NoReturn

GUEST, SEAT = 3, 4
NAMESPACES = ("pid", "mnt", "ipc", "uts", "cgroup", "net")
CODES = range(-64, 256)


def keep(
    control: Any,
    sandbox: str,
    descriptors: list[int],
    package: dict[str, Any],
    has_network: bool,
) -> Seat:
    """Be the keeper of *sandbox*, as pid 1 of its jail; returns only in the zygote.

    *package* names the only code that the jail shows, and the size of its /tmp. *descriptors* are
    the guest's end of the zygote's connection, our end of the launcher's, the groups' files.
    """
    guest, own_control, *groups = descriptors
    os.setsid()
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    enter(groups)
    zygote.furnish(has_network)
    lockdown.mount_code(package["digest"], package["tmp_mb"])
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        control.detach()
        os.dup2(guest, GUEST)
        os.dup2(theirs.detach(), SEAT)
        ours.detach()
        os.closerange(SEAT + 1, 1 << 20)
        zygote.diverge()
        return Seat(SEAT)
    theirs.close()
    for descriptor in (guest, *groups):
        os.close(descriptor)
    lockdown.rename("dayfly-keeper")
    _Keeper(control, sandbox, own_control, ours, pid, package, has_network).run()


def enter(groups: list[int]) -> None:
    """Move into control groups; the caller is its only thread."""
    for group in groups:
        os.write(group, b"0")


class _Wakeups:
    """Makes a poll see that a child has ended."""

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()
        for end in (self.reader, self._writer):
            os.set_blocking(end, False)
        self._before = _signal.signal(_signal.SIGCHLD, lambda *_: None)
        _signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def ended(self) -> dict[int, int]:
        """The exit codes of the children that have ended, by process id."""
        try:
            os.read(self.reader, 4096)
        except BlockingIOError:
            pass
        codes: dict[int, int] = {}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return codes
            if pid == 0:
                return codes
            codes[pid] = os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """As it was before."""
        _signal.set_wakeup_fd(-1)
        _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL if self._before is None else self._before)
        os.close(self.reader)
        os.close(self._writer)


class _Keeper:
    """Makes what a sandbox needs and its zygote must not; ends with the zygote, and all with it."""

    def __init__(
        self,
        parent: Any,
        sandbox: str,
        own_control: int,
        seat: Any,
        pid: int,
        package: dict[str, Any],
        has_network: bool,
    ) -> None:
        self._parent, self._sandbox, self._pid = parent, sandbox, pid
        self._control = _socket.socket(fileno=own_control)
        self._seat, self._package, self._has_network = seat, package, has_network
        self._wakeups = _Wakeups()
        self._own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._kept: dict[int, str] = {}
        """The sandboxes that live, by their pid 1; "" when it is known how they have ended."""

        self._is_retired = False

    def run(self) -> NoReturn:
        """Serve until the zygote has ended, or was retired and the last sandbox has."""
        poll = select.poll()
        for descriptor in (self._control.fileno(), self._seat.fileno(), self._wakeups.reader):
            poll.register(descriptor, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            ended = self._wakeups.ended()
            for pid in ended:
                self._kept.pop(pid, None)
            if self._pid in ended:
                self._end(ended[self._pid])
            if self._is_retired and not self._kept:
                self._end()
            if self._seat.fileno() in ready:
                self._pass_on()
            if self._control.fileno() in ready and not self._serve():
                poll.unregister(self._control.fileno())
                self._is_retired = True
                if not self._kept:
                    self._end()

    def _end(self, code: int = 0) -> NoReturn:
        """Say how it ended; everything in the jail ends with this process."""
        zygote.say(self._parent, say="exited", sandbox=self._sandbox, code=code)
        os._exit(0)

    def _serve(self) -> bool:
        """One request of the launcher's; False when it wants no more of them."""
        request = zygote.receive(self._control)
        if request is None:
            return False
        sandbox, descriptors = request["sandbox"], request["descriptors"]
        try:
            pid = zygote.fork(self._own)
            if pid == 0:
                self._be_init(sandbox, descriptors)
            self._kept[pid] = sandbox
            zygote.announce(self._control, sandbox, pid)
        except OSError as error:
            why = f"the zygote cannot fork: {error}"
            zygote.say(self._control, say="refused", sandbox=sandbox, why=why)
        for descriptor in descriptors:
            os.close(descriptor)
        return True

    def _pass_on(self) -> None:
        """How a sandbox has ended, says the zygote; whatever else it says is its end.

        Once a sandbox, so that nobody beyond the jail can be flooded.
        """
        try:
            said = json.loads(self._seat.recv(zygote.DATAGRAM_BYTES_MAX))
            sandbox, code = said["sandbox"], int(said["code"])
            pid = next((pid for pid, kept in self._kept.items() if kept == sandbox), None)
        except Exception:
            os.kill(self._pid, _signal.SIGKILL)  # it closed its end, or does not mean well
            return
        if sandbox and pid is not None and code in CODES:
            self._kept[pid] = ""
            zygote.say(self._control, say="exited", sandbox=sandbox, code=code)

    def _be_init(self, sandbox: str, descriptors: list[int]) -> NoReturn:
        """As pid 1 of a new sandbox: make it, and hand it over; it lives until it is killed."""
        try:
            guest, *groups = descriptors
            os.setsid()
            _signal.set_wakeup_fd(-1)
            _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)  # the kernel buries orphans
            enter(groups)
            zygote.furnish(self._has_network, lockdown.tmp_options(self._package["tmp_mb"]))
            zygote.spread_pids()
            lockdown.rename(zygote.INIT)
            spaces = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in NAMESPACES]
            # this process has no filter. Its rights kept the zygote, which has less, out of it so
            # far; from here on this does. Not a moment later: the zygote may be waiting for it
            lockdown.prctl(lockdown.PR_SET_DUMPABLE, 0)
            for held in (self._parent, self._control):
                held.close()
            lockdown.drop_rights()
            zygote.say(self._seat, guest, *spaces, *groups, sandbox=sandbox)
            os.closerange(0, 2)
            os.closerange(3, 1 << 20)
            while True:
                _signal.pause()
        except BaseException as error:
            os.write(2, f"keeper: {sandbox}: {error!r}\n".encode())
        os._exit(1)


class Seat:
    """The zygote's own end of its keeper's connection."""

    def __init__(self, descriptor: int) -> None:
        self._socket = _socket.socket(fileno=descriptor)
        self._names: dict[int, str] = {}

    def fileno(self) -> int:
        """Its descriptor."""
        return int(self._socket.fileno())

    def serve(self) -> None:
        """Fork for each sandbox that is handed over; returns in each of these, inside it."""
        wakeups = _Wakeups()
        own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        poll = select.poll()
        for descriptor in (self._socket.fileno(), wakeups.reader):
            poll.register(descriptor, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            for pid, code in wakeups.ended().items():
                if pid in self._names:
                    zygote.say(self._socket, sandbox=self._names.pop(pid), code=code)
            if self._socket.fileno() not in ready:
                continue
            request = zygote.receive(self._socket)
            if request is None:
                os._exit(0)
            sandbox, (guest, pids, *others) = request["sandbox"], request["descriptors"]
            try:
                lockdown.setns(pids, zygote.CLONE_NEWPID)
                pid = zygote.fork_and_return(own)
            except OSError as error:
                os.write(2, f"the zygote cannot fork: {error}\n".encode())
                zygote.say(self._socket, sandbox=sandbox, code=1)
                pid = -1
            if pid == 0:
                wakeups.close()
                os.close(own)
                self._enter(guest, others)
                os.close(pids)
                return
            self._names[pid] = sandbox
            for descriptor in (guest, pids, *others):
                os.close(descriptor)

    def _enter(self, guest: int, others: list[int]) -> None:
        """In the fork: into the groups and namespaces that are ready for it."""
        spaces = others[: len(NAMESPACES) - 1]
        try:
            os.setsid()
            enter(others[len(spaces) :])
            lockdown.write("/proc/self/oom_score_adj", zygote.OOM_SCORE_ADJ)
            for space in spaces:
                lockdown.setns(space, 0)
            lockdown.rename("dayfly-guest")
            os.dup2(guest, GUEST)
            for descriptor in (guest, *others):
                os.close(descriptor)
            self._socket.close()
            zygote.diverge()
        except BaseException as error:
            os.write(2, f"zygote: {error!r}\n".encode())
            os._exit(1)
