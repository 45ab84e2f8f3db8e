"""What `dayfly doctor` concludes from what it finds. Nothing is started here."""

import json
from pathlib import Path
from typing import Any

import pytest

from dayfly_gateway import doctor
from dayfly_gateway.doctor import Check, Report, Switches
from dayfly_pool.drivers.cgroups import Tree
from dayfly_pool.models import Failure, Success, Timing

BWRAP = "/usr/bin/bwrap"
DENIED = "bwrap: setting up uid map: Permission denied"
NAMES = (*doctor.INDISPENSABLE, *doctor.WORTHWHILE, "apparmor", "uv", "data folder")


def report(*missing: str) -> Report:
    return Report([Check(name, name not in missing, "seen", "type this") for name in NAMES])


@pytest.mark.parametrize("name", doctor.INDISPENSABLE)
def test_without_an_indispensable_part_there_is_no_isolation(name: str) -> None:
    """Whatever else works."""
    assert report(name, "landlock").tier == "none"


@pytest.mark.parametrize("name", doctor.WORTHWHILE)
def test_without_landlock_or_cgroups_the_isolation_is_reduced(name: str) -> None:
    """Sandboxes still run, and the report names what is missing."""
    assert (report(name).tier, report(name).missing) == ("reduced", [name])


@pytest.mark.parametrize("missing", [(), ("uv",), ("data folder",)])
def test_what_does_not_isolate_does_not_change_the_tier(missing: tuple[str, ...]) -> None:
    """Building environments and keeping data are other matters."""
    assert report(*missing).tier == "full"


@pytest.mark.parametrize(
    ("system", "machine", "is_ok"),
    [
        ("Linux", "x86_64", True),
        ("Linux", "aarch64", True),
        ("Linux", "riscv64", False),
        ("Darwin", "arm64", False),
    ],
)
def test_only_machines_with_a_known_list_of_system_calls_will_do(
    system: str, machine: str, is_ok: bool
) -> None:
    """A filter of another machine's numbers would allow anything."""
    check = doctor.check_machine(system, "6.1", machine)

    assert (check.is_ok, bool(check.fix)) == (is_ok, not is_ok)


@pytest.mark.parametrize(
    ("path", "version", "is_ok"),
    [(None, "", False), (BWRAP, "", False), (BWRAP, "bubblewrap 0.11.0", True)],
)
def test_bwrap_must_be_there_and_run(path: str | None, version: str, is_ok: bool) -> None:
    """A missing library of it is as bad as no bwrap."""
    check = doctor.check_bwrap(path, version)

    assert check.is_ok is is_ok
    assert is_ok or "apt-get install" in check.fix


@pytest.mark.parametrize(
    ("switches", "fix"),
    [
        (Switches(user_namespaces_max="0"), "user.max_user_namespaces=15000"),
        (Switches(unprivileged_clone="0"), "kernel.unprivileged_userns_clone=1"),
        (Switches(apparmor="1"), "apparmor_parser --replace"),
        (Switches("0", "15000", "1"), "in a container"),
        (Switches(), "in a container"),
    ],
)
def test_the_setting_that_forbids_namespaces_is_named_with_its_fix(
    switches: Switches, fix: str
) -> None:
    """One fix, not a list to try."""
    check = doctor.check_namespaces(DENIED, "uid 1000", switches, BWRAP)

    assert (check.is_ok, check.result) == (False, f"as uid 1000: {DENIED}")
    assert fix in check.fix


def test_settings_do_not_matter_when_namespaces_can_be_made() -> None:
    """The trial decides: a profile may allow what the setting forbids."""
    assert doctor.check_namespaces("", "uid 1000", Switches(apparmor="1"), BWRAP).is_ok


@pytest.mark.parametrize(
    ("setting", "is_working", "is_ok"),
    [("", False, True), ("0", False, True), ("1", True, True), ("1", False, False)],
)
def test_apparmor_is_blamed_only_when_it_restricts_and_no_sandbox_ran(
    setting: str, is_working: bool, is_ok: bool
) -> None:
    """Ubuntu's own profile lets bwrap start and then takes the guest's capabilities away."""
    check = doctor.check_apparmor(Switches(apparmor=setting), is_working, "/opt/bwrap")

    assert check.is_ok is is_ok
    assert is_ok or "profile bwrap /opt/bwrap flags=(unconfined)" in check.fix


@pytest.mark.parametrize(
    ("status", "actions", "is_ok"),
    [
        ("Name:\tx\nSeccomp:\t0\n", "kill_process kill_thread errno trace log allow", True),
        ("Name:\tx\nSeccomp:\t0\n", "kill_thread errno allow", False),
        ("Name:\tx\n", "", False),
    ],
)
def test_seccomp_needs_every_action_of_the_filter(status: str, actions: str, is_ok: bool) -> None:
    """The filter is refused as a whole otherwise."""
    assert doctor.check_seccomp(status, actions).is_ok is is_ok


