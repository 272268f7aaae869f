"""What does a mask cost in training? One step (forward, backward, optimizer) of the same model, dense and masked.

Run: python benchmarks/mask_overhead.py [--seconds 2] [--sparsity 0.9]
Variants, interleaved in one process, one thread; median processor times, and medians of the ratios to dense in the
same round:
  dense              the plain model
  masks              the transformed model, masks in modules (`where(mask, weight, 0)` in the forward)
  masks, gradient    the same masks held at the parameters, by a hook on the gradients
  masks + Static     with `attach`: dead weights and optimizer state kept at zero after each step
  masks + RigL       the same with mask updates every 100 steps
  RigL update        steps that update the masks alone (RigL every step)
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

import fxsparse
from fxsparse.models import lenet_300_100, small_conv_net
from fxsparse.nn import Guard, masked_weights, set_guard


class Block(nn.Module):
    """The basic block of ResNet-18."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        )
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        same = stride == 1 and channels == out
        self.around = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output."""
        return functional.relu(self.second(self.first(x)) + self.around(x))


def resnet18() -> nn.Module:
    """ResNet-18 for 32x32 images, 11.2 million parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    wide = 64
    for out, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        layers.append(Block(wide, out, stride))
        wide = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Attention(nn.Module):
    """Pre-norm self-attention and a feed-forward part."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.take, self.give = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output."""
        cut = self.take(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(cut[0], cut[1], cut[2])
        x = x + self.give(mixed.transpose(1, 2).flatten(2))
        return x + self.feed(self.between(x))


class Transformer(nn.Module):
    """Four layers of width 256 over 64 tokens, 3.2 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[Attention(256, 4) for _ in range(4)])
        self.head = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output."""
        return self.head(self.layers(x).mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-18, CIFAR, batch 64": (resnet18, (64, 3, 32, 32)),
    "transformer 4x256, 32x64 tokens": (Transformer, (32, 64, 256)),
    "LeNet-300-100, batch 64": (lambda: lenet_300_100(784, 10), (64, 784)),
    "small conv net 16x16, batch 64": (lambda: small_conv_net(3, 10, 16), (64, 3, 16, 16)),
    "linear 1024 x 4, batch 128": (lambda: nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(4)]), (128, 1024)),
}
TOTAL = 100_000


def variants(model: nn.Module, x: torch.Tensor, sparsity: float) -> dict[str, Callable[[], None]]:
    """One training step for each variant, each on a model and an optimizer of its own."""
    sparse = fxsparse.transform(model, (x[:2],), sparsity=sparsity)
    guarded = copy.deepcopy(sparse)
    for weight in masked_weights(guarded).values():
        for module, attribute in weight.owners:
            set_guard(module, attribute, Guard.GRADIENT)
    steps = {
        "dense": step_of(copy.deepcopy(model), x),
        "masks": step_of(copy.deepcopy(sparse), x),
        "masks, gradient": step_of(guarded, x),
    }
    methods = {
        "masks + Static": fxsparse.Static(sparsity=sparsity),
        "masks + RigL": fxsparse.RigL(sparsity=sparsity),
        "RigL update": fxsparse.RigL(sparsity=sparsity, every=1),
    }
    for name, method in methods.items():
        steps[name] = step_of(copy.deepcopy(sparse), x, method)
    return steps


def step_of(model: nn.Module, x: torch.Tensor, method: fxsparse.training.Method | None = None) -> Callable[[], None]:
    """A function that makes one step of SGD with momentum on random labels."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    if method is not None:
        fxsparse.attach(model, optimizer, method, total_steps=TOTAL)
    labels = torch.arange(len(x)) % 10

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def medians(steps: dict[str, Callable[[], None]], seconds: float) -> dict[str, tuple[float, float]]:
    """Processor time of each step in milliseconds, and over that of the dense step in the same round.

    All run in turn, each round beginning with another, until the time is over: at least 5 rounds after 3 to warm up.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    start, rounds = time.perf_counter(), 0
    while rounds < 8 or time.perf_counter() - start < seconds:
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            begin = time.process_time()
            steps[name]()
            times[name].append(time.process_time() - begin)
        rounds += 1
    dense = times["dense"][3:]
    return {
        name: (
            1e3 * statistics.median(each[3:]),
            statistics.median(mine / plain for mine, plain in zip(each[3:], dense, strict=True)),
        )
        for name, each in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--model", default="", help="part of a model's name")
    parser.add_argument("--sparsity", type=float, default=0.9)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{'model':<32} {'variant':<17} {'ms a step':>9} {'of dense':>8}")
    for name, (make, shape) in MODELS.items():
        if options.model not in name:
            continue
        found = medians(variants(make(), torch.randn(*shape), options.sparsity), options.seconds)
        for variant, (milliseconds, ratio) in found.items():
            print(f"{name:<32} {variant:<17} {milliseconds:>9.3f} {ratio:>8.3f}")


if __name__ == "__main__":
    main()
