"""Exported files compute what the masked model computes, at every batch size, with zeros where the mask is dead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from fxsparse.exporters import ExportReport, export_onnx, read_metadata
from fxsparse.models import lenet_300_100, small_conv_net
from fxsparse.nn import masks
from fxsparse.planning import transform
from fxsparse.sparsity import Channel, Mask, MaskSet, NByM, SharedSupport


class Functional(nn.Module):
    """A weight of every functional kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_weight = nn.Parameter(torch.randn(6, 4) / 2)
        self.matmul_weight = nn.Parameter(torch.randn(6, 8) / 2)
        self.einsum_weight = nn.Parameter(torch.randn(5, 8) / 2)
        self.conv_weight = nn.Parameter(torch.randn(3, 1, 3) / 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(F.linear(x, self.linear_weight)) @ self.matmul_weight
        y = torch.einsum("bi,oi->bo", y, self.einsum_weight)
        return F.conv1d(y.unsqueeze(1), self.conv_weight, padding=1).flatten(1)


class Tied(nn.Module):
    """One weight, read as a 2-D product, as a batched product, and by a function of the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 8)
        self.decoder = nn.Linear(8, 8, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.encoder(x))
        batched = self.decoder(torch.stack([h, 2 * h], 1)).sum(1)
        return batched + F.linear(h, self.encoder.weight)


class Many(nn.Module):
    """Several inputs, one nested, keywords out of order, constants; nested outputs with a None among them."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 8)
        self.right = nn.Linear(3, 8)

    def forward(
        self, x: Tensor, extra: dict[str, Tensor], *, scale: Tensor, shift: Tensor, flip: bool = False, **more: Tensor
    ) -> dict[str, Any]:
        y = self.left(x) * scale + self.right(extra["z"]) - 3 * shift + more["late"]
        return {"y": -y if flip else y, "parts": (y.mean(1), None, [y > 0]), "label": y.argmax(-1)}


def run(path: Path, feed: dict[str, Tensor]) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == list(feed)
    return list(session.run(None, {name: tensor.numpy() for name, tensor in feed.items()}))


def initializers(path: Path) -> dict[str, Any]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def check_zeros(path: Path, model: nn.Module) -> None:
    """Every masked weight lies in the file, with zeros exactly at its dead entries."""
    stored = initializers(path)
    rows = {row["name"]: row for row in read_metadata(path)["layers"]}
    assert list(rows) == list(masks(model))
    for name, mask in masks(model).items():
        assert rows[name]["initializers"], name
        for initializer, axes in rows[name]["initializers"].items():
            zeros = torch.from_numpy(stored[initializer].copy()) == 0
            assert torch.equal(zeros, ~mask.permute(axes)), (name, initializer)


def check_batches(path: Path, model: nn.Module, sample: Callable[[int], Tensor], name: str = "x") -> None:
    reference = copy.deepcopy(model).eval()
    for size in (1, 3, 33):
        x = sample(size)
        (found,) = run(path, {name: x})
        with torch.no_grad():
            expected = reference(x).numpy()
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: lenet_300_100(64, 10), (64,)),
    "convnet": (lambda: small_conv_net(1, 10, 8), (1, 8, 8)),
    "functional": (Functional, (4,)),
    "tied": (Tied, (8,)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (4, 5, 5)),
}


def perturb_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias, module.weight):
                assert tensor is not None
                tensor.data.normal_()
            assert module.running_var is not None
            module.running_var.uniform_(0.5, 2.0)


