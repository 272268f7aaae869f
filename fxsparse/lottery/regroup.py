"""An unstructured sparse network brought into shared supports, step by step, with what each step costs."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.curvature.compensate import Compensation, CompensationReport, compensate
from fxsparse.errors import ConfigError
from fxsparse.nn import MaskedWeight, masked_weights
from fxsparse.nn.masked import row_order_name
from fxsparse.nn.slot import slots_of
from fxsparse.sparsity import Custom, Pattern, Pooling, SharedSupport, Target
from fxsparse.sparsity.shared_support import SupportUnits
from fxsparse.training import Initial, Static, attach
from fxsparse.training.initial import start_from
from fxsparse.training.loop import EpochRow, Task, TrainState, fit
from fxsparse.training.loop import evaluate as evaluate_samples
from fxsparse.training.loop import start_from as start_training
from fxsparse.training.regroup import new_row_order

Accuracy = Callable[[nn.Module], float]


class Projection(enum.Enum):
    """How an unstructured weight is brought into a pattern."""

    MAGNITUDE = "magnitude"
    """Groups of rows share the positions of the largest weights; values stay."""
    COMPENSATED = "compensated"
    """Groups share the positions whose loss changes the outputs least, and the weights there make it good."""


@dataclass(frozen=True)
class Stage:
    """One step of a regrouping.

    Attributes:
        name: What the network is: "unstructured", "magnitude", "compensated", "fine-tuned".
        accuracy: What was measured; NaN where nothing could be.
        sparsity: Dead fraction of the masked weights.
    """

    name: str
    accuracy: float
    sparsity: float


@dataclass(frozen=True)
class RegroupedLayer:
    """One weight of a `RegroupReport`.

    Attributes:
        name: The parameter's name.
        shape: Its shape.
        before: Density before.
        after: Density afterwards.
        kept: Part of the squared weights that stays where groups share positions by magnitude, in [0, 1]; 1 where the
            weight stays as it was.
        reason: Why it stays as it was; "" where it was regrouped.
    """

    name: str
    shape: tuple[int, ...]
    before: float
    after: float
    kept: float
    reason: str


@dataclass(frozen=True)
class RegroupReport:
    """What a regrouping cost; `str()` of it is a table.

    Attributes:
        pattern: The pattern.
        stages: What was measured, in order.
        layers: What became of each weight.
        compensation: The report of the solve, or None without one.
        projection: From which projection the fine-tuning went on.
    """

    pattern: str
    stages: tuple[Stage, ...]
    layers: tuple[RegroupedLayer, ...]
    compensation: CompensationReport | None
    projection: Projection

    def accuracy(self, name: str) -> float:
        """The accuracy of a stage.

        Raises:
            ConfigError: there is no such stage.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage.accuracy
        raise ConfigError(f"`name` (={name}) is none of the stages {', '.join(stage.name for stage in self.stages)}")

    def __str__(self) -> str:
        first = self.stages[0].accuracy
        lines = [f"{'stage':<13} accuracy  change    sparsity"]
        for stage in self.stages:
            change = "" if stage is self.stages[0] else f"{100 * (stage.accuracy - first):+.2f} %"
            lines.append(f"{stage.name:<13} {100 * stage.accuracy:6.2f} %  {change:<8}  {stage.sparsity:.4f}".rstrip())
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            what = layer.reason or f"{self.pattern}, {layer.kept:.1%} of the squared weights kept by magnitude"
            lines.append(f"  {layer.name}  {shape}  density {layer.before:.4f} -> {layer.after:.4f}  {what}")
        return "\n".join(lines)


