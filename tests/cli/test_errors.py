"""Exit codes and one-line messages."""

from __future__ import annotations

import errno

import pytest

from fxsparse.cli.errors import exit_code, one_line
from fxsparse.errors import CaptureError, ConfigError, DataError, ExportError, FxSparseError, PassError, TicketError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (DataError("x"), 3),
        (TicketError("x"), 3),
        (ExportError("x"), 4),
        (PassError("x"), 4),
        (CaptureError("x"), 1),
        (FxSparseError("x"), 1),
        (ValueError("x"), 1),
        (OSError(errno.ENOSPC, "x"), 1),
    ],
)
def test_codes(error: Exception, code: int) -> None:
    assert exit_code(error) == code


def test_messages_are_one_line() -> None:
    assert one_line(ConfigError("`a` (=1)\n  is wrong;\tmend")) == "`a` (=1) is wrong; mend"
    assert one_line(KeyError("a\nb")) == "KeyError: 'a\\nb'"
    assert one_line(RuntimeError()) == "RuntimeError"


def test_messages_of_the_system_name_file_and_mend() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/disk/x")
    assert one_line(full) == "`/disk/x`: No space left on device; free some space"
    assert one_line(PermissionError(errno.EACCES, "Permission denied", "/x")).endswith("may be written to")
    assert one_line(FileNotFoundError(errno.ENOENT, "No such file or directory", "/y")).endswith("check the path")
    assert one_line(OSError("odd")) == "OSError: odd"
