"""Taps in graphs over the whole matrix of cases: values, gradients, removal, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import CASES, Case, Fn
from fisher_collected import check, collected
from torch import Tensor, nn

from fxsparse.curvature.taps_statistic import instrument_fisher
from fxsparse.errors import ConfigError
from fxsparse.graph import capture


class Plain(Fn):
    """A case whose forward pass has one named input, which is captured whole."""

    def __init__(self, case: Fn) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(case.__dict__)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self, x)


NONE = {"addmm", "vision tokens", "gru cell", "bilinear", "custom function"}
"""Cases without a layer that can be tapped."""


@pytest.mark.filterwarnings(
    "ignore:.*axes of unknown meaning", "ignore:.*is collected by per-sample", "ignore:LSTM with"
)
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in NONE], ids=lambda case: case.name)
def test_statistics_and_gradients_of_every_case(case: Case) -> None:
    model, inputs, y = case.build()
    model = Plain(model) if type(model) is Fn else model
    made = instrument_fisher(model, inputs)
    assert torch.equal(made.module(*inputs), model(*inputs))
    F.cross_entropy(made.module(*inputs), y).backward()
    F.cross_entropy(model(*inputs), y).backward()
    gradients = {name: p.grad for name, p in made.module.named_parameters() if "fisher" not in name}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(gradients[name], parameter.grad, rtol=1e-10, atol=1e-13), name
    check(made.fisher(5), collected(model, (inputs, y)))
    assert set(made.refused) | set(made.groupings) == set(dict(model.named_parameters()))
    assert made.removed().code == capture(model, inputs).module.code


def test_what_is_tapped_and_what_is_refused() -> None:
    tapped = {
        "conv circular": {"0.weight", "0.bias", "4.weight", "4.bias"},
        "conv transposed": {"0.weight", "0.bias", "4.weight", "4.bias"},
        "conv depthwise": {"0.weight", "2.weight", "2.bias", "4.weight", "4.bias"},
        "embedding": {"e.weight", "head.weight", "head.bias"},
        "batch norm": {f"{k}.{each}" for k in (0, 1, 4) for each in ("weight", "bias")},
        "gru": {"head.weight", "head.bias"} | {f"rnn.{a}_{b}_l0" for a in ("weight", "bias") for b in ("ih", "hh")},
        "multihead attention": {"head.weight", "head.bias"}
        | {f"a.{each}" for each in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")},
        "norms": {f"{k}.weight" for k in (0, 1, 3, 4, 5)} | {f"{k}.bias" for k in (0, 1, 3, 5)},
    }
    reasons = {
        "tied weights": ("0.weight", "read 2 times"),
        "module reuse": ("0.weight", "read 3 times"),
        "weight times mask": ("w", "has no tap"),
        "samples and positions on one axis": ("inner.weight", "the samples have no axis of their own"),
        "positions before samples": ("inner.weight", "the samples have no axis of their own"),
        "tied language model": ("position.weight", "samples are told apart outside of it"),
        "conv reused on frames": ("conv.weight", "the samples have no axis of their own"),
    }
    for case in CASES:
        if case.name in tapped or case.name in reasons:
            model, inputs, _ = case.build()
            made = instrument_fisher(Plain(model) if type(model) is Fn else model, inputs)
            if case.name == "embedding":
                made.module(*inputs).square().sum().backward()
                found = made.statistics["e.weight"].grad
                assert found is not None and found[2] == 0 and found.any() and bool((inputs[0] == 2).any())
            if case.name in tapped:
                assert set(made.statistics) == tapped[case.name] and not made.refused, case.name
            else:
                name, reason = reasons[case.name]
                assert reason in made.refused[name] and name not in made.statistics, case.name
    with pytest.raises(ConfigError, match="no layer to tap"):
        instrument_fisher(nn.Bilinear(6, 6, 2).double(), (torch.randn(3, 6, dtype=torch.float64),) * 2)