def regroup(
    model: nn.Module,
    pattern: Pattern | None = None,
    calibration: Iterable[Any] = (),
    *,
    evaluate: Accuracy | None = None,
    finetune: Task | None = None,
    names: Iterable[str] | None = None,
    permute: bool = True,
    how: Compensation | None = None,
    seed: int = 0,
    progress: Callable[[str, EpochRow | None], None] | None = None,
) -> RegroupReport:
    """Bring the unstructured masks of a trained model into a pattern that runtimes are fast with, in place.

    Every weight keeps its own density. Rows are put into groups of similar rows (no row moves in memory: the order is
    kept beside the mask), the groups' shared positions are chosen, the weights there make good what is lost on the
    calibration data, and a short training heals the rest. Each stage is measured. Weights that the pattern brings
    nothing stay as they are: dense ones, and those with fewer rows than a group.

    Args:
        model: A model with masks, trained.
        pattern: The pattern; `SharedSupport(64)` by default.
        calibration: Batches for the compensation, as `compensate` takes them; none = magnitudes decide.
        evaluate: Model -> accuracy in [0, 1], called after each stage; by default that of the task's validation.
        finetune: The training after the projection: samples, optimizer, epochs; its `build` is not used. None = none.
        names: Weights to regroup; all masked ones by default.
        permute: Put similar rows into one group; False keeps the order of the rows.
        how: Settings of the compensation.
        seed: Order of the samples in the fine-tuning.
        progress: Told the name of each stage as it begins, and the epochs of the fine-tuning.

    Returns:
        The stages and what became of each weight.

    Raises:
        ConfigError: no masks, an unknown name, or no weight that the pattern fits.
        DataError: calibration data that cannot be used, or a training that diverged. The model is as it was then.
    """
    run = _Regrouping(model, SharedSupport(64) if pattern is None else pattern, names, permute)
    measure = evaluate or _accuracy_of(finetune)
    tell = progress or (lambda _name, _row: None)
    held = _Held(model)
    try:
        tell("unstructured", None)
        stages = [run.stage("unstructured", measure)]
        tell("magnitude", None)
        stages.append(run.by_magnitude(measure))
        batches, report = tuple(calibration), None
        if not batches:
            run.install()
        else:
            held.restore()
            tell("compensated", None)
            report = run.compensated(batches, how)
            stages.append(run.stage("compensated", measure))
        if finetune is not None:
            tell("fine-tuned", None)
            run.finetuned(finetune, seed, tell)
            stages.append(run.stage("fine-tuned", measure))
    except BaseException:
        held.restore()
        raise
    projection = Projection.MAGNITUDE if report is None else Projection.COMPENSATED
    return RegroupReport(str(run.pattern), tuple(stages), run.layers(), report, projection)


def _accuracy_of(task: Task | None) -> Accuracy:
    if task is None or task.validation is None:
        return lambda _: math.nan
    samples = task.validation
    return lambda model: evaluate_samples(model, samples, task).accuracy


