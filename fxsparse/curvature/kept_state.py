"""What a run may change of a model: kept by value, and given back afterwards."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.graph.tree import parameters_of
from fxsparse.graph.writes import NoticingWrites, ParameterWrites
from fxsparse.nn import masked_weights

_DICTS = (dict, OrderedDict, defaultdict, Counter)
_CONTAINERS = frozenset({*_DICTS, list, set, deque})


@contextlib.contextmanager
def kept_attributes(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """Give back every attribute of every module, buffers among them; always, also what a run wrote in place.

    Lists, dicts, sets and deques get their contents back, whatever lies in them, and tensors their values. Parameters
    and the masks beside them stay as they are; so do tensors with a graph, numpy arrays and objects of other kinds.

    Args:
        model: The model.
        modules: All of its modules, where they are known already.
    """
    own = {id(buffer) for weight in masked_weights(model).values() for buffer in weight.buffers}
    containers: dict[int, tuple[Any, Any]] = {}
    tensors: dict[int, tuple[Tensor, int, Tensor]] = {}
    for module in model.modules() if modules is None else modules:
        if _is_plain(module):  # nothing inside of its attributes changes
            containers[id(module.__dict__)] = module.__dict__, module.__dict__.copy()
        else:
            _hold([module.__dict__, *module._buffers.values()], containers, tensors, own)
    try:
        yield
    finally:
        for value, held in containers.values():
            if value or held:
                _refill(value, held or ())
        _write_back(tensors.values())


class KeptParameters:
    """Gives back the values of parameters into which the model's own code writes, such as `max_norm` of embeddings.

    The first run is watched: what is about to be written into is copied before. Later runs copy what was written into
    then; a parameter that is written into for the first time later raises a warning, and is kept from then on.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._written: set[str] | None = None

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Run the model inside of it; parameters are as before afterwards, always."""
        parameters = dict(parameters_of(self.model))
        versions = {name: _version(parameter) for name, parameter in parameters.items()}
        copies = {name: parameters[name].detach().clone() for name in self._written or () if name in parameters}
        first, completed = self._written is None, False
        writes = ParameterWrites(self.model) if first else None
        try:
            with contextlib.nullcontext() if writes is None else NoticingWrites(writes):
                yield
            completed = True
        finally:
            bumped = {name for name, each in parameters.items() if _version(each) != versions[name]}
            changed = set() if writes is None else set(writes.undo())
            _write_back((parameters[name], _version(parameters[name]), value) for name, value in copies.items())
            if completed or not first:
                self._learn(changed | bumped, first)

    def _learn(self, names: set[str], first: bool) -> None:
        known = self._written or set()
        for name in () if first else sorted(names - known):
            warnings.warn(
                f"the model wrote into its parameter `{name}`, which it had not done before: it is not as it was; "
                "later batches leave it as it is",
                stacklevel=6,
            )
        self._written = known | names


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a layer of torch's own without buffers, hooks, or what its user put there and may change."""
    if not type(module).__module__.startswith("torch.nn.modules.") or module._buffers or module._modules:
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    return not any(_may_change(value) for name, value in module.__dict__.items() if name[0] != "_")


def _may_change(value: Any) -> bool:
    if isinstance(value, tuple):
        return not all(isinstance(each, int | float | str | None) for each in value)
    return isinstance(value, Tensor) or type(value) in _CONTAINERS


def _hold(
    values: Iterable[Any],
    containers: dict[int, tuple[Any, Any]],
    tensors: dict[int, tuple[Tensor, int, Tensor]],
    left_out: set[int],
) -> None:
    """Copies of all containers and tensors that are reached."""
    ahead = list(values)
    while ahead:
        value = ahead.pop()
        kind = type(value)
        if kind in _CONTAINERS:
            if id(value) not in containers:
                containers[id(value)] = value, value.copy() if value else None  # most of a module's are empty
                ahead += value.values() if kind in _DICTS else value
        elif kind is tuple:
            ahead += value
        elif isinstance(value, Tensor) and id(value) not in tensors and id(value) not in left_out:
            plain = value.layout is torch.strided and not value.is_meta and not isinstance(value, nn.Parameter)
            if plain and not value.requires_grad:
                tensors[id(value)] = value, _version(value), value.detach().clone()


def _refill(value: Any, held: Any) -> None:
    """Give a container its contents back, where they are others."""
    if len(value) == len(held) and all(map(is_, value, held)):
        if type(value) not in _DICTS or all(map(is_, value.values(), held.values())):
            return
    value.clear()
    if held:
        (value.extend if isinstance(value, list | deque) else value.update)(held)


def _write_back(held: Iterable[tuple[Tensor, int, Tensor]]) -> None:
    """Give tensors their values back, where they are others; a version counts as one."""
    kept = list(held)
    elsewhere = [(t, v) for t, n, v in kept if t.device.type != "cpu" and _version(t) == n and t.shape == v.shape]
    same = set()
    if elsewhere:  # asked once, for each answer waits for the device
        place = elsewhere[0][0].device
        differ = torch.stack([(tensor != value).any().to(place) for tensor, value in elsewhere]).tolist()
        same = {id(tensor) for (tensor, _), changed in zip(elsewhere, differ, strict=True) if not changed}
    for tensor, version, value in kept:
        if id(tensor) in same:
            continue
        if tensor.shape != value.shape or tensor.dtype != value.dtype or tensor.device != value.device:
            tensor.data = value
        elif tensor.device.type != "cpu" or _version(tensor) != version or not torch.equal(tensor.detach(), value):
            tensor.data.copy_(value)  # the version stays: the values are those of before


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
