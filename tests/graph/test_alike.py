"""When one mode is enough: `alike` says yes only where nothing could show in the other mode alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxsparse.graph import capture, edit, isolated_clone, record
from fxsparse.graph.alike import alike
from fxsparse.graph.compare import observe
from fxsparse.nn import Linear, masked_weight
from fxsparse.planning import transform

X = torch.linspace(-1.0, 1.0, 20).reshape(4, 5)


class Block(nn.Module):
    """A container that is inlined, with a layer that is a leaf, a plain list and a float attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.3)
        self.sizes, self.scale, self.nothing = [5, 5], 0.5, float("nan")

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.layer(x))) * self.scale


class Net(nn.Module):
    """One layer runs twice, a functional use of a weight, a branch on a value around it all when `python`."""

    def __init__(self, python: bool) -> None:
        super().__init__()
        self.python = python
        self.blocks = nn.Sequential(Block(), Block())
        self.last = nn.Linear(5, 5)
        self.kernel = nn.Parameter(torch.eye(5) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.blocks(x))
        if self.python and bool(x.sum() > 1e9):
            x = x + 1
        return self.last(x) @ self.kernel


@pytest.fixture(params=[False, True], ids=["graph", "python"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return Net(request.param).eval()


def calls_of(model: nn.Module) -> dict[str, int]:
    return dict(record(model, (X,)).calls)


def test_copies_captures_and_sparse_models_are_alike(model: nn.Module) -> None:
    calls = calls_of(model)
    assert alike(model, model, calls)
    assert alike(model, copy.deepcopy(model), calls)
    assert alike(model, isolated_clone(model), calls)
    assert alike(model, capture(model, (X,)).module, calls)
    sparse = transform(model, (X,))
    assert any(node.target is masked_weight for node in sparse.graph.nodes) if not model.python else True
    assert alike(model, sparse, calls)
    assert alike(model, isolated_clone(sparse, to_run=True), calls)


class Other(Linear):
    """Of a class that nobody knows."""


def other_class(sparse: nn.Module) -> None:
    sparse.get_submodule("last").__class__ = Other


def other_momentum(sparse: nn.Module) -> None:
    norm = sparse.get_submodule("blocks.0.norm")
    assert isinstance(norm, nn.BatchNorm1d)
    norm.momentum = 0.2


def other_scale(sparse: nn.Module) -> None:
    sparse.get_submodule("blocks.1").scale = 0.25


def other_list(sparse: nn.Module) -> None:
    sparse.get_submodule("blocks.1").sizes = [5, 6]


def other_dropout(sparse: nn.Module) -> None:
    drop = sparse.get_submodule("blocks.0.drop")
    assert isinstance(drop, nn.Dropout)
    drop.p = 0.0


def new_attribute(sparse: nn.Module) -> None:
    sparse.get_submodule("last").extra = 1


def own_forward(sparse: nn.Module) -> None:
    module = sparse.get_submodule("last")
    module.forward = module.forward


def a_hook(sparse: nn.Module) -> None:
    sparse.get_submodule("blocks.0.norm").register_forward_hook(lambda module, args, output: None)


def frozen(sparse: nn.Module) -> None:
    sparse.get_parameter("last.bias").requires_grad_(False)


def other_dtype(sparse: nn.Module) -> None:
    sparse.get_submodule("last").bias = nn.Parameter(torch.zeros(5, dtype=torch.float64))


def without_a_module(sparse: nn.Module) -> None:
    del sparse.get_submodule("blocks.1")._modules["drop"]


def with_a_module(sparse: nn.Module) -> None:
    sparse.get_submodule("blocks.1").more = nn.ReLU()


CHANGES = (
    other_class,
    other_momentum,
    other_scale,
    other_list,
    other_dropout,
    new_attribute,
    own_forward,
    a_hook,
    frozen,
    other_dtype,
    without_a_module,
    with_a_module,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_any_module_is_seen(model: nn.Module, change: Callable[[nn.Module], None]) -> None:
    sparse = transform(model, (X,))
    change(sparse)
    assert not alike(model, sparse, calls_of(model))


def graph_of(sparse: nn.Module, target: str) -> tuple[fx.GraphModule, fx.Node]:
    for module in sparse.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.find_nodes(op="call_module"):
                if str(node.target).endswith(target):
                    return module, node
    raise AssertionError(target)


def test_a_graph_that_lost_a_call_is_seen(model: nn.Module) -> None:
    captured = capture(model, (X,)).module
    graph, node = graph_of(captured, "drop")
    node.replace_all_uses_with(node.args[0])
    graph.graph.erase_node(node)
    assert not alike(model, captured, calls_of(model))


def test_a_graph_that_calls_twice_is_seen(model: nn.Module) -> None:
    captured = capture(model, (X,)).module
    graph, node = graph_of(captured, "norm")
    with graph.graph.inserting_after(node):
        graph.graph.call_module(str(node.target), (node,))
    assert not alike(model, captured, calls_of(model))


def test_a_node_of_a_pass_that_is_no_mask_is_seen(model: nn.Module) -> None:
    captured = capture(model, (X,)).module
    graph, node = graph_of(captured, "norm")
    after = {"pass_name": "test", "what": "detaches", "after": node}
    edit.insert_call(graph.graph, torch.detach, (node,), **after)  # type: ignore[arg-type]  # three keywords
    assert not alike(model, captured, calls_of(model))


class Counting(nn.Module):
    """Runs in eval and in train mode and counts its runs."""

    runs: list[tuple[bool, bool]] = []

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append((self.training, torch.is_grad_enabled()))
        return self.layer(x)


@pytest.mark.parametrize(
    ("work", "training", "runs"),
    [
        (0, False, [(False, False), (False, False)]),  # the recorded run, and the result
        (0, True, [(True, True), (True, True)]),
        (2**40, False, [(False, False), (True, True), (True, True)]),  # gradients of both in train mode
        (2**40, True, [(True, True), (False, False), (True, True), (False, False)]),
    ],
)
def test_how_often_a_model_runs(
    work: int, training: bool, runs: list[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxsparse.graph.compare._LITTLE_WORK", work)
    monkeypatch.setattr(Counting, "runs", [])
    model = Counting().train(training)
    _, reference = observe(model, (X,), {})
    assert reference.difference(copy.deepcopy(model), exact=True) is None
    assert sorted(Counting.runs) == sorted(runs)


def test_a_model_that_fails_in_its_own_mode_says_so_without_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxsparse.graph.compare._LITTLE_WORK", 0)

    class Fails(Counting):
        def forward(self, x: Tensor) -> Any:
            if self.training:
                raise ValueError("no targets")
            return super().forward(x)

    _, reference = observe(Fails().train(), (X,), {})
    assert reference.notes == ("train mode: the model itself raises ValueError (no targets)",)
