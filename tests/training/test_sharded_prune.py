"""`prune` on a model that `fully_shard` spread: the scores of all ranks' samples, the masks of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.ranks import assert_close, launch
from tests.training.sharded_prune import EXACT, SMOOTH, found_by

MODULE = "tests.training.sharded_prune"


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return found_by(0, 1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_prune_as_one_process_does(tmp_path: Path, single: dict[str, Any], ranks: int) -> None:
    every = launch(MODULE, tmp_path, ranks)
    assert all(each["found"] == every[0]["found"] for each in every[1:])
    found = every[0]["found"]
    for name in EXACT:
        assert found[name] == single[name], name  # bit for bit
    assert len({single[name][0] for name in EXACT}) == len(EXACT)
    for name in ("trained on", *(f"smooth {name}" for name in SMOOTH)):
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
