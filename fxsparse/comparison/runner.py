"""Running a comparison: in parallel processes, resumable, one file per training."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fxsparse.comparison.cell import Cell, check, load, train
from fxsparse.comparison.config import DENSE, Config, build
from fxsparse.comparison.results import Arm, markdown, summarise_cells
from fxsparse.data import Splits
from fxsparse.errors import DataError
from fxsparse.report.metrics import write_atomically
from fxsparse.sparsity import Pattern

Patterns = Mapping[str, Pattern]


def cells(config: Config) -> list[Cell]:
    """Every training of a comparison: the dense arm once per seed, the others at each pattern and sparsity."""
    dense = [Cell(DENSE, "", 0.0, seed) for seed in config.run.seeds] if config.dense else []
    return dense + [
        Cell(label, pattern, sparsity, seed)
        for label, arm in config.methods.items()
        for pattern in arm.patterns or config.patterns
        for sparsity in config.sparsities
        for seed in config.run.seeds
    ]


def directory(config: Config, fingerprint: str) -> Path:
    """Where the results of this configuration on this data lie; seeds, workers and the list of arms do not name it."""
    shared = {"data": fingerprint, "limit": config.data.limit, "train": config.train.model_dump(mode="json")}
    digest = hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:12]
    return Path(config.run.results_dir) / f"{config.run.name}-{digest}"


def run(
    config: Config, patterns: Patterns, *, progress: Callable[[Cell, int, int], None] | None = None
) -> tuple[Path, list[Arm]]:
    """Train what is not there yet, then write `table.md`, `results.json` and, with plotly, `comparison.html`.

    Args:
        config: The comparison.
        patterns: The pattern of each word in `config.words`.
        progress: Called after each training with its cell, the number done and the number in all.

    Returns:
        The directory and the table's rows.

    Raises:
        ConfigError: an arm that its method excludes; nothing is trained then.
        DataError: the data cannot be read, or a result file is damaged.
    """
    splits = load(config)
    home = directory(config, splits.fingerprint)
    (home / "cells").mkdir(parents=True, exist_ok=True)
    found = _complete(config, patterns, splits, home, cells(config), {}, progress)
    found |= _complete(config, patterns, splits, home, longer(config, found), found, progress)
    reference = config.compared
    arms = summarise_cells(found, reference)
    write_atomically(home / "table.md", markdown(arms, reference))
    rows = [{"cell": vars(cell), **result} for cell, result in found.items()]
    write_atomically(home / "results.json", json.dumps(rows, sort_keys=True, indent=1))
    return home, arms


def _complete(
    config: Config,
    patterns: Patterns,
    splits: Splits,
    home: Path,
    wanted: list[Cell],
    before: Mapping[Cell, Any],
    progress: Callable[[Cell, int, int], None] | None,
) -> dict[Cell, dict[str, Any]]:
    """Train those of the wanted cells that have no file yet, and read them all."""
    files = {cell: home / "cells" / f"{cell.key}-{_options(config, cell)}.json" for cell in wanted}
    missing = [cell for cell in wanted if not files[cell].exists()]
    _check(config, patterns, missing, splits)
    done = len(before) + len(wanted) - len(missing)
    for cell, result in _trained(config, patterns, missing, splits):
        write_atomically(files[cell], json.dumps(result, sort_keys=True))
        done += 1
        if progress is not None:
            progress(cell, done, len(before) + len(wanted))
    return {cell: _read(path) for cell, path in files.items()}


def longer(config: Config, found: Mapping[Cell, Mapping[str, Any]]) -> list[Cell]:
    """The cells that train again: until the FLOPs of dense training are spent, or `equal_flops` times the steps."""
    if config.equal_flops is None:
        return []
    costs: dict[tuple[str, str, float], list[float]] = {}
    for cell, result in found.items():
        costs.setdefault((cell.label, cell.pattern, cell.sparsity), []).append(float(result["flops"]))
    again = []
    for cell in found:
        flops = costs[cell.label, cell.pattern, cell.sparsity]
        factor = min(config.equal_flops, len(flops) / max(sum(flops), 1e-30))
        if cell.label != DENSE and factor > 1:
            again.append(replace(cell, steps=round(factor * config.train.steps)))
    return again


def _options(config: Config, cell: Cell) -> str:
    """What names a result besides the cell: the method with all of its settings, defaults too."""
    method = "" if cell.label == DENSE else repr(build(config.methods[cell.label], cell.sparsity, cell.seed))
    return hashlib.sha256(method.encode()).hexdigest()[:8]


def _check(config: Config, patterns: Patterns, missing: list[Cell], splits: Splits) -> None:
    """Refuse before the first training what would be refused after hours."""
    seen = set()
    for cell in missing:
        kind = cell.label, cell.pattern, cell.sparsity
        if cell.label != DENSE and kind not in seen:
            seen.add(kind)
            check(config, cell, patterns.get(cell.pattern), splits)


def _trained(
    config: Config, patterns: Patterns, missing: list[Cell], splits: Splits
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    if config.run.workers == 1 or len(missing) < 2:
        for cell in missing:
            yield cell, train(config, cell, patterns.get(cell.pattern), splits)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.run.workers, mp_context=context, initializer=_begin) as pool:
        futures = {pool.submit(_work, config, cell, patterns.get(cell.pattern)): cell for cell in missing}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_splits: dict[str, Splits] = {}


def _begin() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A run that is killed takes its processes with it; what they were training would be lost anyway."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _work(config: Config, cell: Cell, pattern: Pattern | None) -> dict[str, Any]:
    key = config.data.model_dump_json()
    if key not in _splits:
        _splits[key] = load(config)
    return train(config, cell, pattern, _splits[key])


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"`path` (={path}) cannot be read: {error}; delete it, and it is trained again") from error
    if not isinstance(found, dict) or "test_accuracy" not in found:
        raise DataError(f"`path` (={path}) is no result of a comparison; delete it, and it is trained again")
    return found
