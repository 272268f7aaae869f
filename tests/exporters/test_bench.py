"""Files side by side: inputs of any signature, fixed batches, statistics of interleaved runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from fxsparse.errors import ConfigError, ExportError
from fxsparse.exporters import bench, bench_files
from fxsparse.exporters.file_inputs import Filling, fitting, index_limits, read_signature
from fxsparse.exporters.runtime import interleaved, open_session


def stored(array: Any, name: str) -> Any:
    return numpy_helper.from_array(np.asarray(array), name)


def value(name: str, *shape: Any, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, list(shape))


def file(path: Path, nodes: list[Any], constants: list[Any], inputs: list[Any], outputs: list[Any]) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    path.write_bytes(model.SerializeToString())
    return path


def dense(path: Path, batch: Any = "batch", width: int = 40) -> Path:
    weight = np.random.default_rng(0).standard_normal((30, width)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    return file(path, nodes, [stored(weight, "w")], [value("x", batch, 30)], [value("y", batch, width)])


def tokens(path: Path, rows: int = 5, shift: int = 0) -> Path:
    """Looks token ids up, after a shift, and hides some by a mask of the same length."""
    nodes = [
        helper.make_node("Add", ["ids", "two"], ["moved"]),
        helper.make_node("Unsqueeze", ["moved", "axis"], ["row"]),
        helper.make_node("Gather", ["table", "row"], ["h"]),
        helper.make_node("Squeeze", ["h", "axis"], ["e"]),
        helper.make_node("Cast", ["mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "last"], ["m1"]),
        helper.make_node("Mul", ["e", "m1"], ["y"]),
    ]
    constants = [stored(np.int64(shift), "two"), stored(np.array([0]), "axis"), stored(np.array([-1]), "last"),
                 stored(np.random.default_rng(0).standard_normal((rows, 6)).astype(np.float32), "table")]  # fmt: skip
    inputs = [
        value("ids", "batch", "length", kind=TensorProto.INT64),
        value("mask", "batch", "length", kind=TensorProto.BOOL),
    ]
    return file(path, nodes, constants, inputs, [value("y", "batch", "length", 6)])


def test_files_are_compared_at_every_batch_and_number_of_threads(tmp_path: Path) -> None:
    paths = [dense(tmp_path / "a.onnx"), dense(tmp_path / "b.onnx", width=400)]
    report = bench_files(paths, batches=(1, 4, 9), threads=(1, 2), seconds=0.02)
    assert [(r.threads, r.batch, Path(r.path).name) for r in report.rows] == [
        (threads, batch, name) for threads in (1, 2) for batch in (1, 4, 9) for name in ("a.onnx", "b.onnx")
    ]
    for row in report.rows:
        assert row.shapes == {"x": (row.batch, 30)} and 0 < row.p50_ms <= row.p95_ms and row.runs >= 5
        assert row.throughput == pytest.approx(1e3 * row.batch / row.p50_ms)
    for a, b in zip(report.rows[::2], report.rows[1::2], strict=True):
        assert a.ratio == 1.0 and b.ratio == pytest.approx(b.throughput / a.throughput) and a.runs == b.runs
    assert [f.bytes for f in report.files] == [p.stat().st_size for p in paths]
    assert report.files[1].size_ratio == pytest.approx(report.files[1].bytes / report.files[0].bytes)
    assert all(f.load_ms > 0 for f in report.files) and report.notes == ()
    loaded = json.loads(report.to_json())
    assert loaded["rows"][3]["shapes"] == {"x": [4, 30]} and len(loaded["rows"]) == 12
    assert len(str(report).splitlines()) == 13


def test_a_fixed_batch_is_honoured_and_said(tmp_path: Path) -> None:
    report = bench_files(
        [dense(tmp_path / "a.onnx"), dense(tmp_path / "b.onnx", batch=3)], batches=(1, 3), seconds=0.01
    )
    assert [(r.batch, r.asked, r.fixed) for r in report.rows] == [
        (1, 1, False),
        (3, 1, True),
        (3, 3, False),
        (3, 3, True),
    ]
    assert "fixed batch 3" in report.notes[0] and "3 (fixed)" in str(report)
    first, second = report.rows[:2]
    assert second.ratio == pytest.approx((3 / second.p50_ms) / (1 / first.p50_ms))


def test_token_ids_stay_in_their_table_and_masks_are_bool(tmp_path: Path) -> None:
    path = tokens(tmp_path / "a.onnx", rows=9, shift=2)
    model = ir.load(path)
    assert index_limits(model) == {"ids": 7}
    session = open_session(path)
    signature = read_signature(model)
    filling = fitting(session, signature, 4)
    seen = [signature.draw(4, seed, filling) for seed in range(30)]
    drawn = np.unique(np.concatenate([feed["ids"].ravel() for feed in seen]))
    assert drawn.tolist() == list(range(7)) and seen[0]["ids"].dtype == np.int64
    assert seen[0]["mask"].dtype == bool and all(feed["mask"][..., 0].all() for feed in seen)
    assert 0.1 < np.mean([~feed["mask"][..., 1:] for feed in seen]) < 0.3
    report = bench_files([path], batches=(2,), seconds=0.01, sizes={"length": 21})
    assert report.rows[0].shapes == {"ids": (2, 21), "mask": (2, 21)} and "length 21" in report.notes[0]


def test_axes_of_one_name_have_one_size_and_equal_seeds_equal_inputs(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "y"], ["h"]), helper.make_node("Add", ["h", "z"], ["out"])]
    inputs = [value("x", "b", "n"), value("y", "n", "b"), value("z", None, None)]
    path = file(tmp_path / "a.onnx", nodes, [], inputs, [value("out", None, None)])
    signature = read_signature(ir.load(path))
    feed = signature.draw(5, 3, Filling(7, False, False))
    assert [feed[name].shape for name in "xyz"] == [(5, 5), (5, 5), (5, 7)]  # each axis 0 is a batch
    session = open_session(path)
    filling = fitting(session, signature, 5)
    feed = signature.draw(5, 3, filling)
    session.run(None, feed)
    assert feed["x"].shape[0] == feed["y"].shape[1] == 5 and feed["x"].shape[1] == feed["y"].shape[0]
    again = signature.draw(5, 3, filling)
    assert all(np.array_equal(feed[name], again[name]) for name in "xyz")
    assert not np.array_equal(feed["x"], signature.draw(5, 4, filling)["x"])


def test_sizes_that_conflict_are_a_typed_error(tmp_path: Path) -> None:
    nodes = [helper.make_node("Concat", ["x", "c"], ["y"], axis=1)]
    constants = [stored(np.ones((3, 2), np.float32), "c")]
    path = file(tmp_path / "a.onnx", nodes, constants, [value("x", "b", "n")], [value("y", "b", "m")])
    assert bench_files([path], batches=(3,), sizes={"b": 3}, seconds=0.01).rows[0].batch == 3
    with pytest.raises(ExportError, match=r"free axes \(b, n\)"):
        bench_files([path], batches=(1,))
    flat = dense(tmp_path / "b.onnx")
    with pytest.raises(ConfigError, match="no free axis of any file; there are: batch"):
        bench_files([flat], sizes={"nothing": 2})
    with pytest.raises(ConfigError, match="at least 1"):
        bench_files([flat], sizes={"batch": 0})


@pytest.mark.parametrize(
    "wrong", [{"batches": ()}, {"threads": ()}, {"batches": (0,)}, {"threads": (-1,)}, {"seconds": 0}]
)
def test_arguments_out_of_range(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"`{next(iter(wrong))}`"):
        bench_files([dense(tmp_path / "a.onnx")], **wrong)
    with pytest.raises(ConfigError, match="`paths`"):
        bench_files([])


def test_files_that_cannot_be_read_or_run(tmp_path: Path) -> None:
    good, bad = dense(tmp_path / "a.onnx"), tmp_path / "b.onnx"
    for content in (b"nonsense", good.read_bytes()[:-100]):
        bad.write_bytes(content)
        with pytest.raises(ExportError):
            bench_files([good, bad])
    with pytest.raises(ExportError, match="no such file"):
        bench_files([good, tmp_path / "c.onnx"])
    nodes = [helper.make_node("SequenceAt", ["x", "zero"], ["y"])]
    many = helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, None)
    path = file(tmp_path / "d.onnx", nodes, [stored(np.int64(0), "zero")], [many], [value("y", None)])
    with pytest.raises(ExportError, match="no tensor of numbers"):
        bench_files([path])


def test_calls_are_interleaved_and_the_order_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = [0.0], []

    def call(name: str, seconds: float) -> Any:
        def run() -> None:
            clock[0] += seconds
            log.append(name)

        return run

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    times = interleaved({"a": call("a", 0.003), "b": call("b", 0.001)}, seconds=0.08)
    assert len(times["a"]) == len(times["b"]) == 13  # 0.08 / (2 * 0.003)
    assert times["a"] == pytest.approx([0.003] * 13) and times["b"] == pytest.approx([0.001] * 13)
    assert log[6:] == ["a", "b", "b", "a"] * 6 + ["a", "b"]


def test_quantiles_are_of_the_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench, "interleaved", lambda calls, _: {name: [i / 100 for i in range(1, 101)] for name in calls}
    )
    (row,) = bench_files([dense(tmp_path / "a.onnx")], batches=(10,)).rows
    assert row.p50_ms == pytest.approx(505.0) and row.p95_ms == pytest.approx(950.5, abs=1.0)
    assert row.throughput == pytest.approx(10 / 0.505)
