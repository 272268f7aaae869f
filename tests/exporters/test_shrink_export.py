"""Exports are compacted and lowered where that removes or gains something, and say what became of each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from fxsparse.errors import ExportError, PassError
from fxsparse.exporters import ExportReport, Int8, Optimize, Target, Verification, export_onnx, read_metadata, shrink
from fxsparse.exporters.encodings import is_two_four
from fxsparse.nn import masked_weights, masks
from fxsparse.planning import finalize, transform
from fxsparse.sparsity import Channel, NByM, SharedSupport, Unstructured

QUICK = Verification(batch_sizes=(1, 3), draws=2)
X = (torch.randn(4, 128, generator=torch.Generator().manual_seed(0)),)


def mlp(width: int = 512) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(128, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    ).eval()


def sparse(pattern: Any, sparsity: float = 0.5, width: int = 512) -> nn.Module:
    return transform(mlp(width), X, sparsity=sparsity, pattern=pattern, exclude="4").eval()


def check_equal(path: Path, model: nn.Module) -> None:
    """Against float64, at batch sizes of no export."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for size in (1, 7):
        x = torch.randn(size, 128)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            expected = model.double()(x.double()).numpy()
        model.float()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def shapes(path: Path) -> list[tuple[int, ...]]:
    stored = (numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer)
    return sorted(a.shape for a in stored if a.dtype == np.float32 and a.ndim == 2)


def test_dead_channels_are_cut_by_default(tmp_path: Path) -> None:
    model, path = sparse(Channel()), tmp_path / "m.onnx"
    report = export_onnx(model, path, X, verify=QUICK)
    check_equal(path, model)
    assert shapes(path) == [(10, 256), (256, 128), (256, 256)]
    assert report.variant == "compacted" and report.batch == "dynamic"
    assert [row.form for row in report.forms] == ["compacted 512x128 to 256x128", "compacted 512x512 to 256x256"]
    assert report.dense_bytes > 4 * (512 * 128 + 512 * 512 + 5120) > report.bytes
    assert report.latency is not None and report.latency.dense_ms > 0
    # what is said of the ticket is of the ticket: masks, densities and digest before anything was removed
    assert {layer.name: layer.shape for layer in report.layers} == {n: tuple(m.shape) for n, m in masks(model).items()}
    assert report.density == 0.5 and report.parameters == sum(p.numel() for p in model.parameters())
    rows = {row["name"]: row for row in read_metadata(path)["layers"]}
    assert rows["0.weight"]["form"].startswith("compacted") and list(rows["0.weight"]["parts"]) == ["0.weight"]
    assert read_metadata(path)["variant"] == "compacted"


def test_compaction_can_be_left_out_and_asked_for(tmp_path: Path) -> None:
    model, path = sparse(Channel()), tmp_path / "m.onnx"
    report = export_onnx(model, path, X, verify=QUICK, compact=False, lower=False, latency=False)
    assert report.variant == "as it is" and (512, 512) in shapes(path)
    assert report.forms[0].reason.startswith("no speed-up expected") and report.forms[0].form == "dense"
    plain = finalize(model)  # no masks any more, but dead channels
    report = export_onnx(plain, path, X, verify=QUICK, latency=False)
    assert report.variant == "compacted" and shapes(path) == [(10, 256), (256, 128), (256, 256)]
    assert report.dense_bytes > 4 * (512 * 128 + 512 * 512 + 5120)  # reckoned
    check_equal(path, plain)


def test_nothing_to_cut_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> nn.Module:
        raise AssertionError("no weight has a dead channel, so nobody should try")

    monkeypatch.setattr(shrink, "compact", fail)
    monkeypatch.setattr(shrink, "lower_shared_support", fail)
    report = export_onnx(sparse(Unstructured()), tmp_path / "m.onnx", X, verify=QUICK, latency=False)
    assert report.variant == "as it is"
    assert all(row.reason.startswith("no speed-up expected: dense kernels") for row in report.forms)


def test_what_cannot_be_compacted_is_exported_whole_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> nn.Module:
        raise PassError("compact_channels: the outputs differ")

    monkeypatch.setattr(shrink, "compact", fail)
    model = sparse(Channel())
    report = export_onnx(model, tmp_path / "m.onnx", X, verify=QUICK, latency=False, lower=False)
    assert report.variant == "as it is" and any(note.startswith("not compacted: PassError") for note in report.notes)
    with pytest.raises(ExportError, match="cannot be compacted .*the outputs differ"):
        export_onnx(model, tmp_path / "n.onnx", X, verify=QUICK, latency=False, compact=True)
    assert not (tmp_path / "n.onnx").exists()


def test_a_wrong_rewrite_is_found_and_the_model_exported_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = shrink.compact

    def wrong(model: nn.Module, inputs: Any) -> nn.Module:
        smaller = true(model, inputs)
        with torch.no_grad():
            next(smaller.parameters())[0, 0] += 0.1
        return smaller

    monkeypatch.setattr(shrink, "compact", wrong)
    model, path = sparse(Channel()), tmp_path / "m.onnx"
    report = export_onnx(model, path, X, verify=QUICK, latency=False, lower=False)
    assert report.variant == "as it is" and any("not compacted: verification failed" in note for note in report.notes)
    check_equal(path, model)


def test_a_weight_with_nothing_alive(tmp_path: Path) -> None:
    model = sparse(Unstructured())
    masked_weights(model)["2.weight"].mask.zero_()
    model.get_parameter("2.weight").data.zero_()
    report = export_onnx(model, tmp_path / "m.onnx", X, verify=QUICK, latency=False)
    check_equal(tmp_path / "m.onnx", model)
    assert report.layers[1].alive == 0 and report.alive < report.parameters


