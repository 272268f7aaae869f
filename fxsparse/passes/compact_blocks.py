"""Whole blocks of channels: what a runtime computes fastest may be more than what is alive.

onnxruntime computes 2-d convolutions in a layout that holds channels in blocks of 16 (8 without AVX-512). A depthwise
convolution of 480 channels that loses one falls back to a kernel several times slower, and drags its neighbours along.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import fx

from fxsparse.graph.channels import Channels
from fxsparse.graph.channels_flow import bound, op_of
from fxsparse.passes.compact_classes import Place
from fxsparse.passes.compact_solve import Solution, Solver

_BLOCKS = (16, 8)
_ROUNDS = 16  # what stays in one convolution may break up the blocks of another


def solve_in_blocks(solver: Solver) -> tuple[Solution, int]:
    """The largest set of channels that can go such that 2-d convolutions keep whole blocks of channels.

    A dimension that is a multiple of 16 (or else of 8) stays one. A dimension that is neither loses all that is dead.

    Args:
        solver: the solver; the channels that stay are not free in it from now on.

    Returns:
        The solution, and the number of superfluous channels that stay, each counted once.
    """
    places = list(dict.fromkeys(_convolved(solver.channels)))
    solution = solver.solve()
    before = solution.removed
    for _ in range(_ROUNDS):
        staying = _incomplete(solver, solution, places)
        if not staying.size:
            break
        solver.free[staying] = False
        solution = solver.solve()
    return solution, int((before & ~solution.removed).sum())


def _incomplete(solver: Solver, solution: Solution, places: list[Place]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The classes that have to stay so that every place keeps whole blocks."""
    removed = solution.removed.copy()
    staying: list[int] = []
    for name, dim in places:
        labels = solver.channels.sources[name][dim]
        if labels is None or (name, dim) not in solution.kept:
            continue
        block = next((block for block in _BLOCKS if labels.size % block == 0), 1)
        classes = solver.classes[labels]
        while kept_short := int((~removed[classes]).sum()) % block:
            gone = classes[removed[classes]][: block - kept_short]
            removed[gone] = False
            staying += gone.tolist()
    return np.unique(np.array(staying, dtype=np.int64))


def _convolved(channels: Channels) -> Iterator[Place]:
    """The channel dimensions of the weights of 2-d convolutions."""
    for graph in channels.graphs:
        for node in graph.graph.nodes:
            weight = _weight(node)
            name = graph.source(weight) if weight is not None else None
            if weight is None or name is None or name not in channels.sources:
                continue
            yield name, 0
            if int(bound(node).get("groups") or 1) == 1:
                yield name, 1


def _weight(node: fx.Node) -> fx.Node | None:
    if node.op != "call_function" or op_of(node) not in ("conv2d", "convolution"):
        return None
    arguments = bound(node)
    weight = arguments.get("weight")
    if arguments.get("transposed") or not isinstance(weight, fx.Node) or len(weight.meta.get("shape") or ()) != 4:
        return None
    return weight
