"""`fully_shard` (FSDP2): sharded weights get the masks and values of one process; checkpoints fit other world sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

WORKER = """
import json, os, sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fxsparse
from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import masked_weights, masks
from fxsparse.sparsity import Magnitude, MaskSet, SharedSupport
from fxsparse.training import GMP, MEST, SET, SNFS, RigL, SRigL, attach

torch.set_num_threads(1)
folder = Path(sys.argv[1])
rank, ranks = 0, 1
if "RANK" in os.environ:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
STEPS = 12


def net():
    torch.manual_seed(0)
    dense = torch.nn.Sequential(
        torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Unflatten(1, (1, 10)), torch.nn.Conv1d(1, 7, 3),
        torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(56, 4),
    ).double()
    return fxsparse.transform(dense, (torch.zeros(2, 6, dtype=torch.float64),))


def spread(model):
    if ranks > 1:
        for name, layer in model.named_children():
            if list(layer.parameters()):
                fully_shard(layer)
        fully_shard(model)
    return model


def batch(step, part=slice(None)):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    return x[rank::ranks][part], x[:, :4].argmax(1)[rank::ranks][part]


def go(model, optimizer, start, end, accumulate=1, clip=None):
    for step in range(start, end):
        optimizer.zero_grad(clip != "in place")
        if clip in ("in place", "thrown away"):  # a batch that no step follows
            x, y = batch(step + 100)
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.zero_grad(clip != "in place")
        for i in range(accumulate):
            size = 16 // ranks // accumulate
            x, y = batch(step, slice(i * size, (i + 1) * size))
            if ranks > 1:
                model.set_requires_gradient_sync(i + 1 == accumulate or clip == "sync each")
            (torch.nn.functional.cross_entropy(model(x), y) / accumulate).backward()
        if clip == "norm":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def described(model, handle):
    for name, mask in masks(model).items():
        assert not full(model.get_parameter(name))[~mask].any(), name
    for parameter, state in handle.optimizer.state.items():
        for value in state.values():
            weight = next((w for w in masked_weights(model).values() if w.weight is parameter), None)
            if weight is not None and value.shape == parameter.shape:
                assert not full(value)[~weight.mask].any()
    return [
        MaskSet(masks(model)).digest(),
        [full(p).flatten().tolist() for p in model.parameters()],
        [[r.step, r.name, r.dropped, r.grown] for r in handle.report()],
    ]


METHODS = {
    "rigl": RigL(sparsity=0.6, every=3, end=100),
    "rigl, step kept": RigL(sparsity=0.6, every=3, end=100, replaces_step=False),
    "rigl, shared": RigL(sparsity=0.5, every=3, end=100, pattern=SharedSupport(2)),
    "rigl, from magnitude": RigL(sparsity=0.6, every=3, end=100, initial=Magnitude()),
    "set": SET(sparsity=0.6, every=3),
    "gmp": GMP(sparsity=0.7, every=2),
    "snfs": SNFS(sparsity=0.6, every=3),
    "srigl": SRigL(sparsity=0.6, every=3),
    "mest": MEST(sparsity=0.6),
}


def train(name, accumulate=1, clip=None, sgd=True):
    model = spread(net())
    kind, options = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}) if sgd else (torch.optim.AdamW, {"lr": 0.01})
    optimizer = kind(model.parameters(), **options)
    handle = attach(model, optimizer, METHODS[name], STEPS)
    go(model, optimizer, 0, STEPS, accumulate, clip)
    return described(model, handle)


