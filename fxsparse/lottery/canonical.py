"""Canonical JSON and the hashes that tickets and run directories are known by.

The same content has the same bytes, and so the same hash, on any machine: keys sorted, separators ``,`` and ``:``,
non-ASCII escaped, numbers that are not integers written as their decimal text (a JSON string).
"""

from __future__ import annotations

import decimal
import fractions
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fxsparse.errors import ConfigError

JSON = dict[str, "JSON"] | list["JSON"] | str | int | float | bool | None

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
"""The dtypes that a ticket may hold, by their written name."""


def decimal_text(value: float) -> str:
    """The shortest decimal text of a finite float, without an exponent.

    Raises:
        ConfigError: for NaN and infinities, which JSON cannot say.

    Examples:
        >>> decimal_text(0.1), decimal_text(1e-05)
        ('0.1', '0.00001')
    """
    if not math.isfinite(value):
        raise ConfigError(f"a number (={value}) has no canonical JSON: use null and a reason")
    return format(decimal.Decimal(repr(value)), "f")


def _canonical(value: object) -> object:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else decimal_text(value)
    if isinstance(value, fractions.Fraction):
        return int(value) if value.denominator == 1 else f"{value.numerator}/{value.denominator}"
    if isinstance(value, Mapping):
        if unnamed := [key for key in value if not isinstance(key, str)]:
            raise ConfigError(f"a key (={unnamed[0]!r}) of canonical JSON must be a string")
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_canonical(item) for item in value]
    raise ConfigError(f"a value (={value!r}) of type {type(value).__name__} has no canonical JSON")


def canonical_json(value: object) -> str:
    r"""`value` (mappings, sequences, strings, numbers, None) as canonical JSON.

    Raises:
        ConfigError: for NaN, infinities, keys that are not strings, and other types.

    Examples:
        >>> canonical_json({"b": [1, 2.5, 3.0], "a": "é"})
        '{"a":"\\u00e9","b":[1,"2.5",3]}'
    """
    return json.dumps(_canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def sha256_json(value: object) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """The written name of a dtype, as in ``float32``.

    Raises:
        ConfigError: when tickets cannot hold the dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"`dtype` (={name}) cannot be stored; allowed: {', '.join(DTYPES)}")
    return name


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def strict_json(text: str) -> Any:
    """Parse JSON; a key that stands twice, NaN and infinities raise ValueError."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
