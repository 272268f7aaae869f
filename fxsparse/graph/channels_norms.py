"""Operators that mix channels: norms, softmax and its like, reductions."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxsparse.graph.channels_flow import Flow, axes_of, bound, shape_of, tensor_arguments
from fxsparse.graph.channels_rules import Rule, several


def _norm_channels(flow: Flow, node: fx.Node) -> Any:
    """BatchNorm and InstanceNorm: parameters and statistics along axis 1."""
    a = bound(node)
    dims = list(flow.of(a["input"]))
    if a.get("training") or a.get("train"):
        for labels in (*dims[:1], *dims[2:]):
            flow.mix(node, labels, "norm", a["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(a.get(name), fx.Node) and len(dims) > 1:
            dims[1] = flow.unite(node, dims[1], flow.of(a[name])[0])
    if "use_input_stats" in a:
        for labels in dims[2:]:
            flow.mix(node, labels, "norm", a["input"])
    return several(node, tuple(dims))


def _layer_norm(flow: Flow, node: fx.Node) -> Any:
    a = bound(node)
    dims = list(flow.of(a["input"]))
    last = len(a["normalized_shape"])
    for name in ("weight", "bias"):
        if isinstance(a.get(name), fx.Node):
            for axis, labels in zip(range(-last, 0), flow.of(a[name]), strict=True):
                dims[axis] = flow.unite(node, dims[axis], labels)
    kind = "layer_norm" if last == 1 and str(node.meta.get("path", "")) in flow.open_norms else "norm"
    for axis in range(-last, 0):
        flow.mix(node, dims[axis], kind, a["input"])
    return several(node, tuple(dims))


def _group_norm(flow: Flow, node: fx.Node) -> Any:
    a = bound(node)
    groups = int(a["num_groups"] if "num_groups" in a else a["group"])
    dims = list(flow.of(a["input"]))
    for name in ("weight", "bias"):
        if isinstance(a.get(name), fx.Node):
            dims[1] = flow.unite(node, dims[1], flow.of(a[name])[0])
    channels = shape_of(a["input"])[1]
    inner = dims[1] if groups == 1 else None
    if 1 < groups < channels:
        inner = flow.atoms.split(dims[1], (groups, channels // groups))[1]
    flow.mix(node, inner, "norm", a["input"])
    for labels in dims[2:]:
        flow.mix(node, labels, "norm", a["input"])
    return several(node, tuple(dims))


def _mixing(kind: str) -> Rule:
    """An operator along one dimension that keeps the shape (softmax, cumsum)."""

    def rule(flow: Flow, node: fx.Node) -> Any:
        a, source = bound(node), node.args[0]
        assert isinstance(source, fx.Node)
        dims = flow.of(source)
        for axis in axes_of(a.get("dim"), len(dims)):
            flow.mix(node, dims[axis], kind, source)
        return several(node, dims)

    return rule


def _reduction(kind: str) -> Rule:
    def rule(flow: Flow, node: fx.Node) -> Any:
        a, source = bound(node), node.args[0]
        assert isinstance(source, fx.Node)
        dims = flow.of(source)
        reduced = axes_of(a.get("dim"), len(dims))
        for axis in reduced:
            flow.mix(node, dims[axis], kind, source)
        if a.get("keepdim"):
            result = tuple(None if axis in reduced else labels for axis, labels in enumerate(dims))
        else:
            result = tuple(labels for axis, labels in enumerate(dims) if axis not in reduced)
        return result if node.meta.get("shape") is not None else [result, result]

    return rule


def _weight_norm(flow: Flow, node: fx.Node) -> Any:
    """V g / |v|, the norm over all dimensions but one; a zero adds nothing to it."""
    v, g = tensor_arguments(node)[:2]
    dims = flow.of(v)
    axis = int(bound(node)["dim"]) % len(dims)
    for place, labels in enumerate(dims):
        if place == axis and flow.of(g)[axis] is not None:
            flow.unite(node, labels, flow.of(g)[axis])
        elif place != axis:
            flow.mix(node, labels, "sum", v)
    return several(node, dims)


_KEEP_REDUCTIONS = {"sum": "sum", "nansum": "sum", "mean": "mean"} | dict.fromkeys(
    "amax amin max min prod var std var_mean std_mean logsumexp norm linalg_vector_norm any all argmax argmin median "
    "nanmean count_nonzero std_mean aminmax".split(),
    "reduction",
)
_ALONG = "softmax _softmax log_softmax _log_softmax cumsum cumprod logcumsumexp cummax cummin sort argsort softmin"

RULES: dict[str, Rule] = {
    **{name: _reduction(kind) for name, kind in _KEEP_REDUCTIONS.items()},
    **dict.fromkeys(_ALONG.split(), _mixing("softmax")),
    **dict.fromkeys(
        ("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
        + ("cudnn_batch_norm", "instance_norm"),
        _norm_channels,
    ),
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"), _layer_norm),
    **dict.fromkeys(("group_norm", "native_group_norm"), _group_norm),
    **dict.fromkeys(("_weight_norm", "_weight_norm_interface"), _weight_norm),
}
"""Operator name -> its rule."""
