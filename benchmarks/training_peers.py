"""What does sparse training cost with other libraries? One step and one mask update, as multiples of the dense step.

Run: python benchmarks/training_peers.py [--seconds 10] [--sparsity 0.9] [--model LeNet] [--optimizer SGD]
Install: pip install rigl-torch sparselab; pip install --no-deps sparsimony   (it asks for numpy 1 and runs with 2)
All rows of a model run in turn in one process on one thread; processor time over that of the dense step of the same
round, medians over rounds.
  dense        the plain model
  fxsparse     masks and RigL
  fxsparse 64  the same with SharedSupport(64), stored alive only: masks with a shape, which the other rows have not
  sparsimony   RigL
  rigl-torch   RigLScheduler; leaves the first layer dense and masks every layer with a weight but BatchNorm2d
  torch.ao     WeightNormSparsifier with single entries, called anew at updates: magnitude, nothing grows
  sparselab    SparseLinear (CSR, its own kernels) in place of every Linear, RigL by row
step is an ordinary step (forward, backward, optimizer, upkeep), update one in which masks change. The columns after
them are looked at and not timed, after three mask updates ("-" where there is nothing of the kind):
  sparsity      dead share of all weights of linear and convolutional layers
  dead          whether stored dead weights are exactly zero (they compute as zero everywhere)
  state, dead   whether the optimizer's state of dead weights is zero one step after the update that killed them
  state, grown  whether the optimizer's state of grown weights starts at zero
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from mask_overhead import MODELS, TOTAL
from torch import Tensor, nn
from torch.nn import functional

import fxsparse
from fxsparse.nn import masked_weights

os.environ["OMP_NUM_THREADS"] = "1"  # sparselab brings an OpenMP of its own
Optimizer = torch.optim.Optimizer
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}
UNSTRUCTURED = fxsparse.Unstructured()
ALPHA = 0.3
TURN_S = 0.1


@dataclass
class Weight:
    """One weight as it is stored, which entries are alive, and its optimizer state; all of the dense shape."""

    stored: Tensor
    alive: Tensor
    state: list[Tensor]


@dataclass
class Trained:
    """A model in training: one step, and a look at the weights of its linear and convolutional layers.

    Attributes:
        step: One training step.
        weights: Their weights as they are now.
        stores_dead: Whether dead weights are stored at all.
    """

    step: Callable[[], None]
    weights: Callable[[], list[Weight]]
    stores_dead: bool = True


@dataclass
class Task:
    """What every library gets: a model of its own, the input, what is asked, and how often masks change."""

    model: nn.Module
    x: Tensor
    sparsity: float
    every: int
    make: Callable[[Iterable[nn.Parameter]], Optimizer]

    def backward(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Gradients of a cross entropy."""
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(self.x), torch.arange(len(self.x)) % 10).backward()


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights count."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def state_of(optimizer: Optimizer, weight: Tensor) -> list[Tensor]:
    """The optimizer's tensors of the weight's shape."""
    state = optimizer.state.get(weight, {})
    return [value for value in state.values() if isinstance(value, Tensor) and value.shape == weight.shape]


def dense(task: Task) -> Trained:
    optimizer = task.make(task.model.parameters())

    def step() -> None:
        task.backward(task.model, optimizer)
        optimizer.step()

    return Trained(step, list)


def fxsparse_rigl(task: Task, pattern: fxsparse.Pattern = UNSTRUCTURED) -> Trained:
    model = fxsparse.transform(task.model, (task.x[:2],), pattern=pattern)
    optimizer = task.make(model.parameters())
    method = fxsparse.RigL(task.sparsity, distribution=fxsparse.Uniform(), every=task.every, alpha=ALPHA)
    handle = fxsparse.attach(model, optimizer, method, total_steps=TOTAL)
    if pattern is not UNSTRUCTURED:
        fxsparse.store_alive(handle)

    def step() -> None:
        assert handle.attached
        task.backward(model, optimizer)
        optimizer.step()

    def weights() -> list[Weight]:
        found = []
        for weight in masked_weights(model).values():
            state = [weight.dense(each) for each in state_of(optimizer, weight.weight)]
            found.append(Weight(weight.dense(weight.weight.detach()), weight.mask, state))
        return found

    return Trained(step, weights, stores_dead=pattern is UNSTRUCTURED)


def fxsparse_shared(task: Task) -> Trained:
    return fxsparse_rigl(task, fxsparse.SharedSupport(64))


