"""Taps for Fisher statistics behind nodes of a graph, and their removal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsparse.errors import ConfigError
from fxsparse.graph import edit, provenance
from fxsparse.passes.infra import Pass
from fxsparse.passes.snapshot import graphs_of

CONTAINER = "fisher_statistics"
"""The submodule of a graph that holds its statistics."""


@dataclass(frozen=True)
class Tap:
    """One tap.

    Attributes:
        graph: path of the graph.
        node: name of the node whose output y is tapped.
        parameter: first name of the parameter whose statistic is taken.
        function: called as ``function(y, x, statistic, mask, *arguments)`` with x the node's first input; returns
            y, and hands the statistic to autograd as the gradient of its third argument.
        size: length of the statistic.
        mask: path, in the graph, of the mask that the weight is read through; None for none.
        arguments: constants.
    """

    graph: str
    node: str
    parameter: str
    function: Callable[..., Tensor]
    size: int
    mask: str | None = None
    arguments: tuple[Any, ...] = ()


class InstrumentFisher(Pass):
    """Puts taps behind nodes; outputs stay the same bit for bit.

    1. The graph gets a submodule `fisher_statistics` with one parameter of zeros for each tap, float32 or the dtype of
       the tapped weight.
    2. Behind each node: reads of the statistic and of the mask, then the tap; all readers of the node read the tap.

    Args:
        taps: what to insert.
    """

    def __init__(self, taps: Sequence[Tap]) -> None:
        self.taps = tuple(taps)

    @property
    def targets(self) -> Collection[str]:
        """The parameters' names."""
        return tuple(tap.parameter for tap in self.taps)

    def requires(self, module: nn.Module) -> None:
        """Each tap's graph and node exist, and no graph is instrumented already."""
        graphs = graphs_of(module)
        for tap in self.taps:
            if tap.graph not in graphs:
                raise ConfigError(f"`graph` (={tap.graph!r}) is no graph of the module")
            if hasattr(graphs[tap.graph], CONTAINER):
                raise ConfigError(f"graph `{tap.graph}` has Fisher taps already; run RemoveFisher first")
            if all(node.name != tap.node for node in graphs[tap.graph].graph.nodes):
                raise ConfigError(f"`node` (={tap.node!r}) is no node of graph `{tap.graph}`")

    def call(self, module: nn.Module) -> bool:
        """Insert, in the order of the taps."""
        graphs = graphs_of(module)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for tap in self.taps:
            self._insert(graphs[tap.graph], tap, parameters[tap.parameter])
            self.record(tap.parameter, f"tap of {tap.size} groups behind `{tap.node}`")
        return bool(self.taps)

    def _insert(self, module: fx.GraphModule, tap: Tap, weight: Tensor) -> None:
        if not hasattr(module, CONTAINER):
            module.add_submodule(CONTAINER, _Statistics())
        holder = module.get_submodule(CONTAINER)
        assert isinstance(holder, _Statistics)
        name = f"t{len(holder._parameters)}"
        zeros = torch.zeros(tap.size, dtype=weight.dtype, device=weight.device)
        holder.register_parameter(name, nn.Parameter(zeros))
        holder.parameter_names[name] = tap.parameter
        node = next(node for node in module.graph.nodes if node.name == tap.node)
        statistic = edit.insert_get_attr(
            module,
            f"{CONTAINER}.{name}",
            what="reads the statistic",
            after=node,
            pass_name=self.name,
            source=tap.parameter,
        )
        last, mask = statistic, None
        if tap.mask is not None:
            last = mask = edit.insert_get_attr(
                module, tap.mask, what="reads the mask", after=statistic, pass_name=self.name, source=tap.parameter
            )
        tapped = edit.insert_call(
            module.graph,
            tap.function,
            (node, _first_input(node), statistic, mask, *tap.arguments),
            what="taps the output",
            after=last,
            pass_name=self.name,
            source=tap.parameter,
        )
        edit.replace_uses(node, tapped)


class RemoveFisher(Pass):
    """Takes all Fisher taps away; the code of each graph is what it was before.

    1. A tap: its readers read its node again.
    2. The reads of statistics and masks that fed it, and the statistics, go.
    """

    idempotent = True

    def call(self, module: nn.Module) -> bool:
        """Remove, graph by graph."""
        modified = False
        for path, found in graphs_of(module).items():
            if not hasattr(found, CONTAINER):
                continue
            for node in reversed(list(found.graph.nodes)):
                stamp = provenance.read(node)
                if stamp is None or stamp.pass_name != "instrument_fisher":
                    continue
                if stamp.what == "taps the output":
                    node.replace_all_uses_with(node.args[0])
                edit.erase(node)
            found.delete_submodule(CONTAINER)
            self.record(path or "the root", "Fisher taps removed")
            modified = True
        return modified


class _Statistics(nn.Module):
    """Holds statistics; they are no part of a state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter_names: dict[str, str] = {}
        self.register_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]  # untyped in torch
        self.register_load_state_dict_pre_hook(_provide)  # type: ignore[no-untyped-call]  # untyped in torch


def _forget(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    for name in module._parameters:
        state.pop(prefix + name, None)


def _provide(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for name, parameter in module._parameters.items():
        state.setdefault(prefix + name, parameter)


def _first_input(node: fx.Node) -> fx.Node:
    given = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
    if not isinstance(given, fx.Node):
        raise ConfigError(f"node `{node.name}` has no first input that is a node")
    return given


def statistics_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The statistics of an instrumented module by the tapped parameter's name."""
    found = {}
    for graph in graphs_of(module).values():
        holder = getattr(graph, CONTAINER, None)
        if isinstance(holder, _Statistics):
            for name, parameter in holder._parameters.items():
                if parameter is not None:
                    found[holder.parameter_names[name]] = parameter
    return found
