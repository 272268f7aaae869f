"""Checks of arguments that several functions here take: each names the argument, its value and the mend."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn

from fxsparse.errors import ConfigError, DataError


def shown(value: Any) -> str:
    """A value in few words; a tensor by its shape."""
    if isinstance(value, Tensor):
        return f"{type(value).__name__} {tuple(value.shape)}"
    if type(value) in (tuple, list):
        return f"{type(value).__name__} of {', '.join(map(shown, value[:3]))}{', ...' if value[3:] else ''}"
    return reprlib.repr(value)


_WORDS = {
    bool: "bool, True or False",
    Real: "number",
    str: "string",
    Mapping: "mapping",
    nn.Module: "torch.nn.Module",
    type(None): "None",
}


def _word(kind: type) -> str:
    return _WORDS.get(kind, kind.__name__)


def check_kind(value: object, name: str, *kinds: type) -> None:
    """Raise ConfigError unless it is an instance of one of these classes."""
    if not isinstance(value, kinds):
        raise ConfigError(f"`{name}` (={shown(value)}) must be a {' or '.join(map(_word, kinds))}")


def check_kinds(kind: type, **values: object) -> None:
    """The same for arguments by name."""
    for name, value in values.items():
        check_kind(value, name, kind)


def check_number(value: Any, name: str, least: float = -math.inf, *, above: bool = False) -> None:
    """Raise ConfigError unless it is a finite number of at least `least`, or above it."""
    real, flag = isinstance(value, Real), isinstance(value, bool)
    if not real or flag or not least <= value < math.inf or value == (least if above else -math.inf):
        bound = "" if least == -math.inf else f" {'above' if above else 'of at least'} {least:g}"
        raise ConfigError(f"`{name}` (={shown(value)}) must be a finite number{bound}")


def check_integer(value: object, name: str) -> None:
    """Raise ConfigError unless it is an integer."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigError(f"`{name}` (={shown(value)}) must be an integer")


def check_axis(axis: object, tensor: Tensor, name: str) -> None:
    """Raise ConfigError unless the tensor of that name has the axis."""
    if isinstance(axis, bool) or not isinstance(axis, int) or not -tensor.ndim <= axis < tensor.ndim:
        raise ConfigError(f"`axis` (={shown(axis)}) must be an integer, one of the {tensor.ndim} of `{name}`")


def check_one_of(value: object, name: str, known: tuple[str, ...]) -> None:
    """Raise ConfigError unless it is one of these words."""
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"`{name}` (={shown(value)}) must be one of {', '.join(map(repr, known))}")


def check_callable(value: object, name: str) -> None:
    """Raise ConfigError unless it can be called."""
    if not callable(value):
        raise ConfigError(f"`{name}` (={shown(value)}) must be a function")


def check_names(value: Any, name: str) -> tuple[str, ...]:
    """Several strings as a tuple; raises ConfigError for a single one, and for what is none."""
    found = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes) else None
    if found is None or not all(isinstance(each, str) for each in found):
        raise ConfigError(f"`{name}` (={shown(value)}) must be a list or tuple of names")
    return found


def check_listed(value: Any, name: str, kind: type) -> tuple[Any, ...]:
    """Several instances of a class as a tuple; raises ConfigError for a single one, and for others."""
    several = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | Tensor)
    found = tuple(value) if several else None
    if found is None or not all(isinstance(each, kind) for each in found):
        held = shown(value) if found is None else shown(next(each for each in found if not isinstance(each, kind)))
        raise ConfigError(f"`{name}` (={held}) must be a list, each a {_word(kind)}")
    return found


def check_batches(value: object, name: str) -> None:
    """Raise DataError for what is no iterable of batches: a single batch without a list around it, or none."""
    iterable = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    if not iterable or isinstance(value, Tensor | Mapping | str | bytes | type):
        raise DataError(f"`{name}` (={shown(value)}) must be several batches: put a single one into a list")
