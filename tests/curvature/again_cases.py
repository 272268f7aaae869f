"""Modules that are run again in the backward pass, or have a tap behind them, each between two linear layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fxsparse.curvature.taps_statistic import Instrumented

F64 = torch.float64
N, T = 5, 4


class Between(nn.Module):
    """A layer before, the module, and a head behind it."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], size: int = 6) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(6, 6), inner
        self.call = call
        self.head = nn.Linear(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.inner, torch.tanh(self.first(x))))


def _norm(kind: type[nn.Module], channels: int = T) -> nn.Module:
    norm = kind(channels)
    with torch.no_grad():
        norm.weight.uniform_(-1, 1)
        norm.weight[0] = 0.0  # what divides the output by its factor loses the input here
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def _padded(module: nn.Module, x: Tensor) -> Tensor:
    hidden = x[..., 0] > x[..., 0].mean(1, keepdim=True) + 0.1
    return module(x, x, x, key_padding_mask=hidden, need_weights=False)[0].mean(1)


def _last_states(module: nn.Module, x: Tensor) -> Tensor:
    hidden, cell = module(x.transpose(0, 1))[1]
    return torch.cat([hidden[0], cell[0]], 1)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor], int]] = {
    "self attention": (
        lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        lambda m, x: m(x, x, x)[0].mean(1),
        6,
    ),
    "attention and its weights": (
        lambda: nn.MultiheadAttention(6, 3, batch_first=True),
        lambda m, x: torch.cat([m(x, x, x)[0].mean(1), m(x, x, x)[1].mean(1)], 1),
        10,
    ),
    "attention overwritten": (
        lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        lambda m, x: torch.relu_(m(x, x, x)[0]).mean(1),
        6,
    ),
    "padded attention": (lambda: nn.MultiheadAttention(6, 2, bias=False, batch_first=True), _padded, 6),
    "keys from elsewhere": (
        lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        lambda m, x: m(x, x.flip(1), x.flip(1))[0].mean(1),
        6,
    ),
    "three projections": (
        lambda: nn.MultiheadAttention(6, 2, kdim=4, vdim=5, add_bias_kv=True, batch_first=True),
        lambda m, x: m(x, x[..., :4], x[..., :5], need_weights=False)[0].mean(1),
        6,
    ),
    "time first": (
        lambda: nn.MultiheadAttention(6, 2),
        lambda m, x: m(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[0].sum(0),
        6,
    ),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True, norm_first=True),
        lambda m, x: m(x).mean(1),
        6,
    ),
    "lstm": (
        lambda: nn.LSTM(6, 3, num_layers=2, bidirectional=True, batch_first=True),
        lambda m, x: m(x)[0][:, -1],
        6,
    ),
    "lstm, last states": (lambda: nn.LSTM(6, 3), lambda m, x: _last_states(m, x), 6),
    "lstm projected": (lambda: nn.LSTM(6, 4, proj_size=2, batch_first=True), lambda m, x: m(x)[0].mean(1), 2),
    "gru": (lambda: nn.GRU(6, 4, batch_first=True), lambda m, x: m(x)[0].mean(1), 4),
    "rnn": (lambda: nn.RNN(6, 4, bias=False, nonlinearity="relu"), lambda m, x: m(x.transpose(0, 1))[0].sum(0), 4),
    "batch norm 1d": (lambda: _norm(nn.BatchNorm1d), lambda m, x: torch.relu_(m(x)).mean(1), 6),
    "batch norm of vectors": (lambda: _norm(nn.BatchNorm1d, 6), lambda m, x: torch.tanh(m(x[:, 0])), 6),
    "batch norm 2d": (lambda: _norm(nn.BatchNorm2d), lambda m, x: torch.tanh(m(x.unsqueeze(3))).flatten(2).mean(1), 6),
    "sync batch norm": (lambda: _norm(nn.SyncBatchNorm), lambda m, x: torch.tanh(m(x)).mean(1), 6),
    "prelu": (lambda: nn.PReLU(T), lambda m, x: m(x).mean(1), 6),
    "prelu of one weight": (nn.PReLU, lambda m, x: m(x[:, 0]), 6),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
        lambda m, x: torch.tanh(m(x)).mean(1),
        6,
    ),
    "rows of time first": (lambda: nn.Linear(6, 6), lambda m, x: torch.tanh(m(x.transpose(0, 1))).sum(0), 6),
}
QUICK = {name for name in CASES if "batch norm" in name or "prelu" in name}
"""Cases whose module has a tap behind it, and is not run again."""
TWICE = {"attention and its weights"}
"""Cases that call the module more than once."""


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, call, size = CASES[name]
    model = Between(make(), call, size).double()
    return model.eval(), torch.randn(N, T, 6, dtype=F64), torch.arange(N) % 3


def groups(made: Instrumented, reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums of the elements of a reference, named as `fisher` names them."""
    found = {}
    for name, groupings in made.groupings.items():
        for grouping in groupings:
            key = name if len(groupings) == 1 else f"{name}|{grouping.group_type}"
            found[key] = grouping.reduce(reference[name][None])[0].view(grouping.output_shape)
    return found


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(value.max()) for value in expected.values())
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-10, atol=1e-24 * largest), name
