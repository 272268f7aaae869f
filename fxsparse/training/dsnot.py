"""DSNoT: equal-count swaps after pruning that bring the outputs back, without training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_count
from fxsparse.sparsity.fan_in import ConstantFanIn
from fxsparse.sparsity.n_by_m import NByM
from fxsparse.sparsity.pattern import Pattern, Unstructured
from fxsparse.sparsity.units import Units
from fxsparse.training.state import WeightState


@dataclass(frozen=True)
class DSNoT:
    """Dynamic sparse no training (Zhang et al., arXiv 2310.08915), between the weights that a PRUNE keeps and takes.

    Pruning changes the expected output of row r by e_r = -sum over the pruned of w E[x]. Each swap brings back the
    pruned weight that reduces |e_r| most surely, the largest sign(e_r) w E[x] / Var[x], and gives up for it the
    least alive weight by |w| ||x|| among those whose loss moves e_r towards 0 as well. A row stops where |e_r| is at
    most `tolerance`, where a swap would make |e_r| larger, or where no such weights are left.

    The published method starts from a trained dense model and restores its weights; here the candidates are the
    weights that this PRUNE takes, with the values that they had. The counts of all rows stay, N:M swaps stay in their
    group.

    Attributes:
        swaps: Most swaps in a row.
        tolerance: |e_r| at which a row is done.
    """

    swaps: int = 50
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        check_count(self.swaps, "swaps", 1)
        if not self.tolerance >= 0:
            raise ConfigError(f"`tolerance` (={self.tolerance}) must be at least 0")

    def check(self, pattern: Pattern) -> None:
        """Raise ConfigError where single weights of a row cannot be swapped."""
        if not isinstance(pattern, Unstructured | NByM | ConstantFanIn):
            raise ConfigError(
                f"DSNoT swaps single weights of a row, which {pattern} moves together; leave `refine` out"
            )
        if isinstance(pattern, NByM) and not pattern.exact:
            raise ConfigError(f"DSNoT swaps within full groups of n; {pattern} has others: set `exact` to True")

    def refined(self, state: WeightState, mask: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """The mask after the swaps.

        Args:
            state: The weight before the PRUNE; its memory holds "norm", "mean" and "variance" of the inputs.
            mask: What the PRUNE keeps.

        Raises:
            ConfigError: the statistics of the inputs are missing.
        """
        missing = [name for name in ("norm", "mean", "variance") if name not in state.memory]
        if missing:
            raise ConfigError(
                f"DSNoT lacks {', '.join(missing)} of the inputs of `{state.name}`: no forward pass was seen"
            )
        rows = state.layout.to_rows(mask).flatten(1)
        taken = state.layout.to_rows(state.mask & ~mask).flatten(1)
        weight, norm, mean, variance = (
            state.layout.to_rows(each.double()).flatten(1)
            for each in (state.weight, *(state.memory[name] for name in ("norm", "mean", "variance")))
        )
        group = _groups(state.units, state.pattern, state)
        swapped = self._swapped(rows, taken, weight * mean, weight.abs() * norm, variance, group)
        shaped = swapped.reshape(state.layout.to_rows(mask).shape)
        return state.layout.from_rows(shaped, mask.shape)

    def _swapped(
        self,
        alive: Bool[Tensor, "rows width"],
        taken: Bool[Tensor, "rows width"],
        effect: Float[Tensor, "rows width"],
        saliency: Float[Tensor, "rows width"],
        variance: Float[Tensor, "rows width"],
        group: Tensor | None,
    ) -> Tensor:
        alive, taken = alive.clone(), taken.clone()
        every = torch.arange(len(alive), device=alive.device)
        error = -(effect * taken).sum(1)  # e_r
        for _ in range(self.swaps):
            sign = error.sign()[:, None]
            # back: error += effect, so the effect must have the opposite sign; out: error -= effect
            gain = torch.where(taken & (-sign * effect > 0), -sign * effect / (variance + 1e-12), -torch.inf)
            back = gain.argmax(1)
            near = alive if group is None else alive & (group == group.gather(1, back[:, None]))
            price = torch.where(near & (sign * effect > 0), saliency, torch.inf)
            out = price.argmin(1)
            after = error + effect[every, back] - effect[every, out]
            possible = gain[every, back].isfinite() & price[every, out].isfinite()
            do = possible & (error.abs() > self.tolerance) & (after.abs() < error.abs())
            if not bool(do.any()):
                break
            at, back, out = every[do], back[do], out[do]
            alive[at, back], alive[at, out] = True, False
            taken[at, back], taken[at, out] = False, True
            error = torch.where(do, after, error)
        return alive


def _groups(units: Units, pattern: Pattern, state: WeightState) -> Tensor | None:
    """The number of each element's N:M group, in rows; None where a row is one group."""
    if not isinstance(pattern, NByM) or units.segments == 1:
        return None
    segments = torch.arange(units.segments, device=state.mask.device)[:, None].expand(-1, units.width)
    return state.layout.to_rows(units.spread(segments)).flatten(1)
