"""Hypothesis strategies that only tests need; the public ones are in `fxsparse.testing`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from hypothesis import strategies as st
from torch import nn

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: tuple[Optimizer, ...] = (
    partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True),
    partial(torch.optim.Adam, lr=0.05, weight_decay=0.1, amsgrad=True),
    partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1, maximize=True),
    partial(torch.optim.NAdam, lr=0.05, weight_decay=0.1),
    partial(torch.optim.RAdam, lr=0.05, weight_decay=0.1),
    partial(torch.optim.Adamax, lr=0.05, weight_decay=0.1),
    partial(torch.optim.Adagrad, lr=0.05, weight_decay=0.1, initial_accumulator_value=0.1),
    partial(torch.optim.Adadelta, lr=0.5, weight_decay=0.1),
    partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    partial(torch.optim.ASGD, lr=0.05, weight_decay=0.1),
    partial(torch.optim.Rprop, lr=0.01),
)
"""Optimizers that move an entry only by its own gradient and value."""


def optimizers() -> st.SearchStrategy[Optimizer]:
    """Factories of optimizers, with momentum and weight decay where they have them."""
    return st.sampled_from(OPTIMIZERS)
