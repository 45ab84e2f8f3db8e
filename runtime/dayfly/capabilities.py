"""What the kernel says of a function's zygote; apart, for the pool must know it without Linux."""

ZYGOTE_CAPABILITIES = (8, 18, 21, 31)
"""CAP_SETPCAP, CAP_SYS_CHROOT, CAP_SYS_ADMIN and CAP_SETFCAP: what entering namespaces takes."""

ZYGOTE_CAP_EFF = sum(1 << capability for capability in ZYGOTE_CAPABILITIES)
"""The same, as /proc/PID/status has it."""
