"""Does training with a shared support pay? Layers and whole steps, dense against sparse, and the memory of both.

Run: python benchmarks/shared_training.py [--seconds 3] [--sparsity 0.9] [--group 64] [--threads 1]
                                          [--part layers|convolutions|steps|memory]
All variants of a row run in turn in one process; medians after a warm-up, ratios = time of the plain torch layer or
model / time of the variant.
  dense      the plain torch model
  masked     the transformed model, whose forward reads the weight through its mask
  sparse     `accelerate`: gathers and small dense products, dense storage
  alive      the same with `store_alive`: weights, gradients and optimizer state hold the alive entries alone
A layer is one forward and backward pass with gradients of input, weight and bias; a step has an optimizer, the mask
upkeep of `attach` (Static) and, in its last row, mask updates (RigL every 100 steps).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

import fxsparse
from fxsparse.nn.shared import FastMode
from fxsparse.nn.shared_accelerate import accelerate
from fxsparse.training.alive_only import store_alive

LINEAR = ((1024, 1024), (768, 3072), (4096, 4096))
BATCH = 128
CONVOLUTIONS = ((256, 1024, 1, 14), (256, 256, 3, 14))
IMAGES = 16
MLP = (784, 2048, 2048, 2048, 10)
TOTAL = 1_000_000


def medians(steps: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Milliseconds of each; all run in turn until the time is over, at least 5 rounds after 2 to warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    start, rounds = time.perf_counter(), 0
    while rounds < 7 or time.perf_counter() - start < seconds:
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
        rounds += 1
    return {name: 1e3 * statistics.median(each[2:]) for name, each in times.items()}


def trained(
    model: nn.Module, x: Tensor, options: argparse.Namespace, make: type[torch.optim.Optimizer], **settings: float
):
    """The masked model of a plain one, its optimizer and the handle of Static."""
    pattern = fxsparse.SharedSupport(options.group)
    sparse = fxsparse.transform(model, (x[:2],), pattern=pattern, exclude=["*head*"] if has_head(model) else None)
    optimizer = make(sparse.parameters(), **settings)
    method = fxsparse.Static(sparsity=options.sparsity, distribution=fxsparse.Uniform())
    return sparse, optimizer, fxsparse.attach(sparse, optimizer, method, total_steps=TOTAL)


def has_head(model: nn.Module) -> bool:
    """Whether a small last layer stays dense."""
    return "head" in dict(model.named_modules())


def layer_pass(model: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    """One forward and backward pass."""
    given = x.clone().requires_grad_()

    def run() -> None:
        given.grad = None
        model.zero_grad()
        model(given).backward(gradient)

    return run


def layer_row(layer: nn.Module, x: Tensor, options: argparse.Namespace) -> dict[str, float]:
    """Times of one layer in every variant."""
    model = nn.Sequential(layer)
    gradient = torch.randn_like(model(x[:]))
    sparse, _, _ = trained(model, x, options, torch.optim.SGD, lr=0.0)
    fast, alive = copy.deepcopy(sparse), None
    accelerate(fast, mode=FastMode.SPARSE)
    alive, _, handle = trained(model, x, options, torch.optim.SGD, lr=0.0)
    store_alive(handle)
    variants = {"dense": model, "masked": sparse, "sparse": fast, "alive": alive}
    return medians({name: layer_pass(each, x, gradient) for name, each in variants.items()}, options.seconds)


def step_of(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """One training step on random labels."""
    labels = torch.arange(len(x)) % 10

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def mlp() -> nn.Sequential:
    """The wide MLP; its head stays dense."""
    layers: list[tuple[str, nn.Module]] = []
    for i, (wide, out) in enumerate(zip(MLP[:-2], MLP[1:-1], strict=True)):
        layers += [(f"layer{i}", nn.Linear(wide, out)), (f"relu{i}", nn.ReLU())]
    model = nn.Sequential()
    for name, module in (*layers, ("head", nn.Linear(*MLP[-2:]))):
        model.add_module(name, module)
    return model


def variants_of_step(
    x: Tensor, options: argparse.Namespace, make: type[torch.optim.Optimizer], **settings: float
) -> dict[str, Callable[[], None]]:
    """A step of the MLP in every variant."""
    torch.manual_seed(0)
    plain = mlp()
    dense = copy.deepcopy(plain)
    steps = {"dense": step_of(dense, x, make(dense.parameters(), **settings))}
    for name in ("masked", "sparse", "alive"):
        model, optimizer, handle = trained(plain, x, options, make, **settings)
        if name == "sparse":
            accelerate(model, mode=FastMode.SPARSE)
        elif name == "alive":
            store_alive(handle)
        steps[name] = step_of(model, x, optimizer)
        KEEP.append(handle)
    return steps


KEEP: list[object] = []


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, gradients, buffers and optimizer state."""
    held: list[Tensor] = [*model.parameters(), *model.buffers()]
    held += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    held += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(each.numel() * each.element_size() for each in held)


