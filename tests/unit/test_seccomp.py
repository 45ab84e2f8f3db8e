"""The seccomp filter, run by an interpreter of classic BPF: what passes, what does not, and how."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dayfly.seccomp import (
    ALLOWED,
    AUDIT_ARCH,
    FIRST_NEW_SYSCALL,
    X32_BIT,
    ZYGOTE_ALLOWED,
    program,
    syscalls,
)

ALLOW, KILL = "allow", "kill"
EPERM, ENOSYS, EAFNOSUPPORT = 1, 38, 97
NEW = """
    pidfd_send_signal io_uring_setup io_uring_enter io_uring_register open_tree move_mount
    fsopen fsconfig fsmount fspick pidfd_open clone3 close_range openat2 pidfd_getfd
    faccessat2 process_madvise epoll_pwait2 mount_setattr quotactl_fd
    landlock_create_ruleset landlock_add_rule landlock_restrict_self memfd_secret
    process_mrelease futex_waitv set_mempolicy_home_node cachestat fchmodat2
"""
"""From number 424 on, on every machine. "-": no such call."""

TABLES = {
    # the kernel's arch/x86/entry/syscalls/syscall_64.tbl, in order
    "x86_64": """
    read write open close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction
    rt_sigprocmask rt_sigreturn ioctl pread64 pwrite64 readv writev access pipe select
    sched_yield mremap msync mincore madvise shmget shmat shmctl dup dup2 pause nanosleep
    getitimer alarm setitimer getpid sendfile socket connect accept sendto recvfrom sendmsg
    recvmsg shutdown bind listen getsockname getpeername socketpair setsockopt getsockopt
    clone fork vfork execve exit wait4 kill uname semget semop semctl shmdt msgget msgsnd
    msgrcv msgctl fcntl flock fsync fdatasync truncate ftruncate getdents getcwd chdir
    fchdir rename mkdir rmdir creat link unlink symlink readlink chmod fchmod chown fchown
    lchown umask gettimeofday getrlimit getrusage sysinfo times ptrace getuid syslog getgid
    setuid setgid geteuid getegid setpgid getppid getpgrp setsid setreuid setregid getgroups
    setgroups setresuid getresuid setresgid getresgid getpgid setfsuid setfsgid getsid
    capget capset rt_sigpending rt_sigtimedwait rt_sigqueueinfo rt_sigsuspend sigaltstack
    utime mknod uselib personality ustat statfs fstatfs sysfs getpriority setpriority
    sched_setparam sched_getparam sched_setscheduler sched_getscheduler
    sched_get_priority_max sched_get_priority_min sched_rr_get_interval mlock munlock
    mlockall munlockall vhangup modify_ldt pivot_root _sysctl prctl arch_prctl adjtimex
    setrlimit chroot sync acct settimeofday mount umount2 swapon swapoff reboot sethostname
    setdomainname iopl ioperm create_module init_module delete_module get_kernel_syms
    query_module quotactl nfsservctl getpmsg putpmsg afs_syscall tuxcall security gettid
    readahead setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr listxattr llistxattr
    flistxattr removexattr lremovexattr fremovexattr tkill time futex sched_setaffinity
    sched_getaffinity set_thread_area io_setup io_destroy io_getevents io_submit io_cancel
    get_thread_area lookup_dcookie epoll_create epoll_ctl_old epoll_wait_old
    remap_file_pages getdents64 set_tid_address restart_syscall semtimedop fadvise64
    timer_create timer_settime timer_gettime timer_getoverrun timer_delete clock_settime
    clock_gettime clock_getres clock_nanosleep exit_group epoll_wait epoll_ctl tgkill utimes
    vserver mbind set_mempolicy get_mempolicy mq_open mq_unlink mq_timedsend mq_timedreceive
    mq_notify mq_getsetattr kexec_load waitid add_key request_key keyctl ioprio_set
    ioprio_get inotify_init inotify_add_watch inotify_rm_watch migrate_pages openat mkdirat
    mknodat fchownat futimesat newfstatat unlinkat renameat linkat symlinkat readlinkat
    fchmodat faccessat pselect6 ppoll unshare set_robust_list get_robust_list splice tee
    sync_file_range vmsplice move_pages utimensat epoll_pwait signalfd timerfd_create
    eventfd fallocate timerfd_settime timerfd_gettime accept4 signalfd4 eventfd2
    epoll_create1 dup3 pipe2 inotify_init1 preadv pwritev rt_tgsigqueueinfo perf_event_open
    recvmmsg fanotify_init fanotify_mark prlimit64 name_to_handle_at open_by_handle_at
    clock_adjtime syncfs sendmmsg setns getcpu process_vm_readv process_vm_writev kcmp
    finit_module sched_setattr sched_getattr renameat2 seccomp getrandom memfd_create
    kexec_file_load bpf execveat userfaultfd membarrier mlock2 copy_file_range preadv2
    pwritev2 pkey_mprotect pkey_alloc pkey_free statx io_pgetevents rseq
    """,
    # include/uapi/asm-generic/unistd.h
    "aarch64": """
    io_setup io_destroy io_submit io_cancel io_getevents setxattr lsetxattr fsetxattr
    getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr removexattr lremovexattr
    fremovexattr getcwd lookup_dcookie eventfd2 epoll_create1 epoll_ctl epoll_pwait dup dup3
    fcntl inotify_init1 inotify_add_watch inotify_rm_watch ioctl ioprio_set ioprio_get flock
    mknodat mkdirat unlinkat symlinkat linkat renameat umount2 mount pivot_root nfsservctl
    statfs fstatfs truncate ftruncate fallocate faccessat chdir fchdir chroot fchmod
    fchmodat fchownat fchown openat close vhangup pipe2 quotactl getdents64 lseek read write
    readv writev pread64 pwrite64 preadv pwritev sendfile pselect6 ppoll signalfd4 vmsplice
    splice tee readlinkat newfstatat fstat sync fsync fdatasync sync_file_range
    timerfd_create timerfd_settime timerfd_gettime utimensat acct capget capset personality
    exit exit_group waitid set_tid_address unshare futex set_robust_list get_robust_list
    nanosleep getitimer setitimer kexec_load init_module delete_module timer_create
    timer_gettime timer_getoverrun timer_settime timer_delete clock_settime clock_gettime
    clock_getres clock_nanosleep syslog ptrace sched_setparam sched_setscheduler
    sched_getscheduler sched_getparam sched_setaffinity sched_getaffinity sched_yield
    sched_get_priority_max sched_get_priority_min sched_rr_get_interval restart_syscall kill
    tkill tgkill sigaltstack rt_sigsuspend rt_sigaction rt_sigprocmask rt_sigpending
    rt_sigtimedwait rt_sigqueueinfo rt_sigreturn setpriority getpriority reboot setregid
    setgid setreuid setuid setresuid getresuid setresgid getresgid setfsuid setfsgid times
    setpgid getpgid getsid setsid getgroups setgroups uname sethostname setdomainname
    getrlimit setrlimit getrusage umask prctl getcpu gettimeofday settimeofday adjtimex
    getpid getppid getuid geteuid getgid getegid gettid sysinfo mq_open mq_unlink
    mq_timedsend mq_timedreceive mq_notify mq_getsetattr msgget msgctl msgrcv msgsnd semget
    semctl semtimedop semop shmget shmctl shmat shmdt socket socketpair bind listen accept
    connect getsockname getpeername sendto recvfrom setsockopt getsockopt shutdown sendmsg
    recvmsg readahead brk munmap mremap add_key request_key keyctl clone execve mmap
    fadvise64 swapon swapoff mprotect msync mlock munlock mlockall munlockall mincore
    madvise remap_file_pages mbind get_mempolicy set_mempolicy migrate_pages move_pages
    rt_tgsigqueueinfo perf_event_open accept4 recvmmsg - - - - - - - - - - - - - - - - wait4
    prlimit64 fanotify_init fanotify_mark name_to_handle_at open_by_handle_at clock_adjtime
    syncfs setns sendmmsg process_vm_readv process_vm_writev kcmp finit_module sched_setattr
    sched_getattr renameat2 seccomp getrandom memfd_create bpf execveat userfaultfd
    membarrier mlock2 copy_file_range preadv2 pwritev2 pkey_mprotect pkey_alloc pkey_free
    statx io_pgetevents rseq kexec_file_load
    """,
}
MACHINES = sorted(ALLOWED)
NUMBERS = {
    machine: {name: number for number, name in enumerate(table.split())}
    | {name: FIRST_NEW_SYSCALL + at for at, name in enumerate(NEW.split())}
    for machine, table in TABLES.items()
}
PROGRAMS = {
    (machine, zygote): list(struct.iter_unpack("=HBBI", program(machine, zygote=zygote)))
    for machine in MACHINES
    for zygote in (False, True)
}
FILTERED = ("clone", "socket", "socketpair", "ioctl", "prctl")
CLONE = {
    "thread": 0x3D0F00,  # what pthread_create asks for
    "fork": 0x1200011,
    "vfork": 0x4111,
}
NAMESPACES = {
    "time": 0x80,
    "mount": 0x20000,
    "cgroup": 0x2000000,
    "uts": 0x4000000,
    "ipc": 0x8000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
DANGEROUS = """\
    mount umount2 pivot_root chroot setns unshare ptrace process_vm_readv process_vm_writev bpf
    perf_event_open userfaultfd keyctl add_key request_key init_module finit_module delete_module
    kexec_load kexec_file_load reboot swapon swapoff acct personality quotactl name_to_handle_at
    open_by_handle_at setuid setgid setreuid setregid setresuid setresgid setgroups capset
    sethostname setdomainname settimeofday clock_settime clock_adjtime adjtimex syslog vhangup
    seccomp kcmp lookup_dcookie move_pages migrate_pages mbind set_mempolicy
    fanotify_init shmget shmat msgget semget mq_open vmsplice tee splice io_setup
