"""The same operator in every way that torch allows: arguments by place and by name, of torch and of nn.functional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fisher_collected import check
from fisher_oracle import fisher
from torch import Tensor, nn

from fxsparse.curvature import CurvatureOperator, FisherCollector
from fxsparse.curvature.taps_rules import RULES


class Call(nn.Module):
    """One call of a weight [6, 6, 3] or [6, 6, 3, 3] and of a vector, then a layer."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], *kernel: int) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(6, 6, *kernel) / 3), nn.Parameter(torch.randn(6))
        self.u = nn.Parameter(torch.randn(6))
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("var", torch.rand(6) + 0.5)
        self.head, self.run = nn.Linear(6, 3), run

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self, x).tanh().flatten(2).mean(2))


CONVOLUTIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "dilation": lambda m, x: F.conv1d(x, m.w, dilation=2),
    "padding": lambda m, x: F.conv1d(x, m.w, padding=1),
    "same": lambda m, x: F.conv1d(x, m.w, m.v, padding="same"),
    "groups": lambda m, x: F.conv1d(x, m.w[:, :3], groups=2),
    "bias and stride": lambda m, x: F.conv1d(x, m.w, stride=2, bias=m.v),
    "places, then names": lambda m, x: F.conv1d(x, m.w, None, 1, dilation=2),
    "weight by name": lambda m, x: F.conv1d(x, weight=m.w, dilation=2, padding=2),
    "transposed dilation": lambda m, x: F.conv_transpose1d(x, m.w, dilation=2),
    "transposed groups": lambda m, x: F.conv_transpose1d(x, m.w[:, :3], groups=2, stride=2),
    "transposed output": lambda m, x: F.conv_transpose1d(x, m.w, m.v, stride=2, output_padding=1),
}
NORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "batch": lambda m, x: F.batch_norm(x, m.mean, m.var, eps=0.1, weight=m.v, bias=m.u),
    "group": lambda m, x: F.group_norm(x, 2, bias=m.u, weight=m.v, eps=0.1),
    "layer": lambda m, x: F.layer_norm(x.mT, (6,), eps=0.1, bias=m.u, weight=m.v).mT,
    "instance": lambda m, x: F.instance_norm(x, eps=0.1, bias=m.u, weight=m.v),
    "group of torch": lambda m, x: torch.group_norm(x, 2, m.v, m.u, 0.1),
    "layer of torch": lambda m, x: torch.layer_norm(x.mT, (6,), m.v, m.u, 0.1, False).mT,
}
ELSEWHERE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "batch norm of torch": lambda m, x: torch.batch_norm(x, m.v, m.u, m.mean, m.var, False, 0.1, 0.1, False),
    "instance norm of torch": lambda m, x: torch.instance_norm(x, m.v, m.u, None, None, True, 0.1, 0.1, False),
    "embedding of torch": lambda m, x: torch.embedding(m.w[:, :, 0], x.mean(1).abs().mul(9).long() % 6).mT,
}


def both(run: Callable[[Any, Tensor], Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    model, x, y = Call(run, 3).double().eval(), torch.randn(4, 6, 9, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    expected = fisher(model, (x,), y, F.cross_entropy, "empirical")
    operator = CurvatureOperator(model, None, "cross_entropy", [(x, y)], "empirical")
    collector = FisherCollector(model, groups="element")
    collector.update((x, y))
    return collector.parameters(), operator.space.split(operator.diag()), expected


@pytest.mark.parametrize("run", [*CONVOLUTIONS.values(), *NORMS.values()], ids=[*CONVOLUTIONS, *NORMS])
def test_arguments_by_name(run: Callable[[Any, Tensor], Tensor]) -> None:
    """With taps: a warning, which would be an error, would say that they were not used."""
    mine, operator, expected = both(run)
    check(mine, expected)
    check(operator, expected)


@pytest.mark.parametrize("run", ELSEWHERE.values(), ids=ELSEWHERE)
@pytest.mark.filterwarnings("ignore:.*is collected by per-sample gradients")
def test_the_same_operators_in_the_namespace_of_torch(run: Callable[[Any, Tensor], Tensor]) -> None:
    """Their arguments have another order."""
    mine, operator, expected = both(run)
    check(mine, expected)
    check(operator, expected)


def test_taps_that_compute_another_function_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    own = RULES["conv1d"]
    monkeypatch.setitem(RULES, "conv1d", lambda *args: own(*args) * 1.01)  # type: ignore[arg-type]  # a rule
    torch.manual_seed(0)
    model, x, y = Call(CONVOLUTIONS["padding"], 3).double(), torch.randn(4, 6, 9).double(), torch.tensor([0, 2, 1, 1])
    collector = FisherCollector(model, groups="element", parameters=["w", "head.weight"])
    with pytest.warns(UserWarning, match="outputs are others when its operators are tapped"):
        collector.update((x, y))
    expected = fisher(model, (x,), y, F.cross_entropy, "empirical")
    check(collector.parameters(), {name: expected[name] for name in ("w", "head.weight")})