def sparsimony_rigl(task: Task) -> Trained:
    distributions = importlib.import_module("sparsimony.distributions.base")
    schedulers = importlib.import_module("sparsimony.schedulers.base")
    rigl = importlib.import_module("sparsimony.dst.rigl").RigL
    optimizer = task.make(task.model.parameters())
    schedule = schedulers.CosineDecayScheduler(ALPHA, int(0.75 * TOTAL), task.every)
    sparsifier = rigl(schedule, distributions.UniformDistribution(), optimizer, sparsity=task.sparsity)
    sparsifier.prepare(task.model, [{"tensor_fqn": f"{name}.weight"} for name in layers_of(task.model)])

    def step() -> None:
        task.backward(task.model, optimizer)
        optimizer.step()
        sparsifier.step()

    return Trained(step, lambda: parametrized(task.model, optimizer))


def parametrized(model: nn.Module, optimizer: Optimizer) -> list[Weight]:
    """Weights behind a parametrization by a mask."""
    found = []
    for module in layers_of(model).values():
        held: Any = module.parametrizations["weight"]  # type: ignore[index]
        found.append(Weight(held.original, held[0].mask.bool(), state_of(optimizer, held.original)))
    return found


def rigl_torch(task: Task) -> Trained:
    make = rigl_torch_module().RigLScheduler
    optimizer = task.make(task.model.parameters())
    pruner = make(
        task.model,
        optimizer,
        dense_allocation=1 - task.sparsity,
        T_end=int(0.75 * TOTAL),
        delta=task.every,
        alpha=ALPHA,
        ignore_linear_layers=False,
    )

    def step() -> None:
        task.backward(task.model, optimizer)
        if pruner():
            optimizer.step()

    def weights() -> list[Weight]:
        masks = {id(weight): mask for weight, mask in zip(pruner.W, pruner.backward_masks, strict=True)}
        found = []
        for module in layers_of(task.model).values():
            stored: Any = module.weight
            mask = masks[id(stored)]
            alive = torch.ones_like(stored, dtype=torch.bool) if mask is None else mask
            found.append(Weight(stored, alive, state_of(optimizer, stored)))
        return found

    return Trained(step, weights)


def rigl_torch_module() -> Any:
    """rigl_torch.RigL; it compares modules with two classes of torchvision, which need not be installed for that."""
    importlib.import_module("importlib.metadata").version("rigl-torch")
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # a torchvision built for another torch raises the latter
        blocks = {name: type(name, (nn.Module,), {}) for name in ("BasicBlock", "Bottleneck")}
        stand_in: Any = types.ModuleType("torchvision")
        stand_in.models = types.SimpleNamespace(resnet=types.SimpleNamespace(**blocks))
        sys.modules["torchvision"] = stand_in
        try:
            return importlib.import_module("rigl_torch.RigL")
        finally:
            del sys.modules["torchvision"]
    return importlib.import_module("rigl_torch.RigL")


