"""A Kubernetes of one node on this machine, for as long as a command runs; as root.

    python -m tests.kubernetes.node run COMMAND...   the command, with a cluster in its environment:
                                                     that of $KUBECONFIG, else a node, else none
    python -m tests.kubernetes.node which            which one that is; fails where there is none
    python -m tests.kubernetes.node image FOLDER NAME ROOT COMMAND...
                                                     bring a folder there as an image

Kubernetes' programs, and `pause`, are those in $DAYFLY_KUBERNETES_HOME/bin, where somebody built
them (~/.cache/dayfly-kubernetes unless it is set); the others are Debian's. There is neither
kube-proxy nor DNS: see `services`. Pods are reached by their addresses, from this machine alone.

All of it, down to the pods, lives in one pid namespace with mounts of its own, and the keeper is
pid 1 there: it ends when the pipe closes that whoever asked for it holds, so also when that was
killed. Ports, bridge, subnets and control group are each node's own: several can be side by side.
"""

import contextlib
import hashlib
import io
import ipaddress
import json
import os
import random
import secrets
import select
import shlex
import shutil
import signal
import ssl
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.harness import free_port

ROOT: Final = Path(__file__).parents[2]
HOME: Final = Path(
    os.environ.get("DAYFLY_KUBERNETES_HOME") or Path.home() / ".cache/dayfly-kubernetes"
)
BIN: Final = HOME / "bin"
BUILT: Final = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "pause")
CNI: Final = Path("/usr/lib/cni")
DEBIANS: Final = {
    "etcd": "etcd-server", "containerd": "containerd", "ctr": "containerd", "runc": "runc",
    str(CNI / "bridge"): "containernetworking-plugins", "ip": "iproute2", "openssl": "openssl",
    "unshare": "util-linux",
}  # fmt: skip
CGROUPS: Final = Path("/sys/fs/cgroup")
OWN: Final = ("/run/containerd", "/run/netns", "/var/lib/cni", "/var/log/pods",
              "/var/log/containers")  # fmt: skip
"""Where these programs write whatever they are told: a node sees an empty folder of its own."""
PAUSE: Final = "localhost/pause:1"
READY_S_MAX: Final = 90.0
END_S_MAX: Final = 30.0


# ---- who asks for it ----------------------------------------------------------------------------


def is_built() -> bool:
    """Whether somebody built Kubernetes here."""
    return all((BIN / name).exists() for name in BUILT)


def which() -> str:
    """The cluster that a command would have; empty if none."""
    if kubeconfig := os.environ.get("KUBECONFIG"):
        return f"the cluster of {kubeconfig}"
    if is_built():
        said = subprocess.run([BIN / "kubelet", "--version"], capture_output=True, text=True)
        return f"the real cluster ({said.stdout.split()[-1].removeprefix('v')})"
    return ""


def none() -> str:
    """What is said where there is no cluster."""
    return f"the fake API server only; no KUBECONFIG, and no build of Kubernetes in {BIN}"


def run(command: list[str]) -> int:
    """The exit code of *command*, run with what cluster there is."""
    print(f"Kubernetes: {which() or none()}", flush=True)
    if os.environ.get("KUBECONFIG"):
        return _run(command, {"DAYFLY_TEST_KUBECONFIG": os.environ["KUBECONFIG"]})
    if not is_built():
        return _run(command, {})
    if lacking := {package for program, package in DEBIANS.items() if not shutil.which(program)}:
        sys.exit(f"a node needs what is missing here: apt-get install {' '.join(sorted(lacking))}")
    if os.geteuid():
        sys.exit("a node needs root: run it as root, or name a cluster in KUBECONFIG")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with kept() as variables:
        return _run(command, variables)


@contextlib.contextmanager
def kept() -> Iterator[dict[str, str]]:
    """The node is up while the block runs: what to set so that the tests find it."""
    command = ["unshare", "--pid", "--fork", "--mount", "--propagation", "private", "--mount-proc"]
    command += [sys.executable, "-m", "tests.kubernetes.node", "keep"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, start_new_session=True
    ) as keeper:
        assert keeper.stdout is not None
        if not (folder := keeper.stdout.readline().strip()):
            sys.exit("the node did not start: see above")
        loader = [sys.executable, "-m", "tests.kubernetes.node", "image", folder]
        yield {
            "KUBECONFIG": f"{folder}/kubeconfig",
            "DAYFLY_TEST_KUBECONFIG": f"{folder}/kubeconfig",
            "DAYFLY_TEST_IMAGE_LOADER": shlex.join(loader),
            "DAYFLY_TEST_SERVICES": "1",
        }


