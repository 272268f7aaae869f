"""The shared matrix of models: a name, a factory of (model, example inputs), and the routes of its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse.testing import blocks

SEEDS = (0, 1)


@dataclass(frozen=True)
class Case:
    """One model family.

    Attributes:
        name: Its name in test ids.
        build: Returns (model in float64, example inputs).
        routes: First name of each weight that is masked by default -> route, "+" where the gradient is guarded too.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Any]]
    routes: dict[str, str]

    def __call__(self, seed: int = 0) -> tuple[nn.Module, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, inputs = self.build()
            return model.double(), inputs


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.grouped(self.depthwise(x))
        return self.head(self.up(x).mean((2, 3)))


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(tokens))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.out(self.norm(x + mixed).mean(1))


class EinsumAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(2, 8, 4))
        self.key = nn.Parameter(torch.randn(2, 8, 4))
        self.out = nn.Parameter(torch.randn(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        q = torch.einsum("bnd,hde->bhne", x, self.query)
        k = torch.einsum("bnd,hde->bhne", x, self.key)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1).mean(1) @ x
        return torch.matmul(mixed.mean(1), self.out)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 7, batch_first=True)
        self.out = nn.Linear(7, 3)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        states, _ = self.rnn(x)
        return {"scores": self.out(states) * scale, "last": states[:, -1]}


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class StraightThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.kernel = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_Straight.apply(self.first(x)), self.kernel)


class Mixed(nn.Module):
    """A traceable submodule with a functional weight below a parent that stays Python."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = blocks.FunctionalLinear(6, 6)
        self.gate = blocks.PythonLinear(6, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gate(torch.relu(self.inner(x))))


class Hooked(nn.Module):
    """A user's forward hook doubles the output of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 3)
        self.first.register_forward_hook(_double)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def _double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


class KeptInList(nn.Module):
    """Layers that are reached through a plain list beside the module tree."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.order = [self.b, self.a]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = torch.tanh(layer(x))
        return x


class TiedFunctional(nn.Module):
    """One parameter, held and read by two modules that the graph runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = blocks.FunctionalLinear(5, 5)
        self.b = blocks.FunctionalLinear(5, 5, bias=False)
        self.b.kernel = self.a.kernel

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class SelfWeighted(nn.Module):
    """A layer's weight that its parent reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.layer.weight.pow(2).sum()


CASES: tuple[Case, ...] = (
    Case(
        "mlp",
        lambda: (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)), (_x(3, 6),)),
        {"0.weight": "module", "3.weight": "module"},
    ),
    Case(
        "convnet",
        lambda: (ConvNet(), (_x(2, 1, 6, 6),)),
        {"stem.weight": "module", "grouped.weight": "module", "up.weight": "module", "head.weight": "module"},
    ),
    Case("linear root", lambda: (nn.Linear(5, 4), (_x(3, 5),)), {"weight": "mask node"}),
    Case(
        "tied embedding",
        lambda: (TiedLanguageModel(), (torch.randint(0, 11, (2, 5)),)),
        {"embed.weight": "module+", "body.weight": "module"},
    ),
    Case("tied transpose", lambda: (blocks.TiedTranspose(6, 4), (_x(3, 6),)), {"encode.weight": "module+"}),
    Case("tied modules", lambda: (blocks.TiedModules(5), (_x(3, 5),)), {"first.weight": "module"}),
    Case(
        "attention",
        lambda: (Attention(), (_x(2, 4, 8),)),
        {
            "attention.in_proj_weight": "parameter",
            "attention.out_proj.weight": "parameter",
            "out.weight": "module",
        },
    ),
    Case(
        "einsum attention",
        lambda: (EinsumAttention(), (_x(2, 4, 8),)),
        {"query": "mask node", "key": "mask node", "out": "mask node"},
    ),
    Case("tagger", lambda: (Tagger(), ((_x(2, 4, 5),), {"scale": 0.5})), {"out.weight": "module"}),
    Case(
        "straight through",
        lambda: (StraightThrough(), (_x(3, 4),)),
        {"kernel": "parameter", "first.weight": "module"},
    ),
    Case(
        "mixed",
        lambda: (Mixed(), (_x(3, 6),)),
        {"inner.kernel": "mask node", "gate.kernel": "parameter", "out.weight": "module"},
    ),
    Case("hooked", lambda: (Hooked(), (_x(3, 4),)), {"first.weight": "module", "second.weight": "module"}),
    Case("kept in list", lambda: (KeptInList(), (_x(3, 4),)), {"a.weight": "module", "b.weight": "module"}),
    Case("read by parent", lambda: (SelfWeighted(), (_x(3, 4),)), {"layer.weight": "module+"}),
    Case(
        "functional conv",
        lambda: (blocks.Pooled(blocks.FunctionalConv(4, 6, groups=2), nn.Linear(6, 2)), (_x(2, 4, 5, 5),)),
        {"body.kernel": "mask node", "head.weight": "module"},
    ),
    Case("tied functional", lambda: (TiedFunctional(), (_x(3, 5),)), {"a.kernel": "mask node"}),
    Case("reused", lambda: (blocks.Reused(nn.Linear(4, 4)), (_x(3, 4),)), {"body.weight": "module"}),
)
