"""Sparse initializers, tied weights, weights in a file of their own; all files at their place, or none."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from fxsparse.errors import ExportError
from fxsparse.exporters import Verification, attempts, export_onnx, read_metadata
from fxsparse.exporters.encodings import store_sparse
from fxsparse.planning import transform

QUICK = Verification(batch_sizes=(1, 3), draws=2)
X = (torch.randn(4, 64, generator=torch.Generator().manual_seed(0)),)


def net(sparsity: float = 0.9) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 8))
    return transform(model, X, sparsity=sparsity, include=["0.*", "2.*"]).eval()


def run(path: Path, x: Tensor) -> Any:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def test_sparse_initializers_make_a_smaller_file_with_the_same_outputs(tmp_path: Path) -> None:
    model, path = net(), tmp_path / "m.onnx"
    dense = export_onnx(model, tmp_path / "d.onnx", X, verify=QUICK, compact=False, latency=False)
    report = export_onnx(model, path, X, verify=QUICK, compact=False, latency=False, sparse_initializers=True)
    proto = onnx.load(path)
    assert {s.values.name for s in proto.graph.sparse_initializer} == {"0.weight", "2.weight"} == set(report.sparse)
    assert report.bytes == path.stat().st_size < 0.5 * dense.bytes and "2 initializers are stored sparse" in str(report)
    x = torch.randn(9, 64)
    assert np.array_equal(run(path, x), run(tmp_path / "d.onnx", x))
    for stored in proto.graph.sparse_initializer:
        values, indices = numpy_helper.to_array(stored.values), numpy_helper.to_array(stored.indices)
        full = np.zeros(np.prod(stored.dims), dtype=np.float32)
        full[indices] = values
        assert np.array_equal(full.reshape(stored.dims), model.get_parameter(stored.values.name).detach().numpy())
    assert {row["name"]: list(row["initializers"]) for row in read_metadata(path)["layers"]} == {
        n: [n] for n in report.sparse
    }


def test_sparse_storage_only_where_it_is_smaller(tmp_path: Path) -> None:
    report = export_onnx(net(0.5), tmp_path / "m.onnx", X, verify=QUICK, latency=False, sparse_initializers=True)
    assert report.sparse == () and any("none in the file is smaller" in note for note in report.notes)


def test_negative_zeros_and_whole_numbers_are_kept() -> None:
    values = np.zeros((40, 40), dtype=np.float32)
    values[3, 4], values[5, 6] = -0.0, 2.0
    whole = np.zeros((40, 40), dtype=np.int64)
    graph = helper.make_graph(
        [], "g", [], [], [numpy_helper.from_array(a, n) for n, a in (("f", values), ("i", whole))]
    )
    proto = helper.make_model(graph)
    assert store_sparse(proto) == ("f",)
    (stored,) = proto.graph.sparse_initializer
    assert numpy_helper.to_array(stored.indices).tolist() == [124, 206]
    assert np.signbit(numpy_helper.to_array(stored.values)).tolist() == [True, False]
    assert [tensor.name for tensor in proto.graph.initializer] == ["i"]


class Tied(nn.Module):
    """One table: looked up, and the last layer's weight, for one token and for a batch of them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 16)
        self.inner = nn.Linear(16, 16)
        self.head = nn.Linear(16, 300, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        y = self.inner(self.table(ids)).relu()
        return self.head(y), self.head(y[:, 0])


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    path, ids = tmp_path / "m.onnx", torch.randint(0, 300, (2, 3))
    torch.manual_seed(0)
    model = transform(Tied().eval(), (ids,), sparsity=0.5, include=["*.weight"]).eval()
    export_onnx(model, path, (ids,), verify=QUICK, latency=False)
    large = [t for t in onnx.load(path).graph.initializer if np.prod(t.dims) == 300 * 16]
    assert len(large) == 1 and path.stat().st_size < 1.5 * 4 * 300 * 16


def test_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    model, path = net(), tmp_path / "m.onnx"
    report = export_onnx(model, path, X, verify=QUICK, compact=False, external_data=True)
    (data,) = tmp_path.glob("*.data")
    assert (
        report.data == data and data.name.startswith("m.onnx.") and sorted(tmp_path.iterdir()) == sorted([path, data])
    )
    assert report.bytes == path.stat().st_size + data.stat().st_size
    assert "weights in" in str(report) and any("latency was not measured" in note for note in report.notes)
    x = torch.randn(5, 64)
    np.testing.assert_allclose(run(path, x), model(x).detach().numpy(), atol=1e-5)
    outside = [t for t in onnx.load(path, load_external_data=False).graph.initializer if t.external_data]
    assert {t.name for t in outside} >= {"0.weight", "2.weight"}
    offsets = [int(e.value) for t in outside for e in t.external_data if e.key == "offset"]
    assert all(offset % 4096 == 0 for offset in offsets)
    assert read_metadata(path)["density"] == pytest.approx(0.1, abs=0.01)
    # the next export takes its place: the old weights go with the old model
    export_onnx(net(0.5), path, X, verify=QUICK, latency=False, external_data=True)
    (fresh,) = tmp_path.glob("*.data")
    assert fresh != data
    export_onnx(model, path, X, verify=QUICK, latency=False, compact=False)
    assert list(tmp_path.iterdir()) == [path]


def test_the_limit_decides_where_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "LIMIT", 20_000)
    export_onnx(net(), tmp_path / "m.onnx", X, verify=QUICK, latency=False, compact=False)
    assert len(list(tmp_path.glob("m.onnx.*.data"))) == 1


def test_a_failure_leaves_the_old_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    export_onnx(net(), path, X, verify=QUICK, latency=False, external_data=True)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    true = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target) == path:  # the very last step
            raise OSError(28, "No space left on device")
        true(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ExportError, match="No space left"):
        export_onnx(net(0.5), path, X, verify=QUICK, latency=False, external_data=True)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_disk_that_fills_while_weights_are_written(tmp_path: Path) -> None:
    code = f"""
        import resource, signal
        from pathlib import Path
        import torch
        from torch import nn
        from fxsparse.errors import ExportError
        from fxsparse.exporters import Target, export_onnx
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        folder, x = Path({str(tmp_path)!r}), (torch.randn(2, 100),)
        for options in ({{"external_data": True}}, {{"target": Target.INT8, "calibration": [x]}}):
            try:
                export_onnx(nn.Linear(100, 100), folder / "m.onnx", x, latency=False, verify=False, **options)
            except ExportError as error:
                print(error)
            print(sorted(folder.iterdir()))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, left, second, also = done.stdout.strip().splitlines()
    assert "could not be written (File too large): make room" in first and left == "[]"
    assert "could not be written (File too large): make room" in second and also == "[]"


@pytest.mark.slow
def test_a_model_beyond_two_gibibytes(tmp_path: Path) -> None:
    """A table of 2.2 GB, of which a call reads a few rows."""

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(2**20, 528))
            self.head = nn.Linear(528, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table[ids])

    model, ids = Large().eval(), torch.randint(0, 2**20, (2, 3))
    with torch.no_grad():
        model.table[ids] = 1.0
    path = tmp_path / "m.onnx"
    report = export_onnx(model, path, (ids,), verify=False, latency=False)
    assert report.data is not None and report.bytes > 2**31 and path.stat().st_size < 2**20
    with torch.no_grad():
        np.testing.assert_allclose(run(path, ids), model(ids).numpy(), atol=1e-4)
