"""Does training with a shared support pay on a GPU? Against cuBLAS, with and without the Triton kernels, beside 2:4.

Run: python benchmarks/gpu_training.py [--wide 4096] [--out 4096] [--tokens 4096] [--sparsity 0.9] [--group 64]
                                       [--rounds 30] [--part layer,steps,sync]
`layer` is one forward and backward pass of one layer, with gradients of input, weight and bias:
  dense          torch.nn.Linear
  masked         the layer with its mask, nothing accelerated
  gather         FastMode.SPARSE: a gathered copy of the input and batched products
  triton         FastMode.TRITON: gather and product in one kernel
  gather alive   the same in alive-only storage: no dense weight is read, no dense gradient written
  triton alive
  auto           what the dispatcher takes, in alive-only storage
  2:4 fixed      torch's semi-structured kernels in the forward pass, the weight compressed before; dense backward
  2:4 step       the same, compressed anew each step, as a training needs it: the weight changes
`steps` are whole training steps, AdamW and mask upkeep included. `sync` runs ordinary steps while torch raises where
the host would wait for the device. Times are medians of CUDA events around a few passes, all variants in turn; `host`
is what the Python side of a pass takes: no pass is faster than that.
Without a CUDA device it says so and ends. `--device cpu` shows that the benchmark itself runs; its times mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from shared_training import layer_pass
from torch import Tensor, nn
from torch.nn import functional

import fxsparse
from fxsparse.nn.shared import FastMode
from fxsparse.nn.shared_accelerate import accelerate, fast_report
from fxsparse.nn.shared_triton import INSTALLED
from fxsparse.training.alive_only import store_alive

KINDS = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "float32 (TF32)": (torch.float32, "tf32"),
    "float32": (torch.float32, "ieee"),
}
Pass = Callable[[], None]
PASSES = 5
KEEP: list[object] = []
"""Handles: what drives masks must live as long as its optimizer."""


def timed(passes: Mapping[str, Pass], options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Milliseconds of a pass on the device and on the host, medians; all run in turn after 5 rounds to warm up."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in passes}
    for turn in range(options.rounds + 5):
        for name, run in passes.items():
            one = on_device(run) if options.device == "cuda" else on_host(run)
            if turn >= 5:
                found[name].append(one)
    return {
        name: (statistics.median(one for one, _ in each), statistics.median(other for _, other in each))
        for name, each in found.items()
    }


def on_device(run: Pass) -> tuple[float, float]:
    """Some passes behind each other, so that the host can run ahead."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    begin = time.perf_counter()
    for _ in range(PASSES):
        run()
    host = time.perf_counter() - begin
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / PASSES, 1e3 * host / PASSES


def on_host(run: Pass) -> tuple[float, float]:
    begin = time.perf_counter()
    run()
    return (1e3 * (time.perf_counter() - begin),) * 2


def masked(model: nn.Module, x: Tensor, options: argparse.Namespace, **settings: Any) -> tuple[Any, ...]:
    """The model with masks, its optimizer and the handle that keeps them."""
    outside = ["*head*"] if hasattr(model, "head") else None
    sparse = fxsparse.transform(model, (x[:2],), pattern=fxsparse.SharedSupport(options.group), exclude=outside)
    optimizer = torch.optim.AdamW(sparse.parameters(), **settings)
    method = fxsparse.Static(sparsity=options.sparsity, distribution=fxsparse.Uniform())
    handle = fxsparse.attach(sparse, optimizer, method, total_steps=1_000_000)
    KEEP.append(handle)
    return sparse, optimizer, handle


def variants(options: argparse.Namespace) -> dict[str, tuple[FastMode | None, bool]]:
    """Fast mode and alive-only storage of each."""
    found: dict[str, tuple[FastMode | None, bool]] = {"masked": (None, False)}
    modes = {"gather": FastMode.SPARSE, **({"triton": FastMode.TRITON} if INSTALLED else {})}
    found |= {name: (mode, False) for name, mode in modes.items()}
    found |= {f"{name} alive": (mode, True) for name, mode in modes.items()}
    return {**found, "auto": (FastMode.AUTO, True)}


def made(
    model: nn.Module, x: Tensor, options: argparse.Namespace, mode: FastMode | None, alive: bool
) -> tuple[Any, ...]:
    """Model and optimizer of one variant."""
    sparse, optimizer, handle = masked(model, x, options, lr=1e-3)
    if mode is not None:
        accelerate(sparse, mode=mode)
    if alive:
        store_alive(handle)
    return sparse, optimizer


class SemiStructured(nn.Module):
    """A linear layer whose forward pass runs on 2:4 sparse tensor cores; its backward pass is dense."""

    def __init__(self, layer: nn.Linear, anew: bool) -> None:
        super().__init__()
        size = layer.weight.shape
        best = layer.weight.detach().abs().view(size[0], -1, 4).topk(2, dim=2).indices
        self.mask = (
            torch.zeros_like(layer.weight, dtype=torch.bool).view(size[0], -1, 4).scatter(2, best, True).view(size)
        )
        self.weight = nn.Parameter(torch.where(self.mask, layer.weight.detach(), 0.0))
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.kept = None if anew else torch.sparse.to_sparse_semi_structured(self.weight.detach())

    def forward(self, input: Tensor) -> Tensor:
        """[B, F] -> [B, R]."""
        packed = torch.sparse.to_sparse_semi_structured(self.weight.detach()) if self.kept is None else self.kept
        output: Tensor = _TwoOfFour.apply(input, self.weight, self.bias, packed, self.mask)
        return output


