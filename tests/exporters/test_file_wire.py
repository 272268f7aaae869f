"""Large files: read by place and written in pieces, to the same message; what is cut short is no file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fxsparse.errors import ExportError
from fxsparse.exporters import file_wire, file_work, optimize_file
from fxsparse.exporters.file_channels import remove_channels
from fxsparse.exporters.file_io import read_file, to_bytes, write_file
from fxsparse.exporters.file_wire import forget, skeleton
from tests.exporters.file_cases import Builder, assert_equal, model_of, shapes_of


def large(path: Path, raw: bool = True) -> Path:
    """A file of two weights of 2.4 MB, of which 100 columns are dead, and small ones."""
    random = np.random.default_rng(0)
    weights = {"w": random.standard_normal((600, 1000)), "v": random.standard_normal((1000, 600)), "b": np.ones(600)}
    weights["w"][:, :100] = 0
    stored = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    if not raw:
        stored[0] = helper.make_tensor("w", TensorProto.FLOAT, (600, 1000), weights["w"].ravel().tolist())
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "v"], ["g"]),
        helper.make_node("Add", ["g", "b"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 600]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], stored), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 10
    model.metadata_props.add(key="said", value="before")
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("raw", [True, False])
def test_a_file_comes_back_as_it_was(tmp_path: Path, raw: bool) -> None:
    source = large(tmp_path / "a.onnx", raw)
    message, names = skeleton(source)
    assert names == ({"w", "v"} if raw else {"v"}) and len(message) < (10_000 if raw else 3_000_000)
    file = read_file(source)
    assert file.data == () and file.bytes == source.stat().st_size
    forget(file.model)
    write_file(file.model, tmp_path / "b.onnx")
    before, after = onnx.load(source), onnx.load(tmp_path / "b.onnx")
    assert onnx.load_from_string(to_bytes(file.model)) == after
    assert list(after.graph.node) == list(before.graph.node) and list(after.metadata_props) == list(
        before.metadata_props
    )
    arrays: list[dict[str, Any]] = [
        {t.name: numpy_helper.to_array(t) for t in model.graph.initializer} for model in (before, after)
    ]
    assert set(arrays[0]) == set(arrays[1])
    assert all(np.array_equal(arrays[0][name], arrays[1][name]) for name in arrays[0])
    forget(file.model)  # read again after its memory was given back
    assert np.array_equal(file.model.graph.initializers["v"].const_value.numpy(), arrays[0]["v"])  # type: ignore[union-attr]


def test_a_large_file_is_optimised_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_work, "_LARGE", 1000)
    source = large(tmp_path / "a.onnx")
    held = source.read_bytes()
    report = optimize_file(source, tmp_path / "b.onnx", batches=(2,))
    assert report.channels == 100 and source.read_bytes() == held and len(report.latency) == 1
    x = np.random.default_rng(1).standard_normal((3, 600)).astype(np.float32)
    a, b = (onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0] for path in (source, report.path))
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]


@pytest.mark.parametrize("cut", [1, 100, 3_000_000, -30])
def test_a_large_file_that_is_cut_short(tmp_path: Path, cut: int) -> None:
    source = large(tmp_path / "a.onnx")
    source.write_bytes(source.read_bytes()[:-cut] if cut > 0 else source.read_bytes() + b"\xff" * 30)
    with pytest.raises(ExportError, match="cannot be read as ONNX"):
        optimize_file(source, tmp_path / "b.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def test_fields_of_every_kind(tmp_path: Path) -> None:
    made = file_wire._varint(300) + b"x"
    (tmp_path / "a").write_bytes(made)
    assert made[:2] == b"\xac\x02"
    for wrong in (b"\x0b", b"\x80" * 12, b"\x3a\x7f"):
        (tmp_path / "a").write_bytes(wrong)
        with pytest.raises(ValueError, match="byte"):
            skeleton(tmp_path / "a")


@pytest.mark.parametrize("fill", [np.nan, np.inf])
def test_outputs_that_are_no_numbers_stay_so(tmp_path: Path, fill: float) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    weight[:, 2] = 0
    bias = np.array([1, fill, 2], np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "v"], ["g"]),
        helper.make_node("Add", ["g", "b"], ["y"]),
    ]
    stored = {"w": weight, "v": np.ones((6, 3), np.float32), "b": bias}
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", s]) for n, s in (("x", 4), ("y", 3))]
    graph = helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(a, n) for n, a in stored.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    report = optimize_file(tmp_path / "a.onnx", tmp_path / "b.onnx", latency=False)
    assert report.channels == 1 and report.verification is not None
    out = onnxruntime.InferenceSession(str(report.path)).run(None, {"x": np.ones((1, 4), np.float32)})[0]
    assert np.array_equal(np.isfinite(out), [[True, False, True]])


@pytest.mark.parametrize(("dead", "multiple", "left"), [(5, 1, 27), (5, 8, 32), (9, 8, 24), (9, 16, 32), (17, 16, 16)])
def test_convolutions_keep_whole_blocks_of_channels(dead: int, multiple: int, left: int) -> None:
    b = Builder()
    b.input("x", ["batch", 4, 5, 5])
    hidden = b.node("Conv", ["x", b.constant(b.weight(32, 4, 1, 1, dead=range(dead)), "w")])
    proto = b.proto(b.node("Conv", [hidden, b.constant(b.weight(3, 32, 1, 1), "v")]))
    model = model_of(proto)
    found = remove_channels(model, multiple)
    assert_equal(proto, model, [{"x": np.random.default_rng(0).standard_normal((2, 4, 5, 5))}])
    assert sorted(shapes_of(model).values()) == sorted([(left, 4, 1, 1), (3, left, 1, 1)])
    assert found.ragged == (left % 8 != 0)
