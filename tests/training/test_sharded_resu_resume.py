"""RESU under `fully_shard` goes on from a checkpoint that another number of ranks saved within a phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.ranks import assert_alike, launch
from tests.training.sharded_resu import resume

MODULE = "tests.training.sharded_resu"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, launch(MODULE, folder, 2, "save")[0]


@pytest.mark.filterwarnings("ignore:theta hardly moved", "ignore:torch.distributed is disabled")
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_phase_resumes_with_another_world_size(saved: tuple[Path, list[dict[str, Any]]], ranks: int) -> None:
    folder, expected = saved
    every = launch(MODULE, folder, ranks, "resume") if ranks > 1 else [resume(0, 1, folder)]
    for found in every:
        assert_alike(found, expected, f"2 -> {ranks}")
