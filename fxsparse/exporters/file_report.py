"""What was done to an ONNX file, and how it was shown to compute the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxsparse.exporters.file_choose import LayerReport
    from fxsparse.exporters.file_compare import Comparison


@dataclass(frozen=True)
class FileLatency:
    """Time of one call of the source, and of what was made of it.

    Attributes:
        batch: batch size of the call.
        source_ms: median milliseconds of the source.
        compacted_ms: of the file with folded constants and without the removed channels.
        written_ms: of the file that was written.
        threads: threads of onnxruntime.
        runs: calls of each, interleaved.
    """

    batch: int
    source_ms: float
    compacted_ms: float
    written_ms: float
    threads: int
    runs: int

    @property
    def speedup(self) -> float:
        """Source over written: above 1 the written file is faster."""
        return self.source_ms / self.written_ms

    def __str__(self) -> str:
        return (
            f"batch {self.batch}: {self.source_ms:.3f} -> {self.written_ms:.3f} ms ({self.speedup:.2f}x), compacted "
            f"alone {self.compacted_ms:.3f} ms; {self.threads} thread, medians of {self.runs} interleaved runs"
        )


@dataclass(frozen=True)
class FileReport:
    """The result of `optimize_file`; `str` gives a text.

    Attributes:
        source: the file that was read.
        path: the file that was written.
        source_bytes: size of the source, with its data files.
        bytes: size of what was written, with its data file.
        source_nodes: nodes of the source's main graph.
        nodes: nodes of the written one.
        folded: constants that took the place of nodes.
        shared: initializers that went because another holds the same.
        channels: channels that were removed.
        resized: shapes before and after of the weights that were cut.
        layers: what was decided for every product with a constant weight.
        stops: what kept constant channels in the graph.
        left: operators without a rule, which are as they were, with their number.
        verification: differences from the source; None for ``verify=False``.
        latency: times at each batch size; empty for ``latency=False``.
        notes: what was decided on the way.
    """

    source: Path
    path: Path
    source_bytes: int
    bytes: int
    source_nodes: int
    nodes: int
    folded: int
    shared: int
    channels: int
    resized: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    layers: tuple[LayerReport, ...]
    stops: tuple[str, ...]
    left: Mapping[str, int]
    verification: Comparison | None
    latency: tuple[FileLatency, ...]
    notes: tuple[str, ...]

    @property
    def lowered(self) -> int:
        """Number of products that became gathers and small dense products."""
        return sum(layer.group is not None for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """All figures, as plain JSON values."""
        found = asdict(self)
        return found | {"source": str(self.source), "path": str(self.path)}

    def __str__(self) -> str:
        left = ", ".join(f"{count} {name}" for name, count in self.left.items())
        rows = [
            ("source", f"{self.source}: {self.source_bytes:,} bytes, {self.source_nodes} nodes"),
            ("written", f"{self.path}: {self.bytes:,} bytes, {self.nodes} nodes"),
            ("constants", f"{self.folded} folded, {self.shared} stored once instead of again"),
            ("channels", f"{self.channels} removed"),
            *(("", f"{name}  {_shape(old)} -> {_shape(new)}") for name, (old, new) in self.resized.items()),
            ("lowered", f"{self.lowered} of {len(self.layers)} products with a constant weight"),
            *(("", str(layer)) for layer in self.layers),
            *(("held by", stop) for stop in self.stops),
            *([("left as is", left)] if left else []),
            ("verified", str(self.verification) if self.verification else "no"),
            *(("latency", str(each)) for each in self.latency),
            *(("note", note) for note in self.notes),
        ]
        return "\n".join(f"{label:<11} {text}".rstrip() for label, text in rows)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
