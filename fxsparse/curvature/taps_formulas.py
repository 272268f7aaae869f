"""Per-sample gradients of the weight of one operator call, from its inputs and output gradients.

Symbols: N samples, T positions of a sample, X [N, T, i] inputs, D [N, T, o] output gradients, G_n = D_n^T X_n.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from fxsparse.curvature.taps_conv import ConvSpec, patches, per_sample_weight
from fxsparse.curvature.taps_layout import Layout

_CHUNK = 1 << 19
_GRAM_CHUNK = 1 << 20
_BLOCK = 32  # positions that are enough for fast products


def gram_is_cheaper(positions: int, fan_in: int, fan_out: int) -> bool:
    """Whether T (i + o) is so much smaller than i o that the Gram form pays (Rochette et al., 2019, section 3)."""
    return positions * (fan_in + fan_out) < fan_in * fan_out


def wide(x: Tensor) -> Tensor:
    """At least single precision: squares of half precision vanish below 6e-8."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Formula(abc.ABC):
    """How the per-sample gradients of an operand arise at one call.

    Attributes:
        shape: of the operand.
    """

    shape: tuple[int, ...]

    @abc.abstractmethod
    def axes(self, output: tuple[int, ...]) -> Sequence[int]:
        """The axes of the output along which samples may lie."""

    @abc.abstractmethod
    def per_sample(self, delta: Tensor, layout: Layout, samples: int, first: int, last: int) -> Tensor:
        """G of the samples from `first` up to `last`, [last - first, *shape]."""

    def rows(self, delta: Tensor, layout: Layout, samples: int, mask: Tensor | None) -> Tensor | None:
        """Squares of G, summed over all axes but the first, [N, o]; None where G itself is as good."""
        return None

    def columns(self, delta: Tensor, layout: Layout, samples: int, mask: Tensor | None) -> Tensor | None:
        """The same, summed over all axes but the second, [N, i]."""
        return None

    def squares(self, delta: Tensor, layout: Layout, samples: int) -> Tensor | None:
        """The squares of G summed over samples, of the operand's shape; None as above."""
        return None

    def expanded(self) -> Formula | None:
        """The same with every position as a sample of its own; None where positions share more than the layer."""
        return None


