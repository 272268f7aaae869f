"""Channel analysis: which channels of which parameters must live or die together.

Every index of every dimension of every value gets a label. Elementwise operators unite the labels of what they
combine, products those of the contracted dimensions; moves (reshape, permute, cat, split...) act on the labels as they
act on the values. A dimension that is split into heads, or flattened, stands in a relation to its factors. An operator
without a rule is a barrier: its channels stay, and it is named.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from fxsparse.graph.channels_atoms import Barrier, Dims, Labels, Relation
from fxsparse.graph.channels_flow import Flow, bound, op_of, shape_of
from fxsparse.graph.channels_gather import GATHERS
from fxsparse.graph.channels_groups import ChannelGroup as ChannelGroup
from fxsparse.graph.channels_groups import Member as Member
from fxsparse.graph.channels_groups import channel_groups, fixed_classes
from fxsparse.graph.channels_moves import MOVES
from fxsparse.graph.channels_norms import RULES as NORMS
from fxsparse.graph.channels_recurrent import RECURRENT
from fxsparse.graph.channels_rules import RULES, is_pointwise, pointwise, unknown
from fxsparse.graph.mishaps import mishap
from fxsparse.graph.operators import ROUTES, OperatorGraph, operator_graph
from fxsparse.nn.attention import SizedMultiheadAttention
from fxsparse.nn.layer_norm import SizedLayerNorm


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of a model.

    Attributes:
        graph: the operator graph that was analysed.
        others: further graphs of the same model (train mode) whose channels were united with those of the first.
        groups: the channel groups, prunable ones first.
        barriers: every operator that keeps channels from being removed.
        classes: the class of every atom; `FIXED` cannot be removed.
        fixed: for every class whether it is fixed.
        reasons: class -> the barrier that fixes it.
        flow: labels of every value.
        sources: parameter or buffer -> the labels of its dimensions.
    """

    graph: OperatorGraph
    groups: tuple[ChannelGroup, ...]
    barriers: tuple[Barrier, ...]
    classes: Labels = field(repr=False)
    fixed: npt.NDArray[np.bool_] = field(repr=False)
    reasons: Mapping[int, Barrier] = field(repr=False)
    flow: Flow = field(repr=False)
    sources: Mapping[str, Dims] = field(repr=False)
    others: tuple[OperatorGraph, ...] = ()

    def source(self, node: fx.Node) -> str | None:
        """The parameter or buffer that a node of any of the graphs reads, or None."""
        return next(graph for graph in self.graphs if graph.graph is node.graph).source(node)

    @property
    def graphs(self) -> tuple[OperatorGraph, ...]:
        """All the graphs."""
        return (self.graph, *self.others)

    @property
    def relations(self) -> list[Relation]:
        """The products of dimensions."""
        return self.flow.atoms.relations

    def __str__(self) -> str:
        lines = [f"{sum(g.prunable for g in self.groups)} of {len(self.groups)} channel groups can be pruned"]
        lines += [f"  {group}" for group in self.groups]
        lines += [f"barrier: {barrier}" for barrier in dict.fromkeys(map(str, self.barriers))]
        return "\n".join(lines)


def channels(
    model: nn.Module, example_inputs: Any, training: bool = False, *, routes: tuple[str, ...] = ROUTES
) -> Channels:
    """Analyse a model's channels; it stays as it is.

    Args:
        model: any module, without masks (`finalize` folds them).
        example_inputs: a tuple of positional inputs, or ``(args, kwargs)``.
        training: analyse the graph of train mode.
        routes: which ways to an operator graph may be taken.

    Raises:
        CaptureError: when the model has no operator graph.
        ConfigError: when `example_inputs` is neither form.
    """
    return analyse(operator_graph(model, example_inputs, training, routes=routes), closed_paths(model))


def closed_paths(model: nn.Module) -> frozenset[str]:
    """Paths of torch's layers whose forward derives the sizes inside from those outside, so that they must stay."""
    return frozenset(
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and not isinstance(module, SizedMultiheadAttention)
    )


def open_norms(model: nn.Module) -> frozenset[str]:
    """Paths of torch's layer norms over one dimension, which can count features that are not there any more."""
    return frozenset(
        path
        for path, module in model.named_modules()
        if (type(module) is nn.LayerNorm or isinstance(module, SizedLayerNorm)) and len(module.normalized_shape) == 1
    )


