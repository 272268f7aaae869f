"""Models whose parameters are spread over ranks by `fully_shard`: whole for a while, as on one rank."""

from __future__ import annotations

import contextlib
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.nn.sharded import is_sharded, whole
from fxsparse.training.distributed import check_not_sharded, reshard

_SHARDING = "torch.distributed.fsdp"
_DISTRIBUTED = "torch.distributed"


@dataclass(eq=False)
class Gathered:
    """Stand-ins for the sharded parameters of a model; none for a model on one rank.

    A stand-in takes no memory but while `whole` lasts. There, the hooks that gather and scatter parameters layer by
    layer are off: statistics are sums over samples, each rank collects its own, and nothing is scattered. The modules
    are of their own classes there, so that the model can be copied.

    Attributes:
        places: module and attribute of each sharded parameter.
        shards: the parameter there.
        whole_ones: its stand-in, the same one for a tied parameter.
        hooked: the modules with such hooks.
        classed: the modules whose class `fully_shard` replaced.
    """

    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    shards: list[nn.Parameter] = field(default_factory=list)
    whole_ones: list[nn.Parameter] = field(default_factory=list)
    hooked: list[nn.Module] = field(default_factory=list)
    classed: list[nn.Module] = field(default_factory=list)

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
            if _own_class(module) is not type(module):
                made.classed.append(module)
            for attribute, parameter in module._parameters.items():
                if parameter is not None and is_sharded(parameter):
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
            pairs = {id(shard): (shard, one) for shard, one in zip(self.shards, self.whole_ones, strict=True)}
            for shard, stand_in in pairs.values():
                stand_in.data = whole(shard)
            for module in self.hooked:
                stack.enter_context(_without_hooks(module))
            for module in self.classed:
                stack.enter_context(_plain(module))
            yield

    def _empty(self) -> None:
        for shard, stand_in in zip(self.shards, self.whole_ones, strict=True):
            stand_in.data = _empty(shard)


def _fully_sharded(model: nn.Module) -> bool:
    """Whether the model itself, or parts of it, went through `fully_shard`, and all sharded parameters with them."""
    loaded = sys.modules.get(_SHARDING)  # without it there is none
    if loaded is None or any(isinstance(module, loaded.FullyShardedDataParallel) for module in model.modules()):
        return False
    reshard(model)
    sharding = [module for module in model.modules() if isinstance(module, loaded.FSDPModule)]
    held = {id(parameter) for module in sharding for parameter in module.parameters()}
    sharded = {id(parameter) for parameter in model.parameters() if is_sharded(parameter)}
    return bool(sharded) and sharded <= held


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


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before `fully_shard` gave it another one."""
    kind = type(module)
    if not kind.__module__.startswith(_SHARDING) or len(kind.__bases__) != 2:
        return kind
    own: type[nn.Module] = kind.__bases__[1]
    return own


@contextlib.contextmanager
def _plain(module: nn.Module) -> Iterator[None]:
    """Of its own class, and without the records of sharding, which cannot be copied."""
    kind, before = type(module), dict(module.__dict__)
    records = {
        name
        for name, value in before.items()
        if isinstance(value, dict) and any(_is_record(each) for each in value.values())
    }
    own = module.__dict__
    try:
        module.__class__ = _own_class(module)
        for name in records:
            del own[name]
        yield
    finally:
        module.__class__ = kind
        own.update({name: before[name] for name in records})


def _is_record(value: object) -> bool:
    return type(value).__module__.startswith(_DISTRIBUTED) and not isinstance(value, nn.Module | Tensor)
