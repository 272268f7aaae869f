"""bfloat16."""

from __future__ import annotations

import torch
from torch import nn

import fxsparse
from fxsparse.zoo.measure import Inputs, cast, forward, outputs_difference
from fxsparse.zoo.subject import NotApplicableError, Sheet, Subject, first_line

BOUND = 1e-2
"""Relative difference up to which two bfloat16 runs count as equal."""


def half(subject: Subject, sheet: Sheet) -> None:
    """The sparse model in bfloat16 computes what the folded original does, where the original runs in it."""
    inputs = cast(subject.inputs(), torch.bfloat16)
    try:
        forward(subject.build().eval().to(torch.bfloat16), inputs)
    except Exception as error:
        raise NotApplicableError(f"the original does not run in bfloat16: {first_line(error)}") from error
    expected = forward(_reference(subject, inputs), inputs)
    model = _converted(subject)
    sheet.check(
        all(mask.dtype is torch.bool for mask in fxsparse.masks(model).values()), "masks are no longer bool", wrong=True
    )
    gap = outputs_difference(expected, forward(model, inputs))
    sheet.within("half_difference", gap, subject.tolerance(BOUND), "outputs in bfloat16 and the folded original's")
    if 0 < gap <= subject.tolerance(BOUND):
        sheet.remarks.append(f"not bit for bit: {gap:.2g}")


def _reference(subject: Subject, inputs: Inputs) -> nn.Module:
    """The folded original in bfloat16; other weights may lead it to code that has none (what detections go through)."""
    folded = subject.folded().to(torch.bfloat16)
    if not fxsparse.masks(folded):
        try:
            forward(folded, inputs)
        except Exception as error:
            raise NotApplicableError(
                f"the original does not run in bfloat16 with the same zeroed weights: {first_line(error)}"
            ) from error
    return folded


def _converted(subject: Subject) -> nn.Module:
    """A fresh sparse model with the weights and masks of the shared one, in bfloat16."""
    model = subject.new_sparse().eval()
    model.load_state_dict(subject.sparse.state_dict())
    return model.to(torch.bfloat16)
