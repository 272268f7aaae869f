"""Operators around lowered layers whose rows are permuted: each is written for values that lie elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsparse
from fxsparse.passes.lower_cost import CostRule
from fxsparse.passes.lower_shared_support import Form, Layer, lower_shared_support
from tests.passes.lower_cases import assert_equal, calls, lowered_all, wish

TOKENS, WIDTH = 12, 16


def permuted(layer: nn.Module) -> Any:
    """The layer with groups of 8 rows alive on a quarter of the positions, its rows in a random order."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    order = torch.randperm(weight.shape[0])
    weight.data *= fxsparse.SharedSupport(8).mask(torch.rand(weight.shape), 0.75, row_order=order)
    return layer


class Around(nn.Module):
    """Layers, and a function that uses them."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.one, self.two = permuted(nn.Linear(WIDTH, WIDTH)), permuted(nn.Linear(WIDTH, WIDTH))
        self.tokens = permuted(nn.Linear(TOKENS, TOKENS))
        self.conv = permuted(nn.Conv1d(WIDTH, WIDTH, 3, padding=1))
        self.norm, self.both = nn.LayerNorm(WIDTH), nn.LayerNorm((TOKENS, WIDTH))
        self.bias, self.table = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(TOKENS, WIDTH))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def heads(y: Tensor) -> Tensor:
    return y.reshape(*y.shape[:-1], 4, -1).transpose(1, 2)


def mask_of(y: Tensor) -> Tensor:
    return torch.ones(y.shape[1], y.shape[1], dtype=torch.bool).tril()


FUNCTIONS: dict[str, Callable[[Any, Tensor], Any]] = {
    "sum of two permutations": lambda m, x: m.one(x) + m.two(x),
    "product with a constant of its channels": lambda m, x: torch.sigmoid(m.one(x) * m.bias + m.table),
    "product with a value of size 1": lambda m, x: m.one(x) * x.mean(-1, keepdim=True),
    "a gate that broadcasts tokens": lambda m, x: m.one(x) * torch.tanh(m.two(x[:, :1])),
    "random dropout": lambda m, x: F.dropout(m.one(x), 0.5, training=True),
    "dropout in eval mode": lambda m, x: F.dropout(m.one(x), 0.5, training=False),
    "one layer after two permutations": lambda m, x: m.two(m.one(x)) + m.two(torch.relu(m.two(x))),
    "one weight with two biases": lambda m, x: F.linear(x, m.one.weight, m.bias) + F.linear(x, m.one.weight, -m.bias),
    "mixed tokens": lambda m, x: m.two(m.tokens(m.one(x).transpose(1, 2)).transpose(1, 2)),
    "convolution of turned features": lambda m, x: m.conv(m.one(x).transpose(1, 2)),
    "linear after a convolution": lambda m, x: m.two(torch.relu(m.conv(x.transpose(1, 2))).transpose(1, 2)),
    "max pool of permuted channels": lambda m, x: m.conv(F.max_pool1d(m.conv(x.transpose(1, 2)), 2)),
    "pool of turned features": lambda m, x: F.avg_pool1d(m.one(x), 2),
    "softmax over channels": lambda m, x: m.two(m.one(x).softmax(-1)),
    "softmax over tokens": lambda m, x: m.two(m.one(x).softmax(1)),
    "softmax of another dtype": lambda m, x: m.one(x).softmax(1, dtype=torch.float32),
    "log_softmax": lambda m, x: m.one(x).transpose(1, 2).log_softmax(-1),
    "norm over channels": lambda m, x: m.two(m.norm(m.one(x))),
    "norm over two axes": lambda m, x: m.two(m.both(m.one(x))),
    "batch norm": lambda m, x: F.batch_norm(m.conv(x.transpose(1, 2)), m.bias, m.bias.abs() + 0.5, m.bias),
    "means": lambda m, x: (m.one(x).mean(1), m.one(x).mean((0, 1)), m.two(x).amax((1, 2)), m.two(x).mean()),
    "sums": lambda m, x: (m.one(x).sum((0, 2), keepdim=True), m.one(x).sum(-1, dtype=torch.float64), m.one(x).sum()),
    "uneven split": lambda m, x: tuple(p.tanh() for p in m.one(x).split([2, 9, 5], -1)),
    "split of tokens": lambda m, x: m.two(torch.cat(m.one(x).split(5, 1)[::-1], 1)),
    "unbind": lambda m, x: m.two(m.one(x).unbind(1)[3]),
    "cat of two layers": lambda m, x: torch.cat([m.one(x), m.two(x)], -1),
    "select and slice": lambda m, x: (m.one(x)[:, 2], m.one(x)[..., 3], m.two(m.one(x)[:, 1:9:2])),
    "permute three axes": lambda m, x: m.one(x).permute(2, 0, 1).contiguous(),
    "views": lambda m, x: (m.one(x).flatten(1), m.one(x).reshape(-1, TOKENS * WIDTH // 2), m.one(x).unsqueeze(2)),
    "sizes": lambda m, x: m.one(x).new_ones(m.one(x).shape[0], 2) + m.one(x).transpose(0, 2).shape[2],
    "cumulative": lambda m, x: m.two(m.one(x).cumsum(1)),
    "attention": lambda m, x: F.scaled_dot_product_attention(heads(m.one(x)), heads(m.two(x)), heads(m.one(x))),
    "causal": lambda m, x: F.scaled_dot_product_attention(heads(m.one(x)), heads(m.two(x)), heads(x), is_causal=True),
    "bool mask": lambda m, x: F.scaled_dot_product_attention(heads(m.one(x)), heads(x), heads(m.two(x)), mask_of(x)),
    "scaled attention with a mask": lambda m, x: F.scaled_dot_product_attention(
        heads(m.one(x)), heads(m.two(x)), heads(x), m.table @ m.table.t(), scale=0.3
    ),
    "attention of shared keys": lambda m, x: F.scaled_dot_product_attention(
        heads(m.one(x)), heads(m.two(x))[:, :2], heads(x)[:, :2], enable_gqa=True
    ),
    "matmul of turned values": lambda m, x: m.one(x) @ m.two(x).transpose(1, 2) @ m.one(x),
    "products of another rank": lambda m, x: torch.matmul(m.one(x)[0], m.two(x).transpose(1, 2)),
    "addmm with factors": lambda m, x: torch.addmm(m.bias, m.one(x)[0], m.two.weight.t(), beta=0.5, alpha=2.0),
    "addmm with a matrix": lambda m, x: m.two(torch.addmm(m.table, m.one(x)[0], m.two.weight.t())),
    "a convolution without a batch": lambda m, x: m.conv(m.one(x[0]).t()),
    "transposed convolution": lambda m, x: F.conv_transpose1d(m.one(x).transpose(1, 2), m.conv.weight),
}  # fmt: skip
UNREAD = {
    "addmm with factors": "two.weight",
    "addmm with a matrix": "",  # one use of it is a product that can be lowered
    "a convolution without a batch": "conv.weight",
    "transposed convolution": "conv.weight",
}


def all_forms(layer: Layer) -> Form:
    return layer.forms[min(1, len(layer.forms) - 1)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operators_around_layers(name: str) -> None:
    torch.manual_seed(0)
    model = Around(FUNCTIONS[name]).double().eval()
    x = torch.randn(3, TOKENS, WIDTH, dtype=torch.float64)
    result = lower_shared_support(model, (x,), choose=all_forms)
    assert not any(record.reason.startswith("left as it is") for record in result.records), str(result)
    assert result.forms and lowered_all(result) and UNREAD.get(name) not in result.forms
    for batch in (3, 5) if "random" not in name else ():
        assert_equal(result.model, model, torch.randn(batch, TOKENS, WIDTH, dtype=torch.float64))


def test_what_is_added_goes_where_the_next_layer_wants_it() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = permuted(nn.Linear(WIDTH, WIDTH)), permuted(nn.Linear(WIDTH, WIDTH))

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            found: Tensor = self.two(z + self.one(x))
            return found

    torch.manual_seed(0)
    x, z = torch.randn(2, 3, TOKENS, WIDTH, dtype=torch.float64).unbind(0)
    model = Two().double()
    result = lower_shared_support(model, (x, z), choose=all_forms)
    assert lowered_all(result) and calls(result.model)["permute"] == 3  # of both inputs, and of the output
    assert_equal(result.model, model, x, z)


def test_blocks_in_their_place_need_no_gather() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 32).double()
    layer.weight.data *= torch.block_diag(*[torch.ones(8, 8)] * 4)
    x = torch.randn(3, 32, dtype=torch.float64)
    for form in (Form.GATHER_CONV, Form.GATHER_MATMUL):
        result = lower_shared_support(nn.Sequential(layer), (x,), choose=wish(form))
        assert lowered_all(result) and calls(result.model)["index_select"] == 0
        assert_equal(result.model, layer, x)


def a_layer(**given: Any) -> Layer:
    base: dict[str, Any] = {
        "name": "w", "kind": "conv", "shape": (512, 512, 1, 1), "inputs": ((1, 512, 8, 8),), "columns": 64,
        "density": 0.1, "forms": (Form.DENSE, Form.GATHER_CONV), "groups": 8, "group": 64, "k": 51.0, "batches": 1,
        "macs": 512 * 51,
    }  # fmt: skip
    return Layer(**{**base, **given})


def test_a_layer_is_lowered_from_the_least_gain_on() -> None:
    gain = CostRule().gain(a_layer(), Form.GATHER_CONV)
    assert gain > 1.0
    assert CostRule(least=gain * 0.999)(a_layer()) is Form.GATHER_CONV
    assert CostRule(least=gain * 1.001)(a_layer()) is Form.DENSE
    slight = next(
        layer
        for k in range(51, 512)
        if 1.0 < CostRule().gain(layer := a_layer(k=float(k), macs=512 * k), Form.GATHER_CONV) < 1.15
    )
    assert CostRule()(slight) is Form.DENSE
    assert CostRule()(a_layer(forms=(Form.DENSE,))) is Form.DENSE


def test_many_small_copies_cost_more_than_few_large_ones() -> None:
    many, few = a_layer(inputs=((64, 512, 1, 1),)), a_layer(inputs=((1, 512, 8, 8),))
    assert CostRule().lowered(many) == pytest.approx(CostRule().lowered(few) + 63 * CostRule().row * 8 * 51)
    linear = a_layer(kind="linear", shape=(512, 512), inputs=((64, 512),))
    assert CostRule().lowered(linear) == pytest.approx(CostRule().lowered(few))
