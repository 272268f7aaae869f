"""Fisher statistics as gradients of parameters: collected during training, also under `torch.compile` and DDP.

A tap's backward pass returns the ordinary gradients and, summed over the batch, squares as the gradients of parameters
of zeros. Backward passes add up there as they do in any gradient. Squares scale with the square of the loss: see
`Instrumented.fisher`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from fxsparse.curvature.dense_storage import check_stored_dense
from fxsparse.curvature.fisher_batch import read_batch
from fxsparse.curvature.fisher_scope import collecting_scope
from fxsparse.curvature.fisher_types import CoupledSamples
from fxsparse.curvature.groups import Grouping
from fxsparse.curvature.groups_types import Heads, Reading, groupings_of
from fxsparse.curvature.kept_state import KeptParameters
from fxsparse.curvature.operator_checks import check_whole
from fxsparse.curvature.operator_data import one_output
from fxsparse.curvature.taps import Taps
from fxsparse.curvature.taps_gates import gate_taps
from fxsparse.curvature.taps_layout import Layout
from fxsparse.curvature.taps_places import Seen, places_of, tap_of
from fxsparse.curvature.taps_site import names_of
from fxsparse.errors import CaptureError, ConfigError, DataError, FxSparseError
from fxsparse.graph import capture
from fxsparse.graph.capture import Refusal
from fxsparse.graph.guards import NOTHING
from fxsparse.graph.inputs import split_inputs
from fxsparse.graph.taps import CONTAINER, count_runs, holder_of
from fxsparse.passes.instrument_fisher import InstrumentFisher, RemoveFisher, Tap, statistics_of
from fxsparse.passes.snapshot import graphs_of

GATE = "gate:"
"""What the names of attention gates begin with."""
_NO_GRAPH = "write that otherwise (`x.shape[0]` for `len(x)`), or use FisherCollector, which needs no graph"


@dataclass(eq=False)
class Instrumented:
    """A module with taps.

    Attributes:
        module: the module to train, which shares its parameters with the model.
        refused: parameters without a tap, and why.
        groupings: how the statistics of each tapped parameter are summed.
    """

    module: nn.Module
    refused: dict[str, str]
    groupings: Mapping[str, tuple[Grouping, ...]] = field(default_factory=dict)
    _batches: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self._batches = self._batches_seen()

    @property
    def statistics(self) -> dict[str, nn.Parameter]:
        """The statistics by the tapped parameter's name; keep them out of the optimizer and of gradient clipping."""
        return statistics_of(self.module)

    def trainable(self) -> Iterator[nn.Parameter]:
        """The parameters of the module without the statistics, for an optimizer or for clipping."""
        own = {id(statistic) for statistic in self.statistics.values()}
        return (parameter for parameter in self.module.parameters() if id(parameter) not in own)

    def fisher(self, samples: int, *, passes: int = 1, loss_scale: float = 1.0, mean: bool = True) -> dict[str, Tensor]:
        """The empirical group Fisher per sample that has arrived since `clear`, by parameter.

        Values are those of `FisherCollector`: output channels, heads, tokens, single entries of norms and biases.
        Where a parameter has several types of groups (a fused projection), names are `parameter|type`. Gates of
        attention heads are `gate:` and the node's name.

        With DDP, which averages gradients over ranks, nothing is to be done: each rank's statistic is divided by the
        number of ranks, as is the mean over all their samples.

        Args:
            samples: samples of one backward pass on one rank. Passes of mean losses must have as many samples each;
                for passes of other sizes take sums of losses, `mean` (=False), `passes` (=1) and the number of samples
                of all passes here.
            passes: how many backward passes were added up.
            loss_scale: by what the loss was multiplied before (AMP); squares carry its square.
            mean: whether the loss was a mean over the samples; else a sum.

        Raises:
            ConfigError: `samples` or `passes` is no positive integer, or `loss_scale` is not finite or 0.
            DataError: no backward pass has arrived since `clear`, or a graph ran several times in one forward pass,
                whose cross terms its taps cannot see.
            CoupledSamples: a BatchNorm took its statistics from a batch since `clear`, so that no sample had a gradient
                of its own.
        """
        _check_count("samples", samples)
        _check_count("passes", passes)
        if not math.isfinite(loss_scale) or not loss_scale:
            raise ConfigError(f"`loss_scale` (={loss_scale!r}) must be finite and not 0")
        check_stored_dense(self.module)
        self._check_uncoupled()
        self._check_single()
        if all(statistic.grad is None for statistic in self.statistics.values()):
            raise DataError("no backward pass of `module` has arrived since `clear`: run one before `fisher`")
        unscaled = samples**2 if mean else 1
        factor = unscaled / (samples * passes * loss_scale**2)
        found: dict[str, Tensor] = {}
        for name, statistic in self.statistics.items():
            value = statistic.grad * factor if statistic.grad is not None else torch.zeros_like(statistic)
            groupings = self.groupings.get(name, ())
            for grouping in groupings:
                key = name if len(groupings) == 1 else f"{name}|{grouping.group_type}"
                found[key] = value.view(grouping.shape) if grouping.is_element else grouping.from_slices(value[None])[0]
            if not groupings:
                found[name] = value
        return found

    def clear(self) -> None:
        """Forget what has arrived."""
        for statistic in self.statistics.values():
            statistic.grad = None
        for graph in graphs_of(self.module).values():
            if (holder := holder_of(graph)) is not None:
                holder.repeated = False
        self._batches = self._batches_seen()

    def _batches_seen(self) -> dict[str, int]:
        """How often each BatchNorm has taken statistics from a batch."""
        norms = {path: module for path, module in self.module.named_modules() if isinstance(module, _BatchNorm)}
        counted = {path: norm.num_batches_tracked for path, norm in norms.items()}
        return {path: int(count) for path, count in counted.items() if count is not None}

    def _check_uncoupled(self) -> None:
        for path, count in self._batches_seen().items():
            if count != self._batches.get(path):
                raise CoupledSamples(
                    f"`{path}` ({type(self.module.get_submodule(path)).__name__}) was in training mode, where it "
                    "couples samples, so that no statistic is that of single samples: put it into evaluation mode, "
                    "call `clear`, and run the batches again"
                )

    def _check_single(self) -> None:
        for path, graph in graphs_of(self.module).items():
            holder = holder_of(graph)
            if holder is not None and holder.repeated:
                names = ", ".join(f"`{name}`" for name in holder.parameter_names.values())
                raise DataError(
                    f"the graph `{path}` ran several times in one forward pass, so that the statistics of {names} lack "
                    "cross terms: collect them with FisherCollector, or call `clear` and leave such batches out"
                )

    def removed(self) -> nn.Module:
        """The module without taps."""
        return RemoveFisher()(self.module).module


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"`{name}` (={value!r}) must be an integer of at least 1")


