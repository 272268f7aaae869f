"""Recurrent layers in compaction: units that are always zero, what reads each unit, and the sizes that torch keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxsparse.graph.channels_atoms import Labels
from fxsparse.graph.channels_flow import op_of, shape_of
from fxsparse.graph.channels_recurrent import CANDIDATE, GATES, Cell, Recurrent, recurrent_of
from fxsparse.passes.compact_known import Known, get, or_unknown

if TYPE_CHECKING:
    from fxsparse.passes.compact_sinks import Bools, Finder, Floats, Fold, Sink


def zero_units(call: Recurrent, cell: Cell, found: Mapping[fx.Node, Known]) -> Tensor | None:
    """Which hidden units are zero at every step: they start so, and all weights of their candidate gate are zero."""
    gates, which = GATES[call.kind], CANDIDATE[call.kind]
    size = shape_of(cell.w_hh)[1]
    if cell.projection is not None:
        return None
    zero = torch.ones(size, dtype=torch.bool)
    for weight in (cell.w_ih, cell.w_hh, cell.b_ih, cell.b_hh):
        if weight is None:
            continue
        held = get(weight, found)
        if held is None or not held.static:
            return None
        rows = held.stored.reshape(gates, size, -1)[which]
        zero &= (rows == 0).all(1)
    for state in call.states:
        held = or_unknown(state, found)
        start = held.zero.broadcast_to(held.value.shape).reshape(-1, held.value.shape[-1]).all(0)
        zero &= start.expand(size)
    return zero


def known(node: fx.Node, found: Mapping[fx.Node, Known]) -> Any:
    """Zero units of the outputs and the last states."""
    call = recurrent_of(node)
    if call is None:
        return None
    held = [[zero_units(call, cell, found) for cell in layer] for layer in call.layers]
    if any(zero is None for layer in held for zero in layer):
        return None
    units = [zero for layer in held for zero in layer if zero is not None]
    outputs = _zeros(torch.cat(units[-len(held[-1]) :]), len(shape_of(call.x)))
    last = _zeros(torch.stack(units).all(0), len(shape_of(call.states[0])))
    if op_of(node).endswith("_cell"):
        return outputs if node.meta.get("shape") is not None else [outputs, outputs]
    return [outputs, *(last for _ in call.states)]


def _zeros(zero: Tensor, rank: int) -> Known:
    mask = zero.reshape(*(1 for _ in range(rank - 1)), -1)
    return Known(torch.zeros(mask.shape, dtype=torch.float64), mask)


def sinks(finder: Finder, node: fx.Node, call: Recurrent) -> list[Sink]:
    """The products of all cells: constant inputs can go into the bias, units that are always zero can go."""
    result: list[Sink] = []
    inputs = finder.labels(call.x, -1)
    constant, value = finder.constants(call.x, -1, inputs.size)
    for layer in call.layers:
        joined: list[tuple[Labels, Bools]] = []
        for cell in layer:
            fold = finder.fold(node, cell.b_ih, False)
            result += _sink(finder, node, cell.w_ih, inputs, constant, value, *fold)
            units = finder.labels(cell.w_hh, 1)
            found = zero_units(call, cell, finder.found)
            zero: Bools = np.zeros(units.size, dtype=bool) if found is None else found.numpy()
            if cell.projection is None:
                result += _sink(finder, node, cell.w_hh, units, zero, np.zeros(units.size), None, "is fed back")
            joined.append((units, zero))
        inputs = np.concatenate([units for units, _ in joined])
        constant = np.concatenate([zero for _, zero in joined])
        value = np.zeros(inputs.size)
    return result


def _sink(
    finder: Finder,
    node: fx.Node,
    weight: fx.Node,
    inputs: Labels,
    constant: Bools,
    value: Floats,
    fold: Fold | None,
    blocked: str,
) -> list[Sink]:
    table = finder.static(weight)
    if table is None or table.ndim != 2:
        finder.meet_labels(node, inputs, constant & (value == 0), "meets a recurrent weight that is computed")
        return []
    outputs = finder.labels(weight, 0)
    return finder.sink(
        node, weight, 1, inputs[None], outputs[None], table[None], constant[None], value[None], fold, blocked
    )


def describe(module: nn.RNNBase | nn.RNNCellBase) -> None:
    """Let the sizes of a recurrent layer say what shape its parameters have."""
    suffix = "_l0" if isinstance(module, nn.RNNBase) else ""
    w_ih, w_hh = (module._parameters.get(f"weight_{name}{suffix}") for name in ("ih", "hh"))
    if w_ih is None or w_hh is None:
        return
    module.input_size = w_ih.shape[1]
    if not getattr(module, "proj_size", 0):
        module.hidden_size = w_hh.shape[1]
