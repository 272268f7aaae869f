"""The wide network's files: dense and ticket, float and 8-bit, timed side by side in stock onnxruntime."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fxsparse.demo.settings import WideSettings, example_batch
from fxsparse.demo.train import Place
from fxsparse.demo.wide import WideTrained
from fxsparse.exporters import ExportReport, Target, export_onnx
from fxsparse.exporters.bench import bench_files
from fxsparse.exporters.runtime import open_session
from fxsparse.lottery import Ticket
from fxsparse.lottery.canonical import sha256_file
from fxsparse.lottery.run_directory import write_file

NAMES = ("dense float", "ticket float", "dense int8", "ticket int8")
CALIBRATION = 256  # training samples from which the ranges of the activations are taken
SECONDS = 1.5  # at each batch size


@dataclass(frozen=True)
class WideFile:
    """One of the files.

    Attributes:
        name: one of NAMES.
        onnx: its path in the run directory.
        sha256: of the file.
        bytes: of the file.
        test_accuracy: in onnxruntime, as a fraction.
        latency_ms: median milliseconds by batch size, as text.
    """

    name: str
    onnx: str
    sha256: str
    bytes: int
    test_accuracy: float
    latency_ms: dict[str, float]


@dataclass(frozen=True)
class WideFiles:
    """All four files, and what became of each layer in the ticket's float file.

    Attributes:
        tickets: ids of the dense and the sparse ticket that were exported.
        files: in the order of NAMES.
        layers: name, shape, density, form, gain and reason of each pruned weight.
    """

    tickets: tuple[str, str]
    files: tuple[WideFile, ...]
    layers: tuple[dict[str, Any], ...]


def export_wide(place: Place, wide: WideSettings, trained: WideTrained) -> tuple[WideFiles, bool]:
    """Export and time the networks of one seed; files that were timed before are found again.

    Returns:
        what was measured, and whether it was measured now.
    """
    record = place.directory / "onnx" / f"{place.network.name}-speed.json"
    tickets = (trained.dense.ticket_id, trained.shared.ticket_id)
    if (known := _known(record, tickets, place.directory)) is not None:
        return known, False
    (place.directory / "onnx").mkdir(parents=True, exist_ok=True)
    paths, reports = [], []
    for name in NAMES:
        place.display.begin(place.network.title, 0, f"export and verification: {name}")
        path = place.directory / "onnx" / f"{place.network.name}-{name.replace(' ', '-')}.onnx"
        reports.append(_export(place, name, trained.shared if "ticket" in name else trained.dense, path))
        paths.append(path)
    place.display.begin(place.network.title, 0, "latency")
    times = bench_files(paths, batches=wide.batches, seconds=SECONDS)
    files = tuple(
        WideFile(
            name,
            path.relative_to(place.directory).as_posix(),
            sha256_file(path),
            path.stat().st_size,
            _accuracy(place, path),
            {str(row.batch): row.p50_ms for row in times.rows if Path(row.path) == path},
        )
        for name, path in zip(NAMES, paths, strict=True)
    )
    found = WideFiles(tickets, files, _layers(reports[NAMES.index("ticket float")]))
    write_file(record, json.dumps(asdict(found), indent=2, sort_keys=True) + "\n")
    return found, True


def _export(place: Place, name: str, ticket: Ticket, path: Path) -> ExportReport:
    model: nn.Module = ticket.apply(place.network.build(), final=True)
    int8 = name.endswith("int8")
    return export_onnx(
        model,
        path,
        example_batch(place.splits),
        target=Target.INT8 if int8 else Target.STOCK,
        calibration=[place.splits.train.inputs[:CALIBRATION]] if int8 else None,
        lower=True if name.startswith("ticket") else None,
        latency=False,
        lineage=ticket.origin,
    )


def _accuracy(place: Place, path: Path) -> float:
    session, test = open_session(path), place.splits.test
    (logits,) = session.run(None, {session.get_inputs()[0].name: test.inputs.numpy()})
    return float(np.mean(logits.argmax(1) == test.labels.numpy()))


def _layers(report: ExportReport) -> tuple[dict[str, Any], ...]:
    shapes = {layer.name: list(layer.shape) for layer in report.layers}
    return tuple(
        {
            "name": form.name,
            "shape": shapes[form.name],
            "density": form.density,
            "form": form.form,
            "gain": form.gain,
            "reason": form.reason,
        }
        for form in report.forms
    )


def _known(record: Path, tickets: tuple[str, str], directory: Path) -> WideFiles | None:
    """The earlier measurement, where files and tickets are still those that it was of."""
    try:
        read = json.loads(record.read_text(encoding="utf-8"))
        files = tuple(WideFile(**entry) for entry in read["files"])
        found = WideFiles(tuple(read["tickets"]), files, tuple(read["layers"]))
        same = found.tickets == tickets and [file.name for file in files] == list(NAMES)
        same = same and all(file.sha256 == sha256_file(directory / file.onnx) for file in files)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if same else None
