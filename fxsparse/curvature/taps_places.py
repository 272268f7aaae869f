"""Which nodes of a graph can be tapped, and how.

1. Linear layers and convolutions with zero padding of torch's own classes, `F.linear`: a fused layer takes their place.
2. Sparse layers, other paddings: a tap behind the layer.
3. Embeddings and norms: a tap behind the layer.
4. Fused attention: a tap at its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxsparse.curvature.fisher_scope import collecting_scope
from fxsparse.curvature.groups import Grouping
from fxsparse.curvature.taps_behind import gate_tap, tap_behind
from fxsparse.curvature.taps_fused import fused_conv, fused_linear
from fxsparse.graph.inputs import fresh_inputs, split_inputs
from fxsparse.nn.functional import masked_weight
from fxsparse.nn.masked import mask_name
from fxsparse.nn.sparse_module import SparseModule
from fxsparse.passes.instrument_fisher import Tap
from fxsparse.passes.places import split_name
from fxsparse.passes.snapshot import graphs_of

Names = tuple[str | None, str | None]
Refused = dict[str, str]


@dataclass(frozen=True, eq=False)
class Layer:
    """One node that reads a weight and a bias.

    Attributes:
        path: of its graph.
        graph: the graph.
        node: the call.
        owner: the module that it calls; None for a function.
        mask: path, in the graph, of the mask that the weight is read through.
    """

    path: str
    graph: fx.GraphModule
    node: fx.Node
    owner: nn.Module | None
    mask: str | None = None


def places_of(
    module: nn.Module, wanted: Mapping[str, Tensor], refused: Refused, reasons: Mapping[str, str]
) -> Iterator[tuple[Layer, Names]]:
    """The layers that can be tapped with the parameters whose statistics they give; others go into `refused`."""
    names = {id(parameter): name for name, parameter in wanted.items()}
    reads: dict[str, list[tuple[Layer, int] | str]] = {}
    layers: list[Layer] = []
    for path, graph in graphs_of(module).items():
        for node in graph.graph.nodes:
            for name, found in _reads(path, graph, node, names, layers):
                reads.setdefault(name, []).append(found)
    pairs: dict[int, list[str | None]] = {id(layer): [None, None] for layer in layers}
    for name, places in reads.items():
        place = places[0]
        if len(places) > 1:
            refused[name] = f"it is read {len(places)} times, whose cross terms a tap cannot see"
        elif isinstance(place, str):
            refused[name] = place
        elif name in reasons:
            refused[name] = reasons[name]
        else:
            pairs[id(place[0])][place[1]] = name
    for layer in layers:
        weight, bias = pairs[id(layer)]
        if weight is not None or bias is not None:
            yield layer, (weight, bias)


def _reads(
    path: str, graph: fx.GraphModule, node: fx.Node, names: Mapping[int, str], layers: list[Layer]
) -> Iterator[tuple[str, tuple[Layer, int] | str]]:
    """What a node reads: the layer and which of its operands, or why there is no tap."""
    if node.op == "call_module":
        owner = graph.get_submodule(str(node.target))
        if not any(True for _ in owner.parameters()):
            return
        mask = f"{node.target}.{mask_name('weight')}" if isinstance(owner, SparseModule) else None
        layer = Layer(path, graph, node, owner, mask)
        layers.append(layer)
        for attribute, own in owner.named_parameters():
            if id(own) in names:
                operand = {"weight": 0, "bias": 1}.get(attribute)
                known = operand is not None and len(node.args) == 1 and not node.kwargs
                missing = f"it belongs to a {type(owner).__name__}, called in a way that has no tap"
                yield names[id(own)], (layer, operand) if known and operand is not None else missing
    elif node.op == "get_attr":
        place, attribute = split_name(str(node.target))
        holder = graph.get_submodule(place) if place else graph
        parameter = holder._parameters.get(attribute)
        if parameter is not None and id(parameter) in names:
            yield from ((names[id(parameter)], found) for found in _function_reads(path, graph, node, layers))


def _function_reads(
    path: str, graph: fx.GraphModule, node: fx.Node, layers: list[Layer]
) -> Iterator[tuple[Layer, int] | str]:
    """`F.linear(x, weight, bias)`, the weight as it is or through its mask."""
    for user in node.users:
        read, mask = node, None
        if user.target is masked_weight and isinstance(user.args[1], fx.Node) and len(user.users) == 1:
            mask, read = str(user.args[1].target), user
            (user,) = user.users
        operands = [*user.args, *user.kwargs.values()]
        where = [k for k, operand in enumerate(operands) if operand is read]
        plain = user.target is F.linear and set(user.kwargs) <= {"bias"} and len(user.args) >= 2
        if not plain or len(where) != 1 or where[0] not in (1, 2) or (where[0] == 2 and mask is not None):
            yield f"`{user.name}` reads it in a way that has no tap"
            continue
        layer = next((each for each in layers if each.node is user), None)
        if layer is None:
            layer = Layer(path, graph, user, None)
            layers.append(layer)
        if mask is not None:
            object.__setattr__(layer, "mask", mask)
        yield layer, where[0] - 1


def tap_of(layer: Layer, names: Names, groupings: Mapping[str, tuple[Grouping, ...]]) -> Tap | Refused:
    """The tap of a layer, or why each parameter has none."""
    owner, node = layer.owner, layer.node
    every = [name for name in names if name is not None]
    axis = _axis(groupings[names[0]]) if names[0] is not None else 0
    if axis is None:
        return dict.fromkeys(every, "its groups are no slices along one axis")
    fresh = _read_in_place(node, layer.graph)
    kind = None if owner is None else _kind(owner)
    if isinstance(kind, str):
        return dict.fromkeys(every, kind)
    sizes = tuple(_size(groupings[name]) if name is not None else 0 for name in names)
    base: dict[str, Any] = {"graph": layer.path, "node": node.name, "parameters": names, "sizes": sizes}
    if owner is None or isinstance(owner, nn.Linear):
        if owner is None or _is_plain(owner, nn.Linear):
            return Tap(**base, function=fused_linear, mask=layer.mask, arguments=(axis,), instead=True)
        return Tap(**base, function=tap_behind, mask=layer.mask, arguments=("linear", (axis,), fresh))
    if isinstance(owner, _ConvNd):
        return _conv_tap(owner, layer, base, fresh)
    assert kind is not None
    return Tap(**base, function=tap_behind, arguments=(*kind, fresh))


def _conv_tap(owner: _ConvNd, layer: Layer, base: dict[str, Any], fresh: bool) -> Tap:
    transposed = isinstance(owner, _ConvTransposeNd)
    last = owner.groups, transposed, tuple(owner.output_padding) if transposed else ()
    if type(owner).__module__ == nn.Conv1d.__module__ and _is_plain(owner, type(owner)):
        if owner.padding_mode == "zeros" and not isinstance(owner.padding, str):
            options = owner.stride, tuple(owner.padding), owner.dilation, *last
            return Tap(**base, function=fused_conv, mask=layer.mask, arguments=options, instead=True)
    padding = owner.padding if isinstance(owner.padding, str) else tuple(owner.padding)
    sides = tuple(owner._reversed_padding_repeated_twice)
    shape = tuple(owner.weight.shape)
    every = shape, owner.stride, padding, owner.dilation, *last, owner.padding_mode, sides
    return Tap(**base, function=tap_behind, mask=layer.mask, arguments=("conv", every, fresh))


def _kind(owner: nn.Module) -> tuple[str, tuple[Any, ...]] | str | None:
    """Name and options of a tap behind; a str says why there is none; None for linear layers and convolutions."""
    if isinstance(owner, (nn.Linear, _ConvNd)) and (_is_torchs(owner) or isinstance(owner, SparseModule)):
        return None
    if _is_torchs(owner):
        if isinstance(owner, nn.Embedding) and owner.max_norm is None and not owner.scale_grad_by_freq:
            return "embedding", (owner.padding_idx,)
        if isinstance(owner, nn.LayerNorm):
            return "layer_norm", (tuple(owner.normalized_shape), owner.eps)
        if isinstance(owner, nn.RMSNorm):
            return "rms_norm", (tuple(owner.normalized_shape), owner.eps)
        if isinstance(owner, nn.GroupNorm):
            return "group_norm", (owner.num_groups, owner.eps)
        if isinstance(owner, nn.modules.instancenorm._InstanceNorm) and not owner.track_running_stats:
            return "instance_norm", (owner.eps,)
        if isinstance(owner, _BatchNorm):
            return f"it belongs to a {type(owner).__name__}, which couples samples while it trains"
    return f"it belongs to a {type(owner).__name__}"


def _is_torchs(owner: nn.Module) -> bool:
    return type(owner).__module__.startswith("torch.nn.modules.")


def _is_plain(owner: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module is nothing but its forward, as torch wrote it."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(owner) is kind and "forward" not in owner.__dict__ and not any(getattr(owner, name) for name in hooks)


def _axis(groupings: tuple[Grouping, ...]) -> int | str | None:
    """Along which axis all groups are slices; 0 for single entries of a norm."""
    axes = {grouping.axis for grouping in groupings}
    if axes == {None}:
        return 0
    return axes.pop() if len(axes) == 1 else None


def _size(groupings: tuple[Grouping, ...]) -> int:
    """How many slices there are."""
    first = groupings[0]
    if first.is_element:
        return first.size
    return first.index.numel() if first.index is not None else first.count


def _read_in_place(node: fx.Node, graph: fx.GraphModule) -> bool:
    for user in node.users:
        inner = graph.get_submodule(str(user.target)) if user.op == "call_module" else None
        name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
        if getattr(inner, "inplace", False) or user.kwargs.get("inplace", False):
            return True
        if user.op != "call_module" and (name.endswith("_") or name in ("setitem", "iadd", "imul", "isub", "itruediv")):
            return True
    return False


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shapes of attention outputs."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is F.scaled_dot_product_attention:
            self.shapes[n.name] = tuple(result.shape)
        return result


def gate_taps(module: nn.Module, example_inputs: Any, prefix: str) -> list[Tap]:
    """A tap behind every fused attention operator whose output is [N, heads, T, size]."""
    graphs = {
        path: graph
        for path, graph in graphs_of(module).items()
        if any(node.target is F.scaled_dot_product_attention for node in graph.graph.nodes)
    }
    found: list[Tap] = []
    seen: dict[str, dict[str, tuple[int, ...]]] = {}

    def looked_at(path: str, graph: fx.GraphModule, args: tuple[Any, ...]) -> None:
        if path not in seen:
            seen[path] = {}
            shapes = _Shapes(graph)
            with torch.no_grad():
                shapes.run(*args)
            seen[path] = shapes.shapes

    handles = [
        graph.register_forward_pre_hook(lambda g, args, path=path: looked_at(path, g, args))
        for path, graph in graphs.items()
    ]
    try:
        args, kwargs = fresh_inputs(*split_inputs(example_inputs))
        with collecting_scope(module), torch.no_grad():
            module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for path, graph in graphs.items():
        nodes = {node.name: node for node in graph.graph.nodes}
        for name, shape in seen.get(path, {}).items():
            if len(shape) == 4:
                label = prefix + (f"{path}.{name}" if path else name)
                fresh = _read_in_place(nodes[name], graph)
                found.append(Tap(path, name, (label, None), (shape[1], 0), gate_tap, None, (fresh,)))
    return found
