"""What else is done with a tapped module: transformed, folded, compacted, counted, exported, copied, collected."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import fisher_cases
import pytest
import torch
import torch.nn.functional as F
from fisher_collected import check, collected
from test_fisher_statistic import data, network
from test_fisher_taps import Plain
from torch import Tensor, nn

import fxsparse
from fxsparse.curvature import FisherCollector
from fxsparse.curvature.taps_conv import ConvSpec, per_sample_weight
from fxsparse.curvature.taps_statistic import instrument_fisher
from fxsparse.graph import count
from fxsparse.graph.taps import CONTAINER, without_taps

F64 = torch.float64


def tapless(model: nn.Module) -> bool:
    return all(CONTAINER not in name for name, _ in (*model.named_modules(), *model.named_parameters()))


def sparse_network() -> nn.Module:
    return fxsparse.transform(network(), (data()[0],), sparsity=0.5, pattern=fxsparse.Channel(), include=["3", "6"])


@pytest.mark.parametrize("inplace", [False, True])
def test_transform_takes_taps_away(inplace: bool) -> None:
    model, (x, y) = network(), data()
    made = instrument_fisher(model, (x,))
    expected = fxsparse.transform(copy.deepcopy(model), (x,), sparsity=0.5)
    sparse = fxsparse.transform(made.module, (x,), sparsity=0.5, inplace=inplace)
    assert tapless(sparse) and list(fxsparse.masks(sparse)) == list(fxsparse.masks(expected))
    assert str(fxsparse.sparsity_report(sparse)) == str(fxsparse.sparsity_report(expected))
    assert torch.equal(sparse(x), expected(x))
    same = {id(p) for p in sparse.parameters()} == {id(p) for p in made.trainable()}
    assert same is inplace
    again = instrument_fisher(sparse, (x,))
    F.cross_entropy(again.module(x), y).backward()
    check(again.fisher(5), collected(sparse, (x, y)))
    if not inplace:  # the module itself keeps its taps
        F.cross_entropy(made.module(x), y).backward()
        check(made.fisher(5), collected(network(), (x, y)))


def test_plans_counts_and_reports_know_no_statistics() -> None:
    model, (x, _) = network(), data()
    made = instrument_fisher(model, (x,))
    assert str(fxsparse.plan(made.module, (x,), sparsity=0.5)) == str(fxsparse.plan(model, (x,), sparsity=0.5))
    assert count(made.module, (x,)) == count(model, (x,))
    assert str(fxsparse.sparsity_report(made.module)) == str(fxsparse.sparsity_report(model))
    assert not fxsparse.masks(made.module)


def test_folded_and_compacted_without_taps() -> None:
    sparse, (x, _) = sparse_network(), data()
    made = instrument_fisher(sparse, (x,))
    folded, expected = fxsparse.finalize(made.module), fxsparse.finalize(sparse)
    assert tapless(folded) and torch.equal(folded(x), expected(x))
    average = torch.optim.swa_utils.AveragedModel(made.module)
    average.update_parameters(made.module)
    small = fxsparse.compact(made.module, (x,), followers=average)
    assert tapless(small) and tapless(average)
    assert small.get_parameter("3.weight").shape == (3, 16)
    for each in (small, average):
        assert torch.allclose(each(x), sparse(x), rtol=1e-12, atol=1e-14)
    assert not tapless(made.module)


def test_exported_without_taps(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    x = data()[0].float()
    made = instrument_fisher(sparse_network().float(), (x,))
    fxsparse.export_onnx(made.module, tmp_path / "model.onnx", (x,), latency=False)
    names = {each.name for each in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert names and not any("fisher" in name for name in names)


def test_copies_and_averages_collect_for_themselves() -> None:
    sparse, (x, y) = sparse_network(), data()
    made = instrument_fisher(sparse, (x,))
    average = torch.optim.swa_utils.AveragedModel(made.module)
    for _ in range(2):
        average.update_parameters(made.module)
    assert not any("fisher" in name for name in average.state_dict())
    assert torch.equal(average(x), sparse(x))
    F.cross_entropy(average(x), y).backward()
    assert all(statistic.grad is None and not statistic.any() for statistic in made.statistics.values())
    assert {name for name, _ in average.module.named_parameters()} == {n for n, _ in made.module.named_parameters()}
    bare = without_taps(average.module)
    assert tapless(bare) and {id(p) for p in bare.parameters()} <= {id(p) for p in average.parameters()}


def test_masks_of_a_tapped_module_are_trained() -> None:
    sparse, (x, y) = fxsparse.transform(network(), (data()[0],), sparsity=0.5), data()
    made = instrument_fisher(sparse, (x,))
    optimizer = torch.optim.SGD(made.trainable(), lr=0.1)
    handle = fxsparse.attach(made.module, optimizer, fxsparse.RigL(sparsity=0.5, every=1), total_steps=10)
    before = {name: mask.clone() for name, mask in fxsparse.masks(made.module).items()}
    assert set(before) == {"0.weight", "3.weight", "6.weight"}
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(made.module(x), y).backward()
        optimizer.step()
    assert handle.updates == 3 and any(not torch.equal(m, before[n]) for n, m in fxsparse.masks(made.module).items())
    made.clear()
    F.cross_entropy(made.module(x), y).backward()
    check(made.fisher(5), collected(made.removed(), (x, y)))  # of the masks as they are now


COLLECTED = ("mlp", "conv", "conv circular", "conv transposed 1d", "norms", "batch norm", "prelu", "embedding", "gru")
COLLECTED += ("weight norm", "multihead attention", "grouped queries fused", "lstm", "tied weights", "group norm")


@pytest.mark.parametrize("name", COLLECTED)
@pytest.mark.parametrize("options", [{}, {"groups": "element"}, {"kind": "true"}], ids=str)
@pytest.mark.filterwarnings("ignore:.*axes of unknown meaning")
def test_a_collector_sees_the_operators_behind_taps(name: str, options: dict[str, Any]) -> None:
    (case,) = [case for case in fisher_cases.CASES if case.name == name]
    model, inputs, y = case.build()
    model = Plain(model) if type(model) is fisher_cases.Fn else model
    made = instrument_fisher(model, inputs)
    mine, other = FisherCollector(made.module, **options), FisherCollector(model, **options)
    for collector in (mine, other):  # a warning of per-sample gradients would be an error
        collector.update((inputs, y))
    assert not mine._engine.slow and mine.get().keys() == other.get().keys()
    largest = max(float(value.max()) for value in other.get().values())
    for key, value in other.get().items():
        assert torch.allclose(mine.get()[key], value, rtol=1e-10, atol=1e-20 * largest), key
    assert all(statistic.grad is None for statistic in made.statistics.values())


WINDOWS: tuple[Any, ...] = (  # size, kernel, stride, padding, dilation
    ((9,), (3,), (2,), (1,), (2,)),
    ((7, 8), (3, 2), (2, 1), (0, 1), (1, 3)),
    ((4, 5, 4), (2, 3, 1), (1, 2, 1), (1, 0, 0), (1, 1, 2)),
)


@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "dilation"), WINDOWS)
def test_weight_gradients_of_single_samples(
    channels: int, size: tuple[int, ...], kernel: Any, stride: Any, padding: Any, dilation: Any
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, channels, *size, generator=generator, dtype=F64)
    w = torch.randn(5, channels, *kernel, generator=generator, dtype=F64, requires_grad=True)
    run = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
    y = run(x, w, None, stride, padding, dilation)
    d = torch.randn(y.shape, generator=generator, dtype=F64)
    spec = ConvSpec(len(size), stride, padding, dilation, 1)
    found = per_sample_weight(x, d, tuple(w.shape), spec)
    for n in range(11):
        (expected,) = torch.autograd.grad(y[n], w, d[n], retain_graph=True)
        assert torch.allclose(found[n], expected, rtol=1e-10, atol=1e-13)


class Normed(nn.Module):
    """A norm that is written into, behind and in front of linear layers."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, 6), norm, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu_(self.norm(torch.tanh(self.first(x)))).mean(1))


