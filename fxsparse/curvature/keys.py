"""Keys of statistics: task|parameter|group_type; whole names are compared, never parts of names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, TypeVar

from fxsparse.curvature.arguments import check_kind, check_names
from fxsparse.errors import ConfigError

T = TypeVar("T")


class Key(NamedTuple):
    """One key.

    >>> str(Key("default", "fc.weight", "channel"))
    'default|fc.weight|channel'
    """

    task: str
    param: str
    group_type: str

    def __str__(self) -> str:
        return "|".join(self)

    @classmethod
    def of(cls, text: str) -> Key:
        """Parse a key.

        Raises:
            ConfigError: it is no string, or has not exactly three parts, none of them empty.
        """
        parts = text.split("|") if isinstance(text, str) else []
        if len(parts) != 3 or not all(parts):
            raise ConfigError(f"`key` (={text!r}) must be 'task|param|group_type' with three parts that are not empty")
        return cls(*parts)


def check_task(task: str) -> str:
    """The task's name.

    Raises:
        ConfigError: it is empty or holds the separator.
    """
    if not isinstance(task, str) or not task or "|" in task:
        raise ConfigError(f"`task` (={task!r}) must be a string that is not empty and holds no '|'")
    return task


def check_parameters(names: Iterable[str]) -> None:
    """Raise ConfigError for a parameter whose name holds the separator."""
    for name in names:
        if "|" in name:
            raise ConfigError(f"`{name}` holds '|', which separates the parts of a key: rename the parameter")


def restrict(
    values: Mapping[str, T],
    *,
    task: str | None = None,
    param: str | None = None,
    prefix: str | None = None,
    module: str | None = None,
    group_type: str | None = None,
) -> dict[str, T]:
    """Those entries whose key fits everything that is given.

    Args:
        values: by key.
        task: the task.
        param: the parameter's whole name.
        prefix: the parameter itself or what lies below that path: "a" takes "a.weight", not "ab.weight".
        module: the module that holds the parameter.
        group_type: the group type.

    Raises:
        ConfigError: no mapping by keys, or a part that is no string.
    """
    check_kind(values, "values", Mapping)
    parts = {"task": task, "param": param, "prefix": prefix, "module": module, "group_type": group_type}
    for name, part in parts.items():
        check_kind(part, name, str, type(None))
    found = {}
    for text, value in values.items():
        key = Key.of(text)
        if task is not None and key.task != task or group_type is not None and key.group_type != group_type:
            continue
        if param is not None and key.param != param or module is not None and _module(key.param) != module:
            continue
        if prefix is not None and key.param != prefix and not key.param.startswith(prefix + "."):
            continue
        found[text] = value
    return found


def _module(param: str) -> str:
    return param.rpartition(".")[0]


def from_old(values: Mapping[str, T], parameters: Collection[str], group_type: str) -> dict[str, T]:
    """Old keys 'task_param' -> new ones; the longest parameter that is a suffix decides.

    Raises:
        ConfigError: no parameter is a suffix, two old keys become one, or an argument of another type.

    >>> from_old({"task_1_fc.weight": 0}, ["fc.weight"], "channel")
    {'task_1|fc.weight|channel': 0}
    """
    parameters = check_names(parameters, "parameters")
    _check_old(values, group_type)
    found: dict[str, T] = {}
    for old, value in values.items():
        fitting = [name for name in parameters if old.endswith("_" + name) and len(old) > len(name) + 1]
        if not fitting:
            raise ConfigError(f"old key {old!r} ends in no known parameter: give the model's parameter names")
        longest = max(fitting, key=len)
        if sum(len(name) == len(longest) for name in fitting) > 1:
            raise ConfigError(f"old key {old!r} ends in several parameters of equal length: name them once")
        new = str(Key(check_task(old[: -len(longest) - 1]), longest, group_type))
        if new in found:
            raise ConfigError(f"old key {old!r} and another one both become {new!r}: rename one of the tasks")
        found[new] = value
    return found


def _check_old(values: object, group_type: object) -> None:
    check_kind(values, "values", Mapping)
    check_names(values, "values")
    if not isinstance(group_type, str) or not group_type or "|" in group_type:
        raise ConfigError(f"`group_type` (={group_type!r}) must be a string that is not empty and holds no '|'")


def to_old(values: Mapping[str, T]) -> dict[str, T]:
    """New keys -> old keys 'task_param', which know no group type.

    Raises:
        ConfigError: two keys differ only in their group type, or become one old key, or no mapping by keys.
    """
    check_kind(values, "values", Mapping)
    found: dict[str, T] = {}
    for text, value in values.items():
        key = Key.of(text)
        old = f"{key.task}_{key.param}"
        if old in found:
            raise ConfigError(f"{text!r} and another key both become {old!r}: restrict to one group type first")
        found[old] = value
    return found
