"""The rule that every reader keeps: the right result or one sentence, soon and in little memory."""

from __future__ import annotations

import ctypes
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mini_ht.errors import InputError

SECONDS, MEMORY = 5.0, 1 << 30  # of CPU time; bytes above what the process had
WAIT = 60  # seconds of a reader that waits, for a pipe for example
SENTENCE = 20_000  # characters; a list of shapes may be long


class Broken(AssertionError):
    """A reader that did not keep the rule."""


class Hang(BaseException):
    """Too much CPU time; no reader catches it."""


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    with suppress(OSError, IndexError):  # Linux; what the next line says there is at least what the parent had
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check(target: Callable[[bytes], None], data: bytes) -> str:
    """Run a target; "read" or "refused". Raises Broken for another exception, a hang, or too much memory."""

    def stop(number: int, frame: Any) -> None:
        raise Hang

    with suppress(AttributeError):  # glibc: what was freed and kept would hide what a target takes
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # where it can, the peak begins anew, else it is that of all targets before
        Path("/proc/self/clear_refs").write_text("5")
    before, started = peak(), time.process_time()
    handler = signal.signal(signal.SIGPROF, stop)
    waiting = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(WAIT)
    try:
        target(data)
        outcome = "read"
    except InputError as error:
        outcome = "refused"
        if not 10 < len(str(error)) < SENTENCE or "Traceback" in str(error):
            raise Broken(f"the message is no sentence: {str(error)[:200]!r}") from error
    except Hang as error:
        raise Broken(f"more than {SECONDS:g} s of work or {WAIT} s in all") from error
    except Exception as error:
        raise Broken(f"{type(error).__name__}: {error}") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, waiting)
        signal.signal(signal.SIGPROF, handler)
    if time.process_time() - started > SECONDS:
        raise Broken(f"{time.process_time() - started:.1f} s")
    if peak() - before > MEMORY:
        raise Broken(f"{(peak() - before) >> 20} MiB")
    return outcome
