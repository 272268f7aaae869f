"""Small networks in which channels are coupled in one way each; all in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.body, self.body_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.relu(x + self.body_norm(self.body(x)))
        return self.head(x.mean((2, 3)))


class Separable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.expand_norm = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depth, self.depth_norm = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.expand_norm(self.expand(x)))
        return self.project(F.relu6(self.depth_norm(self.depth(x))))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.grouped(torch.tanh(self.first(x)))))


class ConcatSplit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(5, 4)
        self.c, self.d = nn.Linear(3, 2), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat((torch.relu(self.a(x)), torch.tanh(self.b(x))), 1)
        left, right = y[:, :3], y.narrow(1, 3, 7)
        return self.c(left) + self.d(right)


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.mid(F.pixel_shuffle(torch.relu(self.up(x)), 2))))


class Attention(nn.Module):
    """A pre-norm transformer block with fused qkv and sizes written into the views."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.proj(y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class GroupedQueries(nn.Module):
    """Four query heads on two key heads, scores in the open, rotary halves."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.Linear(12, 16, bias=False),
            nn.Linear(12, 8, bias=False),
            nn.Linear(12, 8, bias=False),
        )
        self.o = nn.Linear(16, 12, bias=False)
        self.register_buffer("angle", torch.randn(5, 4))

    def turn(self, x: Tensor) -> Tensor:
        left, right = x[..., :2], x[..., 2:]
        return x * self.angle.cos() + torch.cat((-right, left), -1) * self.angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.turn(self.q(x).view(batch, length, 4, 4).transpose(1, 2))
        k = self.turn(self.k(x).view(batch, length, 2, 4).transpose(1, 2)).repeat_interleave(2, 1)
        v = self.v(x).view(batch, length, 2, 4).transpose(1, 2).repeat_interleave(2, 1)
        y = (q @ k.transpose(-1, -2) / 2.0).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(batch, length, 16))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.rnn, self.after = nn.Linear(4, 6), nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.rnn(torch.relu(self.before(x)))[0])


class Language(nn.Module):
    """An embedding tied to the output, and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.back = nn.Embedding(11, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.back(torch.relu(self.hidden(self.embed(tokens)))))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.down, self.up, self.out = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.conv(x)))
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.out(x * gate)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(6, 20), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.glu(self.wide(x), -1))


class GroupNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.conv(x))))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.out = nn.Conv2d(2, 8, 3, 2, 1), nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.sigmoid(self.up(torch.sigmoid(self.down(x)))))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))


def _flat() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 4, 3))


@dataclass(frozen=True)
class Case:
    """A network, its inputs, the weights that lose rows (name -> rows), and the shapes that follow."""

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    dead: dict[str, tuple[int, ...]]
    shapes: dict[str, tuple[int, ...]]
    zero: dict[str, tuple[int, ...]] = field(default_factory=dict)


