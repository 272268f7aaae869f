"""A whole list of models: which are to be run, in how many processes, and a file for each result."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fxsparse
from fxsparse.errors import ConfigError, DataError
from fxsparse.report.metrics import write_atomically
from fxsparse.sparsity import check_sparsity
from fxsparse.zoo.process import Interrupted, Limits, run_stages
from fxsparse.zoo.records import STAGES, EntryResult
from fxsparse.zoo.schema import Entry, Zoo

RESULTS = "results"

Job = tuple[Entry, dict[str, str]]
"""An entry, and the digests that its result will carry."""


@dataclass(frozen=True)
class Settings:
    """How a list of models is run.

    Attributes:
        stages: names of the stages, of `STAGES`.
        only: globs of entry names; empty for all.
        jobs: processes at a time.
        timeout: seconds for a stage.
        python: interpreter of the environment that has the models' packages.
        sparsity: dead fraction in (0, 1).
        fresh: run everything again.
        retry_failed: keep finished entries without a failed stage, whatever source they were made with.

    Raises:
        ConfigError: a value out of range, an unknown stage.
    """

    stages: tuple[str, ...]
    python: str
    only: tuple[str, ...] = ()
    jobs: int = 1
    timeout: float = 300.0
    sparsity: float = 0.8
    fresh: bool = False
    retry_failed: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.stages if name not in STAGES]
        if unknown or not self.stages:
            raise ConfigError(f"`stages` (={','.join(self.stages)}) must be some of {', '.join(STAGES)}")
        if len(set(self.stages)) < len(self.stages):
            raise ConfigError(f"`stages` (={','.join(self.stages)}) names a stage twice; name it once")
        if self.jobs < 1:
            raise ConfigError(f"`jobs` (={self.jobs}) must be at least 1")
        if not 0 < self.timeout < float("inf"):
            raise ConfigError(f"`timeout` (={self.timeout}) must be a positive number of seconds")
        if check_sparsity(self.sparsity) == 0:
            raise ConfigError(f"`sparsity` (={self.sparsity}) must be above 0; without dead weights nothing is tried")
        if not Path(self.python).is_file():
            raise ConfigError(f"`python` (={self.python}) is no file; give the path of an interpreter")
        if self.fresh and self.retry_failed:
            raise ConfigError("`fresh` and `retry` exclude each other; choose one")


@dataclass(frozen=True)
class Tick:
    """Something happened: `stage` of `name` began, or, with `result`, the entry is finished.

    Attributes:
        name: name of the entry.
        stage: the stage that begins; None at the end of an entry.
        result: the finished entry.
        reused: whether the result was found, not made.
    """

    name: str
    stage: str | None = None
    result: EntryResult | None = None
    reused: bool = False


def run_zoo(zoo: Zoo, folder: Path, settings: Settings, out: Path, tell: Callable[[Tick], None]) -> list[EntryResult]:
    """Run the entries, each in a process of its own; finished ones of an earlier run in `out` are kept.

    The entries are code, and the code is run: only run lists that you trust.

    Args:
        zoo: the list.
        folder: where its modules are imported from.
        settings: how.
        out: run directory; made where it is missing.
        tell: is called whenever something happened, from several threads.

    Returns:
        one result an entry, in the order of the list.

    Raises:
        ConfigError: `settings.only` names no entry, or the interpreter cannot import fxsparse.
        DataError: the run directory cannot be written.
        KeyboardInterrupt: passed on after all processes were ended; what was finished is on disk.
    """
    entries = chosen(zoo, settings.only)
    place = out / RESULTS
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"`out` (={out}) cannot be written: {error.strerror}; choose another directory") from error
    found, todo = split(entries, zoo, folder, settings, out)
    for result in found.values():
        tell(Tick(result.name, result=result, reused=True))
    with _snapshot() as package:
        limits = Limits(settings.timeout, settings.python, max(1, (os.cpu_count() or 1) // settings.jobs), package)
        for result in _run_all(todo, zoo, folder, settings, limits, place, tell):
            found[result.name] = result
    return [found[entry.name] for entry in entries]


def split(
    entries: Sequence[Entry], zoo: Zoo, folder: Path, settings: Settings, out: Path
) -> tuple[dict[str, EntryResult], list[Job]]:
    """The results in `out` that still hold, by name, and the jobs that are to be run.

    A result holds for the same entry, stages and options, the same source of fxsparse and of the modules beside the
    list.
    """
    source = {"fxsparse": fxsparse.__version__, "source": source_digest(), "modules": _digest(folder.glob("*.py"))}
    found: dict[str, EntryResult] = {}
    todo: list[Job] = []
    for entry in entries:
        key = {"entry": _entry_digest(entry, zoo, settings), **source}
        kept = None if settings.fresh else _finished(out / RESULTS / file_name(entry.name), key, settings)
        if kept is None:
            todo.append((entry, key))
        else:
            found[entry.name] = kept
    return found, todo


def chosen(zoo: Zoo, only: Sequence[str]) -> list[Entry]:
    """The entries whose name fits one of the globs; all without globs.

    Raises:
        ConfigError: a glob fits no name.
    """
    for glob in only:
        if not any(fnmatch.fnmatchcase(entry.name, glob) for entry in zoo.entries):
            raise ConfigError(
                f"`only` (={glob}) fits none of {len(zoo.entries)} entries, such as {zoo.entries[0].name}"
            )
    return [e for e in zoo.entries if not only or any(fnmatch.fnmatchcase(e.name, glob) for glob in only)]


def _run_all(
    todo: Sequence[Job],
    zoo: Zoo,
    folder: Path,
    settings: Settings,
    limits: Limits,
    place: Path,
    tell: Callable[[Tick], None],
) -> Iterator[EntryResult]:
    stop = threading.Event()

    def work(entry: Entry, key: dict[str, str]) -> EntryResult:
        if stop.is_set():
            raise Interrupted
        began = time.monotonic()
        request = {
            "entry": entry.request(),
            "batch": zoo.batch,
            "sparsity": settings.sparsity,
            "folder": str(folder),
        }
        stages = run_stages(request, settings.stages, limits, stop, lambda name: tell(Tick(entry.name, name)))
        result = EntryResult(entry.name, entry.lib, entry.family, key, time.monotonic() - began, tuple(stages))
        write_atomically(place / file_name(entry.name), json.dumps(result.plain(), indent=1) + "\n")
        tell(Tick(entry.name, result=result))
        return result

    with ThreadPoolExecutor(settings.jobs, thread_name_prefix="zoo") as pool:
        pending: set[Future[EntryResult]] = {pool.submit(work, entry, key) for entry, key in todo}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            stop.set()
            for future in pending:
                future.cancel()


@contextmanager
def _snapshot() -> Iterator[str]:
    """A copy of this fxsparse: who edits it while a long list runs still gets one version's results."""
    with tempfile.TemporaryDirectory(prefix="fxsparse-source-", ignore_cleanup_errors=True) as folder:
        package = Path(folder) / "fxsparse"
        shutil.copytree(Path(fxsparse.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
        yield str(package)


def _finished(path: Path, key: dict[str, str], settings: Settings) -> EntryResult | None:
    """The stored result where it still holds; a file that cannot be read counts as missing."""
    try:
        result = EntryResult.from_plain(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if settings.retry_failed:
        return result if result.key.get("entry") == key["entry"] and not result.failed else None
    return result if dict(result.key) == key else None


def file_name(name: str) -> str:
    """A file name for an entry: readable, unique, safe on every system.

    >>> file_name("timm/vit tiny")
    'timm_vit_tiny-0afc32.json'
    """
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:80].lstrip(".")
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:6]}.json"


def _entry_digest(entry: Entry, zoo: Zoo, settings: Settings) -> str:
    values = {
        "entry": entry.request(),
        "batch": zoo.batch,
        "stages": settings.stages,
        "sparsity": settings.sparsity,
        "python": settings.python,
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def source_digest() -> str:
    """Digest of the source of this fxsparse."""
    return _digest(Path(fxsparse.__file__).parent.rglob("*.py"))


def _digest(files: Iterator[Path]) -> str:
    found = hashlib.sha256()
    for file in sorted(files):
        try:
            content = file.read_bytes()
        except OSError:  # gone since it was listed
            continue
        found.update(file.name.encode() + b"\0" + hashlib.sha256(content).digest())
    return found.hexdigest()[:16]
