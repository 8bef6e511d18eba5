"""Writing files whole or not at all."""

import os
import tempfile
from pathlib import Path

from mini_ht.errors import InputError


def write_atomically(file: Path, data: bytes) -> None:
    """Replace `file` by `data` in one step; on an error the old file stays and nothing half written remains.

    Raises InputError on a full disk or in a folder that cannot be written.
    """
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
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
