"""ONNX files side by side: latency, throughput, size and load time, interleaved in one process."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fxsparse.errors import ConfigError, ExportError
from fxsparse.exporters.inputs import first_line
from fxsparse.exporters.runtime import interleaved, open_session

if TYPE_CHECKING:
    from fxsparse.exporters.file_inputs import Filling, Signature

_LOADS = 3


@dataclass(frozen=True)
class BenchRow:
    """One file at one batch size and one number of threads.

    Attributes:
        path: the file, as given.
        batch: samples of a call.
        fixed: whether the file takes no other batch size; `asked` is what was wanted.
        asked: the batch size that was asked for.
        threads: threads of onnxruntime.
        runs: calls that were timed.
        p50_ms: median milliseconds of a call.
        p95_ms: the milliseconds that 95 of 100 calls stay below.
        throughput: samples a second, at the median.
        ratio: throughput over that of the first file; above 1 is faster.
        shapes: what was fed, by input name.
    """

    path: str
    batch: int
    fixed: bool
    asked: int
    threads: int
    runs: int
    p50_ms: float
    p95_ms: float
    throughput: float
    ratio: float
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class BenchFile:
    """What does not depend on the batch.

    Attributes:
        path: the file, as given.
        bytes: its size, with its data files.
        load_ms: median milliseconds to open a session, the file in the cache of the operating system.
        size_ratio: bytes over those of the first file.
    """

    path: str
    bytes: int
    load_ms: float
    size_ratio: float


@dataclass(frozen=True)
class BenchReport:
    """The result of `bench_files`; `str` gives a text, `to_json` everything.

    Attributes:
        files: the files, in the order given.
        rows: the measurements, by threads, then batch size, then file.
        notes: what was decided on the way.
    """

    files: tuple[BenchFile, ...]
    rows: tuple[BenchRow, ...]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """All figures as JSON: ``files``, ``rows``, ``notes``."""
        return json.dumps(asdict(self), indent=1)

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headings and cells."""
        size = {file.path: file for file in self.files}
        heading = ("file", "threads", "batch", "p50 ms", "p95 ms", "samples/s", "ratio", "MB", "load ms")
        cells: list[tuple[str, ...]] = [
            (
                row.path,
                str(row.threads),
                f"{row.batch} (fixed)" if row.fixed and row.batch != row.asked else str(row.batch),
                f"{row.p50_ms:.3f}",
                f"{row.p95_ms:.3f}",
                f"{row.throughput:,.0f}",
                f"{row.ratio:.2f}x",
                f"{size[row.path].bytes / 1e6:.2f}",
                f"{size[row.path].load_ms:.1f}",
            )
            for row in self.rows
        ]
        return heading, cells

    def __str__(self) -> str:
        heading, cells = self.table()
        widths = [max(map(len, column)) for column in zip(heading, *cells, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (heading, *cells)]
        return "\n".join([*lines, *(f"note  {note}" for note in self.notes)])


@dataclass(frozen=True, eq=False)
class _Subject:
    name: str
    path: Path
    bytes: int
    signature: Signature
    filling: Filling


def bench_files(
    paths: Sequence[str | os.PathLike[str]],
    *,
    batches: Sequence[int] = (1, 16, 128),
    threads: Sequence[int] = (1,),
    sizes: Mapping[str, int] | None = None,
    seconds: float = 1.0,
    seed: int = 0,
) -> BenchReport:
    """Time ONNX files of any origin in onnxruntime on random inputs.

    At each number of threads and each batch size all files run in turn, call by call, so that they meet the same
    drifts of the machine. Inputs are made from each file's signature: whole numbers that are looked up in a table stay
    below its length, masks are mostly true. A file of a fixed batch runs at that.

    Args:
        paths: the files; ratios are against the first.
        batches: sizes of the free axis 0.
        threads: numbers of threads of onnxruntime.
        sizes: sizes of other free axes by name; by default the first of 16, 8, 32, 64, 224, 1 that runs.
        seconds: about how long to measure at each batch size and number of threads.
        seed: of the random inputs.

    Raises:
        ExportError: a file cannot be read or run.
        ConfigError: nothing to measure, or a size below 1, or of an axis that no file has.
    """
    for name, values in (("paths", paths), ("batches", batches), ("threads", threads)):
        if not values:
            raise ConfigError(f"`{name}` (={values!r}) is empty: name at least one")
    for name, given in (("batches", batches), ("threads", threads)):
        if min(given) < 1:
            raise ConfigError(f"`{name}` (={tuple(given)}) must be 1 or more")
    if not seconds > 0:
        raise ConfigError(f"`seconds` (={seconds}) must be above 0")
    subjects = _subjects(paths, dict(sizes or {}), seed)
    loads = _load_times(subjects)
    files = tuple(
        BenchFile(s.name, s.bytes, load, s.bytes / subjects[0].bytes) for s, load in zip(subjects, loads, strict=True)
    )
    rows = [row for count in threads for row in _at(subjects, count, batches, seconds, seed)]
    return BenchReport(files, tuple(rows), tuple(_notes(subjects, batches)))


def _subjects(paths: Sequence[str | os.PathLike[str]], sizes: Mapping[str, int], seed: int) -> list[_Subject]:
    from fxsparse.exporters.file_inputs import fitting, read_signature
    from fxsparse.exporters.file_io import read_file

    read = [read_file(path) for path in paths]
    free = [read_signature(file.model).free_names for file in read]
    known = {name for names in free for name in names}
    if unknown := sorted(set(sizes) - known):
        raise ConfigError(f"`sizes` (={unknown[0]}) is no free axis of any file; there are: {', '.join(sorted(known))}")
    subjects = []
    for given, file, names in zip(paths, read, free, strict=True):
        signature = read_signature(file.model, {n: size for n, size in sizes.items() if n in names})
        filling = fitting(open_session(file.path), signature, signature.fixed_batch or 1, seed)
        subjects.append(_Subject(os.fspath(given), file.path, file.bytes, signature, filling))
    return subjects


def _load_times(subjects: Sequence[_Subject]) -> list[float]:
    times: list[list[float]] = [[] for _ in subjects]
    for _ in range(_LOADS):
        for subject, mine in zip(subjects, times, strict=True):
            start = time.perf_counter()
            open_session(subject.path)
            mine.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(mine) for mine in times]


