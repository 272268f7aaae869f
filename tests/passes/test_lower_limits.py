"""How far the proof of equality reaches, how long the search goes on, and what large graphs cost."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import FrameType

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxsparse.passes.compact_widen import LARGE_MODEL
from fxsparse.passes.lower_proof import Proof
from fxsparse.passes.lower_search import allowed_attempts
from fxsparse.passes.lower_shared_support import Form, lower_shared_support
from fxsparse.passes.lower_sites import Constants
from fxsparse.passes.lower_subject import Subject
from tests.passes.lower_cases import assert_equal, wish

GROUPED = wish(Form.GATHER_MATMUL)


def grouped(width: int = 16, group: int = 8, alive: int = 4) -> nn.Linear:
    """A linear layer whose groups of rows read the same few positions."""
    layer = nn.Linear(width, width)
    keep = torch.zeros(width // group, width, dtype=torch.bool)
    for row in keep:
        row[torch.randperm(width)[:alive]] = True
    with torch.no_grad():
        layer.weight.mul_(keep.repeat_interleave(group, 0))
    return layer


class After(nn.Module):
    """A layer, and something behind it."""

    def __init__(self, behind: object) -> None:
        super().__init__()
        self.layer, self.behind = grouped(), behind

    def forward(self, x: Tensor) -> object:
        return self.behind(self.layer(x))  # type: ignore[operator]  # a function


@pytest.mark.parametrize("steps", [200, 1100])
def test_long_chains_between_and_before_layers(steps: int) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = grouped(), grouped()

        def forward(self, x: Tensor) -> Tensor:
            found = x
            for _ in range(steps if steps < 1000 else 0):
                found = found * 1.01
            found = self.one(found)
            for _ in range(steps):
                found = torch.relu(found)
            two: Tensor = self.two(found)
            return two

    torch.manual_seed(0)
    model, x = Chain().double().eval(), torch.randn(3, 16, dtype=torch.float64)
    result = lower_shared_support(model, (x,), choose=GROUPED)
    assert set(result.forms.values()) == {Form.GATHER_MATMUL}
    assert_equal(result.model, model, x)


def constant_graph(steps: int) -> tuple[fx.GraphModule, fx.Node]:
    """A value that is computed from a parameter, each step reading the one before twice."""
    root = nn.Module()
    root.weight = nn.Parameter(torch.eye(2))
    graph = fx.Graph()
    node = graph.get_attr("weight")
    node.meta["val"] = root.weight
    for _ in range(steps):
        half = graph.call_function(torch.ops.aten.mul.Tensor, (node, 0.25))
        node = graph.call_function(torch.ops.aten.add.Tensor, (half, half))
        half.meta["val"] = node.meta["val"] = root.weight
    graph.output(node)
    return fx.GraphModule(root, graph), node


def test_what_is_computed_from_parameters_is_visited_once() -> None:
    module, _ = constant_graph(2000)
    constants = Constants(module)
    last = next(node for node in reversed(module.graph.nodes) if node.op == "call_function")
    start = time.process_time()
    assert constants.parameter(last) == ("weight", False)
    value = constants(last)
    assert value is not None and value.shape == (2, 2) and float(value[0, 1]) == 0.0
    assert time.process_time() - start < 5.0  # twice the steps each would be 2^2000


def test_a_weight_is_taken_apart_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.stack([grouped().weight.detach() for _ in range(6)]))

        def forward(self, x: Tensor) -> Tensor:
            found = x
            for weight in self.weight.unbind(0):
                found = torch.relu(F.linear(found, weight))
            return found

    torch.manual_seed(0)
    computed: list[str] = []
    original = Constants._computed

    def noted(self: Constants, node: fx.Node) -> object:
        computed.append(str(node.target))
        return original(self, node)

    monkeypatch.setattr(Constants, "_computed", noted)
    x = torch.randn(3, 16, dtype=torch.float64)
    model = Stacked().double().eval()
    result = lower_shared_support(model, (x,), choose=GROUPED)
    assert computed.count("aten.unbind.int") == 2  # once for its values, once for its mask
    assert result.forms == {"weight": Form.GATHER_MATMUL}
    assert_equal(result.model, model, x)


def test_the_name_of_a_transposed_parameter_is_direct() -> None:
    root = nn.Module()
    root.weight = nn.Parameter(torch.randn(2, 3))
    graph = fx.Graph()
    read = graph.get_attr("weight")
    turned = graph.call_function(torch.ops.aten.t.default, (read,))
    scaled = graph.call_function(torch.ops.aten.mul.Tensor, (read, 2.0))
    both = graph.call_function(torch.ops.aten.t.default, (scaled,))
    for node in (read, scaled):
        node.meta["val"] = root.weight
    for node in (turned, both):
        node.meta["val"] = root.weight.t()
    graph.output((turned, both))
    constants = Constants(fx.GraphModule(root, graph))
    assert constants.parameter(turned) == ("weight", True)
    assert constants.parameter(both) == ("weight", False)


def test_a_computed_weight_in_float32_stays_and_says_why() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = grouped()

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.layer.weight / self.layer.weight.norm())

    torch.manual_seed(0)
    x = torch.randn(3, 16)
    (record,) = lower_shared_support(Scaled().eval(), (x,), choose=GROUPED).records
    assert record.form is Form.DENSE
    assert "differ" in record.reason and "it is computed from parameters" in record.reason
    wide = lower_shared_support(Scaled().double().eval(), (x.double(),), choose=GROUPED)
    assert wide.records[0].form is Form.GATHER_MATMUL


@pytest.mark.parametrize(
    ("behind", "lowered", "said"),
    [
        (lambda y: y * float("nan"), False, "output 0 is not finite in 48 of 48 entries"),
        (lambda y: None, False, "there is nothing to compare"),
        (lambda y: y[:0], False, "there is nothing to compare"),
        (lambda y: torch.relu(y - 1e6), True, "output 0 is zero everywhere"),
        (lambda y: y.argmax(-1), True, "output 0 is torch.int64"),
        (lambda y: (y, torch.where(y > 0, y, float("inf"))), True, "output 1 is not finite in"),
    ],
)
def test_what_a_comparison_cannot_tell_is_noted(behind: object, lowered: bool, said: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 16, dtype=torch.float64)
    result = lower_shared_support(After(behind).double().eval(), (x,), choose=GROUPED)
    assert (result.forms["layer.weight"] is Form.GATHER_MATMUL) == lowered
    assert any(said in note for note in result.notes), result.notes
    assert any("equal in float64" in note for note in result.notes) == lowered
    if not lowered:
        assert "no output of the example inputs could show" in result.records[0].reason


def test_a_full_comparison_has_no_other_notes() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 16, dtype=torch.float64)
    (note,) = lower_shared_support(After(torch.relu).double().eval(), (x,), choose=GROUPED).notes
    assert note.startswith("equal in float64, worst difference")


class Residuals(nn.Module):
    """A chain of layers with residuals."""

    def __init__(self, layers: int, gain: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(grouped() for _ in range(layers))
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        found = x
        for layer in self.layers:
            found = found + torch.relu(layer(found)) * self.gain
        return found


def test_the_search_takes_large_parts_first_ends_and_says_what_it_did_not_try(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 16, dtype=torch.float64)
    model = Residuals(16).double().eval()
    tried = []
    lower = Subject.lower

    def failing(self: Subject, forms: Mapping[str, Form]) -> nn.Module:
        tried.append(len(forms))
        if "layers.3.weight" in forms:
            raise RuntimeError("layer 3")
        return lower(self, forms)

    monkeypatch.setattr(Subject, "lower", failing)
    whole = lower_shared_support(model, (x,), choose=wish(Form.GATHER_CONV))
    assert [name for name, form in whole.forms.items() if form is Form.DENSE] == ["layers.3.weight"]
    assert whole.records[3].reason == "left as it is: RuntimeError: layer 3"
    assert tried == [16, 8, 8, 12, 12, 14, 16, 15, 16]  # those accepted are lowered with what is tried
    assert len(whole.notes) == 1

    tried.clear()
    monkeypatch.setattr("fxsparse.passes.lower_search._ATTEMPTS", (3, 5))
    part = lower_shared_support(model, (x,), choose=wish(Form.GATHER_CONV))
    assert tried == [16, 8, 8, 12, 12]
    why = "not tried alone: the search ended after 5 attempts"
    assert [r.name for r in part.records if why in r.reason] == [f"layers.{i}.weight" for i in range(4)]
    assert any(note.startswith(f"4 of 16 layers were {why}") for note in part.notes)
    assert sum(form is Form.GATHER_CONV for form in part.forms.values()) == 12
    assert_equal(part.model, model, x)


def test_layers_whose_rounding_the_model_magnifies_stay() -> None:
    class Chaos(Residuals):
        def forward(self, x: Tensor) -> Tensor:
            found = x
            for layer in self.layers:
                found = torch.sin(50 * layer(found))
            return found

    torch.manual_seed(0)
    x = torch.randn(4, 16, dtype=torch.float64)
    model = Chaos(12).double().eval()
    result = lower_shared_support(model, (x,), choose=wish(Form.GATHER_CONV))
    forms = list(result.forms.values())
    assert forms[-1] is Form.GATHER_CONV and Form.DENSE in forms and result.worst < 1e-12
    assert all("the outputs differ by" in record.reason for record in result.records if record.form is Form.DENSE)
    assert_equal(result.model, model, x)


@pytest.mark.parametrize(("nodes", "attempts"), [(1, 64), (1200, 50), (20_000, 8)])
def test_attempts_are_fewer_on_large_graphs(nodes: int, attempts: int) -> None:
    class Graph:
        def __init__(self) -> None:
            self.graph = type("", (), {"nodes": [None] * nodes})

    subject = object.__new__(Subject)
    object.__setattr__(subject, "module", Graph())
    assert allowed_attempts(subject) == attempts
    object.__setattr__(subject, "module", None)
    assert allowed_attempts(subject) == 64


def test_a_form_that_computes_something_else_is_refused() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 16)
    model = grouped().eval()
    proof = Proof(model, None, (x,), {})
    assert proof.dtype is torch.float64 and proof.notes == [] and proof.worst(model) == 0.0
    other = grouped().eval()
    assert proof.worst(other) > proof.allowed
    near = grouped().eval()
    near.weight.data = model.weight.data * (1 + 2.0**-22)  # what float32 can tell, and its own precision forgives
    near.bias.data = model.bias.data
    assert proof.allowed < proof.worst(near) < 2.0**-20


def test_large_models_are_compared_in_float64_without_a_wide_copy() -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = grouped()
            self.table = nn.Parameter(torch.randn(LARGE_MODEL // 16, 16))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layer(x) @ self.table[:100].t()
            return found

    torch.manual_seed(0)
    x = torch.randn(3, 16)
    model = Large().eval()
    result = lower_shared_support(model, (x,), choose=GROUPED)
    assert result.forms["layer.weight"] is Form.GATHER_MATMUL and 0.0 < result.worst < 1e-12
    assert result.notes[0].startswith("equal in float64")
    assert all(parameter.dtype is torch.float32 for parameter in (*model.parameters(), *result.model.parameters()))
    assert_equal(result.model, model, x.double())


@pytest.mark.parametrize("form", [Form.GATHER_CONV, Form.GATHER_MATMUL])
def test_cost_is_linear_in_the_graph(form: Form) -> None:
    x = torch.randn(3, 16)

    def calls(layers: int) -> int:
        """Python calls in this package's own files."""
        torch.manual_seed(0)
        model = Residuals(layers).eval()
        count = 0

        def seen(frame: FrameType, event: str, _: object) -> None:
            nonlocal count
            count += event == "call" and "/fxsparse/" in frame.f_code.co_filename

        sys.setprofile(seen)
        try:
            result = lower_shared_support(model, (x,), choose=wish(form))
        finally:
            sys.setprofile(None)
        assert list(result.forms.values()) == [form] * layers
        return count

    first, second, third = calls(8), calls(16), calls(32)
    assert third - second <= 2.1 * (second - first)  # twice the layers more: 4 where it is quadratic