def memory_rows(x: Tensor, options: argparse.Namespace) -> Iterable[tuple[str, dict[str, float]]]:
    """MB of training state after one step."""
    kinds: tuple[tuple[str, type[torch.optim.Optimizer], dict[str, float]], ...] = (
        ("SGD", torch.optim.SGD, {"lr": 1e-3}),
        ("SGD momentum", torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
        ("AdamW", torch.optim.AdamW, {"lr": 1e-3}),
    )
    for title, make, settings in kinds:
        found = {}
        for name in ("dense", "masked", "alive"):
            torch.manual_seed(0)
            model: nn.Module = mlp()
            if name == "dense":
                optimizer = make(model.parameters(), **settings)
            else:
                model, optimizer, handle = trained(model, x, options, make, **settings)
                if name == "alive":
                    store_alive(handle)
            step_of(model, x, optimizer)()
            found[name] = state_bytes(model, optimizer) / 1e6
        yield title, found


def show(title: str, found: dict[str, float], unit: str, inverse: bool = False) -> None:
    """One row: values, and the ratios to dense."""
    parts = [f"{name} {value:9.2f} {unit}" for name, value in found.items()]
    ratio = {n: v / found["dense"] if inverse else found["dense"] / v for n, v in found.items() if n != "dense"}
    print(f"{title:<34} {'  '.join(parts)}   " + "  ".join(f"{name} {value:.2f}" for name, value in ratio.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", default="layers,convolutions,steps,memory")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.sparsity:.0%}, groups of {options.group}")
    if "layers" in options.part:
        for wide, out in LINEAR:
            show(
                f"linear {wide} -> {out}, batch {BATCH}",
                layer_row(nn.Linear(wide, out), torch.randn(BATCH, wide), options),
                "ms",
            )
    if "convolutions" in options.part:
        for channels, out, kernel, size in CONVOLUTIONS:
            for form in (torch.contiguous_format, torch.channels_last):
                layer = nn.Conv2d(channels, out, kernel, padding=kernel // 2).to(memory_format=form)
                x = torch.randn(IMAGES, channels, size, size).to(memory_format=form)
                name = "NHWC" if form is torch.channels_last else "NCHW"
                show(f"conv {kernel}x{kernel} {channels} -> {out}, {name}", layer_row(layer, x, options), "ms")
    x = torch.randn(BATCH, MLP[0])
    if "steps" in options.part:
        show("step, SGD", medians(variants_of_step(x, options, torch.optim.SGD, lr=1e-3), options.seconds), "ms")
        found = medians(variants_of_step(x, options, torch.optim.SGD, lr=1e-3, momentum=0.9), options.seconds)
        show("step, SGD momentum", found, "ms")
        show("step, AdamW", medians(variants_of_step(x, options, torch.optim.AdamW, lr=1e-3), options.seconds), "ms")
    if "memory" in options.part:
        for title, sizes in memory_rows(x, options):
            show(f"state, {title}", sizes, "MB", inverse=True)


if __name__ == "__main__":
    main()
