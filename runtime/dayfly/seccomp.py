"""The seccomp filters that guests run under: an allow-list, compiled to classic BPF.

Nothing here performs I/O. What is not listed answers EPERM, or ENOSYS where libraries are known to
fall back on that (everything newer than Linux 5.1, `clone3` among it: its flags are behind a
pointer that a filter cannot read). A foreign ABI (x32, i386) kills the process. A function's zygote
may call a little more, until its forks take the full filter.
"""

import struct
from typing import Final

ALLOWED: Final = {
    "x86_64": """
    read=0 write=1 readv=19 writev=20 pread64=17 pwrite64=18 preadv=295 pwritev=296 preadv2=327
    pwritev2=328 lseek=8 close=3 close_range=436 open=2 openat=257 creat=85 stat=4 fstat=5 lstat=6
    newfstatat=262 statx=332 access=21 faccessat=269 faccessat2=439 readlink=89 readlinkat=267
    getdents=78 getdents64=217 getcwd=79 chdir=80 fchdir=81 mkdir=83 mkdirat=258 rmdir=84
    unlink=87 unlinkat=263 rename=82 renameat=264 renameat2=316 link=86 linkat=265 symlink=88
    symlinkat=266 chmod=90 fchmod=91 fchmodat=268 fchmodat2=452 chown=92 fchown=93 lchown=94
    fchownat=260 umask=95 utime=132 utimes=235 utimensat=280 futimesat=261 truncate=76
    ftruncate=77 fallocate=285 fsync=74 fdatasync=75 sync_file_range=277 flock=73 fcntl=72
    ioctl=16 dup=32 dup2=33 dup3=292 pipe=22 pipe2=293 mknod=133 mknodat=259 statfs=137
    fstatfs=138 sendfile=40 copy_file_range=326 fadvise64=221 readahead=187 getxattr=191
    lgetxattr=192 fgetxattr=193 listxattr=194 llistxattr=195 flistxattr=196 setxattr=188
    fsetxattr=190 removexattr=197 fremovexattr=199 poll=7 ppoll=271 select=23 pselect6=270
    epoll_create=213 epoll_create1=291 epoll_ctl=233 epoll_wait=232 epoll_pwait=281
    epoll_pwait2=441 eventfd=284 eventfd2=290 timerfd_create=283 timerfd_settime=286
    timerfd_gettime=287 signalfd=282 signalfd4=289 inotify_init=253 inotify_init1=294
    inotify_add_watch=254 inotify_rm_watch=255 memfd_create=319 mmap=9 munmap=11 mprotect=10
    mremap=25 madvise=28 msync=26 mincore=27 brk=12 mlock=149 munlock=150 mlock2=325
    membarrier=324 pkey_alloc=330 pkey_free=331 pkey_mprotect=329 clone=56 fork=57 vfork=58
    execve=59 exit=60 exit_group=231 wait4=61 waitid=247 kill=62 tkill=200 tgkill=234
    pidfd_open=434 pidfd_send_signal=424 set_tid_address=218 set_robust_list=273
    get_robust_list=274 rseq=334 arch_prctl=158 prctl=157 futex=202 sched_yield=24
    sched_getaffinity=204 sched_setaffinity=203 sched_getparam=143 sched_getscheduler=145
    sched_get_priority_max=146 sched_get_priority_min=147 getpriority=140 setpriority=141
    getcpu=309 rt_sigaction=13 rt_sigprocmask=14 rt_sigpending=127 rt_sigreturn=15
    rt_sigsuspend=130 rt_sigtimedwait=128 sigaltstack=131 restart_syscall=219 pause=34 alarm=37
    getitimer=36 setitimer=38 timer_create=222 timer_settime=223 timer_gettime=224
    timer_delete=226 timer_getoverrun=225 nanosleep=35 clock_nanosleep=230 clock_gettime=228
    clock_getres=229 gettimeofday=96 time=201 times=100 getpid=39 getppid=110 gettid=186
    getpgid=121 getpgrp=111 setpgid=109 getsid=124 setsid=112 getuid=102 geteuid=107 getgid=104
    getegid=108 getresuid=118 getresgid=120 getgroups=115 capget=125 getrlimit=97 setrlimit=160
    prlimit64=302 getrusage=98 sysinfo=99 uname=63 getrandom=318 socket=41 socketpair=53 bind=49
    listen=50 accept=43 accept4=288 connect=42 getsockname=51 getpeername=52 getsockopt=55
    setsockopt=54 sendto=44 recvfrom=45 sendmsg=46 recvmsg=47 sendmmsg=307 recvmmsg=299
    shutdown=48
    """,
    "aarch64": """
    read=63 write=64 readv=65 writev=66 pread64=67 pwrite64=68 preadv=69 pwritev=70 preadv2=286
    pwritev2=287 lseek=62 close=57 close_range=436 openat=56 fstat=80 newfstatat=79 statx=291
    faccessat=48 faccessat2=439 readlinkat=78 getdents64=61 getcwd=17 chdir=49 fchdir=50
    mkdirat=34 unlinkat=35 renameat=38 renameat2=276 linkat=37 symlinkat=36 fchmod=52 fchmodat=53
    fchmodat2=452 fchown=55 fchownat=54 umask=166 utimensat=88 truncate=45 ftruncate=46
    fallocate=47 fsync=82 fdatasync=83 sync_file_range=84 flock=32 fcntl=25 ioctl=29 dup=23
    dup3=24 pipe2=59 mknodat=33 statfs=43 fstatfs=44 sendfile=71 copy_file_range=285 fadvise64=223
    readahead=213 getxattr=8 lgetxattr=9 fgetxattr=10 listxattr=11 llistxattr=12 flistxattr=13
    setxattr=5 fsetxattr=7 removexattr=14 fremovexattr=16 ppoll=73 pselect6=72 epoll_create1=20
    epoll_ctl=21 epoll_pwait=22 epoll_pwait2=441 eventfd2=19 timerfd_create=85 timerfd_settime=86
    timerfd_gettime=87 signalfd4=74 inotify_init1=26 inotify_add_watch=27 inotify_rm_watch=28
    memfd_create=279 mmap=222 munmap=215 mprotect=226 mremap=216 madvise=233 msync=227 mincore=232
    brk=214 mlock=228 munlock=229 mlock2=284 membarrier=283 pkey_alloc=289 pkey_free=290
    pkey_mprotect=288 clone=220 execve=221 exit=93 exit_group=94 wait4=260 waitid=95 kill=129
    tkill=130 tgkill=131 pidfd_open=434 pidfd_send_signal=424 set_tid_address=96
    set_robust_list=99 get_robust_list=100 rseq=293 prctl=167 futex=98 sched_yield=124
    sched_getaffinity=123 sched_setaffinity=122 sched_getparam=121 sched_getscheduler=120
    sched_get_priority_max=125 sched_get_priority_min=126 getpriority=141 setpriority=140
    getcpu=168 rt_sigaction=134 rt_sigprocmask=135 rt_sigpending=136 rt_sigreturn=139
    rt_sigsuspend=133 rt_sigtimedwait=137 sigaltstack=132 restart_syscall=128 getitimer=102
    setitimer=103 timer_create=107 timer_settime=110 timer_gettime=108 timer_delete=111
    timer_getoverrun=109 nanosleep=101 clock_nanosleep=115 clock_gettime=113 clock_getres=114
    gettimeofday=169 times=153 getpid=172 getppid=173 gettid=178 getpgid=155 setpgid=154
    getsid=156 setsid=157 getuid=174 geteuid=175 getgid=176 getegid=177 getresuid=148
    getresgid=150 getgroups=158 capget=90 getrlimit=163 setrlimit=164 prlimit64=261 getrusage=165
    sysinfo=179 uname=160 getrandom=278 socket=198 socketpair=199 bind=200 listen=201 accept=202
    accept4=242 connect=203 getsockname=204 getpeername=205 getsockopt=209 setsockopt=208
    sendto=206 recvfrom=207 sendmsg=211 recvmsg=212 sendmmsg=269 recvmmsg=243 shutdown=210
    """,
}
ZYGOTE_ALLOWED: Final = {
    "x86_64": """
    setns=308 unshare=272 capset=126 seccomp=317 landlock_create_ruleset=444 landlock_add_rule=445
    landlock_restrict_self=446
    """,
    "aarch64": """
    setns=268 unshare=97 capset=91 seccomp=277 landlock_create_ruleset=444 landlock_add_rule=445
    landlock_restrict_self=446
    """,
}
"""What a zygote's forks need on top, to enter what is ready for them and to lock themselves down.

Of `unshare` only a user namespace alone, in which a filter like ours leaves nothing to do."""

