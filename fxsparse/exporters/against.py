"""Whether an ONNX file holds a ticket, or computes what another file computes."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from torch import Tensor, nn

from fxsparse.errors import ExportError, FxSparseError
from fxsparse.exporters.runtime import open_session
from fxsparse.sparsity import MaskSet

if TYPE_CHECKING:
    from fxsparse.exporters.file_io import OnnxFile

_SINGLE = 1e-6
"""Above the rounding of single precision."""


class Status(enum.Enum):
    """Outcome of a check."""

    PASSED = "passed"
    FAILED = "FAILED"
    SKIPPED = "not checked"


class TicketLike(Protocol):
    """What is read of a ticket (`fxsparse.lottery.Ticket`)."""

    @property
    def path(self) -> Path:
        """Its directory."""

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Everything but the tensors."""

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Bool masks by parameter name."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Values at the start."""

    @property
    def final(self) -> Mapping[str, Tensor] | None:
        """Trained values."""

    @property
    def ticket_id(self) -> str:
        """Its id."""

    @property
    def origin(self) -> Mapping[str, Any]:
        """Its id and lineage."""

    def apply(self, model: nn.Module, *, final: bool = False) -> nn.Module:
        """Load it into a model."""

    def build(self) -> nn.Module:
        """The model that it names."""

    def example_inputs(self, batch: int = 2) -> tuple[Tensor, ...]:
        """Inputs of the model."""


Against: TypeAlias = "TicketLike | str | os.PathLike[str]"


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: what was checked.
        status: its outcome.
        said: what was found, or why it was not checked.
    """

    name: str
    status: Status
    said: str

    def __str__(self) -> str:
        return f"{self.name:<10} {self.status.value:<12} {self.said}"


@dataclass(frozen=True)
class FileVerdict:
    """The result of `verify_file`; `str` gives a text.

    Attributes:
        path: the file.
        against: what it was held against.
        checks: the checks, in order.
    """

    path: Path
    against: Path
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Nothing failed, and either the zeros or the numbers were checked."""
        failed = any(check.status is Status.FAILED for check in self.checks)
        shown = any(check.name in ("zeros", "parity") and check.status is Status.PASSED for check in self.checks)
        return shown and not failed

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        shown = any(check.status is not Status.SKIPPED for check in self.checks if check.name in ("zeros", "parity"))
        hint = "" if shown else ": neither zeros nor numbers could be checked"
        head = f"{self.path} against {self.against}: {verdict}{hint}"
        return "\n".join([head, *map(str, self.checks)])


def verify_file(
    path: str | os.PathLike[str],
    against: Against,
    *,
    model: nn.Module | None = None,
    example_inputs: Any = None,
    tolerance: float | None = None,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
) -> FileVerdict:
    """Hold an ONNX file against a ticket, or against another ONNX file.

    Of a ticket: (1) the digest of the masks, (2) its id and lineage and (3) the densities in the file's metadata; (4)
    dead entries of the masks are zeros in the initializers that hold the weights, found by the metadata, by name, or by
    their values in any order of axes (tied weights once); (5) onnxruntime computes what the rebuilt model computes.
    Of a file: (1) inputs and outputs, (2) mask digests, (3) zeros of equally named initializers, (4) onnxruntime
    computes the same on random inputs.

    Args:
        path: the file.
        against: a loaded ticket, or the path of an ONNX file.
        model: the ticket's model, where it is not one of fxsparse.models; it is changed.
        example_inputs: its inputs, where the ticket has no signature.
        tolerance: largest relative difference of an output; None derives it as an export does (for files 1e-4, with
            half-precision outputs ten roundings).
        sizes: sizes of free axes by name, for a file against a file.
        seed: of the random inputs.

    Returns:
        What was checked; it does not raise for a difference.

    Raises:
        ExportError: a file cannot be read.
        ConfigError: `tolerance` is negative or no number.
    """
    from fxsparse.exporters.file_compare import check_tolerance
    from fxsparse.exporters.file_io import read_file

    check_tolerance(tolerance)
    file = read_file(path)
    if isinstance(against, str | os.PathLike):
        other = read_file(against)
        return FileVerdict(file.path, other.path, tuple(_file_checks(file, other, tolerance, dict(sizes or {}), seed)))
    checks = [*_metadata_checks(file, against), _zeros_check(file, against)]
    checks.append(_parity_check(file, against, model, example_inputs, tolerance, seed))
    return FileVerdict(file.path, against.path, tuple(checks))


