"""Does resurrection pay? Recipes of RESU on digits against their own controls, and against GMP and RigL.

Run: OMP_NUM_THREADS=1 python benchmarks/resu_recipes.py [--arms NAME ...] [--sparsity 0.9 0.95] [--part validation]
MLP 64-64-32-10, ERK, AdamW 2e-3, batches of 64, equal optimizer steps; each seed has its own split, initialisation and
order. Every recipe runs four times: as it is, with theta standing still (eta = 0), without any quota as well (r = 0,
eta = 0), and with theta at zero, too (plain gradual pruning in RESU's cycle: where alive weights train on in the phase,
a theta that is drawn and never trained is noise to them, so this is the control that counts there). Columns: accuracy
in % (mean over seeds), and the paired differences to the controls and to GMP with 95 % t-intervals. Resurrection pays
where all lower bounds are above 0. Recipes are chosen on `--part validation`; `--part test` is for the last look.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import fxsparse
from fxsparse.data import digits
from fxsparse.nn import ThetaInit
from fxsparse.sparsity.saliency import Taylor
from fxsparse.training.loop import evaluate, fit, start
from fxsparse.training.resu import RESU
from fxsparse.training.resu_phases import Lengths
from fxsparse.training.resu_subset import AllDead, TopGradient
from fxsparse.training.resu_theta import Selective, ThetaAdamW, ThetaSGD
from fxsparse.training.task import Task
from fxsparse.training.updater import Method

T_95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
"""Student's t by degrees of freedom, two-sided."""


def late(sparsity: float, cycles: int = 8, falling: int = 3) -> tuple[float, ...]:
    """Sparsities that are reached by the third cycle and then stay."""
    rising = (1 - (1 - (i + 1) / falling) ** 3 for i in range(falling))
    return tuple([*(round(sparsity * u, 6) for u in rising), *[sparsity] * (cycles - falling)])


def by_gradient(sparsity: float, **options: object) -> RESU:
    """Theta starts at 0 where the loss wants it most; alive weights train on beside it."""
    values: dict[str, object] = {
        "cycles": 8,
        "freeze_active": False,
        "budget": (0.2, 0.02),
        "init": ThetaInit.ZERO,
        "subset": TopGradient(0.2),
        "lengths": Lengths(0.8, 0.0, 0.2),
    }
    return RESU.frozen(sparsity, **(values | options))


RECIPES: dict[str, Callable[[float], RESU]] = {
    "default": lambda s: RESU(sparsity=s),
    "frozen": lambda s: RESU.frozen(s),
    "source": lambda s: RESU.source(s, cycle_steps=400, prune=fxsparse.sparsity.Magnitude()),
    "score |w||g|": lambda s: RESU.frozen(s, score=Taylor()),
    "theta from 0": lambda s: RESU.frozen(s, init=ThetaInit.ZERO),
    "theta lr x 3": lambda s: RESU.frozen(s, theta=ThetaAdamW(scale=3.0)),
    "theta SGD .1": lambda s: RESU.frozen(s, theta=ThetaSGD(lr=0.1)),
    "theta selective .1": lambda s: RESU.frozen(s, theta=Selective(lr=0.1)),
    "budget .3 - .05": lambda s: RESU.frozen(s, budget=(0.3, 0.05)),
    "long RESU": lambda s: RESU.frozen(s, lengths=Lengths(0.4, 0.1, 0.5)),
    "short RESU": lambda s: RESU.frozen(s, lengths=Lengths(0.8, 0.1, 0.1)),
    "unfrozen": lambda s: RESU.frozen(s, freeze_active=False),
    "final .25": lambda s: RESU.frozen(s, final_fraction=0.25),
    "10 cycles": lambda s: RESU.frozen(s, cycles=10),
    "late": lambda s: RESU.frozen(s, cycles=8, schedule=late(s)),
    "late, short RESU": lambda s: RESU.frozen(s, cycles=8, schedule=late(s), lengths=Lengths(0.75, 0.0, 0.25)),
    "unfrozen, from 0": lambda s: RESU.frozen(s, freeze_active=False, init=ThetaInit.ZERO),
    "unfrozen, |w||g|": lambda s: RESU.frozen(s, freeze_active=False, score=Taylor()),
    "unfrozen, .3 - .05": lambda s: RESU.frozen(s, freeze_active=False, budget=(0.3, 0.05)),
    "unfrozen, 10 cycles": lambda s: RESU.frozen(s, freeze_active=False, cycles=10),
    "late, unfrozen": lambda s: RESU.frozen(s, cycles=8, schedule=late(s), freeze_active=False, budget=(0.2, 0.02)),
    "late, unfrozen, |w||g|": lambda s: RESU.frozen(
        sparsity=s, cycles=8, schedule=late(s), freeze_active=False, budget=(0.2, 0.02), score=Taylor()
    ),
    "late, unfrozen, from 0": lambda s: RESU.frozen(
        sparsity=s, cycles=8, schedule=late(s), freeze_active=False, budget=(0.2, 0.02), init=ThetaInit.ZERO
    ),
    "late, by gradient, from 0": lambda s: RESU.frozen(
        sparsity=s, cycles=8, schedule=late(s), freeze_active=False, budget=(0.2, 0.02), init=ThetaInit.ZERO,
        subset=TopGradient(0.2), lengths=Lengths(0.8, 0.0, 0.2),
    ),
    "by gradient, 8 cycles": lambda s: by_gradient(s),
    "by gradient, 12 cycles": lambda s: by_gradient(s, cycles=12),
    "by gradient, 8 cycles, .05": lambda s: by_gradient(s, subset=TopGradient(0.05)),
    "by gradient, late, 12 cycles": lambda s: by_gradient(s, cycles=12, schedule=late(s, 12, 4)),
    "by gradient, late, .3 - .05": lambda s: by_gradient(s, schedule=late(s), budget=(0.3, 0.05)),
    "by gradient, late, final .25": lambda s: by_gradient(s, schedule=late(s), final_fraction=0.25),
    "by gradient, late, final .25, .3 - .05": lambda s: by_gradient(
        s, schedule=late(s), final_fraction=0.25, budget=(0.3, 0.05)
    ),
    "by gradient, late, 12 cycles, final .25": lambda s: by_gradient(
        s, cycles=12, schedule=late(s, 12, 4), final_fraction=0.25, budget=(0.3, 0.05)
    ),
    "by gradient, late, 16 cycles, final .15": lambda s: by_gradient(
        s, cycles=16, schedule=late(s, 16, 5), final_fraction=0.15, budget=(0.3, 0.05)
    ),
}  # fmt: skip
OTHERS: dict[str, Callable[[float], Method]] = {
    "GMP": lambda s: fxsparse.GMP(sparsity=s, distribution=fxsparse.ERK()),
    "RigL": lambda s: fxsparse.RigL(sparsity=s),
}


