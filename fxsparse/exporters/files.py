"""One file, whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxsparse.errors import ExportError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file beside `path`; on a clean exit it replaces `path`, on any other it is removed.

    A file that stood at `path` before stays as it was until then.

    Raises:
        ExportError: when the place cannot be written; before anything is yielded where that can be known.
    """
    if path.is_dir():
        raise ExportError(f"`path` (={path}) is a directory: name a file inside it")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb"):
            pass
    except OSError as error:
        message = f"`path` (={path}) cannot be written ({error.strerror}): choose a writable directory"
        raise ExportError(message) from error
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        message = f"`path` (={path}) could not be written ({error.strerror}): make room, or choose another disk"
        raise ExportError(message) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
