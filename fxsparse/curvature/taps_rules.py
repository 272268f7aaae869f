"""How each operator that reads a parameter is tapped.

1. linear, matmul, addmm and friends with a matrix: activations and output gradients.
2. Convolutions, plain and transposed, of any group count.
3. Norms; biases.
4. Embeddings.
5. Operators that broadcast, einsum, cat: the operand gets a copy of its own for each sample.
6. Recurrent layers: run step by step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.curvature.taps_conv import ConvSpec, same_padding
from fxsparse.curvature.taps_formulas import ConvWeight, EmbeddingWeight, LinearWeight, Spread, Summed
from fxsparse.curvature.taps_mode import Rule, TapMode
from fxsparse.curvature.taps_recurrent import RECURRENT


def _shape(*shapes: Any) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]  # untyped in torch


_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]


def _bound(names: tuple[str, ...], args: _Args, kwargs: _Kwargs) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _linear(mode: TapMode, name: str, func: Callable[..., Any], args: _Args, kwargs: _Kwargs) -> Any:
    given = _bound(("input", "weight", "bias"), args, kwargs)
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if mode.source(x) is not None or weight.ndim != 2 or x.ndim < 2:
        return NotImplemented
    if bias is not None and mode.source(bias) is None and bias.requires_grad:
        return NotImplemented
    y = func(x, mode.plain(weight), mode.plain(bias))
    held = x.detach()
    operands = [
        (mode.source(weight), LinearWeight(held, tuple(weight.shape))),
        (mode.source(bias), Summed(tuple(bias.shape) if bias is not None else (), (-1,))),
    ]
    return mode.tap("linear", y, operands, (held,))


def _matmul(mode: TapMode, name: str, func: Callable[..., Any], args: _Args, kwargs: _Kwargs) -> Any:
    given = _bound(
        ("input", "other"), args, {("other" if k in ("mat2", "tensor2") else k): v for k, v in kwargs.items()}
    )
    left, right = given["input"], given["other"]
    if getattr(func, "__name__", "") == "__rmatmul__":
        left, right = right, left
    source = mode.source(right)
    if mode.source(left) is None and source is not None and right.ndim == 2 and left.ndim >= 2:
        y = torch.matmul(left, source.plain)
        held = left.detach()
        return mode.tap("matmul", y, [(source, LinearWeight(held, tuple(right.shape), transposed=True))], (held,))
    return _spread_product(mode, left, right)


def _spread_product(mode: TapMode, left: Tensor, right: Tensor) -> Any:
    """A product whose operand has batch axes, or stands on the left: it is given the output's batch axes."""
    both = mode.source(left) is not None and mode.source(right) is not None
    if both or min(left.ndim, right.ndim) < 2:
        return NotImplemented
    source = mode.source(left) or mode.source(right)
    assert source is not None
    operand, other = (left, right) if mode.source(left) is not None else (right, left)
    output = (*_shape(left.shape[:-2], right.shape[:-2]), 1, 1)
    if other.ndim < 3:
        return NotImplemented
    copy = _copy(mode, "matmul", source, tuple(operand.shape), output, range(len(output) - 2))
    if copy is None:
        return NotImplemented
    return torch.matmul(copy, right) if operand is left else torch.matmul(left, copy)


def _addmm(mode: TapMode, name: str, func: Callable[..., Any], args: _Args, kwargs: _Kwargs) -> Any:
    given = _bound(("input", "mat1", "mat2"), args, kwargs)
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1 or "out" in given:
        return NotImplemented
    bias, x, weight = given["input"], given["mat1"], given["mat2"]
    if mode.source(x) is not None or x.ndim != 2 or bias.ndim != 1:
        return NotImplemented
    if mode.source(bias) is None and bias.requires_grad or mode.source(weight) is None and weight.requires_grad:
        return NotImplemented
    held = x.detach()
    operands = [
        (mode.source(weight), LinearWeight(held, tuple(weight.shape), transposed=True)),
        (mode.source(bias), Summed(tuple(bias.shape), (-1,))),
    ]
    return mode.tap("addmm", torch.addmm(mode.plain(bias), x, mode.plain(weight)), operands, (held,))


def _conv(mode: TapMode, name: str, func: Callable[..., Any], args: _Args, kwargs: _Kwargs) -> Any:
    transposed = "transpose" in name
    last = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    given = _bound(("input", "weight", "bias", "stride", "padding", *last), args, kwargs)
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if mode.source(x) is not None or weight.ndim < 3 or x.ndim != weight.ndim:
        return NotImplemented
    options = {key: given[key] for key in ("stride", "padding", *last) if key in given}
    y = func(x, mode.plain(weight), mode.plain(bias), **options)
    dims = weight.ndim - 2
    dilation = _each(given.get("dilation", 1), dims)
    held, padding = x.detach(), given.get("padding", 0)
    saved = (held,)
    if padding == "same":
        held, padding = same_padding(held, tuple(weight.shape[2:]), dilation)
    elif padding == "valid":
        padding = 0
    spec = ConvSpec(
        dims,
        _each(given.get("stride", 1), dims),
        _each(padding, dims),
        dilation,
        given.get("groups", 1),
        transposed,
        _each(given.get("output_padding", 0), dims) if transposed else (),
    )
    operands = [
        (mode.source(weight), ConvWeight(held, tuple(weight.shape), spec)),
        (mode.source(bias), Summed(tuple(bias.shape) if bias is not None else (), (1,))),
    ]
    return mode.tap(name, y, operands, saved)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * dims if len(values) == 1 else values


