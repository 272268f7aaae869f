"""Smaller models from sparse ones: dead channels are removed exactly, and the optimizer follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fxsparse.errors import CaptureError, ConfigError
from fxsparse.graph import capture, count, graphs_of
from fxsparse.graph.mishaps import mishap
from fxsparse.graph.taps import without_taps
from fxsparse.nn import masked_weights, masks
from fxsparse.passes.compact_channels import Compacted, compact_channels
from fxsparse.passes.compact_classes import Place
from fxsparse.planning.checks import _check_wrappers
from fxsparse.planning.followers import Followers
from fxsparse.planning.sparsify import finalize
from fxsparse.planning.table import format_table
from fxsparse.planning.transplant import Transplant
from fxsparse.planning.weight_plan import RECORD

COMPACTION = "_fxsparse_compaction"
"""Attribute of a compacted model that holds its `CompactionReport`."""


@dataclass(frozen=True)
class CompactionRow:
    """Channels that were removed together.

    Attributes:
        places: what got shorter: (parameter or buffer, dimension, size before, size after).
        folded: biases and means into which their constants were folded.
    """

    places: tuple[tuple[str, int, int, int], ...]
    folded: tuple[str, ...] = ()

    @property
    def removed(self) -> int:
        """Channels removed: the fewest indices that one of the places lost."""
        return min(before - after for _, _, before, after in self.places)


@dataclass(frozen=True)
class CompactionReport:
    """What compaction did; `str()` of it is a table.

    Attributes:
        rows: the removed channels, those that go together in one row.
        parameters: elements of all parameters before and after.
        macs: multiply-accumulates on the example inputs before and after; None where they cannot be counted.
        kept: channels that are dead or constant and stay all the same, with reasons.
        refused: dimensions left whole because the model failed or differed without the channels, with reasons.
        barriers: operators that keep channels from being removed.
        notes: what was compared, and how train mode behaves.
        worst: largest difference of an output, relative to the largest value of that output.
    """

    rows: tuple[CompactionRow, ...]
    parameters: tuple[int, int]
    macs: tuple[int, int] | None
    kept: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    barriers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    worst: float = 0.0

    def __str__(self) -> str:
        cells = [
            (f"{name}[{dim}]", str(before), str(after), ", ".join(row.folded) if first else "")
            for row in self.rows
            for first, (name, dim, before, after) in ((index == 0, place) for index, place in enumerate(row.places))
        ]
        lines = [format_table(("dimension", "before", "after", "constants folded into"), cells)] if cells else []
        if not cells:
            lines.append("nothing was removed: no channel is dead or constant and free to go")
        before, after = self.parameters
        lines.append(f"parameters: {before:,} -> {after:,} ({_saved(before, after)})")
        if self.macs is not None:
            lines.append(f"MACs: {self.macs[0]:,} -> {self.macs[1]:,} ({_saved(*self.macs)})")
        lines += [f"kept: {reason}" for reason in self.kept]
        lines += [f"refused: {reason}" for reason in self.refused]
        lines += [f"barrier: {reason}" for reason in self.barriers]
        lines += list(self.notes)
        return "\n".join(lines)


def _saved(before: int, after: int) -> str:
    return f"-{100 * (before - after) / before:.1f} %" if before else "none"


def compact(
    model: nn.Module,
    example_inputs: Any,
    optimizer: Optimizer | None = None,
    *,
    followers: nn.Module | Iterable[nn.Module] = (),
) -> nn.Module:
    """Remove the channels that a sparse model does not need, exactly.

    A channel goes when nobody reads it, or when its weights are dead, so that it is a constant that the next bias (or
    the mean of the next BatchNorm) can take. What the model computes in eval mode stays the same: shown on the example
    inputs, in float64, to 1e-12 of the output's scale. In train mode a folded constant stays what it is in eval mode,
    so the outputs may differ where batch statistics or dropout act on it; the report says whether they did.

    Args:
        model: a model with masks, or one whose dead weights are zeros (`finalize`); it stays as it was. The result has
            none of its Fisher taps.
        example_inputs: a tuple of positional inputs, or ``(args, kwargs)``.
        optimizer: any torch.optim optimizer of the model's parameters. It is moved to the result: its parameter groups
            hold the new parameters, its state is shortened like them, and schedulers that hold it keep working. It does
            not train `model` any more.
        followers: averages of the model (`torch.optim.swa_utils.AveragedModel`), one or several: the copy inside each
            is replaced by one that has lost the same channels, so that it averages the result from now on.

    Returns:
        A model with the same modules, parameter names and masks, but smaller tensors, that trains on. What was done is
        told by `compaction_report`. Where nothing can go it is a copy of the model.

    Raises:
        ConfigError: `model` is no module or a wrapper, is in a resurrection phase, `example_inputs` is neither form, or
            the optimizer or a follower does not fit (see `Transplant`, `Followers`). None of them has changed then.
        CaptureError: the model cannot be run on the inputs.
        DataError: channels could go, but its outputs are not finite, so that equality cannot be shown.
        PassError: it does not repeat itself from the same seed.

    >>> import torch
    >>> from torch import nn
    >>> import fxsparse
    >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    >>> x = torch.randn(3, 8, dtype=torch.float64)
    >>> sparse = fxsparse.transform(model, (x,), include="0", sparsity=0.5, pattern=fxsparse.Channel())
    >>> small = compact(sparse, (x,))
    >>> small[0].weight.shape, small[2].weight.shape
    (torch.Size([3, 8]), torch.Size([2, 3]))
    >>> torch.testing.assert_close(small(x), sparse(x), rtol=1e-12, atol=1e-12)
    """
    check_compactable(model)
    model = without_taps(model)
    moves = Moves(model, example_inputs, optimizer, followers)
    source = captured_form(model, example_inputs)
    found = compact_channels(source, folded_form(source), example_inputs)
    return moves.finish(found)


def captured_form(model: nn.Module, example_inputs: Any, specialize: bool = False) -> nn.Module:
    """The model with graphs where it can have some, sharing its tensors; `specialize` as for `capture`."""
    return model if _is_captured(model) else capture(model, example_inputs, specialize=specialize).module


def folded_form(model: nn.Module) -> nn.Module:
    """The model without masks; itself where it has none."""
    return finalize(model) if masked_weights(model) else model


class Moves:
    """What moves from a model to its compacted copy: the optimizer, averages, the report.

    Args:
        model: the model.
        example_inputs: its inputs.
        optimizer: its optimizer, or None.
        followers: its averages.
        specialize: whether graphs were made for inputs like the example's only.

    Raises:
        ConfigError: the optimizer or a follower does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        optimizer: Optimizer | None,
        followers: nn.Module | Iterable[nn.Module],
        specialize: bool = False,
    ) -> None:
        self.model, self.example_inputs = model, example_inputs
        self.transplant = None if optimizer is None else Transplant(optimizer, model)
        graphs = partial(captured_form, example_inputs=example_inputs, specialize=specialize)
        self.followers = Followers(followers, model, graphs)

    def finish(self, found: Compacted, zero: Callable[[nn.Module], None] = lambda copy: None) -> nn.Module:
        """The compacted model with its report, trained by the optimizer and averaged by the followers from now on.

        Args:
            found: the compacted model.
            zero: writes zeros to what was zeroed in the model before.

        Raises:
            ConfigError: the optimizer's state or a follower does not fit; nothing has changed then.
        """
        kept = found.solution.kept
        if self.transplant is not None:
            self.transplant.check(kept)
        if self.followers.followers:
            self.followers.prepare(found, self.example_inputs, masks(self.model), zero)
        result = found.module
        result.__dict__[COMPACTION] = _report(self.model, found, self.example_inputs)
        result.__dict__.pop(RECORD, None)
        if self.transplant is not None:
            self.transplant.commit(result, kept)
        self.followers.commit()
        return result