def _run(command: list[str], variables: Mapping[str, str]) -> int:
    """It ends with this process."""
    whole = ["setpriv", "--pdeathsig", "TERM", *command]
    with subprocess.Popen(whole, env={**os.environ, **variables}) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            raise


# ---- who keeps it -------------------------------------------------------------------------------


class Place(NamedTuple):
    """What a node has for its own."""

    folder: Path
    name: str
    """Of its bridge and of its control group."""
    pods: str
    services: str
    api: str
    token: str


def keep() -> None:
    """Start the node, say where it is, and end it when nobody holds the other end of stdin."""
    assert os.getpid() == 1, "everything that can be seen is killed at the end"
    with tempfile.TemporaryDirectory(prefix="dayfly-node-") as folder, _bridge() as (name, number):
        address = f"https://127.0.0.1:{free_port()}"
        subnets = (f"10.244.{number}.0/24", f"10.245.{number}.0/24")
        place = Place(Path(folder), name, *subnets, address, secrets.token_hex())
        node = Node(place)
        try:
            node.start()
            print(folder, flush=True)
            while not select.select([sys.stdin], [], [], 0.5)[0]:
                node.look()
        finally:
            _end(place)


class Node:
    """The programs of a node, started in order, each with its log in the node's folder."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._running: dict[int, str] = {}

    def start(self) -> None:
        """Be ready for pods. Raises RuntimeError."""
        for own in OWN:
            Path(own).mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", own], check=True)
        for hierarchy in _hierarchies():
            (hierarchy / self._place.name).mkdir()
        folder, common = self._place.folder, configure(self._place)
        subprocess.run(["mount", "--bind", folder / "hosts", "/etc/hosts"], check=True)
        clients, peers = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        self._start("containerd", "-c", folder / "containerd.toml")
        self._start(
            "etcd", "--data-dir", folder / "etcd", "--log-level", "error",
            "--listen-client-urls", clients, "--advertise-client-urls", clients,
            "--listen-peer-urls", peers,
        )  # fmt: skip
        self._until("etcd", lambda: _age(clients))
        self._start(
            BIN / "kube-apiserver", "--etcd-servers", clients, "--cert-dir", folder / "certs",
            "--bind-address", "127.0.0.1", "--secure-port", self._place.api.rpartition(":")[2],
            "--insecure-port", "0", "--authorization-mode", "RBAC", "--allow-privileged=true",
            "--token-auth-file", folder / "tokens.csv",
            "--service-cluster-ip-range", self._place.services,
            "--service-account-issuer", "https://kubernetes.default.svc",
            "--service-account-key-file", folder / "accounts.key",
            "--service-account-signing-key-file", folder / "accounts.key",
            "--kubelet-preferred-address-types", "Hostname",
            "--kubelet-client-certificate", folder / "asks.crt",
            "--kubelet-client-key", folder / "asks.key",
        )  # fmt: skip
        self._until("containerd", lambda: bool(_ctr(folder, "version")))
        (folder / "pause").mkdir()
        shutil.copy2(BIN / "pause", folder / "pause")
        load(folder, PAUSE, folder / "pause", ["/pause"])
        self._until("the API server", lambda: self._get("/readyz") == "ok")
        quiet = ("--leader-elect=false", "--port", "0", "--secure-port", "0")
        self._start(
            BIN / "kube-controller-manager", *common, *quiet,
            "--service-account-private-key-file", folder / "accounts.key",
            "--root-ca-file", folder / "certs/apiserver.crt",
        )  # fmt: skip
        self._start(BIN / "kube-scheduler", *common, *quiet)
        self._start(
            BIN / "kubelet", *common, "--config", folder / "kubelet.json",
            "--root-dir", folder / "kubelet", "--cert-dir", folder / "certs",
            "--hostname-override", "node", "--container-runtime", "remote",
            "--container-runtime-endpoint", f"unix://{folder}/containerd.sock",
        )  # fmt: skip
        self._until("the node", self._is_ready)
        default = "/api/v1/namespaces/default/serviceaccounts/default"
        self._until("an account for pods", lambda: "secrets" in json.loads(self._get(default)))

    def look(self) -> None:
        """Bury the dead, which all come to pid 1. Raises RuntimeError if one ran the node."""
        with contextlib.suppress(ChildProcessError):
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) > 0:
                if name := self._running.pop(pid, ""):
                    lines = (self._place.folder / f"{name}.log").read_text().splitlines()
                    raise RuntimeError("\n".join([f"{name} ended:", *lines[-10:]]))

    def _start(self, program: str | Path, *arguments: object) -> None:
        name = Path(program).name
        with (self._place.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(program), *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._place.folder,
                start_new_session=True,
            )
        self._running[process.pid] = name

    def _until(self, what: str, is_so: Callable[[], bool]) -> None:
        end = time.monotonic() + READY_S_MAX
        while time.monotonic() < end:
            with contextlib.suppress(OSError, KeyError, subprocess.CalledProcessError):
                if is_so():
                    return
            if select.select([sys.stdin], [], [], 0.2)[0]:
                raise RuntimeError("nobody waits for the node any more")
            self.look()
        raise RuntimeError(f"not in {READY_S_MAX:g} s: {what}")

    def _get(self, path: str) -> str:
        headers = {"Authorization": f"Bearer {self._place.token}"}
        request = urllib.request.Request(self._place.api + path, headers=headers)
        trust = ssl.create_default_context(cafile=self._place.folder / "certs/apiserver.crt")
        with urllib.request.urlopen(request, context=trust, timeout=5) as answer:
            text: str = answer.read().decode()
            return text

    def _is_ready(self) -> bool:
        nodes = json.loads(self._get("/api/v1/nodes"))["items"]
        told = {(c["type"], c["status"]) for node in nodes for c in node["status"]["conditions"]}
        return ("Ready", "True") in told


def configure(place: Place) -> tuple[str, ...]:
    """Write what the programs read; the arguments of those that speak to the API server."""
    folder, kubeconfig = place.folder, place.folder / "kubeconfig"
    (folder / "cni").mkdir()
    ranges = [[{"subnet": place.pods}]]
    routes = [{"dst": "0.0.0.0/0"}]
    ipam = {"type": "host-local", "dataDir": f"{folder}/ipam", "ranges": ranges, "routes": routes}
    bridge = {"type": "bridge", "bridge": place.name, "isGateway": True, "ipam": ipam}
    network = {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge, {"type": "loopback"}]}
    _write(folder / "cni/10-bridge.conflist", network)
    (folder / "containerd.toml").write_text(f"""version = 2
