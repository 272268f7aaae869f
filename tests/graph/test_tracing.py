"""Traces that share their set-up, modules that are known to fail, graphs that share their code."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace as fx_trace

import fxsparse
from fxsparse.graph import capture, record
from fxsparse.graph.capture import trace
from fxsparse.graph.captured import CapturedModule
from fxsparse.graph.guards import Untraceable, raising_modules
from fxsparse.graph.scopes import collector_paused
from fxsparse.graph.tracing import tracing
from fxsparse.graph.tree import modules_of, parameters_of

X = torch.randn(3, 4)


class Rooted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * math.sqrt(x.shape[-1])


def _state() -> tuple[Any, ...]:
    patched = (nn.Module.__call__, nn.Module.__getattr__, nn.Module.__dict__.get("training"), torch.is_grad_enabled)
    names = (fx_trace._new_patcher, fx_trace._patch_wrapped_functions, fx_trace.CURRENT_PATCHER)
    return (*patched, *names, math.sqrt, math.floor, len)


def test_traces_in_a_session_are_those_outside_and_nothing_stays_patched() -> None:
    before, model = _state(), Rooted()
    alone = str(trace(model).graph)
    with tracing():
        first = str(trace(model).graph)
        assert torch.equal(model(X), model.linear(X) * 2.0)  # between traces modules run as ever
        with tracing():  # the same session
            second = str(trace(model).graph)
        third = str(fx.Tracer().trace(model))
    assert alone == first == second and "math.sqrt" in first and "math.sqrt" in third
    assert _state() == before


def test_a_session_that_fails_takes_everything_back() -> None:
    before = _state()
    with pytest.raises(ZeroDivisionError), tracing():
        with pytest.raises(Untraceable):
            trace(Branching())
        raise ZeroDivisionError
    assert _state() == before


def test_a_session_is_no_trace() -> None:
    seen: list[str] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(type(x).__name__)
            return x + 1

    with tracing():
        trace(Spy())
        Spy()(X)
    assert seen == ["ValueProxy", "Tensor"]


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.before(x))


class ByMode(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x + x


class Uses(nn.Module):
    """Reads the mode without effect."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else x


@pytest.mark.parametrize("culprit", [Branching, ByMode])
def test_what_runs_around_a_culprit_is_not_traced_anew(
    culprit: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Around(Around(Around(culprit())))
    module = __import__("sys").modules["fxsparse.graph.capture"]
    seen: list[nn.Module] = []
    monkeypatch.setattr(module, "trace", lambda root: seen.append(type(root)) or trace(root))
    captured = capture(model, (X,))
    assert seen.count(Around) == 1
    assert captured.graphs == ("before", "inner.before", "inner.inner.before")
    assert [refusal.path for refusal in captured.refusals] == ["", "inner", "inner.inner", "inner.inner.inner"]
    assert len({refusal.reason for refusal in captured.refusals}) == 1
    assert torch.equal(captured.module(X), model(X))


def test_a_reader_without_effect_spoils_nothing_around_it() -> None:
    model = nn.Sequential(Around(Uses()), Around(ByMode()))
    assert capture(model, (X,)).graphs == ("0", "1.before")


def test_every_reader_with_an_effect_is_found_at_once() -> None:
    model = nn.Sequential(Around(ByMode()), Around(Uses()), Around(ByMode()))
    with pytest.raises(Untraceable) as caught:
        trace(model)
    around = [(model[i], model[i].inner) for i in (0, 2)]
    assert {id(module) for module in caught.value.within} == {id(module) for pair in around for module in pair}


def test_the_modules_around_an_error_are_told_from_the_outside_in() -> None:
    model = Around(Around(Branching()))
    with pytest.raises(Untraceable) as caught:
        trace(model)
    found = raising_modules(caught.value.__cause__)
    assert [id(module) for module in found] == [id(model), id(model.inner), id(model.inner.inner)]


def test_alike_modules_share_their_code_until_one_is_edited() -> None:
    model = nn.Sequential(Branching(), *(Around(nn.ReLU()) for _ in range(2)))
    module = capture(model, (X,)).module
    one, two = module[1], module[2]
    assert isinstance(one, CapturedModule) and isinstance(two, CapturedModule)
    assert type(one).forward is type(two).forward and one.graph is not two.graph and one.code == two.code
    node = next(node for node in one.graph.nodes if node.op == "output")
    with one.graph.inserting_before(node):
        node.args = (one.graph.call_function(torch.neg, (node.args[0],)),)
    one.recompile()
    assert torch.equal(one(X), -model[1](X)) and torch.equal(two(X), model[2](X))


class MaybeMask(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x if mask is None else x * mask


class Masking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = MaybeMask()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.part(x, None)) if x.shape[0] else x


def test_an_argument_that_was_none_in_the_run_is_looked_at() -> None:
    model = Masking()
    assert record(model, (X,)).absent == {"part": frozenset({1})}
    captured = capture(model, (X,), compare=False)
    (refusal,) = (refusal for refusal in captured.refusals if refusal.path == "part")
    assert "optional argument `mask`" in refusal.reason


class Replacing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, 2)
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            weight = self.weight.detach().clone()
            del self.weight
            self.weight = nn.Parameter(weight)
            self.ready = True
        return self.head(x @ self.weight)


