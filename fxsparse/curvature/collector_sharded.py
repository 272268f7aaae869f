"""Models whose parameters are spread over ranks by `fully_shard`: whole while a batch is collected, and only then."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.training.distributed import check_not_sharded

_SHARDING = "torch.distributed.fsdp"


@dataclass(eq=False)
class Gathered:
    """Stand-ins for the sharded parameters of a model; none for a model on one rank.

    A stand-in takes no memory but while `whole` lasts. There, the hooks that gather and scatter parameters layer by
    layer are off: statistics are sums over samples, each rank collects its own, and nothing is scattered.

    Attributes:
        places: module and attribute of each sharded parameter.
        shards: the parameter there.
        whole_ones: its stand-in, the same one for a tied parameter.
        hooked: the modules with such hooks.
    """

    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    shards: list[nn.Parameter] = field(default_factory=list)
    whole_ones: list[nn.Parameter] = field(default_factory=list)
    hooked: list[nn.Module] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> Gathered:
        """What is sharded in a model.

        Raises:
            ConfigError: something is sharded otherwise than by `fully_shard`.
        """
        made = cls()
        if not _fully_sharded(model):
            check_not_sharded(model)
            return made
        known: dict[int, nn.Parameter] = {}
        for module in model.modules():
            if any(_is_sharding(hook) for hook in _hooks(module)):
                made.hooked.append(module)
            for attribute, parameter in module._parameters.items():
                if parameter is not None and _is_sharded(parameter):
                    if id(parameter) not in known:
                        known[id(parameter)] = nn.Parameter(_empty(parameter), parameter.requires_grad)
                    made.places.append((module, attribute))
                    made.shards.append(parameter)
                    made.whole_ones.append(known[id(parameter)])
        return made

    @contextlib.contextmanager
    def stand_ins(self) -> Iterator[None]:
        """The model with stand-ins of the right shapes, without values."""
        before = [module._parameters[attribute] for module, attribute in self.places]
        try:
            for (module, attribute), stand_in in zip(self.places, self.whole_ones, strict=True):
                module._parameters[attribute] = stand_in
            yield
        finally:
            for (module, attribute), parameter in zip(self.places, before, strict=True):
                module._parameters[attribute] = parameter

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """The model with whole parameters and without the hooks of sharding; all ranks enter it together."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.stand_ins())
            stack.callback(self._empty)
            with torch.no_grad():
                for shard, stand_in in {
                    id(s): (s, w) for s, w in zip(self.shards, self.whole_ones, strict=True)
                }.values():
                    whole: Any = shard.detach()
                    stand_in.data = whole.full_tensor()
            for module in self.hooked:
                stack.enter_context(_without_hooks(module))
            yield

    def _empty(self) -> None:
        for shard, stand_in in zip(self.shards, self.whole_ones, strict=True):
            stand_in.data = _empty(shard)


def _fully_sharded(model: nn.Module) -> bool:
    """Whether the model itself, or parts of it, went through `fully_shard`, and all sharded parameters with them."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return False
    held: set[int] = set()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward pass without a backward pass, some parameters are still whole
            held |= {id(parameter) for parameter in module.parameters()}
    sharded = {id(parameter) for parameter in model.parameters() if _is_sharded(parameter)}
    return bool(sharded) and sharded <= held


def _is_sharded(parameter: Tensor) -> bool:
    return type(parameter.data).__name__ == "DTensor"


def _empty(parameter: Tensor) -> Tensor:
    """A tensor of the parameter's shape that holds one number."""
    return torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)


_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def _hooks(module: nn.Module) -> list[Any]:
    return [hook for name in _HOOKS for hook in getattr(module, name).values()]


def _is_sharding(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_SHARDING)


@contextlib.contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Without the hooks of sharding; the user's own stay."""
    before = {name: getattr(module, name) for name in _HOOKS}
    try:
        for name, hooks in before.items():
            setattr(module, name, OrderedDict((key, hook) for key, hook in hooks.items() if not _is_sharding(hook)))
        yield
    finally:
        for name, hooks in before.items():
            setattr(module, name, hooks)
