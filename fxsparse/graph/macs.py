"""Multiply-accumulates of torch's products, from the arguments of one call.

A dense convolution takes H_out W_out C_out (C_in / g) k_h k_w, a transposed one H_in W_in |W|, a linear layer |W| per
token; padding is counted; additions of biases are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Operand(NamedTuple):
    """One tensor of a product that may be a weight: the argument's name, the tensor, its MACs (None = unknown)."""

    argument: str
    tensor: Tensor
    macs: int | None


class Product(NamedTuple):
    """The weight candidates of a call, the activation it reads, and MACs that involve no weight."""

    operands: tuple[Operand, ...]
    input: Tensor | None
    activation_macs: int = 0


def op_name(func: Callable[..., Any]) -> str:
    """The plain name of an overridable torch function: ``Tensor.__matmul__`` -> "matmul", ``Tensor.T`` -> "T"."""
    name = str(getattr(func, "__name__", type(func).__name__))
    if name in ("__get__", "__set__"):
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    if name.startswith("__") and name.endswith("__"):
        core = name[2:-2]
        return core[1:] if core[:1] in ("r", "i") and core[1:] in _OPERATORS else core
    return name.rstrip("_") if not name.startswith("_") else name


_OPERATORS = frozenset("add sub mul truediv floordiv mod pow matmul and or xor lshift rshift div".split())


def product(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Product | None:
    """Read one call as a product, or None when it is not one.

    Args:
        func: the torch function that was called.
        args: its positional arguments.
        kwargs: its keyword arguments.
        result: what it returned.
    """
    name = op_name(func)
    handler = _HANDLERS.get(name)
    if handler is None:
        return None
    if name == "matmul" and getattr(func, "__name__", "") == "__rmatmul__":
        args = (args[1], args[0])
    return handler(_Call(tuple(args), kwargs, result))


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def get(self, position: int, *names: str) -> Any:
        if position < len(self.args):
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), None)


def _linear(call: _Call) -> Product:
    x, weight = call.get(0, "input"), call.get(1, "weight")
    tokens = x.numel() // max(weight.shape[-1], 1)
    return Product((Operand("weight", weight, tokens * weight.numel()),), x)


def _conv(call: _Call) -> Product:
    weight = call.get(1, "weight")
    positions = call.result.numel() // max(weight.shape[0], 1)
    return Product((Operand("weight", weight, positions * weight.numel()),), call.get(0, "input"))


