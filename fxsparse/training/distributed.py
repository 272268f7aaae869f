"""Several ranks: the model inside its wrappers, averaged gradients, equal masks."""

from __future__ import annotations

import gc
import hashlib
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import MaskedWeight
from fxsparse.nn.sharded import is_sharded
from fxsparse.sparsity.mask import Mask, MaskSet
from fxsparse.training.gradients import Gradient, dense_of
from fxsparse.training.updater import Method

_Made = TypeVar("_Made")
_TOLD = 1024  # bytes of a message to other ranks


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, AveragedModel and torch.compile, which prefix its names."""
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(model, (DistributedDataParallel, AveragedModel)):
            model = model.module
        elif isinstance(compiled, nn.Module):
            model = compiled
        else:
            return model


def check_not_sharded(model: nn.Module) -> None:
    """Raise ConfigError for a model whose parameters are spread over ranks."""
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.distributed.fsdp"):
            raise ConfigError(f"`{path}` (={type(module).__name__}) is sharded; masks need whole weights: use DDP")
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise ConfigError(f"`{name}` (=DTensor) is sharded; masks need whole weights: use DDP")


def check_sharding(
    model: nn.Module,
    weights: Mapping[str, MaskedWeight],
    method: Method,
    total_steps: int | None = None,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Raise ConfigError for ranks that do not train one model alike, or sharded weights that cannot be trained."""
    check_same_model(weights, method, total_steps, process_group(model), state)
    reshard(model)
    sharded = [name for name, weight in weights.items() if is_sharded(weight.weight)]
    if not sharded:
        check_not_sharded(model)
        return
    kind = type(method).__name__
    if method.needs_whole_weights:
        raise ConfigError(f"`{sharded[0]}` (=DTensor) is sharded; {kind} needs whole weights: use DDP")
    for name in sharded:
        if weights[name].packed:
            raise ConfigError(f"`{name}` is stored alive only and sharded; call restore_dense before fully_shard")


def agreed(work: Callable[[], _Made], model: object) -> _Made:
    """What every rank makes by itself; where one of them fails, all of them raise.

    Args:
        work: Talks to no other rank.
        model: The model that all of them train.

    Raises:
        ConfigError: another rank failed; the message has what it said.
    """
    inner = model if isinstance(model, nn.Module) else nn.Module()
    group = process_group(inner)
    if group is None:
        return work()
    made, failure = [], None
    try:
        made.append(work())
    except Exception as error:
        failure = error
    device = next((each.device for each in inner.parameters()), torch.device("cpu"))
    told = b"" if failure is None else f"{type(failure).__name__}: {failure}".encode()[:_TOLD]
    own = torch.zeros(_TOLD, dtype=torch.uint8)
    own[: len(told)] = torch.frombuffer(bytearray(told), dtype=torch.uint8) if told else own[:0]
    every = [bytes(each.tolist()).rstrip(b"\0").decode(errors="ignore") for each in _gathered(own.to(device), group)]
    if failure is not None:
        raise failure
    for rank, message in enumerate(every):
        if message:
            raise ConfigError(f"rank {rank} cannot go on, so this one (={dist.get_rank(group)}) does not: {message}")
    return made[0]


def reshard(model: nn.Module) -> None:
    """Spread what a forward pass without a backward pass left whole of a `fully_shard` model."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    if loaded is None:
        return
    for module in unwrap(model).modules():
        if isinstance(module, loaded.FSDPModule):
            module.reshard()


def process_group(model: nn.Module) -> dist.ProcessGroup | None:
    """The group of a DDP model; the default group where processes run together without one, None for one process."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = next((m.process_group for m in model.modules() if isinstance(m, DistributedDataParallel)), dist.group.WORLD)
    return group if group is not None and dist.get_world_size(group) > 1 else None