@pytest.mark.parametrize(
    ("abi", "modules", "text"),
    [
        (7, "", "ABI 7"),
        (0, "lockdown,yama\n", "add lsm=landlock,lockdown,yama to"),
        (0, "", "boot Linux 5.13 or newer"),
    ],
)
def test_landlock_is_missing_for_one_of_two_reasons(abi: int, modules: str, text: str) -> None:
    """Not switched on, or not in the kernel."""
    check = doctor.check_landlock(abi, modules)

    assert check.is_ok is bool(abi)
    assert text in f"{check.result} {check.fix}"


@pytest.mark.parametrize(
    ("tree", "is_v2", "is_root", "fix"),
    [
        (Tree(2, ("/x",)), True, False, ""),
        (Tree(1, ("/x",)), False, True, ""),
        (
            Tree(0, (), "cgroup v2 is here but not delegated: ..."),
            True,
            False,
            "systemd-run --user --scope -p Delegate=yes dayfly up",
        ),
        (Tree(0, (), "no writable cgroup for cpu"), True, False, "Delegate=cpu memory pids"),
        (Tree(0, (), "no writable cgroup"), False, False, "run `dayfly up` as root, or boot with"),
    ],
)
def test_cgroups_have_the_fix_for_how_they_are_missing(
    tree: Tree, is_v2: bool, is_root: bool, fix: str
) -> None:
    """Not delegated, without a controller, or of the old kind and another's."""
    check = doctor.check_cgroups(tree, is_v2, is_root)

    assert check.is_ok is bool(tree.version)
    assert fix in check.fix
    assert bool(check.fix) is bool(fix)


def status(**changed: str) -> Success:
    """What the probe reads inside a sandbox."""
    found = {"CapEff": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2"} | changed
    return Success(json.dumps(found).encode(), Timing("created", create_s=0.03, specialize_s=0.01))


def test_a_sandbox_is_sound_when_user_code_finds_itself_without_rights() -> None:
    """CapEff=0, NoNewPrivs=1, Seccomp=2, as the kernel says inside."""
    check = doctor.check_sandbox(status())

    assert check == Check("sandbox", True, "CapEff=0 NoNewPrivs=1 Seccomp=2, up in 40 ms")


@pytest.mark.parametrize(
    ("outcome", "result"),
    [
        (status(CapEff="0000000000200000"), "not locked down: CapEff=2097152"),
        (status(Seccomp="0"), "Seccomp=0"),
        (Failure("InitCrashed", "mount /code: denied"), "InitCrashed: mount /code: denied"),
        ("bwrap is gone", "bwrap is gone"),
    ],
)
def test_anything_else_is_no_sandbox(outcome: Any, result: str) -> None:
    """Also when it ran: rights that are left are worse than no start."""
    check = doctor.check_sandbox(outcome)

    assert not check.is_ok
    assert result in check.result


def test_a_data_folder_that_is_not_ours_has_a_fix() -> None:
    """With the folder and the uid in it, ready to be typed."""
    check = doctor.check_data(Path("/var/lib/dayfly"), is_writable=False)

    assert "/var/lib/dayfly, or name another with --data" in check.fix


def test_fixes_stand_below_the_table_uncut(capsys: pytest.CaptureFixture[str]) -> None:
    """They are to be copied; the table refers to them by number."""
    fix = "sudo " + "x" * 300
    Report([Check("bwrap", True, "fine"), Check("cgroups", False, "none", fix)]).show()
    lines = capsys.readouterr().out.splitlines()

    assert lines[1:3] == ["bwrap    ok            fine", "cgroups  MISSING  [1]  none"]
    assert f"[1] {fix}" in lines
    assert lines[-1] == "tier reduced: sandboxes are isolated, but this is missing: cgroups"


@pytest.mark.parametrize(("missing", "code"), [((), 0), (("landlock",), 1), (("bwrap",), 1)])
def test_the_exit_code_says_whether_the_isolation_is_full(
    missing: tuple[str, ...], code: int
) -> None:
    """So that a script can insist on it."""
    assert report(*missing).exit_code == code


def test_the_document_holds_every_check() -> None:
    """What is shown to people is there for scripts, too."""
    document = report("uv").document()

    assert (document["tier"], document["missing"]) == ("full", ["uv"])
    assert [check["name"] for check in document["checks"]] == list(NAMES)
    assert {"name", "ok", "result", "fix"} == set(document["checks"][0])
