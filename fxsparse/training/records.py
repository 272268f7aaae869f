"""What mask updates did, as data and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from fxsparse.sparsity.mask import Mask


@dataclass(frozen=True)
class UpdateRecord:
    """One weight at one mask update.

    Attributes:
        step: Completed optimizer steps.
        name: Name of the weight.
        dropped: Elements that died.
        grown: Elements that came alive.
        alive: Elements alive afterwards.
        numel: Elements in all.
    """

    step: int
    name: str
    dropped: int
    grown: int
    alive: int
    numel: int

    @staticmethod
    def of(step: int, name: str, before: Mask, after: Mask) -> UpdateRecord:
        """The record of a change of masks."""
        return UpdateRecord(step, name, (before - after).alive, (after - before).alive, after.alive, after.numel)

    @property
    def density(self) -> float:
        """Alive fraction."""
        return self.alive / self.numel


@dataclass(frozen=True)
class Explored:
    """One weight that is or was sparse: how many of its elements were ever alive, the initial mask included."""

    name: str
    explored: int
    numel: int


class Coverage:
    """The union over time of every mask, for weights that were sparse at any time."""

    def __init__(self) -> None:
        self._ever: dict[str, tuple[Tensor, tuple[int, ...]]] = {}  # bits and shape
        self._begun = False

    def see(self, masks: Mapping[str, Bool[Tensor, "*shape"]]) -> None:
        """Add the masks of now; a weight that was dense until now has explored all of its elements."""
        for name, mask in masks.items():
            if name in self._ever:
                self._write(name, self.of(name, mask) | mask)
            elif not bool(mask.all()):
                self._write(name, torch.ones_like(mask) if self._begun else mask)
        self._begun = True

    def copy(self) -> Coverage:
        """The same, to go another way."""
        other = Coverage()
        other._ever, other._begun = dict(self._ever), self._begun
        return other

    def of(self, name: str, mask: Tensor) -> Bool[Tensor, "*shape"]:
        """Which elements of a weight were ever alive."""
        return self._read(name).to(mask.device) if name in self._ever else mask

    def rows(self) -> tuple[Explored, ...]:
        """One row per weight that is or was sparse."""
        every = {name: self._read(name) for name in self._ever}
        return tuple(Explored(name, int(ever.sum()), ever.numel()) for name, ever in every.items())

    def state_dict(self) -> dict[str, Tensor]:
        """The unions, by name."""
        return {name: self._read(name) for name in self._ever}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Set the unions."""
        self._ever = {}
        for name, ever in state_dict.items():
            self._write(name, ever)

    def _write(self, name: str, ever: Tensor) -> None:
        self._ever[name] = (Mask(ever).pack(), tuple(ever.shape))

    def _read(self, name: str) -> Tensor:
        return Mask.unpack(*self._ever[name]).tensor


@dataclass(frozen=True)
class UpdateReport:
    """All mask updates of a training; `print` shows one line per update over all weights.

    Attributes:
        rows: One record per update and weight, in order.
        weights: How much of each weight was ever alive; weights that were always dense are left out.
    """

    rows: tuple[UpdateRecord, ...]
    weights: tuple[Explored, ...] = ()

    @property
    def explored(self) -> float:
        """R_s in [0, 1]: the part of all weights that was ever alive (arXiv 2102.02887)."""
        numel = sum(weight.numel for weight in self.weights)
        return sum(weight.explored for weight in self.weights) / numel if numel else 1.0

    def updates(self) -> tuple[UpdateRecord, ...]:
        """The rows of each update summed over its weights, under the name "all"."""
        sums: dict[int, UpdateRecord] = {}
        for row in self.rows:
            sofar = sums.get(row.step, UpdateRecord(row.step, "all", 0, 0, 0, 0))
            sums[row.step] = UpdateRecord(
                row.step,
                "all",
                sofar.dropped + row.dropped,
                sofar.grown + row.grown,
                sofar.alive + row.alive,
                sofar.numel + row.numel,
            )
        return tuple(sums.values())

    def __iter__(self) -> Iterator[UpdateRecord]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        head = f"{'step':>8} {'dropped':>10} {'grown':>10} {'alive':>12} {'density':>9}"
        lines = [
            f"{row.step:>8} {row.dropped:>10} {row.grown:>10} {row.alive:>12} {row.density:>9.4f}"
            for row in self.updates()
        ]
        return "\n".join([head, *lines, f"explored (R_s) {self.explored:.4f}"])
