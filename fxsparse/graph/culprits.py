"""Which modules make two traces of one module differ."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx, nn


def readers_between(root: nn.Module, one: fx.Graph, other: fx.Graph, readers: Collection[nn.Module]) -> list[nn.Module]:
    """The modules that cannot be graphs because two traces of `root`, in train and in eval mode, differ inside them.

    Those are the modules that read the mode and made other nodes in one trace than in the other, and all modules that
    were running around them.

    Args:
        root: the traced module.
        one: its graph in one mode.
        other: its graph in the other mode.
        readers: the modules whose mode was read.
    """
    wanted = {id(module) for module in readers}
    modules = dict(root.named_modules(remove_duplicate=False))
    inside = [_inside(graph, modules, wanted) for graph in (one, other)]
    found: dict[int, nn.Module] = {}
    for key in inside[0].keys() | inside[1].keys():
        made = [lines.get(key, ([], ())) for lines in inside]
        if made[0][0] != made[1][0]:
            found.update((id(module), module) for _, chain in made for module in chain)
    return list(found.values())


_Made = tuple[list[tuple[Any, ...]], tuple[nn.Module, ...]]


def _inside(graph: fx.Graph, modules: dict[str, nn.Module], wanted: Collection[int]) -> dict[int, _Made]:
    """For each wanted module: the nodes that it made, as comparable data, and the modules running then, itself last."""
    found: dict[int, _Made] = {}
    for node in graph.nodes:
        stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        running = [modules[path] for path in stack if path in modules]
        line = (node.op, node.target, repr(fx.node.map_arg((node.args, node.kwargs), lambda _: None)))
        for depth, module in enumerate(running, 1):
            if id(module) in wanted:
                found.setdefault(id(module), ([], tuple(running[:depth])))[0].append(line)
    return found