"""


def run(
    machine: str, number: int, *args: int, arch: int | None = None, zygote: bool = False
) -> str | int:
    """What the filter, or a *zygote*'s, says: "allow", "kill", or the errno that it gives."""
    words = struct.pack("=iIQ6Q", number, arch or AUDIT_ARCH[machine], 0, *(*args, *[0] * 6)[:6])
    accumulator = at = 0
    while True:
        operation, if_true, if_false, k = PROGRAMS[machine, zygote][at]
        at += 1
        match operation:
            case 0x20:  # load the word at offset k
                (accumulator,) = struct.unpack_from("=I", words, k)
            case 0x06:  # return
                assert k in (0x7FFF0000, 0x80000000) or k & 0xFFFF0000 == 0x00050000
                return ALLOW if k == 0x7FFF0000 else KILL if k == 0x80000000 else k & 0xFFFF
            case 0x15:
                at += if_true if accumulator == k else if_false
            case 0x25:
                at += if_true if accumulator > k else if_false
            case 0x35:
                at += if_true if accumulator >= k else if_false
            case 0x45:
                at += if_true if accumulator & k else if_false
            case _:
                raise AssertionError(f"instruction {operation:#x}")


pytestmark = pytest.mark.parametrize("machine", MACHINES)


def test_every_name_in_the_list_has_the_kernels_number(machine: str):
    """A wrong number would open another system call, and say nothing."""
    wrong = {n: v for n, v in syscalls(machine).items() if NUMBERS[machine].get(n) != v}

    assert wrong == {}


