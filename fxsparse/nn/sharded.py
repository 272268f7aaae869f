"""Tensors that are spread over ranks (DTensor, as `fully_shard` makes them): their parts here, and the whole."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor or parameter is a DTensor."""
    loaded = sys.modules.get("torch.distributed.tensor")  # without it there is none
    return loaded is not None and isinstance(tensor, loaded.DTensor)


@torch.no_grad()
def part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory; the tensor itself where it is not spread."""
    held: Tensor = as_dtensor(tensor).to_local() if is_sharded(tensor) else tensor
    return held


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The tensor with what all ranks hold, which all of them ask for; the tensor itself where it is not spread."""
    gathered: Tensor = as_dtensor(tensor).full_tensor() if is_sharded(tensor) else tensor
    return gathered


@torch.no_grad()
def part_like(values: Tensor, like: Tensor) -> Tensor:
    """The part of a tensor, whole and equal on every rank, that stands where this rank's part of `like` does."""
    if not is_sharded(like):
        return values
    from torch.distributed.tensor import distribute_tensor

    spread = as_dtensor(like)
    held: Tensor = distribute_tensor(values, spread.device_mesh, spread.placements, src_data_rank=None).to_local()
    return held


@torch.no_grad()
def rebuilt(held: Tensor, like: Tensor) -> Tensor:
    """The whole of a tensor of which this rank holds a part as it holds its part of `like`."""
    from torch.distributed.tensor import DTensor

    spread = as_dtensor(like)
    gathered: Tensor = DTensor.from_local(
        held, spread.device_mesh, spread.placements, shape=spread.shape, stride=spread.stride()
    ).full_tensor()
    return gathered


@torch.no_grad()
def fill_zeros_(tensor: Tensor, where: Tensor) -> None:
    """Write zeros where the mask, whole on every rank, is True."""
    part(tensor).masked_fill_(part_like(where, tensor), 0)


def check_whole(model: nn.Module) -> None:
    """Raise ConfigError for a model with a parameter that is spread over ranks; the message says how to gather it."""
    name = next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None)
    if name is not None:
        raise ConfigError(
            f"`{name}` (=DTensor) is spread over ranks: on every rank take torch.distributed.checkpoint.state_dict."
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), load it into the model as it "
            "was before fully_shard, and go on with that one"
        )


def as_dtensor(tensor: Tensor) -> Any:
    """The tensor as a DTensor, for its own methods."""
    return tensor.data if isinstance(tensor, nn.Parameter) else tensor.detach()
