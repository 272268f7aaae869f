"""Taps for Fisher statistics at nodes of a graph, and their removal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsparse.errors import ConfigError
from fxsparse.graph import edit
from fxsparse.graph.taps import BEHIND, CONTAINER, Replaced, Statistics, erase_taps, forget_runs, holder_of
from fxsparse.graph.tree import modules_of
from fxsparse.passes.infra import Pass
from fxsparse.passes.snapshot import graphs_of


@dataclass(frozen=True)
class Tap:
    """One tap, for the parameters of one layer.

    Attributes:
        graph: path of the graph.
        node: name of the node that is tapped.
        parameters: first names of those whose statistics are taken: the weight and the bias, None for none; any
            number of them with `runner`.
        sizes: lengths of the statistics.
        function: behind the node, called as ``function(y, x, statistics, mask, *reads, *arguments)`` with the node's
            output y and first input x; instead of the node as ``function(x, weight, bias, statistics, mask,
            *arguments)``. It
            hands the statistics to autograd as the gradients of the two tensors (or None) in ``statistics``.
        mask: path, in the graph, of the mask that the weight is read through; None for none.
        reads: paths, in the graph, of buffers that a function behind the node takes before the constants.
        arguments: constants.
        instead: whether the function takes the node's place: a call of a module that holds `weight` and `bias`, or a
            function of x, weight and bias.
        runner: makes, of the called module and the statistics, the module that is called instead; no `function` then.
    """

    graph: str
    node: str
    parameters: tuple[str | None, ...]
    sizes: tuple[int, ...]
    function: Callable[..., Tensor] | None
    mask: str | None = None
    arguments: tuple[Any, ...] = ()
    instead: bool = False
    runner: Callable[[nn.Module, Sequence[nn.Parameter]], nn.Module] | None = None
    reads: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """The first parameter that is tapped."""
        return next((name for name in self.parameters if name is not None), "")


class InstrumentFisher(Pass):
    """Puts taps behind nodes or in their place; outputs stay the same bit for bit.

    1. The graph gets a submodule `fisher_statistics` with one parameter of zeros for each statistic, of the dtype of
       the tapped weight, at least float32.
    2. Behind a node: reads of the statistics and of the mask, then the tap; all readers of the node read the tap.
    3. In a node's place: reads of weight, bias, statistics and mask; the node itself calls the tap.
    4. With a runner: the node calls the runner, a submodule of `fisher_statistics`, with the arguments that it had.

    Args:
        taps: what to insert.
    """

    def __init__(self, taps: Sequence[Tap]) -> None:
        self.taps = tuple(taps)

    @property
    def targets(self) -> Collection[str]:
        """The parameters' names."""
        return tuple(name for tap in self.taps for name in tap.parameters if name is not None)

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
        like = next(iter(parameters.values()))
        for tap in self.taps:
            self._insert(graphs[tap.graph], tap, parameters.get(tap.source, like))
            for name, size in zip(tap.parameters, tap.sizes, strict=True):
                if name is not None:
                    self.record(name, f"tap of {size} groups at `{tap.node}`")
        return bool(self.taps)

    def _insert(self, module: fx.GraphModule, tap: Tap, weight: Tensor) -> None:
        if not hasattr(module, CONTAINER):
            module.add_submodule(CONTAINER, Statistics())
        holder = module.get_submodule(CONTAINER)
        assert isinstance(holder, Statistics)
        node = next(node for node in module.graph.nodes if node.name == tap.node)
        place: dict[str, Any] = {"before": node.next} if not tap.instead else {"before": node}

        def read(target: str, what: str) -> fx.Node:
            return edit.insert_get_attr(module, target, what=what, pass_name=self.name, source=tap.source, **place)

        if tap.runner is not None:
            _call_runner(module, holder, tap, node, weight)
            return
        if tap.instead:
            self._take_place(module, holder, tap, node, read, weight)
            return
        x = _first_input(node)
        statistics = _read_statistics(holder, tap, weight, read)
        mask = None if tap.mask is None else read(tap.mask, "reads the mask")
        buffers = [read(target, "reads a buffer") for target in tap.reads]
        assert tap.function is not None
        tapped = edit.insert_call(
            module.graph,
            tap.function,
            (node, x, statistics, mask, *buffers, *tap.arguments),
            what=BEHIND,
            pass_name=self.name,
            source=tap.source,
            **place,
        )
        edit.replace_uses(node, tapped)

    def _take_place(
        self,
        module: fx.GraphModule,
        holder: Statistics,
        tap: Tap,
        node: fx.Node,
        read: Callable[[str, str], fx.Node],
        weight: Tensor,
    ) -> None:
        holder.replaced[node.name] = Replaced(node.op, node.target, len(node.args), tuple(node.kwargs))
        if node.op == "call_module":
            owner = module.get_submodule(str(node.target))
            operands: list[Any] = [_first_input(node)]
            for attribute in ("weight", "bias"):
                present = getattr(owner, attribute, None) is not None
                operands.append(read(f"{node.target}.{attribute}", f"reads the {attribute}") if present else None)
        else:
            operands = [*node.args, *node.kwargs.values()]
            operands += [None] * (3 - len(operands))
        statistics = _read_statistics(holder, tap, weight, read)
        mask = None if tap.mask is None else read(tap.mask, "reads the mask")
        assert tap.function is not None
        node.op = "call_function"
        node.target = tap.function
        node.args, node.kwargs = (*operands, statistics, mask, *tap.arguments), {}