@pytest.mark.filterwarnings("ignore:.*axes of unknown meaning")
@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.LayerNorm((4, 6)), nn.LayerNorm(6, bias=False)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_layer_norms(norm: nn.Module, autocast: bool) -> None:
    torch.manual_seed(0)
    model = Normed(copy.deepcopy(norm)).to(torch.float32 if autocast else F64)
    plain = copy.deepcopy(model)
    x, y = torch.randn(5, 4, 6, dtype=model.first.weight.dtype), torch.arange(5) % 3
    made = instrument_fisher(model, (x,))
    for module in (made.module, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            z = module(x)
        F.cross_entropy(z, y).backward()
    own = dict(made.module.named_parameters())
    for name, parameter in plain.named_parameters():
        tolerance = {"rtol": 0.1, "atol": 1e-2} if autocast else {"rtol": 1e-12, "atol": 1e-15}
        assert torch.allclose(own[name].grad, parameter.grad, **tolerance), name
    if not autocast:
        check(made.fisher(5), collected(plain, (x, y)))
    else:
        exact = collected(plain, (x, y))
        for name, value in made.fisher(5).items():
            assert torch.allclose(value, exact[name].to(value.dtype), rtol=0.2, atol=1e-4), name


def test_frozen_parts_of_a_layer_norm() -> None:
    torch.manual_seed(0)
    for frozen in ("weight", "bias"):
        model = Normed(nn.LayerNorm(6)).double()
        model.norm.get_parameter(frozen).requires_grad_(False)
        x, y = torch.randn(5, 4, 6, dtype=F64), torch.arange(5) % 3
        made = instrument_fisher(model, (x,))
        F.cross_entropy(made.module(x), y).backward()
        assert f"norm.{frozen}" not in made.statistics and model.norm.get_parameter(frozen).grad is None
        check(made.fisher(5), collected(model, (x, y)))
