"""Runs of a module of tests on several ranks (torchrun, gloo), for tests of what is spread over them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxsparse.errors import ConfigError, DataError
from tests.torchrun import torchrun


def launch(module: str, folder: Path, ranks: int, *arguments: str, die: bool = False) -> list[Any]:
    """What each rank found."""
    done = torchrun(ranks, "-m", module, folder, *arguments)
    assert (done.returncode != 0) == die, done.stderr
    return [] if die else [json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]


def on_each_rank(work: Callable[[int, int, Path, list[str]], Any]) -> None:
    """The main program of such a module: `work(rank, ranks, folder, arguments)`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks, folder = dist.get_rank(), dist.get_world_size(), Path(sys.argv[1])
    found = work(rank, ranks, folder, sys.argv[2:])
    (folder / f"{ranks}-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # every result is on disk; C++ threads torn down by the interpreter's exit are not what is tested


def spread(model: nn.Module) -> nn.Module:
    """The model by layers through `fully_shard`, the last one with the model itself; as it is on one rank."""
    if dist.is_initialized():
        from torch.distributed.fsdp import fully_shard

        for layer in [each for each in model.children() if list(each.parameters())][:-1]:
            fully_shard(layer)
        fully_shard(model)
    return model


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def refused(act: Callable[[], object]) -> str:
    """The error of an act."""
    try:
        act()
    except (ConfigError, DataError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def assert_close(own: list[list[float]], other: list[list[float]], name: str) -> None:
    """Values of one process, but for the order of sums."""
    for a, b in zip(own, other, strict=True):
        assert a == pytest.approx(b, rel=0, abs=1e-9), name


def assert_alike(found: list[dict[str, Any]], expected: list[dict[str, Any]], name: str) -> None:
    """The same descriptions, with close "values"."""
    for own, other in zip(found, expected, strict=True):
        assert {**own, "values": ...} == {**other, "values": ...}, name
        assert_close(own["values"], other["values"], name)
