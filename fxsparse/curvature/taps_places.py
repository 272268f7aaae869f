"""Which nodes of a graph can be tapped, and how.

1. Linear layers, convolutions with zero padding and LayerNorm of torch's own classes, `F.linear`: a fused layer takes
   their place.
2. Sparse layers, other paddings: a tap behind the layer.
3. Embeddings, other norms and PReLU: a tap behind the layer.
4. Other modules (attention, recurrent layers, anything that a collector can tap), samples along any axis of their
   own: the module is run again in the backward pass.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxsparse.curvature.fisher_scope import collecting_scope
from fxsparse.curvature.groups import Grouping
from fxsparse.curvature.taps_again import Places, RunAgain, tapped_call
from fxsparse.curvature.taps_behind import tap_behind, tap_behind_batch_norm
from fxsparse.curvature.taps_fused import fused_conv, fused_linear
from fxsparse.curvature.taps_fused_norm import fused_layer_norm
from fxsparse.curvature.taps_layout import Layout as LayoutOfSite
from fxsparse.curvature.taps_site import Site, names_of
from fxsparse.nn.functional import masked_weight
from fxsparse.nn.masked import mask_name
from fxsparse.nn.sparse_module import SparseModule
from fxsparse.passes.instrument_fisher import Tap
from fxsparse.passes.places import split_name
from fxsparse.passes.snapshot import graphs_of

Names = dict[str, str]
"""Attribute of a layer -> first name of the parameter."""
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


@dataclass(frozen=True)
class Seen:
    """What an examination has told.

    Attributes:
        refused: parameters of which no tap finds the gradients, and why.
        apart: parameters whose samples do not lie along axis 0 alone, and where.
        sites: the sites of the examined run.
        layouts: where samples lie, by number of site.
        samples: how many there were.
        calls: arguments of the last call of a module in that run, flat, and how they hang together, by identity.
    """

    refused: Mapping[str, str] = field(default_factory=dict)
    apart: Mapping[str, str] = field(default_factory=dict)
    sites: Sequence[Site] = ()
    layouts: Mapping[int, LayoutOfSite | None] = field(default_factory=dict)
    samples: int = 0
    calls: Mapping[int, tuple[list[Any], Any]] = field(default_factory=dict)

    def times(self, name: str) -> int:
        """How often a parameter was read, by graphs that run several times and by code outside of graphs too."""
        return sum(name in names_of(site) for site in self.sites)


def places_of(
    module: nn.Module, wanted: Mapping[str, Tensor], refused: Refused, seen: Seen
) -> Iterator[tuple[Layer, Names]]:
    """The layers that can be tapped with the parameters whose statistics they give; others go into `refused`."""
    names = {id(parameter): name for name, parameter in wanted.items()}
    reads: dict[str, list[tuple[Layer, str] | str]] = {}
    layers: list[Layer] = []
    for path, graph in graphs_of(module).items():
        for node in graph.graph.nodes:
            for name, found in _reads(path, graph, node, names, layers):
                reads.setdefault(name, []).append(found)
    chosen: dict[int, Names] = {id(layer): {} for layer in layers}
    for name, places in reads.items():
        place = places[0]
        if len(places) > 1:
            refused[name] = f"it is read {len(places)} times, whose cross terms a tap cannot see"
        elif isinstance(place, str):
            refused[name] = place
        elif name in seen.refused:
            refused[name] = seen.refused[name]
        elif (times := seen.times(name)) > 1 and _reads_once(place[0].owner):
            refused[name] = f"it is read {times} times, not by this graph alone, whose cross terms a tap cannot see"
        else:
            chosen[id(place[0])][place[1]] = name
    for layer in layers:
        if chosen[id(layer)]:
            yield layer, chosen[id(layer)]


def _reads_once(owner: nn.Module | None) -> bool:
    """Whether a call reads each of its parameters once; others are run again, which counts their reads itself."""
    return owner is None or not isinstance(_kind(owner), str)


def _reads(
    path: str, graph: fx.GraphModule, node: fx.Node, names: Mapping[int, str], layers: list[Layer]
) -> Iterator[tuple[str, tuple[Layer, str] | str]]:
    """What a node reads: the layer and which of its parameters, or why there is no tap."""
    if node.op == "call_module":
        owner = graph.get_submodule(str(node.target))
        if not any(True for _ in owner.parameters()):
            return
        mask = f"{node.target}.{mask_name('weight')}" if isinstance(owner, SparseModule) else None
        layer = Layer(path, graph, node, owner, mask)
        layers.append(layer)
        yield from ((names[id(own)], (layer, name)) for name, own in owner.named_parameters() if id(own) in names)
    elif node.op == "get_attr":
        place, attribute = split_name(str(node.target))
        holder = graph.get_submodule(place) if place else graph
        parameter = holder._parameters.get(attribute)
        if parameter is not None and id(parameter) in names:
            yield from ((names[id(parameter)], found) for found in _function_reads(path, graph, node, layers))


def _function_reads(
    path: str, graph: fx.GraphModule, node: fx.Node, layers: list[Layer]
) -> Iterator[tuple[Layer, str] | str]:
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
        yield layer, ("weight", "bias")[where[0] - 1]


def tap_of(
    layer: Layer, attributes: Names, groupings: Mapping[str, tuple[Grouping, ...]], seen: Seen, full: Mapping[int, str]
) -> Tap | Refused:
    """The tap of a layer, or why each parameter has none.

    Args:
        layer: the layer.
        attributes: those of its parameters that are wanted.
        groupings: by parameter.
        seen: what an examination has told.
        full: first names of all parameters, by identity.
    """
    apart = {name: seen.apart[name] for name in attributes.values() if name in seen.apart}
    quick = apart or _quick(layer, attributes, groupings)
    if isinstance(quick, Tap):
        return quick
    if layer.owner is None or isinstance(layer.owner, fx.GraphModule):
        return {name: quick.get(name) or next(iter(quick.values())) for name in attributes.values()}
    return _tap_again(layer, attributes, groupings, seen, full)


def _quick(layer: Layer, attributes: Names, groupings: Mapping[str, tuple[Grouping, ...]]) -> Tap | Refused:
    """A tap that needs no second run, or why there is none."""
    owner, node = layer.owner, layer.node
    names = attributes.get("weight"), attributes.get("bias")
    every = list(attributes.values())
    if not set(attributes) <= {"weight", "bias"} or (owner is not None and (len(node.args) != 1 or node.kwargs)):
        return dict.fromkeys(every, f"it belongs to a {type(owner).__name__}, called in a way that has no tap")
    axis = _axis(groupings[names[0]]) if names[0] is not None else 0
    if axis is None:
        return dict.fromkeys(every, "its groups are no slices along one axis")
    fresh = read_in_place(node, layer.graph)
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
    if kind[0] == "layer_norm" and _is_plain(owner, nn.LayerNorm):
        return Tap(**base, function=fused_layer_norm, arguments=kind[1], instead=True)
    if kind[0] == "batch_norm":
        reads = tuple(f"{node.target}.{name}" for name in ("running_mean", "running_var"))
        return Tap(**base, function=tap_behind_batch_norm, reads=reads, arguments=(*kind[1], fresh))
    return Tap(**base, function=tap_behind, arguments=(*kind, fresh))


def _tap_again(
    layer: Layer,
    attributes: Names,
    groupings: Mapping[str, tuple[Grouping, ...]],
    seen: Seen,
    full: Mapping[int, str],
) -> Tap | Refused:
    """A second run of the module in the backward pass."""
    owner = layer.owner
    assert owner is not None
    what = f"it belongs to a {type(owner).__name__}"
    names = {name: full[id(own)] for name, own in owner.named_parameters() if id(own) in full}
    sites = [site for site in seen.sites if not names_of(site).isdisjoint(names.values())]
    if not all(names_of(site) <= set(names.values()) for site in sites):
        return dict.fromkeys(attributes.values(), f"{what}, which is read together with other parameters")
    places = Places.of(sites, seen.layouts, seen.samples) if sites else "no tap was seen to read it"
    if isinstance(places, Places) and not _does_alone(owner, names, places, seen):
        places = "samples are told apart outside of it"
    axes = {name: {grouping.axis for grouping in groupings[full]} for name, full in attributes.items()}
    if not isinstance(places, Places):
        return dict.fromkeys(attributes.values(), f"{what}: {places}")
    along: dict[str, int | None] = {}
    for name, found in axes.items():
        axis = found.pop() if len(found) == 1 else "several"
        if isinstance(axis, str):
            return dict.fromkeys(attributes.values(), f"{what}, whose groups are no slices along one axis")
        along[name] = axis
    copied = read_in_place(layer.node, layer.graph)

    def runner(called: nn.Module, statistics: Sequence[nn.Parameter]) -> nn.Module:
        given = {name: (statistic, along[name]) for name, statistic in zip(attributes, statistics, strict=True)}
        return RunAgain(called, given, places, names, copied)

    sizes = tuple(_size(groupings[name]) for name in attributes.values())
    return Tap(layer.path, layer.node.name, tuple(attributes.values()), sizes, None, runner=runner)


def _does_alone(owner: nn.Module, names: Names, places: Places, seen: Seen) -> bool:
    """Whether the module, called alone, reads its parameters at the same sites."""
    if id(owner) not in seen.calls:
        return False
    inputs, form = seen.calls[id(owner)]
    with collecting_scope(owner):
        mode, _ = tapped_call(owner, names, inputs, form, places.by_number())
    return not mode.uncovered and tuple(site.signature for site in mode.sites) == places.signatures


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
        if isinstance(owner, _BatchNorm) and owner.running_mean is not None:
            return "batch_norm", (owner.eps,)
        if isinstance(owner, nn.PReLU):
            return "prelu", ()
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


def read_in_place(node: fx.Node, graph: fx.GraphModule) -> bool:
    """Whether a reader of a node, or of a part of it, writes into it."""
    for user in node.users:
        if user.target is operator.getitem and read_in_place(user, graph):
            return True
        inner = graph.get_submodule(str(user.target)) if user.op == "call_module" else None
        name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
        if getattr(inner, "inplace", False) or user.kwargs.get("inplace", False):
            return True
        if user.op != "call_module" and (name.endswith("_") or name in ("setitem", "iadd", "imul", "isub", "itruediv")):
            return True
    return False
