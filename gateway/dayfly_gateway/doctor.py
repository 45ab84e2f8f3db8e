"""`dayfly doctor`: which isolation this machine gives, proven by starting a sandbox.

Each `check_*` judges facts that it is given and touches nothing; `examine` gathers the facts.
"""

import asyncio
import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import click

from dayfly import lockdown, seccomp
from dayfly_gateway import show
from dayfly_pool.config import Config
from dayfly_pool.drivers import cgroups
from dayfly_pool.drivers.linux import CAPABILITIES, LinuxDriver, find_bwrap
from dayfly_pool.errors import PlatformError
from dayfly_pool.models import (
    BASE,
    Environment,
    Failure,
    Function,
    FunctionId,
    FunctionSpec,
    Invocation,
    InvocationId,
    Mold,
    Outcome,
)
from dayfly_pool.packages import PackageStore, pack
from dayfly_pool.pool import Pool

Tier = Literal["full", "reduced", "none"]

TRIAL_S_MAX: Final = 10.0
SANDBOX_S_MAX: Final = 30.0
INDISPENSABLE: Final = ("machine", "bwrap", "namespaces", "seccomp", "sandbox")
"""Without one of these there is no isolation worth the name."""
WORTHWHILE: Final = ("landlock", "cgroups")
TIERS: Final[Mapping[Tier, str]] = {
    "full": "namespaces, seccomp, Landlock and cgroups hold every sandbox",
    "reduced": "sandboxes are isolated, but this is missing",
    "none": "only `--driver process` runs here: no isolation, for your own code only",
}
PROBE: Final = """\
def handler(event, context):
    with open("/proc/self/status") as file:
        lines = dict(line.split(":\\t", 1) for line in file.read().splitlines() if ":\\t" in line)
    return {name: lines[name].strip() for name in ("CapEff", "NoNewPrivs", "Seccomp")}
"""
LOCKED: Final = {"CapEff": 0, "NoNewPrivs": 1, "Seccomp": 2}


class Check(NamedTuple):
    """One thing looked at; *fix* is what to type when it is not well."""

    name: str
    is_ok: bool
    result: str
    fix: str = ""


class Report(NamedTuple):
    """All of them, and what they amount to."""

    checks: Sequence[Check]

    @property
    def tier(self) -> Tier:
        """The isolation that sandboxes have here."""
        bad = {check.name for check in self.checks if not check.is_ok}
        if bad.intersection(INDISPENSABLE):
            return "none"
        return "reduced" if bad.intersection(WORTHWHILE) else "full"

    @property
    def exit_code(self) -> int:
        """0 for the full isolation, else 1."""
        return int(self.tier != "full")

    @property
    def missing(self) -> list[str]:
        """The names of the checks that failed."""
        return [check.name for check in self.checks if not check.is_ok]

    def document(self) -> dict[str, Any]:
        """For scripts."""
        checks = [
            {"name": c.name, "ok": c.is_ok, "result": c.result, "fix": c.fix} for c in self.checks
        ]
        return {"tier": self.tier, "missing": self.missing, "checks": checks}

    def show(self) -> None:
        """For people. Fixes stand below the table, uncut, so that they can be copied."""
        fixes = [check.fix for check in self.checks if check.fix]
        rows = [
            (c.name, "ok" if c.is_ok else "MISSING", mark(fixes, c.fix), c.result)
            for c in self.checks
        ]
        show.table(("CHECK", "STATE", "FIX", "RESULT"), rows)
        for fix in fixes:
            click.echo(f"\n{mark(fixes, fix)} {fix}")
        lacking = f": {', '.join(self.missing)}" if self.tier == "reduced" else ""
        colour = {"full": "green", "reduced": "yellow", "none": "red"}[self.tier]
        tier = click.style(f"tier {self.tier}", fg=colour, bold=True)
        click.echo(f"\n{tier}: {TIERS[self.tier]}{lacking}")


def mark(fixes: Sequence[str], fix: str) -> str:
    """The number by which the table refers to a fix."""
    return f"[{fixes.index(fix) + 1}]" if fix else ""


