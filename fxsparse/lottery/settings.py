"""The settings of iterative magnitude pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fxsparse.errors import ConfigError
from fxsparse.lottery.counts import CountRule, Counts, FinalRound, Rate
from fxsparse.lottery.prune import Scope
from fxsparse.lottery.rewind import DataOrder, Rewind, RewindOptimizer, Step


@dataclass(frozen=True)
class IMP:
    """How tickets are searched for.

    Attributes:
        rate: fraction of the alive weights pruned in a round, as decimal text, in (0, 1).
        target: target sparsity, as decimal text, in (0, 1); hit to the weight.
        num_rounds: rounds at most; None for as many as the target needs. 1 with STRETCH is one-shot pruning.
        final_round: clip or stretch the last round.
        scope: one ranking over all weights, or one in each.
        rate_factors: by weight or layer name, layerwise only: its rate is rate * factor.
        min_alive: weights that every layer keeps at least.
        rewind: what a round restores.
        rewind_step: k, smaller than the length of a training; 0 for `Rewind.INIT`.
        rewind_optimizer: moments restored or fresh.
        data_order: the batches of round 0 again, or others in every round.
        layers: names or globs of layers or parameters that are pruned; None for all prunable ones.
        checkpoint_every: distance of the checkpoints inside a round; None for none.
        finetune_steps: steps of a round with `Rewind.NONE`; None for as many as a whole training.
    """

    rate: Rate = "0.2"
    target: Rate = "0.9"
    num_rounds: int | None = None
    final_round: FinalRound = FinalRound.CLIP
    scope: Scope = Scope.GLOBAL
    rate_factors: Mapping[str, Rate] = field(default_factory=dict)
    min_alive: int = 1
    rewind: Rewind = Rewind.INIT
    rewind_step: Step = field(default_factory=Step)
    rewind_optimizer: RewindOptimizer = RewindOptimizer.RESTORE
    data_order: DataOrder = DataOrder.REPLAY
    layers: tuple[str, ...] | None = None
    checkpoint_every: Step | None = None
    finetune_steps: int | None = None

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        CountRule(self.rate, self.target, self.num_rounds, self.final_round, self.rate_factors, self.min_alive)
        if self.rewind is Rewind.INIT and self.rewind_step != Step():
            raise ConfigError(f"`rewind_step` (={self.rewind_step}) must be 0it with rewind init; say `rewind: step`")
        if self.finetune_steps is not None and (self.rewind is not Rewind.NONE or self.finetune_steps < 1):
            raise ConfigError(f"`finetune_steps` (={self.finetune_steps}) must be at least 1 and needs `rewind: none`")
        if self.checkpoint_every == Step():
            raise ConfigError("`checkpoint_every` (=0it) must be at least one step, or null for no checkpoints")

    def counts(self, sizes: Mapping[str, int]) -> Counts:
        """The weights alive after each round, for weights of these sizes by name.

        Raises:
            ConfigError: see `CountRule.counts`.
        """
        factors = {}
        for name, factor in self.rate_factors.items():
            full = name if name in sizes else f"{name}.weight"
            factors[full if full in sizes else name] = factor
        rule = CountRule(self.rate, self.target, self.num_rounds, self.final_round, factors, self.min_alive)
        return rule.counts(sizes, layerwise=self.scope is Scope.LAYERWISE)

    def describe(self) -> dict[str, Any]:
        """The settings as plain values; rates as text."""
        return {
            "method": "imp",
            "saliency": "magnitude",
            "scope": self.scope.value,
            "rates": {
                "prune_rate_per_round": str(self.rate),
                "target_sparsity": str(self.target),
                "rate_factors": {name: str(factor) for name, factor in self.rate_factors.items()},
            },
            "num_rounds": self.num_rounds,
            "final_round": self.final_round.value,
            "min_alive_per_layer": self.min_alive,
            "layers": None if self.layers is None else list(self.layers),
            "rewind": {"policy": self.rewind.value, "step": str(self.rewind_step)},
            "rewind_optimizer": self.rewind_optimizer.value,
            "data_order": self.data_order.value,
            "finetune_steps": self.finetune_steps,
        }
