"""What regrouping an unstructured network into shared supports costs on Fashion-MNIST, step by step.

    python benchmarks/regroup_accuracy.py [FOLDER] [--network lenet|mlp] [--seeds 3] [--epochs 6] [--group 16 64]

A network is trained by gradual magnitude pruning to 90 %, unstructured; then regrouped by magnitude and by
compensation, each followed by a short fine-tuning. Test accuracy in percent, mean and standard deviation over the
seeds; nothing is chosen by it. FOLDER holds the IDX files (Debian: dataset-fashion-mnist).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from fxsparse.data import Splits, idx_folder
from fxsparse.lottery.regroup import regroup
from fxsparse.models import lenet_300_100, mlp
from fxsparse.planning import transform
from fxsparse.sparsity import SharedSupport
from fxsparse.training import GMP, attach
from fxsparse.training.loop import Task, evaluate, fit, start

STAGES = ("unstructured", "magnitude", "compensated", "magnitude + tuned", "compensated + tuned")


def task(splits: Splits, network: str, epochs: float, rate: float) -> Task:
    def build() -> nn.Module:
        model = lenet_300_100(784) if network == "lenet" else mlp(784, (1024, 1024))
        return transform(model, (splits.train.inputs[:2],), exclude="output")

    def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
        return Adam(parameters, lr=rate)

    return Task(
        build=build,
        train=splits.train,
        epochs=max(1, round(epochs)),
        batch_size=128,
        optimizer=optimizer,
        scheduler=lambda optimizer, steps: CosineAnnealingLR(optimizer, steps),
    )


def measure(splits: Splits, network: str, seed: int, groups: list[int], epochs: int, tune: int) -> dict[str, dict]:
    training = task(splits, network, epochs, 2e-3)
    state = start(training, seed)
    handle = attach(state.model, state.optimizer, GMP(sparsity=0.9, every=50, seed=seed), training.total_steps)
    fit(state, training)
    handle.detach()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(splits.train), generator=generator)[:2048]
    batches = [splits.train.inputs[some] for some in drawn.split(256)]
    healing = task(splits, network, tune, 1e-3)
    found = {}
    for group in groups:
        rows: dict[str, float] = {}
        for name, calibration in (("magnitude", []), ("compensated", batches)):
            model = copy.deepcopy(state.model)
            report = regroup(
                model,
                SharedSupport(group),
                calibration,
                evaluate=lambda each: evaluate(each, splits.test).accuracy,
                finetune=healing,
                seed=seed,
            )
            rows |= {"unstructured": report.accuracy("unstructured"), name: report.accuracy(name)}
            rows[f"{name} + tuned"] = report.accuracy("fine-tuned")
        found[str(group)] = rows
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--network", default="lenet", choices=("lenet", "mlp"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--tune", type=int, default=1)
    parser.add_argument("--group", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    splits = idx_folder(given.folder)
    results = []
    for seed in range(given.seeds):
        began = time.monotonic()
        results.append(measure(splits, given.network, seed, given.group, given.epochs, given.tune))
        print(f"seed {seed}: {time.monotonic() - began:.0f} s {results[-1]}", flush=True)
        if given.json:
            given.json.write_text(json.dumps(results))
    print(f"| {given.network}, 90 % | " + " | ".join(STAGES) + " |")
    for group in given.group:
        cells = []
        for stage in STAGES:
            values = [100 * each[str(group)][stage] for each in results]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}")
        print(f"| G={group} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
