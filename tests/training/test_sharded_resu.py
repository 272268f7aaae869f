"""RESU on a model that `fully_shard` spread: masks, theta and reports of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.ranks import assert_alike, launch
from tests.training.sharded_resu import found_by

MODULE = "tests.training.sharded_resu"


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return found_by(0, 1)


@pytest.mark.filterwarnings("ignore:theta hardly moved", "ignore:nothing to resurrect")
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_resurrect_what_one_process_does(tmp_path: Path, single: dict[str, Any], ranks: int) -> None:
    every = launch(MODULE, tmp_path, ranks, "train")
    assert all(each == every[0] for each in every[1:])
    assert every[0].keys() == single.keys() or ranks == 4 and every[0].keys() <= single.keys()
    for name, found in every[0].items():
        expected = single[name]
        assert_alike(found, expected, name)
        assert sum(row[2] for row in expected[-1]["won"]) > 3, name
