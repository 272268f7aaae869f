"""What does `fxsparse optimize` gain on ONNX files that torch alone wrote?

Every row is a plain torch model with zeros, exported by `torch.onnx.export`, then optimised. Times are of onnxruntime,
source and result call by call in turn in one process, one thread; outputs agree by the verification of every run.

    python benchmarks/file_optimize.py [--batch 1,16] [--only NAME]
"""

from __future__ import annotations

import argparse
import logging
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fxsparse.exporters import optimize_file


class Encoder(nn.Module):
    """Four layers of a transformer, 256 wide, 8 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(256, 768), "o": nn.Linear(256, 256), "a": nn.Linear(256, 1024),
                           "b": nn.Linear(1024, 256), "n": nn.LayerNorm(256), "m": nn.LayerNorm(256)})
            for _ in range(4)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Rows [batch, 64, 256]."""
        for each in self.layers:
            q, k, v = (part.unflatten(2, (8, 32)).transpose(1, 2) for part in each["qkv"](each["n"](x)).chunk(3, -1))
            mixed = ((q @ k.transpose(2, 3)) * 32**-0.5).softmax(-1) @ v
            x = x + each["o"](mixed.transpose(1, 2).flatten(2))
            x = x + each["b"](torch.relu(each["a"](each["m"](x))))
        return x


def conv_net() -> nn.Module:
    """Six convolutions with norms at 32x32."""
    widths, parts = (3, 64, 64, 128, 128, 256, 256), []
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        parts += [nn.Conv2d(a, b, 3, stride=1 + (i in (2, 4)), padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def stack() -> nn.Module:
    """Four linears of 1024."""
    return nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(1024, 1024), nn.ReLU())))


def pixels() -> nn.Module:
    """Four 1x1 convolutions at 14x14, 256 to 1024 channels and back."""
    wide, narrow = (256, 1024), (1024, 256)
    return nn.Sequential(*(part for shape in (wide, narrow) * 2 for part in (nn.Conv2d(*shape, 1), nn.ReLU())))


def channels(model: nn.Module) -> None:
    """Half of the output channels of all layers but the last are zero, with their norms."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.BatchNorm2d)]
    for layer in layers[:-1]:
        size = layer.weight.shape[0]
        layer.weight[: size // 2] = 0
        if layer.bias is not None:
            layer.bias[: size // 2] = 0


def heads(model: nn.Module) -> None:
    """Half of the heads and of the hidden units are not read."""
    for each in model.layers:  # type: ignore[union-attr]
        each["o"].weight[:, :128] = 0
        each["b"].weight[:, :512] = 0


def shared(model: nn.Module) -> None:
    """Nine in ten inputs are dead, the same for 64 rows."""
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]:
        for rows in layer.weight.split(64):
            rows[:, torch.randperm(rows.shape[1])[: int(0.9 * rows.shape[1])]] = 0


def scattered(model: nn.Module) -> None:
    """Nine in ten weights are dead, anywhere."""
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        layer.weight[torch.rand_like(layer.weight) < 0.9] = 0


CASES: tuple[tuple[str, Callable[[], nn.Module], Callable[[nn.Module], None], tuple[int, ...]], ...] = (
    ("conv net, half the channels", conv_net, channels, (3, 32, 32)),
    ("linears, half the channels", stack, channels, (1024,)),
    ("encoder, half the heads and units", Encoder, heads, (64, 256)),
    ("linears, shared zeros 90 %", stack, shared, (1024,)),
    ("encoder, shared zeros 90 %", Encoder, shared, (64, 256)),
    ("1x1 convolutions, shared zeros 90 %", pixels, shared, (256, 14, 14)),
    ("linears, scattered zeros 90 %", stack, scattered, (1024,)),
)


def main() -> None:
    """Print one row for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    batches = [int(size) for size in options.batch.split(",")]
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    gains = "".join(f" | batch {size}" for size in batches)
    print(f"| file | MB | channels gone | lowered{gains} | float64 | seconds |")
    print("|" + "---|" * (6 + len(batches)))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, make, prune, shape in CASES:
            if options.only not in name:
                continue
            torch.manual_seed(0)
            model, source = make().eval(), Path(folder) / "a.onnx"
            with torch.no_grad():
                prune(model)
            torch.onnx.export(model, (torch.randn(2, *shape),), source, dynamo=False, input_names=["x"],
                              dynamic_axes={"x": {0: "batch"}})  # fmt: skip
            start = time.perf_counter()
            report = optimize_file(source, Path(folder) / "b.onnx", batches=batches)
            seconds, proof = time.perf_counter() - start, report.verification
            exact = f"{proof.exact.relative:.1g}" if proof is not None and proof.exact is not None else "-"
            times = "".join(f" | {t.source_ms:.2f} -> {t.written_ms:.2f} ms, {t.speedup:.2f}x" for t in report.latency)
            print(f"| {name} | {report.source_bytes / 1e6:.1f} -> {report.bytes / 1e6:.1f} | {report.channels} | "
                  f"{report.lowered} of {len(report.layers)}{times} | {exact} | {seconds:.1f} |")  # fmt: skip
    print(f"\npeak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
