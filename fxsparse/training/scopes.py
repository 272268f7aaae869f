"""Global settings of torch, changed for the length of a block and always put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def read_streams(names: Iterable[str]) -> dict[str, Tensor]:
    """The random states of devices (uint8) by device name."""
    return {n: torch.get_rng_state() if n == "cpu" else _module(n).get_rng_state(n) for n in names}


def set_streams(streams: dict[str, Tensor]) -> None:
    """Set the random states of devices."""
    for name, stream in streams.items():
        if name == "cpu":
            torch.set_rng_state(stream)
        else:
            _module(name).set_rng_state(stream, name)


def _module(device: str) -> Any:
    return torch.get_device_module(torch.device(device))


@contextlib.contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Switch a model to train or eval mode; every module's own flag is put back afterwards.

    Modules that stand in eval mode inside a model in train mode (a frozen base) stay there.
    """
    flags = [(module, module.training) for module in model.modules()]
    if training and not model.training:
        model.train()
    elif not training:
        model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Run under deterministic algorithms; the switch is put back afterwards."""
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if wanted:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if wanted:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
