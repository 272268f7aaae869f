"""Ranks that do not agree get a typed error, all of them; shardings that cut groups of rows train as one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fxsparse.errors import ConfigError
from fxsparse.nn import Linear
from fxsparse.training import OneShot, prune
from tests.training.ranks import assert_alike, launch
from tests.training.sharded_bad import shardings


@pytest.fixture(scope="module")
def single() -> dict[str, list[dict[str, Any]]]:
    return shardings(0, 1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree_or_say_why_not(tmp_path: Path, single: dict[str, list[dict[str, Any]]], ranks: int) -> None:
    every = launch("tests.training.sharded_bad", tmp_path, ranks)
    assert all(each["found"] == every[0]["found"] for each in every[1:])
    for name, expected in single.items():
        assert_alike(every[0]["found"][name], expected, name)
    for rank, each in enumerate(every if ranks == 2 else ()):
        for found in (each["fsdp"], each["ddp"]):
            assert found["model"].startswith("ConfigError: `model` has other masked weights on other ranks (here 3:")
            assert found["method"].startswith("ConfigError: `method` (=SET(") and f"seed={rank}" in found["method"]
            assert (
                f"ConfigError: `total_steps` (={100 + 4 * rank}) differs between ranks (=[100, 104])" in found["length"]
            )
            assert "is not of this handle" in found["another method's"]
            assert found["masks of another moment"].startswith("DataError: the model's masks are not those of the")
        assert each["resu"]["phase"].startswith("DataError: the loaded handle is in a RESU phase and the model is not")
        assert each["resu"]["sabotage"].startswith("DataError: masks differ between ranks after step 10")
        assert "`0.weight` is stored alive only and sharded" in each["storage"]["packed"]
        assert "`0.weight` (=DTensor) is sharded: its alive entries cannot move" in each["storage"]["store_alive"]
        assert "`0.weight` (=DTensor) is sharded; Whole needs whole weights" in each["storage"]["whole"]


def test_the_older_sharding_is_refused_by_prune():
    sharded = type("FullyShardedDataParallel", (nn.Module,), {"__module__": "torch.distributed.fsdp.whatever"})
    model = nn.Sequential(Linear(4, 4))
    model.add_module("wrapped", sharded())
    with pytest.raises(ConfigError, match=r"`wrapped` \(=FullyShardedDataParallel\) is sharded"):
        prune(model, OneShot(0.5))
