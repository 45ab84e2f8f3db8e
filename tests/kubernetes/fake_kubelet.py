"""A kubelet for the fake API server: its pods are real processes of this machine, by bwrap.

Each pod has pid 1, /code, /tmp, its secret and an address of its own from 127.0.0.0/8. Simplified:
the network is this machine's, nothing limits memory (what the kernel would say of it is in a file
that tests write), and the only image there is is this machine's interpreter with `/dayfly`.
"""

import base64
import contextlib
import copy
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Self

from tests.kubernetes.fake_api import FakeApi, Object, Refused

from dayfly_pool.drivers import guest

NODE = "fake"
END_S = 10.0
TROUBLES = {
    "ErrImageNeverPull": "Container image is not present with pull policy of Never",
    "ImagePullBackOff": "Back-off pulling image",
    "ErrImagePull": "rpc error: not found",
    "CreateContainerConfigError": "secret not found",
}
NEVER_SCHEDULED = "Unschedulable"
SLOW = "Slow"
FOLDERS = ("in", "out", "workspaces")
"""What pods for steps have besides."""


class Running:
    """One pod's processes. *pid* is that of its pid 1, as this machine has it."""

    def __init__(self, process: subprocess.Popen[bytes], pid: int, address: str) -> None:
        self.process, self.pid, self.address = process, pid, address
        self.is_lost = False

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def family(self) -> list[int]:
        """Every process of it."""
        found, new = [], [self.pid]
        while new:
            found.append(pid := new.pop())
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    new += [int(child) for child in task.read_text().split()]
        return found


