"""8-bit files: they load, they are close to the masked model on the user's data, and nothing is silent."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from fxsparse.errors import ConfigError, DataError, ExportError
from fxsparse.exporters import Int8, Target, Verification, export_onnx, read_metadata
from fxsparse.exporters.agreement import Agreement, check, compare
from fxsparse.exporters.inputs import read_inputs
from fxsparse.nn import masks
from fxsparse.planning import transform
from fxsparse.sparsity import Channel

QUICK = Verification(batch_sizes=(1, 3), draws=2)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)).eval()


class Net(nn.Module):
    """Convolutions with a residual sum, then attention of activations with activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.query = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu()
        y = (y + self.second(y)).relu().flatten(2).transpose(1, 2)
        q = self.query(y)
        y = (q @ y.transpose(1, 2)).softmax(-1) @ y
        return self.head(y.mean(1))


def samples(count: int, *shape: int, size: int = 16) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(size, *shape, generator=generator),) for _ in range(count)]


def run(path: Path, x: Tensor) -> Any:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def error(model: nn.Module, path: Path, data: list[tuple[Tensor]]) -> float:
    """The stated measure, by other means: one norm over all samples."""
    with torch.no_grad():
        exact = torch.cat([model.double()(x.double()) for (x,) in data]).numpy()
    model.float()
    got = np.concatenate([run(path, x) for (x,) in data]).astype(np.float64)
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_static_int8_of_a_sparse_model(tmp_path: Path) -> None:
    model, data, path = mlp(), samples(4, 32), tmp_path / "m.onnx"
    sparse = transform(model, (data[0][0],), sparsity=0.5).eval()
    report = export_onnx(sparse, path, (torch.randn(8, 32),), target=Target.INT8, calibration=data, verify=QUICK)
    assert report.agreement is not None and report.quantized is not None and report.verification is not None
    assert report.agreement.samples == 64 and report.agreement.reference == "float64"
    assert report.agreement.worst_error == pytest.approx(error(sparse, path, data), rel=1e-3)
    assert 1e-4 < report.agreement.worst_error < 0.05  # 8 bits are not exact, and not far
    assert len(report.quantized.products) == 3 and report.quantized.kept == {}
    assert operators(path).count("QuantizeLinear") >= 3
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    assert sum(a.dtype == np.int8 and a.ndim == 2 for a in stored.values()) == 3
    assert report.latency is not None and set(report.latency.variants) == {
        "dense",
        "ticket",
        "ticket float",
        "dense int8",
    }
    assert report.bytes == path.stat().st_size < report.dense_bytes
    assert [tuple(row.form.split(", ")) for row in report.forms] == [("dense", "int8")] * 3
    assert "int8 error" in str(report) and "top-1 agreement" in str(report)
    for row in read_metadata(path)["layers"]:  # dead entries are zeros of the 8-bit weight, too
        ((name, axes),) = row["initializers"].items()
        mask = masks(sparse)[row["name"]].permute(axes).numpy()
        assert stored[name].dtype == np.int8 and stored[name].shape == mask.shape and not stored[name][~mask].any()
    assert read_metadata(path)["target"] == "int8"


def test_per_channel_scales_follow_the_option(tmp_path: Path) -> None:
    sizes = {}
    for each in (True, False):
        path = tmp_path / f"{each}.onnx"
        export_onnx(mlp(), path, (torch.randn(4, 32),), target=Target.INT8, calibration=samples(2, 32), verify=QUICK,
                    int8=Int8(per_channel=each), latency=False)  # fmt: skip
        stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
        sizes[each] = sorted(a.size for n, a in stored.items() if n.endswith("weight_scale"))
    assert sizes == {True: [10, 48, 64], False: [1, 1, 1]}


