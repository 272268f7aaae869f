"""MODULE:FACTORY, the way a command is told which model to build."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from fxsparse.errors import ConfigError

MEND = "write `package.module:factory` or `path/to/file.py:factory`"


class Built(NamedTuple):
    """A model and, where the factory gave them, its example inputs (a tuple, or (args, kwargs))."""

    model: nn.Module
    example_inputs: Any | None


def load_factory(text: str) -> Built:
    """Import and call a factory that takes no arguments and returns a model or (model, example_inputs).

    A module-level model instance is accepted in place of a factory. Modules are found from the current directory, too.

    Args:
        text: `package.module:factory` or `path/to/file.py:factory`.

    Raises:
        ConfigError: the text, the module, the name or what the factory returned is not as described; an exception that
            the factory raised is named and chained.
    """
    place, colon, name = text.rpartition(":")
    if not (place and colon and name):
        raise ConfigError(f"`MODULE:FACTORY` (={text}) has no factory name; {MEND}")
    with _current_directory_importable():
        found = _attribute(_module(place, text), name, text)
        if isinstance(found, nn.Module):
            return Built(found, None)
        if not callable(found):
            raise ConfigError(f"`{name}` of `{place}` (={found!r}) is neither a function nor a model; {MEND}")
        try:
            result = found()
        except Exception as error:
            raise ConfigError(
                f"`{text}` failed with {type(error).__name__}: {error}; it must build its model without arguments"
            ) from error
    return _checked(result, text)


def _module(place: str, text: str) -> ModuleType:
    try:
        if place.endswith(".py"):
            return _from_file(Path(place))
        return importlib.import_module(place)
    except Exception as error:  # the user's module may raise anything while it is imported
        raise ConfigError(
            f"`{place}` of `MODULE:FACTORY` (={text}) cannot be imported: {type(error).__name__}: {error}; {MEND}"
        ) from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    name = f"_fxsparse_factory_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python source")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attribute(module: ModuleType, name: str, text: str) -> Any:
    try:
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part)
        return found
    except AttributeError as error:
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(
            f"`{name}` is not in `MODULE:FACTORY` (={text}); the module offers {', '.join(names) or 'nothing'}"
        ) from error


def _checked(result: Any, text: str) -> Built:
    if isinstance(result, nn.Module):
        return Built(result, None)
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module):
        model, inputs = result
        if isinstance(inputs, tuple):
            return Built(model, inputs)
        raise ConfigError(
            f"`{text}` returned example inputs of type `{type(inputs).__name__}`; give a tuple: return model, (x,)"
        )
    raise ConfigError(f"`{text}` returned `{type(result).__name__}`; return a model or (model, example_inputs)")


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before
