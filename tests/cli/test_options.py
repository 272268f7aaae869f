"""Words of the command line."""

from __future__ import annotations

import pytest

from fxsparse.cli.options import DISTRIBUTIONS, PATTERNS, parse_distribution, parse_pattern
from fxsparse.errors import ConfigError
from fxsparse.sparsity import (
    ERK,
    Block,
    Channel,
    ConstantFanIn,
    Global,
    NByM,
    Pattern,
    SharedSupport,
    Uniform,
    Unstructured,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unstructured", Unstructured()),
        (" Unstructured ", Unstructured()),
        ("2:4", NByM(n=2, m=4)),
        ("block:4x8", Block(4, 8)),
        ("channel", Channel(axis=0)),
        ("channel:1", Channel(axis=1)),
        ("constant-fan-in", ConstantFanIn()),
        ("shared-support:64", SharedSupport(64)),
    ],
)
def test_patterns(text: str, expected: Pattern) -> None:
    assert parse_pattern(text) == expected


@pytest.mark.parametrize("text", ["", "2:4:8", "block:4", "structured", "shared-support", "2:4 "[::-1] + "x"])
def test_unknown_pattern_lists_all(text: str) -> None:
    with pytest.raises(ConfigError, match="is none of unstructured, 2:4, block:4x4") as caught:
        parse_pattern(text)
    assert all(example in str(caught.value) for _, example, _ in PATTERNS)


def test_distributions() -> None:
    assert parse_distribution("uniform") == Uniform()
    assert parse_distribution("ERK") == ERK()
    assert parse_distribution("global") == Global()
    with pytest.raises(ConfigError, match="is none of uniform, erk, global; did you mean uniform"):
        parse_distribution("unifrom")
    assert set(DISTRIBUTIONS) == {"uniform", "erk", "global"}