def torch_ao(task: Task) -> Trained:
    pruning: Any = importlib.import_module("torch.ao.pruning")
    optimizer = task.make(task.model.parameters())
    sparsifier = pruning.WeightNormSparsifier(task.sparsity, sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(task.model, [{"tensor_fqn": f"{name}.weight"} for name in layers_of(task.model)])
    sparsifier.step()
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        task.backward(task.model, optimizer)
        optimizer.step()
        if count % task.every == 0:
            sparsifier.step()

    return Trained(step, lambda: parametrized(task.model, optimizer))


def sparselab_rigl(task: Task) -> Trained:
    sparselab = importlib.import_module("sparselab")
    if any(isinstance(module, nn.Conv2d) for module in task.model.modules()):
        raise NotImplementedError("it has no convolutional layer")
    for name, layer in layers_of(task.model).items():
        made = sparselab.SparseLinear(layer.in_features, layer.out_features, layer.bias is not None, task.sparsity)
        task.model.set_submodule(name, made)
    sparse = [module for module in task.model.modules() if isinstance(module, sparselab.SparseLinear)]
    optimizer = task.make(task.model.parameters())
    method = sparselab.RigL(task.sparsity, drop_fraction=ALPHA, update_freq=task.every, seed=0)
    task.model.apply(method)

    def step() -> None:
        task.backward(task.model, optimizer)
        optimizer.step()
        method.step()

    def spread(layer: Any, values: Tensor) -> Tensor:
        csr, whole = layer._csr, torch.zeros(layer.out_features, layer.in_features, dtype=values.dtype)
        for row, (start, alive) in enumerate(zip(csr.row_start, csr.row_nnz, strict=True)):
            columns = torch.tensor(csr.col_indices[start : start + alive], dtype=torch.long)
            whole[row, columns] = values[start : start + alive]
        return whole

    def weights() -> list[Weight]:
        found = []
        for layer in sparse:
            values = layer._values.detach()
            state = [spread(layer, each) for each in state_of(optimizer, layer._values)]
            found.append(Weight(spread(layer, values), spread(layer, torch.ones_like(values)) > 0, state))
        return found

    return Trained(step, weights, stores_dead=False)


LIBRARIES: dict[str, Callable[[Task], Trained]] = {
    "fxsparse": fxsparse_rigl,
    "fxsparse 64": fxsparse_shared,
    "sparsimony": sparsimony_rigl,
    "rigl-torch": rigl_torch,
    "torch.ao": torch_ao,
    "sparselab": sparselab_rigl,
}


@dataclass
class Looked:
    """What a look at the weights after three mask updates told."""

    sparsity: float
    dead: str
    state_dead: str
    state_grown: str


def look(trained: Trained) -> Looked:
    """Train for three mask updates of `every=2` and a step, and look."""
    for _ in range(5):
        trained.step()
    before = [weight.alive.clone() for weight in trained.weights()]
    trained.step()
    after = trained.weights()
    grown = [weight.alive & ~was for weight, was in zip(after, before, strict=True)]
    fresh = [all(not s[new].any() for s in weight.state) for weight, new in zip(after, grown, strict=True)]
    state_grown = "-" if not any(bool(new.any()) for new in grown) else yes(all(fresh))
    trained.step()
    last = trained.weights()
    elements, dead = sum(w.alive.numel() for w in last), sum(int((~w.alive).sum()) for w in last)
    clean = yes(not any(w.stored[~w.alive].any() for w in last))
    state_dead = yes(not any(s[~w.alive].any() for w in last for s in w.state))
    return Looked(dead / elements, *((clean, state_dead) if trained.stores_dead else ("-", "-")), state_grown)


def yes(found: bool) -> str:
    return "yes" if found else "no"


def ratios(
    steps: dict[str, Callable[[], None]], updates: dict[str, Callable[[], None]], seconds: float
) -> dict[str, float]:
    """Times over that of the dense step of the same round, medians over rounds; "dense" itself in milliseconds.

    What ran just before has its weights in the cache, and the others have not: short steps are taken in turns of many,
    of which the first is left out. Of the steps of an update's row every second one is an update; they are taken in
    every second round.
    """
    times: dict[str, list[float]] = {name: [] for name in (*steps, *(f"{name} update" for name in updates))}

    def once(run: Callable[[], None]) -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    lengths = {name: int(min(20, TURN_S // min(once(run) for _ in range(2)))) for name, run in steps.items()}
    end, rounds, unit = time.perf_counter() + seconds, 0, 1.0
    while rounds < 4 or time.perf_counter() < end:
        for name, run in steps.items():
            turn = [once(run) for _ in range(lengths[name] + 1)]
            time_of = statistics.median(turn[1:] or turn)
            unit = time_of if name == "dense" else unit
            times[name].append(1e3 * unit if name == "dense" else time_of / unit)
        for name, run in updates.items() if rounds % 2 else ():
            run()
            times[f"{name} update"].append(once(run) / unit)
        rounds += 1
    return {name: statistics.median(each) for name, each in times.items()}


def compare(make: Callable[[], nn.Module], shape: tuple[int, ...], options: argparse.Namespace) -> None:
    """The rows of one model."""
    plain, x, optimizer = make().train(), torch.randn(*shape), OPTIMIZERS[options.optimizer]

    def task(every: int, rows: int = shape[0]) -> Task:
        return Task(copy.deepcopy(plain), x[:rows], options.sparsity, every, optimizer)

    steps, updates = {"dense": dense(task(1)).step}, {}
    looked: dict[str, Looked] = {}
    reasons: dict[str, str] = {}
    for name, library in LIBRARIES.items():
        try:
            looked[name] = look(library(task(2, 16)))
            steps[name], updates[name] = library(task(100)).step, library(task(2)).step
        except ImportError as error:
            reasons[name] = f"not installed ({error})"
        except Exception as error:  # whatever they raise
            reasons[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    found = ratios(steps, updates, options.seconds)
    print(f"{'dense':<11} {found['dense']:9.2f} ms")
    for name in LIBRARIES:
        if name in reasons:
            print(f"{name:<11} {reasons[name]}")
            continue
        row = looked[name]
        times = f"{found[name]:8.2f} {found[f'{name} update']:8.2f} {row.sparsity:9.4f}"
        print(f"{name:<11} {times} {row.dead:>5} {row.state_dead:>12} {row.state_grown:>13}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--model", default="", help="part of a model's name")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="SGD")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {options.optimizer}, sparsity {options.sparsity}")
    for name, (make, shape) in MODELS.items():
        if options.model in name and name.startswith(("ResNet", "transformer", "LeNet")):
            head = f"{'step':>8} {'update':>8} {'sparsity':>9} {'dead':>5} {'state, dead':>12} {'state, grown':>13}"
            print(f"\n{name}\n{'':<11} {head}")
            compare(make, shape, options)


if __name__ == "__main__":
    main()
