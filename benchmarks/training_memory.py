"""How much memory does a training step take? Peak of the process, and the bytes that stay between steps, by storage.

Run: python benchmarks/training_memory.py [--sparsity 0.9] [--group 64] [--model MLP] [--optimizer AdamW]
Every row is a fresh process on one thread (Linux): the peak is that of the resident set (VmHWM, reset before the steps)
over two whole steps, forward, backward and optimizer, less what is resident before the model is made, when a small
model of the same kind has been trained already. update is the peak of a step in which RigL changes the masks.
  dense          the plain model
  checkpoint     the same, each block recomputed in the backward pass (torch.utils.checkpoint)
  masked         unstructured masks
  shared         SharedSupport, `accelerate`: sparse products, dense storage
  alive          SharedSupport, `store_alive`: alive entries only
  alive, check.  the same with checkpointing
state is what lives between two steps: parameters, gradients, optimizer state, and the rest (masks, indices, buffers).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from mask_overhead import Attention, Transformer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fxsparse

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD momentum": lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
}
CASES = ("dense", "checkpoint", "masked", "shared", "alive", "alive, check.")
KINDS = ("parameters", "gradients", "optimizer", "rest")
UPDATE = 4
SMALL = 128
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Checkpointed(nn.Module):
    """A block whose inner activations are computed again in the backward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        output: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return output


def mlp(small: bool) -> tuple[nn.Module, Tensor]:
    """784-2048-2048-2048-10 at batch 128."""
    wide = SMALL if small else 2048
    widths = ((784, wide), (wide, wide), (wide, wide))
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(*each), nn.ReLU()) for each in widths])
    return nn.Sequential(OrderedDict(layers=layers, head=nn.Linear(wide, 10))), torch.randn(128, 784)


def transformer(small: bool) -> tuple[nn.Module, Tensor]:
    """Four layers of width 256 over 64 tokens at batch 32."""
    model = Transformer()
    if not small:
        return model, torch.randn(32, 64, 256)
    model.layers, model.head = nn.Sequential(Attention(SMALL, 4)), nn.Linear(SMALL, 10)
    return model, torch.randn(4, 64, SMALL)


MODELS: dict[str, Callable[[bool], tuple[nn.Module, Tensor]]] = {
    "MLP 784-2048-2048-2048-10, batch 128": mlp,
    "transformer 4x256, 32x64 tokens": transformer,
}


class Training:
    """A model in training, as a case says."""

    def __init__(self, options: argparse.Namespace, small: bool) -> None:
        model, self.x = MODELS[options.model](small)
        case = options.case
        blocks = list(model.get_submodule("layers").children())
        if case not in ("dense", "checkpoint"):
            pattern = fxsparse.Unstructured() if case == "masked" else fxsparse.SharedSupport(options.group)
            example = torch.randn(2, *blocks_input(options.model, small))
            for i, block in enumerate(blocks):
                with torch.no_grad():
                    following = block(example)
                blocks[i] = fxsparse.transform(block, (example,), pattern=pattern, inplace=True)
                example = following
        if "check" in case:
            blocks = [Checkpointed(block) for block in blocks]
        model.layers = nn.Sequential(*blocks)
        self.model, self.optimizer = model, OPTIMIZERS[options.optimizer](model)
        self.handle = None
        if case not in ("dense", "checkpoint"):
            method = fxsparse.RigL(options.sparsity, distribution=fxsparse.Uniform(), every=UPDATE)
            self.handle = fxsparse.attach(model, self.optimizer, method, total_steps=1000)
        if case == "shared":
            fxsparse.accelerate(model, mode=fxsparse.FastMode.SPARSE)
        elif case.startswith("alive"):
            fxsparse.store_alive(self.handle)

    def step(self) -> None:
        """One step on random labels; the gradients stay until the next one."""
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(self.x), torch.arange(len(self.x)) % 10).backward()
        self.optimizer.step()

    def state(self, foreign: set[int]) -> dict[str, int]:
        """Bytes by kind of all tensors that live now, but for those that lived before."""
        parameters = list(self.model.parameters())
        seen, found = set(foreign), dict.fromkeys(KINDS, 0)
        held = [value for each in self.optimizer.state.values() for value in each.values()]
        gradients = [parameter.grad for parameter in parameters]
        for kind, tensors in zip(KINDS, (parameters, gradients, held, living()), strict=True):
            for tensor in tensors:
                if isinstance(tensor, Tensor) and (place := tensor.untyped_storage()).data_ptr() not in seen:
                    seen.add(place.data_ptr())
                    found[kind] += place.nbytes()
        return found


def blocks_input(model: str, small: bool) -> tuple[int, ...]:
    """Shape of one sample."""
    return (784,) if model.startswith("MLP") else (64, SMALL if small else 256)


def living() -> list[Tensor]:
    """Every dense tensor that Python knows of."""
    found = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return [each for each in found if each.layout is torch.strided]


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    return next(1024 * int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))


def settle() -> None:
    """Give back what is free, and forget the peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """The numbers of one case, in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    small = Training(options, small=True)
    for _ in range(UPDATE + 1):
        small.step()
    del small
    settle()
    start, foreign = resident("VmRSS"), {each.untyped_storage().data_ptr() for each in living()}
    training = Training(options, small=False)
    foreign.add(training.x.untyped_storage().data_ptr())
    training.step()
    settle()
    for _ in range(2):
        training.step()
    found: dict[str, float] = {"peak": resident("VmHWM") - start, **training.state(foreign)}
    if training.handle is not None:
        settle()
        training.step()
        found["update"] = resident("VmHWM") - start
    return found


def row(options: argparse.Namespace, case: str) -> dict[str, float]:
    """The numbers of one case, from a process of its own; large blocks come from the system and go back at once."""
    given = [f"--{name}={getattr(options, name)}" for name in ("sparsity", "group", "model", "optimizer")]
    kept = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    call = [sys.executable, __file__, f"--case={case}", *given]
    done = subprocess.run(call, env={**os.environ, **kept}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--model", default="", help="part of a model's name")
    parser.add_argument("--optimizer", default="", help="part of an optimizer's name")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options)))
        return
    if not CLEAR.exists():
        raise SystemExit("the peak of a process is read from /proc/self, which only Linux has")
    print(f"torch {torch.__version__}, one thread, sparsity {options.sparsity}, groups of {options.group}; MB")
    asked = options.model, options.optimizer
    for options.model in (name for name in MODELS if asked[0] in name):
        for options.optimizer in (name for name in OPTIMIZERS if asked[1] in name):
            print(f"\n{options.model}, {options.optimizer}")
            names = "".join(f"{kind:>11}" for kind in KINDS)
            print(f"{'':<14}{'peak':>8}{'of dense':>9}{'update':>8}{names}{'state':>8}{'of dense':>9}")
            show({case: row(options, case) for case in CASES})


def show(rows: dict[str, dict[str, float]]) -> None:
    """The table of one model and optimizer."""
    peak, state = rows["dense"]["peak"], sum(rows["dense"][kind] for kind in KINDS)
    for case, found in rows.items():
        kinds, total = "".join(f"{found[kind] / 1e6:>11.2f}" for kind in KINDS), sum(found[kind] for kind in KINDS)
        update = f"{found['update'] / 1e6:8.1f}" if "update" in found else f"{'-':>8}"
        head = f"{case:<14}{found['peak'] / 1e6:>8.1f}{found['peak'] / peak:>9.3f}{update}{kinds}"
        print(f"{head}{total / 1e6:>8.1f}{total / state:>9.3f}")


if __name__ == "__main__":
    main()