class _TwoOfFour(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, packed: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight, mask)
        return functional.linear(input, packed, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mask = ctx.saved_tensors
        return gradient @ weight, torch.where(mask, gradient.t() @ input, 0.0), gradient.sum(0), None, None


def two_of_four(layer: nn.Linear, x: Tensor, gradient: Tensor) -> dict[str, Pass]:
    """The 2:4 variants that run here; says why where none does."""
    found = {}
    for name, anew in (("2:4 fixed", False), ("2:4 step", True)):
        try:
            run = layer_pass(SemiStructured(layer, anew), x, gradient)
            run()
        except (RuntimeError, NotImplementedError, ValueError) as error:
            print(f"  {name}: does not run here: {str(error).splitlines()[0]}")
        else:
            found[name] = run
    return found


def layer_part(options: argparse.Namespace) -> None:
    for kind, (dtype, precision) in KINDS.items():
        torch.backends.cuda.matmul.fp32_precision = precision
        torch.manual_seed(0)
        layer = nn.Linear(options.wide, options.out, device=options.device, dtype=dtype)
        x = torch.randn(options.tokens, options.wide, device=options.device, dtype=dtype)
        gradient = torch.randn(options.tokens, options.out, device=options.device, dtype=dtype)
        print(f"layer {options.wide} -> {options.out}, {options.tokens} tokens, {kind}")
        passes = {"dense": layer_pass(layer, x, gradient)}
        models = {n: made(nn.Sequential(layer), x, options, *each)[0] for n, each in variants(options).items()}
        passes |= {name: layer_pass(model, x, gradient) for name, model in models.items()}
        passes |= two_of_four(layer, x, gradient)
        show(timed(passes, options))
        print(f"  auto took: {next(iter(fast_report(models['auto']))).product}")


def perceptron(options: argparse.Namespace) -> nn.Sequential:
    """Three wide layers and a dense head."""
    sizes, model = (options.wide, options.out, options.wide, options.out), nn.Sequential()
    for i in range(3):
        model.add_module(f"layer{i}", nn.Linear(sizes[i], sizes[i + 1], device=options.device))
        model.add_module(f"relu{i}", nn.ReLU())
    model.add_module("head", nn.Linear(options.out, 10, device=options.device))
    return model


def step_of(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> Pass:
    """One training step on made-up labels, bfloat16 autocast."""
    labels = torch.arange(len(x), device=x.device) % 10

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()

    return step


def steps(options: argparse.Namespace) -> dict[str, Pass]:
    """A training step of the perceptron in every variant."""
    torch.manual_seed(0)
    plain = perceptron(options)
    x = torch.randn(options.tokens, options.wide, device=options.device)
    dense = perceptron(options)
    found = {"dense": step_of(dense, x, torch.optim.AdamW(dense.parameters(), lr=1e-3))}
    for name, each in variants(options).items():
        model, optimizer = made(plain, x, options, *each)
        found[name] = step_of(model, x, optimizer)
    return found


def steps_part(options: argparse.Namespace) -> None:
    print(f"step of 3 layers {options.wide} <-> {options.out}, AdamW, bfloat16 autocast, {options.tokens} tokens")
    show(timed(steps(options), options))


def sync_part(options: argparse.Namespace) -> None:
    print("ordinary steps while waiting for the device is an error")
    if options.device != "cuda":
        print("  only CUDA can tell")
        return
    for name, step in steps(options).items():
        for _ in range(3):
            step()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                step()
        except RuntimeError as error:
            print(f"  {name:<14} waits: {str(error).splitlines()[0]}")
        else:
            print(f"  {name:<14} never waits")
        finally:
            torch.cuda.set_sync_debug_mode(before)


def show(found: Mapping[str, tuple[float, float]]) -> None:
    dense = found["dense"][0]
    for name, (device, host) in found.items():
        print(f"  {name:<14} {device:9.3f} ms  {dense / device:6.2f}x   host {host:7.3f} ms")


PARTS = {"layer": layer_part, "steps": steps_part, "sync": sync_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("wide", 4096), ("out", 4096), ("tokens", 4096), ("group", 64), ("rounds", 30)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--part", default=",".join(PARTS))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"no CUDA device (torch {torch.__version__}, built for CUDA {torch.version.cuda}): nothing was measured")
        return
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU: these times mean nothing"
    print(f"{name}, torch {torch.__version__}, {options.sparsity:.0%} sparse, groups of {options.group}")
    if not INSTALLED:
        print("triton is not installed: its rows are left out")
    for part in options.part.split(","):
        PARTS[part](options)


if __name__ == "__main__":
    main()
