"""Scopes that give back the global state which a run may have touched."""

from __future__ import annotations

import gc
import pickle
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxsparse.graph.tree import modules_of

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


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore every random generator on leaving: torch on all devices, Python, and NumPy where it is loaded."""
    state = rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state["torch"])
        if "cuda" in state:
            torch.cuda.set_rng_state_all(state["cuda"])
        if "mps" in state:
            torch.mps.set_rng_state(state["mps"])
        random.setstate(state["python"])
        if "numpy" in state:
            sys.modules["numpy"].random.set_state(state["numpy"])


def rng_state() -> dict[str, Any]:
    """The state of every global random generator, by its library's name."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    numpy = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "random"):
        state["numpy"] = numpy.random.get_state()
    return state


def rng_fingerprint() -> bytes:
    """The states of all global random generators as bytes: equal exactly when no generator has moved."""
    state = rng_state()
    devices = [state["torch"], *state.get("cuda", []), *([state["mps"]] if "mps" in state else [])]
    return pickle.dumps(([bytes(device.numpy()) for device in devices], state["python"], state.get("numpy")))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with all global generators seeded, and restore them on leaving."""
    with preserved_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed)
        yield


@contextmanager
def mode_of(model: nn.Module, training: bool) -> Iterator[None]:
    """Set the training flag of every module of `model`, without calling `train`, and restore each on leaving."""
    before = [(module, _flag(module)) for _, module in modules_of(model)]
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
