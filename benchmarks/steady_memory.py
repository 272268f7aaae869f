"""Keep freed memory in the process, so that what one variant gives back to the system costs no other page faults."""

from __future__ import annotations

import os
import sys

_TUNABLES = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296"


def keep_freed_memory() -> None:
    """Start the program again with an allocator that keeps what is freed, where glibc is the one that does not.

    By default it gives blocks of some MiB back at once, and which ones depends on what was allocated before: on virtual
    machines the page faults of a large tensor then cost more than its arithmetic.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "GLIBC_TUNABLES": _TUNABLES})


def plain_environment() -> dict[str, str]:
    """The environment of a process whose memory is as ever."""
    return {name: value for name, value in os.environ.items() if value != _TUNABLES}
