"""Reductions that are repeated, saved and loaded; draws and stopping on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsparse.curvature import FisherCollector
from tests.torchrun import torchrun

WORKER = """
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from fxsparse.curvature import FisherCollector
from fxsparse.errors import ConfigError, DataError

torch.set_num_threads(1)
folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
x, y = torch.randn(11, 6, dtype=torch.float64), torch.arange(11) % 3
own = slice(0, 8) if rank == 0 else slice(8, 11)
empty = x[:0], y[:0]


def told(collector):
    units = collector.metadata("default|0.weight|channel").units
    return collector.get(), collector.variance(), collector.standard_error(), units, collector.skipped()


found = {}
collector = FisherCollector(model)
collector.update((x[own], y[own]))
if rank == 1:
    collector.update(empty)
collector.all_reduce()
found["once"] = told(collector)
collector.all_reduce()
found["again"] = told(collector)
collector.consolidate()
collector.update((2 * x[own], y[own]))
collector.all_reduce()
assert collector.snapshot()  # survives
found["twice"] = told(collector)
if rank == 0:
    collector.save(folder / "reduced.safetensors")
dist.barrier()

for name, loads in (("all", True), ("first", rank == 0)):
    other = FisherCollector(model)
    if loads:
        other.load(folder / "reduced.safetensors")
    other.update((3 * x[own], y[own]))
    if rank == 0 and name == "all":
        other.save(folder / "unreduced.safetensors")
    other.all_reduce()
    other.all_reduce()
    found[name] = told(other)
dist.barrier()

alone = FisherCollector(model)
alone.load(folder / "alone.safetensors")
alone.update((x[own], y[own]))
alone.all_reduce()
found["alone"] = told(alone)

if rank == 1:
    try:
        FisherCollector(model).load(folder / "unreduced.safetensors")
    except ConfigError as error:
        found["unreduced"] = str(error)
apart = FisherCollector(model)
apart.load(folder / ("reduced.safetensors" if rank == 0 else "alone.safetensors"))
try:
    apart.all_reduce()
except ConfigError as error:
    found["apart"] = str(error)
collector.clear()
collector.update((x[own], y[own]))
collector.all_reduce()
found["cleared"] = told(collector)

for kind in ("sketch", "mc"):
    drawn = [FisherCollector(model, kind=kind) for _ in range(2)]
    for each in drawn:
        each.update((x, y))
    assert all(torch.equal(v, drawn[1].get()[k]) for k, v in drawn[0].get().items())
    found[kind] = drawn[0].get()
    drawn[0].all_reduce()
    if rank == 0:
        drawn[0].save(folder / f"{kind}.safetensors")
    dist.barrier()
    resumed = FisherCollector(model, kind=kind)
    resumed.load(folder / f"{kind}.safetensors")
    found[kind + " resumed"] = resumed.oneshot((x, y))

generator = torch.Generator().manual_seed(rank)
batches = [(torch.randn(4, 6, generator=generator, dtype=torch.float64), y[:4]) for _ in range(30)]
watched = FisherCollector(model)
found["used"] = watched.collect(batches, top=3, overlap=1.0, patience=3), watched.settled
watched = FisherCollector(model)
found["short"] = watched.collect(batches[: 2 + rank], top=3, patience=9), watched.settled
try:
    FisherCollector(model).collect(batches if rank == 0 else [(x * float("nan"), y)], top=3)
except DataError as error:
    found["failed"] = str(error)
torch.save(found, folder / f"{rank}.pt")
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # every result is on disk; C++ threads torn down by the interpreter's exit are not what is tested
"""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(11, 6, dtype=torch.float64), torch.arange(11) % 3


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    model = network()
    alone = FisherCollector(model)
    alone.update(data())
    alone.save(folder / "alone.safetensors")
    script = folder / "worker.py"
    script.write_text(WORKER)
    done = torchrun(2, script, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


SCALES = {
    "once": (1,),
    "again": (1,),
    "twice": (1, 2),
    "all": (1, 2, 3),
    "first": (1, 2, 3),
    "alone": (1, 1),
    "cleared": (1,),
}


@pytest.mark.parametrize("name", SCALES)
def test_what_was_reduced_counts_once(results: list[dict[str, Any]], name: str) -> None:
    model = network()
    x, y = data()
    alone = FisherCollector(model)
    for scale in SCALES[name]:
        alone.update((scale * x, y))
    expected = alone.get(), alone.variance(), alone.standard_error()
    for found in results:
        for here, there in zip(found[name], expected, strict=False):
            assert here.keys() == there.keys()
            for key, value in there.items():
                assert torch.allclose(here[key], value, rtol=1e-10), key
        assert found[name][3] == 11 * len(SCALES[name])
        assert found[name][4] == (name not in ("alone", "cleared"))
    for key, value in results[0][name][0].items():
        assert torch.equal(value, results[1][name][0][key])


def test_states_that_cannot_be_added_are_refused(results: list[dict[str, Any]]) -> None:
    assert "`rank` of the state (=0)" in results[1]["unreduced"]
    for found in results:
        assert "loaded from different states" in found["apart"]


@pytest.mark.parametrize("kind", ["sketch", "mc", "sketch resumed", "mc resumed"])
def test_ranks_draw_apart(results: list[dict[str, Any]], kind: str) -> None:
    first, second = (found[kind] for found in results)
    for key, value in first.items():
        if "|0." in key:
            assert not torch.equal(value, second[key]), key


def test_ranks_stop_together(results: list[dict[str, Any]]) -> None:
    assert results[0]["used"] == results[1]["used"] and results[0]["used"][1] is True
    assert 4 <= results[0]["used"][0] < 30
    assert [found["short"] for found in results] == [(2, False)] * 2
    assert "rank 1 could not" in results[0]["failed"] and "NaN" in results[1]["failed"]
