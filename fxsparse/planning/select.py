"""Which weights are asked for: name globs, module types, predicates."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from fxsparse.errors import ConfigError

Predicate = Callable[[str, nn.Parameter, nn.Module], bool]
Selector = str | type[nn.Module] | Predicate


@dataclass(frozen=True)
class Place:
    """One name of a parameter.

    Attributes:
        name: The full name.
        parameter: The parameter.
        module: The module that holds it.
    """

    name: str
    parameter: nn.Parameter
    module: nn.Module

    @property
    def paths(self) -> list[str]:
        """The name, and the path of every module above it."""
        parts = self.name.split(".")
        return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def places(model: nn.Module) -> list[Place]:
    """Every name of every parameter, in the order of `named_parameters`."""
    found = []
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                found.append(Place(f"{path}.{attribute}" if path else attribute, parameter, module))
    return found


@dataclass(frozen=True)
class Selection:
    """Parameters picked by selectors.

    Attributes:
        names: Names picked by any selector.
        exact: Names that were written out in full: parameters of any shape may be asked for so.
    """

    names: frozenset[str]
    exact: frozenset[str]


def select(
    option: str, selectors: Selector | Iterable[Selector], model: nn.Module, aliases: dict[str, str]
) -> Selection:
    """Resolve selectors to first names of parameters.

    A string is a parameter's name, a module's path, or a glob over either; a type picks the parameters that modules of
    that type hold themselves; a predicate is called with (name, parameter, module).

    Args:
        option: The option's name, for messages.
        selectors: One selector or several.
        model: The model.
        aliases: Any name of a parameter -> its first name.

    Raises:
        ConfigError: a selector of another kind, or one that picks nothing.
    """
    known = places(model)
    chosen: set[str] = set()
    exact: set[str] = set()
    for selector in _listed(option, selectors):
        picked = {place.name for place in known if _picks(selector, place)}
        if not picked:
            raise ConfigError(_nothing(option, selector, known, model))
        chosen |= {aliases[name] for name in picked}
        if isinstance(selector, str) and selector in aliases:
            exact.add(aliases[selector])
    return Selection(frozenset(chosen), frozenset(exact))


def _listed(option: str, selectors: Selector | Iterable[Selector]) -> Sequence[Selector]:
    if isinstance(selectors, str | type) or callable(selectors):
        selectors = [selectors]
    listed = list(selectors) if isinstance(selectors, Iterable) else [selectors]
    for selector in listed:
        module_type = isinstance(selector, type) and issubclass(selector, nn.Module)
        predicate = callable(selector) and not isinstance(selector, type)
        if not (isinstance(selector, str) or module_type or predicate):
            raise ConfigError(
                f"`{option}` (={selector!r}) must hold names or globs, nn.Module types, or functions of "
                "(name, parameter, module)"
            )
    if not listed and option == "include":
        raise ConfigError("`include` (=[]) picks nothing; leave it out for the default weights")
    return listed


def _picks(selector: Selector, place: Place) -> bool:
    if isinstance(selector, str):
        return any(path == selector or fnmatch.fnmatchcase(path, selector) for path in place.paths)
    if isinstance(selector, type):
        return isinstance(place.module, selector)
    return bool(selector(place.name, place.parameter, place.module))


def _nothing(option: str, selector: Selector, known: Sequence[Place], model: nn.Module) -> str:
    if isinstance(selector, str):
        names = [place.name for place in known] + [path for path, _ in model.named_modules() if path]
        close = difflib.get_close_matches(selector, names, cutoff=0.4) or names[:3]
        return (
            f"`{option}` (={selector!r}) names no parameter; close names: {', '.join(close) or 'none: no parameters'}"
        )
    if isinstance(selector, type):
        kinds = sorted({type(place.module).__name__ for place in known})
        return f"`{option}` (={selector.__name__}) is the type of no module with parameters; types: {', '.join(kinds)}"
    return f"`{option}` (={getattr(selector, '__name__', selector)}) picks no parameter; check what it returns True for"
