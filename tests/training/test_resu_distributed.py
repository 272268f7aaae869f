"""RESU on two processes: the masks, theta and reports of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = """
import json, os, sys, warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from fxsparse.nn import Linear, masks
from fxsparse.sparsity import MaskSet, Uniform
from fxsparse.sparsity.saliency import Taylor, Wanda
from fxsparse.training import attach
from fxsparse.training.resu import RESU
from fxsparse.training.resu_subset import TopGradient
from fxsparse.training.resu_theta import ThetaSGD

torch.set_num_threads(1)
warnings.simplefilter("ignore")
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()


def dyadic(*shape, seed):
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).double() / 8


def train(method):
    model = torch.nn.Sequential(Linear(6, 10, bias=False), Linear(10, 4, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(dyadic(10, 6, seed=1))
        model[1].weight.copy_(dyadic(4, 10, seed=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-6)
    outer = DDP(model) if ranks > 1 else model
    handle = attach(outer, optimizer, method, 24)
    x, y = dyadic(64, 6, seed=3)[rank::ranks], dyadic(64, 4, seed=4)[rank::ranks]
    for _ in range(24):
        optimizer.zero_grad()
        ((outer(x) * y).sum() * ranks / 64).backward()
        optimizer.step()
    weights = [[float(v) for v in p.detach().flatten()] for p in model.parameters()]
    rows = [[row.name, row.won, row.displaced] for row in handle.report().resurrections]
    return [MaskSet(masks(model)).digest(), rows, weights]


common = {"sparsity": 0.5, "cycles": 2, "distribution": Uniform(), "budget": (0.3, 0.2), "theta": ThetaSGD(lr=2.0**-5)}
methods = {
    "plain": RESU.frozen(**common),
    "by gradient": RESU.frozen(**common, score=Taylor(), prune=Taylor(), subset=TopGradient(0.5)),
    "by inputs": RESU.frozen(**common, score=Wanda(), prune=Wanda()),
}
(Path(sys.argv[1]) / f"{ranks}_{rank}.json").write_text(json.dumps({n: train(m) for n, m in methods.items()}))
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # every result is on disk; C++ threads torn down by the interpreter's exit are not what is tested
"""


def run(folder: Path, ranks: int) -> list[dict[str, list]]:
    (folder / "worker.py").write_text(WORKER)
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29600 + os.getpid() % 300 + ranks)}
    environment |= {"WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(folder / "worker.py"), str(folder)],
            env={**environment, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors[-2000:]
    return [json.loads((folder / f"{ranks}_{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes_resurrect_what_one_does(tmp_path):
    (one,), (first, second) = run(tmp_path, 1), run(tmp_path, 2)
    assert first == second
    for name, (digest, rows, weights) in one.items():
        assert first[name][:2] == [digest, rows], name
        assert sum(won for _, won, _ in rows) > 0
        for ours, theirs in zip(first[name][2], weights, strict=True):
            assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-9, atol=1e-12)