def refused(act):
    try:
        act()
    except (ConfigError, DataError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


found = {}
mode = sys.argv[2]
if mode == "train":
    cases = {name: (name,) for name in METHODS} | {
        "accumulated": ("rigl, step kept", 2),
        "accumulated, synchronised": ("rigl, step kept", 2, "sync each"),
        "thrown away": ("rigl, step kept", 2, "thrown away"),
        "in place": ("rigl, step kept", 2, "in place"),
        "clipped": ("rigl, step kept", 1, "norm"),
        "adamw": ("rigl", 1, None, False),
    }
    found = {name: train(*cases[name]) for name in sys.argv[3:] or cases}
if mode == "train" and ranks > 1:
    model = spread(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(model, optimizer, METHODS["set"], STEPS)
    if rank == 1:
        name, weight = next(iter(masked_weights(model).items()))
        weight.mask.copy_(weight.mask.flip(0))
    found["sabotage"] = refused(lambda: go(model, optimizer, 0, STEPS))
    unsharded = net()
    optimizer = torch.optim.SGD(unsharded.parameters(), lr=0.1)
    handle = attach(unsharded, optimizer, METHODS["set"], STEPS)
    found["too late"] = refused(lambda: go(spread(unsharded), optimizer, 0, 1))
if mode in ("save", "resume"):
    model = spread(net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    store = folder / "checkpoint"
    if mode == "save":
        handle = attach(model, optimizer, METHODS["rigl"], STEPS)
        go(model, optimizer, 0, 7)
        dcp.save({"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)},
                 checkpoint_id=store)
        if rank == 0:
            torch.save(handle.state_dict(), folder / "handle.pt")
        if len(sys.argv) > 3 and rank == ranks - 1:
            os._exit(3)  # as one that is killed
        go(model, optimizer, 7, STEPS)
    else:
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=store)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        kept = torch.load(folder / "handle.pt", weights_only=True)
        handle = attach(model, optimizer, METHODS["rigl"], STEPS, state=kept)
        go(model, optimizer, 7, STEPS)
    found[mode] = described(model, handle)
(folder / f"{mode}-{ranks}-{rank}.json").write_text(json.dumps(found))
if ranks > 1:
    dist.barrier()
    dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # every result is on disk; C++ threads torn down by the interpreter's exit are not what is tested
"""


def start(folder: Path, ranks: int, *mode: str) -> subprocess.CompletedProcess[str]:
    script = folder / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(script), str(folder), *mode], env=env, capture_output=True, text=True, timeout=240
    )


def launch(folder: Path, ranks: int, *mode: str) -> list[dict[str, Any]]:
    run = start(folder, ranks, *mode)
    assert run.returncode == 0, run.stderr
    return [json.loads((folder / f"{mode[0]}-{ranks}-{rank}.json").read_text()) for rank in range(ranks)]


def assert_alike(found: list[Any], expected: list[Any], name: str) -> None:
    assert found[0] == expected[0] and found[2] == expected[2], name
    for own, other in zip(found[1], expected[1], strict=True):
        assert own == pytest.approx(other, rel=0, abs=1e-9), name


FOUR = ("rigl", "rigl, shared", "snfs", "srigl", "accumulated, synchronised", "clipped")


def assert_equal_to(single: dict[str, Any], every: list[dict[str, Any]], names: Iterable[str]) -> None:
    assert all(each == every[0] for each in every[1:])
    for name in names:
        assert_alike(every[0][name], single[name], name)
    assert "masks differ between ranks" in every[0]["sabotage"]
    assert "replaced after attach" in every[0]["too late"]


def test_sharded_training_equals_one_process(tmp_path: Path) -> None:
    [single] = launch(tmp_path, 1, "train")
    assert len({single[name][0] for name in ("rigl", "set", "gmp", "snfs", "rigl, shared")}) == 5
    assert single["accumulated"][0] == single["accumulated, synchronised"][0] == single["rigl, step kept"][0]
    assert single["thrown away"][0] == single["in place"][0] == single["accumulated"][0]
    assert_equal_to(single, launch(tmp_path, 2, "train"), single)
    assert_equal_to(single, launch(tmp_path, 4, "train", *FOUR), FOUR)


@pytest.mark.slow
def test_four_processes_train_every_case_as_one(tmp_path: Path) -> None:
    [single] = launch(tmp_path, 1, "train")
    assert_equal_to(single, launch(tmp_path, 4, "train"), single)


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "resumed"), [(2, 4), (4, 1)])
def test_checkpoints_resume_with_another_world_size(tmp_path: Path, saved: int, resumed: int) -> None:
    whole = launch(tmp_path, saved, "save")[0]["save"]
    for each in launch(tmp_path, resumed, "resume"):
        assert_alike(each["resume"], whole, f"{saved} -> {resumed}")


def test_a_rank_that_dies_ends_the_others_and_the_checkpoint_goes_on_with_another_world_size(tmp_path: Path) -> None:
    died = start(tmp_path, 2, "save", "die")
    assert died.returncode != 0 and not list(tmp_path.glob("save-*"))
    other = tmp_path / "whole"
    other.mkdir()
    [whole] = launch(other, 1, "save")
    for ranks in (1, 4):
        for each in launch(tmp_path, ranks, "resume"):
            assert_alike(each["resume"], whole["save"], f"after a death, on {ranks}")
