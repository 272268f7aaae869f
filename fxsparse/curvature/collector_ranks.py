"""Which of several processes this one is, and what they tell each other."""

from __future__ import annotations

import hashlib
from typing import TypeVar

import torch
import torch.distributed as dist

from fxsparse.errors import ConfigError, DataError

T = TypeVar("T")

_SEED_STEP = 0x9E3779B97F4A7C15


def ranks() -> int:
    """How many processes run together; 1 for one alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def own_draws(device: torch.device) -> torch.Generator:
    """A generator whose draws differ from rank to rank; seed 0 on rank 0."""
    return torch.Generator(device).manual_seed(rank() * _SEED_STEP % (1 << 63))


def set_draws(generator: torch.Generator, state: torch.Tensor, saved_by: int) -> None:
    """Go on with saved draws; another rank or kind of device than that which saved them derives its own from them.

    Raises:
        ConfigError: it is the state of no generator.
    """
    if saved_by == rank() and state.shape == generator.get_state().shape:
        try:
            generator.set_state(state.cpu())
        except RuntimeError as error:
            raise ConfigError(f"`generator` of the state is damaged: {error}") from error
        return
    digest = hashlib.sha256(state.cpu().numpy().tobytes() + str(rank()).encode()).digest()
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def told(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What every rank of the group says, in the order of ranks.

    Raises:
        ConfigError: processes do not run together.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError("`all_reduce` needs processes that run together: call torch.distributed.init_process_group")
    every: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(every, value, group=group)
    return every


def agreed(value: bool | None) -> bool:
    """Whether all ranks say so; None tells that this rank failed.

    Raises:
        DataError: another rank failed.
    """
    every = [value] if ranks() == 1 else told(value)
    if value is not None and None in every:
        raise DataError(f"rank {every.index(None)} could not take in its batch: look at its error")
    return all(every)
