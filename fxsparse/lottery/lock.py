"""One writer a directory: a lock file with the writer's process, host and start time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxsparse.errors import ConfigError, TicketError

LOCK = "lock.json"


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold a directory; the system lets go when the process dies, whatever kills it.

    A lock whose process is gone is taken over with a warning.

    Raises:
        ConfigError: another process, on this host or another, holds the directory.
        TicketError: the lock cannot be written.
    """
    path = directory / LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise TicketError(f"`path` (={path}) cannot be written: {error.strerror}; choose another directory") from error
    try:
        _acquire(handle, path)
        try:
            yield
        finally:
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _acquire(handle: int, path: Path) -> None:
    holder = _read(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{path.parent} is in use by another writer ({holder}); wait for it or stop it") from None
    holder = _read(handle)  # it may have ended between the two lines above
    host = socket.gethostname()
    if holder and holder.get("host") != host:
        raise ConfigError(
            f"{path.parent} is in use by a writer on another host ({holder}); if that one is gone, delete {path}"
        )
    if holder and holder.get("pid") != os.getpid():
        warnings.warn(f"{path}: its writer ({holder}) is gone; the lock is taken over", RuntimeWarning, stacklevel=4)
    record = json.dumps({"pid": os.getpid(), "host": host, "started": time.time()}, sort_keys=True).encode()
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, record, 0)
    except OSError as error:
        raise TicketError(f"`path` (={path}) cannot be written: {error.strerror}; free some space") from error


def _read(handle: int) -> dict[str, Any]:
    try:
        record = json.loads(os.pread(handle, 4096, 0) or b"{}")
    except ValueError:
        return {"pid": None, "host": socket.gethostname()}
    return record if isinstance(record, dict) else {}
