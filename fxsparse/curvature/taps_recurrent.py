"""Recurrent layers, step by step: the same equations as torch's, in operators that can be tapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.curvature.taps_mode import Rule, TapMode

_State = tuple[Tensor, ...]
_Cell = Callable[[Tensor, _State, list[Any]], _State]


def _lstm_cell(gates: Tensor, state: _State, weights: list[Any]) -> _State:
    h, c = state
    i, f, g, o = (gates + F.linear(h, weights[1], weights[3])).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if len(weights) < 5 else F.linear(h, weights[4])), c


def _gru_cell(gates: Tensor, state: _State, weights: list[Any]) -> _State:
    (h,) = state
    r, z, n = gates.chunk(3, -1)
    hr, hz, hn = F.linear(h, weights[1], weights[3]).chunk(3, -1)
    z = (z + hz).sigmoid()
    n = (n + (r + hr).sigmoid() * hn).tanh()
    return ((1 - z) * n + z * h,)


def _plain_cell(activation: Callable[[Tensor], Tensor]) -> _Cell:
    def cell(gates: Tensor, state: _State, weights: list[Any]) -> _State:
        return (activation(gates + F.linear(state[0], weights[1], weights[3])),)

    return cell


def _layer(cell: _Cell, x: Tensor, state: _State, weights: list[Any], backwards: bool) -> tuple[Tensor, _State]:
    """One direction of one layer over x [T, N, i]."""
    gates = F.linear(x, weights[0], weights[2])
    steps = range(len(x) - 1, -1, -1) if backwards else range(len(x))
    outputs: list[Tensor] = [x] * len(x)
    for t in steps:
        state = cell(gates[t], state, weights)
        outputs[t] = state[0]
    return torch.stack(outputs), state


def _sequence(cell: _Cell, states: int) -> Rule:
    """torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, without packed sequences and without dropout."""

    def rule(mode: TapMode, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs or len(args) != 9 or not isinstance(args[3], bool):
            return NotImplemented
        x, hx, flat, biased, layers, _, _, bidirectional, batch_first = args
        if mode.source(x) is not None:
            return NotImplemented
        with mode:
            return _run(cell, states, x, hx, list(flat), biased, layers, bidirectional, batch_first)

    return rule


def _run(
    cell: _Cell,
    states: int,
    x: Tensor,
    hx: Any,
    flat: list[Any],
    biased: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    hidden = tuple(hx) if states > 1 else (hx,)
    directions = 2 if bidirectional else 1
    count = len(flat) // (layers * directions)
    y = x.transpose(0, 1) if batch_first else x
    final: list[_State] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            given = flat[place * count : (place + 1) * count]
            weights = given if biased else [given[0], given[1], None, None, *given[2:]]
            result, state = _layer(cell, y, tuple(h[place] for h in hidden), weights, direction == 1)
            outputs.append(result)
            final.append(state)
        y = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
    last = tuple(torch.stack([state[k] for state in final]) for k in range(states))
    return (y.transpose(0, 1) if batch_first else y, *last)


def _single(cell: _Cell, states: int) -> Rule:
    """torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell."""

    def rule(mode: TapMode, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, hx, *weights = args
        if kwargs or mode.source(x) is not None:
            return NotImplemented
        weights += [None] * (4 - len(weights))
        with mode:
            state = cell(F.linear(x, weights[0], weights[2]), tuple(hx) if states > 1 else (hx,), weights)
        return state if states > 1 else state[0]

    return rule


_CELLS: dict[str, tuple[_Cell, int]] = {
    "lstm": (_lstm_cell, 2),
    "gru": (_gru_cell, 1),
    "rnn_tanh": (_plain_cell(torch.tanh), 1),
    "rnn_relu": (_plain_cell(torch.relu), 1),
}

RECURRENT: dict[str, Rule] = {
    **{name: _sequence(cell, states) for name, (cell, states) in _CELLS.items()},
    **{f"{name}_cell": _single(cell, states) for name, (cell, states) in _CELLS.items()},
}
"""Operator name -> how it is tapped."""