def test_dynamic_int8_needs_no_data_and_is_compared_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    report = export_onnx(mlp(), path, (torch.randn(4, 32),), target=Target.INT8_DYNAMIC, verify=QUICK, latency=False)
    assert operators(path).count("MatMulInteger") == 3
    assert report.agreement is not None and "example" in report.agreement.source
    assert 0 < report.agreement.worst_error < 0.05
    given = samples(3, 32)
    report = export_onnx(mlp(), path, (torch.randn(4, 32),), target=Target.INT8_DYNAMIC, verify=QUICK, latency=False,
                         calibration=given)  # fmt: skip
    assert report.agreement is not None and report.agreement.samples == 48
    assert report.agreement.worst_error == pytest.approx(error(mlp(), path, given), rel=1e-3)


def test_convolutions_sums_and_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data, path = Net().eval(), samples(3, 3, 6, 6, size=4), tmp_path / "m.onnx"
    report = export_onnx(model, path, data[0], target=Target.INT8, calibration=data, verify=QUICK, latency=False)
    assert report.quantized is not None and len(report.quantized.products) == 4
    proto = onnx.load(path)
    made = {o: node for node in proto.graph.node for o in node.output}
    for node in proto.graph.node:
        if node.op_type in ("Conv", "Gemm", "Add") and not (node.op_type == "Add" and "bias" in node.input[1]):
            assert all(made[name].op_type == "DequantizeLinear" for name in node.input[:2]), node
    floats = [
        node
        for node in proto.graph.node
        if node.op_type == "MatMul" and not all(made[name].op_type == "DequantizeLinear" for name in node.input)
    ]
    assert len(floats) == 2  # scores and values of the attention


