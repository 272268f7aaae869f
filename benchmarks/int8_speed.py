"""What do 8 bits gain over the dense float model in stock onnxruntime, alone, with fewer channels, with shared support?

Run: python benchmarks/int8_speed.py [--batch 1 16 128] [--sparsity 0.9] [--openvino]
For each model and batch size: latency of the dense float model, of the dense 8-bit model (static QDQ), of half and a
quarter of the channels (compacted by `export_onnx`), float and 8-bit, and of shared support (lowered), float and 8-bit;
one thread, its own processor time (the machine may be busy), medians of interleaved runs in one process; and the
relative error of the 8-bit output on random data.
Latency does not depend on the values, so weights and masks are random. With --openvino also OpenVINO, float and 8-bit
file of the dense model, where it is installed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fxsparse
from fxsparse.exporters import ExportReport, Int8, Target, Verification
from fxsparse.exporters.runtime import open_session

QUICK = Verification(batch_sizes=(1, 3), draws=2)
MODELS = {
    "768->3072->768": (768, 3072, 768, 3072),
    "4x1024": (1024, 1024, 1024, 1024, 1024),
}


def chain(widths: tuple[int, ...]) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [nn.Linear(a, b)] + ([nn.ReLU()] if i + 2 < len(widths) else [])
    return nn.Sequential(*layers).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--openvino", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, widths in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            files, errors, wide = make(widths, options, Path(folder))
            print(f"{name}, shared support {options.sparsity:.0%} in groups of {options.group}")
            table(files, errors, wide, widths, options, Path(folder))


def make(
    widths: tuple[int, ...], options: argparse.Namespace, folder: Path
) -> tuple[dict[str, Path], dict[str, float], dict[str, int]]:
    """The files by name, the error of the 8-bit ones, and the width of the input that each takes."""
    files: dict[str, Path] = {}
    errors: dict[str, float] = {}
    wide: dict[str, int] = {}
    shared = fxsparse.SharedSupport(options.group)
    channel = {"pattern": fxsparse.Channel()}
    kinds: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
        "dense": (widths, {}),
        "half the hidden channels": (widths, {**channel, "sparsity": 0.5, "exclude": f"{2 * len(widths) - 4}"}),
        "half of all channels": (tuple(width // 2 for width in widths), {}),
        "a quarter of all channels": (tuple(width // 4 for width in widths), {}),
        "shared support": (widths, {"pattern": shared, "sparsity": options.sparsity}),
    }
    for name, (dims, masks) in kinds.items():
        x = torch.randn(max(options.batch), dims[0])
        model: nn.Module = chain(dims)
        if masks:
            model = fxsparse.transform(model, (x,), **masks)
        data = [(torch.randn(64, dims[0]),) for _ in range(4)]
        for kind, target in (("float", Target.STOCK), ("int8", Target.INT8)):
            label = f"{name}, {kind}"
            files[label], wide[label] = folder / f"{len(files)}.onnx", dims[0]
            more: dict[str, Any] = {"calibration": data, "int8": Int8()} if target.is_int8 else {}
            report: ExportReport = fxsparse.export_onnx(
                model, files[label], (x,), target=target, verify=QUICK, latency=False, **more
            )
            if report.agreement is not None:
                errors[label] = report.agreement.worst_error
    return files, errors, wide


def table(
    files: Mapping[str, Path],
    errors: Mapping[str, float],
    wide: Mapping[str, int],
    widths: tuple[int, ...],
    options: argparse.Namespace,
    folder: Path,
) -> None:
    """Print one row a file, one column a batch size."""
    columns: list[dict[str, float]] = []
    for batch in options.batch:
        sessions = {name: _Fed(open_session(path), wide[name], batch) for name, path in files.items()}
        if options.openvino:
            sessions |= openvino(files, widths[0], batch)
        columns.append(processor_time(sessions))
    print(f"  {'':<34}" + "".join(f"{f'batch {batch}':>22}" for batch in options.batch) + f"{'error':>9}{'bytes':>12}")
    for name in columns[0]:
        cells = [f"{column[name]:9.3f} ms {column['dense, float'] / column[name]:6.2f}x  " for column in columns]
        error = f"{errors[name]:.4f}" if name in errors else ""
        size = f"{files[name].stat().st_size:,}" if name in files else ""
        print(f"  {name:<34}" + "".join(f"{cell:>22}" for cell in cells) + f"{error:>9}{size:>12}")


def processor_time(sessions: Mapping[str, Any], seconds: float = 4.0) -> dict[str, float]:
    """Milliseconds by name: medians of the processor time of the calling thread, which is the only one."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 20:
        for name, session in sessions.items():
            start = time.thread_time()
            session.run(None, {})
            times[name].append(time.thread_time() - start)
    return {name: 1e3 * float(np.median(each)) for name, each in times.items()}


class _Fed:
    """A session with the input that it takes."""

    def __init__(self, session: Any, width: int, batch: int) -> None:
        self._session = session
        values = np.random.default_rng(0).standard_normal((batch, width)).astype(np.float32)
        self._feed = {session.get_inputs()[0].name: values}

    def run(self, _: object, __: object) -> object:
        return self._session.run(None, self._feed)


def openvino(files: Mapping[str, Path], width: int, batch: int) -> dict[str, Any]:
    """OpenVINO on the dense files, one thread; nothing where it is not installed."""
    try:
        import openvino as ov
    except ImportError:
        print("  (OpenVINO is not installed)")
        return {}

    class Compiled:
        def __init__(self, path: Path) -> None:
            self._model = ov.Core().compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": 1})
            self._input = [np.random.default_rng(0).standard_normal((batch, width)).astype(np.float32)]

        def run(self, _: object, __: object) -> object:
            return self._model(self._input)

    return {f"OpenVINO, {name}": Compiled(files[name]) for name in ("dense, float", "dense, int8")}


if __name__ == "__main__":
    main()