def product_rows(x: Tensor, d: Tensor, mask: Tensor | None) -> Tensor:
    """Row norms |G_n[o, :]|^2 of G_n = D_n^T X_n, entries outside of `mask` [o, i] left out: [N, o].

    One position: D^2 |X|^2. Several: from the Gram matrix X X^T where T is small, else from G itself, in chunks.
    """
    n, t, i = x.shape
    o = d.shape[2]
    if t == 1:
        x2, d2 = x[:, 0].square(), d[:, 0].square()
        return d2 * (x2.sum(1, keepdim=True) if mask is None else x2 @ mask.to(x2.dtype).T)
    if mask is None and _triangle(t) * t * (i + o) < i * o:
        step = max(1, _GRAM_CHUNK // (t * max(i, o)))
        return _joined([gram_rows(x[k : k + step], d[k : k + step]) for k in range(0, n, step)])
    step = max(1, _CHUNK // max(i * o, 1))
    rows = [
        _row_norms(d[first : first + step].transpose(1, 2) @ x[first : first + step], mask)
        for first in range(0, n, step)
    ]
    return _joined(rows)


def gram_rows(x: Tensor, d: Tensor) -> Tensor:
    """d_o^T (X X^T) d_o for each column of D, [n, o]; of the blocks of X X^T, which is symmetric, half are made."""
    t = x.shape[1]
    total: Tensor | None = None
    for first in range(0, t, _BLOCK):
        last = min(first + _BLOCK, t)
        gram = x[:, first:last] @ x[:, first:].mT
        gram[:, :, _BLOCK:].mul_(2)
        rows = (gram @ d[:, first:]).mul_(d[:, first:last]).sum(1)
        total = rows if total is None else total.add_(rows)
    assert total is not None
    return total.clamp_min_(0)


def _triangle(positions: int) -> float:
    """Which fraction of X X^T is made."""
    blocks = -(-positions // _BLOCK)
    return (blocks + 1) / (2 * blocks)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def _row_norms(g: Tensor, mask: Tensor | None) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(g if mask is None else g * mask, dim=2)
    return norms.square()


class LinearWeight(Formula):
    """W [o, i] of y = x W^T, or W [i, o] of y = x W where `transposed`; samples and positions lie on leading axes."""

    def __init__(self, x: Tensor, shape: tuple[int, ...], transposed: bool = False, expand: bool = False) -> None:
        self.x, self.shape, self.transposed, self.expand = x, shape, transposed, expand

    @override
    def axes(self, output: tuple[int, ...]) -> Sequence[int]:
        return range(len(output) - 1)

    def _factors(self, delta: Tensor, layout: Layout, samples: int) -> tuple[Tensor, Tensor]:
        return wide(layout.rows(self.x, samples)), layout.rows(delta, samples)

    @override
    def per_sample(self, delta: Tensor, layout: Layout, samples: int, first: int, last: int) -> Tensor:
        x, d = wide(layout.rows(self.x, samples)[first:last]), layout.rows(delta, samples)[first:last]
        return x.transpose(1, 2) @ d if self.transposed else d.transpose(1, 2) @ x

    @override
    def rows(self, delta: Tensor, layout: Layout, samples: int, mask: Tensor | None) -> Tensor:
        x, d = self._factors(delta, layout, samples)
        left, right = (d, x) if self.transposed else (x, d)
        if self.expand:
            return (
                torch.einsum("nto,nt->no", right.square(), left.square().sum(2))
                if mask is None
                else torch.einsum("nto,nti,oi->no", right.square(), left.square(), mask.to(x.dtype))
            )
        return product_rows(left, right, mask)

    @override
    def columns(self, delta: Tensor, layout: Layout, samples: int, mask: Tensor | None) -> Tensor:
        other = LinearWeight(self.x, self.shape[::-1], not self.transposed, self.expand)
        return other.rows(delta, layout, samples, None if mask is None else mask.T)

    @override
    def squares(self, delta: Tensor, layout: Layout, samples: int) -> Tensor | None:
        x, d = self._factors(delta, layout, samples)
        if x.shape[1] > 1 and not self.expand:
            return None
        x2, d2 = x.flatten(0, 1).square(), d.flatten(0, 1).square()
        return x2.T @ d2 if self.transposed else d2.T @ x2

    @override
    def expanded(self) -> Formula:
        return LinearWeight(self.x, self.shape, self.transposed, True)


class ConvWeight(Formula):
    """The weight of a convolution; samples lie on axis 0."""

    def __init__(self, x: Tensor, shape: tuple[int, ...], spec: ConvSpec) -> None:
        self.x, self.shape, self.spec = x, shape, spec

    @override
    def axes(self, output: tuple[int, ...]) -> Sequence[int]:
        return (0,) if len(output) == self.spec.dims + 2 else ()

    @override
    def per_sample(self, delta: Tensor, layout: Layout, samples: int, first: int, last: int) -> Tensor:
        if self._as_linear():
            x, d = self._positions(delta, layout, samples)
            return (d[first:last].transpose(1, 2) @ x[first:last]).reshape(last - first, *self.shape)
        x, d = wide(layout.unfold(self.x, samples)[first:last]), layout.unfold(delta, samples)[first:last]
        k = x.shape[1]
        g = per_sample_weight(x.flatten(0, 1), d.flatten(0, 1), self.shape, self.spec)
        return g if k == 1 else g.reshape(last - first, k, *self.shape).sum(1)

    @override
    def rows(self, delta: Tensor, layout: Layout, samples: int, mask: Tensor | None) -> Tensor:
        flat = None if mask is None else mask.flatten(1)
        if self._as_linear():
            return product_rows(*self._positions(delta, layout, samples), flat)
        spec, t = self.spec, math.prod(delta.shape[2:])
        plain = spec.dims == 2 and spec.groups == 1 and not spec.transposed and self.x.shape[0] == samples
        if plain and mask is None and gram_is_cheaper(t, math.prod(self.shape[1:]), self.shape[0]):
            x = patches(wide(self.x), self.shape, spec).transpose(1, 2)
            return product_rows(x, delta.flatten(2).transpose(1, 2), None)
        step = max(1, _CHUNK // math.prod(self.shape))
        return torch.cat(
            [
                _row_norms(self.per_sample(delta, layout, samples, first, min(first + step, samples)).flatten(2), flat)
                for first in range(0, samples, step)
            ]
        )

    def _as_linear(self) -> bool:
        return self.spec.pointwise and all(k == 1 for k in self.shape[2:])

    def _positions(self, delta: Tensor, layout: Layout, samples: int) -> tuple[Tensor, Tensor]:
        def by_position(y: Tensor) -> Tensor:
            return layout.unfold(y.flatten(2), samples).transpose(2, 3).flatten(1, 2)

        return by_position(wide(self.x)), by_position(delta)


class Summed(Formula):
    """An operand whose gradient is a product like y, summed over all axes that it does not have: biases and norms.

    Args:
        shape: of the operand.
        features: the axes of y that the operand has, in order.
        factor: what the output gradient is multiplied with, like y; None for a bias.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        features: tuple[int, ...],
        factor: Callable[[], Tensor] | None = None,
        expand: bool = False,
    ) -> None:
        self.shape, self.features, self.factor, self.expand = shape, features, factor, expand

    @override
    def axes(self, output: tuple[int, ...]) -> Sequence[int]:
        kept = {axis % len(output) for axis in self.features}
        return [axis for axis in range(len(output)) if axis not in kept]

    def unsummed(self, delta: Tensor, layout: Layout, samples: int) -> Tensor:
        """[N, T, *shape]."""
        p = delta if self.factor is None else delta * wide(self.factor())
        ndim = p.ndim
        kept = [axis % ndim for axis in self.features]
        others = [axis for axis in range(ndim) if axis not in kept and axis != layout.axis]
        if p.shape[0] == samples and [layout.axis, *others, *kept] == list(range(ndim)):
            return p.reshape(samples, -1, *self.shape)
        p = Layout(0, layout.order).unfold(p.permute(layout.axis, *others, *kept), samples)
        return p.reshape(samples, -1, *self.shape)

    @override
    def per_sample(self, delta: Tensor, layout: Layout, samples: int, first: int, last: int) -> Tensor:
        p = self.unsummed(delta, layout, samples)[first:last]
        if p.ndim != 3 or p.shape[1] == 1:
            return p.sum(1)
        return (p.new_ones(1, 1, p.shape[1]).expand(len(p), -1, -1) @ p)[:, 0]  # faster than the sum

    @override
    def rows(self, delta: Tensor, layout: Layout, samples: int, mask: Tensor | None) -> Tensor | None:
        if not self.expand:
            return None
        p = self.unsummed(delta, layout, samples).square().sum(1)
        p = p if mask is None else p * mask
        return p.flatten(2).sum(2) if p.ndim > 2 else p

    @override
    def squares(self, delta: Tensor, layout: Layout, samples: int) -> Tensor | None:
        return self.unsummed(delta, layout, samples).square().sum((0, 1)) if self.expand else None

    @override
    def expanded(self) -> Formula:
        return Summed(self.shape, self.features, self.factor, True)


class EmbeddingWeight(Formula):
    """W [V, d] of y = W[ids]; the gradients of repeated tokens of a sample are added before they are squared."""

    def __init__(self, ids: Tensor, shape: tuple[int, ...], padding: int | None, expand: bool = False) -> None:
        self.ids, self.shape, self.padding, self.expand = ids, shape, padding, expand

    @override
    def axes(self, output: tuple[int, ...]) -> Sequence[int]:
        return range(len(output) - 1)

    def _tokens(self, delta: Tensor, layout: Layout, samples: int) -> tuple[Tensor, Tensor]:
        d = layout.rows(delta, samples)
        ids = layout.unfold(self.ids, samples).reshape(samples, -1)
        if self.padding is not None:
            d = d * (ids != self.padding % self.shape[0])[..., None]
        return ids, d

    @override
    def per_sample(self, delta: Tensor, layout: Layout, samples: int, first: int, last: int) -> Tensor:
        ids, d = self._tokens(delta, layout, samples)
        g = d.new_zeros((last - first, *self.shape))
        where = ids[first:last, :, None].expand(-1, -1, self.shape[1])
        return g.scatter_add_(1, where, d[first:last].contiguous())

    @override
    def rows(self, delta: Tensor, layout: Layout, samples: int, mask: Tensor | None) -> Tensor | None:
        if mask is not None:
            return None
        ids, d = self._tokens(delta, layout, samples)
        vocabulary = self.shape[0]
        result = d.new_zeros((samples, vocabulary))
        if self.expand:
            return result.scatter_add_(1, ids, d.square().sum(2))
        places = (ids + vocabulary * torch.arange(samples, device=ids.device)[:, None]).flatten()
        present, index = torch.unique(places, return_inverse=True)
        sums = d.new_zeros((len(present), self.shape[1])).index_add_(0, index, d.flatten(0, 1))
        result.view(-1)[present] = sums.square().sum(1)
        return result

    @override
    def expanded(self) -> Formula:
        return EmbeddingWeight(self.ids, self.shape, self.padding, True)


class Spread(Formula):
    """An operand of a broadcasting operator, which was given its own copy along the samples' axis of the output.

    Args:
        shape: of the operand.
        ndim: of its copy: the operand's axes are the last ones, those before it have length 1 or the samples'.
        own: whether the operand itself has the samples along that axis, so that sample n touches only part n.
    """

    def __init__(self, shape: tuple[int, ...], ndim: int, own: bool) -> None:
        self.shape, self.ndim, self.own = shape, ndim, own

    @override
    def axes(self, output: tuple[int, ...]) -> Sequence[int]:
        return range(len(output))

    @override
    def per_sample(self, delta: Tensor, layout: Layout, samples: int, first: int, last: int) -> Tensor:
        if self.own:
            return self._alone(delta, layout, samples, first, last)
        return layout.unfold(delta, samples)[first:last].sum(1).reshape(last - first, *self.shape)

    def _alone(self, delta: Tensor, layout: Layout, samples: int, first: int, last: int) -> Tensor:
        parts = torch.zeros((samples, *self.shape), dtype=delta.dtype, device=delta.device)
        numbers = layout.unfold(
            torch.arange(math.prod(self.shape), device=delta.device).view(self.shape), samples
        ).flatten(1)
        values = delta.reshape(self.shape).flatten()[numbers]
        parts.flatten(1).scatter_(1, numbers, values)
        return parts[first:last]
