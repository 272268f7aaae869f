"""What an export made and measured."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

from fxsparse.exporters.latency import Latency
from fxsparse.exporters.metadata import Layer
from fxsparse.exporters.verify import Parity


class Exporter(enum.Enum):
    """How the graph was taken from Python."""

    EXPORT = "torch.export"
    """``torch.onnx.export(dynamo=True)``."""
    TRACE = "legacy exporter"
    """``torch.onnx.export(dynamo=False)``: a trace of the example, accepted only after verification."""


class Target(enum.Enum):
    """The runtime that a file is made for."""

    STOCK = "stock"
    """onnxruntime as it is installed, standard operators, dense tensors with zeros."""


@dataclass(frozen=True)
class ExportReport:
    """The result of `export_onnx`; `str` gives a table.

    Attributes:
        path: the file.
        target: the runtime that it is made for.
        opset: its operator set.
        batch: "dynamic", or the fixed size; `notes` say why it is fixed.
        exporter: how the graph was taken from Python.
        switches: what was set on the exported copy so that it could be exported.
        bytes: size of the file.
        dense_bytes: size of the same model with every weight alive.
        parameters: entries of all parameters, each once.
        alive: those that no mask holds at zero.
        macs_dense: multiply-accumulates of one sample with every weight alive; None where no use could be counted.
        macs_effective: those with an alive weight.
        layers: the masked weights.
        verification: differences from PyTorch; None for ``verify=False``.
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
            ("bytes", f"{self.bytes:,} (dense {self.dense_bytes:,})"),
            ("parameters", f"{self.alive:,} of {self.parameters:,} alive"),
            ("masked", f"{len(self.layers)} weights, density {self.density:.4f}"),
            ("MACs", macs),
            ("verified", str(self.verification) if self.verification else "no"),
            ("latency", str(self.latency) if self.latency else "not measured"),
            *(("not faster", reason) for reason in self.reasons),
            *(("note", note) for note in self.notes),
        ]
        lines = [f"{label:<11} {text}" for label, text in rows]
        width = max((len(layer.name) for layer in self.layers), default=0)
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            lines.append(
                f"  {layer.name:<{width}}  {shape:<14} density {layer.density:.4f}  {layer.pattern}, by {layer.route}"
            )
        return "\n".join(lines)
