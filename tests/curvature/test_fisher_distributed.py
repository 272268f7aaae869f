"""Several processes hold what one process would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fxsparse.curvature import FisherCollector
from fxsparse.errors import ConfigError
from tests.torchrun import torchrun

WORKER = """
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from fxsparse.curvature import FisherCollector
from fxsparse.curvature.taps_statistic import instrument_fisher

torch.set_num_threads(1)
folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
x, y = torch.randn(11, 6, dtype=torch.float64), torch.arange(11) % 3
collector = FisherCollector(DDP(model))
first, last = (0, 8) if rank == 0 else (8 + (rank - 1) * 3 // (ranks - 1), 8 + rank * 3 // (ranks - 1))
collector.update((x[first:last], y[first:last]), "all")
if rank == 1:
    collector.update((x[:4], y[:4]), "one rank only")
collector.all_reduce()
made = instrument_fisher(model, (x,))
wrapped = DDP(made.module)
own = slice(rank * 4 % 8, rank * 4 % 8 + 4)
torch.nn.functional.cross_entropy(wrapped(x[own]), y[own]).backward()
torch.save(
    {
        "get": {task: collector.get(task) for task in collector.tasks()},
        "variance": collector.variance("all"),
        "error": collector.standard_error("all"),
        "units": collector.metadata("all|0.weight|channel").units,
        "statistic": made.fisher(4),
    },
    folder / f"{rank}.pt",
)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # every result is on disk; C++ threads torn down by the interpreter's exit are not what is tested
"""


SHARDED = """
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

from fxsparse.curvature import FisherCollector

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(6, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)), nn.Linear(5, 5), nn.Linear(5, 3)
).double()
model[3].weight = model[2][0].weight
x, y = torch.randn(11, 6, dtype=torch.float64), torch.arange(11) % 3
calls = []
model[0].register_forward_hook(lambda *_: calls.append(1))
fully_shard(model)
own = slice(0, 8) if rank == 0 else slice(8, 11)
with torch.no_grad():
    model(x[own])  # leaves parameters whole
found = {}
for kind in ("empirical", "true"):
    collector = FisherCollector(model, kind=kind)
    collector.update((x[own], y[own]))
    collector.update((x[own], y[own]))
    collector.all_reduce()
    found[kind] = collector.get(), collector.variance()
assert len(calls) > 2
assert all(type(p).__name__ == "DTensor" for p in model.parameters())
assert all(p.numel() == 0 or p.untyped_storage().nbytes() <= 8 for p in collector._gathered.whole_ones)
F.cross_entropy(model(x[own]), y[own]).backward()  # it trains on as before
found["gradient"] = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
torch.save(found, Path(sys.argv[1]) / f"{rank}.pt")
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # every result is on disk; C++ threads torn down by the interpreter's exit are not what is tested
"""


def test_fully_sharded_models_equal_one_process(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    done = torchrun(2, script, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)), nn.Linear(5, 5), nn.Linear(5, 3)
    ).double()
    model[3].weight = model[2][0].weight
    x, y = torch.randn(11, 6, dtype=torch.float64), torch.arange(11) % 3
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for kind in ("empirical", "true"):
        alone = FisherCollector(model, kind=kind)
        alone.update((x, y))
        alone.update((x, y))
        for found in results:
            values, variances = found[kind]
            assert values.keys() == alone.get().keys() and "default|2.0.weight|channel" in values
            for key, value in alone.get().items():
                assert torch.allclose(values[key], value, rtol=1e-12), key
            for key, value in alone.variance().items():
                assert torch.allclose(variances[key], value, rtol=1e-10), key
    losses = [nn.functional.cross_entropy(model(x[part]), y[part]) for part in (slice(0, 8), slice(8, 11))]
    (sum(losses) / 2).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(results[0]["gradient"][name], parameter.grad, rtol=1e-10, atol=1e-14), name


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_with_uneven_shards_equal_one_process(ranks: int, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = torchrun(ranks, script, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(11, 6, dtype=torch.float64), torch.arange(11) % 3
    alone = FisherCollector(model)
    alone.update((x, y), "all")
    alone.update((x[:4], y[:4]), "one rank only")
    eight = FisherCollector(model)
    eight.update((x[:8], y[:8]))
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    for found in results:
        assert found["units"] == 11
        for task in ("all", "one rank only"):
            assert found["get"][task].keys() == alone.get(task).keys()
            for key, value in alone.get(task).items():
                assert torch.allclose(found["get"][task][key], value, rtol=1e-12)
        for key, value in alone.variance("all").items():
            assert torch.allclose(found["variance"][key], value, rtol=1e-10)
            assert torch.allclose(found["error"][key], alone.standard_error("all")[key], rtol=1e-10)
        for name, value in found["statistic"].items():  # ranks see samples 0-3 and 4-7, in turn
            kind = "channel" if name.endswith("weight") else "element"
            assert torch.allclose(value, eight.get()[f"default|{name}|{kind}"], rtol=1e-12)
    for found in results[1:]:
        for key, value in results[0]["get"]["all"].items():
            assert torch.equal(found["get"]["all"][key], value)


def test_reductions_that_cannot_be_done_are_refused() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ConfigError, match="init_process_group"):
        FisherCollector(model).all_reduce()
    with pytest.raises(ConfigError, match="'ema'"):
        FisherCollector(model, accumulate="ema").all_reduce()