def _norm(
    normalise: Callable[..., Tensor],
    names: tuple[str, ...],
    trailing: bool,
    run: Callable[..., tuple[Tensor, Callable[[], Tensor]]] | None = None,
) -> Rule:
    """A norm: y = normalise(x) * weight + bias; `run` gives y and a cheaper way to normalise(x)."""

    def rule(mode: TapMode, name: str, func: Callable[..., Any], args: _Args, kwargs: _Kwargs) -> Any:
        given = _bound(names, args, kwargs)
        x, weight, bias = given["input"], given.get("weight"), given.get("bias")
        if mode.source(x) is not None:
            return NotImplemented
        plain = {key: mode.plain(value) for key, value in given.items()}
        own = weight if weight is not None else bias
        if own is None:
            return NotImplemented
        shape = tuple(own.shape)
        features = tuple(range(-len(shape), 0)) if trailing else (1,)
        held = x.detach()
        bare = {key: value for key, value in plain.items() if key not in ("input", "weight", "bias")}
        y, factor = (func(**plain), lambda: normalise(held, **bare)) if run is None else run(**plain)
        operands = [
            (mode.source(weight), Summed(shape, features, factor)),
            (mode.source(bias), Summed(shape, features)),
        ]
        return mode.tap(name, y, operands, (held,))

    return rule


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Callable[[], Tensor]]:
    y, mean, scale = torch.native_layer_norm(input, tuple(normalized_shape), weight, bias, eps)
    x, mean, scale = input.detach(), mean.detach(), scale.detach()
    return y, lambda: (x - mean).mul_(scale)


def _bare_batch_norm(x: Tensor, **given: Any) -> Tensor:
    return F.batch_norm(x, **{**given, "training": False})


def _batch_norm(mode: TapMode, name: str, func: Callable[..., Any], args: _Args, kwargs: _Kwargs) -> Any:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = _bound(names, args, kwargs)
    if (
        func is not F.batch_norm or given.get("training") or given.get("running_mean") is None
    ):  # torch's has other names
        return NotImplemented
    return _norm(_bare_batch_norm, names, trailing=False)(mode, name, func, (), given)


def _instance_norm(mode: TapMode, name: str, func: Callable[..., Any], args: _Args, kwargs: _Kwargs) -> Any:
    names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    given = _bound(names, args, kwargs)
    own = given.get("running_mean") is not None and given.get("use_input_stats", True)
    if func is not F.instance_norm or own:
        return NotImplemented
    return _norm(F.instance_norm, names, trailing=False)(mode, name, func, (), given)


def _prelu(mode: TapMode, name: str, func: Callable[..., Any], args: _Args, kwargs: _Kwargs) -> Any:
    given = _bound(("input", "weight"), args, kwargs)
    x, weight = given["input"], given["weight"]
    source = mode.source(weight)
    if source is None or mode.source(x) is not None or weight.ndim != 1 or x.ndim < 2:
        return NotImplemented
    held, shape = x.detach(), tuple(weight.shape)
    features = () if shape == (1,) else (1,)
    formula = Summed(shape, features, lambda: held.clamp_max(0))
    return mode.tap(name, func(x, source.plain), [(source, formula)], (held,))


def _embedding(mode: TapMode, name: str, func: Callable[..., Any], args: _Args, kwargs: _Kwargs) -> Any:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = _bound(names, args, kwargs)
    if func is not F.embedding or given.get("max_norm") is not None or given.get("scale_grad_by_freq"):
        return NotImplemented
    ids, weight = given["input"], given["weight"]
    padding = given.get("padding_idx")
    y = F.embedding(ids, mode.plain(weight), padding)
    return mode.tap(name, y, [(mode.source(weight), EmbeddingWeight(ids, tuple(weight.shape), padding))], (ids,))


