"""torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.zoo.measure import Outputs, forward, outputs_difference
from fxsparse.zoo.subject import NotApplicableError, Sheet, Subject, first_line

BOUND = 1e-4
"""Relative difference up to which a compiled model counts as equal to itself."""


def compiled(subject: Subject, sheet: Sheet) -> None:
    """The sparse model compiles where the original does, and new masks need no new compilation."""
    try:
        original = subject.build().eval()
        gap = outputs_difference(subject.expected, _compile(original)(subject))
    except Exception as error:
        raise NotApplicableError(f"the original does not compile: {first_line(error)}") from error
    bound = subject.tolerance(BOUND)
    if not gap <= bound:
        raise NotApplicableError(f"the compiled original differs from itself by {gap:.2g}")
    sparse = subject.sparse.eval()
    first = _masks(sparse)
    run = _compile(sparse)
    expected = forward(sparse, subject.inputs())
    sheet.within("compile_difference", outputs_difference(expected, run(subject)), bound, "outputs when compiled")
    run(subject)
    before = _graphs()
    state = {name: value.clone() for name, value in sparse.state_dict().items()}
    _other_masks(sparse)
    found = run(subject)
    after = _graphs()
    sheet.numbers["recompiled"] = after - before
    second = _masks(sparse)
    gap = outputs_difference(forward(sparse, subject.inputs()), found)
    sheet.within("remasked_difference", gap, bound, "outputs when compiled, after set_masks")
    if after != before and _depends_on_values(subject, state, first, second):
        sheet.remarks.append(
            "the same zeros without new masks need new compilations too: control flow or shapes depend on values"
        )
    else:
        sheet.check(after == before, f"set_masks led to {after - before} new compilations")
    subject.forget_sparse()


def _masks(sparse: nn.Module) -> dict[str, Tensor]:
    return {name: mask.clone() for name, mask in fxsparse.masks(sparse).items()}


def _depends_on_values(subject: Subject, state: dict[str, Tensor], *steps: dict[str, Tensor]) -> bool:
    """Whether the model compiles anew when the same entries of its weights become zero while no mask changes.

    It is the sparse model, of the first masks and values (`state`), because what torch compiles of a model depends on
    its classes too.
    """
    sparse = subject.new_sparse().eval()
    sparse.load_state_dict(state)
    run = _compile(sparse)
    counts = []
    for masks in steps:
        with torch.no_grad():
            for name, mask in masks.items():
                sparse.get_parameter(name).mul_(mask)
        run(subject)
        run(subject)
        counts.append(_graphs())
    return counts[-1] > counts[0]


def _compile(model: nn.Module) -> Callable[[Subject], Outputs]:
    torch._dynamo.reset()
    optimised: Any = torch.compile(model, backend="aot_eager")
    return lambda subject: forward(optimised, subject.inputs())


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _other_masks(sparse: nn.Module) -> None:
    """Kill every other alive entry of the masked weights."""
    changed = {}
    for name, mask in fxsparse.masks(sparse).items():
        flat = mask.flatten().clone()
        alive = flat.nonzero().flatten()
        flat[alive[1::2]] = False
        changed[name] = flat.view_as(mask)
    fxsparse.set_masks(sparse, changed)