def _metadata(file: OnnxFile) -> dict[str, Any] | None:
    import onnx

    from fxsparse.exporters.metadata import metadata_of

    try:
        found = metadata_of(onnx.load(file.path, load_external_data=False))
    except (ValueError, KeyError):  # written by fxsparse and changed since
        return None
    return found if found is not None and {"mask_digest", "lineage", "layers"} <= set(found) else None


def _metadata_checks(file: OnnxFile, ticket: TicketLike) -> list[Check]:
    found = _metadata(file)
    if found is None:
        said = "the file has no metadata of this fxsparse"
        return [Check(name, Status.SKIPPED, said) for name in ("masks", "lineage", "densities")]
    digest = MaskSet(ticket.masks).digest()
    same = found["mask_digest"] == digest
    text = f"digest {digest[:12]}" if same else f"digest {found['mask_digest'][:12]}, the ticket's is {digest[:12]}"
    return [_check("masks", same, text), _lineage_check(found["lineage"], ticket), _densities_check(found, ticket)]


def _lineage_check(lineage: Mapping[str, Any], ticket: TicketLike) -> Check:
    if "ticket_id" not in lineage:
        return Check("lineage", Status.SKIPPED, "the file names no ticket")
    wrong = [key for key, value in ticket.origin.items() if key in lineage and lineage[key] != value]
    if wrong:
        key = wrong[0]
        return Check("lineage", Status.FAILED, f"`{key}` (={lineage[key]}) is {ticket.origin[key]} in the ticket")
    return Check("lineage", Status.PASSED, f"ticket {ticket.ticket_id[:12]}")


def _densities_check(found: Mapping[str, Any], ticket: TicketLike) -> Check:
    rows = {row["name"]: row for row in found["layers"]}
    if set(rows) != set(ticket.masks):
        names = ", ".join(sorted(set(rows) ^ set(ticket.masks))[:3])
        return Check("densities", Status.FAILED, f"the masked weights differ: {names}")
    for name, mask in ticket.masks.items():
        row, alive = rows[name], int(mask.sum())
        if row["alive"] != alive or row["numel"] != mask.numel():
            said = f"`{name}`: {row['alive']} of {row['numel']} alive, {alive} of {mask.numel()} in the ticket"
            return Check("densities", Status.FAILED, said)
    total = MaskSet(ticket.masks)
    return Check("densities", Status.PASSED, f"{total.alive:,} of {total.numel:,} alive in {len(rows)} weights")


def _zeros_check(file: OnnxFile, ticket: TicketLike) -> Check:
    from fxsparse.exporters.against_zeros import held_zeros

    rows = (_metadata(file) or {}).get("layers", ())
    found, missing, wrong = held_zeros(file.model, ticket, {row["name"]: row for row in rows})
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        return Check("zeros", Status.FAILED, wrong[0] + more)
    lost = f"; not found as a whole, as after compaction or lowering: {', '.join(missing[:4])}" if missing else ""
    if missing and len(missing) > 4:
        lost += f" and {len(missing) - 4} more"
    said = f"{found} of {found + len(missing)} masked weights found, their dead entries are zeros{lost}"
    return Check("zeros", Status.PASSED if found else Status.SKIPPED, said)


def _parity_check(
    file: OnnxFile, ticket: TicketLike, model: nn.Module | None, inputs: Any, tolerance: float | None, seed: int
) -> Check:
    from fxsparse.exporters.prepare import prepare
    from fxsparse.exporters.reference import Verification, reference
    from fxsparse.exporters.verify import verify

    try:
        built = model if model is not None else ticket.build()
        example = inputs if inputs is not None else ticket.example_inputs()
        ready = ticket.apply(built, final=ticket.final is not None)
    except FxSparseError as error:
        return Check("parity", Status.SKIPPED, f"the model was not rebuilt: {error}")
    try:
        subject = prepare(ready, example)
        given = _fitted(subject.inputs, file)
        session = open_session(file.path)
        expected = reference(subject.masked, given, Verification(batch_sizes=(1, 3), draws=3, seed=seed))
        parity = verify(session, expected, tolerance)
    except ExportError as error:
        return Check("parity", Status.FAILED, str(error))
    return Check("parity", Status.PASSED, str(parity))


