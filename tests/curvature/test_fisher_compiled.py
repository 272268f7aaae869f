"""Taps under `torch.compile(fullgraph=True)`: values and gradients of the uncompiled module, and of a collector."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import again_cases
import fisher_cases
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from fisher_collected import check, collected
from fisher_oracle import fisher
from test_fisher_statistic import Attends
from test_fisher_taps import Plain
from torch import Tensor, nn

from fxsparse.curvature.taps_compiled import read_back, spelled
from fxsparse.curvature.taps_statistic import Instrumented, instrument_fisher
from fxsparse.errors import ConfigError

F64 = again_cases.F64
N = again_cases.N
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # the compiler's own


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
    torch._dynamo.reset()


def compiled(made: Instrumented, backend: str = "aot_eager") -> Any:
    return torch.compile(made.module, fullgraph=True, backend=backend)


def same_gradients(made: Instrumented, plain: nn.Module) -> None:
    own = dict(made.module.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(own[name].grad, parameter.grad, rtol=1e-10, atol=1e-13), name


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "aot_eager") for name in again_cases.CASES] + [("self attention", "eager"), ("gru", "eager")],
)
def test_modules_that_are_run_again(name: str, backend: str) -> None:
    model, x, y = again_cases.build(name)
    made, plain = instrument_fisher(model, (x,)), copy.deepcopy(model)
    reference = fisher(model, (x,), y, F.cross_entropy, "empirical")
    z = compiled(made, backend)(x)
    assert torch.allclose(z, plain(x), rtol=1e-12, atol=1e-15)
    F.cross_entropy(z, y).backward()
    F.cross_entropy(plain(x), y).backward()
    again_cases.equal(made.fisher(N), again_cases.groups(made, reference))
    same_gradients(made, plain)


WHOLE = (
    "tokens, relu in place",
    "conv grouped",
    "conv depthwise",
    "conv same even kernel",
    "conv circular",
    "conv reflect same",
    "conv transposed",
    "conv3d",
    "norms",
    "layer norm over images",
    "group norm",
    "batch norm",
    "prelu",
    "tied weights",
    "module reuse",
    "weight times mask",
    "weight norm",
    "embedding",
    "multihead attention",
    "grouped queries fused",
    "transformer layer",
    "lstm",
    "gru",
    "rnn",
)


@pytest.mark.parametrize("name", WHOLE)
def test_cases_compiled_whole(name: str) -> None:
    (case,) = [case for case in fisher_cases.CASES if case.name == name]
    model, inputs, y = case.build()
    model = Plain(model) if type(model) is fisher_cases.Fn else model
    made, plain = instrument_fisher(model, inputs), copy.deepcopy(model)
    F.cross_entropy(compiled(made)(*inputs), y).backward()
    F.cross_entropy(plain(*inputs), y).backward()
    check(made.fisher(5), collected(model, (inputs, y)))
    same_gradients(made, plain)
    found = made.fisher(5)
    made.clear()
    F.cross_entropy(made.module(*inputs), y).backward()
    for key, value in made.fisher(5).items():
        assert torch.allclose(found[key], value, rtol=1e-10, atol=1e-18), key


def test_gates_of_fused_attention() -> None:
    torch.manual_seed(0)
    model, tokens, y = Attends().double(), torch.randint(0, 7, (5, 6)), torch.arange(5) % 3
    made = instrument_fisher(model, (tokens,), gates=True)
    found = []
    for module in (made.module, compiled(made)):
        made.clear()
        F.cross_entropy(module(tokens), y).backward()
        found.append(made.fisher(5))
    assert any(name.startswith("gate:") for name in found[0])
    for name, value in found[0].items():
        assert torch.allclose(found[1][name], value, rtol=1e-10), name


def test_buckets_of_tokens() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50_001, 2), nn.Flatten(), nn.Linear(6, 3)).double()
    tokens, y = torch.randint(0, 50_001, (5, 3)), torch.arange(5) % 3
    made = instrument_fisher(model, (tokens,))
    F.cross_entropy(compiled(made)(tokens), y).backward()
    assert made.fisher(5)["0.weight"].shape == (51,)
    check(made.fisher(5), collected(model, (tokens, y)))


def test_other_sizes_copies_and_flags() -> None:
    model, x, _ = again_cases.build("self attention")
    made = instrument_fisher(model, (x,))
    module = compiled(made)

    def right(n: int, t: int) -> None:
        batch, labels = torch.randn(n, t, 6, dtype=F64), torch.arange(n) % 3
        made.clear()
        F.cross_entropy(module(batch), labels).backward()
        reference = fisher(model, (batch,), labels, F.cross_entropy, "empirical")
        again_cases.equal(made.fisher(n), again_cases.groups(made, reference))

    for n, t in ((5, 4), (7, 2), (1, 6), (3, 4)):
        right(n, t)
    made.module.train()
    right(4, 3)
    twin = copy.deepcopy(made)
    with torch.no_grad():
        for parameter in twin.trainable():
            parameter.mul_(1.5)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    made.clear()
    labels = torch.arange(N) % 3
    F.cross_entropy(compiled(twin)(x), labels).backward()
    reference = fisher(other, (x,), labels, F.cross_entropy, "empirical")
    again_cases.equal(twin.fisher(N), again_cases.groups(twin, reference))
    assert all(statistic.grad is None for statistic in made.statistics.values())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_dropout_is_drawn_as_in_the_first_run(backend: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.4, batch_first=True)
    model = again_cases.Between(layer, lambda m, x: m(x).mean(1)).double().train()
    x, y = torch.randn(N, 4, 6, dtype=F64), torch.arange(N) % 3
    made, module = instrument_fisher(model, (x,)), None
    found: list[dict[str, Tensor]] = []
    for module in (made.module, compiled(made, backend)):
        made.clear()
        torch.manual_seed(5)
        F.cross_entropy(module(x), y).backward()
        found.append(made.fisher(N))
    for name, value in found[0].items():
        assert torch.allclose(found[1][name], value, rtol=1e-10, atol=1e-18), name


def test_batch_norm_in_training_mode_goes_on() -> None:
    model, x, y = again_cases.build("batch norm 2d")
    made, plain = instrument_fisher(model.train(), (x,)), copy.deepcopy(model)
    module = compiled(made)
    for _ in range(2):
        F.cross_entropy(module(x), y).backward()
        F.cross_entropy(plain(x), y).backward()
    same_gradients(made, plain)
    buffers = dict(made.module.named_buffers())
    for name, buffer in plain.named_buffers():
        assert torch.allclose(buffers[name], buffer, rtol=1e-12), name


def test_recurrent_layers_need_the_compilers_own_switch() -> None:
    model, x, _ = again_cases.build("gru")
    for module in (model, instrument_fisher(model, (x,)).module):
        off = torch._dynamo.config.patch(allow_rnn=False)
        with off, pytest.raises(torch._dynamo.exc.Unsupported, match="does not support RNN, GRU, or LSTM"):
            torch.compile(module, fullgraph=True, backend="eager")(x)


def test_arguments_are_spelled_and_read_back() -> None:
    a, b = torch.zeros(1), torch.ones(2)
    given = ((a, [b, None, a], 2.5), {"mask": b, "name": "it's", "flag": True})
    held: list[Tensor] = []
    args, kwargs = read_back(spelled(given, held), held)
    assert held == [a, b] and args[0] is a and args[1] == (b, None, a) and args[2] == 2.5
    assert kwargs["mask"] is b and (kwargs["name"], kwargs["flag"]) == ("it's", True)
    with pytest.raises(ConfigError, match=r"argument \(=dtype\).*cannot be handed to compiled code"):
        spelled(torch.float32, held)
