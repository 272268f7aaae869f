"""Models that `fully_shard` spread hold what one process does; ranks that do not agree all get a typed error.

Pruning reads the scores of all ranks' samples. Shardings that cut groups of rows, weights masked at the parameter and
RESU (masks, theta and reports) train as one process. What two and four ranks do comes from one launch each.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fxsparse.errors import ConfigError
from fxsparse.nn import Linear
from fxsparse.training import OneShot, prune
from tests.training import sharded_bad, sharded_guard, sharded_prune, sharded_resu
from tests.training.ranks import assert_alike, assert_close, launch

Found = list[dict[str, Any]]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_hold_what_one_process_does(tmp_path: Path, ranks: int) -> None:
    every = launch("tests.training.sharded_all", tmp_path, ranks)
    pruned([each["prune"] for each in every], ranks)
    disagreed([each["bad"] for each in every], ranks)
    guarded([each["guard"] for each in every], ranks)
    resurrected([each["resu"] for each in every], ranks)


def pruned(every: Found, ranks: int) -> None:
    single = sharded_prune.found_by(0, 1)
    assert all(each["found"] == every[0]["found"] for each in every[1:])
    found = every[0]["found"]
    for name in sharded_prune.EXACT:
        assert found[name] == single[name], name  # bit for bit
    assert len({single[name][0] for name in sharded_prune.EXACT}) == len(sharded_prune.EXACT)
    for name in ("trained on", *(f"smooth {name}" for name in sharded_prune.SMOOTH)):
        assert found[name][0] == single[name][0], name
        assert_close(found[name][1], single[name][1], name)
    for refusals in (each["refused"] for each in every if ranks == 2):
        assert "ConfigError: `model` has other masked weights on other ranks (here 2" in refusals["model"]
        assert "ConfigError: `method` (=SNIP(" in refusals["method"] and "another one on other" in refusals["method"]
        assert "ConfigError: `loss` (=None)" in refusals["loss"]
        assert "ConfigError: `batches` (=none)" in refusals["batches"]
        assert "calibration data on every rank" in refusals["no form"]
        assert "DataError: SNIP scores of `0.weight` hold NaN or Inf" in refusals["nan on one rank"]
        assert "DataError: masks differ between ranks" in refusals["masks"]


def disagreed(every: Found, ranks: int) -> None:
    assert all(each["found"] == every[0]["found"] for each in every[1:])
    for name, expected in sharded_bad.shardings(0, 1).items():
        assert_alike(every[0]["found"][name], expected, name)
    for rank, each in enumerate(every if ranks == 2 else ()):
        for found in (each["fsdp"], each["ddp"]):
            assert found["model"].startswith("ConfigError: `model` has other masked weights on other ranks (here 3:")
            assert found["method"].startswith("ConfigError: `method` (=SET(") and f"seed={rank}" in found["method"]
            assert (
                f"ConfigError: `total_steps` (={100 + 4 * rank}) differs between ranks (=[100, 104])" in found["length"]
            )
            assert "is not of this handle" in found["another method's"]
            for name in ("another state", "no state"):
                step = "of step 3" if rank else "none" if name == "no state" else "of step 1"
                assert found[name].startswith(f"ConfigError: `state` (={step}) is another one on other ranks"), name
            for name, said in (
                ("damaged state", "`records[0]` of the state (=1)"),
                ("few parameters", "`optimizer` (=SGD) "),
            ):
                other = "rank 0 cannot go on, so this one (=1) does not: ConfigError: " if rank else ""
                assert found[name].startswith(f"ConfigError: {other}{said}"), name
            assert found["masks of another moment"].startswith("DataError: the model's masks are not those of the")
        assert each["resu"]["phase"].startswith("DataError: the loaded handle is in a RESU phase and the model is not")
        assert each["resu"]["sabotage"].startswith("DataError: masks differ between ranks after step 10")
        assert all("torch.distributed.algorithms.Join" in message for message in each["joined"])
        assert each["reshaped"].startswith("ConfigError: `0.weight` is stored alive only, and this mask update changes")
        assert each["gathered"].pop("gathered") == "True"
        for message in each["gathered"].values():
            assert message.startswith(
                "ConfigError: `0.weight` (=DTensor) is spread over ranks: on every rank take torch"
            )
        assert "`0.weight` is stored alive only and sharded" in each["storage"]["packed"]
        assert "`0.weight` (=DTensor) is sharded: its alive entries cannot move" in each["storage"]["store_alive"]
        assert "`0.weight` (=DTensor) is sharded; Whole needs whole weights" in each["storage"]["whole"]


def guarded(every: Found, ranks: int) -> None:
    single = sharded_guard.found_by(0, 1)
    assert all(each == every[0] for each in every[1:])
    assert len(every[0]) == (len(single) if ranks == 2 else 5)
    for name, found in every[0].items():
        assert_alike(found, single[name], name)
    assert len({single[name][0]["masks"] for name in ("rigl", "set", "snip", "resu")}) == 4
    same = [single[name][0]["masks"] for name in single if name.startswith("rigl, ")]
    assert len(same) == 3 and len(set(same)) == 1


def resurrected(every: Found, ranks: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "theta hardly moved|nothing to resurrect")
        single = sharded_resu.found_by(0, 1)
    assert all(each == every[0] for each in every[1:])
    assert every[0].keys() == single.keys() or ranks == 4 and every[0].keys() <= single.keys()
    for name, found in every[0].items():
        expected = single[name]
        assert_alike(found, expected, name)
        assert sum(row[2] for row in expected[-1]["won"]) > 3, name


def test_the_older_sharding_is_refused_by_prune() -> None:
    sharded = type("FullyShardedDataParallel", (nn.Module,), {"__module__": "torch.distributed.fsdp.whatever"})
    model = nn.Sequential(Linear(4, 4))
    model.add_module("wrapped", sharded())
    with pytest.raises(ConfigError, match=r"`wrapped` \(=FullyShardedDataParallel\) is sharded"):
        prune(model, OneShot(0.5))
