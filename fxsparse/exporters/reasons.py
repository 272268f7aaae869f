"""Why zeros alone do not make a file faster."""

from __future__ import annotations

from collections.abc import Sequence

from fxsparse.exporters.report import Target
from fxsparse.sparsity import Channel, Pattern, SharedSupport


def why_not_faster(patterns: Sequence[Pattern], target: Target) -> tuple[str, ...]:
    """The reasons that hold for these patterns on this target, for the reader of a report."""
    if not patterns:
        return ("the model has no masks, so ticket and dense model are the same",)
    names = {type(pattern) for pattern in patterns}
    reasons = [f"{target.value} onnxruntime computes with dense kernels, which multiply zeros like any other number"]
    if SharedSupport in names:
        reasons.append("shared-support weights are stored dense: lowering them to gathers is not in this version")
    if Channel in names:
        reasons.append("dead channels are still in the graph: cutting them out is not in this version")
    if names - {SharedSupport, Channel}:
        reasons.append("scattered zeros have no faster form: SharedSupport(group) is the pattern that can be lowered")
    return tuple(reasons)
