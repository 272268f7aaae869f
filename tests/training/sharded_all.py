"""Everything that runs on sharded models, in one launch: starting processes takes longer than most of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.training import sharded_bad, sharded_guard, sharded_prune, sharded_resu
from tests.training.ranks import on_each_rank


def work(rank: int, ranks: int, folder: Path, arguments: list[str]) -> dict[str, Any]:
    return {
        "prune": sharded_prune.work(rank, ranks, folder, []),
        "bad": sharded_bad.work(rank, ranks, folder, []),
        "guard": sharded_guard.work(rank, ranks, folder, []),
        "resu": sharded_resu.work(rank, ranks, folder, ["train"]),
    }


if __name__ == "__main__":
    on_each_rank(work)
