"""What does a mask cost in training? One step (forward, backward, optimizer) of the same model, dense and masked.

Run: python benchmarks/mask_overhead.py [--seconds 2] [--sparsity 0.9]
Variants, interleaved in one process, one thread; medians, and their ratio to dense:
  dense              the plain model
  masks              the transformed model, masks in modules (`where(mask, weight, 0)` in the forward)
  masks, gradient    the same masks held at the parameters, by a hook on the gradients
  masks + Static     with `attach`: dead weights and optimizer state kept at zero after each step
  masks + RigL       the same with mask updates every 100 steps
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

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
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
    for method in (fxsparse.Static(sparsity=sparsity), fxsparse.RigL(sparsity=sparsity)):
        steps[f"masks + {type(method).__name__}"] = step_of(copy.deepcopy(sparse), x, method)
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


def medians(steps: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Milliseconds of each step; all run in turn until the time is over, at least 5 rounds after 3 to warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    start, rounds = time.perf_counter(), 0
    while rounds < 8 or time.perf_counter() - start < seconds:
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
        rounds += 1
    return {name: 1e3 * statistics.median(each[3:]) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--sparsity", type=float, default=0.9)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{'model':<32} {'variant':<17} {'ms a step':>9} {'of dense':>8}")
    for name, (make, shape) in MODELS.items():
        found = medians(variants(make(), torch.randn(*shape), options.sparsity), options.seconds)
        for variant, value in found.items():
            print(f"{name:<32} {variant:<17} {value:>9.3f} {value / found['dense']:>8.2f}")


if __name__ == "__main__":
    main()
