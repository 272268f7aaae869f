"""Random draws that depend on nothing but their key, and the global generators given back as they were."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float64
from torch import Generator, Tensor


def generator(seed: int, tensor_index: int, update_index: int, purpose: str) -> Generator:
    """A fresh CPU generator for one draw; the same key gives the same draw in every process.

    Args:
        seed: The user's seed.
        tensor_index: Position of the weight in the model's order.
        update_index: Number of the mask update; 0 for initial masks.
        purpose: What is drawn, such as "initial_mask" or "grow".
    """
    key = f"{int(seed)}/{int(tensor_index)}/{int(update_index)}/{purpose}".encode()
    state = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(state)


def random_scores(shape: Sequence[int], generator: Generator) -> Float64[Tensor, "*shape"]:
    """Float64 draws of U(0, 1) on the CPU; their top-k is a uniformly random k-subset."""
    return torch.rand(tuple(shape), dtype=torch.float64, generator=generator, device="cpu")


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore every random generator on leaving: torch on all devices, Python, and NumPy where it is loaded."""
    state = rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state["torch"])
        if "accelerator" in state:
            used_accelerator().set_rng_state_all(state["accelerator"])
        if "mps" in state:
            torch.mps.set_rng_state(state["mps"])
        random.setstate(state["python"])
        if "numpy" in state:
            sys.modules["numpy"].random.set_state(state["numpy"])


def used_accelerator() -> Any:
    """The module of the devices beside the CPU, such as torch.cuda; None where there are none or none was used."""
    device = torch.accelerator.current_accelerator()
    if device is None or device.type == "mps":  # a module of other functions, which is asked for itself
        return None
    module = torch.get_device_module(device)
    if not hasattr(module, "set_rng_state_all"):  # a backend without random numbers
        return None
    return module if module.is_available() and module.is_initialized() else None


def accelerator_states() -> list[Tensor]:
    """The random states of those devices."""
    module = used_accelerator()
    return [] if module is None else list(module.get_rng_state_all())


def rng_state() -> dict[str, Any]:
    """The state of every global random generator, by its library's name."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if states := accelerator_states():
        state["accelerator"] = states
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    numpy = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "random"):
        state["numpy"] = numpy.random.get_state()
    return state


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with all global generators seeded, and restore them on leaving.

    Devices that nothing has used yet are left alone: `torch.manual_seed` would note the seed for them, for good.
    """
    with preserved_rng():
        torch.default_generator.manual_seed(seed)
        if (accelerator := used_accelerator()) is not None:
            accelerator.manual_seed_all(seed)
        if torch.backends.mps.is_available():
            torch.mps.manual_seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed)
        yield
