"""What counts as a write into a parameter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse.graph.writes import NoticingWrites, ParameterWrites


def _gradient(p: Tensor) -> None:
    leaf = p.detach().requires_grad_(True)
    leaf.grad = torch.zeros_like(leaf)
    leaf.grad = None
    leaf.requires_grad = False


NONE: dict[str, Callable[[Tensor], object]] = {
    "reads": lambda p: (p + 1).sum(),
    "a leaf and its gradient": _gradient,
    "numbers": lambda p: [range(9)[p[0].long()], int(p[1]), ~p.bool()],
    "looked up": lambda p: (
        F.embedding(torch.tensor([1]), p[:, None]) + F.embedding_bag(torch.tensor([[1]]), p[:, None])
    ),
    "detached": lambda p: p.detach().detach_(),
}
WRITES: dict[str, Callable[[Tensor], object]] = {
    "method": lambda p: p.detach().add_(1),
    "operator": lambda p: p.detach().__iadd__(1),
    "item": lambda p: p.detach().__setitem__(0, 5.0),
    "data": lambda p: p.data.copy_(torch.ones(3)),
    "view": lambda p: p.detach()[1:].zero_(),
    "function": lambda p: F.relu_(p.detach().neg_()),
    "rescaled": lambda p: F.embedding(torch.tensor([1, 2]), p.detach()[:, None], max_norm=0.5),
    "rescaled bags": lambda p: F.embedding_bag(torch.tensor([[1, 2]]), p.detach()[:, None], max_norm=0.5),
    "random": lambda p: nn.init.normal_(p),
}


def noticed(use: Callable[[Tensor], object]) -> tuple[nn.Module, Tensor, ParameterWrites]:
    model = nn.ParameterDict({"w": torch.tensor([1.0, 2.0, 3.0])})
    writes = ParameterWrites(model)
    with torch.no_grad(), NoticingWrites(writes):
        use(model["w"])
    return model, model["w"], writes


@pytest.mark.parametrize("use", NONE.values(), ids=NONE)
def test_nothing_is_copied_for_what_writes_nothing(use: Callable[[Tensor], object]) -> None:
    """Copies of all parameters double the memory of a large model."""
    assert not noticed(use)[2].saved


@pytest.mark.parametrize("use", WRITES.values(), ids=WRITES)
def test_what_is_written_is_given_back(use: Callable[[Tensor], object]) -> None:
    _, w, writes = noticed(use)
    assert w.tolist() != [1.0, 2.0, 3.0]
    assert writes.undo() == ("w",) and w.tolist() == [1.0, 2.0, 3.0]
