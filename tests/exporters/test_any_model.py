"""Models of every shape of inputs, outputs and Python: exported and equal, or refused with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxsparse.errors import ExportError
from fxsparse.exporters import Exporter, ExportReport, Verification, export_onnx
from fxsparse.planning import transform

QUICK = Verification(batch_sizes=(1, 3), draws=3)


def run(path: Path, **feed: Tensor) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    assert names <= set(feed), names
    return list(session.run(None, {name: feed[name].numpy() for name in names}))


def export(model: nn.Module, path: Path, inputs: Any, verify: bool | Verification = QUICK) -> ExportReport:
    return export_onnx(model, path, inputs, verify=verify, latency=False)


def close(found: Any, expected: Tensor, scale: float = 2e-5) -> None:
    assert found.shape == tuple(expected.shape)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=scale * float(expected.abs().max()))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


# --- outputs ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Parts:
    last: Tensor
    hidden: tuple[Tensor, ...] | None = None
    loss: Tensor | None = None


class Pair(NamedTuple):
    first: Tensor
    second: Any


class Registered:
    """A class that torch's pytree can flatten, but whose parts have no names there."""

    def __init__(self, value: Tensor, steps: int) -> None:
        self.value, self.steps = value, steps


pytree.register_pytree_node(Registered, lambda r: ([r.value, r.steps], None), lambda c, _: Registered(*c))

OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "dataclass": (lambda y: Parts(y, (y + 1, y - 1)), ["last", "hidden_0", "hidden_1"]),
    "named tuple": (lambda y: Pair(y, {"deep": [None, y + 1]}), ["first", "second_deep_1"]),
    "registered class": (lambda y: {"r": Registered(y, 3)}, ["r_0"]),
    "twice the same": (lambda y: (y, y), ["output_0", "output_1"]),
    "numbers and texts": (lambda y: [y, 3, None, "eager", 0.5, True], ["output_0"]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_any_structure_of_outputs(name: str, tmp_path: Path) -> None:
    shape, names = OUTPUTS[name]

    class Model(Base):
        def forward(self, x: Tensor) -> Any:
            return shape(self.linear(x))

    torch.manual_seed(0)
    model, path = transform(Model(), sparsity=0.5).eval(), tmp_path / "m.onnx"
    report = export(model, path, (torch.randn(2, 4),))
    assert report.batch == "dynamic" and report.exporter is Exporter.EXPORT and report.switches == ()
    assert [value.name for value in onnx.load(path).graph.output] == names
    x = torch.randn(7, 4)
    with torch.no_grad():
        y = model.linear(x)
    close(run(path, x=x)[0], y)
    left = [note for note in report.notes if "leaves it out" in note]
    assert len(left) == {"registered class": 1, "numbers and texts": 4}.get(name, 0)


class Cache:
    def __init__(self, key: Tensor) -> None:
        self.key = key


class WithCache(Base):
    """Returns its cache unless its configuration says otherwise, as language models do."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        inner = SimpleNamespace(use_cache=True)
        self.config = SimpleNamespace(text_config=inner) if nested else inner

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        config = getattr(self.config, "text_config", self.config)
        return {"logits": y, "cache": Cache(y)} if config.use_cache else {"logits": y}


@pytest.mark.parametrize("nested", [False, True])
def test_a_cache_among_the_outputs_is_switched_off_on_the_copy(nested: bool, tmp_path: Path) -> None:
    model = WithCache(nested).eval()
    report = export(model, tmp_path / "m.onnx", (torch.randn(2, 4),))
    assert report.switches == (f"config{'.text_config' if nested else ''}.use_cache = False",)
    assert "use_cache = False" in str(report)
    x = torch.randn(3, 4)
    with torch.no_grad():
        found = model(x)
    close(run(tmp_path / "m.onnx", x=x)[0], found["logits"])
    assert "cache" in found, "the caller's configuration has changed"


def test_an_object_that_no_switch_removes_is_refused(tmp_path: Path) -> None:
    class Model(Base):
        def forward(self, x: Tensor) -> Any:
            return self.linear(x), Cache(x)

    with pytest.raises(ExportError, match=r"output `output_1` \(=Cache\) is no tensor .*return tensors only"):
        export(Model(), tmp_path / "m.onnx", (torch.randn(2, 4),))
    assert not list(tmp_path.iterdir())


class Rotated(Base):
    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        return torch.view_as_complex(self.linear(x).reshape(-1, 2, 2)) * turn


def test_complex_numbers_are_pairs(tmp_path: Path) -> None:
    model, path = Rotated().eval(), tmp_path / "m.onnx"
    turn = torch.randn(2, 2, dtype=torch.complex64)
    report = export(model, path, (torch.randn(2, 4), turn))
    assert any("`turn` is complex" in note for note in report.notes)
    x, turn = torch.randn(3, 4), torch.randn(3, 2, dtype=torch.complex64)
    with torch.no_grad():
        close(run(path, x=x, turn=torch.view_as_real(turn))[0], torch.view_as_real(model(x, turn)))


# --- inputs ----------------------------------------------------------------------------------------------------------


class Bags(nn.Module):
    """`offsets` must start at 0 and not fall: most random integers make the model raise."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 8, mode="sum")
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return self.head(self.bag(ids, offsets))


def test_integers_that_belong_together_stay_valid(tmp_path: Path) -> None:
    model, path = Bags().eval(), tmp_path / "m.onnx"
    ids, offsets = torch.randint(0, 20, (9,)), torch.tensor([0, 4, 7])
    report = export(model, path, (ids, offsets))
    assert report.verification is not None
    with torch.no_grad():
        close(run(path, ids=ids.flip(0), offsets=offsets)[0], model(ids.flip(0), offsets))


class Graph(nn.Module):
    """Rows of `x` that `edges` point at must exist: no batch below the example's works."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        return torch.zeros_like(x).index_add(0, target, self.linear(x)[source])


def test_batch_sizes_that_the_model_refuses_give_way_to_larger_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = Graph().eval(), tmp_path / "m.onnx"
    edges = torch.tensor([[0, 5, 3, 2], [1, 2, 5, 0]])
    report = export(model, path, (torch.randn(6, 4), edges))
    assert report.batch == "dynamic" and report.verification is not None
    assert report.verification.batch_sizes == (6, 7, 12)
    assert any("not verified at batch size 3, where the model itself fails" in note for note in report.notes)
    x = torch.randn(9, 4)
    with torch.no_grad():
        close(run(path, x=x, edges=edges)[0], model(x, edges))


class Everything(Base):
    def forward(
        self, xs: list[tuple[Tensor, int]], scale: float | None, names: Any = None, flags: tuple[bool, ...] = ()
    ) -> Tensor:
        total = sum(self.linear(x) * weight for x, weight in xs)
        return total * (1.0 if scale is None else scale) * (2 if flags and flags[-1] else 1)


def test_lists_numbers_none_bools_and_texts(tmp_path: Path) -> None:
    model, path = Everything().eval(), tmp_path / "m.onnx"

    def inputs(size: int) -> Any:
        pairs = [(torch.randn(size, 4), 2), (torch.randn(size, 4), 5)]
        return (pairs, None), {"names": {"a": "b"}, "flags": (False, True)}

    report = export(model, path, inputs(2))
    assert len([note for note in report.notes if "is no tensor: the graph holds this value" in note]) == 5
    (pairs, scale), keywords = inputs(5)
    with torch.no_grad():
        close(run(path, xs_0_0=pairs[0][0], xs_1_0=pairs[1][0])[0], model(pairs, scale, **keywords))


# --- switches --------------------------------------------------------------------------------------------------------


class Attention(Base):
    """Five axes, which torch's translation of the fused operation refuses."""

    fused_attn: bool
    causal = False

    def forward(self, x: Tensor) -> Tensor:
        q = self.linear(x).reshape(x.shape[0], 2, 1, 3, 4)
        if getattr(self, "fused_attn", True):
            return F.scaled_dot_product_attention(q, q, q, is_causal=self.causal).flatten(1)
        return ((q @ q.transpose(-1, -2) / 2).softmax(-1) @ q).flatten(1)


def attention_inputs(size: int) -> Tensor:
    return torch.randn(size, 6, 4)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_beyond_four_axes_is_written_out(causal: bool, tmp_path: Path) -> None:
    model, path = Attention().eval(), tmp_path / "m.onnx"
    model.causal = causal
    report = export(model, path, (attention_inputs(2),))
    assert report.switches == ("scaled_dot_product_attention written out",) and report.exporter is Exporter.EXPORT
    assert report.batch == "dynamic"
    x = attention_inputs(4)
    with torch.no_grad():
        close(run(path, x=x)[0], model(x))


def test_a_flag_of_the_module_is_switched_on_the_copy_only(tmp_path: Path) -> None:
    model = Attention().eval()
    model.fused_attn = True
    report = export(model, tmp_path / "m.onnx", (attention_inputs(2),))
    assert report.switches == ("fused_attn = False",)
    assert model.fused_attn is True


class Implemented(Base):
    """Fails to export until it is told to use the plain form."""

    form = "fused"
    factor = 1.0

    def set_attn_implementation(self, form: str) -> None:
        if form != "eager":
            raise ValueError(form)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y + 0 * torch.linalg.svdvals(y).sum() if self.form == "fused" else y * self.factor


def test_a_method_of_the_model_chooses_the_plain_form(tmp_path: Path) -> None:
    model = Implemented().eval()
    report = export(model, tmp_path / "m.onnx", (torch.randn(2, 4),))
    assert report.switches == ("set_attn_implementation('eager')",) and model.form == "fused"


def test_a_switch_that_changes_the_values_is_refused(tmp_path: Path) -> None:
    model = Implemented().eval()
    model.factor = 1.001
    with pytest.raises(ExportError, match=r"torch cannot export this model to ONNX .*svd.*replace that operator"):
        export(model, tmp_path / "m.onnx", (torch.randn(2, 4),))
    assert not list(tmp_path.iterdir())


# --- the legacy exporter ---------------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Sends rows to experts, with a Python branch on how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == k)
            if rows.numel() == 0:
                continue
            y = y.index_add(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return y


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 6, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


def test_routing_by_values_is_rescued_by_the_legacy_exporter(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, path = transform(Routed(), (torch.randn(6, 8),), sparsity=0.5).eval(), tmp_path / "m.onnx"
    report = export(model, path, (torch.randn(6, 8),))
    assert report.exporter is Exporter.TRACE and report.batch == "dynamic"
    assert "legacy exporter, dynamic batch" in str(report)
    for size in (1, 2, 40):
        x = torch.randn(size, 8)
        with torch.no_grad():
            close(run(path, x=x)[0], model(x))
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    for layer in report.layers:
        assert layer.initializers, layer.name
        for name in layer.initializers:
            assert np.count_nonzero(stored[name]) == layer.alive
    assert capfd.readouterr() == ("", "")
    assert not torch._C._jit_is_onnx_log_enabled()  # type: ignore[attr-defined]  # torch's own switch


def test_packed_sequences_are_rescued_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = Packed().eval(), tmp_path / "m.onnx"
    lengths = torch.tensor([5, 3])
    report = export(model, path, (torch.randn(2, 5, 4), lengths))
    assert report.exporter is Exporter.TRACE
    x = torch.randn(2, 5, 4)
    with torch.no_grad():
        close(run(path, x=x, lengths=lengths)[0], model(x, lengths))


class BatchBranch(Base):
    """Exported at batch 2, the graph holds the branch of small batches only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.shape[0] <= 8 else 2 * self.linear(x)


def test_a_file_that_is_right_at_the_examples_batch_only_is_fixed(tmp_path: Path) -> None:
    report = export(BatchBranch(), tmp_path / "m.onnx", (torch.randn(2, 4),), verify=True)
    assert report.batch == "2" and report.exporter is Exporter.EXPORT and "fixed batch 2" in str(report)
    assert any("the batch size is fixed" in note and "at batch size 16" in note for note in report.notes)
    assert onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).get_inputs()[0].shape == [2, 4]


def test_a_trace_that_is_right_at_one_batch_size_only_is_fixed_and_says_so(tmp_path: Path) -> None:
    class Model(Base):
        def forward(self, x: Tensor) -> Tensor:
            if bool((x.abs() >= 0).all()):
                return self.linear(x) * float(len(x.tolist()))
            return x

    report = export(Model(), tmp_path / "m.onnx", (torch.randn(3, 4),))
    assert report.exporter is Exporter.TRACE and report.batch == "3"
    assert "legacy exporter, fixed batch 3" in str(report)
    assert any(note.startswith("1 decisions of Python on values came out alike") for note in report.notes)


class Branch(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else -self.linear(x)


def test_a_branch_on_values_is_refused_with_part_reason_and_mend(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), Branch())
    with pytest.raises(ExportError) as caught:
        export(model, tmp_path / "m.onnx", (torch.randn(2, 4),), verify=True)
    message = str(caught.value)
    assert "data-dependent" in message and "in `1`" in message and "torch.where" in message
    assert "legacy exporter does not help" in message and "differs by" in message
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_without_verification_the_legacy_exporter_is_not_used(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="data-dependent") as caught:
        export(Routed(), tmp_path / "m.onnx", (torch.randn(6, 8),), verify=False)
    assert "legacy" not in str(caught.value)
