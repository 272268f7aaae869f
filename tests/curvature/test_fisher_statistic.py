"""Taps in graphs: statistics as gradients of parameters, during training, compiled, and their removal."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse.curvature import FisherCollector
from fxsparse.curvature.taps_statistic import Instrumented, instrument_fisher
from fxsparse.errors import ConfigError, ExportError, PassError
from fxsparse.graph import capture
from fxsparse.passes.instrument_fisher import InstrumentFisher, RemoveFisher, Tap


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, groups=1),
        nn.ReLU(inplace=True),
        nn.Flatten(2),
        nn.Linear(16, 6),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(24, 3),
    ).double()


def data(n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 4, 4, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def reference(model: nn.Module, *batches: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    collector = FisherCollector(model)
    for batch in batches:
        collector.update(batch)
    return {key.split("|")[1]: value for key, value in collector.get().items() if key.endswith("channel")}


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found and set(found) <= set(expected)
    for name, value in found.items():
        assert torch.allclose(value, expected[name], rtol=1e-10, atol=1e-18), name


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_statistics_beside_ordinary_gradients(sparse: bool, reduction: str) -> None:
    x, y = data()
    model = network()
    if sparse:
        model = fxsparse.transform(model, (x,), sparsity=0.5)
    plain = copy.deepcopy(model)
    made = instrument_fisher(model, (x,))
    assert torch.equal(made.module(x), plain(x))
    scale = 1024.0
    (scale * F.cross_entropy(made.module(x), y, reduction=reduction)).backward()
    (scale * F.cross_entropy(plain(x), y, reduction=reduction)).backward()
    own = {name: p.grad for name, p in made.module.named_parameters() if "fisher" not in name}
    for name, parameter in plain.named_parameters():
        assert torch.allclose(own[name], parameter.grad, rtol=1e-12, atol=1e-14), name
    check(made.fisher(5, loss_scale=scale, mean=reduction == "mean"), reference(plain, (x, y)))
    assert set(made.fisher(5)) == {"0.weight", "3.weight", "6.weight"}
    made.clear()
    assert not any(value.any() for value in made.fisher(5).values())


def test_accumulated_passes_are_those_of_all_batches() -> None:
    model, (x, y), (u, v) = network(), data(5), data(5)
    made = instrument_fisher(model, (x,))
    for batch, labels in ((x, y), (u.flip(0) * 2, v)):
        F.cross_entropy(made.module(batch), labels).backward()
    check(made.fisher(5, passes=2), reference(model, (x, y), (u.flip(0) * 2, v)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_whole() -> None:
    model, (x, y) = network(), data()
    made = instrument_fisher(model, (x,))
    expected = reference(model, (x, y))
    compiled = torch.compile(made.module, fullgraph=True, backend="aot_eager")
    F.cross_entropy(compiled(x), y).backward()
    check(made.fisher(5), expected)
    torch._dynamo.reset()


def test_removal_gives_back_the_code() -> None:
    x, _ = data()
    graph = capture(network(), (x,)).module
    made = instrument_fisher(graph, (x,))
    assert made.module.code != graph.code and "linear_tap" in made.module.code
    assert made.module.state_dict().keys() == graph.state_dict().keys()
    made.module.load_state_dict(graph.state_dict())
    back = made.removed()
    assert back.code == graph.code and not hasattr(back, "fisher_statistics")
    assert {id(p) for p in back.parameters()} == {id(p) for p in graph.parameters()}
    assert all(p is not q for p in made.statistics.values() for q in back.parameters())
    assert RemoveFisher()(back).modified is False


def test_an_instrumented_module_is_not_exported() -> None:
    x, _ = data()
    made = instrument_fisher(network(), (x,))
    with pytest.raises(Exception) as caught:
        torch.export.export(made.module, (x,))
    seen, error = [], caught.value
    while error is not None:
        seen.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    assert any("take them away" in text for text in seen), seen


def test_statistics_stay_out_of_the_optimizer() -> None:
    x, _ = data()
    made = instrument_fisher(network(), (x,))
    chosen = {id(p) for p in made.trainable()}
    assert not chosen & {id(p) for p in made.statistics.values()}
    assert len(chosen) + 3 == len(list(made.module.parameters()))


def test_what_has_no_tap_is_named() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
            self.free, self.scaled = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 6))
            self.ring = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular")

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.shared(torch.relu(self.shared(x))))
            x = F.linear(self.ring(x[:, None])[:, 0], self.scaled * 2)
            return F.linear(x, self.free)

    torch.manual_seed(0)
    model, x = Mixed().double(), torch.randn(3, 6, dtype=torch.float64)
    made = instrument_fisher(model, (x,))
    assert list(made.statistics) == ["free"]
    assert "read 2 times" in made.refused["shared.weight"]
    assert "LayerNorm" in made.refused["norm.weight"] and "circular" in made.refused["ring.weight"]
    assert "has no tap" in made.refused["scaled"]
    F.cross_entropy(made.module(x), torch.tensor([0, 1, 2])).backward()
    check(made.fisher(3), reference(model, (x, torch.tensor([0, 1, 2]))))
    with pytest.raises(ConfigError, match="no layer to tap"):
        instrument_fisher(nn.Sequential(nn.LayerNorm(6)).double(), (x,))


def test_the_pass_refuses_what_it_cannot_do() -> None:
    x, _ = data()
    graph = capture(network(), (x,)).module
    made = instrument_fisher(graph, (x,))
    tap = Tap("", "_6", "6.weight", lambda y, *_: y, 3)
    with pytest.raises(PassError, match="instrument_fisher.*has Fisher taps already"):
        InstrumentFisher([tap])(made.module)
    with pytest.raises(PassError, match="is no node"):
        InstrumentFisher([Tap("", "_9", "6.weight", lambda y, *_: y, 3)])(graph)
    with pytest.raises(PassError, match="is no graph"):
        InstrumentFisher([Tap("x", "_6", "6.weight", lambda y, *_: y, 3)])(graph)
    assert isinstance(made, Instrumented) and issubclass(ExportError, RuntimeError)
