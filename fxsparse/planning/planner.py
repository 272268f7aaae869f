"""What a transform would do to every weight of a model, and doing it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from fxsparse.errors import ConfigError, PassError
from fxsparse.graph import Capture, Refusal, capture, isolated_clone, structural_clone
from fxsparse.graph.taps import without_taps
from fxsparse.graph.tree import parameters_of
from fxsparse.nn import Guard, MaskSpec, Route, masked_weights, set_masks, tie_masks
from fxsparse.passes import (
    FoldMasks,
    InsertMasks,
    MaskEffective,
    MaskParameters,
    Pipeline,
    PipelineResult,
    SwapModules,
    Verify,
)
from fxsparse.passes.spec_pass import SpecPass
from fxsparse.passes.structure import check_same_state
from fxsparse.planning.checks import check_model, check_options, check_values, quantised_parts
from fxsparse.planning.choose import choose
from fxsparse.planning.equality import Equality, release_masks
from fxsparse.planning.routing import Weight, describe_weights
from fxsparse.planning.select import Selector
from fxsparse.planning.table import format_table
from fxsparse.planning.weight_plan import HEADER, RECORD, ROUTES, WeightPlan
from fxsparse.sparsity import (
    ConstantFanIn,
    Distribution,
    Layout,
    Magnitude,
    Pattern,
    SharedSupport,
    Target,
    Uniform,
    Unstructured,
    WeightSpec,
    check_sparsity,
)

UNSTRUCTURED: Pattern = Unstructured()
UNIFORM: Distribution = Uniform()


@dataclass(frozen=True, eq=False)
class Plan:
    """The whole transform of a model, decided but not done.

    Attributes:
        weights: Every parameter of at least two axes, and whatever else was asked for, in the order of
            `named_parameters`.
        refusals: What stays Python instead of a graph, and why.
        sparsity: The global dead fraction asked for.
        captured: The model as captured; it shares all tensors with the model that was planned.
        example_inputs: The example inputs, or None.
        notes: What could not be compared on the example inputs, and why.
        specialised: To what the graph is specialised, in words; None when it holds for every input.
    """

    weights: tuple[WeightPlan, ...]
    refusals: tuple[Refusal, ...]
    sparsity: float
    captured: nn.Module = field(repr=False)
    origin: nn.Module = field(repr=False)
    example_inputs: Any = field(default=None, repr=False)
    notes: tuple[str, ...] = ()
    specialised: str | None = None

    @property
    def masked(self) -> tuple[WeightPlan, ...]:
        """The weights that get a mask."""
        return tuple(weight for weight in self.weights if weight.route is not None)

    def pipeline(self, stop_after: str | None = None) -> Pipeline:
        """The passes that carry the plan out; masks are all True after them."""
        return Pipeline(self._passes(), stop_after)

    def _passes(self) -> list[SpecPass]:
        by_route = {route: self._specs(route) for route in Route}
        guarded = {
            name: spec
            for route in (Route.MODULE, Route.MASK_NODE)
            for name, spec in by_route[route].items()
            if spec.guard is Guard.GRADIENT
        }
        return [
            SwapModules(_unguarded(by_route[Route.MODULE])),
            InsertMasks(_unguarded(by_route[Route.MASK_NODE])),
            MaskEffective(by_route[Route.EFFECTIVE]),
            MaskParameters({**guarded, **by_route[Route.PARAMETER]}),
        ]

    def _specs(self, route: Route) -> dict[str, MaskSpec]:
        named = ((name, spec) for weight in self.masked for name, spec in weight.specs.items())
        return {name: spec for name, spec in named if spec.route is route}

    def stages(self, stop_after: str | None = None) -> PipelineResult:
        """Run the passes, and `fold_masks` behind them, on a copy and keep every stage, for looking at.

        Args:
            stop_after: Name of the last pass to run; all run by default.

        Raises:
            ConfigError: no pass has the name `stop_after`.
        """
        pipeline = Pipeline([*self.pipeline().passes, FoldMasks()], stop_after)
        return pipeline(isolated_clone(self.captured))

    def apply(self, inplace: bool = False, verify: Verify = Verify.QUICK) -> nn.Module:
        """Carry the plan out.

        Args:
            inplace: The result shares parameters and buffers with the planned model (an optimizer of it stays valid,
                and its dead weights become zero); else it has copies and the planned model stays as it was.
            verify: How the result is compared with the planned model on the example inputs, while all masks are True.

        Returns:
            The sparse model: the same parameter names, masks inside.

        Raises:
            PassError: a rewrite broke its contract.
        """
        return self.carry_out(inplace, Equality(self.origin, self.example_inputs, verify))

    def carry_out(self, inplace: bool, equality: Equality, *, consume: bool = False) -> nn.Module:
        """`apply` with a comparison that is prepared already.

        Args:
            inplace: as in `apply`.
            equality: the comparison.
            consume: whether to edit the captured module itself, with which the plan is used up. Else an error names
                the pass that broke its contract, which runs the passes once more.

        Raises:
            PassError: a rewrite broke its contract.
        """
        if consume:
            result = self.captured
        else:
            names = [name for name, _ in parameters_of(self.origin)]
            result = structural_clone(self.captured) if inplace else isolated_clone(self.captured, copied=names)
        try:
            for each in self._passes():
                if each.targets:
                    each.rewrite(result)
            tie_masks(result)
            check_same_state(self.origin if consume else self.captured, result)
            equality.check(result)
        except PassError as error:
            release_masks(result)
            if not consume:
                self.pipeline()(isolated_clone(self.captured), self.example_inputs)  # the pass that broke it raises
            raise PassError(f"transform: {error}") from error
        set_masks(result, self._initial_masks(result))
        result.__dict__[RECORD] = self.weights
        return result

    def _initial_masks(self, model: nn.Module) -> dict[str, Tensor]:
        """Magnitude masks with the planned counts."""
        masks = {}
        saliency = Magnitude()
        weights = masked_weights(model)
        for plan in self.masked:
            assert plan.pattern is not None and plan.target is not None
            if plan.target.alive == plan.numel or plan.target.sparsity == 0.0:
                continue
            score = saliency.score(weights[plan.name].weight.detach())
            masks[plan.name] = plan.pattern.mask(score, plan.target, plan.layout or Layout(), saliency.pooling)
        return masks

    def __str__(self) -> str:
        lines = [format_table(HEADER, [weight.row for weight in self.weights]), ""]
        total, alive = sum(w.numel for w in self.masked), sum(w.target.alive for w in self.masked if w.target)
        everything = sum(weight.numel for weight in self.weights)
        share = f"; they hold {total / everything:.0%} of all weight elements" if total < everything else ""
        counts = f"{len(self.masked)} of {len(self.weights)} weights masked"
        lines.append(f"{counts}; {alive} of {total} elements alive in them{share}")
        lines += [self.specialised] if self.specialised else []
        lines += _summed(self.refusals)
        lines += [f"not compared: {note}" for note in self.notes]
        return "\n".join(lines)


def _summed(refusals: Sequence[Refusal]) -> list[str]:
    """One line a reason: modules that stay Python for the same one stand together."""
    alike: dict[tuple[str, str], list[str]] = {}
    for refusal in refusals:
        alike.setdefault((refusal.reason, refusal.mend), []).append(refusal.path)
    lines = []
    for (reason, mend), paths in alike.items():
        if len(paths) <= 2:
            lines += [str(Refusal(path, reason, mend)) for path in paths]
        else:
            first, second = (f"`{path or 'the model'}`" for path in paths[:2])
            lines.append(f"{first}, {second} and {len(paths) - 2} more stay Python: {reason}; {mend}")
    return lines


def _unguarded(specs: Mapping[str, MaskSpec]) -> dict[str, MaskSpec]:
    return {name: replace(spec, guard=Guard.FORWARD) for name, spec in specs.items()}


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    sparsity: float = 0.0,
    pattern: Pattern = UNSTRUCTURED,
    distribution: Distribution = UNIFORM,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    fisher: object = None,
    specialize: bool = False,
) -> Plan:
    """Decide for every weight whether and how it is masked; the model stays as it is.

    Sparsified by default: weights of linear and (transposed) convolution layers, attention projections, and parameters
    of at least two axes that linear, convolution or matrix-product functions use. Not sparsified unless asked for:
    biases, norms, embeddings, recurrent weights, depthwise convolutions. Initial masks keep the largest magnitudes.

    Args:
        model: Any module.
        example_inputs: A tuple of positional inputs, or (args, kwargs). One run on them tells every use of every
            weight; without them only module types and what can be traced without running is known.
        sparsity: Dead fraction in [0, 1).
        pattern: Which masks are legal.
        distribution: How the sparsity is shared among the weights.
        include: What to mask instead of the default: parameter names, module paths, globs over either, module types, or
            functions of (name, parameter, module). A parameter of fewer than two axes must be named in full.
        exclude: What to leave out, written in the same ways.
        fisher: Fisher information to score by; not available in this version.
        specialize: Let a model that no generic graph can hold become one graph for inputs like the example's, so that
            weights in functional calls get mask nodes; other inputs then raise CaptureError (see
            `fxsparse.graph.capture`). Where that cannot be done the plan's refusals say why.

    Raises:
        ConfigError: an option out of range, a selector that names nothing, a wrapped or already masked model, no weight
            to mask, a weight that was asked for and cannot be masked, a pattern that does not fit a weight.
        CaptureError: a scripted model, or one that cannot be copied.
        DataError: a chosen weight holds NaN or infinity.
    """
    return decide(
        model, example_inputs, Options(sparsity, pattern, distribution, include, exclude, fisher, specialize)
    )[0]


@dataclass(frozen=True)
class Options:
    """The keyword arguments of `plan`."""

    sparsity: float
    pattern: Pattern
    distribution: Distribution
    include: Selector | Iterable[Selector] | None
    exclude: Selector | Iterable[Selector] | None
    fisher: object
    specialize: bool = False


def decide(
    model: nn.Module,
    example_inputs: Any,
    options: Options,
    *,
    compare: bool = True,
    known: Capture | None = None,
    copied: bool = False,
) -> tuple[Plan, Capture]:
    """`plan`, with the capture that it rests on; `compare`, `known` and `copied` are those of `capture`.

    Raises:
        ConfigError, CaptureError, DataError: as `plan`.
    """
    sparsity, pattern = options.sparsity, options.pattern
    model = without_taps(model)
    check_sparsity(sparsity)
    check_options(pattern, options.distribution, options.fisher)
    check_model(model)
    special = options.specialize
    captured = capture(model, example_inputs, compare=compare, specialize=special, known=known, copied=copied)
    weights = describe_weights(model, captured)
    chosen = choose(model, weights, options.include, options.exclude)
    check_values([weight for weight in weights if weight.name in chosen], sparsity)
    targets = _targets(weights, chosen, sparsity, pattern, options.distribution)
    plans = tuple(_planned(weight, chosen, pattern, targets) for weight in weights if _shown(weight, chosen))
    refusals = (*captured.refusals, *quantised_parts(model))
    notes = () if captured.reference is None else captured.reference.notes
    done = Plan(plans, refusals, float(sparsity), captured.module, model, example_inputs, notes, captured.specialised)
    return done, captured


def _targets(
    weights: Sequence[Weight], chosen: Mapping[str, str], sparsity: float, pattern: Pattern, distribution: Distribution
) -> dict[str, Target]:
    specs, scores = [], {}
    for weight in weights:
        if weight.name not in chosen:
            continue
        layout = weight.layout
        if layout is None:
            if isinstance(pattern, ConstantFanIn | SharedSupport):
                raise ConfigError(
                    f"`pattern` (={pattern}) needs outputs and inputs of `{weight.name}` {weight.shape}, whose uses do "
                    "not tell them; use Unstructured() or exclude it"
                )
            layout = Layout()
        specs.append(WeightSpec(weight.name, weight.shape, layout, pattern))
        if sparsity > 0:
            scores[weight.name] = Magnitude().score(weight.parameter.detach())
    try:
        return distribution.targets(specs, sparsity, scores)
    except ConfigError as error:
        hint = "; or leave the weight out with `exclude`" if str(error).startswith("weight `") else ""
        raise ConfigError(f"{error}{hint}") from error


def _shown(weight: Weight, chosen: Mapping[str, str]) -> bool:
    return weight.name in chosen or len(weight.shape) >= 2


def _planned(weight: Weight, chosen: Mapping[str, str], pattern: Pattern, targets: Mapping[str, Target]) -> WeightPlan:
    if weight.name not in chosen:
        reason = weight.refusal or ("left out by include or exclude" if weight.default else weight.reason)
        left = WeightPlan(weight.name, weight.shape, None, None, weight.layout, None, None, weight.uses, reason)
        return replace(left, refused=weight.refusal is not None)
    layout = weight.layout or Layout()
    specs = {name: MaskSpec(pattern, layout, route, guard) for name, (route, guard) in weight.routes.items()}
    first = min(specs.values(), key=lambda spec: ROUTES.index(spec.route))
    reason = chosen[weight.name]
    remark = pattern.remark(weight.shape, layout) if pattern is not None else None
    if remark:
        reason = f"{reason}; {remark}"
    target = targets[weight.name]
    return WeightPlan(
        weight.name, weight.shape, first.route, first.guard, weight.layout, pattern, target, weight.uses, reason, specs
    )
