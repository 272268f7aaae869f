"""Averaged copies of a model (EMA, SWA) over its resurrection phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fxsparse.nn import MaskedWeight, Mode, Resurrection, masked_weights
from fxsparse.training.distributed import unwrap


class Averages:
    """The averaged weights as they were when a phase began: no average takes theta in while it is trained."""

    def __init__(self) -> None:
        self._held: list[dict[str, Tensor]] = []

    @property
    def held(self) -> int:
        """How many copies are remembered."""
        return len(self._held)

    def hold(self, followers: Sequence[nn.Module]) -> None:
        """Remember the weights of all copies."""
        self._held = [
            {n: copy.dense(copy.weight.detach()).clone() for n, copy in masked_weights(unwrap(follower)).items()}
            for follower in followers
        ]

    def release(self) -> None:
        """Forget them."""
        self._held = []

    @torch.no_grad()
    def lead(
        self, followers: Sequence[nn.Module], weights: Mapping[str, MaskedWeight], before: Mapping[str, Tensor]
    ) -> None:
        """At a COMMIT: entries that were alive before take what was held, the others the value of the weight.

        A copy whose buffers were copied in the phase leaves it.

        Args:
            followers: The copies.
            weights: The model's own weights, after the COMMIT.
            before: Masks before the COMMIT, by name; empty at other updates.
        """
        for index, follower in enumerate(followers):
            for name, copy in masked_weights(unwrap(follower)).items():
                unit = Resurrection(copy)
                unit.follow_buffers()
                if unit.mode is Mode.RESU:
                    unit.discard()
                if name in before and index < len(self._held):
                    values = weights[name].dense(weights[name].weight.detach())
                    held = self._held[index][name].to(values)
                    copy.write_(torch.where(before[name], held, values))

    def state_dict(self) -> list[dict[str, Tensor]]:
        """What is held."""
        return [{name: each.clone() for name, each in held.items()} for held in self._held]

    def load_state_dict(self, state_dict: Sequence[Mapping[str, Tensor]]) -> None:
        """Set what is held."""
        self._held = [{name: each.clone() for name, each in held.items()} for held in state_dict]