# ---- judging ------------------------------------------------------------------------------------


def check_machine(system: str, release: str, machine: str) -> Check:
    """Linux, and a machine whose system calls the seccomp filter knows."""
    result = f"{system} {release} on {machine}"
    if system != "Linux":
        return Check("machine", False, result, "run Dayfly on Linux: a virtual machine will do")
    if machine not in seccomp.ALLOWED:
        known = " or ".join(seccomp.ALLOWED)
        return Check("machine", False, result, f"use a machine of type {known}")
    return Check("machine", True, result)


def check_bwrap(path: str | None, version: str) -> Check:
    """bwrap is there and runs."""
    if path is None:
        return Check("bwrap", False, "not installed", "sudo apt-get install bubblewrap")
    if not version:
        why = f"{path} does not run"
        return Check("bwrap", False, why, "sudo apt-get install --reinstall bubblewrap")
    return Check("bwrap", True, f"{path}, {version}")


class Switches(NamedTuple):
    """The kernel's settings that can forbid namespaces; "" where the kernel has no such setting."""

    apparmor: str = ""
    user_namespaces_max: str = ""
    unprivileged_clone: str = ""


def check_namespaces(trial: str, whose: str, switches: Switches, bwrap: str) -> Check:
    """*trial* is what bwrap said when it failed to make them, empty when it made them."""
    if not trial:
        return Check("namespaces", True, f"bwrap makes them, as {whose}")
    fix = forbidden_by(switches, bwrap) or (
        "in a container: run it with --privileged, or with seccomp and AppArmor unconfined; "
        "else ask whoever hardened this kernel to allow user namespaces"
    )
    return Check("namespaces", False, f"as {whose}: {trial}", fix)


def forbidden_by(switches: Switches, bwrap: str) -> str:
    """What to type against the setting that forbids namespaces; empty when none does."""
    if switches.user_namespaces_max == "0":
        return persistently("user.max_user_namespaces=15000")
    if switches.unprivileged_clone == "0":
        return persistently("kernel.unprivileged_userns_clone=1")
    if switches.apparmor == "1":
        return allowed_by_apparmor(bwrap)
    return ""


def persistently(setting: str) -> str:
    """Set a sysctl now and for every boot."""
    return f"echo {setting} | sudo tee -a /etc/sysctl.d/60-dayfly.conf && sudo sysctl --system"


def allowed_by_apparmor(bwrap: str) -> str:
    """Let bwrap, and only it, make namespaces in which it keeps its capabilities.

    Ubuntu's own profile bwrap-userns-restrict is not enough: it takes the capabilities away from
    what bwrap starts, and the guest needs them until its lock-down.
    """
    profile = (
        "abi <abi/4.0>,\\ninclude <tunables/global>\\n"
        f"profile bwrap {bwrap} flags=(unconfined) {{\\n  userns,\\n}}\\n"
    )
    return (
        f"printf '{profile}' | sudo tee /etc/apparmor.d/bwrap && "
        "sudo apparmor_parser --replace /etc/apparmor.d/bwrap"
    )


def check_apparmor(switches: Switches, is_working: bool, bwrap: str) -> Check:
    """Whether AppArmor stands in the way; *is_working*: a whole sandbox was started."""
    if switches.apparmor != "1":
        return Check("apparmor", True, "does not restrict user namespaces")
    if is_working:
        return Check("apparmor", True, "restricts user namespaces, but not for bwrap")
    result = "kernel.apparmor_restrict_unprivileged_userns is 1"
    return Check("apparmor", False, result, allowed_by_apparmor(bwrap))


def check_seccomp(status: str, actions: str) -> Check:
    """The kernel can filter system calls, with the actions that the filter uses."""
    needed = {"kill_process", "errno", "allow"}
    if "Seccomp:" in status and needed <= set(actions.split()):
        return Check("seccomp", True, "filters with " + " ".join(sorted(needed)))
    return Check("seccomp", False, "not in this kernel", "boot a kernel with CONFIG_SECCOMP_FILTER")


