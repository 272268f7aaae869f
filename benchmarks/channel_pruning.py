"""Structured pruning: what does it cost, how exact is it, how fast is the result, next to Torch-Pruning at equal MACs?

Run: python benchmarks/channel_pruning.py [compact scale peers accuracy]     (all by default)
  compact   seconds and peak memory of compacting, and of planning, a ResNet-50-shaped network at 224x224
  scale     seconds of compaction against the nodes of the operator graph
  peers     ResNet-50-shaped at 64x64, half of the MACs: seconds to prune, parameters, latency in onnxruntime (float32,
            one thread, medians of interleaved runs), worst difference from the network with the channels masked
  accuracy  a small residual net on the digits of scikit-learn at a third of the MACs: accuracy pruned, and fine-tuned
Torch-Pruning is compared where it can be imported (pip install torch-pruning).
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import io
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse.data import digits
from fxsparse.exporters.latency_table import measure_latency_table
from fxsparse.exporters.runtime import interleaved, open_session
from fxsparse.graph import count, operator_graph
from fxsparse.models import small_conv_net
from fxsparse.planning.prune_budgets import Budget, LatencyBudget, MacBudget, ParameterBudget
from fxsparse.planning.prune_channels import plan_channels

try:
    peer: Any = importlib.import_module("torch_pruning")
except ImportError:
    peer = None


class Bottleneck(nn.Module):
    """The block of ResNet-50 (He et al., CVPR 2016)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.short = nn.Sequential(nn.Conv2d(inputs, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        if stride == 1 and inputs == out:
            self.short = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return torch.relu(self.norm3(self.conv3(y)) + self.short(x))


def resnet50() -> nn.Module:
    """25.6 million parameters, random."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for blocks, width, stride in ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, stride if block == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)).eval()


class Step(nn.Module):
    """x + W2 relu(norm(W1 x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(width, 2 * width), nn.BatchNorm1d(2 * width), nn.Linear(
            2 * width, width
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """One step."""
        return x + self.second(torch.relu(self.norm(self.first(x))))


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compaction() -> None:
    """Run first: the peak of memory is that of the process."""
    tiny = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    fxsparse.compact(tiny, (torch.randn(1, 3, 8, 8),))  # imports what is imported on first use
    model, x = resnet50(), (torch.randn(1, 3, 224, 224),)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    with torch.no_grad():
        for block in (each for each in model.modules() if isinstance(each, Bottleneck)):
            for conv, norm in ((block.conv1, block.norm1), (block.conv2, block.norm2)):
                half = conv.weight.shape[0] // 2
                for tensor in (conv.weight, norm.weight, norm.bias):
                    tensor[:half] = 0.0
        model(*x)
    gc.collect()
    before, cpu, wall = peak_mib(), time.process_time(), time.perf_counter()
    fxsparse.compact(model, x)
    grown = peak_mib() - before
    print(
        f"compact: {time.process_time() - cpu:.1f} s of CPU time, {time.perf_counter() - wall:.1f} s on the clock; ",
        end="",
    )
    print(f"memory grew by {grown:.0f} MiB, {grown / size:.1f} times the model ({size:.0f} MiB)")
    model, cpu = resnet50(), time.process_time()
    plan = plan_channels(model, x, budget=MacBudget(0.5))
    planned, cpu = time.process_time() - cpu, time.process_time()
    plan.apply()
    print(f"plan: {planned:.1f} s, apply: {time.process_time() - cpu:.1f} s of CPU time")


def scale(depths: tuple[int, ...] = (100, 400, 1600)) -> None:
    """Compaction of chains of steps, half of whose hidden channels are dead."""
    for depth in depths:
        torch.manual_seed(0)
        model, x = (
            nn.Sequential(*[Step(16) for _ in range(depth)], nn.Linear(16, 4)).double().eval(),
            torch.randn(2, 16),
        )
        with torch.no_grad():
            for step in list(model)[:-1]:
                step.first.weight[:16] = 0.0  # type: ignore[union-attr, operator]  # a Step
        nodes, cpu = len(operator_graph(model, (x.double(),), routes=("recorder",))), time.process_time()
        fxsparse.compact(model, (x.double(),))
        seconds = time.process_time() - cpu
        print(f"{nodes:>6} nodes: {seconds:6.1f} s of CPU time, {1e3 * seconds / nodes:.2f} ms a node")


def session(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """A call of onnxruntime on the exported model."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), (x,), buffer, dynamo=False, input_names=["x"])
    opened, feed = open_session(buffer.getvalue()), {"x": x.numpy()}
    return lambda: opened.run(None, feed)


def by_peer(model: nn.Module, x: Tensor, density: float, keep: nn.Module) -> nn.Module:
    """Torch-Pruning, magnitudes, down to a fraction of the MACs."""
    small = copy.deepcopy(model)
    ignored = [new for old, new in zip(model.modules(), small.modules(), strict=True) if old is keep]
    pruner = peer.pruner.BasePruner(
        small, x, importance=peer.importance.GroupMagnitudeImportance(p=2), global_pruning=True, isomorphic=True,
        pruning_ratio=0.95, iterative_steps=100, ignored_layers=ignored,
    )  # fmt: skip
    whole = count(model, (x,)).macs_dense
    while count(small, (x,)).macs_dense > density * whole:
        pruner.step()
    return small


def ours(model: nn.Module, x: Tensor, budget: Budget, round_to: int = 1) -> tuple[nn.Module, float]:
    """The pruned model, and its worst difference from the masked one in float64."""
    plan = plan_channels(model, (x,), budget=budget, round_to=round_to)
    small = plan.apply()
    with torch.no_grad():
        masked, found = plan.masked().double()(x.double()), copy.deepcopy(small).double()(x.double())
    return small, float((masked - found).abs().max() / masked.abs().max())


def peers() -> None:
    """Speed and exactness at half of the MACs."""
    model, x = resnet50(), torch.randn(1, 3, 64, 64)
    began = time.perf_counter()
    table = measure_latency_table(model, (x,))
    print(f"latency table of {len(table.grids)} products, {table.runtime}: {time.perf_counter() - began:.0f} s")
    makers: dict[str, Callable[[], tuple[nn.Module, float | None]]] = {
        "dense": lambda: (model, None),
        "fxsparse, MACs": lambda: ours(model, x, MacBudget(0.5)),
        "fxsparse, MACs, round_to 8": lambda: ours(model, x, MacBudget(0.5), 8),
        "fxsparse, latency": lambda: ours(model, x, LatencyBudget(0.5, table), 8),
        "fxsparse, parameters": lambda: ours(model, x, ParameterBudget(0.5), 8),
    }
    if peer is not None:
        makers["Torch-Pruning, MACs"] = lambda: (by_peer(model, x, 0.5, model[-1]), None)  # type: ignore[index]
    rows: dict[str, tuple[nn.Module, float, float | None]] = {}
    for name, make in makers.items():
        began = time.perf_counter()
        small, worst = make()
        rows[name] = small, time.perf_counter() - began, worst
    times = interleaved({name: session(small, x) for name, (small, _, _) in rows.items()}, 20.0)
    print(f"{'':<28} {'seconds':>8} {'parameters':>11} {'MACs':>14} {'ms':>7} {'speed':>6} {'worst |d|':>10}")
    dense = statistics.median(times["dense"])
    for name, (small, seconds, worst) in rows.items():
        cost, ms = count(small, (x,)), 1e3 * statistics.median(times[name])
        shown = "-" if worst is None else f"{worst:.1e}"
        print(
            f"{name:<28} {seconds:>8.1f} {cost.parameters:>11,} {cost.macs_dense:>14,} {ms:>7.2f} "
            f"{1e3 * dense / ms:>5.2f}x {shown:>10}"
        )


def fit(model: nn.Module, data: Any, epochs: int, seed: int) -> None:
    """AdamW, cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(data.train.inputs[batch]), data.train.labels[batch]).backward()
            optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, split: Any) -> float:
    """Fraction of right answers."""
    return float((model.eval()(split.inputs).argmax(1) == split.labels).float().mean())


def accuracies(density: float = 1 / 3, seeds: int = 3) -> None:
    """The mean over seeds."""
    data = digits()
    x = data.train.inputs[:2]
    found: dict[str, list[tuple[float, float, int]]] = {}
    dense: list[float] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = small_conv_net(1, 10, 8)
        fit(model, data, 12, seed)
        dense.append(accuracy(model, data.test))
        smaller = {"fxsparse": ours(model, x, MacBudget(density))[0]}
        if peer is not None:
            smaller["Torch-Pruning"] = by_peer(model, x, density, last_linear(model))
        for name, small in smaller.items():
            before = accuracy(small, data.test)
            fit(small, data, 6, seed)
            found.setdefault(name, []).append((before, accuracy(small, data.test), count(small, (x,)).macs_dense))
    print(f"dense: {statistics.mean(dense):.4f}, {count(model, (x,)).macs_dense:,} MACs; means over {seeds} seeds")
    for name, rows in found.items():
        before, after, macs = (statistics.mean(column) for column in zip(*rows, strict=True))
        print(f"{name:<14} pruned {before:.4f}, fine-tuned {after:.4f}, {macs:,.0f} MACs")


def last_linear(model: nn.Module) -> nn.Module:
    """The layer whose outputs are the classes."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


PARTS: dict[str, Callable[[], None]] = {
    "compact": compaction,
    "scale": scale,
    "peers": peers,
    "accuracy": accuracies,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help="what to measure")
    torch.set_num_threads(1)
    if peer is None:
        print("Torch-Pruning is not installed and left out")
    for part in parser.parse_args().parts or PARTS:
        print(f"\n{part}")
        PARTS[part]()


if __name__ == "__main__":
    main()