CASES = (
    Case(
        "mlp",
        _mlp,
        (2, 5),
        {"0.weight": (0, 3, 4), "2.weight": (6,)},
        {"0.weight": (5, 5), "0.bias": (5,), "2.weight": (6, 5), "2.bias": (6,), "4.weight": (3, 6), "4.bias": (3,)},
    ),
    Case(
        "flatten",
        _flat,
        (2, 2, 7, 7),
        {"0.weight": (1, 2)},
        {"0.weight": (4, 2, 3, 3), "4.weight": (3, 16)},
    ),
    Case(
        "residual",
        Residual,
        (2, 3, 6, 6),
        {"stem.weight": (1, 5, 6), "body.weight": (1, 5, 6)},
        {
            "stem.weight": (6, 3, 3, 3),
            "body.weight": (6, 6, 3, 3),
            "body_norm.running_var": (6,),
            "head.weight": (3, 6),
        },
    ),  # one of three constant channels stays: it stands in for the others in the padded convolution
    Case(
        "depthwise separable",
        Separable,
        (2, 3, 6, 6),
        {"expand.weight": (0, 2), "depth.weight": (0, 2, 7)},
        {"expand.weight": (5, 3, 1, 1), "depth.weight": (5, 1, 3, 3), "project.weight": (4, 5, 1, 1)},
    ),
    Case(
        "grouped",
        Grouped,
        (2, 3, 5, 5),
        {"first.weight": (0, 4), "grouped.weight": (1, 2, 4, 7)},
        {"first.weight": (6, 3, 1, 1), "grouped.weight": (4, 3, 3, 3), "last.weight": (3, 4, 1, 1)},
    ),
    Case(
        "one whole group",
        Grouped,
        (2, 3, 5, 5),
        {"grouped.weight": (0, 1, 2, 3)},
        {"first.weight": (4, 3, 1, 1), "grouped.weight": (4, 4, 3, 3), "last.weight": (3, 4, 1, 1)},
    ),
    Case(
        "concat and split",
        ConcatSplit,
        (2, 5),
        {"a.weight": (1, 4, 5), "b.weight": (0,)},
        {"a.weight": (3, 5), "b.weight": (3, 5), "c.weight": (2, 2), "d.weight": (2, 4)},
    ),
    Case(
        "pixel shuffle",
        Shuffle,
        (2, 3, 4, 4),
        {"up.weight": (4, 5, 6, 7), "mid.weight": (2,)},
        {"up.weight": (12, 3, 3, 3), "mid.weight": (5, 3, 1, 1), "out.weight": (2, 5, 1, 1)},
        zero={"up.bias": (4, 5, 6, 7)},
    ),
    Case(
        "transformer block",
        Attention,
        (2, 5, 16),
        {"qkv.weight": (36, 37, 38, 39), "fc1.weight": (0, 5, 23)},
        {"qkv.weight": (36, 16), "proj.weight": (16, 12), "fc1.weight": (21, 16), "fc2.weight": (16, 21)},
    ),  # the values of head 1 are constant, so its queries and keys are not needed
    Case(
        "grouped queries",
        GroupedQueries,
        (2, 5, 12),
        {"v.weight": (0, 1, 2, 3)},
        {"q.weight": (8, 12), "k.weight": (4, 12), "v.weight": (4, 12), "o.weight": (12, 8)},
    ),
    Case(
        "half the key size",
        GroupedQueries,
        (2, 5, 12),
        {"q.weight": (1, 3, 5, 7, 9, 11, 13, 15)},
        {"q.weight": (8, 12), "k.weight": (4, 12), "v.weight": (8, 12), "angle": (5, 2)},
    ),  # the rotation pairs index 1 with 3
    Case(
        "tied embedding",
        Language,
        (2, 5),
        {"hidden.weight": (2, 3)},
        {"embed.weight": (11, 6), "hidden.weight": (6, 6), "back.weight": (6, 6), "out.weight": (11, 6)},
    ),
    Case(
        "squeeze and excite",
        SqueezeExcite,
        (2, 3, 4, 4),
        {"conv.weight": (3, 4), "down.weight": (1,)},
        {"conv.weight": (8, 3, 1, 1), "down.weight": (3, 8, 1, 1), "up.weight": (8, 3, 1, 1)},
    ),  # a constant times a gate is no constant
    Case(
        "gate that is zero",
        SqueezeExcite,
        (2, 3, 4, 4),
        {"conv.weight": (3, 4)},
        {
            "conv.weight": (6, 3, 1, 1),
            "down.weight": (4, 6, 1, 1),
            "up.weight": (6, 4, 1, 1),
            "out.weight": (3, 6, 1, 1),
        },
        zero={"norm.bias": (3, 4), "norm.running_mean": (3, 4)},
    ),
    Case(
        "glu",
        Gated,
        (2, 6),
        {"wide.weight": (1, 4, 11, 14)},
        {"wide.weight": (16, 6), "wide.bias": (16,), "out.weight": (3, 8)},
    ),
    Case(
        "group norm",
        GroupNormed,
        (2, 3, 4, 4),
        {"conv.weight": (0, 2, 4, 6)},
        {"conv.weight": (8, 3, 1, 1), "norm.weight": (8,)},
    ),
    Case(
        "transposed",
        Transposed,
        (2, 2, 8, 8),
        {"down.weight": (0, 7)},
        {"down.weight": (7, 2, 3, 3), "up.weight": (7, 6, 4, 4)},
    ),
)


def build(case: Case, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The network with random parameters and statistics, its dead rows zero, in eval mode, and an input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = case.build().double().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                nn.init.normal_(module.bias)
        x = torch.randint(0, 11, case.inputs) if isinstance(model, Language) else torch.randn(case.inputs).double()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, rows in {**case.dead, **case.zero}.items():
            state[name][list(rows)] = 0.0
    return model, x
