"""Recurrent layers: each hidden unit is one row of every gate, and a column of the weights that read it back.

The layers and directions of one call have one size in torch, so their units go together by number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import fx

from fxsparse.graph.channels_atoms import Labels
from fxsparse.graph.channels_flow import Flow, bound, op_of, shape_of
from fxsparse.graph.channels_rules import Rule

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""How many rows each hidden unit has."""
CANDIDATE = {"lstm": 2, "gru": 2, "rnn_tanh": 0, "rnn_relu": 0}
"""Of those the one that is written to the state: without it a unit that starts at 0 stays there."""


class Cell(NamedTuple):
    """The weights of one layer and direction: (gates * hidden, in), (gates * hidden, hidden), and biases or None."""

    w_ih: fx.Node
    w_hh: fx.Node
    b_ih: fx.Node | None
    b_hh: fx.Node | None
    projection: fx.Node | None = None


class Recurrent(NamedTuple):
    """A call of a recurrent layer or cell: its kind, input, states, and the cells of each layer, one a direction."""

    kind: str
    x: fx.Node
    states: tuple[fx.Node, ...]
    layers: tuple[tuple[Cell, ...], ...]


def recurrent_of(node: fx.Node) -> Recurrent | None:
    """What a node of a recurrent operator reads; None for other nodes."""
    name = op_of(node)
    kind = name.removesuffix("_cell")
    if kind not in GATES or node.op != "call_function":
        return None
    a = bound(node)
    states = tuple(a["hx"]) if isinstance(a["hx"], list | tuple) else (a["hx"],)
    if name != kind:
        return Recurrent(kind, a["input"], states, ((Cell(a["w_ih"], a["w_hh"], a["b_ih"], a["b_hh"]),),))
    directions = 2 if a["bidirectional"] else 1
    params: Sequence[fx.Node] = a["params"]
    each = len(params) // (int(a["num_layers"]) * directions)
    cells = [_cell(params[start : start + each], bool(a["has_biases"])) for start in range(0, len(params), each)]
    layers = tuple(tuple(cells[start : start + directions]) for start in range(0, len(cells), directions))
    return Recurrent(kind, a.get("input") or a["data"], states, layers)


def _cell(weights: Sequence[fx.Node], biased: bool) -> Cell:
    w_ih, w_hh, *rest = weights
    biases = rest[:2] if biased else [None, None]
    extra = rest[2:] if biased else rest
    return Cell(w_ih, w_hh, biases[0], biases[1], extra[0] if extra else None)


def _recurrent(flow: Flow, node: fx.Node) -> Any:
    call = recurrent_of(node)
    assert call is not None
    for labels in flow.of(call.x)[:-1]:
        flow.freeze(node, labels, "is a step or batch dimension of a recurrent layer")
    inputs, hidden = flow.of(call.x)[-1], list[Labels | None]()
    for layer in call.layers:
        outputs: list[Labels | None] = []
        for cell in layer:
            flow.unite(node, inputs, flow.of(cell.w_ih)[1])
            unit = _units(flow, node, cell, GATES[call.kind])
            hidden.append(unit if not hidden else flow.unite(node, hidden[0], unit))
            outputs.append(None if cell.projection is not None else unit)
        inputs = _joined(outputs)
    for state in call.states:
        held = flow.of(state)
        for labels in held[:-1]:
            flow.freeze(node, labels, "counts layers or batch entries of a recurrent layer")
        flow.unite(node, held[-1] if not call.layers[0][0].projection else None, hidden[0])
    last = None if any(unit is None for unit in hidden) or call.layers[0][0].projection is not None else hidden[0]
    return _results(node, call, inputs, last)


def _units(flow: Flow, node: fx.Node, cell: Cell, gates: int) -> Labels | None:
    """The labels of the hidden units; all rows of a unit are one channel."""
    rows = flow.of(cell.w_ih)[0]
    for other in (cell.w_hh, cell.b_ih, cell.b_hh):
        if other is not None:
            flow.unite(node, rows, flow.of(other)[0])
    columns = flow.of(cell.w_hh)[1]
    if rows is None or cell.projection is not None:
        for labels in (rows, columns, *(flow.of(cell.projection) if cell.projection is not None else ())):
            flow.freeze(node, labels, "is projected inside a recurrent layer")
        return None
    table = rows.reshape(gates, -1)
    for gate in table[1:]:
        flow.atoms.unite(table[0], gate)
    unit = np.ascontiguousarray(table[0])
    flow.unite(node, unit, columns)
    return unit


def _joined(parts: Sequence[Labels | None]) -> Labels | None:
    """The outputs of all directions beside each other."""
    held = [part for part in parts if part is not None]
    if len(held) < len(parts):
        return None
    return held[0] if len(held) == 1 else np.concatenate(held)


def _results(node: fx.Node, call: Recurrent, outputs: Labels | None, last: Labels | None) -> Any:
    if op_of(node).endswith("_cell"):
        one = (*(None for _ in shape_of(call.x)[:-1]), outputs)
        return one if node.meta.get("shape") is not None else [one] * 2
    sequence = (*(None for _ in shape_of(call.x)[:-1]), outputs)
    state = (*(None for _ in shape_of(call.states[0])[:-1]), last)
    return [sequence, *(state for _ in call.states)]


def _pack(flow: Flow, node: fx.Node) -> Any:
    """(batch, steps, features...) -> (entries, features...) and batch sizes."""
    dims = flow.of(bound(node)["input"])
    for labels in dims[:2]:
        flow.freeze(node, labels, "is packed")
    return [(None, *dims[2:]), (None,)]


def _unpack(flow: Flow, node: fx.Node) -> Any:
    dims = flow.of(bound(node)["data"])
    for labels in dims[:1]:
        flow.freeze(node, labels, "is unpacked")
    return [(None, None, *dims[1:]), (None,)]


RECURRENT: dict[str, Rule] = {
    **{name: _recurrent for kind in GATES for name in (kind, f"{kind}_cell")},
    "_pack_padded_sequence": _pack,
    "_pad_packed_sequence": _unpack,
}
"""Operator name -> its rule."""