def _at(
    subjects: Sequence[_Subject], threads: int, batches: Sequence[int], seconds: float, seed: int
) -> list[BenchRow]:
    sessions: list[Any] = [open_session(subject.path, threads) for subject in subjects]
    rows: list[BenchRow] = []
    for asked in batches:
        sized = [subject.signature.fixed_batch or asked for subject in subjects]
        feeds = [s.signature.draw(size, seed, s.filling) for s, size in zip(subjects, sized, strict=True)]
        calls = {str(i): partial(sessions[i].run, None, feed) for i, feed in enumerate(feeds)}
        for i, subject in enumerate(subjects):
            _check_runs(calls[str(i)], subject, sized[i])
        times = interleaved(calls, seconds)
        medians = [statistics.median(times[str(i)]) for i in range(len(subjects))]
        for i, subject in enumerate(subjects):
            rows.append(
                BenchRow(
                    path=subject.name,
                    batch=sized[i],
                    fixed=subject.signature.fixed_batch is not None,
                    asked=asked,
                    threads=threads,
                    runs=len(times[str(i)]),
                    p50_ms=1e3 * medians[i],
                    p95_ms=1e3 * float(np.quantile(times[str(i)], 0.95)),
                    throughput=sized[i] / medians[i],
                    ratio=(sized[i] / medians[i]) / (sized[0] / medians[0]),
                    shapes={name: value.shape for name, value in feeds[i].items()},
                )
            )
    return rows


def _check_runs(call: Callable[[], object], subject: _Subject, batch: int) -> None:
    try:
        call()
    except Exception as error:  # onnxruntime's errors share no base class
        names = ", ".join(subject.signature.free_names) or "none"
        raise ExportError(
            f"{subject.name} does not run at `batch` (={batch}) ({first_line(error)}): choose another, or say sizes of "
            f"its free axes ({names})"
        ) from error


def _notes(subjects: Sequence[_Subject], batches: Sequence[int]) -> list[str]:
    notes = []
    for subject in subjects:
        fixed = subject.signature.fixed_batch
        if fixed is not None and any(fixed != batch for batch in batches):
            notes.append(
                f"{subject.name} has the fixed batch {fixed}, at which it ran; its ratios are of samples a second"
            )
        others = [name for name in subject.signature.free_names if name in subject.signature.sizes]
        if others:
            said = ", ".join(f"{name} {subject.signature.sizes[name]}" for name in others)
            notes.append(f"{subject.name} ran with {said}")
    return notes
