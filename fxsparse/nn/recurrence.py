"""Recurrent layers on CUDA, where derivatives of any kind are asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def differentiable_recurrence(model: nn.Module) -> Iterator[None]:
    """Run recurrent layers without cuDNN.

    cuDNN's have no backward pass in evaluation mode, and no second derivative in any; torch's own have both. Models
    without recurrent layers keep cuDNN for their convolutions.
    """
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        yield
        return
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before
