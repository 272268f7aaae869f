"""Where the samples lie in one forward pass, shown by a few backward passes.

The gradient that reaches a site is linear in the cotangent. Where multiplying the random cotangent of each sample n by
a number s_n of its own multiplies what arrives at the place of sample n by s_n, no cotangent sends anything of another
sample there in this pass. The numbers are powers of two, which leave rounding as it is; sixteen of them tell samples
apart by the digits of n, one digit in each backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxsparse.curvature.taps_layout import Layout
from fxsparse.curvature.taps_pass import TapPass

_BASE = 16


@dataclass(frozen=True)
class Shown:
    """What a check has told of a site.

    Attributes:
        layouts: those that hold in this pass, in the order of the candidates.
        samples: how many samples reach the site.
    """

    layouts: list[Layout]
    samples: int


def checked(made: TapPass, candidates: Mapping[int, Sequence[Layout]]) -> dict[int, Shown]:
    """Of the layouts at some sites, by number, those that hold in this pass.

    Args:
        made: the pass; its graph is kept.
        candidates: layouts that fit, by number of a site whose edge was kept, or that has a leaf.
    """
    z, n = made.z, made.samples
    open_ = {number: list(layouts) for number, layouts in candidates.items() if layouts}
    if n == 1 or not open_ or not z.requires_grad:
        return {number: Shown(list(layouts), 0) for number, layouts in candidates.items()}
    cotangent = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
    first = _sketches(made, open_, cotangent)
    holding = {number: [True] * len(layouts) for number, layouts in open_.items()}
    digits = torch.arange(n, device=z.device)
    while bool(digits.any()):
        factors = torch.exp2((digits % _BASE - _BASE // 2).to(z.dtype))
        digits = digits // _BASE
        again = _sketches(made, open_, cotangent * factors.view(-1, *(1,) * (z.ndim - 1)))
        for number, kept in holding.items():
            for k, (one, two) in enumerate(zip(first[number], again[number], strict=True)):
                if one is not None and two is not None:
                    apart = (two / factors.to(two.dtype)[:, None] - one).abs().max()
                    kept[k] = kept[k] and bool(apart <= torch.finfo(one.dtype).eps ** 0.6 * one.abs().max())
    found = {number: Shown([], 0) for number in candidates}
    for number, kept in holding.items():
        left = [k for k, each in enumerate(kept) if each]
        reached = [int((one != 0).any(1).sum()) for k in left if (one := first[number][k]) is not None]
        found[number] = Shown([open_[number][k] for k in left], max(reached, default=0))
    return found


def _sketches(
    made: TapPass, candidates: Mapping[int, Sequence[Layout]], cotangent: Tensor
) -> dict[int, list[Tensor | None]]:
    """[N, k] for each layout: the gradient at each place, times a random vector; None where none arrives."""
    targets: list[Any] = [made.target(number) for number in candidates]
    deltas: tuple[Tensor | None, ...] = torch.autograd.grad(
        made.z, targets, cotangent, retain_graph=True, allow_unused=True
    )
    found: dict[int, list[Tensor | None]] = {}
    for (number, layouts), delta in zip(candidates.items(), deltas, strict=True):
        if delta is None:
            found[number] = [None] * len(layouts)
            continue
        delta = delta.detach().reshape(made.mode.sites[number].shape)
        found[number] = [_sketch(layout.unfold(delta, made.samples)) for layout in layouts]
    return found


def _sketch(delta: Tensor) -> Tensor:
    flat = delta.flatten(2) if delta.ndim > 2 else delta[:, :, None]
    return flat @ torch.randn(flat.shape[2], generator=torch.Generator().manual_seed(1)).to(flat)
