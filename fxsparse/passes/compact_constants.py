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

from fxsparse.graph.channels_flow import bound, factor_groups, op_of, shape_of, tensor_arguments
from fxsparse.graph.channels_moves import piece_sizes
from fxsparse.graph.channels_recurrent import GATES
from fxsparse.graph.channels_rules import is_pointwise
from fxsparse.graph.operators import OperatorGraph
from fxsparse.passes import compact_gather, compact_recurrent
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
    value = tensor.detach()
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
    moves = op_of(node) in (*_MOVES, *_RESHAPES)
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


def _moved(node: fx.Node, found: Mapping[fx.Node, Known]) -> Any:
    """Operators that only rename dimensions work on the short tensors as they are."""
    source = get(node.args[0], found)
    if source is None:
        return None
    target = node.target
    return Known(
        target(source.value, *node.args[1:], **node.kwargs),  # type: ignore[operator]
        target(source.known, *node.args[1:], **node.kwargs),  # type: ignore[operator]
    )


def _squeeze(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    source, shape = get(node.args[0], found), shape_of(node.args[0])  # type: ignore[arg-type]
    if source is None:
        return None
    given = bound(node).get("dim")
    axes = range(len(shape)) if given is None else (given if isinstance(given, list | tuple) else [given])
    gone = {int(axis) % len(shape) for axis in axes}
    kept = [n for axis, n in enumerate(source.value.shape) if not (axis in gone and shape[axis] == 1)]
    return Known(source.value.reshape(kept), source.known.reshape(kept))


def _reshape(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    source = get(node.args[0], found)
    if source is None:
        return None
    before, after = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    middle, target = list(source.value.shape), list(after)
    for old, new in factor_groups(before, after):
        if all(source.value.shape[axis] == 1 for axis in old):
            for axis in new:
                target[axis] = 1
        else:
            for axis in old:
                middle[axis] = before[axis]
    return Known(source.value.expand(middle).reshape(target), source.known.expand(middle).reshape(target))


def _expand(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    source = get(node.args[0], found)
    if source is None:
        return None
    added = len(shape_of(node)) - source.value.ndim
    shape = (1,) * added + tuple(source.value.shape)
    return Known(source.value.reshape(shape), source.known.reshape(shape))


def _repeat(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    source = _expand(node, found)
    if source is None:
        return None
    before, after = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    before = (1,) * (len(after) - len(before)) + before
    times = [1 if n == 1 else new // old for n, old, new in zip(source.value.shape, before, after, strict=True)]
    return Known(source.value.repeat(times), source.known.repeat(times))


def _repeat_interleave(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    a, source = bound(node), get(node.args[0], found)
    if source is None or not isinstance(a.get("repeats"), int) or a.get("dim") is None:
        return None
    axis = int(a["dim"]) % source.value.ndim
    if source.value.shape[axis] == 1:
        return Known(source.value, source.known)
    repeats = a["repeats"]
    return Known(source.value.repeat_interleave(repeats, axis), source.known.repeat_interleave(repeats, axis))


def _cat(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    a = bound(node)
    axis = int(a["dim"]) % len(shape_of(node))
    tensors = [t for t in a["tensors"] if shape_of(t) != (0,)]
    held = [or_unknown(t, found) for t in tensors]
    others = broadcast(*([1 if i == axis else n for i, n in enumerate(k.value.shape)] for k in held))
    values, knowns = [], []
    for tensor, each in zip(tensors, held, strict=True):
        shape = [shape_of(tensor)[i] if i == axis else n for i, n in enumerate(others)]
        values.append(each.value.expand(shape))
        knowns.append(each.known.expand(shape))
    return Known(torch.cat(values, axis), torch.cat(knowns, axis))


def _stack(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    a = bound(node)
    held = [or_unknown(t, found) for t in a["tensors"]]
    shape = broadcast(*(k.value.shape for k in held))
    values = [k.value.expand(shape) for k in held]
    return Known(torch.stack(values, a["dim"]), torch.stack([k.known.expand(shape) for k in held], a["dim"]))


def _pieces(node: fx.Node, found: Mapping[fx.Node, Known]) -> list[Known | None] | None:
    """Split and chunk."""
    source = get(node.args[0], found)
    if source is None:
        return None
    shape = shape_of(node.args[0])  # type: ignore[arg-type]
    axis = int(bound(node)["dim"]) % len(shape)
    sizes = piece_sizes(node, shape[axis])
    if source.value.shape[axis] == 1:
        return [Known(source.value, source.known) for _ in sizes]
    pairs = zip(torch.split(source.value, sizes, axis), torch.split(source.known, sizes, axis), strict=True)
    return [Known(value, known) for value, known in pairs]


def _unbind(node: fx.Node, found: Mapping[fx.Node, Known]) -> list[Known | None] | None:
    source = get(node.args[0], found)
    if source is None:
        return None
    shape = shape_of(node.args[0])  # type: ignore[arg-type]
    axis = int(bound(node)["dim"]) % len(shape)
    wide = list(source.value.shape)
    wide[axis] = shape[axis]
    values, knowns = source.value.expand(wide).unbind(axis), source.known.expand(wide).unbind(axis)
    return [Known(value, known) for value, known in zip(values, knowns, strict=True)]


def _piece(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    """select, slice and narrow."""
    source = get(node.args[0], found)
    if source is None:
        return None
    axis = int(bound(node)["dim"]) % source.value.ndim
    if source.value.shape[axis] > 1:
        return _moved(node, found)  # type: ignore[no-any-return]  # of one tensor
    if op_of(node) == "select":
        return Known(source.value.squeeze(axis), source.known.squeeze(axis))
    return Known(source.value, source.known) if 0 not in shape_of(node) else None


def _pad(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    a, source = bound(node), get(node.args[0], found)
    if source is None:
        return None
    before, after = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    if op_of(node) not in ("pad", "constant_pad_nd") or a.get("mode") not in (None, "constant"):
        wide = any(old != new and n > 1 for old, new, n in zip(before, after, source.value.shape, strict=True))
        return None if wide else Known(source.value, source.known)
    filler = float(a.get("value") or 0.0)
    pads, value, known = list(a["pad"]), source.value, source.known
    sides: list[int] = []
    for place in range(0, len(pads), 2):
        axis = value.ndim - 1 - place // 2
        if value.shape[axis] == 1 and before[axis] != after[axis]:
            known = known & (value == filler)
            sides += [0, 0]
        else:
            sides += pads[place : place + 2]
    value = torch.nn.functional.pad(value, sides, value=filler)
    return Known(value, torch.nn.functional.pad(known, sides, value=True))


def _pixel_shuffle(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    source, factor = get(node.args[0], found), int(bound(node)["upscale_factor"])
    if source is None or source.value.shape[-2:] != (1, 1):
        return None
    channels = shape_of(node)[-3]
    wide = (*source.value.shape[:-3], channels * factor**2)
    value = source.value[..., 0, 0].expand(wide).reshape(*wide[:-1], channels, factor**2)
    known = source.known[..., 0, 0].expand(wide).reshape(value.shape)
    same = known.all(-1) & (value == value[..., :1]).all(-1)
    return Known(value[..., 0][..., None, None], same[..., None, None])


_IDENTITIES = (
    "dropout alpha_dropout feature_dropout clone contiguous detach alias lift_fresh _to_copy to type_as".split()
)
_POOLS = [
    f"{kind}{n}d" for n in (1, 2, 3) for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool")
]
_ATTENTION = ("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu")
_MOVES = "permute transpose t numpy_T mT movedim swapaxes swapdims unsqueeze".split()
_RESHAPES = "view reshape _unsafe_view flatten unflatten view_as reshape_as".split()
_RULES: dict[str, Callable[[fx.Node, Mapping[fx.Node, Known]], Any]] = {
    **dict.fromkeys(_IDENTITIES, _identity),
    **dict.fromkeys(_MOVES, _moved),
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("split", "chunk", "split_with_sizes", "unsafe_split", "unsafe_chunk"), _pieces),
    **dict.fromkeys(("select", "slice", "narrow"), _piece),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"), _pad),
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
    **dict.fromkeys(GATES, compact_recurrent.known),
    **{f"{kind}_cell": compact_recurrent.known for kind in GATES},
    "addmm": products.addmm,
    "einsum": products.einsum,
    "embedding": products.embedding,
    "glu": products.glu,
    "linear": products.linear,
    "pixel_shuffle": _pixel_shuffle,
    "squeeze": _squeeze,
    "stack": _stack,
    "unbind": _unbind,
}
"""Operator name -> what it keeps known; of any other operator nothing is known."""
