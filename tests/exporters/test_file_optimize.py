"""`optimize_file` from end to end: files of torch and by hand, verification, bad input, whole files or none."""

from __future__ import annotations

import json
import resource
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from fxsparse.errors import ConfigError, ExportError
from fxsparse.exporters import optimize_file, read_contents
from tests.exporters.file_cases import shared


def export(model: nn.Module, inputs: tuple[Any, ...], path: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), inputs, path, verbose=False, external_data=False, **options)
    return path


def dynamic(model: nn.Module, inputs: tuple[Any, ...], path: Path) -> Path:
    axes = tuple({0: torch.export.Dim("batch")} for _ in inputs)
    return export(model, inputs, path, dynamo=True, dynamic_shapes=axes)


def kill(model: nn.Module, share: float = 0.4) -> nn.Module:
    """Dead output channels, and running statistics that are not those of initialisation."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight[torch.rand(module.weight.shape[0]) < share] = 0
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.normal_()
    return model


def group(linear: nn.Module, size: int, k: int) -> None:
    weight = linear.weight
    mask = shared(np.random.default_rng(0), weight.shape[0], weight.shape[1], size, k) != 0
    with torch.no_grad():
        weight.mul_(torch.from_numpy(mask).reshape(*mask.shape, *[1] * (weight.ndim - 2)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.a, self.norm = nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depth, self.b = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 12, 1)
        self.gate = nn.Linear(12, 12)
        self.out = nn.Linear(12 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.b(torch.nn.functional.silu(self.depth(torch.relu(self.norm(self.a(x))))))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        return self.out(torch.nn.functional.max_pool2d(x, 2).flatten(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 128)
        self.q, self.k, self.v, self.o = (nn.Linear(128, 128) for _ in range(4))
        self.a, self.b, self.norm = nn.Linear(128, 512), nn.Linear(512, 128), nn.LayerNorm(128)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.table(tokens))
        q, k, v = (each(x).unflatten(2, (4, 32)).transpose(1, 2) for each in (self.q, self.k, self.v))
        scores = (q @ k.transpose(2, 3) / 4).masked_fill(~mask[:, None, None, :], -1e9)
        x = x + self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return self.norm(x + self.b(torch.nn.functional.gelu(self.a(x))))


IMAGE = (torch.randn(2, 3, 8, 8),)


def run(path: Path, feed: dict[str, Any]) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feed)[0]


@pytest.mark.parametrize("dynamo", [True, False])
def test_a_network_with_dead_channels(tmp_path: Path, dynamo: bool) -> None:
    options: dict[str, Any] = {"dynamo": dynamo}
    if dynamo:
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    else:
        options |= {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    source = export(kill(Residual()), IMAGE, tmp_path / "a.onnx", **options)
    before = source.read_bytes()
    report = optimize_file(source, tmp_path / "b.onnx", latency=False)
    assert source.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]
    assert report.channels >= 6 and report.bytes < report.source_bytes
    proof = report.verification
    assert proof is not None and proof.exact is not None and proof.exact.relative < 1e-12 and not proof.constant
    x = np.random.default_rng(0).standard_normal((7, 3, 8, 8)).astype(np.float32)
    name = onnxruntime.InferenceSession(str(source)).get_inputs()[0].name
    expected = run(source, {name: x})
    np.testing.assert_allclose(run(report.path, {name: x}), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    text = str(report)
    assert "channels" in text and f"{report.channels} removed" in text and "float64 copies differ" in text
    assert json.loads(json.dumps(report.to_dict()))["channels"] == report.channels


def test_a_transformer_with_token_ids_and_masks_is_lowered(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Encoder()
    for linear in (model.a, model.b):
        group(linear, 64 if linear is model.a else 16, 12 if linear is model.a else 48)
    example = (torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.bool))
    source = dynamic(model, example, tmp_path / "a.onnx")
    report = optimize_file(source, tmp_path / "b.onnx", channels=False, latency=False, batches=(8, 64))
    assert report.lowered == 2, str(report)
    assert {layer.form for layer in report.layers} == {"dense", "gather + conv"}
    found = report.verification
    assert found is not None and found.exact is not None and found.exact.relative < 1e-12
    assert found.batch_sizes == (1, 2, 5)
    said = json.loads(ir.load(report.path).metadata_props["fxsparse.optimized"])
    assert len(said["lowered"]) == 2 and said["source"] == "a.onnx"


def wide(tmp_path: Path, unused: bool = False) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 4))
    group(model[0], 64, 8)
    group(model[2], 64, 48)
    if unused:
        with torch.no_grad():
            model[0].weight[::5] = 0
    return dynamic(model, (torch.randn(2, 64),), tmp_path / "wide.onnx")


def test_lowering_is_timed_and_written_where_it_pays(tmp_path: Path) -> None:
    report = optimize_file(wide(tmp_path), tmp_path / "b.onnx", batches=(64, 128), measure=True)
    assert report.lowered >= 1 and all(each.speedup > 0 for each in report.latency) and len(report.latency) == 2
    assert any(layer.measured for layer in report.layers)
    assert "interleaved" in str(report)


def test_a_slower_lowered_file_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxsparse.exporters import file_work

    def slow(calls: Any, _: float) -> dict[str, list[float]]:
        return {name: [1.0 + int(name) * (int(name) > 1)] for name in calls}

    monkeypatch.setattr(file_work, "interleaved", slow)
    report = optimize_file(wide(tmp_path), tmp_path / "b.onnx", batches=(128,))
    assert (
        report.lowered == 0
        and "slower as a whole" in str(report)
        and "Transpose" not in str(read_contents(report.path))
    )
    assert report.latency[0].written_ms == report.latency[0].compacted_ms


def test_both_orders_of_removing_and_lowering_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxsparse.exporters import file_work

    source = wide(tmp_path, unused=True)
    chosen = []
    for fast in (2, 3):

        def interleaved(calls: Any, _: float, fast: int = fast) -> dict[str, list[float]]:
            assert len(calls) == 4  # source, compacted, lowered with and without removed channels
            return {name: [0.5 if int(name) == fast else 1.0] for name in calls}

        monkeypatch.setattr(file_work, "interleaved", interleaved)
        report = optimize_file(source, tmp_path / "b.onnx", batches=(128,))
        assert report.lowered >= 1 and report.verification is not None and report.verification.exact is not None
        chosen.append(report.channels > 0)
    assert sorted(chosen) == [False, True]


def test_without_times_the_estimate_chooses_between_removing_and_lowering(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))
    with torch.no_grad():
        model[2].weight[:, :512] = 0  # one group of all rows could be lowered, but half the channels can go
    source = dynamic(model, (torch.randn(2, 256),), tmp_path / "a.onnx")
    kept = optimize_file(source, tmp_path / "b.onnx", channels=False, latency=False, verify=False, batches=(1024,))
    assert kept.lowered == 1
    report = optimize_file(source, tmp_path / "b.onnx", latency=False, batches=(1024,))
    assert report.channels == 512 and report.lowered == 0
    with torch.no_grad():
        model[0].weight[3] = 0  # removing one channel breaks the groups, which gain far more
        group(model[0], 64, 8)
        model[2].weight[:, :512] = 1
    source = dynamic(model, (torch.randn(2, 256),), tmp_path / "a.onnx")
    report = optimize_file(source, tmp_path / "b.onnx", latency=False, batches=(64,))
    assert report.lowered == 1


class Chunked(nn.Module):
    """Attention whose parts torch's older exporter cuts where a computed size says."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(32, 96), "o": nn.Linear(32, 32)}) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for each in self.layers:
            q, k, v = (part.unflatten(2, (4, 8)).transpose(1, 2) for part in each["qkv"](x).chunk(3, -1))
            x = x + each["o"](((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x


def test_every_layer_loses_heads_where_sizes_are_computed_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Chunked()
    with torch.no_grad():
        for each in model.layers:
            each["o"].weight[:, :16] = 0
    options = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}, "dynamo": False}
    source = export(model, (torch.randn(2, 5, 32),), tmp_path / "a.onnx", **options)
    report = optimize_file(source, tmp_path / "b.onnx", latency=False)
    assert sorted(new for _, new in report.resized.values()) == [(16, 32)] * 3 + [(32, 48)] * 3
    assert not report.left and "Shape" not in str(read_contents(report.path)), str(report)
    assert report.verification is not None and report.verification.exact is not None
    assert report.verification.exact.relative < 1e-12


def graph_file(
    path: Path, nodes: list[Any], initializers: list[Any], inputs: list[Any], outputs: list[Any], **options: Any
) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    imports = [helper.make_opsetid(name, version) for name, version in options.pop("opsets", {"": 18}).items()]
    model = helper.make_model(graph, opset_imports=imports, **options)
    model.ir_version = options.get("ir_version", 10)
    path.write_bytes(model.SerializeToString())
    return path


def value(name: str, *shape: Any, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, list(shape))


def stored(array: Any, name: str) -> Any:
    return numpy_helper.from_array(np.asarray(array), name)


def test_constants_are_folded_and_stored_once(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Transpose", ["w"], ["wt"]),
        helper.make_node("Mul", ["wt", "two"], ["w2"]),
        helper.make_node("MatMul", ["x", "w2"], ["h"]),
        helper.make_node("MatMul", ["x", "again"], ["g"]),
        helper.make_node("MatMul", ["x", "twin"], ["f"]),
        helper.make_node("Sum", ["h", "g", "f"], ["y"]),
    ]
    constants = [stored(weight, "w"), stored(np.float32(2), "two"), stored(weight.T, "again"), stored(weight.T, "twin")]
    path = graph_file(tmp_path / "a.onnx", nodes, constants, [value("x", "n", 3)], [value("y", "n", 4)])
    report = optimize_file(path, tmp_path / "b.onnx", latency=False)
    assert report.folded == 1 and report.shared == 1 and report.nodes == 4
    names = [i.name for i in read_contents(report.path).initializers]
    assert len(names) == 2 and "w" not in names


def test_folding_does_not_enlarge_the_file(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Expand", ["one", "shape"], ["many"]),
        helper.make_node("Transpose", ["tied"], ["turned"]),
        helper.make_node("MatMul", ["x", "turned"], ["h"]),
        helper.make_node("MatMul", ["h", "tied"], ["k"]),
        helper.make_node("MatMul", ["k", "turned"], ["m"]),
        helper.make_node("Add", ["m", "many"], ["y"]),
    ]
    weight = np.random.default_rng(0).standard_normal((200, 300)).astype(np.float32)
    constants = [
        stored(np.ones((1, 200), np.float32), "one"),
        stored(np.array([500, 200]), "shape"),
        stored(weight, "tied"),
    ]
    path = graph_file(tmp_path / "a.onnx", nodes, constants, [value("x", 500, 300)], [value("y", 500, 200)])
    report = optimize_file(path, tmp_path / "b.onnx", latency=False)
    assert report.folded == 0 and report.bytes < report.source_bytes + 2000


def test_eight_bit_weights_stay_eight_bit(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    codes = np.random.default_rng(0).integers(-127, 127, (40, 30)).astype(np.int8)
    constants = [stored(codes, "q"), stored(np.float32(0.02), "scale"), stored(np.int8(0), "zero")]
    path = graph_file(tmp_path / "a.onnx", nodes, constants, [value("x", "n", 40)], [value("y", "n", 30)])
    report = optimize_file(path, tmp_path / "b.onnx", latency=False)
    assert report.folded == 0 and report.left == {"DequantizeLinear": 1}
    assert [i.dtype for i in read_contents(report.path).initializers if i.name == "q"] == ["int8"]


def test_nested_graphs_functions_and_foreign_operators_are_left_and_named(tmp_path: Path) -> None:
    branch = [
        helper.make_graph([helper.make_node(kind, ["h"], [kind])], kind, [], [value(kind, "n", 4)])
        for kind in ("Relu", "Neg")
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("If", ["flag"], ["g"], then_branch=branch[0], else_branch=branch[1]),
        helper.make_node("Gelu", ["g"], ["e"], domain="com.microsoft"),
        helper.make_node("twice", ["e"], ["y"], domain="mine"),
    ]
    twice = helper.make_function("mine", "twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])],
                                 [helper.make_opsetid("", 18)])  # fmt: skip
    weight = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    weight[:, 1] = 0
    path = graph_file(
        tmp_path / "a.onnx", nodes, [stored(weight, "w")], [value("x", "n", 3), value("flag", kind=TensorProto.BOOL)],
        [value("y", "n", 4)], opsets={"": 18, "com.microsoft": 1, "mine": 1}, functions=[twice],
    )  # fmt: skip
    report = optimize_file(path, tmp_path / "b.onnx", latency=False)
    assert report.left == {"If": 1, "com.microsoft.Gelu": 1, "mine.twice": 1} and report.channels == 0
    assert "left as is  1 If, 1 com.microsoft.Gelu, 1 mine.twice" in str(report)
    assert report.verification is not None and report.verification.exact is None and report.verification.reason
    model = onnx.load(report.path)
    assert len(model.functions) == 1 and [n.op_type for n in model.graph.node] == ["MatMul", "If", "Gelu", "twice"]


def test_an_operator_that_onnxruntime_lacks_is_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Warp", ["h"], ["y"], domain="acme")]
    path = graph_file(tmp_path / "a.onnx", nodes, [stored(np.ones((3, 4), np.float32), "w")], [value("x", "n", 3)],
                      [value("y", "n", 4)], opsets={"": 18, "acme": 1})  # fmt: skip
    with pytest.raises(ExportError, match=r"acme\.Warp"):
        optimize_file(path, tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()
    report = optimize_file(path, tmp_path / "b.onnx", verify=False, latency=False)
    assert report.left == {"acme.Warp": 1} and report.verification is None and "verified    no" in str(report)


def test_initializers_that_a_caller_may_replace_stay(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    weight[:, 1] = 0
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    constants = [stored(weight, "w"), stored(np.ones((4, 2), np.float32), "v")]
    inputs = [value("x", "n", 3), value("w", 3, 4)]
    path = graph_file(tmp_path / "a.onnx", nodes, constants, inputs, [value("y", "n", 2)])
    report = optimize_file(path, tmp_path / "b.onnx", latency=False)
    assert report.channels == 0 and "1 initializers are inputs as well" in str(report)


@pytest.mark.parametrize("content", [b"", b"not an onnx file", b"\x00" * 64, None])
def test_what_is_no_onnx_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match="there is no such file" if content is None else "cannot be read as ONNX"):
        optimize_file(path, tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


def test_a_truncated_file(tmp_path: Path) -> None:
    path = dynamic(nn.Linear(30, 40), (torch.randn(2, 30),), tmp_path / "a.onnx")
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ExportError):
        optimize_file(path, tmp_path / "b.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def external(path: Path, location: str = "a.data") -> Path:
    weight = np.random.default_rng(0).standard_normal((30, 40)).astype(np.float32)
    weight[:, :7] = 0
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    constants = [stored(weight, "w"), stored(np.ones((40, 20), np.float32), "v")]
    graph_file(path, nodes, constants, [value("x", "n", 30)], [value("y", "n", 20)])
    model = onnx.load(path)
    onnx.save_model(model, path, save_as_external_data=True, location=location, size_threshold=0)
    return path


def test_external_data_is_read_and_written_whole(tmp_path: Path) -> None:
    source = external(tmp_path / "a.onnx")
    held = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    out = tmp_path / "b.onnx"
    report = optimize_file(source, out, latency=False)
    data = [p for p in tmp_path.iterdir() if p.name.startswith("b.onnx.")]
    assert len(data) == 1 and report.channels == 7 and report.bytes == out.stat().st_size + data[0].stat().st_size
    assert {name: (tmp_path / name).read_bytes() for name in held} == held
    again = optimize_file(source, out, latency=False, channels=False)
    assert again.channels == 0 and not data[0].exists()  # what only the old file had
    assert len([p for p in tmp_path.iterdir() if p.name.startswith("b.onnx.")]) == 1
    run(out, {"x": np.zeros((2, 30), np.float32)})


@pytest.mark.parametrize("harm", ["short", "missing", "outside", "length"])
def test_external_data_that_is_not_there(tmp_path: Path, harm: str) -> None:
    source, data = external(tmp_path / "a.onnx"), tmp_path / "a.data"
    if harm == "short":
        data.write_bytes(data.read_bytes()[:-10])
    elif harm == "missing":
        data.unlink()
    else:
        model = onnx.load(source, load_external_data=False)
        for entry in model.graph.initializer[0].external_data:
            if harm == "outside" and entry.key == "location":
                entry.value = "../a.data"
            if harm == "length" and entry.key == "length":
                entry.value = "12"
        source.write_bytes(model.SerializeToString())
    message = {"short": "truncated", "missing": "missing", "outside": "outside its folder", "length": "`length`"}[harm]
    with pytest.raises(ExportError, match=message):
        optimize_file(source, tmp_path / "b.onnx", latency=False)
    assert not list(tmp_path.glob("*b.onnx*"))


def test_tensors_beyond_one_message_go_into_a_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxsparse.exporters import external as limits
    from fxsparse.exporters import file_io

    source = wide(tmp_path)
    monkeypatch.setattr(limits, "LIMIT", 100_000)
    monkeypatch.setattr(file_io, "_IN_MEMORY", 100_000)
    report = optimize_file(source, tmp_path / "b.onnx", batches=(4,))
    assert len(list(tmp_path.glob("b.onnx.*.data"))) == 1 and report.path.stat().st_size < 100_000
    assert report.verification is not None


def test_the_source_is_never_written(tmp_path: Path) -> None:
    source = external(tmp_path / "a.onnx", location="b.onnx.data")
    with pytest.raises(ConfigError, match="is the source"):
        optimize_file(source, source)
    with pytest.raises(ConfigError, match="data file"):
        optimize_file(source, tmp_path / "b.onnx")
    with pytest.raises(ConfigError, match="`batches`"):
        optimize_file(source, tmp_path / "c.onnx", batches=())
    with pytest.raises(ConfigError, match="no free axis"):
        optimize_file(source, tmp_path / "c.onnx", sizes={"nothing": 3})


@pytest.mark.parametrize("outside", [False, True])
def test_a_full_disk_leaves_nothing(tmp_path: Path, outside: bool) -> None:
    source = external(tmp_path / "a.onnx") if outside else wide(tmp_path)
    out = tmp_path / "b.onnx"
    out.write_bytes(b"old")
    held = sorted(p.name for p in tmp_path.iterdir())

    size = source.with_name("a.data").stat().st_size if outside else source.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        with pytest.raises(ExportError, match="could not be written"):
            optimize_file(source, out, latency=False, channels=False, lower=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(p.name for p in tmp_path.iterdir()) == held and out.read_bytes() == b"old"


def test_a_wrong_rewriting_is_caught_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = dynamic(kill(Residual()), IMAGE, tmp_path / "a.onnx")
    from fxsparse.exporters import file_work

    real = file_work.remove_channels

    def wrong(model: ir.Model, multiple: int = 1) -> Any:
        found = real(model, multiple)
        name, initializer = next((n, v) for n, v in model.graph.initializers.items() if n.startswith("out.bias"))
        array = initializer.const_value.numpy().copy()
        array.flat[0] += 1e-6
        model.graph.initializers[name].const_value = ir.Tensor(array)
        return found

    monkeypatch.setattr(file_work, "remove_channels", wrong)
    with pytest.raises(ExportError, match="float64 copies differ"):
        optimize_file(source, tmp_path / "b.onnx", latency=False)
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def test_a_fixed_batch_and_old_operator_sets(tmp_path: Path) -> None:
    source = export(kill(Residual()), IMAGE, tmp_path / "a.onnx", dynamo=False, input_names=["x"], opset_version=10)
    report = optimize_file(source, tmp_path / "b.onnx", batches=(1, 8))
    assert [each.batch for each in report.latency] == [2] and report.verification is not None
    assert report.verification.batch_sizes == (2,) and "too old to lower" in str(report)


def test_half_precision(tmp_path: Path) -> None:
    model = kill(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))).half()
    source = dynamic(model, (torch.randn(2, 16).half(),), tmp_path / "a.onnx")
    report = optimize_file(source, tmp_path / "b.onnx", latency=False)
    assert report.channels > 0 and report.verification is not None and report.verification.exact is not None


def test_an_optimised_file_gains_nothing_from_being_optimised_again(tmp_path: Path) -> None:
    first = optimize_file(dynamic(kill(Residual()), IMAGE, tmp_path / "a.onnx"), tmp_path / "b.onnx", latency=False)
    second = optimize_file(first.path, tmp_path / "c.onnx", latency=False)
    assert (second.channels, second.folded, second.shared) == (0, 0, 0) and second.nodes == first.nodes


def test_outputs_that_are_maps_come_through(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "v"], ["p"]),
        helper.make_node("ZipMap", ["p"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[4, 6]),
    ]
    weight[:, 1] = 0
    kind = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    out = helper.make_value_info("y", helper.make_sequence_type_proto(kind))
    constants = [stored(weight, "w"), stored(np.ones((3, 2), np.float32), "v")]
    path = graph_file(
        tmp_path / "a.onnx", nodes, constants, [value("x", "n", 5)], [out], opsets={"": 18, "ai.onnx.ml": 3}
    )
    report = optimize_file(path, tmp_path / "b.onnx")
    assert report.channels == 1 and onnx.load(report.path).graph.output[0] == onnx.load(path).graph.output[0]
    x = np.random.default_rng(1).standard_normal((2, 5)).astype(np.float32)
    before, after = run(path, {"x": x}), run(report.path, {"x": x})
    assert [set(each) for each in after] == [{4, 6}] * 2
    assert all(b[key] == pytest.approx(a[key], rel=1e-5) for a, b in zip(before, after, strict=True) for key in a)


def test_a_file_of_scikit_learn(tmp_path: Path) -> None:
    skl2onnx = pytest.importorskip("skl2onnx")
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.neural_network import MLPClassifier

    random = np.random.default_rng(0)
    x, y = random.standard_normal((60, 12)).astype(np.float32), random.integers(0, 3, 60)
    fitted = MLPClassifier((16,), max_iter=400, random_state=0, tol=1.0).fit(x, y)
    fitted.coefs_[0][:, :5] = 0
    made = skl2onnx.convert_sklearn(fitted, initial_types=[("x", FloatTensorType([None, 12]))])
    path = tmp_path / "a.onnx"
    path.write_bytes(made.SerializeToString())
    report = optimize_file(path, tmp_path / "b.onnx")
    assert report.channels == 5 and report.verification is not None