class Kubelet:
    """Runs what `FakeApi` has. Use it as a context manager: at its end nothing of it is left.

    *trouble* is what becomes of pods that are created from now on: a reason of `TROUBLES`,
    `NEVER_SCHEDULED`, or `SLOW` until `go` is set.
    """

    def __init__(self, fake: FakeApi) -> None:
        self.fake = fake
        self.trouble = ""
        self.is_out_of_memory = False
        """Whether it says so of containers that end."""

        self.go = threading.Event()
        self.running: dict[str, Running] = {}
        self.most = 0
        """How many pods there were at once."""

        self._made = 0
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._is_over = False

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="dayfly-kubelet-"))
        self._folder.chmod(0o755)
        self._program = guest.install(self._folder)
        self.fake.attach(self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self.go.set()
        while True:
            with self._lock:
                for pod in self.running.values():
                    pod.kill(signal.SIGKILL)
                if not self._threads:
                    break
                thread = self._threads.pop()
            thread.join(END_S)
            assert not thread.is_alive(), "a pod does not end"
        shutil.rmtree(self._folder)

    # ---- what tests do --------------------------------------------------------------------------

    def pods(self) -> list[Object]:
        """Those that the API server has."""
        with self.fake.state.lock:
            kind = self.fake.state.resource("", "v1", "pods")
            return copy.deepcopy(list(self.fake.state.of(kind).values()))

    def freeze(self, name: str) -> None:
        """Its node is lost: nothing moves there any more, and nobody says so."""
        pod = self.running[name]
        pod.is_lost = True
        for pid in pod.family():
            os.kill(pid, signal.SIGSTOP)

    def memory(self, name: str) -> Path:
        """The folder of its control group, of which pods see what is written there."""
        return self._folder / f"{name}.cgroup"

    def evict(self, name: str) -> None:
        """As somebody does who deletes it, with the grace that it has asked for."""
        with self.fake.state.lock:
            kind = self.fake.state.resource("", "v1", "pods")
            self.fake.state.delete(kind, self.fake.state.get(kind, "default", name), {})

    # ---- what the API server says ---------------------------------------------------------------

    def _heard(self, what: str, obj: Object) -> None:
        name = obj["metadata"]["name"]
        if what == "created":
            with self.fake.state.lock:
                self.most = max(self.most, len(self.pods()))
            self._start(lambda: self._run(obj, self.trouble), f"pod-{name}")
        elif pod := self.running.get(name):
            if what == "removed":
                pod.kill(signal.SIGKILL)
            else:
                grace_s = obj["metadata"]["deletionGracePeriodSeconds"]
                self._start(lambda: self._end(pod, grace_s), f"end-{name}")
        elif what == "deleted":
            self._start(lambda: self.fake.remove(name), f"end-{name}")

    def _start(self, work: Any, name: str) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        with self._lock:
            self._threads = [each for each in self._threads if each.is_alive()]
            if not self._is_over:
                thread.start()
                self._threads.append(thread)

    def _end(self, pod: Running, grace_s: float) -> None:
        if pod.is_lost:
            return
        pod.kill(signal.SIGTERM)
        try:
            pod.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            pod.kill(signal.SIGKILL)

    # ---- a pod ----------------------------------------------------------------------------------

    def _run(self, obj: Object, trouble: str) -> None:
        name = obj["metadata"]["name"]
        if trouble == NEVER_SCHEDULED:
            said = {"reason": trouble, "message": "0/1 nodes are available", "status": "False"}
            self._say(name, {"conditions": [{"type": "PodScheduled"} | said]})
            return
        self._say(name, {"phase": "Pending"}, nodeName=NODE)
        if trouble in TROUBLES:
            waiting = {"waiting": {"reason": trouble, "message": TROUBLES[trouble]}}
            self._say(name, {"containerStatuses": [{"name": "sandbox", "state": waiting}]})
            return
        if trouble == SLOW:
            self.go.wait()
        with self._lock:
            self._made += 1
        if self._is_over or (pod := self._launch(obj)) is None:
            return
        with pod.process:
            self.running[name] = pod
            self._say(name, _up(pod.address))
            code = pod.process.wait()
            del self.running[name]
        if pod.is_lost:
            return
        code = code if code >= 0 else 128 - code
        why = "OOMKilled" if self.is_out_of_memory else "Error"
        ended = {"exitCode": code, "reason": "Completed" if code == 0 else why}
        state = [{"name": "sandbox", "state": {"terminated": ended}}]
        phase = "Failed" if code else "Succeeded"
        is_deleted = self._say(name, {"phase": phase, "containerStatuses": state})
        if is_deleted:
            self.fake.remove(name)

    def _say(self, name: str, status: Object, **spec: Any) -> bool:
        """Whether it is to be deleted."""
        with contextlib.suppress(Refused), self.fake.state.lock:
            self.fake.set_status(name, status, **spec)
            kind = self.fake.state.resource("", "v1", "pods")
            pod = self.fake.state.get(kind, "default", name)
            return "deletionTimestamp" in pod["metadata"]
        return False

    def _launch(self, obj: Object) -> Running | None:
        spec = obj["spec"]
        container, uid = spec["containers"][0], spec["securityContext"]["runAsUser"]
        if (secret := self._secret(spec)) is None:
            return None
        *command, written = container["command"]
        settings = json.loads(written)
        if (post := settings.get("pod")) is not None:
            post["host"] = address = free_address(post["port"])
        memory = self.memory(obj["metadata"]["name"])
        memory.mkdir()
        (memory / "memory.events").write_text("oom_kill 0\n")
        (memory / "memory.peak").write_text("1048576\n")
        base, root = os.path.realpath(sys.base_prefix), os.geteuid() == 0
        told, info = os.pipe()
        given, giver = os.pipe()
        os.write(giver, secret)
        os.close(giver)
        read_only = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache"]
        process = subprocess.Popen(
            [
                "bwrap", "--unshare-pid", "--unshare-ipc", "--die-with-parent", "--as-pid-1",
                "--info-fd", str(info), "--proc", "/proc", "--dev", "/dev",
                *(() if root else ("--unshare-user", "--uid", str(uid), "--gid", str(uid))),
                *(part for path in read_only for part in ("--ro-bind-try", path, path)),
                "--ro-bind", base, "/python", "--ro-bind", str(self._program), "/dayfly",
                *("--perms", "0755", "--dir", "/sys", "--perms", "0755", "--dir", "/sys/fs"),
                *("--ro-bind", str(memory), "/sys/fs/cgroup"),
                *("--perms", "1777", "--tmpfs", "/tmp", "--perms", "0777", "--tmpfs", "/code"),
                *(part for name in FOLDERS for part in ("--perms", "0777", "--tmpfs", f"/{name}")
                  if name in {volume["name"] for volume in spec["volumes"]}),
                *("--perms", "1777", "--tmpfs", "/dev/shm", "--perms", "0444"),
                *("--ro-bind-data", str(given), "/run/dayfly/secret"),
                "--clearenv", "--setenv", "PATH", "/python/bin:/usr/bin:/bin", "--chdir", "/",
                *(("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups",
                   "--inh-caps=-all", "--bounding-set=-all", "--pdeathsig=KILL") if root else ()),
                *command, json.dumps(settings),
            ],
            pass_fds=(info, given),
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(info)
        os.close(given)
        with open(told, "rb") as file:
            pid = json.loads(file.read())["child-pid"]
        return Running(process, pid, address)

    def _secret(self, spec: Object) -> bytes | None:
        """Of the entry that the pod's volume names; None when there is none."""
        (volume,) = [v["secret"] for v in spec["volumes"] if "secret" in v]
        with self.fake.state.lock:
            kind = self.fake.state.resource("", "v1", "secrets")
            found = self.fake.state.of(kind).get(("default", volume["secretName"]))
        if found is None or volume["items"][0]["key"] not in found["data"]:
            return None
        return base64.b64decode(found["data"][volume["items"][0]["key"]])


def _up(address: str) -> Object:
    return {
        "phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "hostIP": "127.0.0.1",
        "conditions": [{"type": t, "status": "True"} for t in ("PodScheduled", "Ready")],
        "containerStatuses": [{"name": "sandbox", "state": {"running": {}}}],
    }  # fmt: skip


def free_address(port: int) -> str:
    """One of this machine's, at which nobody serves *port*."""
    while True:
        address = "127." + ".".join(str(random.randint(1, 250)) for _ in range(3))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            return address
