"""The operator graph by both routes: names, paths, shapes, and nothing else changed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse.errors import CaptureError, ConfigError
from fxsparse.graph.operators import OperatorGraph, operator_graph


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.tied = nn.Linear(4, 5, bias=False)
        self.tied.weight = self.head.weight
        self.register_buffer("shift", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)), inplace=True).mean((2, 3))
        return self.head(y) + self.tied(y) + self.shift + torch.ones(5)


def ops(graph: OperatorGraph) -> list[str]:
    return [n.target._schema.name for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]


@pytest.mark.parametrize("route", ["export", "recorder"])
def test_names_paths_and_shapes(route: str) -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 6, 6)
    graph = operator_graph(model, (x,), routes=(route,))
    assert graph.route == route and graph.generic is (route == "export") and not graph.training
    read = set(graph.sources.values())
    assert {"conv.weight", "conv.bias", "norm.running_mean", "head.weight", "head.bias", "shift"} <= read
    assert "tied.weight" not in read and not graph.unread
    assert ops(graph).count("aten::linear") == 2
    conv = next(n for n in graph.graph.nodes if "conv2d" in str(n.target))
    assert graph.path(conv) == "conv" and graph.shape(conv) == (2, 4, 4, 4)
    assert graph.source(conv.args[1]) == "conv.weight" and graph.shape(conv.args[1]) == (4, 3, 3, 3)
    assert "operator graph by" in str(graph) and len(graph) == len(graph.graph.nodes)
    graph.graph.lint()


@pytest.mark.parametrize("route", ["export", "recorder"])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_of_the_model_or_the_process_changes(route: str, training: bool) -> None:
    torch.manual_seed(0)
    model, x = Net().train(not training), torch.randn(2, 3, 6, 6)
    state, hooks, seed = (
        {k: v.clone() for k, v in model.state_dict().items()},
        dict(model._forward_hooks),
        torch.get_rng_state(),
    )
    graph = operator_graph(model, (x,), training, routes=(route,))
    assert graph.training is training
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert model.training is not training and model.conv.training is not training
    assert dict(model._forward_hooks) == hooks and torch.equal(seed, torch.get_rng_state())
    assert (
        torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and torch.backends.mha.get_fastpath_enabled()
    )
    assert all(p.grad is None for p in model.parameters())


def test_what_export_refuses_is_recorded_and_the_reason_kept() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if float(x.sum()) > 0 else self.b(x)

    graph = operator_graph(Branching(), (torch.ones(2, 3),))
    assert graph.route == "recorder" and not graph.generic
    assert len(graph.refusals) == 2 and "export" in graph.refusals[0]
    assert len(graph.reads) == 1 and graph.unread == ("b.weight", "b.bias")


def test_the_recorder_follows_writes_in_place() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor, aliased: bool) -> Tensor:
            y = self.a(x)
            z = y[:, :2] if aliased else y
            z.mul_(2.0)
            return y + 1.0

    for aliased in (False, True):
        graph = operator_graph(Writing(), (torch.ones(2, 3), aliased), routes=("recorder",))
        added = next(n for n in graph.graph.nodes if "add" in str(n.target))
        source = added.args[0]
        assert ("mul_" in str(source.target)) is not aliased
        assert bool(source.meta.get("aliased_write")) is aliased


def test_nodes_of_captured_graphs_are_known() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    sparse = fxsparse.transform(model, (torch.ones(2, 3),))
    graph = operator_graph(sparse, (torch.ones(2, 3),), routes=("recorder",))
    nodes = {name for path, name in graph.module_nodes if path == ""}
    assert nodes == {node.name for node in sparse.graph.nodes if node.op != "output"}


def test_bad_input() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ConfigError, match="must be a tuple"):
        operator_graph(model, torch.ones(2, 3))
    with pytest.raises(ConfigError, match="routes"):
        operator_graph(model, (torch.ones(2, 3),), routes=("dynamo",))
    with pytest.raises(CaptureError, match="torch.nn.Module"):
        operator_graph(3, (torch.ones(2, 3),))  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="no operator graph: export.*recorder"):
        operator_graph(model, (torch.ones(2, 5),))


def test_models_on_the_meta_device() -> None:
    graph = operator_graph(nn.Linear(3, 2, device="meta"), (torch.ones(2, 3, device="meta"),), routes=("recorder",))
    assert set(graph.sources.values()) == {"weight", "bias"}
