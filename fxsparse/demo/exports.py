"""The exports of the demo: each ticket becomes a verified ONNX file; what was measured is kept beside it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from fxsparse.demo.settings import example_batch
from fxsparse.demo.train import DENSE, Place, Trained
from fxsparse.exporters import ExportReport, export_onnx
from fxsparse.lottery import Ticket, load_ticket
from fxsparse.lottery.canonical import sha256_file
from fxsparse.lottery.run_directory import write_file


@dataclass(frozen=True)
class Exported:
    """What an export measured; latencies are medians in milliseconds at the batch of `example_batch`.

    Attributes:
        ticket_id: of the ticket that was exported.
        sha256: of the ONNX file.
        bytes: of the ONNX file.
        parameters: entries of all parameters.
        alive: those that no mask holds at zero.
        macs_dense: multiply-accumulates of one sample with every weight alive.
        macs_effective: those with an alive weight.
        latency_ms: of the file.
        dense_latency_ms: of the same network with every weight alive, measured interleaved.
        worst_difference: largest absolute difference from float64 PyTorch.
        reasons: why the file is not faster; empty where it is.
    """

    ticket_id: str
    sha256: str
    bytes: int
    parameters: int
    alive: int
    macs_dense: int
    macs_effective: int
    latency_ms: float
    dense_latency_ms: float
    worst_difference: float
    reasons: tuple[str, ...]


def model_of(place: Place, ticket: Ticket) -> nn.Module:
    """The network with the ticket's trained weights and masks."""
    return ticket.apply(place.network.build(), final=True)


def export(place: Place, trained: Trained) -> tuple[Exported, bool]:
    """Export a finished training to `onnx/`; one that was exported before is found again.

    Returns:
        what was measured, and whether it was measured now.
    """
    name = f"{place.network.name}-{trained.method.lower()}-seed{trained.seed}"
    path = place.directory / "onnx" / f"{name}.onnx"
    known = _known(path, trained)
    if known is not None:
        return known, False
    place.display.begin(f"{place.network.title}, seed {trained.seed}", 0, f"{trained.method} export and verification")
    path.parent.mkdir(parents=True, exist_ok=True)
    ticket = load_ticket(trained.ticket)
    report = export_onnx(model_of(place, ticket), path, example_batch(place.splits), lineage=ticket.origin)
    found = _measured(report, trained)
    write_file(path.with_suffix(".json"), json.dumps(asdict(found), indent=2, sort_keys=True) + "\n")
    return found, True


def _measured(report: ExportReport, trained: Trained) -> Exported:
    latency, worst = report.latency, report.worst_absolute
    if latency is None or worst is None or report.macs_dense is None or report.macs_effective is None:
        raise AssertionError("an export with verification and latency has measured both, and counted the operations")
    return Exported(
        ticket_id=trained.ticket_id,
        sha256=sha256_file(report.path),
        bytes=report.bytes,
        parameters=report.parameters,
        alive=report.alive,
        macs_dense=report.macs_dense,
        macs_effective=report.macs_effective,
        latency_ms=latency.ticket_ms,
        dense_latency_ms=latency.dense_ms,
        worst_difference=worst,
        reasons=() if trained.method == DENSE else report.reasons,
    )


def _known(path: Path, trained: Trained) -> Exported | None:
    """The earlier measurement, where file and ticket are still those that it was of."""
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        found = Exported(**{**record, "reasons": tuple(record["reasons"])})
        same = found.ticket_id == trained.ticket_id and found.sha256 == sha256_file(path)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if same else None