AUDIT_ARCH: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_BIT: Final = 0x40000000
FIRST_NEW_SYSCALL: Final = 424

CLONE_NEW_ANY: Final = 0x7E020080  # new mount, cgroup, uts, ipc, user, pid, net and time namespaces
SOCKET_FAMILIES: Final = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
SOCKET_PROTOCOLS: Final = (
    0,
    1,
    6,
    17,
    58,
)  # usual, ICMP, TCP, UDP, ICMPv6; so not MPTCP, SCTP, ...
IOCTLS_REFUSED: Final = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: typing on somebody's terminal
NAMESPACE_IOCTLS: Final = 0xB7
"""The kind (second byte) of ioctls that hand out other namespaces, or tell of them."""

PRCTLS: Final = (1, 2, 3, 4, 15, 16, 21, 23, 29, 30, 36, 37, 38, 39, 41, 42, 0x53564D41)

ZYGOTE_PRCTLS: Final = (24, 47)  # PR_CAPBSET_DROP, PR_CAP_AMBIENT
CLONE_NEWUSER: Final = 0x10000000
SET_MODE_FILTER: Final = 1

_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS, _EAFNOSUPPORT = 1, 38, 97
_LOAD, _JEQ, _JGT, _JGE, _JSET, _RET = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06
_NR, _ARCH, _ARG0, _ARG1, _ARG2 = (
    0,
    4,
    16,
    24,
    32,
)  # offsets in struct seccomp_data; the low words of arguments


