"""Before a model is exported: dead channels are cut out, shared supports become gathers and small products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from fxsparse.errors import ExportError, FxSparseError
from fxsparse.exporters.inputs import first_line
from fxsparse.exporters.prepare import Subject, fold
from fxsparse.graph.mishaps import mishap
from fxsparse.nn import masked_weights
from fxsparse.passes.compact_channels import compact_channels
from fxsparse.passes.lower_shared_support import Form, LayerRecord, Policy, lower_shared_support
from fxsparse.planning.compaction import (
    CompactionReport,
    Moves,
    captured_form,
    check_compactable,
    compaction_report,
    folded_form,
)
from fxsparse.sparsity import SharedSupport

PLAIN = "as it is"

_DENSEST = 0.9  # alive fraction from which on no form pays


@dataclass(frozen=True, eq=False)
class Variant:
    """One form of a model that may be exported.

    Attributes:
        label: what was done to it, in words.
        subject: the model in this form.
        model: the same with its masks, where it has some yet; what a later rewrite begins with.
        compaction: what compaction did, where it ran.
        records: what lowering did, by the weight's name.
        notes: what was decided, for the report.
    """

    label: str
    subject: Subject
    model: nn.Module
    compaction: CompactionReport | None = None
    records: Mapping[str, LayerRecord] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def lowered(self) -> bool:
        """Whether any layer has another form than the dense one."""
        return any(record.form is not Form.DENSE for record in self.records.values())

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """The shape to which compaction cut a weight; None where it kept all of it."""
        for row in self.compaction.rows if self.compaction is not None else ():
            if any(place[0] == name for place in row.places):
                return tuple(self.model.get_parameter(name).shape)
        return None


def plain(subject: Subject) -> Variant:
    """The model as it is."""
    return Variant(PLAIN, subject, subject.masked)


def compact(model: nn.Module, example_inputs: Any) -> nn.Module:
    """`fxsparse.compact` for onnxruntime: 2-d convolutions keep whole blocks of channels."""
    check_compactable(model)
    moves = Moves(model, example_inputs, None, ())
    source = captured_form(model, example_inputs)
    return moves.finish(compact_channels(source, folded_form(source), example_inputs, blocks=True))


def compacted(variant: Variant, wanted: bool | None) -> Variant:
    """The variant without its dead channels; itself where none can go.

    Args:
        variant: the model.
        wanted: whether it was asked for; None to try where a weight has a dead channel.

    Raises:
        ExportError: it was asked for and is not possible.
    """
    if wanted is False or (wanted is None and not has_dead_channels(variant.model)):
        return variant
    subject = variant.subject
    try:
        smaller = compact(variant.model, subject.inputs.build(subject.inputs.tensors)).eval()
        report = compaction_report(smaller)
        filling = tuple(note for note in report.notes if "superfluous" in note)
        if not report.rows:
            return replace(variant, notes=(*variant.notes, *filling))
        inside = replace(subject, folded=fold(smaller), weights=masked_weights(smaller))
    except Exception as error:
        return _refused(variant, "compacted", error, wanted)
    before, after = report.parameters
    note = f"compacted: {before:,} -> {after:,} parameters, {sum(row.removed for row in report.rows)} channels removed"
    return Variant("compacted", inside, smaller, report, notes=(*variant.notes, note, *filling))


def lowered(
    variant: Variant,
    wanted: bool | None,
    choose: Mapping[str, Form] | Policy | None = None,
    look: bool = False,
    bias_inside: bool = True,
) -> Variant:
    """The variant with its shared supports lowered; itself, with the reasons, where every layer stays dense.

    Args:
        variant: the model.
        wanted: whether it was asked for; None to try where a weight has such supports.
        choose: as `lower_shared_support` takes it.
        look: whether to look at models without the pattern, too, unless `wanted` is False.
        bias_inside: as `lower_shared_support` takes it.

    Raises:
        ExportError: it was asked for and is not possible.
    """
    if wanted is False or (wanted is None and not look and not has_shared_support(variant.subject.masked)):
        return variant
    subject = variant.subject
    try:
        inputs, axes = subject.inputs, subject.inputs.axes()
        free = [axes.get(i, {}) for i in range(len(inputs.tensors))]
        built = inputs.build(inputs.tensors)
        found = lower_shared_support(variant.model, built, choose=choose, free=free, bias_inside=bias_inside)
        records = {record.name: record for record in found.records}
        if all(record.form is Form.DENSE for record in found.records):
            return replace(variant, records=records, notes=(*variant.notes, *found.notes))
        left = {name for name, _ in found.model.named_parameters()}
        masked = masked_weights(variant.model)
        kept = {name: weight for name, weight in masked.items() if name in left}
        inside = replace(subject, folded=found.model.eval(), weights=kept)
    except Exception as error:
        return _refused(variant, "lowered", error, wanted)
    label = "lowered" if variant.label == PLAIN else f"{variant.label} and lowered"
    return Variant(label, inside, variant.model, variant.compaction, records, (*variant.notes, *found.notes))


def _refused(variant: Variant, what: str, error: Exception, wanted: bool | None) -> Variant:
    if not isinstance(error, FxSparseError):
        mishap(f"a model on its way to be {what}", error)
    if wanted:
        raise ExportError(f"the model cannot be {what} ({first_line(error)}): leave that out") from error
    return replace(variant, notes=(*variant.notes, f"not {what}: {first_line(error)}"))


def has_dead_channels(model: nn.Module) -> bool:
    """Whether a weight with some alive entries, or a mask, has an output or input without any."""
    masks = [weight.mask for weight in masked_weights(model).values()]
    alive = [*masks, *(parameter.detach() != 0 for parameter in model.parameters() if parameter.ndim > 1)]
    return any(bool(each.any()) and _has_dead_slice(each) for each in alive) or any(not bool(m.any()) for m in masks)


def _has_dead_slice(alive: Any) -> bool:
    axes: Sequence[int] = range(alive.ndim)
    return any(not bool(alive.any(dim=[a for a in axes if a != axis]).all()) for axis in axes[:2] if alive.ndim > 1)


def has_shared_support(model: nn.Module) -> bool:
    """Whether a weight has groups of rows that are alive on one set of positions, by its pattern or by its zeros."""
    weights = masked_weights(model)
    if any(isinstance(weight.spec.pattern, SharedSupport) for weight in weights.values()):
        return True
    masks = [weight.mask for weight in weights.values()]
    zeros = (parameter.detach() != 0 for name, parameter in model.named_parameters() if name not in weights)
    return any(_rows_repeat(alive) for alive in (*masks, *zeros) if alive.ndim > 1 and alive.numel())


def _rows_repeat(alive: Tensor) -> bool:
    """Whether some positions are dead, and a row has three others like it on average."""
    if int(alive.count_nonzero()) > _DENSEST * alive.numel():
        return False
    rows = np.packbits(alive.flatten(1).cpu().numpy(), axis=1)
    return 4 * len({row.tobytes() for row in rows}) <= len(rows)
