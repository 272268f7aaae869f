"""Another batch size than the one that the model was captured with."""

from __future__ import annotations

from torch.utils import _pytree as pytree

from fxsparse.zoo.measure import Inputs, forward, outputs_difference
from fxsparse.zoo.subject import NotApplicableError, Sheet, Subject, first_line


def batch(subject: Subject, sheet: Sheet) -> None:
    """At another batch size that the original takes, the sparse model computes what the folded original does."""
    size = subject.batch + 1
    try:
        inputs = subject.inputs(size)
    except Exception as error:
        raise NotApplicableError(f"the inputs exist at batch size {subject.batch} only: {first_line(error)}") from error
    if _shapes(inputs) == _shapes(subject.inputs()):
        raise NotApplicableError("the inputs do not depend on the batch size")
    original = subject.build().eval()
    try:
        forward(original, inputs)
    except Exception as error:
        raise NotApplicableError(f"the original does not run at batch size {size}: {first_line(error)}") from error
    gap = outputs_difference(forward(subject.folded(), inputs), forward(subject.sparse.eval(), inputs))
    sheet.within("batch_difference", gap, subject.tolerance(), f"outputs at batch size {size}")


def _shapes(inputs: Inputs) -> list[object]:
    return [getattr(leaf, "shape", None) for leaf in pytree.tree_leaves(inputs)]
