"""Writing files whole or not at all."""

import errno
import functools
import os
import stat
import time
from contextlib import suppress
from pathlib import Path

from mini_ht.errors import InputError

PART = (".mini_ht-", ".part")  # how the name of a file that is being written begins and ends
STALE = 600.0  # seconds after its last change when such a file is one that a killed process left


@functools.cache  # once for each folder
def sweep(folder: Path) -> None:
    """Remove the half written files that killed processes left in a folder."""
    for part in folder.glob("*".join(PART)):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE:
                part.unlink()


def write_atomically(file: Path, data: bytes) -> None:
    """Replace `file` by `data` in one step; on an error the old file stays and nothing half written remains.

    Raises InputError on a full disk or in a folder that cannot be written.
    """
    import tempfile  # here, as it would make up a thirtieth of the package's import

    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        sweep(file.parent)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=PART[0], suffix=PART[1])
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        why = error.strerror or error
        raise InputError(f"cannot write {file}: {why}; free some space or choose another folder") from error


def read_regular(file: str | os.PathLike[str], most: int) -> bytes:
    """The bytes of a file; OSError, with a reason, for more than `most` of them and for a pipe, which may never end."""
    check_regular(file, most)
    with open(file, "rb") as stream:
        return stream.read()


def check_regular(file: str | os.PathLike[str], most: int) -> None:
    """Raise OSError, with a reason, unless a file is there, is no folder or pipe, and has at most `most` bytes."""
    found = os.stat(file)
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes, up to {most:,} are read", str(file))
    if not stat.S_ISREG(found.st_mode):
        what = "Is a directory" if stat.S_ISDIR(found.st_mode) else "it is no plain file"
        raise OSError(errno.EINVAL, what, str(file))
