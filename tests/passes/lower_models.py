"""Networks whose axes are moved about in the ways that lowering must see through."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedAttention(nn.Module):
    """One projection for q, k and v, taken apart by a permutation; the attention of torch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


class SplitAttention(nn.Module):
    """Three projections, and the attention written out."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (part(x).view(batch, tokens, self.heads, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
        if self.causal:
            scores = scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -1e9)
        return self.o((scores.softmax(-1) @ v).permute(0, 2, 1, 3).contiguous().view(batch, tokens, width))


class Block(nn.Module):
    """Attention and a feed-forward part, with residuals and norms."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Residual(nn.Module):
    """A layer that runs twice, scaled residuals, a skip from the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.scale * self.one(x)
        y = y + self.two(torch.tanh(self.one(y)))
        return 2.0 * y - x


class Moves(nn.Module):
    """Splits, joins, parts and means of lowered values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        value, gate = self.up(x).chunk(2, -1)
        y = self.down(F.silu(gate) * value)
        joined = torch.cat([y, x], -1)
        return y.mean(1), y[:, 0], y[..., 3:7], joined, y.softmax(-1), y.sum((0, 1), keepdim=True), y.flatten(1)


class Functional(nn.Module):
    """Weights as (in, out), and products without a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, 2 * width)), nn.Parameter(torch.randn(2 * width))
        self.other = nn.Parameter(torch.randn(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return torch.relu(flat).view(*x.shape[:-1], -1) @ self.other


class ChannelsLast(nn.Module):
    """Linear layers on images that are permuted to have channels last, as in ConvNeXt."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        return x + self.down(F.gelu(self.up(self.norm(y)))).permute(0, 3, 1, 2)


class Unexportable(nn.Module):
    """A branch on a value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(width, width), nn.Conv1d(width, width, 3, padding=1, stride=2)
        self.wide = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.linear(x))
        if float(y.sum()) < 0:
            return y
        return self.wide(self.conv(y.transpose(1, 2)).mean(-1))


def conv_net() -> nn.Module:
    """Convolutions with norms, pooling, a shortcut of stride 2 and a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(48, 40, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def with_statistics(model: nn.Module) -> nn.Module:
    """The model with batch norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model
