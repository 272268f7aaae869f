"""Taps in graphs of a model that stays Python around them: what is read elsewhere too is refused by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fisher_collected import check, collected
from torch import Tensor, nn

from fxsparse.curvature.taps_statistic import instrument_fisher
from fxsparse.errors import ConfigError


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