def test_every_number_is_allowed_when_it_is_listed_and_refused_when_it_is_not(machine: str):
    """EPERM for the old ones; ENOSYS for the new, on which libraries fall back."""
    allowed = set(syscalls(machine).values())
    looked_into = {syscalls(machine)[name] for name in FILTERED}
    for number in set(range(600)) - looked_into:
        refusal = ENOSYS if number >= FIRST_NEW_SYSCALL else EPERM

        assert run(machine, number) == (ALLOW if number in allowed else refusal), number


def test_what_opens_the_kernel_is_refused(machine: str):
    """The kernel's own table gives the number, not our list."""
    open_ = [n for n in DANGEROUS.split() if run(machine, NUMBERS[machine][n]) != EPERM]

    assert open_ == []


@pytest.mark.parametrize("name", ["clone3", "io_uring_setup", "open_tree", "fsopen", "openat2",
                                  "mount_setattr", "memfd_secret", "pidfd_getfd"])  # fmt: skip
def test_new_calls_seem_not_to_exist(machine: str, name: str):
    """glibc falls back from clone3 to clone only when it answers ENOSYS."""
    assert run(machine, NUMBERS[machine][name]) == ENOSYS


@pytest.mark.parametrize("kind", CLONE)
def test_threads_and_processes_can_be_made(machine: str, kind: str):
    assert run(machine, syscalls(machine)["clone"], CLONE[kind]) == ALLOW