def _read_statistics(
    holder: Statistics, tap: Tap, weight: Tensor, read: Callable[[str, str], fx.Node]
) -> tuple[fx.Node | None, ...]:
    """Statistics of zeros, registered, and the nodes that read them."""
    names = _register(holder, tap, weight)
    return tuple(None if name is None else read(f"{CONTAINER}.{name}", "reads the statistic") for name in names)


def _register(holder: Statistics, tap: Tap, weight: Tensor) -> list[str | None]:
    """Statistics of zeros in the holder, by their names there."""
    found: list[str | None] = []
    wide = torch.promote_types(weight.dtype, torch.float32)
    for parameter, size in zip(tap.parameters, tap.sizes, strict=True):
        if parameter is None:
            found.append(None)
            continue
        name = f"t{len(holder._parameters)}"
        holder.register_parameter(name, nn.Parameter(torch.zeros(size, dtype=wide, device=weight.device)))
        holder.parameter_names[name] = parameter
        found.append(name)
    return found


def _call_runner(module: fx.GraphModule, holder: Statistics, tap: Tap, node: fx.Node, weight: Tensor) -> None:
    assert tap.runner is not None
    names = _register(holder, tap, weight)
    statistics = [holder.get_parameter(name) for name in names if name is not None]
    own = f"runner{len(holder._modules)}"
    holder.add_module(own, tap.runner(module.get_submodule(str(node.target)), statistics))
    holder.replaced[node.name] = Replaced(node.op, node.target, None, ())
    node.target = f"{CONTAINER}.{own}"


class RemoveFisher(Pass):
    """Takes all Fisher taps away; the code of each graph is what it was before.

    1. A tap behind a node: its readers read the node again.
    2. A tap in a node's place: the node calls again what it called.
    3. The reads that fed them, and the statistics, go.
    """

    idempotent = True

    def call(self, module: nn.Module) -> bool:
        """Remove, graph by graph."""
        modified = False
        for _, each in modules_of(module):
            forget_runs(each)
        for path, found in graphs_of(module).items():
            if not erase_taps(found):
                continue
            self.record(path or "the root", "Fisher taps removed")
            modified = True
        return modified


def _first_input(node: fx.Node) -> fx.Node:
    given = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
    if not isinstance(given, fx.Node):
        raise ConfigError(f"node `{node.name}` has no first input that is a node")
    return given


def statistics_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The statistics of an instrumented module by the tapped parameter's name."""
    found = {}
    for graph in graphs_of(module).values():
        holder = holder_of(graph)
        if holder is not None:
            for name, parameter in holder._parameters.items():
                if parameter is not None:
                    found[holder.parameter_names[name]] = parameter
    return found
