"""The channels of a model without masks, in both modes, and the search for those that it can lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fxsparse.errors import CaptureError
from fxsparse.graph.channels import Channels, analyse, closed_paths, open_norms
from fxsparse.graph.operators import OperatorGraph, operator_graph
from fxsparse.nn.masked import mask_name
from fxsparse.nn.slot import slots_of
from fxsparse.passes.compact_attention import opened
from fxsparse.passes.compact_classes import Place
from fxsparse.passes.compact_constants import propagate
from fxsparse.passes.compact_solve import Solver
from fxsparse.passes.compact_verify import sweep


def analysed(folded: nn.Module, example_inputs: Any) -> Channels:
    """The channels of a model without masks, in both modes.

    Raises:
        CaptureError: when the model cannot be run.
    """
    return channels_of(folded, example_inputs, recorded(folded, example_inputs))


def recorded(folded: nn.Module, example_inputs: Any) -> OperatorGraph:
    """The operator graph of a model without masks, with torch's attention opened.

    Raises:
        CaptureError: when the model cannot be run.
    """
    sweep(folded)
    graph = operator_graph(opened(folded), example_inputs, routes=("recorder",))
    sweep(folded)
    return graph


def channels_of(folded: nn.Module, example_inputs: Any, graph: OperatorGraph) -> Channels:
    """The channels of a recorded model, with those of its graph in train mode where that reads more parameters."""
    closed = [path for path in closed_paths(folded) if type(folded.get_submodule(path)) is not nn.MultiheadAttention]
    others, tied = _train_graphs(folded, example_inputs, graph), _read_masks(folded)
    return analyse(graph, closed, others, tied, open_norms(folded))


def solver_of(folded: nn.Module, channels: Channels, only: Mapping[Place, Sequence[int]] | None) -> Solver:
    """The search for what a model can lose; `only` are the only indices of dimensions that may go, None = all."""
    tensors = {**dict(folded.named_parameters()), **dict(folded.named_buffers())}
    known = {node: found for each in channels.graphs for node, found in propagate(each, tensors).items()}
    return Solver(channels, known, only)


def _read_masks(folded: nn.Module) -> tuple[tuple[str, str], ...]:
    """Masks that could not be folded, with the parameters that they mask: both have the same channels."""
    parameters = {id(parameter): name for name, parameter in folded.named_parameters()}
    buffers = {id(buffer): name for name, buffer in folded.named_buffers()}
    return tuple(
        (buffers[id(module._buffers[mask_name(attribute)])], parameters[id(module._parameters[attribute])])
        for module in folded.modules()
        for attribute in slots_of(module)
    )


def _train_graphs(folded: nn.Module, example_inputs: Any, graph: OperatorGraph) -> tuple[OperatorGraph, ...]:
    """The graph of train mode, where that reads parameters that eval mode does not (auxiliary classifiers)."""
    if not graph.unread:
        return ()
    try:
        train = operator_graph(opened(folded), example_inputs, training=True, routes=("recorder",))
    except CaptureError:
        return ()
    return (train,) if set(graph.unread) - set(train.unread) else ()
