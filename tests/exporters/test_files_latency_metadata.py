"""One file whole or not at all; medians of interleaved runs; files of others are refused."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fxsparse.errors import ExportError
from fxsparse.exporters import Latency, measure, read_metadata
from fxsparse.exporters.files import replacing
from fxsparse.exporters.reasons import why_not_faster
from fxsparse.exporters.report import Target
from fxsparse.sparsity import Channel, SharedSupport, Unstructured


def test_the_file_appears_whole_with_ordinary_permissions(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    mask = os.umask(0o022)
    try:
        with replacing(path) as temporary:
            assert temporary.parent == tmp_path and not path.exists()
            temporary.write_bytes(b"content")
    finally:
        os.umask(mask)
    assert path.read_bytes() == b"content" and list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), ExportError("x")])
def test_any_error_removes_the_temporary_file_and_passes(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_disk_becomes_an_export_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="could not be written .*No space left on device.*make room"):
        with replacing(tmp_path / "a.onnx"), open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_yielded_for_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be written"), replacing(tmp_path / "no" / "a.onnx"):
        pytest.fail("yielded")


class Sleeper:
    def __init__(self, name: str, log: list[str], clock: list[float], times: list[float]) -> None:
        self.name, self.log, self.clock, self.times = name, log, clock, times

    def run(self, _: None, feed: Any) -> None:
        self.clock[0] += self.times[sum(name == self.name for name in self.log) % len(self.times)]
        self.log.append(self.name)


def test_medians_of_interleaved_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    sessions = {"a": Sleeper("a", log, clock, [0.010]), "b": Sleeper("b", log, clock, [0.001, 0.004, 9.0])}
    medians, runs = measure(sessions, {}, seconds=1.0)
    assert medians == {"a": pytest.approx(10.0), "b": pytest.approx(4.0)}
    assert log.count("a") == log.count("b") == runs + 3
    assert all({x, y} == {"a", "b"} for x, y in zip(log[::2], log[1::2], strict=True))
    assert log[6:10] == ["a", "b", "b", "a"]


@pytest.mark.parametrize(("seconds", "runs"), [(0.0, 5), (1e9, 1000)])
def test_the_number_of_runs_is_bounded(seconds: float, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert measure({"a": Sleeper("a", [], clock, [0.01])}, {}, seconds)[1] == runs


def test_a_latency_prints_its_conditions() -> None:
    latency = Latency(dense_ms=3.0, ticket_ms=1.5, batch=16, threads=1, runs=100)
    assert latency.speedup == 2.0
    expected = "dense 3.000 ms, ticket 1.500 ms (2.00x) at batch 16; 1 thread, medians of 100 interleaved runs"
    assert str(latency) == expected


def test_reasons_follow_the_patterns() -> None:
    assert "no masks" in why_not_faster([], Target.STOCK)[0]
    mixed = " ".join(why_not_faster([Unstructured(), SharedSupport(8), Channel()], Target.STOCK))
    assert all(part in mixed for part in ("scattered", "shared-support", "channels"))
    assert "scattered" not in " ".join(why_not_faster([Channel(0)], Target.STOCK))


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    from onnx import ModelProto

    with pytest.raises(ExportError, match=r"missing\.onnx\) cannot be read as ONNX \(FileNotFoundError\)"):
        read_metadata(tmp_path / "missing.onnx")
    (tmp_path / "junk.onnx").write_bytes(b"\xff" * 50)
    with pytest.raises(ExportError, match="cannot be read as ONNX"):
        read_metadata(tmp_path / "junk.onnx")
    (tmp_path / "plain.onnx").write_bytes(ModelProto(producer_name="other").SerializeToString())
    with pytest.raises(ExportError, match="not written by this fxsparse"):
        read_metadata(tmp_path / "plain.onnx")


def test_importing_the_exporters_loads_no_runtime() -> None:
    code = "import sys, fxsparse.exporters; print({'onnx', 'onnxruntime', 'onnxscript'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