def instrument_fisher(
    model: nn.Module,
    example_inputs: Any,
    *,
    parameters: Collection[str] | None = None,
    heads: Iterable[Heads] = (),
    gates: bool = False,
    output: Callable[[Any], Tensor] = one_output,
) -> Instrumented:
    """Put a tap at every layer whose parameters are read once, with the samples along axis 0.

    Covered are Linear and `F.linear`, convolutions of any kind, embeddings, norms, and their biases. A layer of torch's
    own class is replaced by one whose backward pass makes the weight's gradient and its squares at once.

    Per-sample squares need a loss that is a sum or a mean of per-sample losses, and no BatchNorm in training mode. What
    has no tap is in `refused`, with the reason; `FisherCollector` collects all of it.

    Args:
        model: any module; it is captured.
        example_inputs: as for `fxsparse.transform`; run once, on at most three samples, to see where samples lie.
        parameters: names of those that are wanted; all that require gradients where it is not given.
        heads: declared attention layouts.
        gates: whether heads of fused attention are tapped too: the square of the gradient of a gate on each head.
        output: takes the outputs [N, ...] out of what the model returns.

    Raises:
        CaptureError: the model cannot be captured, or cannot run on a few samples.
        ConfigError: there is nothing to tap, or a declared layout does not fit.
        CoupledSamples: the outputs of one sample depend on the others.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` (={type(model).__name__}) must be a torch.nn.Module")
    check_whole(model)
    check_stored_dense(model)
    found_graphs = capture(model, example_inputs)
    captured = found_graphs.module
    wanted = {
        name: parameter
        for name, parameter in captured.named_parameters()
        if (parameter.requires_grad if parameters is None else name in parameters) and parameter.is_floating_point()
    }
    unknown = set(parameters or ()) - set(wanted)
    if unknown:
        raise ConfigError(f"`parameters` (={sorted(unknown)[0]!r}) is no parameter of the model")
    if not wanted:
        raise ConfigError("the model has no layer to tap: no parameter of it requires gradients")
    seen, readings = _examined(captured, wanted, example_inputs, output)
    taps, refused = [], _outside(wanted, found_graphs.refusals)
    places = list(places_of(captured, wanted, refused, seen))
    covered = [name for _, names in places for name in names.values()]
    groupings = groupings_of(captured, covered, "auto", heads, readings)
    full = {id(parameter): name for name, parameter in captured.named_parameters()}
    for layer, names in places:
        made = tap_of(layer, names, groupings, seen, full)
        if isinstance(made, Tap):
            taps.append(made)
            for name in made.parameters:
                refused.pop(name or "", None)
        else:
            refused.update(made)
    found = gate_taps(captured, example_inputs, GATE) if gates else []
    if not taps and not found:
        name, reason = next(iter(refused.items()))
        raise ConfigError(f"the model has no layer to tap: `{name}`: {reason}")
    tapped = {name: groupings[name] for tap in taps for name in tap.parameters if name is not None}
    module = InstrumentFisher([*taps, *found])(captured).module
    count_runs(module)
    return Instrumented(module, refused, tapped)


def _outside(wanted: Iterable[str], refusals: Sequence[Refusal]) -> dict[str, str]:
    """Why each parameter is read outside of the graphs: by the innermost part of the model that stays Python."""
    found = {}
    for name in wanted:
        around = [each for each in refusals if not each.path or name.startswith(each.path + ".")]
        cause = max(around, key=lambda each: len(each.path), default=None)
        found[name] = "it is read outside of the graphs"
        if cause is not None:
            mend = _NO_GRAPH if cause.mend == NOTHING else cause.mend
            found[name] += f": `{cause.path or 'the model'}` stays Python: {cause.reason}; {mend}"
    return found


def _examined(
    module: nn.Module, wanted: Mapping[str, nn.Parameter], example_inputs: Any, output: Callable[[Any], Tensor]
) -> tuple[Seen, dict[str, Reading]]:
    """Where the samples lie in each layer, and how all parameters are read."""
    args, kwargs = split_inputs(example_inputs)
    batch = read_batch(((args, kwargs), None), next(iter(wanted.values())).device)
    every = {name: parameter for name, parameter in module.named_parameters() if parameter.is_floating_point()}
    noted: dict[str, Any] = {}

    class Noted(Taps):
        """Keeps what the examination has seen of sites."""

        def _compare(self, made: Any, cotangent: Tensor, references: dict[str, Tensor]) -> None:
            super()._compare(made, cotangent, references)
            apart: dict[str, str] = {}
            for site in made.mode.sites:
                alone = self.layouts.get(site.number) == Layout(0) and site.shape[0] == made.samples
                for operand in site.operands:
                    if not alone or operand.source.direct is None:
                        reason = f"at `{site.what}` the samples do not lie along axis 0 alone"
                        apart.update(dict.fromkeys(operand.source.names, reason))
            noted.update(apart=apart, sites=made.mode.sites, layouts=self.layouts, samples=made.samples)

    taps = Noted(module, every, output)
    calls: dict[int, tuple[list[Any], Any]] = {}
    with collecting_scope(module), KeptParameters(module).kept():
        try:
            taps.examine(batch)
            few = taps.evidence[0]
            with _noted_calls(module, calls), torch.no_grad():
                args, kwargs = few.fresh()
                module(*args, **kwargs)
        except (FxSparseError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise CaptureError(
                f"the model cannot run on a few samples of `example_inputs` ({type(error).__name__}: {error})"
            ) from error
    refused = dict(taps.refused)
    for site in noted.get("sites", ()):
        reason = None
        if site.moved or site.read:
            reason = f"at `{site.what}` values of the inputs tell where samples lie, which no tap can follow"
        elif site.number in taps.unsure:
            reason = f"no gradients of two example samples reach `{site.what}`, which would tell where samples lie"
        if reason is not None:
            refused = {**dict.fromkeys(names_of(site), reason), **refused}
    seen = Seen(refused, **noted, calls=calls)
    noted.clear()  # the class above, which refers to itself, would keep the activations
    return seen, taps.readings


@contextlib.contextmanager
def _noted_calls(module: nn.Module, calls: dict[int, tuple[list[Any], Any]]) -> Iterator[None]:
    """Note the arguments of each module that holds parameters and is called by a graph."""

    def note(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[id(owner)] = pytree.tree_flatten((args, kwargs))

    called = [
        graph.get_submodule(str(node.target))
        for graph in graphs_of(module).values()
        for node in graph.graph.find_nodes(op="call_module")
    ]
    handles = [owner.register_forward_pre_hook(note, with_kwargs=True) for owner in called]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["CONTAINER", "GATE", "Instrumented", "instrument_fisher"]
