"""What a recorded run can reach besides its inputs: a model's own tensors, and random numbers of Python."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def own_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, then buffers."""
    yield from model.parameters()
    yield from model.buffers()


def names_of(model: nn.Module) -> dict[int, str]:
    """The first name of every tensor that a model holds, plain attributes included, by the tensor's identity."""
    names: dict[int, str] = {}
    for members in (model.named_parameters(), model.named_buffers()):
        for name, tensor in members:
            names.setdefault(id(tensor), name)
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if isinstance(value, torch.Tensor):
                names.setdefault(id(value), f"{path}.{name}".lstrip("."))
    return names


def python_generators() -> tuple[Any, ...]:
    """What tells whether Python's or numpy's random numbers were drawn between two calls."""
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None and hasattr(numpy, "random") else None
    return random.getstate(), repr(state)