root = "{folder}/containerd"
state = "{folder}/containerd-state"
[grpc]
  address = "{folder}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI}"
    conf_dir = "{folder}/cni"
""")
    key = ["openssl", "genrsa", "-out", str(folder / "accounts.key"), "2048"]
    subprocess.run(key, check=True, capture_output=True)
    asks = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=asks"]
    asks += ["-keyout", str(folder / "asks.key"), "-out", str(folder / "asks.crt")]
    subprocess.run(asks, check=True, capture_output=True)
    (folder / "hosts").write_text("127.0.0.1 localhost node\n")  # the API server asks it for logs
    (folder / "tokens.csv").write_text(f'{place.token},admin,admin,"system:masters"\n')
    trusted = {"server": place.api, "certificate-authority": f"{folder}/certs/apiserver.crt"}
    _write(kubeconfig, {
        "apiVersion": "v1", "kind": "Config", "current-context": "node",
        "clusters": [{"name": "node", "cluster": trusted}],
        "users": [{"name": "admin", "user": {"token": place.token}}],
        "contexts": [{"name": "node", "context": {"cluster": "node", "user": "admin"}}],
    })  # fmt: skip
    _write(folder / "kubelet.json", {
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "address": "127.0.0.1", "port": free_port(), "readOnlyPort": 0, "healthzPort": 0,
        "authentication": {
            "anonymous": {"enabled": False}, "webhook": {"enabled": False},
            "x509": {"clientCAFile": f"{folder}/asks.crt"},
        },
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs", "cgroupRoot": f"/{place.name}", "enforceNodeAllocatable": [],
        "volumePluginDir": f"{folder}/plugins", "makeIPTablesUtilChains": False,
        "failSwapOn": False, "oomScoreAdj": 0, "imageGCHighThresholdPercent": 100,
        "evictionHard": {
            "imagefs.available": "1%", "nodefs.available": "1%", "memory.available": "50Mi",
        },
    })  # fmt: skip
    return ("--kubeconfig", str(kubeconfig))


def _age(etcd: str) -> bool:
    """Some history, so that there is a past that the API server does not know, as anywhere else."""
    for _ in range(3):
        told = b'{"key": "cGFzdA==", "value": ""}'
        urllib.request.urlopen(f"{etcd}/v3/kv/put", data=told, timeout=5).close()
    return True


def _write(path: Path, content: Any) -> None:
    path.touch(mode=0o600)
    path.write_text(json.dumps(content))


@contextlib.contextmanager
def _bridge() -> Iterator[tuple[str, int]]:
    """A bridge and the number of its subnets, which nobody else on this machine has."""
    listed = json.loads(subprocess.check_output(["ip", "-json", "route"]))
    taken = [ipaddress.ip_network(r["dst"]) for r in listed if r["dst"] != "default"]
    for number in random.sample(range(1, 255), 254):
        own = [ipaddress.ip_network(f"10.{kind}.{number}.0/24") for kind in (244, 245)]
        name = f"dayfly{number}"
        add = ["ip", "link", "add", name, "type", "bridge"]
        if any(a.overlaps(b) for a in own for b in taken):
            continue
        if not subprocess.run(add, capture_output=True).returncode:
            break
    else:
        raise RuntimeError("no subnet is left in 10.244.0.0/16")
    try:
        yield name, number
    finally:
        subprocess.run(["ip", "link", "delete", name], check=True)


def _hierarchies() -> list[Path]:
    """Version 1 has one for each controller, version 2 one for all."""
    if (CGROUPS / "cgroup.procs").exists():
        return [CGROUPS]
    return [path for path in CGROUPS.iterdir() if (path / "cgroup.procs").exists()]


def _end(place: Place) -> None:
    """Nothing of the node stays; what is killed here is all that this namespace has."""
    assert os.getpid() == 1
    end = time.monotonic() + END_S_MAX
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        while time.monotonic() < end:
            os.kill(-1, signal.SIGKILL)
            while os.waitpid(-1, os.WNOHANG)[0] > 0:
                pass
            time.sleep(0.02)
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    below = [mount for mount in mounts if mount.startswith(f"{place.folder}/")]
    for mount in reversed(below):
        subprocess.run(["umount", "-l", mount], check=False)
    for hierarchy in _hierarchies():
        for folder, _, _ in os.walk(hierarchy / place.name, topdown=False):
            os.rmdir(folder)


# ---- images -------------------------------------------------------------------------------------


def load(folder: Path, name: str, root: Path, command: list[str]) -> None:
    """Bring the folder *root* to the node in *folder* as the image *name*, of one layer."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        layer, archive = Path(place, "layer.tar"), Path(place, "image.tar")
        with tarfile.open(layer, "w") as packed:
            packed.add(root, arcname=".", filter=_of_root)
        with layer.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        config = {
            "architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
            "config": {"Cmd": command, "Env": ["PATH=/usr/local/bin:/usr/bin:/bin"]},
        }  # fmt: skip
        manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
        with tarfile.open(archive, "w") as whole:
            for member, content in (("config.json", config), ("manifest.json", manifest)):
                data = json.dumps(content).encode()
                header = tarfile.TarInfo(member)
                header.size = len(data)
                whole.addfile(header, io.BytesIO(data))
            whole.add(layer, arcname="layer.tar")
        layer.unlink()
        _ctr(folder, "images", "import", str(archive))


def _of_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _ctr(folder: Path, *arguments: str) -> str:
    """One call of containerd's client."""
    command = ["ctr", "--address", f"{folder}/containerd.sock", "--namespace", "k8s.io"]
    return subprocess.check_output([*command, *arguments], stderr=subprocess.PIPE, text=True)


def main(words: list[str]) -> None:
    """What the command line says."""
    match words:
        case ["run", _, *_]:
            sys.exit(run(words[1:]))
        case ["which"]:
            print(f"Kubernetes: {which() or none()}")
            sys.exit(not which())
        case ["image", folder, name, root, *command]:
            load(Path(folder), name, Path(root), command)
        case ["keep"]:
            keep()
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
