"""Patterns written as text and read back, without running the text."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
from typing import Any

from fxsparse.errors import ConfigError
from fxsparse.sparsity.fan_in import ConstantFanIn
from fxsparse.sparsity.n_by_m import NByM, Remainder
from fxsparse.sparsity.pattern import Block, Channel, Pattern, Unstructured
from fxsparse.sparsity.shared_support import Positions, SharedSupport

_PATTERNS: dict[str, type[Pattern]] = {
    kind.__name__: kind for kind in (Unstructured, NByM, Block, Channel, ConstantFanIn, SharedSupport)
}
_LONGEST = 200
_WORDS: dict[str, type[enum.Enum]] = {kind.__name__: kind for kind in (Positions, Remainder)}


def read_pattern(text: str) -> Pattern:
    """The pattern that was written by `str(pattern)`.

    Args:
        text: A pattern of `fxsparse.sparsity` with numbers, truth values and members of its enumerations as arguments.

    Raises:
        ConfigError: Anything else; the message holds the text.

    >>> read_pattern("SharedSupport(64, positions=Positions.ELEMENT)")
    SharedSupport(group=64, positions=<Positions.ELEMENT: 'element'>)
    """
    try:
        if not isinstance(text, str) or len(text) > _LONGEST:
            raise ValueError(f"not a text of at most {_LONGEST} characters")
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in _PATTERNS:
            raise ValueError("no pattern of this version of fxsparse")
        options = {str(each.arg): _value(each.value) for each in call.keywords}
        made = _PATTERNS[call.func.id](*map(_value, call.args), **options)
        for field in dataclasses.fields(made):
            value = getattr(made, field.name)
            if field.default is not dataclasses.MISSING and type(value) is not type(field.default):
                raise ValueError(f"`{field.name}` (={value!r}) is no {type(field.default).__name__}")
        return made
    except (ConfigError, TypeError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        close = difflib.get_close_matches(str(text).partition("(")[0], _PATTERNS, 1)
        hint = f"; did you mean {close[0]}?" if close and close[0] != str(text).partition("(")[0] else ""
        raise ConfigError(f"`pattern` (={text!r:.220}) cannot be read: {error}{hint}") from error


def _value(node: ast.expr) -> Any:
    """A literal or the member of an enumeration."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        members = _WORDS.get(node.value.id, enum.Enum).__members__
        if node.attr not in members:
            raise ValueError(f"{node.value.id}.{node.attr} is unknown")
        return members[node.attr]
    return ast.literal_eval(node)
