"""Constants through products, norms, pooling and attention."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxsparse.graph.channels_flow import bound, op_of, shape_of, tensor_arguments
from fxsparse.passes.compact_known import Known, get, or_unknown

_BLOCK = 1 << 18


def blocks(tensor: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """Parts of a tensor along a dimension, none with more than 2^18 elements unless one index has them.

    What is made of a whole large weight, in float64, is large: freed between small results that stay, it would leave
    the memory of the process in pieces.
    """
    count = -(-tensor.numel() // _BLOCK)
    return tensor.chunk(max(1, min(count, tensor.shape[dim])), dim)


def linear(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    """A linear layer."""
    a = bound(node)
    x, weight, bias = (get(a[name], found) for name in ("input", "weight", "bias"))
    if weight is None or not weight.static:
        return None
    x = x or or_unknown(a["input"], found)
    return _affine(x, weight.stored, bias, shape_of(a["input"])[-1], isinstance(a["bias"], fx.Node))


def _affine(x: Known, weight: Tensor, bias: Known | None, size: int, biased: bool) -> Known | None:
    """X W^T + b along the last axis."""
    if biased and (bias is None or not bias.static):
        return None
    wide = (*x.value.shape[:-1], size)
    value = torch.where(x.known, x.value, 0.0).expand(wide)
    missing = (~x.known).expand(wide).double()
    parts = [(value @ rows.double().T, missing @ (rows != 0).double().T == 0) for rows in blocks(weight)]
    found, known = (torch.cat(each, -1) for each in zip(*parts, strict=True))
    return Known(found + (bias.value if bias is not None else 0.0), known)


def conv(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    """A convolution or transposed convolution of a value that is uniform over space."""
    a = bound(node)
    weight, bias = get(a["weight"], found), get(a["bias"], found)
    if weight is None or not weight.static or (isinstance(a["bias"], fx.Node) and bias is None):
        return None
    transposed = bool(a.get("transposed", "transpose" in op_of(node)))
    x, groups, spatial = or_unknown(a["input"], found), int(a["groups"]), weight.stored.ndim - 2
    if x.value.ndim != spatial + 2 or any(n != 1 for n in x.value.shape[2:]):
        return None
    known = x.known
    if pads(node) or transposed:  # the border sees fewer taps: only zeros stay constant
        known = x.zero
    taps = tuple(range(2, weight.stored.ndim))
    total = torch.cat([rows.sum(taps, dtype=torch.float64) for rows in blocks(weight.stored)])
    alive = torch.cat([(rows != 0).flatten(2).any(-1) for rows in blocks(weight.stored)])
    channels = shape_of(a["input"])[1]
    wide = (x.value.shape[0], channels)
    value = torch.where(known, x.value, 0.0).reshape(x.value.shape[:2]).expand(wide)
    missing = (~known).reshape(known.shape[:2]).expand(wide).double()
    out, lost = _grouped(value, total, groups, transposed), _grouped(missing, alive.double(), groups, transposed)
    if bias is not None:
        out = out + bias.value
    shape = (*out.shape, *(1 for _ in taps))
    return Known(out.reshape(shape), (lost == 0).reshape(shape))


def _grouped(x: Tensor, weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """(batch, in) times the weight (out, in / groups), or (in, out / groups) where transposed -> (batch, out)."""
    parts = x.reshape(x.shape[0], groups, -1)
    table = weight.reshape(groups, -1, weight.shape[1])
    equation = "ngi,gio->ngo" if transposed else "ngi,goi->ngo"
    return torch.einsum(equation, parts, table).reshape(x.shape[0], -1)


def pads(node: fx.Node) -> bool:
    """Whether a convolution pads with zeros."""
    padding = bound(node)["padding"]
    if isinstance(padding, str):
        return padding != "valid"
    return any(int(p) != 0 for p in (padding if isinstance(padding, list | tuple) else [padding]))


def batch_norm(node: fx.Node, found: Mapping[fx.Node, Known]) -> Any:
    """BatchNorm: by its statistics in eval mode; in train mode a constant becomes the bias."""
    a = bound(node)
    x = get(a["input"], found)
    held = {name: get(a[name], found) for name in ("weight", "bias", "running_mean", "running_var")}
    training = a.get("training", a.get("train", a.get("use_input_stats", False)))
    if x is None or any(known is None and isinstance(a[name], fx.Node) for name, known in held.items()):
        return None
    shape = (1, -1, *(1 for _ in range(x.value.ndim - 2)))
    weight, bias, mean, variance = (None if each is None else each.value.reshape(shape) for each in held.values())
    if training or mean is None or variance is None:
        value = torch.zeros_like(x.value)
    else:
        value = (x.value - mean) * (variance + a["eps"]).rsqrt() * (1.0 if weight is None else weight)
    value = value if bias is None else value + bias
    result = Known(value, x.known.expand(value.shape))
    return result if node.meta.get("shape") is not None else [result]


def layer_norm(node: fx.Node, found: Mapping[fx.Node, Known]) -> Any:
    """Features without a weight are their bias, whatever the norm is."""
    a = bound(node)
    weight, bias = get(a["weight"], found), get(a.get("bias"), found)
    if (
        weight is None
        or not weight.static
        or (isinstance(a.get("bias"), fx.Node) and (bias is None or not bias.static))
    ):
        return None
    dead = weight.stored == 0
    shape = (*(1 for _ in range(len(shape_of(a["input"])) - dead.ndim)), *dead.shape)
    value = torch.zeros(shape, dtype=torch.float64) if bias is None else bias.value.reshape(shape)
    result = Known(value, dead.reshape(shape))
    return result if node.meta.get("shape") is not None else [result]


def pooled(node: fx.Node, found: Mapping[fx.Node, Known]) -> Any:
    """Windows of a constant: averages with counted padding keep only zeros, all others keep the constant."""
    source = get(node.args[0], found)
    axes = int(re.findall(r"\d", op_of(node))[0])
    if source is None or any(n != 1 for n in source.value.shape[-axes:]):
        return None
    a, known = bound(node), source.known
    padding = a.get("padding") or 0
    padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
    if op_of(node).startswith("avg_pool") and (padded or a.get("ceil_mode") or a.get("divisor_override")):
        known = source.zero
    result = Known(source.value, known)
    return result if node.meta.get("shape") is not None else [result, None]


def resized(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    """Interpolation of a value that is uniform over space."""
    source = get(node.args[0], found)
    if source is None:
        return None
    uniform = all(n == 1 for n in source.value.shape[2:])
    return Known(source.value, source.known) if uniform else None


def reduced(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    """Sums and means over dimensions along which a value does not vary."""
    a, source = bound(node), get(node.args[0], found)
    if source is None:
        return None
    before = shape_of(node.args[0])  # type: ignore[arg-type]
    given = a.get("dim")
    axes = range(len(before)) if given in (None, []) else (given if isinstance(given, list | tuple) else [given])
    gone = sorted({int(axis) % len(before) for axis in axes})
    value, known = source.value, source.known
    for axis in gone:
        size = before[axis]
        if value.shape[axis] == 1:
            value = value * size if op_of(node) == "sum" else value
        else:
            known = known.all(axis, keepdim=True)
            value = value.sum(axis, keepdim=True) if op_of(node) == "sum" else value.mean(axis, keepdim=True)
    if not a.get("keepdim"):
        shape = [n for axis, n in enumerate(value.shape) if axis not in gone]
        value, known = value.reshape(shape), known.broadcast_to(value.shape).reshape(shape)
    return Known(value, known)


def matmul(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    """A product of two values."""
    arguments = tensor_arguments(node)[:2]
    if any(len(shape_of(argument)) < 2 for argument in arguments):
        return None
    left, right = (or_unknown(argument, found) for argument in arguments)
    return _product(left, right, shape_of(arguments[0])[-1])


def _product(a: Known, b: Known, inner: int) -> Known:
    """A @ b: an entry is known where each of its terms is, or has a factor that is known to be 0."""
    left, right = (*a.value.shape[:-1], inner), (*b.value.shape[:-2], inner, b.value.shape[-1])

    def wide(tensor: Tensor, shape: Sequence[int]) -> Tensor:
        return tensor.expand(shape).double()

    x, y = torch.where(a.known, a.value, 0.0), torch.where(b.known, b.value, 0.0)
    unsure = wide(~a.known, left) @ wide(~b.zero, right) + wide(~a.zero, left) @ wide(~b.known, right)
    return Known(wide(x, left) @ wide(y, right), unsure == 0)


def einsum(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    """A product of tensors: 0 wherever one of them is, whatever the summed indices are."""
    equation, operands = str(node.args[0]).replace(" ", ""), tensor_arguments(node)
    left, _, right = equation.partition("->")
    terms = left.split(",")
    if "->" not in equation or "." in equation or any(len(set(term)) != len(term) for term in terms):
        return None
    zero = torch.zeros((1,) * len(right), dtype=torch.bool)
    for term, operand in zip(terms, operands, strict=True):
        held = get(operand, found)
        if held is None:
            continue
        summed = [axis for axis, letter in enumerate(term) if letter not in right]
        own = held.zero.all(summed, keepdim=True) if summed else held.zero
        order = [term.index(letter) for letter in right if letter in term]
        sizes = {letter: own.shape[axis] for axis, letter in enumerate(term)}
        zero = zero | own.permute(order + summed).reshape([sizes.get(letter, 1) for letter in right])
    return Known(torch.zeros(zero.shape, dtype=torch.float64), zero)


def addmm(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    """A product of two values and a sum."""
    bias, a, b = tensor_arguments(node)[:3]
    held = bound(node)
    if held.get("alpha", 1) != 1 or held.get("beta", 1) != 1 or bias not in found:
        return None
    product = _product(or_unknown(a, found), or_unknown(b, found), shape_of(a)[-1])
    known = product.known & found[bias].known
    return Known(product.value + found[bias].value, known)


def attention(node: fx.Node, found: Mapping[fx.Node, Known]) -> Any:
    """Each output is a mean of values, so a channel in which all of them agree stays as it is."""
    a = bound(node)
    value = get(a["value"], found)
    if value is None or value.value.shape[-2] != 1 or float(a.get("dropout_p") or 0.0):
        return None
    known = value.known if a.get("attn_mask") is None else value.zero
    numbers = value.value
    if shape_of(a["query"])[-3:-2] != shape_of(a["value"])[-3:-2] and numbers.shape[-3] > 1:
        repeats = shape_of(a["query"])[-3] // shape_of(a["value"])[-3]
        numbers, known = numbers.repeat_interleave(repeats, -3), known.repeat_interleave(repeats, -3)
    result = Known(numbers, known)
    return result if node.meta.get("shape") is not None else [result]


def embedding(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    """Columns of an embedding in which all rows agree."""
    a = bound(node)
    weight = get(a["weight"], found)
    if weight is None:
        return None
    same = (weight.value == weight.value[:1]).all(0)
    shape = (*(1 for _ in shape_of(a["indices"])), -1)
    return Known(weight.value[0].reshape(shape), same.reshape(shape))


def glu(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    """A gated linear unit."""
    a, source = bound(node), get(node.args[0], found)
    if source is None:
        return None
    axis = int(a["dim"]) % source.value.ndim
    if source.value.shape[axis] == 1:
        return None
    value, gate = source.value.chunk(2, axis)
    known, gated = source.known.chunk(2, axis)
    zero = known & (value == 0)
    return Known(torch.where(zero, 0.0, value * gate.sigmoid()), (known & gated) | zero)


def prelu(node: fx.Node, found: Mapping[fx.Node, Known]) -> Known | None:
    """A parametric ReLU."""
    x, weight = (get(argument, found) for argument in node.args[:2])
    if x is None or weight is None:
        return None
    slope = weight.value.reshape(-1, *(1 for _ in range(x.value.ndim - 2))) if weight.value.ndim == 1 else weight.value
    value = torch.where(x.value >= 0, x.value, x.value * slope)
    return Known(value, x.known.expand(value.shape))
