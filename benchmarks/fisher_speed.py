"""What does the Fisher cost? One collection, in units of one forward and backward pass of the same model.

Run: python benchmarks/fisher_speed.py [--seconds 2] [--peers] [--memory]
Variants, in turn in one process, in an order that changes from round to round, one thread, freed memory kept (see
steady_memory.py); the least processor time of each, as a multiple of the unit:
  step               forward and backward with all gradients: the unit
  group <kind>       `FisherCollector.update`, groups by module type; it is all that is needed beside the step
  element <kind>     the same with every entry a group, without variances
  step with taps     the step of an instrumented graph: gradients and group statistics together
With --peers: single entries by other packages that are installed (see curvature_peers.py).
With --memory: peak memory of processes that train a transformer of 100 M parameters for two steps, that collect, that
do both and that train with taps; and how much smaller the stored statistics are than a value for each parameter.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import curvature_peers
import torch
import torch.nn.functional as F
from steady_memory import keep_freed_memory, plain_environment
from torch import Tensor, nn

from fxsparse.curvature import FisherCollector
from fxsparse.curvature.taps_statistic import instrument_fisher


class Transformer(nn.Module):
    """Pre-norm blocks with a fused projection and the fused attention operator."""

    def __init__(self, width: int = 128, heads: int = 4, layers: int = 2, vocabulary: int = 100, classes: int = 10):
        super().__init__()
        self.heads, self.embedding = heads, nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:  # noqa: D102  (a module)
        x = self.embedding(tokens)
        n, t, d = x.shape
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm1"](x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)
            x = x + block["out"](mixed)
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x))))
        return self.head(x.mean(1))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "MLP 784-512-512-10, batch 128": (mlp, lambda: torch.randn(128, 784)),
    "CNN 3 convolutions 32x32, batch 64": (cnn, lambda: torch.randn(64, 3, 32, 32)),
    "transformer width 128, 2 blocks, T=64, batch 32": (Transformer, lambda: torch.randint(0, 100, (32, 64))),
}


def variants(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    def step(module: nn.Module) -> None:
        module.zero_grad(set_to_none=True)
        F.cross_entropy(module(x), y).backward()

    found: dict[str, Callable[[], object]] = {"step": lambda: step(model)}
    for kind in ("empirical", "sketch", "mc", "true"):
        collector = FisherCollector(model, "cross_entropy", kind)
        found[f"group {kind}"] = lambda collector=collector: collector.update((x, y))
    for kind in ("empirical", "sketch", "true"):
        collector = FisherCollector(model, "cross_entropy", kind, groups="element", variance=False)
        found[f"element {kind}"] = lambda collector=collector: collector.update((x, y))
    tapped = instrument_fisher(model, (x,)).module
    found["step with taps"] = lambda: step(tapped)
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    weights = instrument_fisher(model, (x,), parameters=matrices).module
    found["step with taps, matrices"] = lambda: step(weights)
    return found


def measure(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """The least processor time of each, taken in turns, whose order changes: what ran before empties caches."""
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()
    end, order, source = time.perf_counter() + seconds * len(runs), list(runs), random.Random(0)
    while time.perf_counter() < end:
        source.shuffle(order)
        for name in order:
            start = time.process_time()
            runs[name]()
            best[name] = min(best[name], time.process_time() - start)
    return best


_MEMORY = """
import sys, torch
sys.path.insert(0, {folder!r})
import fisher_speed as bench
print(bench.peak(sys.argv[1]))
"""


def peak(what: str) -> str:
    """Peak resident memory in MiB of two training steps, with or without a collection, and the numbers of values."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer(768, 12, 12, 20_000)
    x, y = torch.randint(0, 20_000, (4, 128)), torch.randint(0, 10, (4,))
    stored = 0
    if what == "collect":
        collector = FisherCollector(model)
        collector.update((x, y))
        stored = sum(value.numel() for value in collector.get().values())
    module = instrument_fisher(model, (x,)).module if what == "taps" else model
    optimizer, collector = torch.optim.SGD(model.parameters(), 1e-3), FisherCollector(model)
    for _ in range(0 if what == "collect" else 2):
        module.zero_grad(set_to_none=True)
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        if what == "both":
            module.zero_grad(set_to_none=True)
            collector.update((x, y))
    total = sum(parameter.numel() for parameter in model.parameters())
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} {total} {stored}"


def memory() -> None:
    """Steps alone; a collection alone; a collection between two steps; steps with taps."""
    folder = __file__.rpartition("/")[0]
    results = {}
    for what in ("step", "collect", "both", "taps"):
        command = [sys.executable, "-c", _MEMORY.format(folder=folder), what]
        done = subprocess.run(command, env=plain_environment(), capture_output=True, text=True, check=True)
        results[what] = [float(value) for value in done.stdout.split()]
    step, values = results["step"][0], results["collect"]
    print(f"\n{values[1] / 1e6:.0f} M parameters, peak memory of two steps {step:.0f} MiB")
    for what in ("collect", "both", "taps"):
        print(f"  {what:8} {results[what][0]:6.0f} MiB ({results[what][0] / step - 1:+.1%})")
    print(f"  stored values 1 : {values[1] / values[2]:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each variant")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    for title, (make, inputs) in MODELS.items():
        torch.manual_seed(0)
        model, x = make(), inputs()
        y = torch.randint(0, 10, (len(x),))
        runs = variants(model, x, y)
        if options.peers:
            runs |= curvature_peers.steps(curvature_peers.DIAGONALS, make, x, y)
        times = measure(runs, options.seconds)
        print(f"\n{title}: unit {times['step'] * 1e3:.1f} ms")
        for name, value in times.items():
            print(f"  {name:26} {value / times['step']:6.2f}")
    if options.memory:
        memory()


if __name__ == "__main__":
    main()