def _conv_transpose(call: _Call) -> Product:
    x, weight = call.get(0, "input"), call.get(1, "weight")
    return Product((Operand("weight", weight, x.numel() // max(weight.shape[0], 1) * weight.numel()),), x)


def _matmul(first: int, second: int, *names: tuple[str, ...]) -> Callable[[_Call], Product]:
    def handler(call: _Call) -> Product:
        a, b = call.get(first, *names[0]), call.get(second, *names[1])
        macs = call.result.numel() * a.shape[-1]
        if names[0][0] == "batch1" and call.result.ndim == 2:  # addbmm sums over the batch
            macs *= a.shape[0]
        return Product((Operand(names[0][0], a, macs), Operand(names[1][0], b, macs)), a)

    return handler


def _grouped(call: _Call) -> Product:
    """Experts' products: tokens (T, K) in runs, or (E, T, K), times a weight (E, K, N)."""
    a, b = call.get(0, "mat_a", "self", "input"), call.get(1, "mat_b", "mat2")
    macs = call.result.numel() * a.shape[-1] if b.ndim == 3 else a.numel() * b.shape[-1]
    return Product((Operand("mat_a", a, macs), Operand("mat_b", b, macs)), a)


def _tensordot(call: _Call) -> Product:
    a, b = call.get(0, "a"), call.get(1, "b")
    rest = a.numel() * b.numel()
    contracted = math.isqrt(rest // max(call.result.numel(), 1))
    macs = call.result.numel() * contracted
    return Product((Operand("a", a, macs), Operand("b", b, macs)), a)


def _einsum(call: _Call) -> Product | None:
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str):  # the form with index lists
        tensors = [value for value in call.args if isinstance(value, Tensor)]
        return Product(tuple(Operand(f"operand[{i}]", tensor, None) for i, tensor in enumerate(tensors)), None)
    macs = _einsum_macs(equation, operands) if len(operands) <= 2 else None
    return Product(tuple(Operand(f"operand[{i}]", tensor, macs) for i, tensor in enumerate(operands)), operands[0])


def _einsum_macs(equation: str, operands: Sequence[Tensor]) -> int:
    """The product of the sizes of all indices: the MACs of a contraction of two operands."""
    sizes: dict[Any, int] = {}
    for term, tensor in zip(equation.replace(" ", "").split("->")[0].split(","), operands, strict=True):
        before, dots, after = term.partition("...")
        batch = list(range(tensor.ndim - len(before) - len(after))) if dots else []
        labels = [*before, *(len(batch) - i for i in batch), *after]  # dimensions of "..." align at the right
        for label, size in zip(labels, tensor.shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), size)
    return math.prod(sizes.values())


def _bilinear(call: _Call) -> Product:
    x, weight = call.get(0, "input1"), call.get(2, "weight")
    tokens = x.numel() // max(x.shape[-1], 1)
    outputs = weight.shape[0] * weight.shape[2]
    return Product((Operand("weight", weight, tokens * weight.numel()),), x, tokens * outputs)


def _recurrent(call: _Call) -> Product:
    """`lstm(input, hx, params, ...)` or, packed, `lstm(data, batch_sizes, hx, params, ...)`: one use a time step."""
    place = 3 if isinstance(call.args[3], list | tuple) else 2
    x, params = call.args[0], call.args[place]
    steps = x.shape[0] if place == 3 else x.numel() // max(x.shape[-1], 1)
    operands = tuple(
        Operand(f"params[{i}]", weight, steps * weight.numel() if weight.ndim > 1 else 0)
        for i, weight in enumerate(params)
    )
    return Product(operands, x)


def _cell(call: _Call) -> Product:
    x = call.get(0, "input")
    batch = x.shape[0] if x.ndim > 1 else 1
    weights = (("w_ih", call.get(2, "w_ih")), ("w_hh", call.get(3, "w_hh")))
    return Product(tuple(Operand(name, weight, batch * weight.numel()) for name, weight in weights), x)


_ATTENTION = (
    "query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn dropout_p "
    "out_proj_weight out_proj_bias training key_padding_mask need_weights attn_mask use_separate_proj_weight "
    "q_proj_weight k_proj_weight v_proj_weight"
).split()


def _attention(call: _Call) -> Product:
    values = {**dict(zip(_ATTENTION, call.args, strict=False)), **call.kwargs}
    query, key, value = values["query"], values["key"], values["value"]
    width = query.shape[-1]
    tokens = {name: values[name].numel() // max(values[name].shape[-1], 1) for name in ("query", "key", "value")}
    operands = [Operand("out_proj_weight", values["out_proj_weight"], tokens["query"] * width * width)]
    if values.get("use_separate_proj_weight"):
        for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
            weight = values[f"{short}_proj_weight"]
            operands.append(Operand(f"{short}_proj_weight", weight, tokens[name] * weight.numel()))
    else:
        macs = sum(tokens.values()) * width * width
        operands.append(Operand("in_proj_weight", values["in_proj_weight"], macs))
    length = key.shape[0]  # (L, N, E) or (L, E)
    scores = tokens["query"] * length * width
    return Product(tuple(operands), query, scores + tokens["query"] * value.shape[0] * width)


def _scaled_dot_product(call: _Call) -> Product:
    query, key, value = call.get(0, "query"), call.get(1, "key"), call.get(2, "value")
    pairs = query.numel() // max(query.shape[-1], 1) * key.shape[-2]
    return Product((), query, pairs * (query.shape[-1] + value.shape[-1]))


_HANDLERS: dict[str, Callable[[_Call], Product | None]] = {
    "linear": _linear,
    **{f"conv{n}d": _conv for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _conv_transpose for n in (1, 2, 3)},
    "matmul": _matmul(0, 1, ("input", "self", "tensor1"), ("other", "tensor2")),
    "mm": _matmul(0, 1, ("input", "self"), ("mat2",)),
    "bmm": _matmul(0, 1, ("input", "self"), ("mat2",)),
    "mv": _matmul(0, 1, ("input", "self"), ("vec",)),
    "dot": _matmul(0, 1, ("input", "self"), ("tensor", "other")),
    "inner": _matmul(0, 1, ("input", "self"), ("other",)),
    "addmm": _matmul(1, 2, ("mat1",), ("mat2",)),
    "addmv": _matmul(1, 2, ("mat",), ("vec",)),
    "baddbmm": _matmul(1, 2, ("batch1",), ("batch2",)),
    "addbmm": _matmul(1, 2, ("batch1",), ("batch2",)),
    "grouped_mm": _grouped,
    "_grouped_mm": _grouped,
    "tensordot": _tensordot,
    "einsum": _einsum,
    "bilinear": _bilinear,
    **{name: _recurrent for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    **{name: _cell for name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")},
    "multi_head_attention_forward": _attention,
    "scaled_dot_product_attention": _scaled_dot_product,
}

TWO_SIDED = frozenset(
    "matmul mm bmm mv dot inner addmm addmv baddbmm addbmm tensordot einsum grouped_mm _grouped_mm".split()
)
"""Products whose operands share the same multiply-accumulates."""

ZERO_MAC_OPS = frozenset(
    "add sub mul div truediv floordiv mod pow rsub neg where cat concat stack hstack vstack embedding embedding_bag "
    "layer_norm group_norm batch_norm instance_norm rms_norm native_layer_norm native_group_norm normalize prelu rrelu "
    "getitem setitem index_select index_put index_add index_copy gather scatter scatter_add take copy expand_as lerp "
    "clamp clip maximum minimum max min addcmul addcdiv masked_fill masked_scatter type_as to eq ne lt le gt ge "
    "broadcast_tensors expand view_as reshape_as isclose atan2 cross_entropy mse_loss dropout multiply subtract divide "
    "true_divide hypot sigmoid softmax complex polar logical_and logical_or and or xor meshgrid nll_loss".split()
)
"""Elementwise functions, norms, look-ups and moves: no multiply-accumulate of a weight by the convention used here."""