@pytest.mark.parametrize(("name", "example_batch"), [("mlp", 1), ("convnet", 1), *((name, 4) for name in CASES)])
def test_equals_pytorch_at_batch_sizes_beyond_the_example(name: str, example_batch: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    make, shape = CASES[name]
    model = make()
    perturb_norms(model)
    sparse = transform(model, (torch.randn(2, *shape),), sparsity=0.75)
    path = tmp_path / "m.onnx"
    report = export_onnx(sparse, path, (torch.randn(example_batch, *shape),), latency=False, compact=False)
    assert report.batch == "dynamic"
    first = onnxruntime.InferenceSession(str(path)).get_inputs()[0]
    assert first.shape[0] == "batch"
    check_batches(path, sparse, lambda size: torch.randn(size, *shape), first.name)
    check_zeros(path, sparse)
    assert report.verification is not None and report.verification.batch_sizes == (1, 2, 5, 16)
    assert report.verification.reference == "float64"
    assert 0 < report.verification.worst_relative <= report.verification.allowed < 1e-4


def test_a_plain_model_needs_no_masks(tmp_path: Path) -> None:
    model = lenet_300_100(16, 3)
    report = export_onnx(model, tmp_path / "m.onnx", (torch.randn(2, 16),))
    check_batches(tmp_path / "m.onnx", model, lambda size: torch.randn(size, 16), report_input(tmp_path / "m.onnx"))
    assert report.layers == () and report.density == 1.0 and report.alive == report.parameters
    assert report.latency is not None and report.latency.dense_ms > 0


def report_input(path: Path) -> str:
    return str(onnx.load(path).graph.input[0].name)


def many_inputs(size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = (torch.randn(size, 4), {"z": torch.randn(size, 3)})
    kwargs = {name: torch.randn(size, 8) for name in ("shift", "late", "scale")}
    return args, {**kwargs, "flip": True}


def test_nested_keyword_and_constant_inputs_and_nested_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sparse = transform(Many(), many_inputs(2), sparsity=0.5)
    path = tmp_path / "m.onnx"
    report = export_onnx(sparse, path, many_inputs(2), latency=False)
    assert report.batch == "dynamic"
    assert any("`flip` (=True)" in note for note in report.notes)
    names = [value.name for value in onnx.load(path).graph.output]
    assert names == ["y", "parts_0", "parts_2_0", "label"]
    for size in (1, 7):
        args, kwargs = many_inputs(size)
        feed = {"x": args[0], "extra_z": args[1]["z"], **{n: kwargs[n] for n in ("shift", "late", "scale")}}
        y, mean, positive, label = run(path, feed)
        with torch.no_grad():
            expected = sparse(*args, **kwargs)
        np.testing.assert_allclose(y, expected["y"].numpy(), atol=1e-5)
        np.testing.assert_allclose(mean, expected["parts"][0].numpy(), atol=1e-5)
        assert positive.dtype == bool and np.array_equal(positive, expected["parts"][2][0].numpy())
        assert np.array_equal(label, expected["label"].numpy())
    check_zeros(path, sparse)


class TrailingDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor, options: dict[str, Tensor]) -> Tensor:
        return self.linear(x) + options["x"]


@pytest.mark.parametrize("paired", [False, True])
def test_a_trailing_dict_is_an_input_and_not_keywords(paired: bool, tmp_path: Path) -> None:
    """The dict's key is also the name of a parameter: read as keywords it would collide."""
    model, path = TrailingDict(), tmp_path / "m.onnx"
    x, shift = torch.randn(3, 4), torch.randn(3, 2)
    args = (x, {"x": shift})
    export_onnx(model, path, (args, {}) if paired else args, latency=False)
    (found,) = run(path, {"x": x, "options_x": shift})
    np.testing.assert_allclose(found, model(x, {"x": shift}).detach().numpy(), atol=1e-6)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens)))


def test_integer_inputs_attention_and_a_tied_embedding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 7, (2, 5))
    sparse = transform(Lookup().eval(), (tokens,), sparsity=0.5)
    path = tmp_path / "m.onnx"
    report = export_onnx(sparse, path, (tokens,), latency=False)
    assert any("`tokens`" in note for note in report.notes)
    check_batches(path, sparse, lambda size: torch.randint(0, 7, (size, 5)), "tokens")
    check_zeros(path, sparse)


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).reshape(3, 6)


def test_a_batch_that_cannot_vary_is_fixed_and_says_why(tmp_path: Path) -> None:
    report = export_onnx(FixedBatch(), tmp_path / "m.onnx", (torch.randn(3, 4),), latency=False)
    assert report.batch == "3" and any("batch size is fixed" in note and "[3, 6]" in note for note in report.notes)
    assert report.verification is not None and report.verification.batch_sizes == (3,)
    assert onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).get_inputs()[0].shape == [3, 4]
    assert read_metadata(tmp_path / "m.onnx")["batch"] == "3"


