"""What do curvature products and exact diagonals cost, in units of one forward and backward pass of the same model?

Run: python benchmarks/ggn_speed.py [--seconds 3] [--peers]
Everything in one process, one thread, freed memory kept (see steady_memory.py), float32, cross-entropy over 10 classes;
quantities and the unit are timed in turn in processor time, and the ratio of medians is printed. With --peers the same
is asked of other packages that are installed (see curvature_peers.py); what they refuse is left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import curvature_peers
import torch
from steady_memory import keep_freed_memory
from torch import nn
from torch.nn import functional

from fxsparse.curvature.operator import CurvatureOperator

CLASSES = 10


class Layer(nn.Module):
    """A transformer layer with fused attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual attention, residual layers."""
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width)
        x = x + self.out(mixed)
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Tokens, two layers, the mean over positions."""

    def __init__(self, width: int = 64, positions: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(100, width)
        self.positions = nn.Parameter(0.02 * torch.randn(positions, width))
        self.layers = nn.Sequential(Layer(width, 4), Layer(width, 4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of sequences of tokens."""
        """Logits of the mean."""
        return self.head(self.norm(self.layers(self.tokens(tokens) + self.positions)).mean(1))


def cnn() -> nn.Module:
    """Three convolutions."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()),
        nn.Linear(1024, CLASSES),
    )


def mlp() -> nn.Module:
    """784-512-256-10."""
    sizes = (784, 512, 256)
    layers = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(256, CLASSES))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "CNN, 64 x 3 x 16 x 16": (cnn, lambda: torch.randn(64, 3, 16, 16)),
    "MLP 784-512-256-10, 128": (mlp, lambda: torch.randn(128, 784)),
    "transformer d=64 T=64, 32": (Transformer, lambda: torch.randint(100, (32, 64))),
}


def ours(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What is timed of fxsparse."""
    op = CurvatureOperator(model, None, "cross_entropy", (x, y), check=False)
    hessian = CurvatureOperator(model, None, "cross_entropy", (x, y), "hessian", check=False)
    empirical = CurvatureOperator(model, None, "cross_entropy", (x, y), "empirical", check=False)
    v = torch.randn(op.space.size)
    return {
        "fxsparse GGN-vp": lambda: op.mv(v),
        "fxsparse Hessian-vp": lambda: hessian.mv(v),
        "fxsparse quadratic form": lambda: op.quadform(v),
        "fxsparse exact diagonal": lambda: op.diag(),
        "fxsparse sketched diagonal": lambda: op.diag("sketch"),
        "fxsparse empirical diagonal": lambda: empirical.diag(),
    }


def unit(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    """One forward and backward pass."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        functional.cross_entropy(model(x), y).backward()

    return step


def medians(steps: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Milliseconds of the second of two calls; all in turn until the time is over, at least 3 rounds after one."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    start, rounds = time.perf_counter(), 0
    while rounds < 4 or time.perf_counter() - start < seconds:
        for name, step in steps.items():
            step()  # the allocator is then in the state in which this step leaves it
            begin = time.process_time()
            step()
            times[name].append(time.process_time() - begin)
        rounds += 1
    return {name: 1e3 * statistics.median(each[1:]) for name, each in times.items()}


def others(make: Callable[[], nn.Module], x: torch.Tensor, y: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What is timed of others."""
    exact = {name: each for name, each in curvature_peers.DIAGONALS.items() if "exact" in name}
    return curvature_peers.steps({**curvature_peers.PRODUCTS, **exact}, lambda: make().eval(), x, y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--peers", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    print(f"{'model':<28} {'quantity':<34} {'ms':>9} {'units':>7}")
    for name, (make, inputs) in MODELS.items():
        torch.manual_seed(0)
        model, x = make().eval(), inputs()
        y = torch.randint(CLASSES, (len(x),))
        steps = {"unit": unit(model, x, y), **ours(model, x, y), **(others(make, x, y) if options.peers else {})}
        found = medians(steps, options.seconds)
        for what, value in found.items():
            print(f"{name:<28} {what:<34} {value:>9.2f} {value / found['unit']:>7.2f}")


if __name__ == "__main__":
    main()