def test_shared_supports_are_lowered_by_default(tmp_path: Path) -> None:
    model, path = sparse(SharedSupport(64), 0.9), tmp_path / "m.onnx"
    report = export_onnx(model, path, X, verify=QUICK, compact=False)
    check_equal(path, model)
    assert report.variant == "lowered" and "Gather" in [node.op_type for node in onnx.load(path).graph.node]
    assert report.bytes < report.dense_bytes / 3
    assert any(
        "gather" in row.form and row.gain is not None and row.gain > 1 and not row.measured for row in report.forms
    )
    assert "expected" in str(report)
    report = export_onnx(model, path, X, verify=QUICK, compact=False, lower=False, latency=False)
    assert report.variant == "as it is" and "Gather" not in [node.op_type for node in onnx.load(path).graph.node]


def test_supports_are_found_in_the_zeros_too(tmp_path: Path) -> None:
    plain = finalize(sparse(SharedSupport(64), 0.9))
    assert not masked_weights(plain)
    report = export_onnx(plain, tmp_path / "m.onnx", X, verify=QUICK, compact=False, latency=False)
    assert report.variant == "lowered"
    check_equal(tmp_path / "m.onnx", plain)


def int8_error(report: ExportReport) -> float:
    assert report.agreement is not None
    return report.agreement.worst_error


def test_lowered_and_8_bit(tmp_path: Path) -> None:
    model, path = sparse(SharedSupport(64), 0.9), tmp_path / "m.onnx"
    data = [(torch.randn(32, 128),) for _ in range(3)]
    report = export_onnx(model, path, X, verify=QUICK, target=Target.INT8, calibration=data, latency=False)
    assert "lowered" in report.variant and 1e-4 < int8_error(report) < 0.05
    assert any("gather" in row.form and row.form.endswith("int8") for row in report.forms)
    proto = onnx.load(path)
    made = {output: node for node in proto.graph.node for output in node.output}
    left = [n for n in proto.graph.node if n.op_type in ("Conv", "MatMul") and n.input[1] in made]
    assert left and all(made[n.input[1]].op_type == "DequantizeLinear" for n in left)
    kept = {name for name, mask in masks(model).items() if mask.shape[1] == 512}
    report = export_onnx(model, path, X, verify=QUICK, target=Target.INT8, calibration=data, latency=False,
                         int8=Int8(exclude=tuple(f"{name}*" for name in kept)))  # fmt: skip
    assert ["int8" in row.form for row in report.forms] == [True, False]


def test_tensorrt_keeps_dense_values_and_tells_which_layers_are_2_4(tmp_path: Path) -> None:
    model, path = sparse(NByM(2, 4)), tmp_path / "m.onnx"
    report = export_onnx(model, path, X, verify=QUICK, target=Target.TENSORRT, latency=False)
    assert report.variant == "as it is" and shapes(path) == [(10, 512), (512, 128), (512, 512)]
    assert all("2:4 along the inputs" in row.reason for row in report.forms)
    assert {row["name"]: row["two_four"] for row in read_metadata(path)["layers"]} == {
        "0.weight": True,
        "2.weight": True,
    }
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    for row in read_metadata(path)["layers"]:
        ((name, axes),) = row["initializers"].items()
        weight = torch.from_numpy(stored[name].copy()).permute(*np.argsort(axes).tolist())  # back to the weight's axes
        assert int((weight.unflatten(1, (-1, 4)) != 0).sum(-1).max()) == 2
    report = export_onnx(sparse(Channel()), path, X, verify=QUICK, target=Target.TENSORRT, latency=False)
    assert report.variant == "as it is" and all("no speed-up expected" in row.reason for row in report.forms)


@pytest.mark.parametrize("kind", ["linear", "conv", "transposed"])
def test_2_4_along_the_inputs_by_brute_force(kind: str) -> None:
    torch.manual_seed(0)
    layer = {"linear": nn.Linear(8, 4), "conv": nn.Conv2d(8, 4, 3), "transposed": nn.ConvTranspose2d(8, 4, 3)}[kind]
    x = torch.randn(2, 8) if kind == "linear" else torch.randn(2, 8, 5, 5)
    model = transform(nn.Sequential(layer), (x,), sparsity=0.5, pattern=NByM(2, 4)).eval()
    (weight,) = masked_weights(model).values()
    axis = 0 if kind == "transposed" else 1

    def brute(mask: Tensor) -> bool:
        moved = mask.movedim(axis, -1)
        return all(int(moved[..., i : i + 4].sum(-1).max()) <= 2 for i in range(0, moved.shape[-1], 4))

    assert is_two_four(weight) == brute(weight.mask) == (kind != "transposed")  # whose pattern runs along axis 1
    for _ in range(20):
        flat = weight.mask.flatten()
        flat[int(torch.randint(flat.numel(), ()))] = True
        assert is_two_four(weight) == brute(weight.mask)
    assert not is_two_four(weight)


def test_tuned_for_size_takes_the_smallest_file(tmp_path: Path) -> None:
    model, path = sparse(SharedSupport(64), 0.9), tmp_path / "m.onnx"
    report = export_onnx(model, path, X, verify=QUICK, optimize=Optimize.SIZE, latency=False)
    check_equal(path, model)
    plain = export_onnx(model, tmp_path / "n.onnx", X, verify=QUICK, compact=False, lower=False, latency=False)
    assert report.bytes < plain.bytes / 3 and any("tuned for size" in note for note in report.notes)
    assert all(row.measured and "bytes" in row.reason for row in report.forms)
    assert all(row.gain is not None and row.gain > 3 for row in report.forms)
