"""Real processes: good models, crashes, hangs, noise, and a run that is stopped and goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from zoo_examples import BAD, GOOD, X6, entry, write_zoo

import fxsparse
from fxsparse.errors import ConfigError
from fxsparse.zoo.records import EAGER, EntryResult, Status
from fxsparse.zoo.runner import Settings, Tick, chosen, run_zoo, source_digest, split
from fxsparse.zoo.schema import load_zoo
from fxsparse.zoo.summary import target_rows

CORE = ("transform", "train", "reload", "half", "batch")


def run(place: Path, settings: Settings, out: Path) -> tuple[dict[str, EntryResult], list[Tick]]:
    zoo, folder = load_zoo(place)
    ticks: list[Tick] = []
    return {result.name: result for result in run_zoo(zoo, folder, settings, out, ticks.append)}, ticks


def statuses(result: EntryResult) -> dict[str, str]:
    return {stage.stage: stage.status.value for stage in result.stages}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, EntryResult], Path]:
    place = write_zoo(tmp_path_factory.mktemp("zoo"), [*GOOD, *BAD])
    out = tmp_path_factory.mktemp("out")
    return run(place, Settings(CORE, sys.executable, jobs=2, timeout=100), out)[0], out


@pytest.mark.parametrize("name", [each["name"] for each in GOOD])
def test_a_good_model_passes(finished: tuple[dict[str, EntryResult], Path], name: str) -> None:
    result = finished[0][name]
    assert statuses(result) == dict.fromkeys((EAGER, *CORE), "pass"), [s.reason for s in result.stages]
    transform = result.stage("transform")
    assert transform is not None
    numbers = transform.numbers
    assert numbers["masked"] > 0
    assert numbers["silent_count"] == 0
    assert numbers["eval_difference"] == 0
    assert numbers["transform_s"] > 0 and numbers["record_s"] > 0 and numbers["ratio"] > 0
    train = result.stage("train")
    assert train is not None and abs(train.numbers["density"] - 0.2) < 0.05
    assert len(train.numbers["losses"]) == 3


def test_what_runs_as_a_graph_is_told(finished: tuple[dict[str, EntryResult], Path]) -> None:
    structure = {name: result.stages[1].numbers.get("root_graph") for name, result in finished[0].items()}
    assert structure["good/mlp"] is True
    assert structure["good/branching"] is False


def test_a_model_with_nothing_to_mask_fails(finished: tuple[dict[str, EntryResult], Path]) -> None:
    result = finished[0]["bad/nothing_to_mask"]
    assert statuses(result)["transform"] == "fail"
    assert "scale" in result.stages[1].reason


def test_a_model_that_is_not_deterministic_is_compared_within_its_own_noise(
    finished: tuple[dict[str, EntryResult], Path],
) -> None:
    result = finished[0]["bad/random"]
    assert result.stages[0].status is Status.PASS
    assert "not deterministic" in result.stages[0].reason
    assert result.stages[0].numbers["noise"] > 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bad/segfault", "SIGSEGV"),
        ("bad/exits", "SystemExit"),
        ("bad/forward", "no forward today"),
    ],
)
def test_an_original_that_does_not_run_is_a_row(
    finished: tuple[dict[str, EntryResult], Path], name: str, words: str
) -> None:
    result = finished[0][name]
    assert statuses(result) == {EAGER: "fail", **dict.fromkeys(CORE, "not applicable")}
    assert words in result.stages[0].reason
    assert result.stages[0].detail


def test_a_crash_costs_the_stage_in_which_it_happens(finished: tuple[dict[str, EntryResult], Path]) -> None:
    result = finished[0]["bad/dies_in_bfloat16"]
    assert statuses(result) == {EAGER: "pass", **dict.fromkeys(CORE, "pass"), "half": "fail"}
    half = result.stage("half")
    assert half is not None and "SIGSEGV" in half.reason
    assert "forward" in half.detail  # where it crashed


def test_every_entry_has_a_file_and_targets_count_only_originals_that_run(
    finished: tuple[dict[str, EntryResult], Path],
) -> None:
    results, out = finished
    assert len(list((out / "results").glob("*.json"))) == len(results)
    assert not list(out.rglob(".tmp*"))
    rows = {row.name: row for row in target_rows(list(results.values()))}
    assert rows["the original builds and runs"].found.endswith("(7/10)")
    assert rows["transform + train + reload"].found.endswith("(6/7)")
    assert rows["transform + train + reload"].worst == ("bad/nothing_to_mask",)


def test_a_hang_is_ended_with_all_its_children(tmp_path: Path) -> None:
    started = tmp_path / "pids"
    code = (
        "import os, subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"open({str(started)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}'); time.sleep(600)"
    )
    place = write_zoo(tmp_path / "zoo", [entry("hang", code)])
    began = time.monotonic()
    results, _ = run(place, Settings(("transform",), sys.executable, timeout=1.5), tmp_path / "out")
    assert time.monotonic() - began < 60
    assert "no result after 1.5 s" in results["hang"].stages[0].reason
    assert statuses(results["hang"]) == {EAGER: "fail", "transform": "not applicable"}
    pids = [int(pid) for pid in started.read_text().split()]
    assert len(pids) == 2
    assert [pid for pid in pids if alive(pid)] == []


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and only not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and alive(pid):
        time.sleep(0.1)
    return not alive(pid)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_goes_on_where_it_was(tmp_path: Path, how: signal.Signals) -> None:
    flag, pid_file, out = tmp_path / "flag", tmp_path / "pid", tmp_path / "out"
    wait = (
        f"import os, time, pathlib; open({str(pid_file)!r}, 'w').write(str(os.getpid()))\n"
        f"while not pathlib.Path({str(flag)!r}).exists(): time.sleep(.05)\n"
        "raise ValueError('the end')"
    )
    slow = {**entry("slow", ""), "ctor": wait}
    place = write_zoo(tmp_path / "zoo", [entry("quick", "m=tiny.Raises()"), slow])
    shutil.copytree(Path(fxsparse.__file__).parent, tmp_path / "source/fxsparse")  # nobody edits this one meanwhile
    command = [sys.executable, "-m", "fxsparse.cli", "zoo", str(place), "--stages", "batch", "--out", str(out)]
    where: Any = {"env": {**os.environ, "PYTHONPATH": str(tmp_path / "source")}, "cwd": tmp_path}
    heard = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's shell has it ignored
    try:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **where)
    finally:
        signal.signal(signal.SIGINT, heard)
    end = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    child = int(pid_file.read_text())
    assert alive(child)
    os.kill(process.pid, how)
    assert process.wait(30) != 0
    assert gone(child)
    (stored,) = (out / "results").glob("*.json")
    before = stored.read_bytes(), stored.stat().st_mtime_ns
    flag.touch()
    again = subprocess.run(command, capture_output=True, text=True, check=False, **where)
    assert again.returncode == 1
    assert "[2/2] slow" in again.stdout and "] quick" not in again.stdout
    assert "ValueError: the end" in again.stdout and "no forward today" in again.stdout
    assert (stored.read_bytes(), stored.stat().st_mtime_ns) == before


def test_what_makes_a_result_stale(tmp_path: Path) -> None:
    place = write_zoo(tmp_path / "zoo", [entry("a", "raise ValueError('first')"), entry("b", "raise ValueError('b')")])
    out, settings = tmp_path / "out", Settings(("batch",), sys.executable)
    run(place, settings, out)

    def stale(**change: Any) -> list[str]:
        zoo, folder = load_zoo(place)
        changed = dataclasses.replace(settings, **change)
        return [job.name for job, _ in split(chosen(zoo, changed.only), zoo, folder, changed, out)[1]]

    def store(name: str, change: Callable[[dict[str, Any]], None]) -> None:
        (path,) = (out / "results").glob(f"{name}-*.json")
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    store("b", lambda values: values["stages"][0].update(status="pass"))
    current = source_digest()
    for name in "ab":  # whoever edits the library while this test runs
        store(name, lambda values: values["key"].update(source=current))
    if source_digest() == current:
        assert stale() == []
    assert stale(retry_failed=True) == ["a"]
    assert stale(fresh=True) == ["a", "b"]
    assert stale(fresh=True, only=("b",)) == ["b"]
    assert stale(sparsity=0.5) == stale(stages=("half",)) == ["a", "b"]
    assert stale(retry_failed=True, sparsity=0.5) == ["a", "b"]
    store("b", lambda values: values["key"].update(source="another"))
    assert "b" in stale()
    assert stale(retry_failed=True) == ["a"]
    write_zoo(place, [entry("a", "raise ValueError('first')"), entry("b", "raise ValueError('other')")])
    assert stale(retry_failed=True) == ["a", "b"]
    write_zoo(place, [entry("a", "raise ValueError('first')"), entry("b", "raise ValueError('b')")])
    store("b", lambda values: values["key"].update(source=source_digest()))
    (place / "tiny.py").write_text("changed = True")
    assert stale() == ["a", "b"]
    store("b", lambda values: values.pop("stages"))
    assert stale(retry_failed=True) == ["a", "b"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (f'exec {sys.executable} -S "$@"', "No module named 'torch'"),  # -S: no site-packages
        ("echo 'unknown option -P' >&2; exit 2", "unknown option -P"),
    ],
)
def test_an_interpreter_that_cannot_do_it_is_named_and_ends_the_run(tmp_path: Path, script: str, words: str) -> None:
    empty = tmp_path / "python"
    empty.write_text(f"#!/bin/sh\n{script}\n")
    empty.chmod(0o755)
    place = write_zoo(tmp_path / "zoo", [entry("a", "m=tiny.mlp()", X6)])
    with pytest.raises(ConfigError, match=rf"cannot import fxsparse \(.*{words}"):
        run(place, Settings(("batch",), str(empty)), tmp_path / "out")


def test_only_takes_globs_and_refuses_those_that_fit_nothing(tmp_path: Path) -> None:
    zoo, _ = load_zoo(write_zoo(tmp_path, GOOD))
    assert [each.name for each in chosen(zoo, ("*/mlp", "good/t*"))] == ["good/mlp", "good/tied"]
    with pytest.raises(ConfigError, match=r"`only` \(=timm/\*\) fits none of 4 entries, such as good/mlp"):
        chosen(zoo, ("good/mlp", "timm/*"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages": ("transform", "fly")}, "`stages` (=transform,fly) must be some of transform, train"),
        ({"stages": ()}, "`stages` (=)"),
        ({"stages": ("train", "train")}, "names a stage twice"),
        ({"jobs": 0}, "`jobs` (=0)"),
        ({"timeout": 0.0}, "`timeout` (=0.0)"),
        ({"timeout": float("nan")}, "`timeout` (=nan)"),
        ({"sparsity": 0.0}, "`sparsity` (=0.0)"),
        ({"sparsity": 1.0}, "`sparsity` (=1.0)"),
        ({"python": "/no/such/python"}, "`python` (=/no/such/python)"),
        ({"fresh": True, "retry_failed": True}, "exclude each other"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, object], words: str) -> None:
    values: dict[str, object] = {"stages": ("batch",), "python": sys.executable, **change}
    with pytest.raises(ConfigError) as caught:
        Settings(**values)  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_a_result_survives_its_file(finished: tuple[dict[str, EntryResult], Path]) -> None:
    for result in finished[0].values():
        assert EntryResult.from_plain(json.loads(json.dumps(result.plain()))).plain() == result.plain()
