"""Two processes find the masks that one process finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fxsparse.errors import ConfigError
from fxsparse.nn import Linear
from fxsparse.training import Static, attach

WORKER = """
import json, os, sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from fxsparse.errors import DataError
from fxsparse.nn import Linear, masks
from fxsparse.training import SET, RigL, attach
from fxsparse.training.alive_only import restore_dense, store_alive
from fxsparse.training.packed_gradient import PackedGradient
from fxsparse.sparsity import MaskSet, SharedSupport, Uniform

torch.set_num_threads(1)
folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()


def dyadic(*shape, seed):
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).double() / 8


def train(method, wrap_first, accumulate, sabotage=False, buckets=False, samples=64, alive=False):
    model = torch.nn.Sequential(Linear(6, 10, bias=False), Linear(10, 4, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(dyadic(10, 6, seed=1))
        model[1].weight.copy_(dyadic(4, 10, seed=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-6)
    x, y = dyadic(64, 6, seed=3)[:samples][rank::ranks], dyadic(64, 4, seed=4)[:samples][rank::ranks]
    outer = model
    kwargs = {"broadcast_buffers": False} if sabotage else {}
    wrap = lambda: DDP(model, gradient_as_bucket_view=buckets, **kwargs) if ranks > 1 else model
    if wrap_first:
        outer = wrap()
    handle = attach(outer, optimizer, method)
    if alive:
        store_alive(handle)
    if not wrap_first:
        outer = wrap()
    if sabotage and rank == 1:
        with torch.no_grad():
            model[0].weight_mask.copy_(model[0].weight_mask.flip(0))
    for step in range(5):
        optimizer.zero_grad()
        parts = list(zip(x.chunk(accumulate), y.chunk(accumulate)))
        for i, (a, b) in enumerate(parts):
            loss = (outer(a) * b).sum() * ranks / 64  # DDP averages over ranks
            if i + 1 < len(parts) and ranks > 1:
                with outer.no_sync():
                    (model(a) * b).sum().mul(ranks / 64).backward()
            else:
                loss.backward()
        if alive and step % 2 == 1 and ranks > 1:  # G of a short input is kept as its factors until ranks share it
            totals = [tap.total for tap in handle._window._taps.values()]
            assert all(isinstance(each, PackedGradient) and each.passes for each in totals)
        optimizer.step()
    assert handle.updates == 2
    if alive:
        restore_dense(handle)
    digest = MaskSet(masks(model)).digest()
    weights = [[float(v) for v in p.detach().flatten()] for p in model.parameters()]
    return [digest, weights, [list(r) for r in map(lambda r: (r.step, r.dropped, r.grown), handle.report())]]


rigl = RigL(sparsity=0.5, every=2, end=100, alpha=0.5)
found = {
    "rigl": train(rigl, True, 1),
    "rigl, attached before DDP": train(rigl, False, 1),
    "rigl, accumulated": train(rigl, True, 4),
    "rigl, bucket views": train(rigl, True, 2, buckets=True),
    "rigl, step kept": train(RigL(sparsity=0.5, every=2, end=100, alpha=0.5, replaces_step=False), True, 1),
    "rigl, alive only": train(
        RigL(sparsity=0.5, every=2, end=100, alpha=0.5, pattern=SharedSupport(2), distribution=Uniform()),
        False, 1, samples=2, alive=True,
    ),
    "set": train(SET(sparsity=0.5, every=2), True, 1),
}
if ranks > 1:
    try:
        train(SET(sparsity=0.5, every=2), True, 1, sabotage=True)
        found["sabotage"] = "not noticed"
    except DataError as error:
        found["sabotage"] = str(error)
(folder / f"{ranks}-{rank}.json").write_text(json.dumps(found))
print("rank", rank, "has written its results", file=sys.stderr)
dist.barrier()
dist.destroy_process_group()
print("rank", rank, "has left the group", file=sys.stderr, flush=True)
os._exit(0)  # every result is on disk; C++ threads torn down by the interpreter's exit are not what is tested
"""


def launch(folder: Path, ranks: int) -> list[dict[str, object]]:
    script = folder / "worker.py"
    script.write_text(WORKER)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    run = subprocess.run([*command, str(script), str(folder)], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return [json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]


def test_two_processes_equal_one(tmp_path):
    [single] = launch(tmp_path, 1)
    one, two = launch(tmp_path, 2)
    notes = [each.pop("sabotage") for each in (one, two)]
    assert one == two  # bit for bit
    for name, (digest, weights, rows) in single.items():
        assert one[name][0] == digest and one[name][2] == rows, name
        for own, other in zip(weights, one[name][1], strict=True):
            assert own == pytest.approx(other, rel=0, abs=1e-12)  # the products of later steps need more than 53 bits
    assert single["rigl"][0] != single["set"][0]
    for note in notes:  # every rank raises
        assert "masks differ between ranks after step 2" in note


def test_sharded_models_are_refused_by_name():
    sharded = type("FullyShardedDataParallel", (nn.Module,), {"__module__": "torch.distributed.fsdp.whatever"})
    model = nn.Sequential(Linear(4, 4))
    model.add_module("wrapped", sharded())
    with pytest.raises(ConfigError, match=r"`wrapped` \(=FullyShardedDataParallel\) is sharded"):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1), Static())