def _fitted(inputs: Any, file: OnnxFile) -> Any:
    """The example's inputs under the file's names, at its batch size where that is fixed."""
    from fxsparse.exporters.file_inputs import read_signature

    signature = read_signature(file.model)
    names = tuple(wanted.name for wanted in signature.inputs)
    if not set(names) <= set(inputs.names):
        if len(names) != len(inputs.names):
            raise ExportError(f"the file takes {len(names)} inputs ({', '.join(names)}), the model {len(inputs.names)}")
        inputs = replace(inputs, names=names)
    size = signature.fixed_batch
    if size is not None and inputs.batched:
        inputs = replace(inputs, tensors=tuple(inputs.resized(size))).fixed(f"the file has the batch size {size}")
    return inputs


def _file_checks(
    file: OnnxFile, other: OnnxFile, tolerance: float | None, sizes: Mapping[str, int], seed: int
) -> list[Check]:
    from fxsparse.exporters.against_zeros import equal_zeros

    mine, theirs = _metadata(file), _metadata(other)
    signatures = _signature_check(file, other)
    if mine is None or theirs is None:
        digest = Check("masks", Status.SKIPPED, "not both files have metadata of this fxsparse")
    else:
        same = mine["mask_digest"] == theirs["mask_digest"]
        digest = _check("masks", same, f"digests {mine['mask_digest'][:12]} and {theirs['mask_digest'][:12]}")
    found, wrong = equal_zeros(file.model, other.model)
    if wrong:
        zeros = Check("zeros", Status.FAILED, wrong[0])
    else:
        status = Status.PASSED if found else Status.SKIPPED
        zeros = Check("zeros", status, f"{found} initializers of the same name and shape have the zeros of the other")
    if signatures.status is Status.FAILED:
        return [signatures, digest, zeros, Check("parity", Status.SKIPPED, "inputs or outputs differ")]
    return [signatures, digest, zeros, _runs_check(file, other, tolerance, sizes, seed)]


def _signature_check(file: OnnxFile, other: OnnxFile) -> Check:
    def described(values: Sequence[Any]) -> list[tuple[str, str]]:
        return [(value.name or "", str(value.dtype)) for value in values if not value.is_initializer()]

    for said, mine, theirs in (
        ("inputs", file.model.graph.inputs, other.model.graph.inputs),
        ("outputs", file.model.graph.outputs, other.model.graph.outputs),
    ):
        if described(mine) != described(theirs):
            text = f"{said} {described(mine)} differ from {described(theirs)}"
            return Check("signature", Status.FAILED, text)
    return Check("signature", Status.PASSED, "equal names and types of inputs and outputs")


def _runs_check(file: OnnxFile, other: OnnxFile, tolerance: float | None, sizes: Mapping[str, int], seed: int) -> Check:
    from fxsparse.exporters.file_compare import allowed_for, blind, check_equal, differences, feeds_of, outputs_of
    from fxsparse.exporters.file_inputs import read_signature

    try:
        session = open_session(other.path)
        feeds = feeds_of(session, read_signature(other.model, sizes), seed=seed)
        expected = outputs_of(session, feeds)
        del session
        unseen = blind(expected)
        found, constant = differences(expected, open_session(file.path), feeds)
        rounding = max(
            (float(np.finfo(v.dtype).eps) for run in expected for v in run if v.dtype.kind == "f"), default=0.0
        )
        allowed = allowed_for(rounding if rounding > _SINGLE else None, tolerance)
        check_equal(found, allowed, None)
    except ExportError as error:
        return Check("parity", Status.FAILED, str(error))
    shapes = "; ".join(str([tuple(int(n) for n in np.shape(value)) for value in feed.values()]) for feed in feeds)
    little = ", though no output ever changes" if constant else ""
    little += f", nothing of output {', '.join(map(str, unseen))}, which holds no finite number" if unseen else ""
    said = (
        f"worst |difference| {found.absolute:.2g}, relative {found.relative:.2g} of {allowed:.2g} allowed on {shapes}"
    )
    return Check("parity", Status.PASSED, said + little)


def _check(name: str, passed: bool, said: str) -> Check:
    return Check(name, Status.PASSED if passed else Status.FAILED, said)