def analyse(
    graph: OperatorGraph,
    closed: Collection[str] = (),
    others: tuple[OperatorGraph, ...] = (),
    tied: Collection[tuple[str, str]] = (),
    norms: Collection[str] = (),
) -> Channels:
    """Analyse an operator graph.

    Args:
        graph: the graph.
        closed: paths of modules inside which all channels stay.
        others: further graphs of the same model; one parameter has the same channels in all of them.
        tied: parameters or buffers of one shape, in pairs, that must stay of one shape.
        norms: paths of layers whose layer norm can lose features that are zero.
    """
    flow, sources = Flow(open_norms=frozenset(norms)), dict[str, Dims]()
    for each in (graph, *others):
        read = _read(each)
        for node in each.graph.nodes:
            flow.idle = node not in read
            flow.dims[node] = _dims(flow, each, node, sources)
            reason = "shares memory with a value that is written in place" if node.meta.get("aliased_write") else ""
            if str(node.meta.get("path", "")) in closed:
                reason = "is inside a layer that checks its sizes"
            for labels in flow.of(node) if reason else ():
                flow.freeze(node, labels, reason)
        flow.idle = False
        if each.reads and each.unread:
            _fix_after_read(flow, each)
    for one, other in tied:
        for a, b in zip(sources.get(one, ()), sources.get(other, ()), strict=False):  # () where nobody reads it
            if a is not None and b is not None:
                flow.atoms.unite(a, b)
    classes = flow.atoms.classes()
    fixed, reasons = fixed_classes(flow.atoms, classes)
    groups = channel_groups(flow, sources, classes, fixed, reasons, _roles((graph, *others)))
    return Channels(graph, groups, tuple(flow.barriers), classes, fixed, reasons, flow, sources, others)


def _read(graph: OperatorGraph) -> set[fx.Node]:
    """The nodes on which an output, or the way of the run, depends."""
    reads = set(graph.reads)
    stack = [
        node
        for node in graph.graph.nodes
        if node.op == "output"
        or node.name in reads
        or node.meta.get("aliased_write")
        or (node.op == "call_function" and not node.users and node.meta.get("shape") is None)
    ]
    found = set(stack)
    while stack:
        new = [node for node in stack.pop().all_input_nodes if node not in found]
        found.update(new)
        stack += new
    return found


def _roles(graphs: tuple[OperatorGraph, ...]) -> dict[str, str]:
    """How each parameter or buffer is read by its first reader."""
    roles: dict[str, str] = {}
    for graph in graphs:
        for node in graph.graph.find_nodes(op="get_attr"):
            name = graph.source(node)
            if name is None or name in roles:
                continue
            user = next((user for user in node.users if isinstance(user.target, torch._ops.OpOverload)), None)
            if user is not None:
                a = bound(user)
                argument = next((key for key, value in a.items() if value is node), "")
                roles[name] = f"{op_of(user)}.{argument}"
                if op_of(user) in ("_weight_norm", "_weight_norm_interface"):
                    roles[name] += f"{int(a['dim']) % len(shape_of(node))}"  # the dimension that has the lengths
    return roles


def _dims(flow: Flow, graph: OperatorGraph, node: fx.Node, sources: dict[str, Dims]) -> Any:
    shape = node.meta.get("shape")
    if node.op == "get_attr":
        name = graph.source(node)
        if name is None:
            return (None,) * len(shape_of(node))
        if name not in sources:
            sources[name] = tuple(flow.atoms.fresh(size) if size > 1 else None for size in shape_of(node))
        return sources[name]
    if node.op == "placeholder":
        return None if shape is None else (None,) * len(shape)
    if node.op == "output":
        for source in node.all_input_nodes:
            for labels in flow.of(source):
                flow.freeze(node, labels, "is an output of the model")
        return None
    if node.target is operator.getitem:
        origin, index = node.args
        held = flow.dims.get(origin) if isinstance(origin, fx.Node) else None
        found = held[index] if isinstance(held, list) and isinstance(index, int) and index < len(held) else None
        return found if found is not None and len(found) == len(shape_of(node)) else (None,) * len(shape_of(node))
    return _applied(flow, node)


_ALL = (MOVES, GATHERS, RECURRENT, NORMS, RULES)


def _applied(flow: Flow, node: fx.Node) -> Any:
    if not isinstance(node.target, torch._ops.OpOverload):
        return unknown(flow, node) if shape_of(node) else None
    name = op_of(node)
    rule = next((rules[name] for rules in _ALL if name in rules), None)
    if rule is None and is_pointwise(node):
        rule = pointwise
    try:
        dims = (rule or unknown)(flow, node)
    except Exception as error:  # what it has united or frozen until then only keeps more
        mishap(f"the rule of {name}", error)
        return unknown(flow, node) if shape_of(node) else None
    shape = node.meta.get("shape")
    if shape is None or isinstance(dims, list):
        return dims
    if dims is None or len(dims) != len(shape) or not _fits(dims, shape):
        return unknown(flow, node)  # an overload that the rule does not know
    return dims


def _fits(dims: Dims, shape: tuple[int, ...]) -> bool:
    return all(labels is None or labels.size == size for labels, size in zip(dims, shape, strict=True))


def _fix_after_read(flow: Flow, graph: OperatorGraph) -> None:
    """The way that the run took depends on values, and parameters were left out: nothing is known after that."""
    first, passed = graph.reads[0], False
    for node in graph.graph.nodes:
        passed |= node.name == first
        if not passed or node.op != "call_function":
            continue
        for value in (node, *node.all_input_nodes):
            for labels in flow.of(value):
                flow.freeze(node, labels, "may run otherwise: the model reads values and left parameters out")
