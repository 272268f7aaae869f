"""What a file is said to hold: by hand-made files, and by one that the library exported."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import fxsparse
from fxsparse.cli.show import described_file
from fxsparse.errors import ConfigError, ExportError
from fxsparse.exporters import read_contents


def by_hand(path: Path, external: bool = False) -> Path:
    values = np.array([[0.0, 1.0, -0.0], [2.0, 0.0, 3.0]], np.float32)
    weight = numpy_helper.from_array(values, "w")
    if external:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="elsewhere.bin")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 3])],
        [weight, numpy_helper.from_array(np.int64(0), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], producer_name="hand")
    path.write_bytes(model.SerializeToString())
    return path


def test_a_file_of_others_is_described_without_metadata(tmp_path: Path) -> None:
    found = read_contents(by_hand(tmp_path / "a.onnx"))
    assert dict(found.opsets) == {"": 18} and found.producer == "hand" and found.metadata == {}
    assert dict(found.nodes) == {"MatMul": 1, "Add": 1} and found.bytes == (tmp_path / "a.onnx").stat().st_size
    assert [str(slot) for slot in (*found.inputs, *found.outputs)] == ["x: float [batch, 2]", "y: float [?, 3]"]
    assert [(i.name, i.dtype, i.shape, i.zeros, i.numel) for i in found.initializers] == [
        ("w", "float", (2, 3), 3, 6),
        ("b", "int64", (), 1, 1),
    ]
    text = str(found)
    assert "this fxsparse did not write it" in text and "opset ai.onnx 18" in text
    assert "2 initializers; 4 of 7 stored entries are zero" in text
    assert ["w", "float", "2x3", "3", "0.5"] in [line.split() for line in text.splitlines()]


def test_values_in_other_files_are_not_read(tmp_path: Path) -> None:
    found = read_contents(by_hand(tmp_path / "a.onnx", external=True))
    assert [i.zeros for i in found.initializers] == [None, 1]
    assert "1 lie in other files, which were not read" in str(found)


def test_an_exported_file_tells_masks_lineage_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(3, 8)
    sparse = fxsparse.transform(model, (x,), sparsity=0.5, pattern=fxsparse.NByM(2, 4), include="0.weight")
    path = tmp_path / "ticket.onnx"
    report = fxsparse.export_onnx(sparse, path, (x,), latency=False, lineage={"run": "seven"})
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # importing it would fail
    found = read_contents(path)
    (stored,) = [i for i in found.initializers if i.name in report.layers[0].initializers]
    assert stored.zeros == 24 and stored.numel == 48
    text = described_file(str(path), None)
    assert text == str(found) and "lineage run = seven" in text and "density 0.5" in text
    assert f"fxsparse {fxsparse.__version__}, torch {torch.__version__}" in text
    row = next(line.split() for line in text.splitlines() if line.startswith(stored.name))
    assert row[3:5] == ["24", "0.5"] and row[-1] == "0.weight" and "NByM(" in "".join(row)


@pytest.mark.parametrize("content", [b"", b"not an onnx file", b"\x00" * 64])
def test_a_file_that_is_not_onnx_is_a_typed_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError, match="cannot be read as ONNX"):
        read_contents(path)


def test_a_cut_file_a_missing_one_and_a_pass_are_typed_errors(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "a.onnx")
    with pytest.raises(ConfigError, match="`--after`"):
        described_file(str(path), "fold_masks")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ExportError, match="cannot be read as ONNX"):
        read_contents(path)
    with pytest.raises(ExportError, match="cannot be read as ONNX"):
        described_file(str(tmp_path / "absent.onnx"), None)
