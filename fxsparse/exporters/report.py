"""What an export made and measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fxsparse.exporters.agreement import Agreement
from fxsparse.exporters.forms import LayerForm
from fxsparse.exporters.latency import Latency
from fxsparse.exporters.metadata import Layer
from fxsparse.exporters.quantize import Quantized
from fxsparse.exporters.targets import Exporter as Exporter
from fxsparse.exporters.targets import Target
from fxsparse.exporters.verify import Parity


@dataclass(frozen=True)
class ExportReport:
    """The result of `export_onnx`; `str` gives a table.

    Attributes:
        path: the file.
        target: the runtime that it is made for.
        variant: what was done to the model before it was exported, in words.
        opset: its operator set.
        batch: "dynamic", or the fixed size; `notes` say why it is fixed.
        exporter: how the graph was taken from Python.
        switches: what was set on the exported copy so that it could be exported.
        bytes: size of the file, with that of its weights where they lie in a file of their own.
        data: the file of the weights, beside `path`; None where `path` holds them.
        dense_bytes: size of the same float model with every weight alive and nothing removed, without metadata;
            reckoned from the sizes of its parameters where a rewritten model was exported and no latency measured.
        parameters: entries of all parameters, each once.
        alive: those that no mask holds at zero.
        macs_dense: multiply-accumulates of one sample with every weight alive; None where no use could be counted.
        macs_effective: those with an alive weight.
        layers: the masked weights.
        forms: what became of each of them in the file, what that gains, and why.
        quantized: what is 8-bit; None for a float target.
        agreement: how close the 8-bit file is to the model; None for a float target and for ``verify=False``.
        sparse: initializers that are stored sparse.
        verification: differences of the float file from PyTorch; None for ``verify=False``.
        latency: dense against ticket in onnxruntime; None for ``latency=False``.
        reasons: why the ticket is not faster than the dense model; empty where it is, or where nothing was measured.
        notes: what was left out or decided on the way.
    """

    path: Path
    target: Target
    opset: int
    batch: str
    exporter: Exporter
    switches: tuple[str, ...]
    bytes: int
    dense_bytes: int
    parameters: int
    alive: int
    macs_dense: int | None
    macs_effective: int | None
    layers: tuple[Layer, ...]
    verification: Parity | None
    latency: Latency | None
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    variant: str = ""
    data: Path | None = None
    forms: tuple[LayerForm, ...] = ()
    quantized: Quantized | None = None
    agreement: Agreement | None = None
    sparse: tuple[str, ...] = ()

    @property
    def density(self) -> float:
        """Alive fraction of the masked weights together; 1 without masks."""
        numel = sum(layer.numel for layer in self.layers)
        return sum(layer.alive for layer in self.layers) / numel if numel else 1.0

    @property
    def worst_absolute(self) -> float | None:
        """Largest absolute difference from PyTorch; None where it was not verified."""
        return None if self.verification is None else self.verification.worst_absolute

    @property
    def worst_relative(self) -> float | None:
        """Largest difference relative to the output's largest value; None where it was not verified."""
        return None if self.verification is None else self.verification.worst_relative

    def __str__(self) -> str:
        batch = "dynamic batch" if self.batch == "dynamic" else f"fixed batch {self.batch}"
        macs = "not counted"
        if self.macs_dense is not None:
            macs = f"{self.macs_effective:,} of {self.macs_dense:,} for one sample"
        way = ", ".join([self.exporter.value, batch, *(f"with {switch}" for switch in self.switches)])
        rows = [
            ("file", f"{self.path} (opset {self.opset}, for {self.target.value} onnxruntime)"),
            ("exported", way),
            *([("model", self.variant)] if self.variant else []),
            *([("weights in", str(self.data))] if self.data else []),
            ("bytes", f"{self.bytes:,} (dense {self.dense_bytes:,})"),
            ("parameters", f"{self.alive:,} of {self.parameters:,} alive"),
            ("masked", f"{len(self.layers)} weights, density {self.density:.4f}"),
            ("MACs", macs),
            ("verified", str(self.verification) if self.verification else "no"),
            *([("int8", str(self.quantized))] if self.quantized else []),
            *([("int8 error", str(self.agreement) if self.agreement else "not measured")] if self.quantized else []),
            *([("sparse", f"{len(self.sparse)} initializers are stored sparse")] if self.sparse else []),
            ("latency", str(self.latency) if self.latency else "not measured"),
            *(("not faster", reason) for reason in self.reasons),
            *(("note", note) for note in self.notes),
        ]
        lines = [f"{label:<11} {text}" for label, text in rows]
        return "\n".join([*lines, *_table(self.layers, self.forms)])


def _table(layers: tuple[Layer, ...], forms: tuple[LayerForm, ...]) -> list[str]:
    """The per-layer table."""
    if not layers:
        return []
    known = {form.name: form for form in forms}
    rows = [("layer", "shape", "density", "pattern", "form", "gain", "reason")]
    for layer in layers:
        form = known.get(layer.name)
        gain = "" if form is None or form.gain is None else f"{form.gain:.2f}x"
        gain += "" if not gain or form is None or form.measured else " expected"
        rows.append(
            (
                layer.name,
                "x".join(map(str, layer.shape)),
                f"density {layer.density:.4f}",
                f"{layer.pattern}, by {layer.route}",
                form.form if form is not None else "dense",
                gain or "-",
                form.reason if form is not None else "",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
