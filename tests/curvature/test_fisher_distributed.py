"""Several processes hold what one process would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fxsparse.curvature import FisherCollector
from fxsparse.errors import ConfigError

WORKER = """
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
dist.destroy_process_group()
"""


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_with_uneven_shards_equal_one_process(ranks: int, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
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
            assert torch.allclose(value, eight.get()[f"default|{name}|channel"], rtol=1e-12)
    for found in results[1:]:
        for key, value in results[0]["get"]["all"].items():
            assert torch.equal(found["get"]["all"][key], value)


def test_reductions_that_cannot_be_done_are_refused() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ConfigError, match="init_process_group"):
        FisherCollector(model).all_reduce()
    with pytest.raises(ConfigError, match="'ema'"):
        FisherCollector(model, accumulate="ema").all_reduce()
