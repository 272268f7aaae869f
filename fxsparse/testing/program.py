"""A generated model as source code: what is printed is what runs."""

from __future__ import annotations

import hashlib
import linecache
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fxsparse.testing import generated
from fxsparse.testing.ingredients import Ingredient

HEADER = """\
import torch
import torch.nn.functional as F
from torch import nn

from fxsparse.testing import fill_
"""


@dataclass(frozen=True)
class Program:
    """A model in Python source with the seed of its weights and inputs; `str()` is a script that makes both.

    Attributes:
        source: The classes, the last of them `Model`, and a function `example_inputs(batch, dtype, generator)`.
        seed: Seed of weights and inputs.
        batch: Batch size of the example inputs, at least 3.
        dtype: Floating dtype of weights and inputs.
        ingredients: What the model is made of.
    """

    source: str
    seed: int = 0
    batch: int = 3
    dtype: torch.dtype = torch.float64
    ingredients: frozenset[Ingredient] = field(default=frozenset(), compare=False)

    def model(self) -> nn.Module:
        """A fresh model in train mode, the same each time; global random state is not touched."""
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = _compiled(self.source)["Model"]()
        model.__dict__["_script"] = str(self)
        return fill_(model, self.seed, self.dtype)

    def inputs(self, batch: int | None = None, seed: int | None = None) -> Any:
        """Example inputs: a tuple, or (args, kwargs) where the model takes keywords.

        Args:
            batch: Batch size; `self.batch` by default.
            seed: Another seed gives other inputs of the same shapes.
        """
        generator = torch.Generator().manual_seed(self.seed if seed is None else seed)
        return _compiled(self.source)["example_inputs"](batch or self.batch, self.dtype, generator)

    def __str__(self) -> str:
        return (
            f"{HEADER}\n\n{self.source}\n\n"
            f"model = fill_(Model(), {self.seed}, {self.dtype})\n"
            f"inputs = example_inputs({self.batch}, {self.dtype}, torch.Generator().manual_seed({self.seed}))\n"
        )

    def __repr__(self) -> str:
        return str(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How hypothesis prints a failing example."""
        printer.text(f"\n{self}")


@torch.no_grad()
def fill_(model: nn.Module, seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Cast a model and fill its floating parameters and buffers from a seed; none is exactly zero.

    Weights are normal with the deviation 1/sqrt(fan-in), so that values keep their size; vectors that scale (named
    weight, gain or var) are in [0.5, 1.5]; other vectors are normal with deviation 0.3.

    Args:
        model: Any model.
        seed: Of a generator of its own.
        dtype: Floating dtype of the result.

    Returns:
        The model.
    """
    model.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if not tensor.is_floating_point():
            continue
        drawn = torch.empty(tensor.shape, dtype=torch.float64)
        if tensor.ndim < 2 and name.rpartition(".")[2].endswith(("weight", "gain", "var")):
            drawn.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim < 2:
            drawn.normal_(0.0, 0.3, generator=generator)
        else:
            drawn.normal_(0.0, (tensor.shape[0] / max(tensor.numel(), 1)) ** 0.5, generator=generator)
        tensor.copy_(drawn)
    return model


@lru_cache(maxsize=256)
def _compiled(source: str) -> dict[str, Any]:
    """The namespace of the source; classes are known to pickle under names of their own."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    file = f"<generated {digest}>"
    text = f"{HEADER.rpartition('from fxsparse')[0]}\n{source}"
    namespace: dict[str, Any] = {"__name__": generated.__name__}
    exec(compile(text, file, "exec", dont_inherit=True), namespace)
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # for tracebacks
    for name, value in namespace.items():
        if getattr(value, "__module__", None) == generated.__name__:
            value.__qualname__ = f"{name}_{digest}"
            generated.KNOWN[value.__qualname__] = value
    namespace["Model"].__repr__ = _script
    return namespace


def _script(model: nn.Module) -> str:
    script: str = model.__dict__.get("_script", type(model).__name__)
    return script
