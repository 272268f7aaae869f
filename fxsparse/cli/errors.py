"""Errors at the command line: one line on stderr, a fixed exit code, no traceback."""

from __future__ import annotations

import errno

from fxsparse.errors import ConfigError, DataError, ExportError, FxSparseError, PassError, TicketError

OTHER, CONFIG, DATA, VERIFICATION = 1, 2, 3, 4

# The first class that fits decides; 0 is success.
EXIT_CODES: tuple[tuple[type[FxSparseError], int], ...] = (
    (ConfigError, CONFIG),
    (DataError, DATA),
    (TicketError, DATA),
    (ExportError, VERIFICATION),
    (PassError, VERIFICATION),
)
MENDS = {
    errno.ENOSPC: "free some space",
    errno.EACCES: "choose a place that may be written to",
    errno.EROFS: "choose a place that may be written to",
}


def exit_code(error: BaseException) -> int:
    """The exit code of an error: 2 usage or configuration, 3 data or ticket, 4 verification or export, 1 other."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), OTHER)


def one_line(error: BaseException) -> str:
    """The message on one line; an error of the operating system names its file and a mend."""
    if isinstance(error, OSError) and error.strerror:
        where = f"`{error.filename}`: " if error.filename else ""
        return f"{where}{error.strerror}; {MENDS.get(error.errno or 0, 'check the path')}"
    text = " ".join(str(error).split())
    return text if isinstance(error, FxSparseError) else f"{type(error).__name__}: {text}".removesuffix(": ")
