# ruff: noqa: E501  (one case, one line)
"""Small models with what a collector may get wrong; each takes its inputs with the samples along axis 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N = 5


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    classes: int = 3
    slow: bool = False  # at least one parameter has no taps

    def build(self) -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
        torch.manual_seed(0)
        model = self.make().double().eval()
        inputs = self.inputs()
        y = torch.randint(0, self.classes, (N,))
        return model, inputs, y


class ForeignProduct(torch.autograd.Function):
    """A linear layer's product that does not go through torch's operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


class LastStep(nn.Module):
    """A recurrent layer, of which the last step is read."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Fn(nn.Module):
    """Modules and parameters with a forward function."""

    def __init__(self, forward: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.fn = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter) and part.dtype is torch.bool:
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Any) -> Tensor:
        return self.fn(self, *inputs)


def p(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.5)


def vec() -> tuple[Tensor, ...]:
    return (torch.randn(N, 6, dtype=torch.float64),)


def seq() -> tuple[Tensor, ...]:
    return (torch.randn(N, 4, 6, dtype=torch.float64),)


def img() -> tuple[Tensor, ...]:
    return (torch.randn(N, 4, 6, 6, dtype=torch.float64),)


def ids() -> tuple[Tensor, ...]:
    return (torch.randint(0, 7, (N, 5)),)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def conv(**kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Conv2d(4, 6, 3, **kwargs), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)
    )


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    model[2].weight = model[0].weight
    return model


def reuse() -> nn.Module:
    shared = nn.Linear(6, 6)
    return nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), shared, nn.Linear(6, 3))


class Attention(nn.Module):
    """Grouped-query attention by the fused operator, with rotated queries."""

    def __init__(self, heads: int = 4, kv: int = 2, size: int = 3) -> None:
        super().__init__()
        self.heads, self.kv = heads, kv
        self.q, self.k = nn.Linear(6, heads * size), nn.Linear(6, kv * size)
        self.v, self.o = nn.Linear(6, kv * size, bias=False), nn.Linear(heads * size, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, self.heads, -1).transpose(1, 2)
        k = self.k(x).view(n, t, self.kv, -1).transpose(1, 2).repeat_interleave(self.heads // self.kv, 1)
        v = self.v(x).view(n, t, self.kv, -1).transpose(1, 2).repeat_interleave(self.heads // self.kv, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(self.o(y.transpose(1, 2).reshape(n, t, -1)).mean(1))


class TiedLanguage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.position = nn.Embedding(5, 6)
        self.norm = nn.LayerNorm(6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        return F.linear(self.norm(self.layer(x)), self.embedding.weight).mean(1)[:, :3]


class VisionTokens(nn.Module):
    """Patches, a class token that is expanded and concatenated, added positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, 6, 3, stride=3)
        self.token, self.position = p(1, 1, 6), p(1, 5, 6)
        self.scale = p(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        x = x + torch.tanh(x) * self.scale
        return self.head(x[:, 0] * x[:, 1:].mean(1))


class LastState(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.LazyLinear(3)
        self.head(self.rnn(torch.randn(2, 4, 6))[0][:, -1])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.mix, self.head = nn.LSTM(6, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(x.transpose(0, 1))[0]
        return self.head(self.mix(y, y, y)[0].sum(0))


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 4)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


class Double(torch.autograd.Function):
    """x W^T by a function that no mode sees."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w.T

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return delta @ w, delta.T @ x


def _flat_norm() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 3)
    )


def _batch_norm() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model


def _weight_norm() -> nn.Module:
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def _masked() -> nn.Module:
    mask = torch.rand(5, 6) > 0.5
    return Fn(
        lambda s, x: s.head(torch.tanh(F.linear(x, s.w * s.mask, s.b))),
        w=p(5, 6),
        b=p(5),
        mask=mask,
        head=nn.Linear(5, 3),
    )


def _chunked(self: Any, x: Tensor) -> Tensor:
    a, b = self.w.chunk(2)
    return self.head(torch.tanh(x @ a.T) * F.linear(x, torch.softmax(b, 1)))


def _rows_as_batch(self: Any, x: Tensor) -> Tensor:
    n, t, i = x.shape
    return self.head(torch.relu(self.inner(x.reshape(n * t, i)) + self.bias).view(n, t, -1).sum(1))


def _time_major(self: Any, x: Tensor) -> Tensor:
    n, t, i = x.shape
    return self.head(torch.relu(self.inner(x.transpose(0, 1).reshape(t * n, i))).view(t, n, -1).sum(0))


def _frames(self: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = self.conv(x.reshape(n * 2, c // 2, h, w))
    return self.head(torch.relu(self.norm(y)).flatten(1).view(n, -1))


CASES = (
    Case("mlp", mlp, vec),
    Case("mlp deep relu in place", lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 8, bias=False), nn.ReLU(inplace=True), nn.Linear(8, 3)), vec),
    Case("linear over tokens", lambda: Fn(lambda s, x: s.b(torch.tanh(s.a(x)).mean(1)), a=nn.Linear(6, 5), b=nn.Linear(5, 3)), seq),
    Case("tokens, relu in place", lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 5), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(20, 3)), seq),
    Case("rows of images, relu in place", lambda: nn.Sequential(nn.Conv1d(4, 4, 3), nn.ReLU(inplace=True), nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(20, 3)), seq),
    Case("wide linear over few tokens", lambda: Fn(lambda s, x: s.b(torch.tanh(s.a(x)).mean(1)), a=nn.Linear(40, 50), b=nn.Linear(50, 3)), lambda: (torch.randn(N, 2, 40, dtype=torch.float64),)),
    Case("tied weights", tied, vec),
    Case("module reuse", reuse, vec),
    Case("conv", conv(padding=1), img),
    Case("conv stride dilation", conv(stride=2, dilation=2, padding=2), img),
    Case("conv grouped", conv(groups=2, padding=1), img),
    Case("conv depthwise", lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.Tanh(), nn.Conv2d(8, 5, 1), nn.Flatten(), nn.Linear(80, 3)), img),
    Case("conv same even kernel", lambda: nn.Sequential(nn.Conv2d(4, 6, (2, 4), padding="same"), nn.Tanh(), nn.Flatten(), nn.Linear(216, 3)), img),
    Case("conv circular", conv(padding=1, padding_mode="circular"), img),
    Case("conv reflect same", conv(padding="same", padding_mode="reflect"), img),
    Case("conv1d", lambda: nn.Sequential(nn.Conv1d(4, 5, 3, padding=2, dilation=2, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(30, 3)), seq),
    Case("conv3d", lambda: nn.Sequential(nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)), lambda: (torch.randn(N, 2, 3, 4, 4, dtype=torch.float64),)),
    Case("conv transposed", lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), nn.Tanh(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, 3)), img),
    Case("conv transposed 1d", lambda: nn.Sequential(nn.ConvTranspose1d(4, 5, 3, dilation=2), nn.Tanh(), nn.Flatten(), nn.Linear(50, 3)), seq),
    Case("conv reused on frames", lambda: Fn(_frames, conv=nn.Conv2d(2, 4, 3), norm=nn.GroupNorm(2, 4), head=nn.Linear(128, 3)), img),
    Case("conv reused", lambda: Fn(lambda s, x: s.head(s.c(torch.relu(s.c(x))).flatten(1)), c=nn.Conv2d(4, 4, 3, padding=1, groups=2), head=nn.Linear(144, 3)), img),
    Case("norms", _flat_norm, vec),
    Case("layer norm over images", lambda: nn.Sequential(nn.LayerNorm([4, 6, 6]), nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Flatten(), nn.Linear(64, 3)), img),
    Case("group norm", lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(96, 3)), img),
    Case("batch norm", _batch_norm, img),
    Case("prelu", lambda: nn.Sequential(nn.Linear(6, 5), nn.PReLU(5), nn.Linear(5, 5), nn.PReLU(), nn.Linear(5, 3)), vec),
    Case("weight times mask", _masked, vec),
    Case("weight norm", _weight_norm, vec),
    Case("spectral expression", lambda: Fn(lambda s, x: s.head(F.linear(x, s.w / s.w.norm(), s.b.exp())), w=p(5, 6), b=p(5), head=nn.Linear(5, 3)), vec),
    Case("low rank update", lambda: Fn(lambda s, x: s.head(torch.tanh(F.linear(x, s.w + s.a @ s.b))), w=p(5, 6), a=p(5, 2), b=p(2, 6), head=nn.Linear(5, 3)), vec),
    Case("slices of one matrix", lambda: Fn(_chunked, w=p(10, 6), head=nn.Linear(5, 3)), vec),
    Case("matmul both sides", lambda: Fn(lambda s, x: s.head((s.left @ torch.tanh(x @ s.right)).flatten(1)), left=p(3, 4), right=p(6, 5), head=nn.Linear(15, 3)), seq),
    Case("addmm", lambda: Fn(lambda s, x: torch.addmm(s.c, torch.tanh(torch.addmm(s.b, x, s.w)), s.v), w=p(6, 5), b=p(5), v=p(5, 3), c=p(3)), vec),
    Case("einsum heads", lambda: Fn(lambda s, x: s.head(torch.tanh(torch.einsum("nti,hio->ntho", x, s.w)).flatten(1)), w=p(2, 6, 3), head=nn.Linear(24, 3)), seq),
    Case("batched matmul", lambda: Fn(lambda s, x: s.head(torch.tanh(x.unsqueeze(1) @ s.w).flatten(1)), w=p(2, 6, 3), head=nn.Linear(24, 3)), seq),
    Case("scale and shift", lambda: Fn(lambda s, x: s.head(torch.tanh(x * s.g + s.b) / (1 + s.d.square())), g=p(6), b=p(1, 6), d=p(1), head=nn.Linear(6, 3)), vec),
    Case("samples and positions on one axis", lambda: Fn(_rows_as_batch, inner=nn.Linear(6, 5), bias=p(5), head=nn.Linear(5, 3)), seq),
    Case("positions before samples", lambda: Fn(_time_major, inner=nn.Linear(6, 5), head=nn.Linear(5, 3)), seq),
    Case("embedding", lambda: Fn(lambda s, x: s.head(torch.tanh(s.e(x)).mean(1)), e=nn.Embedding(7, 6, padding_idx=2), head=nn.Linear(6, 3)), ids),
    Case("tied language model", TiedLanguage, ids),
    Case("vision tokens", VisionTokens, img),
    Case("multihead attention", lambda: Fn(lambda s, x: s.head(s.a(x, x, x)[0].mean(1)), a=nn.MultiheadAttention(6, 2, batch_first=True), head=nn.Linear(6, 3)), seq),
    Case("multihead attention apart", lambda: Fn(lambda s, x: s.head(s.a(x, x[..., :4], x[..., :4], need_weights=False)[0].mean(1)), a=nn.MultiheadAttention(6, 2, kdim=4, vdim=4, add_bias_kv=True, batch_first=True), head=nn.Linear(6, 3)), seq),
    Case("grouped queries fused", Attention, seq),
    Case("transformer layer", lambda: Fn(lambda s, x: s.head(s.t(x).mean(1)), t=nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=True), head=nn.Linear(6, 3)), seq),
    Case("lstm", lambda: LastState(nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True)), seq),
    Case("lstm projected", lambda: LastState(nn.LSTM(6, 4, proj_size=2, batch_first=True)), seq),
    Case("gru", lambda: LastState(nn.GRU(6, 4, batch_first=True)), seq),
    Case("rnn", lambda: LastState(nn.RNN(6, 4, batch_first=True, bias=False)), seq),
    Case("time first", TimeFirst, seq),
    Case("gru cell", Cells, seq),
    Case("bilinear", lambda: Fn(lambda s, x: s.b(x[:, :3], x[:, 3:]), b=nn.Bilinear(3, 3, 3)), vec, slow=True),
    Case("custom function", lambda: Fn(lambda s, x: s.head(Double.apply(x, s.w)), w=p(5, 6), head=nn.Linear(5, 3)), vec, slow=True),
    Case("unused parameter", lambda: Fn(lambda s, x: s.head(x), idle=nn.Linear(2, 2), head=nn.Linear(6, 3)), vec),
    Case("frozen part", lambda: Fn(lambda s, x: s.head(torch.tanh(s.base(x).detach() + s.side(x))), base=nn.Linear(6, 5), side=nn.Linear(6, 5), head=nn.Linear(5, 3)), vec),
)  # fmt: skip
