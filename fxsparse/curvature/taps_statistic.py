"""Fisher statistics as gradients of parameters: collected during training, also under `torch.compile` and DDP.

A tap's backward pass returns the ordinary gradients and, summed over the batch, squares as the gradients of parameters
of zeros. Backward passes add up there as they do in any gradient. Squares scale with the square of the loss: see
`Instrumented.fisher`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.curvature.fisher_batch import read_batch
from fxsparse.curvature.fisher_scope import collecting_scope
from fxsparse.curvature.groups import Grouping
from fxsparse.curvature.groups_types import Heads, Reading, groupings_of
from fxsparse.curvature.operator_data import one_output
from fxsparse.curvature.taps import Taps
from fxsparse.curvature.taps_layout import Layout
from fxsparse.curvature.taps_places import gate_taps, places_of, tap_of
from fxsparse.errors import ConfigError, DataError
from fxsparse.graph import capture
from fxsparse.graph.inputs import split_inputs
from fxsparse.passes.instrument_fisher import CONTAINER, InstrumentFisher, RemoveFisher, Tap, statistics_of

GATE = "gate:"
"""What the names of attention gates begin with."""


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
            samples: samples of one backward pass on one rank.
            passes: how many backward passes were added up.
            loss_scale: by what the loss was multiplied before (AMP); squares carry its square.
            mean: whether the loss was a mean over the samples; else a sum.
        """
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

    def removed(self) -> nn.Module:
        """The module without taps."""
        return RemoveFisher()(self.module).module


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
        CaptureError: the model cannot be captured.
        ConfigError: there is nothing to tap, or a declared layout does not fit.
        CoupledSamples: the outputs of one sample depend on the others.
    """
    captured = capture(model, example_inputs).module
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
    reasons, readings = _examined(captured, wanted, example_inputs, output)
    taps, refused = [], {name: "it is read outside of the graphs" for name in wanted}
    places = list(places_of(captured, wanted, refused, reasons))
    covered = [name for _, names in places for name in names if name is not None]
    groupings = groupings_of(captured, covered, "auto", heads, readings)
    for layer, names in places:
        made = tap_of(layer, names, groupings)
        if isinstance(made, Tap):
            taps.append(made)
            for name in made.parameters:
                refused.pop(name or "", None)
        else:
            refused.update(made)
    found = gate_taps(captured, example_inputs, GATE) if gates else []
    if not taps and not found:
        raise ConfigError(f"the model has no layer to tap: {next(iter(refused.items()), 'no parameters')}")
    tapped = {name: groupings[name] for tap in taps for name in tap.parameters if name is not None}
    return Instrumented(InstrumentFisher([*taps, *found])(captured).module, refused, tapped)


def _examined(
    module: nn.Module, wanted: Mapping[str, nn.Parameter], example_inputs: Any, output: Callable[[Any], Tensor]
) -> tuple[dict[str, str], dict[str, Reading]]:
    """Parameters whose layers do not have the samples along axis 0, and how all are read."""
    args, kwargs = split_inputs(example_inputs)
    batch = read_batch(((args, kwargs), None), next(iter(wanted.values())).device)
    reasons: dict[str, str] = {}

    class Noted(Taps):
        """Keeps what the examination has seen of sites."""

        def _compare(self, made: Any, cotangent: Tensor, references: dict[str, Tensor]) -> None:
            super()._compare(made, cotangent, references)
            for site in made.mode.sites:
                apart = self.layouts.get(site.number) == Layout(0) and site.shape[0] == made.samples
                for operand in site.operands:
                    reason = f"at `{site.what}` the samples do not lie along axis 0 alone"
                    if not apart or operand.source.direct is None:
                        reasons.update(dict.fromkeys(operand.source.names, reason))

    taps = Noted(module, wanted, output)
    with collecting_scope(module):
        try:
            taps.examine(batch)
        except DataError as error:
            if "`output`" not in str(error):
                raise
            return {}, {}  # outputs that are no tensor tell nothing of the samples
    return {**taps.refused, **reasons}, taps.readings


__all__ = ["CONTAINER", "GATE", "Instrumented", "instrument_fisher"]
