"""Free axes: detected or named, in torch's exporter and in the trace; conflicts are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError, ExportError
from fxsparse.exporters import Dynamic, Exporter, Verification, export_onnx, read_metadata
from fxsparse.planning import transform

QUICK = Verification(batch_sizes=(1, 3), draws=2)


class Encoder(nn.Module):
    """Tokens and a mask of their length -> logits for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor, attention: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(ids) * attention[..., None]))


def tokens(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 11, (batch, length)), torch.rand(batch, length)


def sparse_encoder() -> nn.Module:
    torch.manual_seed(0)
    return transform(Encoder().eval(), tokens(2, 6), sparsity=0.5).eval()


def dims(path: Path) -> list[list[Any]]:
    proto = onnx.load(path)
    values = (*proto.graph.input, *proto.graph.output)
    return [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values]


def check_sizes(path: Path, model: nn.Module, sizes: list[tuple[int, int]]) -> None:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch, length in sizes:
        ids, attention = tokens(batch, length)
        (found,) = session.run(None, {"ids": ids.numpy(), "attention": attention.numpy()})
        with torch.no_grad():
            expected = model(ids, attention).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_sequence_axis_is_found(tmp_path: Path) -> None:
    model, path = sparse_encoder(), tmp_path / "m.onnx"
    report = export_onnx(model, path, tokens(2, 6), dynamic=Dynamic.SEQUENCE, verify=QUICK, latency=False)
    assert dims(path) == [["batch", "sequence"], ["batch", "sequence"], ["batch", "sequence", 11]]
    check_sizes(path, model, [(1, 6), (4, 9), (3, 2)])
    assert any("axis `sequence` is free" in note for note in report.notes)
    assert read_metadata(path)["axes"] == {n: {"0": "batch", "1": "sequence"} for n in ("ids", "attention")}
    assert report.verification is not None and report.verification.samples == 8 + 4 * 2 * (1 + 3)  # four other lengths


def test_axes_by_name(tmp_path: Path) -> None:
    model, path = sparse_encoder(), tmp_path / "m.onnx"
    names = {"ids": {0: "rows", 1: "time"}, "attention": {0: "rows", -1: "time"}}
    export_onnx(model, path, tokens(3, 4), dynamic=names, verify=QUICK, latency=False)
    assert dims(path) == [["rows", "time"], ["rows", "time"], ["rows", "time", 11]]
    check_sizes(path, model, [(1, 4), (5, 7)])
    only = {"ids": {1: "time"}, "attention": {1: "time"}}
    report = export_onnx(model, path, tokens(3, 4), dynamic=only, verify=QUICK, latency=False)
    assert dims(path) == [[3, "time"], [3, "time"], [3, "time", 11]] and report.batch == "3"
    check_sizes(path, model, [(3, 9)])


def test_an_example_of_size_one_is_no_constant(tmp_path: Path) -> None:
    model, path = sparse_encoder(), tmp_path / "m.onnx"
    export_onnx(model, path, tokens(1, 1), dynamic=Dynamic.SEQUENCE, verify=QUICK, latency=False)
    check_sizes(path, model, [(1, 1), (2, 5)])


def test_fixed_on_demand(tmp_path: Path) -> None:
    report = export_onnx(sparse_encoder(), tmp_path / "m.onnx", tokens(2, 6), dynamic=Dynamic.FIXED, verify=QUICK,
                         latency=False)  # fmt: skip
    assert dims(tmp_path / "m.onnx") == [[2, 6], [2, 6], [2, 6, 11]] and report.batch == "2"


class Positions(nn.Module):
    """As long as its table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 8))
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.table)


def test_a_length_that_cannot_vary(tmp_path: Path) -> None:
    model, x = Positions().eval(), (torch.randn(2, 6, 8),)
    report = export_onnx(model, tmp_path / "m.onnx", x, dynamic=Dynamic.SEQUENCE, verify=QUICK, latency=False)
    assert report.batch == "dynamic" and dims(tmp_path / "m.onnx")[0] == ["batch", 6, 8]
    (tmp_path / "m.onnx").unlink()
    with pytest.raises(ExportError, match=r"axis `length` \(=6\) cannot be free: the model fails at 7 .*leave it out"):
        export_onnx(model, tmp_path / "m.onnx", x, dynamic={"x": {0: "batch", 1: "length"}}, latency=False)
    assert list(tmp_path.iterdir()) == []


class Branch(nn.Module):
    """Runs at any length, but not in one graph: torch.export refuses the loop, a trace holds one count."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[1]):
            x = self.linear(x)
        return x


def test_a_rule_gives_way_and_a_name_does_not(tmp_path: Path) -> None:
    model, x = Branch().eval(), (torch.randn(2, 3, 4),)
    report = export_onnx(model, tmp_path / "m.onnx", x, dynamic=Dynamic.SEQUENCE, verify=QUICK, latency=False)
    assert dims(tmp_path / "m.onnx")[0] == ["batch", 3, 4]
    assert any("axis `sequence` is fixed" in note for note in report.notes)
    (tmp_path / "m.onnx").unlink()
    with pytest.raises(ExportError):
        export_onnx(model, tmp_path / "m.onnx", x, dynamic={"x": {0: "batch", 1: "steps"}}, latency=False)
    assert list(tmp_path.iterdir()) == []


class Values(nn.Module):
    """A branch on values, which torch.export refuses and a trace on these inputs never takes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.abs().sum()) < 0:
            return x
        return self.linear(x).cumsum(1)


def test_the_trace_has_free_axes_too(tmp_path: Path) -> None:
    model, path = Values().eval(), tmp_path / "m.onnx"
    report = export_onnx(model, path, (torch.randn(2, 3, 4),), dynamic=Dynamic.SEQUENCE, verify=QUICK, latency=False)
    assert report.exporter is Exporter.TRACE and dims(path)[0] == ["batch", "sequence", 4]
    x = torch.randn(5, 9, 4)
    (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, model(x).detach().numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"ids": {0: "batch", 1: "time"}, "attention": {0: "time"}}, "conflict: `time` is one size, but ids.1. has 6"),
        ({"ids": {1: "a", -1: "b"}}, "conflict: axis 1 of input `ids` has two names, `a` and `b`"),
        ({"tokens": {0: "batch"}}, "names input `tokens`; the inputs are ids, attention"),
        ({"ids": {2: "batch"}}, "names axis 2 of input `ids`, which has 2 axes"),
        ({"ids": {0: "a size"}}, "must be one of .* or name free axes"),
        ("sequence", "`dynamic` .* must be one of"),
    ],
)
def test_axes_that_cannot_be(dynamic: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export_onnx(sparse_encoder(), tmp_path / "m.onnx", tokens(2, 6), dynamic=dynamic)
    assert list(tmp_path.iterdir()) == []
