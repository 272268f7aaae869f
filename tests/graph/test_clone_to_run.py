"""Copies that are only run, calls of graphs that fail, and the search for the graph that raises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxsparse.graph import capture, isolated_clone
from fxsparse.graph.captured import CapturedModule
from fxsparse.graph.compare import Reference


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, masks: list[torch.Tensor | None]) -> torch.Tensor:
        mask = masks[0]  # None on every call, which no symbolic value tells
        return self.linear(x) if mask is None else self.linear(x) * mask.shape[0]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x)).relu()


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.masked, self.last = Plain(), Plain(), Masked(), Plain()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.middle(self.first(x))
        if float(x.detach().sum()) < -1e30:
            return x
        return self.last(self.masked(x, [None]))


class Rebuilt(nn.ReLU):
    def __reduce__(self) -> tuple[type[nn.Module], tuple[()]]:
        return Rebuilt, ()


@pytest.mark.parametrize("training", [True, False])
def test_a_module_that_is_rebuilt_keeps_its_mode(training: bool) -> None:
    model = nn.Sequential(Rebuilt()).train(training)
    assert isolated_clone(model)[0].training is training


def test_a_copy_to_run_shares_the_graph_and_no_state() -> None:
    torch.manual_seed(0)
    module = capture(Plain()).module
    assert isinstance(module, CapturedModule)
    module.extra = [torch.zeros(2)]
    clone = isolated_clone(module, to_run=True)
    assert clone.graph is module.graph and type(clone) is type(module)
    assert isolated_clone(module).graph is not module.graph
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    clone.train()(torch.randn(5, 4)).sum().backward()
    clone.extra[0].add_(1)
    clone.register_forward_hook(lambda *_: None)
    clone.other = 1
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
    assert not torch.equal(clone.get_buffer("norm.running_mean"), before["norm.running_mean"])
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not module._forward_hooks and "other" not in module.__dict__ and float(module.extra[0].sum()) == 0.0


@pytest.mark.parametrize("times", [1, 2])
def test_a_graph_that_fails_raises_and_prints_nothing(times: int, capsys: pytest.CaptureFixture[str]) -> None:
    module = capture(Plain()).module
    assert isinstance(module, CapturedModule)
    for _ in range(times):
        module.recompile()
    with pytest.raises(RuntimeError, match="shapes"):
        module(torch.randn(2, 3))
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""


def test_the_graph_that_raises_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    seen: list[tuple[str, ...]] = []
    plain = Reference.difference

    def noted(self: Reference, model: nn.Module, *, exact: bool = False) -> object:
        found = plain(self, model, exact=exact)
        seen.append(() if found is None else found.suspects)
        return found

    monkeypatch.setattr(Reference, "difference", noted)
    found = capture(Root(), (torch.randn(5, 4),))
    assert found.graphs == ("first", "middle", "last")
    assert [refusal.path for refusal in found.refusals] == ["", "masked"]
    assert seen == [("masked",), ("masked",), ()]