class _Regrouping:
    """The steps; the model is changed in place."""

    def __init__(self, model: nn.Module, pattern: Pattern, names: Iterable[str] | None, permute: bool) -> None:
        self.model, self.pattern, self.permute = model, pattern, permute
        self.weights = masked_weights(model)
        if not self.weights:
            raise ConfigError(f"`model` (={type(model).__name__}) has no masks to regroup; prune it first")
        wanted = list(self.weights) if names is None else list(names)
        for name in wanted:
            if name not in self.weights:
                raise ConfigError(f"`{name}` is not a masked parameter; there are {', '.join(self.weights)}")
        self.reasons = {name: self._reason(name, name in wanted) for name in self.weights}
        self.chosen = {name: self.weights[name] for name, reason in self.reasons.items() if not reason}
        if not self.chosen:
            said = "; ".join(f"`{name}` {reason}" for name, reason in self.reasons.items())
            raise ConfigError(f"no weight can be brought into {pattern}: {said}")
        self.masks: dict[str, Tensor] = {}
        self.orders: dict[str, Tensor | None] = {}
        self.kept: dict[str, float] = {}
        self.density = {name: float(w.mask.double().mean()) for name, w in self.weights.items()}

    def _reason(self, name: str, wanted: bool) -> str:
        masked = self.weights[name]
        if not wanted:
            return "stays as it is: not among `names`"
        if bool(masked.mask.all()):
            return "stays dense"
        if not bool(masked.mask.any()):
            return "stays dead"
        shape, layout = tuple(masked.weight.shape), masked.spec.layout
        try:
            self.pattern.target(shape, layout, self._target(masked))
            rows = layout.matrix_shape(shape)[0] // layout.parts(shape)
        except ConfigError as error:
            return f"stays as it is: {error}"
        if isinstance(self.pattern, SharedSupport) and rows < self.pattern.group:
            return f"stays as it is: its {rows} rows are fewer than a group of {self.pattern.group}"
        return ""

    @staticmethod
    def _target(masked: MaskedWeight) -> Target:
        alive, numel = int(masked.mask.sum()), masked.mask.numel()
        return Target(1 - alive / numel, alive)

    @torch.no_grad()
    def by_magnitude(self, measure: Accuracy) -> Stage:
        """Choose masks by magnitude and measure; patterns stay until `install`."""
        for name, masked in self.chosen.items():
            layout, weight = masked.spec.layout, masked.weight.detach()
            target = self.pattern.target(tuple(weight.shape), layout, self._target(masked))
            units = self.pattern.units(tuple(weight.shape), layout, masked.row_order)
            order = masked.row_order
            if self.permute and isinstance(units, SupportUnits):
                found = new_row_order(units, weight.abs(), int(units.counts(target)[0]), Pooling.RMS)
                order = order if found is None else found
            mask = self.pattern.mask(weight.abs(), target, layout, Pooling.RMS, order)
            total = float(weight.double().square().sum())
            self.kept[name] = float((weight * mask).double().square().sum()) / total if total else 1.0
            self.masks[name], self.orders[name] = mask, order
            masked.weight.mul_(mask)
        return Stage("magnitude", float(measure(self.model)), self._sparsity(self.masks))

    def install(self) -> None:
        """Make the masks by magnitude those of the model."""
        start_from(self.chosen, self.masks, dict.fromkeys(self.chosen, self.pattern), self.orders)

    def compensated(self, batches: tuple[Any, ...], how: Compensation | None) -> CompensationReport:
        """Project by OBS costs and compensate."""
        shared = {name: 1 - density for name, density in self.density.items() if name in self.chosen}
        return compensate(
            self.model,
            batches,
            sparsity=0.0,
            pattern=self.pattern,
            distribution=Custom(shared),
            names=self.chosen,
            how=how or Compensation(permute=self.permute),
        )

    def finetuned(self, task: Task, seed: int, tell: Callable[[str, EpochRow | None], None]) -> None:
        """Train on with the masks as they are."""
        state = start_training(task, self.model, seed)
        method = Static(self._sparsity({}), initial=Initial.KEEP, seed=seed)
        handle = attach(self.model, state.optimizer, method)

        def show(_: TrainState, row: EpochRow) -> None:
            tell("fine-tuned", row)

        try:
            fit(state, task, on_epoch=show)
        finally:
            handle.detach()

    def _sparsity(self, instead: Mapping[str, Tensor]) -> float:
        """Dead fraction of all masked weights, some with other masks."""
        alive = sum(int(instead.get(name, masked.mask).sum()) for name, masked in self.weights.items())
        return 1 - alive / sum(masked.mask.numel() for masked in self.weights.values())

    def stage(self, name: str, measure: Accuracy) -> Stage:
        """Measure."""
        return Stage(name, float(measure(self.model)), self._sparsity({}))

    def layers(self) -> tuple[RegroupedLayer, ...]:
        """What became of each weight."""
        return tuple(
            RegroupedLayer(
                name,
                tuple(masked.weight.shape),
                self.density[name],
                float(masked.mask.double().mean()),
                self.kept.get(name, 1.0),
                self.reasons[name],
            )
            for name, masked in self.weights.items()
        )


class _Held:
    """The values, masks and patterns of a model, to go back to."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.weights = model, masked_weights(model)
        self.values = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}
        self.masks = {name: masked.mask.clone() for name, masked in self.weights.items()}
        self.patterns = {name: masked.spec.pattern for name, masked in self.weights.items()}
        self.orders = {name: masked.row_order for name, masked in self.weights.items()}
        self.orders = {name: None if order is None else order.clone() for name, order in self.orders.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Set everything back, in place."""
        for name, masked in self.weights.items():
            if self.orders[name] is None and masked.row_order is not None:
                for module, attribute in masked.owners:
                    delattr(module, row_order_name(attribute))
                    slot = slots_of(module)[attribute]
                    slot.spec = dataclasses.replace(slot.spec, row_order=None)
        start_from(self.weights, self.masks, self.patterns, self.orders)
        for name, tensor in _tensors(self.model).items():
            if name in self.values:
                tensor.copy_(self.values[name])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
