"""Words of the commands on ONNX files."""

from __future__ import annotations

from collections.abc import Sequence

from fxsparse.errors import ConfigError


def parse_whole_numbers(text: str, name: str) -> tuple[int, ...]:
    """Whole numbers from "1,16,128".

    Raises:
        ConfigError: something in it is none.

    >>> parse_whole_numbers("1,16", "batch")
    (1, 16)
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"`{name}` (={text}) must be whole numbers with commas between, as in 1,16,128") from error


def parse_sizes(words: Sequence[str]) -> dict[str, int]:
    """Sizes of free axes from words like "sequence=64".

    Raises:
        ConfigError: a word is of another form.

    >>> parse_sizes(["sequence=64"])
    {'sequence': 64}
    """
    sizes = {}
    for word in words:
        name, equals, size = word.rpartition("=")
        if not (name and equals and size.isdecimal()):
            raise ConfigError(f"`size` (={word}) must be NAME=N, as in sequence=64")
        sizes[name] = int(size)
    return sizes
