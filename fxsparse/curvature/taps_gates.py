"""Taps of attention heads: behind every fused attention operator."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxsparse.curvature.fisher_scope import collecting_scope
from fxsparse.curvature.taps_behind import gate_tap
from fxsparse.curvature.taps_places import read_in_place
from fxsparse.graph.inputs import fresh_inputs, split_inputs
from fxsparse.passes.instrument_fisher import Tap
from fxsparse.passes.snapshot import graphs_of


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
                fresh = read_in_place(nodes[name], graph)
                found.append(Tap(path, name, (label, None), (shape[1], 0), gate_tap, None, (fresh,)))
    return found
