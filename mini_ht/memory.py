"""How the C library deals with memory that arrays no longer need."""

import ctypes
import os
import sys

OPTIONS = {"trim threshold": -1, "mmap threshold": -3}  # of glibc's mallopt


def keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks instead of returning them: fresh pages cost 10 % of a training step on a CPU."""
    if sys.platform == "linux" and os.confstr("CS_GNU_LIBC_VERSION"):
        for option in OPTIONS.values():
            ctypes.CDLL(None).mallopt(option, 1 << 30)
