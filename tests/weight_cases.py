"""Architectures whose weights are used in unusual ways, and the slow oracles that masked models are held against."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations as P


class SubLinear(nn.Linear):
    """A subclass with the forward of its base."""


class SubConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(F.pad(x, (1, 1, 1, 1)))


class Sub(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = SubConv(2, 4, 3)
        self.head = SubLinear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


class Functional(nn.Module):
    """Every functional use of a parameter at once."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(6, 5))
        self.b = nn.Parameter(torch.randn(6, 4))
        self.c = nn.Parameter(torch.randn(4, 6))
        self.d = nn.Parameter(torch.randn(2, 6, 6))
        self.e = nn.Parameter(torch.randn(6, 1, 3))
        self.f = nn.Parameter(torch.randn(6, 6, 3))
        self.g = nn.Parameter(torch.randn(6, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, self.a, self.bias))
        x = torch.tanh(torch.addmm(self.bias, x @ self.b, self.c))
        x = torch.bmm(torch.stack([x, -x]), self.d).sum(0)
        x = F.conv1d(x[:, :, None].expand(-1, -1, 4), self.f, padding=1).mean(2)
        return torch.einsum("bi,oi->bo", x, self.g) + self.e.sum()


class Conv1D(nn.Module):
    """The linear layer of GPT-2: a weight (in, out) and addmm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        size = x.size()[:-1] + (self.outputs,)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Experts(nn.Module):
    """A mixture whose experts are indexed one by one, by numbers and by tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 8))
        self.gate = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(-1)
        y = torch.zeros_like(x)
        for expert in range(3):
            rows = (chosen == expert).nonzero()[:, 0]
            hidden = torch.relu(F.linear(x[rows], self.up[expert]))
            y = y.index_add(0, rows, F.linear(hidden, self.down[expert]))
        return y + x * self.gate(x).sum(-1, keepdim=True)


class BatchedExperts(nn.Module):
    """The same in batched products: weights (experts, in, out), transposed and gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 8))
        self.down = nn.Parameter(torch.randn(3, 6, 8))
        self.mix = nn.Parameter(torch.randn(3, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(torch.bmm(x[None].expand(3, -1, -1), self.up))
        out = torch.bmm(hidden, self.down.transpose(1, 2))
        return torch.einsum("ebi,eio->bo", out, self.mix)


class CrossAttention(nn.Module):
    """Separate projections: keys and values have widths of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(x, k, v)[0]


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class FusedProjection(nn.Module):
    """q, k and v as chunks of one functional weight."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Parameter(torch.randn(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.linear(x, weight) for weight in self.in_proj.chunk(3))
        return (q @ k.mT).softmax(-1) @ v


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(5, 6, batch_first=True, **options)
        self.head = nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Cells(nn.Module):
    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell = kind(5, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Standardised(nn.Conv2d):
    """A convolution whose kernels have mean 0 and variance 1 (arXiv 1903.10520)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        scale = self.gain.view(-1) * 0.5
        weight = F.batch_norm(flat, None, None, weight=scale, training=True, momentum=0.0, eps=1e-6)
        weight = weight.reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardisedSame(Standardised):
    """The same with padding that depends on the size of the input, so that no trace takes it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1, 0, 1))
        return super().forward(x)


class TiedCoder(nn.Module):
    """A weight that its layer and, transposed, its parent use; another that is an embedding too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.code = nn.Linear(6, 4)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.code(self.embed(ids))) @ self.code.weight)