class Wrapper:
    """The DistributedDataParallel around a model, also one that was made after the model was given.

    Args:
        model: The model, in the wrapper or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._found: weakref.ref[DistributedDataParallel] | None = None
        self._looked = False

    def joins(self) -> bool:
        """Whether it runs in a `Join` context, where ranks end at different steps."""
        if not self._looked and dist.is_available() and dist.is_initialized():
            self._looked, found = True, self._find()
            self._found = None if found is None else weakref.ref(found)
        wrapper = None if self._found is None else self._found()
        return bool(getattr(getattr(wrapper, "_join_config", None), "enable", False))

    def _find(self) -> DistributedDataParallel | None:
        model = self._model()
        if model is None or process_group(model) is None:
            return None
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                return module
        inner = unwrap(model)
        every = [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]
        return next((each for each in every if any(module is inner for module in each.modules())), None)


@torch.no_grad()
def summed(tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """The sums over ranks, in new tensors; equal bits on every rank.

    Raises:
        RuntimeError: the ranks cannot talk to each other.
    """
    found = {name: each.clone() for name, each in tensors.items()}
    for each in found.values() if group is not None else ():
        dist.all_reduce(each, group=group)
    return found


@torch.no_grad()
def average(
    gradients: Mapping[str, Gradient | None], weights: Mapping[str, MaskedWeight], group: dist.ProcessGroup | None
) -> dict[str, Gradient | None]:
    """The mean over ranks, as DDP averages: G / ranks, summed. A weight without G on some ranks counts as 0 there.

    On several ranks G is made for all positions, one weight after the other.

    Raises:
        RuntimeError: the ranks cannot talk to each other.
    """
    if group is None:
        return dict(gradients)
    ranks, averaged = dist.get_world_size(group), dict(gradients)
    device = next(iter(weights.values())).weight.device
    found = torch.tensor([gradient is not None for gradient in gradients.values()], dtype=torch.int32, device=device)
    dist.all_reduce(found, group=group)
    for name, count in zip(gradients, found.tolist(), strict=True):
        if count:
            gradient = dense_of(gradients[name])
            shared = _zeros(weights[name]) if gradient is None else gradient / ranks
            dist.all_reduce(shared, group=group)
            averaged[name] = shared
    return averaged


def _zeros(weight: MaskedWeight) -> Tensor:
    """G of nothing, made without the other ranks."""
    parameter = weight.weight
    if weight.packed or is_sharded(parameter):
        return torch.zeros(weight.shape, dtype=parameter.dtype, device=parameter.device)
    return torch.zeros_like(parameter)


def masks_digest(masks: Mapping[str, Bool[Tensor, "*shape"]]) -> int:
    """64 bits of SHA-256 over names and masks, signed."""
    digest = MaskSet({name: Mask(mask) for name, mask in masks.items()}).digest()
    return int.from_bytes(bytes.fromhex(digest[:16]), "little", signed=True)


def check_same_model(
    weights: Mapping[str, MaskedWeight],
    method: Method,
    total_steps: int | None,
    group: dist.ProcessGroup | None,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Raise ConfigError, on every rank, where ranks have other masked weights, methods, lengths or states."""
    if group is None:
        return
    described = [(w.name, tuple(w.shape), str(w.weight.dtype), repr(w.spec.pattern)) for w in weights.values()]
    length = -1 if total_steps is None else total_steps
    moment = None if state is None else [state.get(key) for key in ("method", "step", "updates", "masks")]
    device = next((w.weight.device for w in weights.values()), torch.device("cpu"))
    hashes = [_hashed(described), _hashed(method), length, _hashed(moment)]
    every = [each.tolist() for each in _gathered(torch.tensor(hashes, dtype=torch.int64, device=device), group)]
    model_differs, method_differs, length_differs, state_differs = (
        len(set(values)) > 1 for values in zip(*every, strict=True)
    )
    if model_differs:
        raise ConfigError(
            f"`model` has other masked weights on other ranks (here {len(described)}: names, shapes, types and "
            "patterns must agree); build and transform the same model on every rank"
        )
    if method_differs:
        raise ConfigError(f"`method` (={method!r}) is another one on other ranks; give every rank the same")
    if length_differs:
        lengths = [None if values[2] < 0 else values[2] for values in every]
        raise ConfigError(
            f"`total_steps` (={total_steps}) differs between ranks (={lengths}), as where ranks have different amounts "
            "of data; take as many steps on every rank, as DistributedSampler gives"
        )
    if state_differs:
        raise ConfigError(
            f"`state` (={'none' if moment is None else f'of step {moment[1]}'}) is another one on other ranks; give "
            "every rank what one of them saved"
        )


def _hashed(value: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "little", signed=True)


def _gathered(own: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    every = [torch.zeros_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    return every


def check_shapes_stay(
    weights: Mapping[str, MaskedWeight], masks: Mapping[str, Tensor], group: dist.ProcessGroup | None
) -> None:
    """Raise ConfigError where parameters in alive-only storage would get another shape while ranks reduce them."""
    for name, mask in masks.items() if group is not None else ():
        if weights[name].packed and int(mask.sum()) != int(weights[name].mask.sum()):
            raise ConfigError(
                f"`{name}` is stored alive only, and this mask update changes how many of its entries live; ranks "
                "reduce gradients of fixed shapes: keep dense storage (restore_dense before the model is wrapped), or "
                "the sparsity of each layer constant"
            )


def check_equal_masks(masks: Mapping[str, Tensor], step: int, group: dist.ProcessGroup | None) -> None:
    """Raise DataError, on every rank, where the masks of the ranks differ."""
    if group is None:
        return
    own = torch.tensor([masks_digest(masks)], dtype=torch.int64, device=next(iter(masks.values())).device)
    digests = [f"{int(each) & (2**64 - 1):016x}" for each in _gathered(own, group)]
    if len(set(digests)) > 1:
        raise DataError(
            f"masks differ between ranks after step {step} (hashes {', '.join(digests)}); start all ranks from the "
            "same model and let all of them run every backward pass"
        )
