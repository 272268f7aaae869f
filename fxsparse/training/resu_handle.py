"""The life of RESU on one model: phases between the mask updates, in which the dead positions train."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim import LBFGS, Adagrad, Optimizer

from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import MaskedWeight, Mode, Resurrection, ThetaInit, masked_weights
from fxsparse.nn.resu import theta_start
from fxsparse.nn.select import keep_
from fxsparse.nn.slot import slots_of
from fxsparse.sparsity import generator
from fxsparse.sparsity.mask import Mask
from fxsparse.training.distributed import masks_digest, process_group, unwrap
from fxsparse.training.handle import Handle
from fxsparse.training.live_state import States
from fxsparse.training.optimizer_state import reset_state_, zero_state_
from fxsparse.training.records import UpdateRecord
from fxsparse.training.resu import RESU
from fxsparse.training.resu_averages import Averages
from fxsparse.training.resu_phases import Cycle, Phase
from fxsparse.training.resu_saved import PARTS as RESU_PARTS
from fxsparse.training.resu_saved import ResuState
from fxsparse.training.resu_steps import ThetaSteps
from fxsparse.training.resu_subset import trained_units
from fxsparse.training.resu_taps import GradientGate, InputTap
from fxsparse.training.resu_tournament import ResuRecord, ResuReport
from fxsparse.training.saved_state import PARTS, SavedState, sealed
from fxsparse.training.state import WeightState

Pause = Callable[[nn.Module, int], None]
MOVED = 0.1  # theta that moved less than this part of its start competes with the draw, not with what it learnt


class ResuHandle(Handle):
    """What `attach` returns for RESU: as `Handle`, with phases.

    In a RESU phase the weights stand open (`fxsparse.nn.Resurrection`): the forward reads theta at the dead positions,
    `fxsparse.masks` says what is alive, and edits of masks, folding and export are refused.
    """

    method: RESU
    _units: dict[str, Resurrection]
    _parts: ClassVar[frozenset[str]] = PARTS | RESU_PARTS

    def __init__(self, model: nn.Module, optimizer: Optimizer, method: RESU, total_steps: int | None) -> None:
        self._steps = ThetaSteps(method, optimizer, {})
        self._scales: dict[str, float] = {}
        self._revived: dict[str, Tensor] = {}
        self._resurrections: list[ResuRecord] = []
        self._averages = Averages()
        self._pauses: list[Pause] = []
        self._paused = False
        super().__init__(model, optimizer, method, total_steps)

    @property
    def phase(self) -> Phase:
        """The phase of the next optimizer step."""
        return self.method.timeline.phase(self.step + 1)[0]

    @property
    def cycle(self) -> int | None:
        """The cycle of the next optimizer step, from 0; None in the final training."""
        cycle = self.method.timeline.phase(self.step + 1)[1]
        return None if cycle is None else cycle.index

    def trainable(self) -> dict[str, Bool[Tensor, "*shape"]]:
        """T of every weight in a RESU phase: the dead positions that are trained; empty in other phases."""
        return {name: unit.trainable.clone() for name, unit in self._units.items() if unit.mode is Mode.RESU}

    def on_pause(self, callback: Pause) -> None:
        """Call `callback(model, cycle)` after the COMMIT of each cycle that the method's `pauses` lists.

        Masks are fixed then and the masked-gradient rule is in force: the callback may evaluate, save, and take steps
        of this optimizer, which do not count.
        """
        self._pauses.append(callback)

    def report(self) -> ResuReport:
        """As `Handle.report`, with what every COMMIT resurrected."""
        plain = super().report()
        return ResuReport(plain.rows, plain.weights, tuple(self._resurrections))

    def follow(self, average_model: nn.Module) -> None:
        """As `Handle.follow`; the average of a weight stands still in its RESU phase.

        Raises:
            ConfigError: its masked weights have other names or shapes.
        """
        awaited = self._averages.held > len(self._followers)  # by a loaded state
        for copy in masked_weights(unwrap(average_model)).values():
            Resurrection(copy)
        super().follow(average_model)
        if self.phase is Phase.RESU and not awaited:
            self._averages.hold(self._followers)

    def detach(self) -> None:
        """Stop. In a RESU phase theta is lost: the masks are those before the phase."""
        super().detach()
        for resurrection in self._units.values():
            if resurrection.mode is Mode.RESU:
                resurrection.discard()
            resurrection.remove()
        self._units = {}

    def withdraw(self) -> None:
        """As `Handle.withdraw`; buffers that the attach put into the model are taken off."""
        super().withdraw()
        for unit in self._installed:
            if unit.mode is not Mode.RESU:
                unit.remove()

    def _let_go(self) -> None:
        super()._let_go()
        self._gate.close()
        self._inputs.close()

    def state_dict(self) -> dict[str, Any]:
        """As `Handle.state_dict`, with the phase, theta's optimizer, and what the tournament and the report need."""
        return {
            **super().state_dict(),
            "phase": self.phase.value,
            "cycle": self.cycle,
            "theta": sealed(self._steps.state_dict()),
            "scales": sealed(self._scales),
            "revived": sealed(self._revived),
            "resurrections": [dataclasses.astuple(record) for record in self._resurrections],
            "averages": sealed(self._averages.state_dict()),
            "inputs": sealed(self._inputs.state_dict()),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As `Handle.load_state_dict`; averaged copies that followed the saved handle may follow before or afterwards.

        Raises:
            ConfigError: the state is of another method, another length of training, a part of it is missing or does
                not fit the model, or other averages follow. Nothing has changed then.
        """
        saved = SavedState.read(state_dict, self._parts, self.method, self._weights)
        own = ResuState.read(state_dict, self._weights)
        if self._followers and own.averages and len(own.averages) != len(self._followers):
            raise ConfigError(
                f"{len(own.averages)} averaged models followed the saved handle; call follow as often, before or after "
                "loading"
            )
        self._assign(saved)
        device = {name: weight.weight.device for name, weight in self._weights.items()}
        self._steps.load_state_dict(own.theta)
        self._scales, self._resurrections = dict(own.scales), list(own.resurrections)
        self._revived = {name: each.to(device[name], copy=True) for name, each in own.revived.items()}
        self._averages.load_state_dict(own.averages)
        self._inputs.load_state_dict({"seen": own.seen, "sums": own.sums}, process_group(self.model))
        self._clear()
        self._watch()
        self._follow_buffers()

    def __getstate__(self) -> dict[str, Any]:
        own = {"_units", "_installed", "_gate", "_inputs", "_steps", "_before"}
        kept = {key: value for key, value in super().__getstate__().items() if key not in own}
        return {**kept, "inputs": self._inputs.state_dict(), "theta": self._steps.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        inputs, theta = state.pop("inputs"), state.pop("theta")
        self._steps = ThetaSteps(state["method"], state["optimizer"], {})
        super().__setstate__(state)
        self._inputs.load_state_dict(inputs, process_group(self.model))
        self._steps.load_state_dict(theta)

    def _clear(self) -> None:
        super()._clear()
        self._steps.clear()
        self._before: dict[str, Tensor] = {}

    def _start(self, attached: bool = True) -> None:
        weights = masked_weights(unwrap(self.model))
        had = {name for name, weight in weights.items() if len(_companions(weight)) > 0}
        self._units = {name: Resurrection(weight) for name, weight in weights.items()} if attached else {}
        self._installed = [unit for name, unit in self._units.items() if name not in had]
        self._gate = GradientGate(self._units)
        self._steps = ThetaSteps(self.method, self.optimizer, self._units)
        self._inputs = InputTap(unwrap(self.model), weights, moments=self.method.refine is not None)
        super()._start(attached)

    def _watch(self) -> None:
        self._gate.close()
        resurrecting = self.attached and self.phase is Phase.RESU
        if resurrecting:
            self._gate.open(self.method.freeze_active)
        super()._watch()  # its hooks must run after the gate's, but for gradients that arrive reduced
        if resurrecting:
            self._gate.open_sharded(self.method.freeze_active, self._window)
        self._inputs.close()
        if self.attached and self.method.reads_inputs(self.step + 1):
            self._inputs.open()

    def _follow_buffers(self) -> None:
        for resurrection in self._units.values():
            resurrection.follow_buffers()

    def _check_loaded(self) -> None:
        if self._expected is not None:
            if self._averages.held not in (0, len(self._followers)):
                raise ConfigError(
                    f"{self._averages.held} averaged models followed the saved handle; call follow as often before the "
                    "next step"
                )
            self._follow_buffers()
            opened = any(unit.mode is Mode.RESU for unit in self._units.values())
            if opened and self.phase is not Phase.RESU:
                raise DataError("the model is in a RESU phase and the loaded handle is not; load states of one moment")
            if not opened and self._scales and self.phase is Phase.RESU:
                raise DataError(
                    "the loaded handle is in a RESU phase and the model is not; load its state_dict as well"
                )
            self._forget_frozen()
        super()._check_loaded()

    def _forget_frozen(self) -> None:
        """Drop what a loader that wants a state for every parameter made up where the saved optimizer had none."""
        phases = [self.method.timeline.phase(step)[0] for step in (self.step, self.step + 1)]
        if self.method.freeze_active and not self.method.keep_state and Phase.RESU in phases:
            for weight in self._weights.values():
                self._forget(weight.weight)

    # A step

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._paused:
            self._mask_gradients()
            return None
        return super()._before_step(optimizer, args, kwargs)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._paused:
            for weight in self._weights.values():
                weight.apply_()
                zero_state_(optimizer, weight.weight, ~weight.mask)
            return
        super()._after_step(optimizer, args, kwargs)

    @torch.no_grad()
    def _mask_gradients(self) -> None:
        for weight in self._weights.values():
            gradient = weight.weight.grad
            if gradient is not None and not gradient.is_sparse:
                keep_(gradient, weight.mask)

    @torch.no_grad()
    def _prepare(self) -> None:
        """In a RESU phase: take T * G from the gradients before they are masked, and hold what must not move."""
        resurrecting = self.phase is Phase.RESU
        if resurrecting:
            self._gradients = dict(self._steps.take())
            self._skipped = self._skipped or self._overflown()
            self._gradients = {}
        super()._prepare()
        if not resurrecting or self._skipped:
            return
        self._steps.hold()
        self._set_aside()

    def _set_aside(self) -> None:
        if self._skipped or self.phase is not Phase.RESU:
            super()._set_aside()
            return
        for parameter in self._steps.still():
            if parameter.grad is not None:
                self._aside.append((parameter, parameter.grad))
                parameter.grad = None

    def _look(self) -> None:
        if self.method.timeline.phase(self.step)[0] is Phase.RESU:
            self._steps.step()
        if self.method.reads_inputs(self.step):
            self._inputs.share(process_group(self.model))
        super()._look()
        for event, cycle in self.method.timeline.events(self.step):
            if event is Phase.RESU:
                self._enter(cycle)
            elif event is Phase.COMMIT:
                self._pause(cycle)

    # Phases

    def _enter(self, cycle: Cycle) -> None:
        """SPARSE -> RESU for every weight that has dead entries."""
        assert cycle.phase is not None
        self._scales, self._steps.states = {}, {}
        states = self._states()
        sparse = [state for state in states if not bool(state.mask.all())]
        dense, subset = cycle.committed == 0.0, self.method.subset
        chosen = {state.name: trained_units(subset, state, cycle.phase, dense=dense) for state in sparse}
        self._memory = {}
        if chosen and not any(bool(trainable.any()) for trainable in chosen.values()):
            warnings.warn(
                f"nothing to resurrect in cycle {cycle.index}: no weight has a dead unit that its pattern could revive "
                "(a full N:M group has none); RESU only prunes here",
                UserWarning,
                stacklevel=6,
            )
        self._averages.hold(self._followers)
        for state in states:
            weight = self._weights[state.name].weight
            if self.method.freeze_active and not self.method.keep_state:
                self._forget(weight)
            if state.name in chosen:
                self._scales[state.name] = self._units[state.name].enter(
                    self.method.init,
                    epsilon=self.method.epsilon,
                    trainable=chosen[state.name],
                    seed=self.method.seed,
                    tensor_index=state.index,
                    update_index=cycle.phase,
                )

    def _forget(self, weight: nn.Parameter) -> None:
        """Delete the optimizer's state of a weight; what an optimizer makes once and for all is set to zero."""
        if isinstance(self.optimizer, Adagrad | LBFGS):
            reset_state_(self.optimizer, weight, torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
        else:
            self.optimizer.state.pop(weight, None)

    def _states(self) -> States:
        """As in `Handle`, with what the phase knows: T, and the inputs that were seen."""
        seen = self._inputs.statistics() if self._inputs.seen and self._masks_due else {}
        states = {}
        for state in super()._states():
            trained = {"trained": self._units[state.name].trainable.clone()}
            statistics = seen.get(state.name, {})
            memory = {**state.memory, **trained, **statistics}
            states[state.name] = state.replaced(memory=memory, inputs=statistics.get("norm", state.inputs))
        return States(tuple(states), states.__getitem__)

    def _change(self, state: WeightState, mask: Tensor, row_order: Tensor | None = None) -> list[str]:
        unit = self._units[state.name]
        self._memory.pop(state.name, None)
        self._inputs.reset()
        if not any(event is Phase.COMMIT for event, _ in self.method.timeline.events(self.step)):
            return super()._change(state, mask, row_order)
        before = self._before[state.name] = state.mask.clone()
        cycle = self.method.timeline.phase(self.step)[1]
        assert cycle is not None
        revived = self._revived.get(state.name, torch.zeros_like(mask))
        start = self._start_of(state, cycle)
        self._records.append(UpdateRecord.of(self.step, state.name, Mask(before), Mask(mask)))
        self._resurrections.append(ResuRecord.of(state, cycle.index, mask, revived, start))
        self._revived[state.name] = state.memory["trained"] & mask
        if unit.mode is not Mode.RESU:
            return []
        unit.commit(mask)
        return reset_state_(self.optimizer, unit.weight.weight, before ^ mask)

    def _start_of(self, state: WeightState, cycle: Cycle) -> Tensor:
        """Theta as the phase began, drawn again."""
        if state.name not in self._scales or cycle.phase is None:
            return torch.zeros_like(state.weight)
        source = generator(self.method.seed, state.index, cycle.phase, "theta")
        scale, trained = self._scales[state.name], state.memory["trained"]
        return theta_start(self.method.init, scale, state.mask, trained, source).to(state.weight)

    def _update(self, states: States, masks: Any) -> None:
        super()._update(states, masks)
        committed = [cycle for event, cycle in self.method.timeline.events(self.step) if event is Phase.COMMIT]
        if not committed:
            return
        self._scales, self._steps.states = {}, {}
        self._averages.release()
        least = math.ulp(0.0) if self.method.init is ThetaInit.ZERO else MOVED  # no draw to compete with
        still = [r.name for r in self._resurrections if r.cycle == committed[0].index and r.movement < least]
        if still and self.method.theta.lr != 0.0:
            warnings.warn(
                f"theta hardly moved in cycle {committed[0].index} (mu < {least:.3g} in {', '.join(still)}): the "
                "tournament ranks how it was drawn, not what it learnt; raise theta's learning rate or lengthen the "
                "RESU phase",
                UserWarning,
                stacklevel=6,
            )

    def _lead(self) -> None:
        self._averages.lead(self._followers, self._weights, self._before)
        super()._lead()

    def _pause(self, cycle: Cycle) -> None:
        if cycle.index not in self.method.pauses:
            return
        if not self._pauses:
            warnings.warn(f"cycle {cycle.index} pauses and nobody listens; call on_pause", UserWarning, stacklevel=6)
        before, self._paused = masks_digest(self._masks()), True
        try:
            with torch.enable_grad():
                for callback in self._pauses:
                    callback(self.model, cycle.index)
        finally:
            self._paused = False
        dead = [
            name for name, each in self._weights.items() if bool(each.dense(each.weight.detach())[~each.mask].any())
        ]
        if dead or before != masks_digest(self._masks()):
            what = f"wrote dead entries of {', '.join(dead)}" if dead else "changed masks"
            raise DataError(f"the callback at the pause of cycle {cycle.index} {what}; it must leave both as they are")


def _companions(weight: MaskedWeight) -> tuple[str, ...]:
    module, attribute = weight.owners[0]
    return slots_of(module)[attribute].companions