def _copy(
    mode: TapMode, what: str, source: Any, shape: tuple[int, ...], output: tuple[int, ...], axes: range
) -> Tensor | None:
    """The operand's own copy along the samples' axis of the output, once that is known; along all axes before."""
    layout = mode.layout_of_next()
    if mode.layouts is not None and layout is None:
        mode.uncover([source], f"`{what}` reads it where the samples lie along no axis")
        mode.tap_leaf(what, source.plain, source, Spread(shape, len(shape), own=False))
        return source.plain  # type: ignore[no-any-return]  # a Source's tensor
    padded = (1,) * (len(output) - len(shape)) + shape
    if layout is None:
        full = tuple(output[a] if a in axes else size for a, size in enumerate(padded))
        own = False
    else:
        own = padded[layout.axis] != 1 and padded[layout.axis] == output[layout.axis] and len(shape) == len(output)
        full = tuple(output[a] if a == layout.axis else size for a, size in enumerate(padded))
        if not own and padded[layout.axis] != 1:
            mode.uncover([source], f"`{what}` reads it with positions along the axis of the samples")
    formula = Spread(shape, len(output), own)
    return mode.tap_leaf(what, source.plain.view(padded).expand(full), source, formula)


def _broadcast(mode: TapMode, name: str, func: Callable[..., Any], args: _Args, kwargs: _Kwargs) -> Any:
    """An operator that broadcasts its tensors against each other."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    output = _shape(*(tensor.shape for tensor in tensors))

    def own(value: Any) -> Any:
        source = mode.source(value)
        if source is None:
            return value
        return _copy(mode, name, source, tuple(value.shape), output, range(len(output)))

    return func(*map(own, args), **{key: own(value) for key, value in kwargs.items()})


def _joined(mode: TapMode, name: str, func: Callable[..., Any], args: _Args, kwargs: _Kwargs) -> Any:
    """`cat` and `stack`: the operand has the samples' axis itself."""
    given = _bound(("tensors", "dim"), args, kwargs)
    tensors = given.pop("tensors")

    def own(tensor: Tensor) -> Tensor:
        source = mode.source(tensor)
        if source is None:
            return tensor
        return mode.tap_leaf(name, source.plain, source, Spread(tuple(tensor.shape), tensor.ndim, own=True))

    return func([own(tensor) for tensor in tensors], **given)


def _einsum(mode: TapMode, name: str, func: Callable[..., Any], args: _Args, kwargs: _Kwargs) -> Any:
    """The operand gets the output's samples' letter."""
    equation = args[0] if args and isinstance(args[0], str) else None
    operands = list(args[1]) if len(args) == 2 and isinstance(args[1], (tuple, list)) else list(args[1:])
    if equation is None or "." in equation or "->" not in equation:
        return NotImplemented
    left, output = equation.replace(" ", "").split("->")
    terms = left.split(",")
    held = [k for k, operand in enumerate(operands) if mode.source(operand) is not None]
    sizes = {
        letter: size
        for term, x in zip(terms, operands, strict=True)
        for letter, size in zip(term, x.shape, strict=True)
    }
    own = [letter for letter in output if all(letter not in terms[k] for k in held)]
    if len(held) != 1 or not own:
        return NotImplemented
    k = held[0]
    source = mode.source(operands[k])
    assert source is not None
    layout = mode.layout_of_next()
    if mode.layouts is not None and layout is None:
        return NotImplemented
    letters = own if layout is None else own[layout.axis : layout.axis + 1]
    shape = tuple(operands[k].shape)
    lead = tuple(sizes[letter] if letter in letters else 1 for letter in own)
    copy = mode.tap_leaf(
        name, source.plain.view((1,) * len(own) + shape).expand(lead + shape), source, _Lead(shape, len(own))
    )
    chosen = copy if layout is None else copy.view(sizes[letters[0]], *shape)
    terms[k] = "".join(letters) + terms[k]
    operands[k] = chosen
    return torch.einsum(",".join(terms) + "->" + output, *operands)


class _Lead(Spread):
    """A `Spread` whose copies lie along one of the first axes."""

    def __init__(self, shape: tuple[int, ...], lead: int) -> None:
        super().__init__(shape, lead + len(shape), own=False)
        self.lead = lead

    def axes(self, output: tuple[int, ...]) -> range:
        return range(self.lead)


_BROADCAST = (
    "add sub mul div truediv true_divide rsub maximum minimum where pow addcmul lerp rdiv rpow multiply subtract divide"
)
_LINEAR_NORMS: dict[str, Rule] = {
    "layer_norm": _norm(F.layer_norm, ("input", "normalized_shape", "weight", "bias", "eps"), True, _layer_norm),
    "rms_norm": _norm(F.rms_norm, ("input", "normalized_shape", "weight", "eps"), True),
    "group_norm": _norm(F.group_norm, ("input", "num_groups", "weight", "bias", "eps"), False),
}

RULES: dict[str, Rule] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    "addmm": _addmm,
    **{f"conv{t}{d}d": _conv for t, d in itertools.product(("", "_transpose"), (1, 2, 3))},
    **_LINEAR_NORMS,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "prelu": _prelu,
    "embedding": _embedding,
    **dict.fromkeys(_BROADCAST.split(), _broadcast),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), _joined),
    "einsum": _einsum,
    **RECURRENT,
}
"""Operator name -> how it is tapped."""