def controls(method: RESU) -> dict[str, RESU]:
    """The recipe and its controls."""
    still = dataclasses.replace(method, theta=ThetaSGD(lr=0.0))
    none = dataclasses.replace(still, budget=(0.0, 0.0))
    return {
        "": method,
        "eta=0": still,
        "r=0,eta=0": none,
        "pruning": dataclasses.replace(none, init=ThetaInit.ZERO, subset=AllDead()),
    }


def build() -> nn.Module:
    """The dense net with masks."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return fxsparse.transform(net, (torch.zeros(2, 1, 8, 8),))


def adamw(parameters: object) -> torch.optim.Optimizer:
    """The optimizer of all arms."""
    return torch.optim.AdamW(parameters, lr=2e-3)  # type: ignore[arg-type]  # parameters of a model


def accuracy(method: Method, seed: int, steps: int, part: str) -> float:
    """Train from scratch; accuracy in % on a part of the data."""
    data = digits(seed)
    task = Task(build, data.train, epochs=10**6, batch_size=64, optimizer=adamw, deterministic=False)
    state = start(task, seed)
    handle = fxsparse.attach(state.model, state.optimizer, dataclasses.replace(method, seed=seed), steps)
    fit(state, task, steps)
    handle.detach()
    return 100 * evaluate(state.model, getattr(data, part)).accuracy


class Cache:
    """Accuracies on disk, so that a table that was stopped goes on: one JSON object a line."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self.known = {row["key"]: row["accuracy"] for row in map(json.loads, lines)}

    def accuracy(self, method: Method, seed: int, steps: int, part: str) -> float:
        """As `accuracy`, from the file where it is known."""
        key = f"{method!r} {seed} {steps} {part}"
        if key not in self.known:
            self.known[key] = accuracy(method, seed, steps, part)
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(json.dumps({"key": key, "accuracy": self.known[key]}) + "\n")
        return float(self.known[key])


def interval(ours: list[float], theirs: list[float]) -> str:
    """Mean paired difference and its 95 % t-interval."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{mean:+.2f}"
    half = T_95[min(len(differences) - 1, len(T_95) - 1)] * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def main() -> None:
    """Print the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--first-seed", type=int, default=0, help="fresh seeds for the confirmation of a choice")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--part", default="validation", choices=["validation", "test"])
    parser.add_argument("--cache", type=Path, help="file of finished runs")
    options = parser.parse_args()
    cache = Cache(options.cache)
    warnings.filterwarnings("ignore", "theta hardly moved")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    print(f"{'sparsity':>8} {'arm':<34} {'mean':>6} {'std':>5}  paired difference of the recipe to it")
    for sparsity in options.sparsity:
        known: dict[str, list[float]] = {}
        made: dict[str, tuple[str, Method]] = {name: ("", make(sparsity)) for name, make in OTHERS.items()}
        for name in options.arms:
            for key, arm in controls(RECIPES[name](sparsity)).items():
                made[f"{name} | {key}" if key else name] = (name, arm)
        for label, (recipe, method) in made.items():
            known[label] = [cache.accuracy(method, seed, options.steps, options.part) for seed in seeds]
            if label == recipe:
                against = f"{interval(known[label], known['GMP'])} (to GMP)"
            else:
                against = interval(known[recipe], known[label]) if recipe else ""
            spread = statistics.stdev(known[label]) if len(seeds) > 1 else math.nan
            print(
                f"{sparsity:>8} {label:<34} {statistics.fmean(known[label]):>6.2f} {spread:>5.2f}  {against}",
                flush=True,
            )


if __name__ == "__main__":
    main()