@pytest.mark.parametrize("kind", NAMESPACES)
@pytest.mark.parametrize("beside", [0, CLONE["fork"]])
def test_no_namespace_can_be_made(machine: str, kind: str, beside: int):
    assert run(machine, syscalls(machine)["clone"], beside | NAMESPACES[kind]) == EPERM


def test_sockets_are_unix_or_internet(machine: str):
    """No netlink, no packet, no vsock, no alg: each was a way into some kernel."""
    number = syscalls(machine)["socket"]
    allowed = [family for family in range(100) if run(machine, number, family) == ALLOW]

    assert allowed == [1, 2, 10]
    assert run(machine, number, 16) == EAFNOSUPPORT


@pytest.mark.parametrize("family", [0, 1, 2, 10, 16])
def test_socket_pairs_are_unix(machine: str, family: int):
    said = run(machine, syscalls(machine)["socketpair"], family)

    assert said == (ALLOW if family == 1 else EAFNOSUPPORT)


@pytest.mark.parametrize(
    ("request_", "is_allowed"),
    [(0x5401, True), (0x541B, True), (0x5421, True), (0x5412, False), (0x541C, False)],
)
@pytest.mark.parametrize("high", [0, 0xDEAD])
def test_nothing_can_be_typed_on_a_terminal(
    machine: str, request_: int, is_allowed: bool, high: int
):
    """TIOCSTI and TIOCLINUX; the kernel looks at the low word only, and so does the filter."""
    said = run(machine, syscalls(machine)["ioctl"], 0, high << 32 | request_)

    assert said == (ALLOW if is_allowed else EPERM)


@pytest.mark.parametrize("size", [0, 8, 16, 0x3FFF])
@pytest.mark.parametrize("direction", [0, 1, 2, 3])
def test_no_namespace_is_handed_out_or_told_of(machine: str, direction: int, size: int):
    """NS_GET_PARENT, NS_MNT_GET_NEXT and their kin, of any size and number; other kinds pass."""
    ioctl = syscalls(machine)["ioctl"]
    for kind in range(256):
        request_ = direction << 30 | size << 16 | kind << 8 | 1
        for zygote in (False, True):
            said = run(machine, ioctl, 0, request_, zygote=zygote)

            assert said == (EPERM if kind == 0xB7 else ALLOW), hex(request_)