def check_landlock(abi: int, modules: str) -> Check:
    """The kernel can take the file system away from a process for good."""
    if abi:
        return Check("landlock", True, f"ABI {abi}")
    active = modules.strip()
    if not active:
        return Check("landlock", False, "not in this kernel", "boot Linux 5.13 or newer with it")
    fix = (
        f"add lsm=landlock,{active} to GRUB_CMDLINE_LINUX in /etc/default/grub, "
        "then: sudo update-grub && sudo reboot"
    )
    return Check("landlock", False, f"not among the active modules ({active})", fix)


def check_cgroups(tree: cgroups.Tree, is_v2: bool, is_root: bool) -> Check:
    """Memory, processes and CPU of a whole sandbox can be limited."""
    if tree.version:
        return Check("cgroups", True, f"v{tree.version}, writable")
    if not is_v2:
        as_root = "" if is_root else "run `dayfly up` as root, or "
        fix = f"{as_root}boot with systemd.unified_cgroup_hierarchy=1, which gives cgroup v2"
    elif "not delegated" in tree.reason:
        fix = "systemd-run --user --scope -p Delegate=yes dayfly up"
    else:
        fix = (
            "sudo mkdir -p /etc/systemd/system/user@.service.d && printf "
            "'[Service]\\nDelegate=cpu memory pids\\n' | sudo tee "
            "/etc/systemd/system/user@.service.d/dayfly.conf && sudo systemctl daemon-reload, "
            "log in again, then: systemd-run --user --scope -p Delegate=yes dayfly up"
        )
    return Check("cgroups", False, f"{tree.reason}; memory is limited a process only", fix)


def check_sandbox(outcome: Outcome | str) -> Check:
    """User code ran in a whole sandbox, and found itself without rights; a str says why not."""
    fix = "report this with the output of `dayfly doctor --json`, if nothing above is missing"
    if isinstance(outcome, str):
        return Check("sandbox", False, outcome, fix)
    if isinstance(outcome, Failure):
        return Check("sandbox", False, f"{outcome.kind}: {outcome.message}", fix)
    found = {name: int(value, 16) for name, value in json.loads(outcome.body).items()}
    told = " ".join(f"{name}={value}" for name, value in found.items())
    if found != LOCKED:
        return Check("sandbox", False, f"not locked down: {told}", fix)
    timing = outcome.timing
    milliseconds = ((timing.create_s or 0) + (timing.specialize_s or 0)) * 1000
    return Check("sandbox", True, f"{told}, up in {milliseconds:.0f} ms")


def check_uv(path: str | None) -> Check:
    """Environments can be built. No part of the isolation."""
    if path is None:
        return Check("uv", False, "not found: no requirements.txt can be built", "pip install uv")
    return Check("uv", True, path)


def check_data(folder: Path, is_writable: bool) -> Check:
    """Declarations and code can be kept. No part of the isolation."""
    if is_writable:
        return Check("data folder", True, str(folder))
    fix = f"sudo install -d -o {os.geteuid()} -m 700 {folder}, or name another with --data"
    return Check("data folder", False, f"{folder} cannot be written", fix)


# ---- gathering ----------------------------------------------------------------------------------


def examine(data: Path) -> Report:
    """Look at everything; starts one sandbox in a temporary folder and leaves nothing behind."""
    here = os.uname()
    machine = check_machine(here.sysname, here.release, here.machine)
    if not machine.is_ok:
        return Report([machine])
    path = find_bwrap()
    bwrap = check_bwrap(path, _version(path) if path else "")
    switches = Switches(
        _sysctl("kernel/apparmor_restrict_unprivileged_userns"),
        _sysctl("user/max_user_namespaces"),
        _sysctl("kernel/unprivileged_userns_clone"),
    )
    whose = f"uid {_uid()}"
    trial = _trial(path) if path and bwrap.is_ok else "there is no bwrap"
    can_start = not trial
    sandbox = check_sandbox(_sandboxed() if can_start else "not tried: there are no namespaces")
    checks = [
        machine,
        bwrap,
        check_namespaces(trial, whose, switches, path or "/usr/bin/bwrap"),
        check_apparmor(switches, sandbox.is_ok, path or "/usr/bin/bwrap"),
        check_seccomp(_read("/proc/self/status"), _sysctl("kernel/seccomp/actions_avail")),
        check_landlock(lockdown.landlock_abi(), _read("/sys/kernel/security/lsm")),
        check_cgroups(cgroups.detect(), _is_v2(), os.geteuid() == 0),
        sandbox,
        check_uv(_uv()),
        check_data(data, _is_writable(data)),
    ]
    return Report(checks)


