"""How each operator connects the channels of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from fxsparse.graph.channels_atoms import Dims, Labels
from fxsparse.graph.channels_flow import Flow, bound, op_of, shape_of, tensor_arguments

_ELEMENTWISE = frozenset(
    "hardswish hardsigmoid silu mish leaky_relu elu selu celu gelu relu relu6 hardtanh softplus softsign tanhshrink "
    "hardshrink softshrink logsigmoid log_sigmoid sigmoid tanh exp expm1 log log1p sqrt rsqrt reciprocal abs neg sign "
    "sin cos erf pow square floor ceil round clamp clamp_min clamp_max where lerp nan_to_num addcmul addcdiv".split()
)


def is_pointwise(node: fx.Node) -> bool:
    """Whether an operator acts on each element by itself; torch tags most of those."""
    return torch.Tag.pointwise in node.target.tags or op_of(node) in _ELEMENTWISE  # type: ignore[union-attr]


Rule = Callable[[Flow, fx.Node], Any]


def pointwise(flow: Flow, node: fx.Node) -> Any:
    """Elementwise, with broadcasting."""
    return flow.broadcast(node, tensor_arguments(node), shape_of(node))


def _like(flow: Flow, node: fx.Node) -> Any:
    return flow.of(node.args[0])


def _prelu(flow: Flow, node: fx.Node) -> Any:
    x, weight = node.args[0], node.args[1]
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    dims = list(flow.of(x))
    (labels,) = flow.of(weight) or (None,)
    if shape_of(weight) == (1,) or len(dims) < 2:
        flow.freeze(node, labels, "is one slope for all channels")
    else:
        dims[1] = flow.unite(node, dims[1], labels)
    return tuple(dims)


def _linear(flow: Flow, node: fx.Node) -> Any:
    a = bound(node)
    x, weight = flow.of(a["input"]), flow.of(a["weight"])
    if len(weight) != 2:
        return unknown(flow, node)
    flow.unite(node, x[-1], weight[1])
    return (*x[:-1], _with_bias(flow, node, weight[0], a["bias"]))


def _with_bias(flow: Flow, node: fx.Node, labels: Labels | None, bias: Any) -> Labels | None:
    return flow.unite(node, labels, flow.of(bias)[0]) if isinstance(bias, fx.Node) else labels


def matmul_dims(flow: Flow, node: fx.Node, a: fx.Node, b: fx.Node) -> Dims:
    """The product of two tensors of any rank, as torch.matmul."""
    x, y = flow.of(a), flow.of(b)
    if len(x) == 1 or len(y) == 1:
        flow.unite(node, x[-1], y[-2] if len(y) > 1 else y[0])
        return (*(y[:-2] if len(y) > 1 else ()), *x[:-1], *(y[-1:] if len(y) > 1 else ()))
    flow.unite(node, x[-1], y[-2])
    shape_a, shape_b = shape_of(a)[:-2], shape_of(b)[:-2]
    shape = tuple(torch.broadcast_shapes(shape_a, shape_b))  # type: ignore[no-untyped-call]  # torch leaves it so
    batch: list[Labels | None] = []
    for axis, size in enumerate(shape):
        held = []
        for own, dims in ((shape_a, x), (shape_b, y)):
            place = axis - (len(shape) - len(own))
            if place >= 0 and own[place] == size:
                held.append(dims[place])
            elif place >= 0:
                flow.freeze(node, dims[place], "is repeated along another dimension")
        batch.append(flow._common(node, held))
    return (*batch, x[-2], y[-1])


def _matmul(flow: Flow, node: fx.Node) -> Any:
    return matmul_dims(flow, node, *tensor_arguments(node)[:2])


def _addmm(flow: Flow, node: fx.Node) -> Any:
    bias, a, b = tensor_arguments(node)[:3]
    rows, columns = matmul_dims(flow, node, a, b)[-2:]
    own, dims = shape_of(bias), flow.of(bias)
    result = [rows, columns]
    for axis in (-1, -2):
        if len(own) >= -axis and own[axis] == shape_of(node)[axis]:
            result[axis] = flow.unite(node, result[axis], dims[axis])
    return tuple(result)


def _einsum(flow: Flow, node: fx.Node) -> Any:
    equation, operands = str(node.args[0]).replace(" ", ""), tensor_arguments(node)
    left, _, right = equation.partition("->")
    terms = left.split(",")
    if "->" not in equation or "." in equation or any(len(set(term)) != len(term) for term in terms):
        return unknown(flow, node)
    by_letter: dict[str, Labels | None] = {}
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        for letter, labels, size in zip(term, flow.of(operand), shape_of(operand), strict=True):
            if letter in by_letter and sizes[letter] == size:
                by_letter[letter] = flow.unite(node, by_letter[letter], labels)
            elif letter in by_letter and size == 1:
                flow.freeze(node, labels, "is repeated along another dimension")
            else:
                if letter in by_letter:
                    flow.freeze(node, by_letter[letter], "is repeated along another dimension")
                by_letter[letter], sizes[letter] = labels, size
    for letter in set(sizes) - set(right):  # a letter of one operand only is summed
        if sum(letter in term for term in terms) == 1:
            holder = next(o for term, o in zip(terms, operands, strict=True) if letter in term)
            flow.mix(node, by_letter[letter], "sum", holder)
    return tuple(by_letter[letter] for letter in right)


def _conv(flow: Flow, node: fx.Node) -> Any:
    a = bound(node)
    transposed = a.get("transposed", "transpose" in op_of(node))
    x, weight, groups = list(flow.of(a["input"])), flow.of(a["weight"]), int(a["groups"])
    axis = len(x) - len(weight) + 1  # 1, or 0 without a batch
    for place in range(axis + 1, len(x)):
        flow.freeze(node, x[place], "is a spatial dimension of a convolution")
    for labels in weight[2:]:
        flow.fix(labels)
    out = _channels(flow, node, x[axis], a["weight"], groups, transposed)
    out = _with_bias(flow, node, out, a["bias"])
    return (*x[:axis], out, *(None for _ in range(axis + 1, len(x))))


def _channels(
    flow: Flow, node: fx.Node, x: Labels | None, weight: fx.Node, groups: int, transposed: bool
) -> Labels | None:
    first, second = flow.of(weight)[:2]
    rows, columns = shape_of(weight)[:2]
    if groups == 1:
        flow.unite(node, x, first if transposed else second)
        return second if transposed else first
    if x is None or first is None:
        for labels in (x, first, second):
            flow.freeze(node, labels, "meets a dimension of fixed size")
        return None
    if transposed:
        flow.atoms.unite(x, first)
        group = flow.atoms.split(first, (groups, rows // groups))[0] if rows > groups else first
        return flow.atoms.merge((group, second if columns > 1 else None), (groups, columns))
    group_in, inner = (x, None) if columns == 1 else flow.atoms.split(x, (groups, columns))
    group_out = first if rows == groups else flow.atoms.split(first, (groups, rows // groups))[0]
    flow.unite(node, group_in, group_out)
    if columns > 1:
        flow.unite(node, inner, second)
    else:
        flow.fix(second)
    return first


def several(node: fx.Node, dims: Dims) -> Any:
    """The result, or for operators that return statistics too a list whose first entry it is."""
    return dims if node.meta.get("shape") is not None else [dims]


def spatial(kept: int) -> Rule:
    """Pooling and interpolation: the last `kept` dimensions change, the others stay."""

    def rule(flow: Flow, node: fx.Node) -> Any:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        dims = flow.of(source)
        for labels in dims[-kept:]:
            flow.freeze(node, labels, "is a spatial dimension")
        result = (*dims[:-kept], *(None for _ in range(kept)))
        return result if node.meta.get("shape") is not None else [result, result]

    return rule


def _attention(flow: Flow, node: fx.Node) -> Any:
    a = bound(node)
    q, k, v = (flow.of(a[name]) for name in ("query", "key", "value"))
    flow.unite(node, q[-1], k[-1])
    for dims in (q, k, v):
        flow.freeze(node, dims[-2], "is a sequence dimension")
    sizes = [shape_of(a[name])[:-2] for name in ("query", "key", "value")]
    batch: list[Labels | None] = []
    for axis in range(len(q) - 2):
        held: list[Labels | None] = []
        for dims, size in zip((q, k, v), sizes, strict=True):
            labels, repeats = dims[axis], sizes[0][axis] // size[axis]
            held.append(labels if repeats == 1 or labels is None else np.repeat(labels, repeats))  # shared key heads
        batch.append(flow._common(node, held))
    mask = a.get("attn_mask")
    if isinstance(mask, fx.Node):
        own = shape_of(mask)
        for axis in range(len(batch)):
            place = axis - len(batch) + len(own) - 2
            if place >= 0 and own[place] > 1:
                batch[axis] = flow.unite(node, batch[axis], flow.of(mask)[place])
    return several(node, (*batch, None, v[-1]))


def _embedding(flow: Flow, node: fx.Node) -> Any:
    a = bound(node)
    weight = flow.of(a["weight"])
    flow.freeze(node, weight[0], "is indexed by values")
    for labels in flow.of(a["indices"]):
        flow.freeze(node, labels, "holds indices")
    return (*(None for _ in shape_of(a["indices"])), weight[1])


def _embedding_bag(flow: Flow, node: fx.Node) -> Any:
    a = bound(node)
    weight = flow.of(a["weight"])
    flow.freeze(node, weight[0], "is indexed by values")
    for name in ("indices", "offsets", "per_sample_weights"):
        for labels in flow.of(a.get(name)):
            flow.freeze(node, labels, "holds indices")
    bags = (None, weight[1])
    return bags if node.meta.get("shape") is not None else [bags, *[(None,)] * 3]


def _glu(flow: Flow, node: fx.Node) -> Any:
    a = bound(node)
    dims = list(flow.of(a["self"]))
    axis = int(a["dim"]) % len(dims)
    labels = dims[axis]
    if labels is not None:
        half = labels.size // 2
        dims[axis] = flow.unite(node, labels[:half], labels[half:])
    return tuple(dims)


def unknown(flow: Flow, node: fx.Node) -> Any:
    """A barrier: whatever goes in or comes out keeps all its channels."""
    for argument in tensor_arguments(node):
        for labels in flow.of(argument):
            flow.freeze(node, labels, "is not understood here")
    shape = node.meta.get("shape")
    return None if shape is None else (None,) * len(shape)


def fixed(flow: Flow, node: fx.Node) -> Any:
    """Made from nothing that has channels: every dimension is of fixed size."""
    return (None,) * len(shape_of(node))


_POINTWISE = (
    "dropout alpha_dropout feature_dropout feature_alpha_dropout clone contiguous detach alias lift_fresh _to_copy to "
    "type_as native_dropout copy where masked_fill relu6 hardtanh celu rrelu softplus threshold _conj resolve_conj "
    "resolve_neg conj_physical add sub mul div rsub __and__ __or__ __xor__ float_power pow"
).split()
_LIKE = "zeros_like ones_like full_like empty_like rand_like randn_like zero fill normal uniform bernoulli".split()
_POOLS = {
    f"{kind}{n}d": n
    for n in (1, 2, 3)
    for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "adaptive_max_pool")
} | {f"max_pool{n}d_with_indices": n for n in (2, 3)}
_RESIZES = {
    **{f"upsample_{kind}{n}d": n for n in (1, 2, 3) for kind in ("nearest", "nearest_exact", "_nearest_exact")},
    **{"upsample_linear1d": 1, "upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "upsample_trilinear3d": 3},
    **{"_upsample_nearest_exact1d": 1, "_upsample_nearest_exact2d": 2, "_upsample_bilinear2d_aa": 2},
    **{"_upsample_bicubic2d_aa": 2},
}

RULES: dict[str, Rule] = {
    **dict.fromkeys(_POINTWISE, pointwise),
    **dict.fromkeys(_LIKE, _like),
    **{name: spatial(n) for name, n in {**_POOLS, **_RESIZES}.items()},
    **dict.fromkeys(("linear",), _linear),
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm_2d"), _addmm),
    "einsum": _einsum,
    **dict.fromkeys(
        ("convolution", "_convolution", "conv1d", "conv2d", "conv3d")
        + ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        _conv,
    ),
    **dict.fromkeys(
        ("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu")
        + ("_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention"),
        _attention,
    ),
    "embedding": _embedding,
    **dict.fromkeys(("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"), _embedding_bag),
    "glu": _glu,
    "prelu": _prelu,
    "_prelu_kernel": _prelu,
}
"""Operator name -> its rule; operators that torch tags as pointwise need no entry."""