def test_double_precision_models_are_held_to_double_tolerance(tmp_path: Path) -> None:
    sparse = transform(lenet_300_100(16, 4).double(), sparsity=0.9)
    report = export_onnx(sparse, tmp_path / "m.onnx", (torch.randn(2, 16).double(),), latency=False)
    assert report.worst_relative is not None and report.worst_relative < 1e-13
    assert report.verification is not None and report.verification.allowed < 1e-12


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identity": {name: id(p) for name, p in model.named_parameters()},
        "training": [module.training for module in model.modules()],
        "grads": [p.requires_grad for p in model.parameters()],
        "tree": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "threads": torch.get_num_threads(),
        "rng": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def test_neither_the_model_nor_global_state_changes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = transform(small_conv_net(1, 10, 8), (torch.randn(2, 1, 8, 8),), sparsity=0.5).train()
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    x = torch.randn(2, 1, 8, 8)
    before, given = snapshot(model), x.clone()
    export_onnx(model, tmp_path / "m.onnx", (x,))
    assert same(before, snapshot(model)) and torch.equal(given, x)
    assert same(gradients, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert capfd.readouterr() == ("", "")


def test_the_report_counts_and_prints(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sparse = transform(lenet_300_100(64, 10), (torch.randn(1, 64),), sparsity=0.9)
    report: ExportReport = export_onnx(sparse, tmp_path / "m.onnx", (torch.randn(16, 64),), compact=False)
    alive = {name: int(mask.sum()) for name, mask in masks(sparse).items()}
    assert {layer.name: layer.alive for layer in report.layers} == alive
    assert report.bytes == (tmp_path / "m.onnx").stat().st_size
    assert report.bytes > report.dense_bytes > 4 * 50_000
    assert report.parameters == 64 * 300 + 300 + 300 * 100 + 100 + 1000 + 10
    assert report.alive == 300 + 100 + 10 + sum(alive.values())
    assert report.macs_dense == 64 * 300 + 300 * 100 + 1000
    assert report.macs_effective == sum(alive.values())
    assert report.latency is not None and report.latency.batch == 16 and report.latency.threads == 1
    assert report.reasons and "zeros" in report.reasons[0]
    text = str(report)
    for part in ("batch 16", "50,200", "float64 PyTorch", "allowed", "0.1000", "not faster", "interleaved"):
        assert part in text, part


def test_what_compaction_leaves_of_a_weight_is_a_part(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sparse = transform(lenet_300_100(64, 10), (torch.randn(1, 64),), sparsity=0.5, pattern=Channel(0), exclude="output")
    report = export_onnx(sparse, tmp_path / "m.onnx", (torch.randn(16, 64),), latency=False)
    first, second = read_metadata(tmp_path / "m.onnx")["layers"]
    stored = initializers(tmp_path / "m.onnx")
    assert [first["shape"], second["shape"]] == [[300, 64], [100, 300]]
    for row, shape in ((first, (150, 64)), (second, (50, 150))):
        assert row["initializers"] == {} and sorted(stored[row["parts"][0]].shape) == sorted(shape)
    assert "compacted 100x300 to 50x150" in str(report) and report.bytes < report.dense_bytes


def test_metadata_names_masks_patterns_and_passes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), Functional4())
    sparse = transform(model, (torch.randn(2, 16),), sparsity=0.5, pattern=NByM(2, 4))
    export_onnx(sparse, tmp_path / "m.onnx", (torch.randn(2, 16),), latency=False)
    found = read_metadata(tmp_path / "m.onnx")
    assert found["schema"] == "fxsparse.onnx/1" and found["torch"] == torch.__version__ and found["batch"] == "dynamic"
    assert found["density"] == 0.5
    assert found["mask_digest"] == MaskSet({name: Mask(mask) for name, mask in masks(sparse).items()}).digest()
    rows = {row["name"]: row for row in found["layers"]}
    assert set(rows) == {"0.weight", "2.weight"}
    assert (rows["0.weight"]["shape"], rows["0.weight"]["alive"], rows["0.weight"]["density"]) == ([8, 16], 64, 0.5)
    assert "NByM" in rows["0.weight"]["pattern"]
    assert {rows["0.weight"]["route"], rows["2.weight"]["route"]} == {"module", "mask node"}
    assert any(record["pass"] and "weight" in record["source"] for record in found["provenance"])


class Functional4(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def test_a_small_shared_support_stays_dense(tmp_path: Path) -> None:
    sparse = transform(nn.Sequential(nn.Linear(32, 32)), sparsity=0.5, pattern=SharedSupport(8))
    report = export_onnx(sparse, tmp_path / "m.onnx", (torch.randn(2, 32),))
    check_zeros(tmp_path / "m.onnx", sparse)
    assert report.latency is not None
    assert (report.latency.speedup >= 1.05) == (not report.reasons)
    assert not report.reasons or any("shared-support" in reason for reason in report.reasons)


def test_equal_exports_are_equal_files(tmp_path: Path) -> None:
    sparse = transform(lenet_300_100(16, 4), sparsity=0.8)
    for name in ("a", "b"):
        export_onnx(sparse, tmp_path / f"{name}.onnx", (torch.randn(2, 16),), latency=False)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_nodes_name_their_module_and_nothing_of_this_machine(tmp_path: Path) -> None:
    sparse = transform(nn.Sequential(lenet_300_100(16, 4), nn.Softmax(1)), sparsity=0.8)
    export_onnx(sparse, tmp_path / "m.onnx", (torch.randn(2, 16),), latency=False)
    content = (tmp_path / "m.onnx").read_bytes()
    for leak in (b".py", str(Path.cwd()).encode(), b"stack_trace", b"Flat"):
        assert leak not in content, leak
    nodes = onnx.load(tmp_path / "m.onnx").graph.node
    modules = [{p.key: p.value for p in node.metadata_props}.get("fxsparse.module") for node in nodes]
    assert [m for m in modules if m and m != "0"] == ["0.fc1", "0.fc2", "0.output", "1"]


def test_a_weight_that_is_not_used_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.add_module("spare", nn.Linear(4, 4))
    model.forward = model[0].forward  # type: ignore[method-assign]
    sparse = transform(model, sparsity=0.5, include="*.weight")
    sparse.forward = sparse[0].forward  # type: ignore[method-assign, operator, index]
    report = export_onnx(sparse, tmp_path / "m.onnx", (torch.randn(2, 4),), latency=False)
    assert any("`spare.weight` is not used" in note for note in report.notes)
