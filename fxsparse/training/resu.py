"""RESU: cycles of pruning, in which the dead weights are trained for a while and compete for revival."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import MaskedWeight, Resurrection, ThetaInit
from fxsparse.sparsity.counts import check_count, check_fraction, check_sparsity
from fxsparse.sparsity.n_by_m import NByM
from fxsparse.sparsity.pattern import Pattern
from fxsparse.sparsity.saliency import Magnitude, Saliency, Wanda
from fxsparse.sparsity.schedule import CubicSparsity, CustomSparsity, LinearSparsity, SparsitySchedule
from fxsparse.training.dsnot import DSNoT
from fxsparse.training.gmp import GMP
from fxsparse.training.handle import Handle
from fxsparse.training.resu_phases import Cycle, Lengths, Phase, Timeline, cycle_ends, prune_cycles
from fxsparse.training.resu_subset import AllDead, Subset, TopGradient
from fxsparse.training.resu_theta import Selective, ThetaAdamW, ThetaRule
from fxsparse.training.resu_tournament import reserved, tournament
from fxsparse.training.saved_state import check_tensor
from fxsparse.training.state import WeightState
from fxsparse.training.updater import Method

Schedule = type[SparsitySchedule] | tuple[float, ...]
_FROZEN: dict[str, Any] = {
    "cycles": 5,
    "rise": None,
    "lengths": Lengths(0.6, 0.1, 0.3),
    "final_fraction": 0.5,
    "subset": AllDead(),
    "init": ThetaInit.NORMAL,
    "freeze_active": True,
    "budget": (0.10, 0.02),
}


@dataclass(frozen=True)
class RESU(Method):
    """Resurrection of sparse units: TRAIN, PRUNE, STABILIZE, RESU, COMMIT over cycles, then a final training.

    In a RESU phase dead positions hold parameters theta, which are trained. COMMIT is a tournament of theta and the
    alive weights, in which a quota r is reserved for the resurrected (amnesty). PRUNE never revives, COMMIT keeps the
    count. By default the sparsity is reached in the third of eight cycles, theta starts at 0 in the dead positions
    with the largest gradient, the alive weights train beside it, and a final training has fixed masks: of the recipes
    in `benchmarks/resu_recipes.py` the one whose resurrection pays. `RESU.frozen()` freezes the alive weights instead
    and trains all dead positions; `RESU.source()` has the original's settings.

    All patterns: theta, quota and tournament are counted in the pattern's units, so a position of a `SharedSupport` is
    resurrected for all rows of its group. Under N:M only groups with a free place are trained: an exact N:M mask has
    none, so there RESU only prunes.

    Attributes:
        cycles: Number C of cycles.
        schedule: The sparsity of cycle c: a class of `SparsitySchedule`, at progress min(1, (c + 1) / R), or
            c / (C - 1) where `rise` is None; or the list itself.
        initial_sparsity: Where the schedule starts.
        rise: Number R of the cycle, from 1, that reaches the last sparsity under a schedule's class; later ones
            exchange there. At most C counts; None = the first cycle is at `initial_sparsity`, the last at `sparsity`.
        lengths: Shares of the phases in a cycle.
        cycle_steps: Steps of a cycle; None = the cycles share what the final training leaves.
        final_fraction: Fraction of all steps that the final training takes, where `cycle_steps` is None.
        theta: How theta is trained.
        subset: Which dead units are trained.
        init: How theta starts.
        epsilon: Its scale relative to the standard deviation of the alive weights.
        freeze_active: Whether alive weights stand still in a RESU phase, bit for bit.
        train_rest: Whether biases, norms and other parameters without masks train in a RESU phase.
        keep_state: Whether the optimizer's state of frozen weights is kept over a RESU phase, not deleted.
        prune: By what PRUNE keeps alive weights.
        score: By what the tournament ranks.
        budget: r of the first and of the last RESU phase, linear between them; of K places n(r, K) are reserved, in
            each group of a `SharedSupport`, where fewer than 1 / r positions reserve nothing.
        calibration: Last steps of a phase whose gradients or inputs PRUNE and the tournament read, where they do.
        refine: Equal-count swaps at PRUNE.
        pauses: Cycles after whose COMMIT the callbacks of `ResuHandle.on_pause` run.
        total_steps: Length of the training; attach sets it.
    """

    cycles: int = 8
    schedule: Schedule = CubicSparsity
    initial_sparsity: float = 0.0
    rise: int | None = 3
    lengths: Lengths = Lengths(0.8, 0.0, 0.2)
    cycle_steps: int | None = None
    final_fraction: float = 0.25
    theta: ThetaRule = ThetaAdamW()
    subset: Subset = TopGradient(0.2)
    init: ThetaInit = ThetaInit.ZERO
    epsilon: float = 0.1
    freeze_active: bool = False
    train_rest: bool = True
    keep_state: bool = False
    prune: Saliency = Magnitude()
    score: Saliency = Magnitude()
    budget: tuple[float, float] = (0.2, 0.02)
    calibration: int = 8
    refine: DSNoT | None = None
    pauses: tuple[int, ...] = ()
    total_steps: int | None = field(default=None, kw_only=True)

    any_start: ClassVar[bool] = True
    grows: ClassVar[bool] = False

    @classmethod
    def frozen(cls, sparsity: float, **options: Any) -> Self:
        """Alive weights stand still in RESU phases, all dead ones are trained from small draws; five cubic cycles.

        Args:
            sparsity: Of the last cycle.
            options: Other fields to set.
        """
        return cls(sparsity=sparsity, **{**_FROZEN, **options})

    @classmethod
    def source(cls, sparsity: float = 0.7, **options: Any) -> Self:
        """The original's settings: 5 cycles of 1000 steps, linear, selective SGD at 1e-4, pruning by Wanda, no final.

        Args:
            sparsity: Of the last cycle.
            options: Other fields to set.
        """
        preset: dict[str, Any] = {
            **_FROZEN,
            "schedule": LinearSparsity,
            "cycle_steps": 1000,
            "theta": Selective(),
            "prune": Wanda(),
        }
        return cls(sparsity=sparsity, **{**preset, **options})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.diversity is not None:
            raise ConfigError(f"`diversity` (={self.diversity}) must be None in RESU: its tournament ranks by `score`")
        check_sparsity(self.initial_sparsity, "initial_sparsity")
        for name in ("cycles", "calibration"):
            check_count(getattr(self, name), name, 1)
        if self.cycle_steps is not None:
            check_count(self.cycle_steps, "cycle_steps", 1)
        if self.rise is not None:
            check_count(self.rise, "rise", 1)
        check_fraction(self.final_fraction, "final_fraction")
        for value in self.budget:
            check_fraction(value, "budget")
        if not self.epsilon >= 0:
            raise ConfigError(f"`epsilon` (={self.epsilon}) must be at least 0")
        self._check_kinds()
        self._check_sparsities()
        for pause in self.pauses:
            if not 0 <= pause < self._cycle_count:
                raise ConfigError(f"`pauses` (={self.pauses}) must be cycles from 0 to {self._cycle_count - 1}")

    def _check_kinds(self) -> None:
        kinds: dict[str, type] = {"lengths": Lengths, "theta": ThetaRule, "subset": Subset, "init": ThetaInit}
        for name, kind in {**kinds, "prune": Saliency, "score": Saliency}.items():
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"`{name}` (={getattr(self, name)!r}) must be a {kind.__name__}")
        if not isinstance(self.refine, DSNoT | None):
            raise ConfigError(f"`refine` (={self.refine!r}) must be a DSNoT(), or None")

    def _check_sparsities(self) -> None:
        chosen = self.sparsities
        for value in chosen:
            check_sparsity(value, "schedule")
        if any(a > b + 1e-12 for a, b in zip((self.initial_sparsity, *chosen), chosen, strict=False)):
            raise ConfigError(
                f"`schedule` (={chosen}) from `initial_sparsity` (={self.initial_sparsity}) must not fall: PRUNE never "
                "revives; use Densify for falling sparsities"
            )
        if chosen[-1] != self.sparsity:
            raise ConfigError(f"`sparsity` (={self.sparsity}) must be the schedule's last (={chosen[-1]})")
        if isinstance(self.schedule, tuple) and len(self.schedule) != self.cycles:
            raise ConfigError(f"`schedule` (={self.schedule}) must list `cycles` (={self.cycles}) sparsities")

    @property
    def sparsities(self) -> tuple[float, ...]:
        """s_c of each cycle; under an exact N:M pattern every cycle that prunes has the pattern's own."""
        if isinstance(self.schedule, tuple):
            return self.schedule
        curve = self.schedule(self.initial_sparsity, self.sparsity, 0, 1)
        if self.rise is None:
            chosen = tuple(curve.at_cycle(cycle, self.cycles) for cycle in range(self.cycles))
        else:
            reached = min(self.rise, self.cycles)
            chosen = tuple(curve.at(min(1.0, (cycle + 1) / reached)) for cycle in range(self.cycles))
        if isinstance(self.pattern, NByM) and self.pattern.exact:
            return tuple(self.sparsity if value > 0 else 0.0 for value in chosen)
        return chosen

    @property
    def _cycle_count(self) -> int:
        return self.cycles

    def timed(self, total_steps: int | None) -> Self:
        """The method with the length of the training.

        Raises:
            ConfigError: the length is not known, or too short for the cycles.
        """
        timed = replace(self, total_steps=self.total_steps if total_steps is None else total_steps)
        assert timed.timeline
        return timed

    @cached_property
    def timeline(self) -> Timeline:
        """The phases in steps."""
        return self._made(cycle_ends(self._cycle_count, self.cycle_steps, self.final_fraction, self.total_steps))

    def _made(self, ends: tuple[int, ...]) -> Timeline:
        return prune_cycles(self.sparsities, self.lengths, ends)

    def handle(self, model: nn.Module, optimizer: Optimizer, total_steps: int | None) -> Handle:
        """A handle with phases."""
        from fxsparse.training.resu_handle import ResuHandle  # the handle drives methods, so it stands above them

        return ResuHandle(model, optimizer, self, total_steps)

    def install(self, weight: MaskedWeight) -> None:
        """The companions of the mask in a resurrection phase."""
        Resurrection(weight)

    def check(self, pattern: Pattern) -> None:
        """Every cycle's sparsity must be one that the pattern can have, and swaps need a row of their own."""
        for sparsity in self._every_sparsity():
            try:
                pattern.check_sparsity(sparsity)
            except ConfigError as error:
                raise ConfigError(
                    f"RESU passes through other sparsities unless the pattern is the method's own: {error}"
                ) from error
        if self.refine is not None:
            self.refine.check(pattern)

    def _every_sparsity(self) -> tuple[float, ...]:
        return (self.initial_sparsity, *self.sparsities)

    def initial_saliency(self) -> Saliency:
        """The saliency that goes on pruning, by magnitude where it needs data."""
        return Magnitude() if self.prune.needs_gradient or self.prune.needs_inputs else self.prune

    def sparsity_at(self, step: int) -> float:
        """The last cycle's that has begun to prune."""
        return self.timeline.sparsity(step, self.initial_sparsity)

    def update_due(self, step: int) -> bool:
        """At every PRUNE and COMMIT."""
        return any(event is not Phase.RESU for event, _ in self.timeline.events(step))

    @property
    def needs_gradient(self) -> bool:
        """Never for all weights: what reads gradients says so at its own steps."""
        return False

    def watches(self, step: int) -> bool:
        """At the last steps before an event that reads gradients."""
        return (
            (self.prune.needs_gradient and self.timeline.calibrates(step, self.calibration, Phase.PRUNE))
            or (self.score.needs_gradient and self.timeline.calibrates(step, self.calibration, Phase.COMMIT))
            or (self.subset.needs_gradient and any(event is Phase.RESU for event, _ in self.timeline.events(step)))
        )

    def reads_inputs(self, step: int) -> bool:
        """Whether the inputs of this step's forward passes are collected."""
        pruning = self.prune.needs_inputs or self.refine is not None
        return (pruning and self.timeline.calibrates(step, self.calibration, Phase.PRUNE)) or (
            self.score.needs_inputs and self.timeline.calibrates(step, self.calibration, Phase.COMMIT)
        )

    def remember(self, state: WeightState) -> Mapping[str, Tensor]:
        """The sum of G over the watched steps of a phase."""
        assert state.gradient is not None
        before = state.memory.get("gradient")
        gradient = state.gradient.clone() if before is None else before + state.gradient
        return {**state.memory, "gradient": gradient}

    def check_memory(
        self, step: int, memory: Mapping[str, Mapping[str, Tensor]], shapes: Mapping[str, torch.Size]
    ) -> None:
        """From the first watched step on there are sums until the phase ends, each of the shape of its weight."""
        summing = self.watches(step) and not self.timeline.events(step)
        if summing and not any("gradient" in each for each in memory.values()):
            raise ConfigError("`memory` of the state lacks the sums of gradients that RESU keeps; save it whole")
        for name, each in memory.items():
            for key, kept in each.items():
                check_tensor(f"memory[{name}][{key}]", kept, shapes[name])

    def regrouped(self, state: WeightState) -> WeightState:
        """Rows change their groups at PRUNE only: T is counted in the groups of its phase."""
        pruning = any(event is Phase.PRUNE for event, _ in self.timeline.events(state.step))
        return super().regrouped(state) if pruning else state

    def budget_at(self, phase: int) -> float:
        """r(j) = r0 - (r0 - r1) j / (J - 1) over the phases that there are; r0 if there is one."""
        first, last = self.budget
        phases = self.timeline.phases
        return first if phases <= 1 else first - (first - last) * phase / (phases - 1)

    def update(self, states: Sequence[WeightState]) -> dict[str, Bool[Tensor, "*shape"]]:
        """The masks after a PRUNE or a COMMIT; T stands in a state's memory as "trained".

        Raises:
            ConfigError: a weight cannot reach its target, or a saliency lacks its data.
            DataError: a score is NaN; the message names the weight.
        """
        masks: dict[str, Tensor] = {}
        seen = [replace(state, gradient=state.memory.get("gradient", state.gradient)) for state in states]
        for event, cycle in self.timeline.events(states[0].step if states else 0):
            if event is Phase.PRUNE:
                masks = self._pruned(seen)
            elif event is Phase.COMMIT:
                masks = self._committed(seen, cycle)
        return masks

    def _pruned(self, states: Sequence[WeightState]) -> dict[str, Tensor]:
        points = tuple((c.prune, c.sparsity) for c in self.timeline.cycles if c.sparsity is not None)
        pruner = GMP(
            sparsity=self.sparsity,
            pattern=self.pattern,
            distribution=self.distribution,
            seed=self.seed,
            drop=self.prune,
            schedule=CustomSparsity(points, self.initial_sparsity),
        )
        masks = pruner.update(states)
        if self.refine is None:
            return masks
        return {state.name: self.refine.refined(state, masks[state.name]) for state in states}

    def _committed(self, states: Sequence[WeightState], cycle: Cycle) -> dict[str, Tensor]:
        masks = {}
        for state in states:
            try:
                masks[state.name] = self._winners(state, cycle, states)
            except (ConfigError, DataError) as error:
                raise type(error)(f"tournament of `{state.name}` at step {state.step}: {error}") from error
        return masks

    def _winners(self, state: WeightState, cycle: Cycle, states: Sequence[WeightState]) -> Tensor:
        trained, scores = state.units.collect(state.memory["trained"]), state.scores(self.score)
        counts, quota = self._places(state, cycle, scores, trained, states)
        return state.units.spread(tournament(state.units, scores, state.alive, trained, counts, quota))

    def _places(
        self, state: WeightState, cycle: Cycle, scores: Tensor, trained: Tensor, states: Sequence[WeightState]
    ) -> tuple[Tensor, Tensor]:
        """(K, k_R) of every segment; COMMIT keeps what PRUNE left."""
        assert cycle.phase is not None
        counts = state.alive.sum(1)
        return counts, reserved(state.units, self.budget_at(cycle.phase), counts, scores, trained)