@dataclass(frozen=True)
class WeightCase:
    """A model, its inputs, options of transform, the weights that get a mask."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    masked: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    copies: bool = True  # torch's old norms keep a computed weight, which deepcopy refuses

    def __call__(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            inputs = tuple(x.double() if x.is_floating_point() else x for x in self.inputs())
            model = self.build().double()
            with torch.no_grad():
                model(*inputs)
        return model, inputs


def _x(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape),)


def _recurrent(kind: type[nn.RNNBase], **options: Any) -> Callable[[], nn.Module]:
    return lambda: Recurrent(kind, **options)


def _recurrent_names(layers: int, directions: int, projected: bool = False) -> tuple[str, ...]:
    stems = ("weight_ih", "weight_hh") + (("weight_hr",) if projected else ())
    ends = ("", "_reverse")[:directions]
    return tuple(f"rnn.{stem}_l{layer}{end}" for layer in range(layers) for end in ends for stem in stems)


_RNN = {"include": nn.RNNBase}
_CELL = {"include": nn.RNNCellBase}


def _normed(norm: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    layers = (lambda: nn.Conv2d(3, 4, 1), lambda: nn.Conv2d(4, 5, 3))
    return lambda: nn.Sequential(norm(layers[0]()), nn.Tanh(), norm(layers[1]()), nn.Flatten(), norm(nn.Linear(45, 3)))


_NORMED = {"0": "weight", "2": "weight", "4": "weight"}


def _names(template: str) -> tuple[str, ...]:
    return tuple(template.format(path) for path in ("0", "2", "4"))


def _standardised(kind: type[Standardised]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(kind(3, 4, 3), nn.Tanh(), kind(4, 6, 2))


EFFECTIVE: tuple[WeightCase, ...] = (
    WeightCase("weight norm", _normed(P.weight_norm), _x(2, 3, 5, 5), _names("{}.parametrizations.weight.original1")),
    WeightCase(
        "spectral norm", _normed(P.spectral_norm), _x(2, 3, 5, 5), _names("{}.parametrizations.weight.original")
    ),
    WeightCase("old weight norm", _normed(nn.utils.weight_norm), _x(2, 3, 5, 5), _names("{}.weight_v"), {}, False),
    WeightCase(
        "old spectral norm", _normed(nn.utils.spectral_norm), _x(2, 3, 5, 5), _names("{}.weight_orig"), {}, False
    ),
    WeightCase("standardised", _standardised(Standardised), _x(2, 3, 7, 7), ("0.weight", "2.weight")),
    WeightCase("standardised, same padding", _standardised(StandardisedSame), _x(2, 3, 7, 7), ("0.weight", "2.weight")),
)

PLAIN: tuple[WeightCase, ...] = (
    WeightCase("subclasses", Sub, _x(2, 2, 5, 5), ("conv.weight", "head.weight")),
    WeightCase("functional", Functional, _x(3, 5), ("a", "b", "c", "d", "f", "g")),
    WeightCase(
        "conv1d", lambda: nn.Sequential(Conv1D(6, 9), nn.Tanh(), Conv1D(9, 4)), _x(3, 6), ("0.weight", "2.weight")
    ),
    WeightCase("experts", Experts, _x(7, 6), ("up", "down", "gate.weight")),
    WeightCase("batched experts", BatchedExperts, _x(4, 6), ("up", "down", "mix")),
    WeightCase(
        "self attention",
        SelfAttention,
        _x(2, 4, 8),
        ("attention.in_proj_weight", "attention.out_proj.weight", "head.weight"),
    ),
    WeightCase(
        "cross attention",
        CrossAttention,
        lambda: (torch.randn(2, 4, 8), torch.randn(2, 5, 6), torch.randn(2, 5, 4)),
        tuple(f"attention.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")),
    ),
    WeightCase("fused projection", FusedProjection, _x(2, 3, 4), ("in_proj",)),
    WeightCase("lstm", _recurrent(nn.LSTM), _x(2, 4, 5), _recurrent_names(1, 1), _RNN),
    WeightCase(
        "deep lstm",
        _recurrent(nn.LSTM, num_layers=2, bidirectional=True, proj_size=3),
        _x(2, 4, 5),
        _recurrent_names(2, 2, True),
        _RNN,
    ),
    WeightCase("gru", _recurrent(nn.GRU, num_layers=2, bidirectional=True), _x(2, 4, 5), _recurrent_names(2, 2), _RNN),
    WeightCase("rnn", _recurrent(nn.RNN, nonlinearity="relu"), _x(2, 4, 5), _recurrent_names(1, 1), _RNN),
    WeightCase("lstm cell", lambda: Cells(nn.LSTMCell), _x(2, 3, 5), ("cell.weight_ih", "cell.weight_hh"), _CELL),
    WeightCase("gru cell", lambda: Cells(nn.GRUCell), _x(2, 3, 5), ("cell.weight_ih", "cell.weight_hh"), _CELL),
    WeightCase("rnn cell", lambda: Cells(nn.RNNCell), _x(2, 3, 5), ("cell.weight_ih", "cell.weight_hh"), _CELL),
    WeightCase("tied", TiedCoder, lambda: (torch.randint(0, 9, (2, 4)),), ("embed.weight", "code.weight")),
)

WEIGHT_CASES = (*PLAIN, *EFFECTIVE)


def gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Gradients of a fixed weighting of the outputs."""
    model.zero_grad()
    output = model(*inputs)
    (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape)).sum().backward()
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def train(model: nn.Module, inputs: tuple[Tensor, ...], optimizer: str, steps: int = 3) -> None:
    """A few steps of a stock optimizer without any help."""
    makers = {
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01),
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01),
    }
    made = makers[optimizer]()
    for _ in range(steps):
        made.zero_grad()
        model(*inputs).square().mean().backward()
        made.step()


def twin(model: nn.Module, case: WeightCase) -> nn.Module:
    """A second model with the same state."""
    if case.copies:
        return copy.deepcopy(model)
    other, _ = case()
    other.load_state_dict(model.state_dict())
    return other
