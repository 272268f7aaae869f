"""Weights masked at the parameter under `fully_shard`: the masks and values of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.ranks import assert_alike, launch
from tests.training.sharded_guard import found_by


@pytest.fixture(scope="module")
def single() -> dict[str, list[dict[str, Any]]]:
    return found_by(0, 1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_as_one_process(tmp_path: Path, single: dict[str, list[dict[str, Any]]], ranks: int) -> None:
    every = launch("tests.training.sharded_guard", tmp_path, ranks)
    assert all(each == every[0] for each in every[1:])
    assert len(every[0]) == (len(single) if ranks == 2 else 5)
    for name, found in every[0].items():
        assert_alike(found, single[name], name)
    assert len({single[name][0]["masks"] for name in ("rigl", "set", "snip", "resu")}) == 4
    same = [single[name][0]["masks"] for name in single if name.startswith("rigl, ")]
    assert len(same) == 3 and len(set(same)) == 1