def test_a_parameter_that_forward_replaces_is_refused() -> None:
    assert record(Replacing(), (X,)).replaced == ("weight",)
    (row,) = (weight for weight in fxsparse.plan(Replacing(), (X,)).weights if weight.name == "weight")
    assert row.route is None and row.refused and "replaces this parameter" in row.reason
    model = Replacing()
    model(X)
    assert record(model, (X,)).replaced == () and "weight" in fxsparse.masks(fxsparse.transform(model, (X,)))


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ZeroDivisionError), collector_paused():
            assert not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() is enabled
        fxsparse.transform(Rooted(), (X,))
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("inplace", [True, False])
def test_a_transform_shares_parameters_only_in_place(inplace: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    values = {name: value.clone() for name, value in model.state_dict().items()}
    sparse = fxsparse.transform(model, (X,), sparsity=0.5, inplace=inplace)
    for name, parameter in model.named_parameters():
        assert (sparse.get_parameter(name) is parameter) is inplace
    assert (sparse.get_buffer("1.running_mean") is model[1].running_mean) is inplace
    if not inplace:
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert sparse.get_parameter("0.weight").count_nonzero() == 8


def test_the_tree_is_walked_as_torch_walks_it() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(Around(shared), nn.ModuleList([shared, Around(nn.ReLU())]), shared)
    model.register_module("absent", None)
    model[1][1].before[0].weight = shared.weight
    assert modules_of(model) == list(model.named_modules())
    assert [name for name, _ in parameters_of(model)] == [name for name, _ in model.named_parameters()]
    assert all(a is b for (_, a), (_, b) in zip(parameters_of(model), model.named_parameters(), strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_part_is_a_node_of_a_copied_model_too() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 2))
    assert capture(model, (X,), copied=True).graphs == capture(model, (X,)).graphs == ("",)


class Unpacks(nn.Module):
    """Unpacks a value into two and three, in a loop and in nested targets."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            a, b = self.linear(x).chunk(2, -1)
            x = torch.cat([b, a], -1)
        (c, d, e), f = x[:3].unbind(0), x[0]
        return torch.stack((c, d, e, f)) + x[:1, 1:2]


def test_unpacking_follows_the_code_that_unpacks() -> None:
    model = Unpacks()
    graph = fx.GraphModule(model, trace(model).graph)
    assert torch.equal(graph(X), model(X))
    alone = fx.GraphModule(model, fx.Tracer().trace(model))
    assert [(n.op, n.target) for n in graph.graph.nodes] == [(n.op, n.target) for n in alone.graph.nodes]


@pytest.mark.parametrize("body", ["list(x)", "[row for row in x]", "torch.stack([*x])"])
def test_iteration_without_a_known_length_is_refused(body: str) -> None:
    class Iterates(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return eval(body)

    with pytest.raises(Untraceable, match="iterated"):
        trace(Iterates())


class Shared(nn.Module):
    """Reads parameters directly, under the second of two names as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 4))
        self.inner = nn.Linear(4, 4)
        self.inner.weight = self.first

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.inner.bias, x, self.inner.weight, beta=2) @ self.first


def test_parameters_that_are_read_directly_are_read_by_name() -> None:
    model = Shared()
    found, alone = trace(model).graph, fx.Tracer().trace(model)
    reads = [str(node.target) for node in found.find_nodes(op="get_attr")]
    assert reads == [str(node.target) for node in alone.find_nodes(op="get_attr")] and "first" in reads
    assert torch.equal(fx.GraphModule(model, found)(X), model(X))


class Remembers(nn.Module):
    """Changes one of its attributes, as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.seen, self.table, self.names, self.count = [1, 2], {"a": 1}, {"a"}, 0

    def forward(self, x: Tensor) -> Tensor:
        exec(self.how, {"self": self, "x": x})
        return x + 1


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("self.seen.append(x)", "seen"),
        ("self.seen[0] = 7", "seen"),
        ("self.seen.reverse()", "seen"),
        ("self.seen.clear()", "seen"),
        ("self.table['b'] = x", "table"),
        ("self.table['a'] = 5", "table"),
        ("self.names.add('b')", "names"),
        ("self.count += 1", "count"),
        ("self.fresh = 3", "fresh"),
        ("del self.count", "count"),
    ],
)
def test_a_trace_that_changes_an_attribute_is_refused_and_undone(how: str, name: str) -> None:
    model = Remembers(how)
    held = (model.seen, model.table, model.names)
    with pytest.raises(Untraceable, match=f"attribute `{name}`"):
        trace(model)
    assert (model.seen, model.table, model.names, model.count) == ([1, 2], {"a": 1}, {"a"}, 0)
    assert all(a is b for a, b in zip(held, (model.seen, model.table, model.names), strict=True))
    assert not hasattr(model, "fresh")
    assert list(model.__dict__)[-5:] == ["how", "seen", "table", "names", "count"]
