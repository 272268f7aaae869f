"""Is an exported ticket faster than the dense model in stock onnxruntime? And is it what PyTorch computes?

Run: python benchmarks/export_latency.py [--sparsity 0.8 0.9 0.95] [--batch 1 16 128]
For each model, pattern, sparsity and batch size: latency dense and ticket (one thread, medians of interleaved runs in
one process), their ratio, bytes, effective MACs, and the worst difference from float64 PyTorch. Masks are by magnitude
on random weights: latency does not depend on the values.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import fxsparse
from fxsparse.models import lenet_300_100, small_conv_net

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear 768->3072": (lambda: nn.Sequential(nn.Linear(768, 3072)), (768,)),
    "LeNet-300-100": (lambda: lenet_300_100(784, 10), (784,)),
    "small conv net 32x32": (lambda: small_conv_net(3, 10, 32), (3, 32, 32)),
}
PATTERNS = (fxsparse.Unstructured(), fxsparse.SharedSupport(64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 128])
    options = parser.parse_args()
    torch.manual_seed(0)
    print(
        f"{'model':<21} {'pattern':<20} {'sparsity':>8} {'batch':>5} {'dense ms':>9} {'ticket ms':>9} {'ratio':>6} "
        f"{'bytes':>10} {'MACs alive':>22} {'worst |d|':>9}"
    )
    for name, (make, shape) in MODELS.items():
        model = make()
        for pattern in PATTERNS:
            for sparsity in options.sparsity:
                try:
                    sparse = fxsparse.transform(model, (torch.randn(2, *shape),), sparsity=sparsity, pattern=pattern)
                except fxsparse.ConfigError as error:
                    print(f"{name:<21} {pattern!s:<20} refused: {error}")
                    break
                for batch in options.batch:
                    row(name, sparse, str(pattern), sparsity, torch.randn(batch, *shape))


def row(name: str, sparse: nn.Module, pattern: str, sparsity: float, example: torch.Tensor) -> None:
    """Export once and print one line."""
    with tempfile.TemporaryDirectory() as folder:
        report = fxsparse.export_onnx(sparse, Path(folder) / "ticket.onnx", (example,))
    assert report.latency is not None
    macs = f"{report.macs_effective:,} of {report.macs_dense:,}"
    print(
        f"{name:<21} {pattern:<20} {sparsity:>8} {len(example):>5} {report.latency.dense_ms:>9.3f} "
        f"{report.latency.ticket_ms:>9.3f} {report.latency.speedup:>6.2f} {report.bytes:>10,} {macs:>22} "
        f"{report.worst_absolute:>9.1e}"
    )
    if report.reasons and len(example) == 1:
        print(f"{'':<21} not faster: {'; '.join(report.reasons)}")


if __name__ == "__main__":
    main()
