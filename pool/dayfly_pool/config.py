"""The pool's settings: one frozen object, checked at birth, defaults visible here."""

import os
import re
from pathlib import Path
from typing import Final, Literal

from msgspec import Struct

from dayfly_pool.pods import Pods

SHARD: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
"""It is in labels and in names."""


class Config(Struct, frozen=True, kw_only=True):
    """How one pool behaves. Times are in seconds."""

    data: Path
    driver: Literal["linux", "process", "kubernetes"] = "linux"
    generic_min: int = 4
    generic_max: int = 32
    sandboxes_max: int = 512
    memory_reserve_mb: int = 512
    """Below this much available memory idle sandboxes are evicted, and nothing is kept ready."""

    starts_max: int = max(2, os.cpu_count() or 2)
    """Sandboxes that may be starting at the same moment: more only makes each of them slower."""

    prewarm: Literal["fork", "exec"] = "fork"
    """Whether sandboxes are forked from zygotes where that is allowed, or all started."""

    zygote_forks_max: int = 5000
    zygote_s_max: float = 3600.0
    """A zygote that has forked this often, or is this old, is replaced by a fresh one."""

    zygote_idle_s: float = 600.0
    """A zygote that was not needed for this long is let go."""

    initialize_once_s: float = 0.25
    """A function whose import takes this long gets a zygote of its own, if it declares nothing."""

    start_timeout_s: float = 30.0
    init_timeout_s: float = 10.0
    image_timeout_s: float = 600.0
    """A pod of a user's own image has so long to find room and to get its image."""

    grace_s: float = 2.0
    """Between SIGTERM at an invocation's deadline and SIGKILL."""

    queue_s_max: float = 30.0
    tick_s: float = 0.1
    invocations_max: int = 20_000
    """Invocations waiting or running in the whole pool."""

    foreign_namespaces: tuple[str, ...] = ()
    """Namespaces that hold anybody's code: nothing of theirs runs before the lock-down."""

    exec_namespaces: tuple[str, ...] = ()
    """Namespaces whose sandboxes are started, each by itself."""

    resources: dict[str, float] = {}
    """What else jobs may need and this machine has, as `gpu`."""

    package_hosts: tuple[str, ...] = ()
    """Packages may be fetched from these also by http, and at addresses that are not public."""

    events_dsn: str = ""
    """The PostgreSQL that keeps events, journals, declarations and packages, for all servers that
    use it, as libpq has it; empty for files of our own."""

    secrets: Path | None = None
    """The folder with secrets that somebody else keeps, only read; None: we keep them."""

    pods: Pods | None = None
    """How sandboxes are made where they are pods."""

    shard: str = "dayfly"
    """What this pool is called among those of its cluster; its pods are found again by it."""

    garbage_s: float = 3600.0
    """What runs left behind, and nothing refers to, is kept for so long."""

    uid_first: int = 3_000_000
    """As root, sandbox number n runs as the host uid *uid_first* + n."""

    def __post_init__(self) -> None:
        if not 0 <= self.generic_min <= self.generic_max <= self.sandboxes_max:
            raise ValueError("need 0 <= generic-min <= generic-max <= sandboxes-max")
        if self.starts_max < 1 or self.sandboxes_max < 1:
            raise ValueError("starts-max and sandboxes-max must be at least 1")
        positive = (
            self.start_timeout_s,
            self.init_timeout_s,
            self.grace_s,
            self.tick_s,
            self.garbage_s,
        )
        if not SHARD.fullmatch(self.shard):
            raise ValueError(f"shard: {self.shard!r} must be a-z, 0-9 and -, and 63 at most")
        if self.memory_reserve_mb < 0:
            raise ValueError("memory-reserve-mb must not be negative")
        if min(self.zygote_forks_max, self.zygote_s_max, self.zygote_idle_s) <= 0:
            raise ValueError("zygote-forks-max, and a zygote's minutes, must be above 0")
        if self.initialize_once_s < 0:
            raise ValueError("initialize-once-ms must not be negative")
        if min(positive) <= 0:
            raise ValueError("times must be above 0")
