"""Constant propagation: which channels of which values are the same number for every input.

A value is described by tensors of its rank in which a dimension of size 1 stands for any size: the numbers, in float64,
and where they are known. What is computed from parameters alone is known everywhere.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxsparse.graph.channels_flow import bound, op_of, shape_of, tensor_arguments
from fxsparse.graph.channels_recurrent import GATES
from fxsparse.graph.channels_rules import is_pointwise
from fxsparse.graph.operators import OperatorGraph
from fxsparse.passes import compact_gather, compact_moves, compact_recurrent
from fxsparse.passes import compact_products as products
from fxsparse.passes.compact_known import Known, broadcast, get, or_unknown


def propagate(graph: OperatorGraph, tensors: Mapping[str, Tensor]) -> dict[fx.Node, Known]:
    """What is known of every value; nodes of which nothing is known are left out.

    Args:
        graph: the operator graph.
        tensors: parameters and buffers by first name.
    """
    found: dict[fx.Node, Known] = {}
    several: dict[fx.Node, list[Known | None]] = {}
    with torch.no_grad():
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                source = graph.source(node)
                tensor = graph.constants.get(node.name) if source is None else tensors.get(source)
                result: Any = None if tensor is None or tensor.is_meta else _static(tensor)
            elif node.op != "call_function" or node.meta.get("aliased_write"):
                continue
            elif node.target is operator.getitem:
                result = _item(several, node)
            else:
                result = _apply(node, found)
            if isinstance(result, list):
                several[node] = result
            elif result is not None and bool(result.known.any()) and not node.meta.get("aliased_write"):
                found[node] = result
    return found


def _item(several: Mapping[fx.Node, list[Known | None]], node: fx.Node) -> Known | None:
    source, index = node.args
    held = several.get(source) if isinstance(source, fx.Node) else None
    return held[index] if held is not None and isinstance(index, int) and index < len(held) else None


def _static(tensor: Tensor) -> Known:
    value = tensor.detach().cpu()  # the search is made of NumPy's arrays, wherever the model is
    return Known(value, torch.ones((1,) * value.ndim, dtype=torch.bool).expand(value.shape), static=True)


def _apply(node: fx.Node, found: Mapping[fx.Node, Known]) -> Any:
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    arguments = tensor_arguments(node)
    name, tags = op_of(node), node.target.tags
    random = torch.Tag.nondeterministic_seeded in tags and name not in (*_IDENTITIES, *_ATTENTION, *GATES)
    if name in compact_gather.CREATED:
        return compact_gather.created(node, found)
    if not any(argument in found for argument in arguments) or random:
        return None
    if all(argument in found and found[argument].static for argument in arguments):
        return _evaluated(node, found)
    rule = _RULES.get(name)
    if rule is None and is_pointwise(node):
        rule = _pointwise
    try:
        return None if rule is None else rule(node, found)
    except (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError):
        return None  # an overload or a shape that the rule does not know: nothing is known


def _evaluated(node: fx.Node, found: Mapping[fx.Node, Known]) -> Any:
    """An operator of parameters only: what it really returns, in float64; a move only looks at them."""
    moves = op_of(node) in (*compact_moves.MOVES, *compact_moves.RESHAPES)
    args, kwargs = _filled(node, lambda argument: found[argument].stored if moves else found[argument].value.clone())
    try:
        result = node.target(*args, **kwargs)  # type: ignore[operator]  # an operator is callable
    except (RuntimeError, NotImplementedError):
        return None
    if isinstance(result, Tensor):
        return _static(result) if result.shape == shape_of(node) else None
    if not isinstance(result, tuple | list):  # a number that Python reads
        return None
    return [_static(item) if isinstance(item, Tensor) else None for item in result]


def _filled(node: fx.Node, value: Callable[[fx.Node], Any]) -> tuple[Any, Any]:
    return fx.node.map_arg((node.args, node.kwargs), value)


def _pointwise(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    held = {argument: or_unknown(argument, found) for argument in tensor_arguments(node)}
    args, kwargs = _filled(node, lambda argument: held[argument].value)
    target = node.target
    if target._schema.is_mutable:  # type: ignore[union-attr]  # an operator
        shape = broadcast(*(k.value.shape for k in held.values()))
        args = (args[0].expand(shape).clone(), *args[1:])
    value = target(*args, **kwargs)  # type: ignore[operator]
    known = torch.ones((), dtype=torch.bool)
    for each in held.values():
        known = known & each.known
    if op_of(node) == "mul":
        for each in held.values():
            known = known | each.zero
        value = torch.where(torch.isfinite(value), value, 0.0) if value.is_floating_point() else value
        zero = torch.zeros((), dtype=torch.bool)
        for each in held.values():
            zero = zero | each.zero
        value = torch.where(zero, torch.zeros_like(value), value)
    if known.ndim < value.ndim or known.shape != value.shape:
        known = known.expand(value.shape)
    if value.is_floating_point():
        known = known & ~value.isnan()
    return Known(value, known)


def _identity(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    source = get(node.args[0], found)
    dtype = node.meta.get("dtype")
    if source is not None and bound(node).get("train") and float(bound(node).get("p") or 0.0) > 0:
        return Known(source.value, source.zero)  # dropout: only zeros stay what they are
    if source is None or (dtype is not None and dtype.is_floating_point != source.value.is_floating_point()):
        return None
    return Known(source.value, source.known)


_IDENTITIES = (
    "dropout alpha_dropout feature_dropout clone contiguous detach alias lift_fresh _to_copy to type_as".split()
)
_POOLS = [
    f"{kind}{n}d" for n in (1, 2, 3) for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool")
]
_ATTENTION = ("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu")
_RULES: dict[str, Callable[[fx.Node, Mapping[fx.Node, Known]], Any]] = {
    **dict.fromkeys(_IDENTITIES, _identity),
    **dict.fromkeys(("convolution", "conv1d", "conv2d", "conv3d"), products.conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), products.conv),
    **dict.fromkeys(("batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training"), products.batch_norm),
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm"), products.layer_norm),
    **dict.fromkeys(_POOLS, products.pooled),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices"), products.pooled),
    **dict.fromkeys(
        [f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d")]
        + ["upsample_bicubic2d", "upsample_trilinear3d"],
        products.resized,
    ),
    **dict.fromkeys(("sum", "mean"), products.reduced),
    **dict.fromkeys(("matmul", "mm", "bmm"), products.matmul),
    **dict.fromkeys(_ATTENTION, products.attention),
    **dict.fromkeys(("prelu", "_prelu_kernel"), products.prelu),
    **compact_gather.RULES,
    **compact_moves.RULES,
    **dict.fromkeys(GATES, compact_recurrent.known),
    **{f"{kind}_cell": compact_recurrent.known for kind in GATES},
    "addmm": products.addmm,
    "einsum": products.einsum,
    "embedding": products.embedding,
    "glu": products.glu,
    "linear": products.linear,
}
"""Operator name -> what it keeps known; of any other operator nothing is known."""
