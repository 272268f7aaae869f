"""Whether a rewritten model can differ from its original only where one run shows it.

What a model does can depend on its mode in three places: inside a module, in Python code that reads the mode, and in
code that became a graph. If the modules are the original's, the Python code runs as it did, and the graphs call the
modules as often as the original did, then nothing is left that one mode shows and the other does not: a graph stands
only for code that was traced alike in both modes (see `fxsparse.graph.tracer`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from fxsparse.graph import provenance
from fxsparse.graph.captured import CapturedModule
from fxsparse.graph.tracer import is_layer, is_leaf
from fxsparse.graph.tree import modules_of
from fxsparse.nn import SPARSE_TYPES, masked_weight

_RUN_BY_CALLS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NOT_RUN = frozenset(
    name for name, value in nn.Module().__dict__.items() if isinstance(value, dict | set) and name not in _RUN_BY_CALLS
)
_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size})
_NESTED = (tuple, list, dict, set, frozenset)
_OURS = "_fxsparse_"  # what is kept of masks and plans
_OF_GRAPHS = frozenset(fx.GraphModule(nn.Module(), fx.Graph()).__dict__) | {"_origin", "_inherits"}


def alike(model: nn.Module, other: nn.Module, calls: Mapping[str, int]) -> bool:
    """Whether `other` is `model` but for masks on its weights and for graphs that stand for its code.

    False says nothing: the two may behave alike all the same.

    Args:
        model: the original.
        other: what was made of it.
        calls: how often each module of `model` (by its first path) was called in a run.
    """
    found = modules_of(other)
    twins = dict(found)
    originals = modules_of(model)
    if twins.keys() != {path for path, _ in originals}:
        return False
    if not all(_same(module, twins[path]) for path, module in originals):
        return False
    graphs = {path: module for path, module in found if isinstance(module, CapturedModule)}
    names = {id(module): path for path, module in found}
    return not graphs or _calls_agree(dict(originals), graphs, names, calls)


def _same(module: nn.Module, twin: nn.Module) -> bool:
    """Whether the two are of one kind and hold the same, masks left out."""
    kind, other = type(module), type(twin)
    if isinstance(module, torch.jit.ScriptModule):
        return module is twin
    captured = isinstance(twin, CapturedModule)
    if isinstance(twin, CapturedModule):
        if twin.origin is not (module.origin if isinstance(module, CapturedModule) else kind) or not _honest(twin):
            return False
    elif other is not kind and SPARSE_TYPES.get(kind) is not other:
        return False
    before, after = module.__dict__, twin.__dict__
    if len(after) != len(before):
        new = {name for name in after.keys() - before.keys() if not name.startswith(_OURS)}
        if new and not (captured and new <= _OF_GRAPHS):
            return False
    return (
        all(
            _alike_values(value, after.get(name, module))
            for name, value in before.items()
            if name not in _NOT_RUN and value is not after.get(name, module)
        )
        and module._modules.keys() == twin._modules.keys()
        and module._buffers.keys() <= twin._buffers.keys()
        and module._parameters.keys() == twin._parameters.keys()
        and all(_same_tensor(tensor, twin._parameters[name]) for name, tensor in module._parameters.items())
    )


def _same_tensor(tensor: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether they are of one kind; their values show in every run."""
    if tensor is None or other is None:
        return tensor is other
    told = (type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad)
    return told == (type(other), other.shape, other.dtype, other.device, other.requires_grad)


def _alike_values(value: Any, other: Any) -> bool:
    """Whether an attribute and its copy are the same, as far as that can be told; NaN equals itself."""
    if value is other:
        return True
    if type(value) is not type(other):
        return False
    if type(value) in _PLAIN:
        return bool(value == other) or (value != value and other != other)
    if isinstance(value, _NESTED):
        if len(value) != len(other):
            return False
        if isinstance(value, dict):
            return all(map(_alike_values, value.values(), other.values()))
        return isinstance(value, set | frozenset) or all(map(_alike_values, value, other))
    return True


def _honest(graph: CapturedModule) -> bool:
    """Whether passes have added masks to the graph and nothing else."""
    for node in graph.graph.nodes:
        if provenance.read(node) is None or node.op in ("get_attr", "call_module"):
            continue
        if node.op != "call_function" or node.target is not masked_weight:
            return False
    return True


def _calls_agree(
    originals: Mapping[str, nn.Module],
    graphs: Mapping[str, CapturedModule],
    names: Mapping[int, str],
    calls: Mapping[str, int],
) -> bool:
    """Whether every module that runs in a graph is called there as often as it was in the original."""
    expected: Counter[str] = Counter()
    for path, graph in graphs.items():
        for target, count in Counter(str(node.target) for node in graph.graph.find_nodes(op="call_module")).items():
            expected[names[id(graph.get_submodule(target))]] += count * calls.get(path, 0)
    if any(calls.get(path, 0) != count for path, count in expected.items()):
        return False
    return all(
        path in expected or path in graphs or not _lost(path, originals[path], graphs, expected) for path in calls
    )


def _lost(path: str, module: nn.Module, graphs: Mapping[str, CapturedModule], expected: Mapping[str, int]) -> bool:
    """Whether the code around this module is a graph that does not call it, though it would not be inlined."""
    if not (is_leaf(module) or is_layer(module)):
        return False
    around = path
    while around:
        around = around.rpartition(".")[0]
        if around in graphs:
            return True
        if around in expected:  # a module that a graph calls, and that calls this one
            return False
    return False