def syscalls(machine: str, *, zygote: bool = False) -> dict[str, int]:
    """The allowed system calls of *machine* by name; `KeyError` for a machine without a list."""
    text = ALLOWED[machine] + (ZYGOTE_ALLOWED[machine] if zygote else "")
    pairs = (entry.split("=") for entry in text.split())
    return {name: int(number) for name, number in pairs}


def program(machine: str, *, zygote: bool = False) -> bytes:
    """The filter for *machine* as an array of `struct sock_filter`; a function *zygote*'s."""
    numbers = syscalls(machine, zygote=zygote)
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCH),
        (_JEQ, 1, 0, AUDIT_ARCH[machine]),
        (_RET, 0, 0, _KILL),
        (_LOAD, 0, 0, _NR),
        (_JGE, 0, 1, X32_BIT),
        (_RET, 0, 0, _KILL),
    ]
    code += _when(numbers["clone"], [(_LOAD, 0, 0, _ARG0), (_JSET, 1, 0, CLONE_NEW_ANY)], _EPERM)
    protocols = _one_of(_ARG2, SOCKET_PROTOCOLS)
    sockets = _one_of(_ARG0, SOCKET_FAMILIES, beyond=len(protocols)) + protocols
    code += _when(numbers["socket"], sockets, _EAFNOSUPPORT)
    code += _when(numbers["socketpair"], _one_of(_ARG0, (1,)), _EAFNOSUPPORT)
    kinds = _not_of_kind(_ARG1, NAMESPACE_IOCTLS)
    requests = _none_of(_ARG1, IOCTLS_REFUSED, beyond=len(kinds)) + kinds
    code += _when(numbers["ioctl"], requests, _EPERM)
    prctls = PRCTLS + ZYGOTE_PRCTLS if zygote else PRCTLS
    code += _when(numbers["prctl"], _one_of(_ARG0, prctls), _EPERM)
    if zygote:
        code += _when(numbers["unshare"], _one_of(_ARG0, (CLONE_NEWUSER,)), _EPERM)
        no_flags = _one_of(_ARG1, (0,))  # no listener, which could answer for other processes
        modes = _one_of(_ARG0, (SET_MODE_FILTER,), beyond=len(no_flags)) + no_flags
        code += _when(numbers["seccomp"], modes, _EPERM)
    for low, high in _ranges(sorted(numbers.values())):
        code += [(_JGE, 0, 2, low), (_JGT, 1, 0, high), (_RET, 0, 0, _ALLOW)]
    code += [
        (_JGE, 0, 1, FIRST_NEW_SYSCALL),
        (_RET, 0, 0, _ERRNO | _ENOSYS),
        (_RET, 0, 0, _ERRNO | _EPERM),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _when(
    number: int, test: list[tuple[int, int, int, int]], errno: int
) -> list[tuple[int, int, int, int]]:
    """For system call *number*: allow if *test* falls through, else *errno* (test skips one)."""
    body = [*test, (_RET, 0, 0, _ALLOW), (_RET, 0, 0, _ERRNO | errno)]
    return [(_JEQ, 0, len(body), number), *body]


def _one_of(
    argument: int, values: tuple[int, ...], beyond: int = 0
) -> list[tuple[int, int, int, int]]:
    """Fall through if *argument* is one of *values*, else skip one more than *beyond*."""
    last, no = len(values) - 1, 1 + beyond
    tests = [(_JEQ, last - i, 0 if i < last else no, value) for i, value in enumerate(values)]
    return [(_LOAD, 0, 0, argument), *tests]


def _none_of(
    argument: int, values: tuple[int, ...], beyond: int = 0
) -> list[tuple[int, int, int, int]]:
    """Fall through if *argument* is none of *values*, else skip one more than *beyond*."""
    last = len(values) - 1
    tests = [(_JEQ, last - i + 1 + beyond, 0, value) for i, value in enumerate(values)]
    return [(_LOAD, 0, 0, argument), *tests]


def _not_of_kind(argument: int, kind: int) -> list[tuple[int, int, int, int]]:
    """Fall through unless the second byte of *argument* is *kind*; else skip one.

    The sizes of structures are in the upper half of a request, so single values would not do.
    """
    ones = [1 << bit for bit in range(8, 16) if kind << 8 & 1 << bit]
    zeros = 0xFF00 & ~(kind << 8)
    last = len(ones) - 1
    tests = [(_JSET, len(ones), 0, zeros)]  # one bit too many is another kind
    tests += [(_JSET, 0, last - i, one) for i, one in enumerate(ones[:-1])]  # and one too few
    return [(_LOAD, 0, 0, argument), *tests, (_JSET, 1, 0, ones[-1])]


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """Runs of consecutive *numbers*, as (first, last)."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
