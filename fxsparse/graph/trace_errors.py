"""What user code raises when it meets a symbolic value, as a reason that its author understands."""

from __future__ import annotations

import os
import re
import traceback

import torch

from fxsparse.graph.guards import NOTHING

_LIBRARIES = tuple(os.path.dirname(os.path.abspath(place)) + os.sep for place in (torch.__file__, __file__))
_LONGEST = 100  # characters of a line of code, and of a message

_KNOWN: tuple[tuple[str, str, str], ...] = (
    (r"used as inputs to control flow", "control flow on a traced value", NOTHING),
    (r"cannot be iterated", "control flow on a traced value, which is iterated or unpacked", NOTHING),
    (
        r"co_varnames is too small",
        "a decorator hides the arguments of its `forward`, or of what it calls, from the tracer",
        "keep the decorator off `forward`, or leave it: its weights can be masked all the same",
    ),
    (r"does not support item assignment", "it assigns to entries of a traced value in place", NOTHING),
    (r"does not support item deletion", "it deletes entries of a traced value", NOTHING),
    (r"'len' is not supported|object has no len|__len__", "it takes `len` of a traced value", NOTHING),
    (r"__(cuda_)?array_\w+__", "it makes a new tensor out of a traced value", NOTHING),
    (r"can't convert .*Proxy|new\(\): invalid data type", "it makes a new tensor out of a traced value", NOTHING),
    (
        r"cannot be interpreted as an integer|indices must be integers|must be real number"
        r"|argument must be a (string|real)|__index__|__int__|__float__",
        "it needs the number that a traced value holds",
        NOTHING,
    ),
    (
        r"(must be|expected) (\w+ )?Tensor,? ?(but|not)|must be Tensor|Proxy",
        "it hands a traced value to code that takes no such values",
        NOTHING,
    ),
)


def why_untraceable(error: BaseException) -> tuple[str, str]:
    """Return the reason and the mend for an error that a symbolic trace raised.

    The reason names the line of code outside torch at which it came up, where there is one. An error that no rule
    knows, a check of the user's own say, is told in its own words.
    """
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    place = _place(error)
    if isinstance(error, KeyError) and "Proxy" in message:
        return f"it looks a traced value up in a dictionary{place}", NOTHING
    for pattern, reason, mend in _KNOWN:
        if re.search(pattern, message):
            return f"{reason}{place}", mend
    if not message:
        return f"its code raises {type(error).__name__} on a traced value{place}", NOTHING
    return f"its code refuses a traced value{place}: {_short(message)}", NOTHING


def _place(error: BaseException) -> str:
    """`` (`line of code`)`` of the innermost frame that is neither torch's nor this library's."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = os.path.abspath(frame.filename)
        if not file.startswith(_LIBRARIES) and frame.line:
            return f" (`{_short(' '.join(frame.line.split()))}` in `{frame.name}`)"
    return ""


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