@pytest.mark.parametrize(
    ("option", "is_allowed"),
    [
        (1, True),  # PDEATHSIG
        (4, True),  # DUMPABLE
        (15, True),  # NAME
        (38, True),  # NO_NEW_PRIVS
        (0x53564D41, True),  # VMA: glibc names its arenas
        (8, False),  # KEEPCAPS
        (22, False),  # SECCOMP
        (24, False),  # CAPBSET_DROP
        (28, False),  # SECUREBITS
        (35, False),  # MM: where /proc says that the program is
        (47, False),  # CAP_AMBIENT
        (0x59616D61, False),  # PTRACER
    ],
)
def test_a_process_may_rename_itself_and_not_change_its_rights(
    machine: str, option: int, is_allowed: bool
):
    assert run(machine, syscalls(machine)["prctl"], option) == (ALLOW if is_allowed else EPERM)


@pytest.mark.parametrize("number", [0, 1, 56, 101, 157, 520, 547])
def test_the_x32_numbers_kill(machine: str, number: int):
    """The same calls by other numbers, some with an ABI of their own, none of them filtered."""
    assert run(machine, X32_BIT | number) == KILL
    assert run(machine, -1 & 0x7FFFFFFF) == KILL


@pytest.mark.parametrize("arch", [0x40000003, 0x40000028, 0xC000003E + 1, 0xFFFFFFFF])
def test_a_foreign_architecture_kills(machine: str, arch: int):
    """On i386, number 11 is execve and 21 is mount: the list means nothing there."""
    assert run(machine, 0, arch=arch) == KILL


def test_the_other_machines_numbers_kill(machine: str):
    (other,) = set(MACHINES) - {machine}

    assert run(machine, 0, arch=AUDIT_ARCH[other]) == KILL


def test_the_program_fits_the_kernels_limit(machine: str):
    """BPF_MAXINSNS is 4096; the fewer, the faster every system call."""
    assert len(program(machine)) // 8 < 512


@given(
    number=st.integers(-(2**31), 2**31 - 1),
    args=st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6),
    arch=st.sampled_from([*AUDIT_ARCH.values(), 1]),
)
def test_every_call_gets_an_answer(machine: str, number: int, args: list[int], arch: int):
    """No path runs off the end, whatever a process passes."""
    said = run(machine, number, *args, arch=arch)

    assert said in (ALLOW, KILL, EPERM, ENOSYS, EAFNOSUPPORT)
    if arch != AUDIT_ARCH[machine]:
        assert said == KILL


# ---- a function's zygote ------------------------------------------------------------------------

ADDED = """
    setns unshare capset seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self
"""
WORDS = st.one_of(
    st.integers(0, 2**64 - 1), st.integers(0, 64), st.sampled_from([*NAMESPACES.values(), 1 << 32])
)


def added(machine: str, name: str, *args: int) -> str | int:
    return run(machine, NUMBERS[machine][name], *args, zygote=True)


def test_what_a_zygote_may_in_addition_is_what_its_forks_need(machine: str):
    """The kernel's own numbers, and no other name."""
    extra = {n: v for n, v in syscalls(machine, zygote=True).items() if n not in syscalls(machine)}

    assert extra == {name: NUMBERS[machine][name] for name in ADDED.split()}
    assert extra.keys() == {pair.partition("=")[0] for pair in ZYGOTE_ALLOWED[machine].split()}


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("setns", (3, 0x20000000)),  # into the pid namespace that is ready, for its child
        ("setns", (3, 0)),
        ("capset", (1, 1)),
        ("landlock_create_ruleset", (0, 0, 1)),
        ("landlock_add_rule", (3, 1, 1, 0)),
        ("landlock_restrict_self", (3, 0)),
    ],
)
def test_a_zygotes_forks_can_enter_what_is_ready_and_lock_themselves_down(
    machine: str, name: str, args: tuple[int, ...]
):
    """And a sandbox cannot."""
    refusal = ENOSYS if NUMBERS[machine][name] >= FIRST_NEW_SYSCALL else EPERM

    assert added(machine, name, *args) == ALLOW
    assert run(machine, NUMBERS[machine][name], *args) == refusal