def _uid() -> int:
    """Who a sandbox is outside: as root, an unprivileged uid; else ourselves."""
    return os.geteuid() or Config(data=Path()).uid_first


def _trial(bwrap: str) -> str:
    """Make the namespaces as the driver does; what bwrap says when it cannot."""
    command = [bwrap, "--unshare-all", "--uid", "0", "--gid", "0", "--cap-drop", "ALL"]
    for capability in CAPABILITIES:
        command += ["--cap-add", capability]
    command += ["--die-with-parent", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"]
    as_other: dict[str, Any] = {}
    if os.geteuid() == 0:
        as_other = {"user": _uid(), "group": _uid(), "extra_groups": []}
    return _said([*command, "--", "/bin/true"], **as_other)


def _said(command: Sequence[str], **how: Any) -> str:
    """Empty when *command* succeeds, else the last line of what it said."""
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=TRIAL_S_MAX, env={}, cwd="/", check=False, **how
        )
    except subprocess.TimeoutExpired:
        return f"no end within {TRIAL_S_MAX:g} s"
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return ""
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def _version(bwrap: str) -> str:
    try:
        done = subprocess.run(
            [bwrap, "--version"], capture_output=True, timeout=TRIAL_S_MAX, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace").strip()


def _sandboxed() -> Outcome | str:
    """Run the probe in a sandbox of a pool of its own; a str says why that did not work."""
    heard = _Heard()
    logger = logging.getLogger("dayfly")
    logger.addHandler(heard)
    logger.propagate = False
    try:
        with tempfile.TemporaryDirectory(prefix="dayfly-doctor-") as folder:
            return asyncio.run(_probed(Path(folder)))
    except (PlatformError, OSError, TimeoutError) as error:
        return "; ".join([str(error) or type(error).__name__, *heard.lines[-2:]])
    finally:
        logger.removeHandler(heard)
        logger.propagate = True


class _Heard(logging.Handler):
    """Keeps what the driver warns of: it explains a failure."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.lines.append(record.getMessage())


async def _probed(folder: Path) -> Outcome:
    digest = await asyncio.to_thread(_stored, folder)
    config = Config(data=folder, generic_min=0, generic_max=1, sandboxes_max=2)
    pool = Pool(config, LinuxDriver(config))
    spec = FunctionSpec(handler="probe:handler", package=digest)
    id_ = FunctionId("doctor/probe")
    async with pool.running(), asyncio.timeout(SANDBOX_S_MAX):
        pool.deploy(Function(id_, "1", spec, Mold(BASE)), Environment(digest=BASE))
        return await pool.invoke(
            Invocation(InvocationId("doctor"), id_, b"{}", queue_s_max=TRIAL_S_MAX)
        )


def _stored(folder: Path) -> str:
    source = folder / "probe.py"
    source.write_text(PROBE)
    return PackageStore(folder / "packages").put(pack(source))


def _uv() -> str | None:
    try:
        import uv

        return uv.find_uv_bin()
    except (ImportError, FileNotFoundError):
        return None


def _is_writable(folder: Path) -> bool:
    """Whether it can be written, or made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _is_v2() -> bool:
    return os.path.exists(f"{cgroups.MOUNT}/cgroup.controllers")


def _sysctl(name: str) -> str:
    return _read(f"/proc/sys/{name}").strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
