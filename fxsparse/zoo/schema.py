"""The file that lists the models: every field checked, every error names its path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fxsparse.errors import ConfigError

FILE = "zoo.json"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Entry(_Section):
    """One model.

    Attributes:
        name: unique; `library/model` by custom.
        lib: library that it comes from.
        family: kind of model.
        ctor: Python that leaves the model in `m`.
        inputs: Python that leaves `args` and `kwargs`, with `torch` and the batch size `B` in scope.
        train_inputs: the same for train mode, where that takes other inputs.
        seen: what is known of the model; not read.
    """

    name: Annotated[str, Field(min_length=1, max_length=200)]
    lib: str
    family: str
    ctor: Annotated[str, Field(min_length=1)]
    inputs: Annotated[str, Field(min_length=1)]
    train_inputs: str | None = None
    seen: dict[str, Any] = Field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        """What the process of this model has to know."""
        return self.model_dump(exclude={"seen"})


class Zoo(_Section):
    """A list of models.

    Attributes:
        torch: version of torch that the list was made with; not enforced.
        batch: batch size `B` of the inputs.
        seed: how it is seeded, in words: torch.manual_seed(0) before `ctor`, torch.manual_seed(1) before `inputs`.
        entries: the models.
    """

    torch: str
    batch: Annotated[int, Field(ge=1)]
    seed: str | int
    entries: Annotated[list[Entry], Field(min_length=1)]


def load_zoo(path: str | Path) -> tuple[Zoo, Path]:
    """Read a list of models; nothing of it is executed.

    Args:
        path: a folder with a `zoo.json`, or such a file under any name.

    Returns:
        the list, and the folder from which its modules are imported.

    Raises:
        ConfigError: the file is missing or no JSON, a field is unknown, missing or of another type, a name stands
            twice.
    """
    place = Path(path)
    file = place / FILE if place.is_dir() else place
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"`path` (={path}) cannot be read: {error}; give a folder with a {FILE}, or a file"
        ) from error
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"`path` (={file}) is not valid JSON: {error}") from error
    try:
        zoo = Zoo.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{file}: " + "; ".join(_message(found, values) for found in error.errors()[:5])) from None
    _check_names(zoo, file)
    return zoo, file.resolve().parent


def _check_names(zoo: Zoo, file: Path) -> None:
    first: dict[str, int] = {}
    for place, entry in enumerate(zoo.entries):
        if entry.name in first:
            raise ConfigError(
                f"{file}: `entries.{place}.name` (={entry.name}) stands at entries.{first[entry.name]} too; rename one"
            )
        first[entry.name] = place


def _message(found: Any, values: object) -> str:
    location = found["loc"]
    path = ".".join(map(str, location)) or "the file"
    named = _name_of(location, values)
    if found["type"] == "extra_forbidden":
        section: type[BaseModel] = Entry if location[0] == "entries" else Zoo
        return f"`{path}`{named} is not a field; allowed: {', '.join(section.model_fields)}"
    if found["type"] == "missing":
        return f"`{path}`{named} is missing; add it"
    shown = repr(found["input"])
    text = found["msg"].removeprefix("Input should ").removeprefix("be ")
    return f"`{path}` (={shown[:80]}){named} must be {text}"


def _name_of(location: tuple[Any, ...], values: object) -> str:
    """Name of the entry at a location, for the reader of the message."""
    if len(location) < 3 or location[0] != "entries" or not isinstance(values, dict):
        return ""
    entry = values["entries"][location[1]]
    name = entry.get("name") if isinstance(entry, dict) else None
    return f" of {name}" if isinstance(name, str) else ""