@pytest.mark.parametrize("flags", [0, 1 << 32, *NAMESPACES.values()])
@pytest.mark.parametrize("beside", [0, *NAMESPACES.values(), 0x200, 0x400, 0x40000])
def test_of_namespaces_a_zygote_may_make_a_user_namespace_and_nothing_beside(
    machine: str, flags: int, beside: int
):
    """In that one our filter leaves nothing to do, and a mount namespace would be one to mount in.

    The filter sees the low 32 bits of the flags, and all that the kernel knows are in these.
    """
    wanted = flags | beside
    is_alone = wanted & 0xFFFFFFFF == NAMESPACES["user"]

    assert added(machine, "unshare", wanted) == (ALLOW if is_alone else EPERM)


@pytest.mark.parametrize("beside", [0, CLONE["fork"]])
@pytest.mark.parametrize("kind", NAMESPACES)
def test_a_zygote_makes_no_namespace_by_forking(machine: str, kind: str, beside: int):
    """Not even the one that it may unshare."""
    assert added(machine, "clone", beside | NAMESPACES[kind]) == EPERM


@pytest.mark.parametrize("mode", [0, 1, 2, 3, 4, 1 << 31])
@pytest.mark.parametrize("flags", [0, 1, 2, 4, 8, 16, 32, 9])
def test_a_zygote_installs_filters_and_none_with_a_listener(machine: str, mode: int, flags: int):
    """A listener (8) would answer for other processes; TSYNC (1) and the rest nobody needs."""
    said = added(machine, "seccomp", mode, flags)

    assert said == (ALLOW if (mode, flags) == (1, 0) else EPERM)


@pytest.mark.parametrize("option", [*range(80), 0x53564D41, 0x59616D61])
def test_a_zygote_gives_rights_away_and_takes_none(machine: str, option: int):
    """CAPBSET_DROP and CAP_AMBIENT on top of what any guest may ask; SECUREBITS and so on not."""
    number = syscalls(machine)["prctl"]
    expected = ALLOW if option in (24, 47) else run(machine, number, option)

    assert run(machine, number, option, zygote=True) == expected


def test_nothing_else_is_open_to_a_zygote(machine: str):
    """By number, whatever has a name: with no arguments, which no filter looks into."""
    extra = {NUMBERS[machine][name] for name in ADDED.split()}
    for number in set(range(600)) - extra:
        assert run(machine, number, zygote=True) == run(machine, number), number


def test_what_opens_the_kernel_is_refused_to_a_zygote(machine: str):
    """All but the four that are its own, one of which is looked into."""
    dangerous = {name for name in DANGEROUS.split() if name not in ADDED.split()}
    open_ = [name for name in dangerous if added(machine, name) != EPERM]

    assert open_ == []
    assert len(dangerous) == len(set(DANGEROUS.split())) - 4


@given(
    number=st.integers(0, 600) | st.integers(-(2**31), 2**31 - 1),
    args=st.lists(WORDS, min_size=6, max_size=6),
    arch=st.sampled_from([*AUDIT_ARCH.values(), 1]),
)
def test_a_zygotes_filter_differs_in_nothing_but_what_it_looks_into(
    machine: str, number: int, args: list[int], arch: int
):
    """Whatever is passed: sockets, terminals, foreign machines are judged by the same rules."""
    extra = {NUMBERS[machine][name] for name in (*ADDED.split(), "prctl")}
    said = run(machine, number, *args, arch=arch, zygote=True)

    if number not in extra or arch != AUDIT_ARCH[machine]:
        assert said == run(machine, number, *args, arch=arch)
    else:
        assert said in (ALLOW, EPERM)


def test_a_zygotes_program_fits_the_kernels_limit(machine: str):
    assert len(program(machine, zygote=True)) // 8 < 512
