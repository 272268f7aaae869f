"""Taps in graphs: statistics as gradients of parameters, during training, compiled, and their removal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fisher_collected import check, collected
from torch import Tensor, nn

import fxsparse
from fxsparse.curvature import FisherCollector, Heads
from fxsparse.curvature.taps_fused import fused_product
from fxsparse.curvature.taps_statistic import Instrumented, instrument_fisher
from fxsparse.errors import ConfigError, DataError, ExportError, PassError
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
    check(made.fisher(5, loss_scale=scale, mean=reduction == "mean"), collected(plain, (x, y)))
    assert set(made.fisher(5)) == {f"{k}.{name}" for k in (0, 3, 6) for name in ("weight", "bias")}
    made.clear()
    with pytest.raises(DataError, match="no backward pass of `module` has arrived since `clear`"):
        made.fisher(5)


def test_accumulated_passes_are_those_of_all_batches() -> None:
    model, (x, y), (u, v) = network(), data(5), data(5)
    made = instrument_fisher(model, (x,))
    for batch, labels in ((x, y), (u.flip(0) * 2, v)):
        F.cross_entropy(made.module(batch), labels).backward()
    check(made.fisher(5, passes=2), collected(model, (x, y), (u.flip(0) * 2, v)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_whole() -> None:
    model, (x, y) = network(), data()
    made = instrument_fisher(model, (x,))
    expected = collected(model, (x, y))
    compiled = torch.compile(made.module, fullgraph=True, backend="aot_eager")
    F.cross_entropy(compiled(x), y).backward()
    check(made.fisher(5), expected)
    torch._dynamo.reset()


def test_removal_gives_back_the_code() -> None:
    x, _ = data()
    graph = capture(network(), (x,)).module
    made = instrument_fisher(graph, (x,))
    assert made.module.code != graph.code and "fused_linear" in made.module.code
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
    assert len(chosen) + 6 == len(list(made.module.parameters()))


class Attends(nn.Module):
    """Grouped queries, a fused projection, an embedding; the fused operator."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.qkv, self.o, self.head = nn.Linear(6, (4 + 2 + 2) * 3), nn.Linear(12, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.attend(tokens, None)

    def attend(self, tokens: Tensor, gate: Tensor | None) -> Tensor:
        x = self.embedding(tokens)
        q, k, v = self.qkv(x).split((12, 6, 6), -1)
        n, t = tokens.shape[0], tokens.shape[1]
        q, k, v = (each.reshape(n, t, -1, 3).transpose(1, 2) for each in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        y = y if gate is None else y * gate[None, :, None, None]
        return self.head(self.o(y.transpose(1, 2).reshape(n, t, -1)).mean(1))


def test_heads_and_gates_of_fused_attention() -> None:
    torch.manual_seed(0)
    model, tokens, y = Attends().double(), torch.randint(0, 7, (5, 6)), torch.arange(5) % 3
    layout = Heads(heads=4, kv_heads=2, fused=("qkv.weight",), outputs=("o.weight",))
    made = instrument_fisher(model, (tokens,), heads=[layout], gates=True)
    F.cross_entropy(made.module(tokens), y).backward()
    found = made.fisher(5)
    collector = FisherCollector(model, heads=[layout])
    collector.update((tokens, y))
    for key, value in collector.get().items():
        _, name, kind = key.split("|")
        mine = found[f"{name}|{kind}" if kind.startswith("head:") else name]
        assert torch.allclose(mine, value, rtol=1e-10, atol=1e-18), key
    assert {name: tuple(found[name].shape) for name in found if name.startswith("qkv.weight")} == {
        "qkv.weight|head:q": (4,),
        "qkv.weight|head:k": (2,),
        "qkv.weight|head:v": (2,),
    }
    assert found["o.weight"].shape == (4,) and not made.refused
    gate = torch.ones(4, dtype=torch.float64, requires_grad=True)
    each = [torch.autograd.grad(F.cross_entropy(model.attend(tokens[[n]], gate), y[[n]]), gate)[0] for n in range(5)]
    (name,) = [name for name in found if name.startswith("gate:")]
    assert torch.allclose(found[name], torch.stack(each).square().mean(0), rtol=1e-10)
    batch_mean = torch.stack(each).mean(0).square()
    assert not torch.allclose(found[name], batch_mean, rtol=0.1)


def test_only_some_parameters() -> None:
    x, y = data()
    model = network()
    made = instrument_fisher(model, (x,), parameters=["3.weight"])
    F.cross_entropy(made.module(x), y).backward()
    assert set(made.fisher(5)) == {"3.weight"}
    check(made.fisher(5), collected(model, (x, y)))
    with pytest.raises(ConfigError, match="is no parameter"):
        instrument_fisher(model, (x,), parameters=["9.weight"])


def test_frozen_weights_and_hooks_keep_what_they_are() -> None:
    x, y = data()
    model = network()
    model[3].weight.requires_grad_(False)
    seen: list[int] = []
    model[6].register_forward_hook(lambda *_: seen.append(1))
    made = instrument_fisher(model, (x,))
    assert "3.weight" not in made.statistics and "3.bias" in made.statistics
    seen.clear()
    F.cross_entropy(made.module(x), y).backward()
    assert seen == [1] and model[3].weight.grad is None
    full = network()
    check(made.fisher(5), collected(full, (x, y)))


def test_low_precision_is_summed_in_float32() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(5, 6), torch.arange(5) % 3
    made = instrument_fisher(model, (x,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(made.module(x), y)
    loss.backward()
    assert all(p.dtype is torch.float32 for p in made.statistics.values())
    exact = collected(copy.deepcopy(model), (x, y))
    for name, value in made.fisher(5).items():
        assert torch.allclose(value, exact[name].float(), rtol=0.1), name


@pytest.mark.parametrize(("positions", "fan_in", "fan_out"), [(1, 6, 5), (2, 40, 50), (3, 4, 5), (36, 400, 300)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_products_in_every_form(positions: int, fan_in: int, fan_out: int, axis: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, positions, fan_in, generator=generator, dtype=torch.float64)
    d = torch.randn(20, positions, fan_out, generator=generator, dtype=torch.float64)
    mask = torch.rand(fan_out, fan_in, generator=generator) > 0.5 if masked else None
    g = torch.einsum("nto,nti->noi", d, x)
    squares, total = fused_product(x, d, mask, axis, True, torch.float64)
    kept = g if mask is None else g * mask
    assert total is not None and torch.allclose(total, g.sum(0), rtol=1e-10, atol=1e-12)
    assert torch.allclose(squares, kept.square().sum((0, 2 if axis == 0 else 1)), rtol=1e-10)
    assert fused_product(x, d, mask, axis, False, torch.float64)[1] is None


def test_the_pass_refuses_what_it_cannot_do() -> None:
    x, _ = data()
    graph = capture(network(), (x,)).module
    made = instrument_fisher(graph, (x,))
    tap = Tap("", "_6", ("6.weight", None), (3, 0), lambda y, *_: y)
    with pytest.raises(PassError, match="instrument_fisher.*has Fisher taps already"):
        InstrumentFisher([tap])(made.module)
    with pytest.raises(PassError, match="is no node"):
        InstrumentFisher([Tap("", "_9", ("6.weight", None), (3, 0), lambda y, *_: y)])(graph)
    with pytest.raises(PassError, match="is no graph"):
        InstrumentFisher([Tap("x", "_6", ("6.weight", None), (3, 0), lambda y, *_: y)])(graph)
    assert isinstance(made, Instrumented) and issubclass(ExportError, RuntimeError)


@pytest.mark.parametrize("name", ["samples", "passes"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_numbers_of_samples_are_checked(name: str, value: object) -> None:
    model, (x, y) = network(), data()
    made = instrument_fisher(model, (x,))
    F.cross_entropy(made.module(x), y).backward()
    with pytest.raises(ConfigError, match=rf"`{name}` \(={value}\) must be an integer of at least 1"):
        made.fisher(**{"samples": 5, name: value})


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_loss_scales_are_checked(value: float) -> None:
    model, (x, y) = network(), data()
    made = instrument_fisher(model, (x,))
    F.cross_entropy(made.module(x), y).backward()
    with pytest.raises(ConfigError, match=r"`loss_scale` \(=.*\) must be finite and not 0"):
        made.fisher(5, loss_scale=value)


def test_sums_of_losses_of_unequal_passes() -> None:
    model, (x, y) = network(), data()
    made = instrument_fisher(model, (x,))
    for part in (slice(0, 1), slice(1, 5)):
        F.cross_entropy(made.module(x[part]), y[part], reduction="sum").backward()
    check(made.fisher(5, mean=False), collected(network(), (x, y)))
    made.clear()
    for part in (slice(0, 1), slice(1, 5)):
        (F.cross_entropy(made.module(x[part]), y[part], reduction="sum") / 5).backward()
    check(made.fisher(5), collected(network(), (x, y)))


class Python(nn.Module):
    """A forward function that no graph takes."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.head, self.own = nn.Linear(6, 3), forward

    def forward(self, x: Tensor) -> Any:
        return self.own(self, x)


def _looping(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.head(row[None]) for row in x])


def _checkpointed(m: Any, x: Tensor) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(m.head, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("forward", "cause"), [(_looping, "control flow on a traced value"), (_checkpointed, "activation checkpointing")]
)
def test_what_no_graph_takes_is_told(forward: Callable[..., Any], cause: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"no layer to tap: `head.weight`.*{cause}.*use FisherCollector, which needs"
    ):
        instrument_fisher(Python(forward).double(), (torch.randn(5, 6, dtype=torch.float64),))
