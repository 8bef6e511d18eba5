"""How the C library deals with memory that arrays no longer need."""

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # options of glibc's mallopt


def keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks instead of returning them: fresh pages cost 10 % of a training step on a CPU."""
    if sys.platform == "linux" and os.confstr("CS_GNU_LIBC_VERSION"):
        for option in (TRIM_THRESHOLD, MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(option, 1 << 30)
