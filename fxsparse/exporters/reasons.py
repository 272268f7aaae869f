"""Why a file is not faster than the dense model."""

from __future__ import annotations

from collections.abc import Sequence

from fxsparse.exporters.targets import Target
from fxsparse.sparsity import Channel, Pattern, SharedSupport


def why_not_faster(
    patterns: Sequence[Pattern], target: Target, lowered: bool = False, compacted: bool = False
) -> tuple[str, ...]:
    """The reasons that hold for these patterns on this target, for the reader of a report.

    Args:
        patterns: those of the masked weights.
        target: what the file is made for.
        lowered: whether a layer was lowered.
        compacted: whether channels were removed.
    """
    if not patterns:
        return ("the model has no masks, so ticket and dense model are the same",)
    names = {type(pattern) for pattern in patterns}
    reasons = [f"{target.value} onnxruntime computes with dense kernels, which multiply zeros like any other number"]
    if SharedSupport in names:
        reasons.append(
            "the lowered layers gain too little for a model of this size"
            if lowered
            else "shared-support weights are stored dense: lowering them to gathers gains nothing at these sizes"
        )
    if Channel in names and not compacted:
        reasons.append("dead channels are still in the graph: none was free to go")
    if names - {SharedSupport, Channel}:
        reasons.append("scattered zeros have no faster form: SharedSupport(group) is the pattern that can be lowered")
    return tuple(reasons)