def test_layers_named_in_exclude_stay_float(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    report = export_onnx(mlp(), path, (torch.randn(4, 32),), target=Target.INT8, calibration=samples(2, 32),
                         verify=QUICK, latency=False, int8=Int8(exclude=("4", "0.wei*")))  # fmt: skip
    stored = {t.name: numpy_helper.to_array(t).dtype for t in onnx.load(path).graph.initializer}
    assert stored["0.weight"] == stored["4.weight"] == np.float32 and "2.weight" not in stored
    assert report.quantized is not None and set(report.quantized.kept.values()) == {"named in `exclude`"}
    assert report.quantized.weights == {"0.weight": False, "2.weight": True, "4.weight": False}
    with pytest.raises(ConfigError, match=r"`exclude` \(='nothing'\) names no product .*2\.weight"):
        export_onnx(mlp(), path, (torch.randn(4, 32),), target=Target.INT8, calibration=samples(2, 32), verify=QUICK,
                    latency=False, int8=Int8(exclude=("nothing",)))  # fmt: skip


@pytest.mark.parametrize("options", [Int8(max_error=1e-5), Int8(min_agreement=1.0)])
def test_a_file_beyond_the_bound_is_not_written(options: Int8, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    data = samples(8, 32, size=64)  # among so many samples one is near a tie
    with pytest.raises(ExportError, match=r"`(max_error|min_agreement)` \(="):
        export_onnx(
            mlp(), path, (torch.randn(4, 32),), target=Target.INT8, calibration=data, int8=options, verify=QUICK
        )
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_without_verification_nothing_is_claimed(tmp_path: Path) -> None:
    report = export_onnx(mlp(), tmp_path / "m.onnx", (torch.randn(4, 32),), target=Target.INT8, latency=False,
                         calibration=samples(2, 32), verify=False, int8=Int8(max_error=1e-9))  # fmt: skip
    assert report.agreement is None and "int8 error  not measured" in str(report)


def broken() -> Iterator[Any]:
    yield (torch.randn(2, 32),)
    yield (torch.randn(2, 31),)


NAN = torch.full((2, 32), float("nan"))
CASES: list[tuple[Any, type[Exception], str]] = [
    ([], DataError, "`calibration` is empty"),
    (iter(()), DataError, "`calibration` is empty"),
    (
        broken(),
        DataError,
        r"item 1 of `calibration` does not fit: input `input` has shape \(2, 31\) in place of \(any, 32\)",
    ),
    ([(torch.randn(2, 32), torch.zeros(2))], DataError, r"item 0 .* 2 values in another structure"),
    ([(torch.randn(2, 32).double(),)], DataError, r"torch.float64 in place of torch.float32"),
    ([(torch.randn(0, 32),)], DataError, r"shape \(0, 32\)"),
    ([(3.0,)], DataError, "item 0 .* float where tensors are needed"),
    ([(NAN,)], DataError, "item 0 .* holds NaN or infinity"),
    (7, ConfigError, r"`calibration` \(=int\) must be an iterable"),
    (None, ConfigError, "needs `calibration`"),
]


@pytest.mark.parametrize(("data", "kind", "message"), CASES, ids=[case[2][:20] for case in CASES])
def test_bad_calibration_data(data: Any, kind: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=message):
        export_onnx(mlp(), tmp_path / "m.onnx", (torch.randn(4, 32),), target=Target.INT8, calibration=data)
    assert list(tmp_path.iterdir()) == []


class Square(nn.Module):
    """Not finite where an input is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.log())


def test_a_model_that_gives_nan_on_the_data(tmp_path: Path) -> None:
    data = [(torch.rand(4, 4) + 0.5,), (-torch.rand(4, 4) - 0.5,)]
    with pytest.raises((DataError, ExportError), match="not finite on item 1 of the calibration data|cannot make"):
        export_onnx(Square().eval(), tmp_path / "m.onnx", data[0], target=Target.INT8, calibration=data, verify=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_bare_tensors_keywords_and_few_batches(tmp_path: Path) -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor, *, shift: Tensor, scale: Tensor) -> Tensor:
            return self.linear(x * scale) + shift

    model = Keyword().eval()
    rows = [((torch.randn(5, 4),), {"scale": torch.rand(5, 4), "shift": torch.randn(5, 3)}) for _ in range(9)]
    example = ((torch.randn(2, 4),), {"shift": torch.randn(2, 3), "scale": torch.rand(2, 4)})  # another order
    report = export_onnx(model, tmp_path / "m.onnx", example, target=Target.INT8, calibration=iter(rows), latency=False,
                         int8=Int8(batches=4), verify=QUICK)  # fmt: skip
    assert report.agreement is not None and report.agreement.samples == 20 and report.agreement.worst_error < 0.05
    bare = [x for (x,) in samples(2, 32)]
    report = export_onnx(mlp(), tmp_path / "n.onnx", (torch.randn(4, 32),), target=Target.INT8, calibration=bare,
                         latency=False, verify=QUICK)  # fmt: skip
    assert report.agreement is not None and report.agreement.samples == 32


def test_a_fixed_batch_takes_data_of_that_size_only(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).reshape(3, 6)

    fits = [(torch.randn(3, 4),) for _ in range(2)]
    report = export_onnx(
        Fixed().eval(), tmp_path / "m.onnx", fits[0], target=Target.INT8, calibration=fits, latency=False
    )
    assert report.batch == "3"
    with pytest.raises(DataError, match=r"shape \(5, 4\) in place of \(3, 4\)"):
        export_onnx(
            Fixed().eval(), tmp_path / "m.onnx", fits[0], target=Target.INT8, calibration=[(torch.randn(5, 4),)]
        )


def test_a_model_without_products_is_refused(tmp_path: Path) -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu() + 1

    for target in (Target.INT8, Target.INT8_DYNAMIC):
        with pytest.raises(ExportError, match="no layer of the model can be 8-bit .*Target.STOCK"):
            export_onnx(Bare(), tmp_path / "m.onnx", (torch.randn(2, 3),), target=target,
                        calibration=[(torch.randn(2, 3),)], latency=False)  # fmt: skip
    double = nn.Linear(4, 3).double()
    with pytest.raises(ExportError, match="no product of float32"):
        export_onnx(
            double, tmp_path / "m.onnx", (torch.randn(2, 4).double(),), target=Target.INT8_DYNAMIC, latency=False
        )
    assert list(tmp_path.iterdir()) == []


def test_compaction_comes_first(tmp_path: Path) -> None:
    data = samples(3, 32)
    sparse = transform(mlp(), (data[0][0],), sparsity=0.5, pattern=Channel(), exclude="4").eval()
    path = tmp_path / "m.onnx"
    report = export_onnx(sparse, path, data[0], target=Target.INT8, calibration=data, verify=QUICK, latency=False)
    assert report.variant == "compacted" and error(sparse, path, data) < 0.05
    shapes = sorted(
        numpy_helper.to_array(t).shape
        for t in onnx.load(path).graph.initializer
        if t.data_type == 3 and len(t.dims) == 2
    )
    assert shapes == [(10, 24), (24, 32), (32, 32)]
    assert "compacted 64x32 to 32x32, int8" in str(report)


def test_options_that_exclude_each_other(tmp_path: Path) -> None:
    data = samples(1, 32)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"calibration": data}, "`calibration` is for the 8-bit targets"),
        ({"int8": Int8()}, "`int8` is for the 8-bit targets"),
        ({"int8": {"max_error": 1}, "target": Target.INT8, "calibration": data}, "must be an Int8"),
        ({"sparse_initializers": True, "target": Target.INT8, "calibration": data}, "`sparse_initializers`.* excludes"),
        ({"lower": True, "target": Target.TENSORRT}, "`lower`.* excludes"),
        ({"budget": 3.0}, "`budget` .* is for `optimize`"),
        ({"optimize": "latency"}, "`optimize` .* must be one of"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            export_onnx(mlp(), tmp_path / "m.onnx", (torch.randn(4, 32),), **options)
    for bad in (
        {"max_error": 0.0},
        {"max_error": float("nan")},
        {"min_agreement": 1.1},
        {"batches": 0},
        {"exclude": "a"},
    ):
        with pytest.raises(ConfigError, match=f"`{next(iter(bad))}`"):
            Int8(**bad)  # type: ignore[arg-type]  # the point of the test
    assert list(tmp_path.iterdir()) == []


def test_logging_and_random_numbers_stay_as_they_were(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = list(root.handlers), root.level, torch.get_rng_state()
    example, data = (torch.randn(4, 32),), samples(2, 32)
    state = torch.get_rng_state()
    export_onnx(mlp_like(state), tmp_path / "m.onnx", example, target=Target.INT8, calibration=data, verify=QUICK)
    assert (list(root.handlers), root.level) == before[:2] and torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


def mlp_like(state: Tensor) -> nn.Module:
    model = mlp()
    torch.set_rng_state(state)
    return model


def test_the_measure_of_agreement_by_hand() -> None:
    model = nn.Linear(2, 2, bias=False).eval()
    model.weight.data = torch.eye(2)
    inputs = read_inputs(model, (torch.ones(2, 2),))

    class Off:
        """A session that returns its input, one number of it moved."""

        def get_inputs(self) -> list[Any]:
            return [type("V", (), {"name": "input"})]

        def get_outputs(self) -> list[Any]:
            return [type("V", (), {"name": "y"})]

        def run(self, _: object, feed: dict[str, Any]) -> list[Any]:
            x = feed["input"].copy()
            x[0, 0] += 3.0
            return [x]

    batches = [[torch.tensor([[1.0, 2.0], [2.0, 0.0]])], [torch.tensor([[0.0, 4.0]])]]
    found = compare(Off(), model, inputs, batches, "data")
    assert found.errors == {"y": pytest.approx(np.sqrt(18.0 / 25.0))}  # two numbers off by 3; squares 1+4+4+16
    assert found.top1 == {"y": pytest.approx(2 / 3)}  # the first row: (4, 2) in place of (1, 2)
    assert found.samples == 3
    check(found, Int8(max_error=0.9, min_agreement=0.6))
    for options in (Int8(max_error=0.8), Int8(max_error=0.9, min_agreement=0.7)):
        with pytest.raises(ExportError):
            check(found, options)
    with pytest.raises(ExportError, match="relative error inf"):
        check(Agreement({"y": float("inf")}, {}, 1, "data", "float64"), Int8(max_error=1e9))
    with pytest.raises(ExportError, match="relative error nan"):
        check(Agreement({"y": float("nan")}, {}, 1, "data", "float64"), Int8(max_error=1e9))
