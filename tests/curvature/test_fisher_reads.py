"""Taps in graphs of a model that stays Python around them: what is read elsewhere too is refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from fisher_collected import check, collected
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fxsparse.curvature.taps_statistic import Instrumented, instrument_fisher
from fxsparse.errors import CaptureError, ConfigError, DataError
from fxsparse.graph.taps import without_taps


class PythonTable(nn.Module):
    """A table that is looked up behind a question that no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).tanh() if ids.sum() >= 0 else self.table(ids)


class Head(nn.Module):
    """A layer behind a function."""

    def __init__(self, outputs: int = 7) -> None:
        super().__init__()
        self.layer = nn.Linear(5, outputs)

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h.tanh())


class Parent(nn.Module):
    """Python around a table and two heads."""

    def __init__(self, shared: str) -> None:
        super().__init__()
        self.shared, self.first, self.inner, self.head = shared, PythonTable(), Head(5), Head()
        if shared == "table":
            self.head.layer.weight = self.first.table.weight
        if shared == "head":
            self.other = Head(5)
            self.other.layer.weight = self.inner.layer.weight

    def forward(self, ids: Tensor) -> Tensor:
        if not len(ids):
            raise ValueError("no ids")
        h = self.inner(self.first(ids))
        if self.shared == "graph":
            h = self.inner(h)
        if self.shared == "head":
            h = self.other(h)
        if self.shared == "layer":
            h = self.inner.layer(h).sin()
        if self.shared == "function" and ids.sum() >= 0:
            h = F.linear(h, self.inner.layer.weight).sin()
        return self.head(h)


REFUSED = {
    "none": set(),
    "table": {"first.table.weight"},
    "graph": {"inner.layer.weight", "inner.layer.bias"},
    "head": {"inner.layer.weight"},
    "layer": {"inner.layer.weight", "inner.layer.bias"},
    "function": {"inner.layer.weight"},
}


@pytest.mark.parametrize("shared", REFUSED)
def test_what_several_parts_read_is_refused_and_the_rest_is_right(shared: str) -> None:
    torch.manual_seed(0)
    model, ids, y = Parent(shared).double(), torch.randint(7, (9,)), torch.randint(7, (9,))
    tapped = instrument_fisher(model, (ids,))
    F.cross_entropy(tapped.module(ids), y).backward()
    found = tapped.fisher(9)
    check(found, collected(model, (ids, y)))
    own = {name for name in tapped.refused if name != "first.table.weight"} | REFUSED[shared] & set(tapped.refused)
    assert own == REFUSED[shared]
    assert set(found) | set(tapped.refused) == dict(model.named_parameters()).keys()
    for name in REFUSED[shared]:
        assert "it is read 2 times" in tapped.refused[name]


def test_a_graph_that_runs_twice_has_nothing_to_tap() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Head(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x)) if x.sum() > -1e9 else x

    with pytest.raises(ConfigError, match="`layer.layer.weight`: it is read 2 times"):
        instrument_fisher(Twice(), (torch.randn(4, 5),))


class Recurrent(nn.Module):
    """A graph that Python calls as often as the inputs are long."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.cell, self.head = nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.Sequential(nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(len(x[0])):
            step = h + x[:, t]
            h = checkpoint(self.cell, step, use_reentrant=False) if self.checkpointed else self.cell(step)
        return self.head(h)


def passes(tapped: Instrumented, x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.arange(len(x)) % 3
    F.cross_entropy(tapped.module(x), y).backward()
    return x, y


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # compiler's
@pytest.mark.parametrize("form", ["plain", "copied", "compiled"])
def test_a_graph_that_runs_more_often_than_in_the_example_is_noticed(form: str) -> None:
    torch.manual_seed(0)
    model, short, long = Recurrent().double(), torch.randn(6, 1, 5).double(), torch.randn(6, 3, 5).double()
    tapped = instrument_fisher(model, (short,))
    if form == "copied":
        tapped = copy.deepcopy(tapped)
        model = tapped.removed()
    run = torch.compile(tapped.module, backend="eager") if form == "compiled" else tapped.module
    y = torch.arange(6) % 3
    with torch.no_grad():
        run(long)  # without gradients nothing is collected
    F.cross_entropy(run(short), y).backward()
    F.cross_entropy(run(short), y).backward()  # two passes, each with one run
    check(tapped.fisher(6, passes=2), collected(model, (short, y)))
    F.cross_entropy(run(long), y).backward()
    for _ in range(2):
        with pytest.raises(DataError, match="`cell` ran several times.*`cell.0.weight`, `cell.0.bias`"):
            tapped.fisher(6, passes=3)
    tapped.clear()
    F.cross_entropy(run(short), y).backward()
    check(tapped.fisher(6), collected(model, (short, y)))


def test_what_a_backward_pass_computes_again_is_no_second_run() -> None:
    torch.manual_seed(0)
    model, x = Recurrent(checkpointed=True).double(), torch.randn(6, 1, 5).double()
    tapped = instrument_fisher(model, (x,))
    batch = passes(tapped, x)
    model.checkpointed = False
    check(tapped.fisher(6), collected(model, batch))


def test_nothing_is_left_of_the_counts_where_taps_are_gone() -> None:
    tapped = instrument_fisher(Recurrent(), (torch.randn(6, 1, 5),))
    assert any(module._forward_pre_hooks for module in tapped.module.modules())
    for module in (tapped.removed(), without_taps(tapped.module)):
        assert not any(each._forward_pre_hooks for each in module.modules())


def test_a_table_that_renormalises_itself_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Embedding(5, 8, max_norm=0.5), nn.Linear(8, 4))
    before = model[0].weight.detach().clone()
    instrument_fisher(model, (torch.randint(5, (6,)),))
    assert torch.equal(model[0].weight, before)


def test_models_that_do_not_run_on_a_few_samples() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 3:
                raise ValueError("three")
            return self.layer(x)

    with pytest.raises(CaptureError, match="few samples of `example_inputs`.*three"):
        instrument_fisher(Fails(), (torch.randn(6, 5),))
    with pytest.raises(ConfigError, match="`model`"):
        instrument_fisher("model", (torch.randn(6, 5),))  # type: ignore[arg-type]


class Guarded(nn.Module):
    """Python that the compiler follows and a graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Head(5), Head(3)

    def forward(self, x: Tensor) -> Tensor:
        if not len(x):
            raise ValueError("no samples")
        return self.second(self.first(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # compiler's
def test_counting_runs_does_not_break_whole_graphs() -> None:
    torch.manual_seed(0)
    model, x, y = Guarded().double(), torch.randn(6, 5).double(), torch.arange(6) % 3
    tapped = instrument_fisher(model, (x,))
    assert sum(bool(module._forward_pre_hooks) for module in tapped.module.modules()) == 3
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = torch.compile(tapped.module, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        F.cross_entropy(run(x), y).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    check(tapped.fisher(6, passes=3), collected(model, (x, y)))
