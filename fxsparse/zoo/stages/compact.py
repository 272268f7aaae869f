"""Dead channels removed."""

from __future__ import annotations

import math

import fxsparse
from fxsparse.sparsity import Channel
from fxsparse.zoo.measure import forward, outputs_difference, train_run
from fxsparse.zoo.subject import Sheet, Subject

SPARSITY = 0.5


def compact(subject: Subject, sheet: Sheet) -> None:
    """Half of the channels of every weight dead: the compacted model computes the same, and trains."""
    model = fxsparse.transform(
        subject.build().eval(), subject.inputs(), sparsity=SPARSITY, pattern=Channel(axis=0)
    ).eval()
    expected = forward(model, subject.inputs())
    sheet.numbers["parameters_before"] = sum(parameter.numel() for parameter in model.parameters())
    smaller = fxsparse.compact(model, subject.inputs()).eval()
    sheet.numbers["parameters_after"] = sum(parameter.numel() for parameter in smaller.parameters())
    gap = outputs_difference(expected, forward(smaller, subject.inputs()))
    sheet.within("compact_difference", gap, subject.tolerance(1e-4), "outputs of the compacted model")
    gap = outputs_difference(expected, forward(model, subject.inputs()))
    sheet.within("compact_source_difference", gap, subject.tolerance(0.0), "outputs of the model that was compacted")
    if not isinstance(subject.trained, Exception) and math.isfinite(subject.trained.loss):
        loss = train_run(smaller.train(), subject.train_inputs()).loss
        sheet.check(math.isfinite(loss), f"the loss of the compacted model in train mode is {loss}")