def _is_captured(model: nn.Module) -> bool:
    """Whether a transform has made graphs of what can be one: sizes written into those can follow."""
    return RECORD in model.__dict__ or bool(masked_weights(model)) or bool(graphs_of(model))


def check_compactable(model: object) -> None:
    """Raise ConfigError or CaptureError for what cannot be compacted."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` (={type(model).__name__}) must be a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("`model` is scripted, its code cannot be rewritten; give the module from before")
    _check_wrappers(model)
    meta = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if meta is not None:
        raise ConfigError(f"`{meta}` is on the meta device and has no values to see what is dead; load them first")


def compaction_report(model: nn.Module) -> CompactionReport:
    """What `compact` did to this model.

    Raises:
        ConfigError: the model was not made by `compact`.
    """
    report = model.__dict__.get(COMPACTION) if isinstance(model, nn.Module) else None
    if not isinstance(report, CompactionReport):
        raise ConfigError(f"`model` (={type(model).__name__}) was not made by `compact`")
    return report


def _report(model: nn.Module, found: Compacted, example_inputs: Any) -> CompactionReport:
    solution, channels = found.solution, found.channels
    sizes = {
        (name, dim): labels.size
        for name, dims in (channels.sources.items() if channels is not None else ())
        for dim, labels in enumerate(dims)
        if labels is not None
    }
    kept = solution.kept
    rows = tuple(
        CompactionRow(
            tuple((name, dim, sizes[name, dim], len(kept[name, dim])) for name, dim in cluster),
            _folded(found, cluster),
        )
        for cluster in solution.clusters
    )
    notes = list(found.notes)
    if rows:
        kind = "float64" if found.dtype is not None else "the model's own precision"
        notes.insert(0, f"eval mode: equal in {kind}, worst difference {found.worst:.2g} of the output's scale")
    notes += [
        f"the mask of {name} is unstructured now: its pattern does not fit the new shape" for name in found.loosened
    ]
    return CompactionReport(
        rows=rows,
        parameters=(_parameters(model), _parameters(found.module)),
        macs=_macs(model, found.module, example_inputs),
        kept=tuple(map(str, solution.blocked)),
        refused=tuple(map(str, found.refused)),
        barriers=tuple(dict.fromkeys(map(str, channels.barriers if channels is not None else ()))),
        notes=tuple(notes),
        worst=found.worst,
    )


def _folded(found: Compacted, cluster: tuple[Place, ...]) -> tuple[str, ...]:
    places = set(cluster)
    names = [
        sink.fold.name
        for sink in found.solution.sinks
        if sink.fold is not None and sink.fold.name in found.solution.folds and (sink.weight, sink.axis) in places
    ]
    return tuple(dict.fromkeys(names))


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _macs(before: nn.Module, after: nn.Module, example_inputs: Any) -> tuple[int, int] | None:
    try:
        return count(before, example_inputs).macs_dense, count(after, example_inputs).macs_dense
    except CaptureError:
        return None
    except Exception as error:
        mishap("counting", error)
        return None
