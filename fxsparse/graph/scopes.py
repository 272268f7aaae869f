"""Scopes that give back the global state which a run may have touched."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from fxsparse.graph.tree import modules_of
from fxsparse.sparsity.random import preserved_rng as preserved_rng
from fxsparse.sparsity.random import rng_state as rng_state
from fxsparse.sparsity.random import seeded as seeded

SEED = 20240229
"""Where runs that are compared with each other start from."""


@contextmanager
def collector_paused() -> Iterator[None]:
    """Let the garbage collector rest, and leave it as it was.

    Many small objects that live on are made meanwhile, each of whose full collections would walk all that the process
    holds. What is freed by reference counts is freed as ever.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def rng_fingerprint() -> bytes:
    """The states of all global random generators as bytes: equal exactly when no generator has moved."""
    state = rng_state()
    devices = [state["torch"], *state.get("accelerator", []), *([state["mps"]] if "mps" in state else [])]
    return pickle.dumps(([bytes(device.numpy()) for device in devices], state["python"], state.get("numpy")))


@contextmanager
def mode_of(model: nn.Module, training: bool, modules: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """Set the training flag of every module of `model`, without calling `train`, and restore each on leaving.

    Args:
        model: the model.
        training: the flag.
        modules: all of its modules, where they are known already.
    """
    known = [module for _, module in modules_of(model)] if modules is None else modules
    before = [(module, _flag(module)) for module in known]
    try:
        for module, flag in before:
            if flag is not training:
                module.training = training
        yield
    finally:
        for module, flag in before:
            if _flag(module) is not flag:
                module.training = flag


def _flag(module: nn.Module) -> bool:
    known = module.__dict__
    return known["training"] if "training" in known else module.training  # scripted modules
