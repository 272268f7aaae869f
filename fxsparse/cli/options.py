"""Words of the command line turned into options of the library; nothing below the command line takes words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

from fxsparse.errors import ConfigError
from fxsparse.sparsity import (
    ERK,
    Block,
    Channel,
    ConstantFanIn,
    Distribution,
    Global,
    NByM,
    Pattern,
    SharedSupport,
    Uniform,
    Unstructured,
)

PATTERNS: tuple[tuple[str, str, Callable[..., Pattern]], ...] = (
    (r"unstructured", "unstructured", Unstructured),
    (r"(\d+):(\d+)", "2:4", lambda n, m: NByM(n=int(n), m=int(m))),
    (r"block:(\d+)x(\d+)", "block:4x4", lambda height, width: Block(int(height), int(width))),
    (r"channel(?::(\d+))?", "channel or channel:1", lambda axis: Channel(axis=int(axis or 0))),
    (r"constant-fan-in", "constant-fan-in", ConstantFanIn),
    (r"shared(?:-support)?:(\d+)", "shared-support:64", lambda group: SharedSupport(int(group))),
)
PATTERN_HELP = ", ".join(example for _, example, _ in PATTERNS)
DISTRIBUTIONS: dict[str, Callable[[], Distribution]] = {"uniform": Uniform, "erk": ERK, "global": Global}


def parse_pattern(text: str) -> Pattern:
    """A pattern from its word.

    Raises:
        ConfigError: no such pattern; the message lists them all.

    >>> parse_pattern("2:4")
    NByM(n=2, m=4, ...)
    """
    for expression, _, build in PATTERNS:
        match = re.fullmatch(expression, text.strip().lower())
        if match:
            return build(*match.groups())
    raise ConfigError(f"`pattern` (={text}) is none of {PATTERN_HELP}")


def parse_distribution(text: str) -> Distribution:
    """A distribution from its word.

    Raises:
        ConfigError: no such distribution; the message lists them all.

    >>> parse_distribution("erk")
    ERK(...)
    """
    build = DISTRIBUTIONS.get(text.strip().lower())
    if build is None:
        close = difflib.get_close_matches(text.lower(), DISTRIBUTIONS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"`distribution` (={text}) is none of {', '.join(DISTRIBUTIONS)}{hint}")
    return build()
