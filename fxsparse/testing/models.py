"""Hypothesis strategies of models with example inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fxsparse.testing import blocks

Drawn = tuple[nn.Module, tuple[Tensor, ...]]
_Draw = st.DrawFn

_ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (nn.ReLU, nn.Tanh, nn.GELU, nn.Identity)


@st.composite
def models(draw: _Draw, *, convolutional: bool | None = None, traceable: bool | None = None) -> Drawn:
    """Draw a small model in float64 and inputs for it.

    The models hold linear and convolutional modules (grouped, dilated, padded, transposed), norms, dropout, residuals
    and concatenation, functional linear, conv2d, matmul and einsum on parameters, reused modules, tied weights, and
    control flow that no tracer takes. Every model has at least one weight that is sparsified by default. Global random
    state is not touched.

    Args:
        draw: Given by hypothesis.
        convolutional: Only image models (True), only vector models (False), or both.
        traceable: Without control flow (True), with some (False), or either.

    Returns:
        The model in train mode, and a tuple of one input of batch 2 or 3.
    """
    seed = draw(st.integers(0, 2**16))
    image = draw(st.booleans()) if convolutional is None else convolutional
    branching = draw(st.sampled_from((False, False, True))) if traceable is None else not traceable
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, shape = _image_model(draw, branching) if image else _vector_model(draw, branching)
        inputs = torch.randn(draw(st.integers(2, 3)), *shape, dtype=torch.float64)
    return model.double(), (inputs,)


def _vector_model(draw: _Draw, branching: bool) -> tuple[nn.Module, tuple[int, ...]]:
    width = draw(st.sampled_from((4, 6, 8)))
    layers: list[nn.Module] = []
    features = width
    for _ in range(draw(st.integers(1, 3))):
        layer, features = _vector_layer(draw, features, depth=2)
        layers.append(layer)
    if branching:
        layers.append(_python_layer(draw, features))
    layers.append(nn.Linear(features, draw(st.integers(1, 5))))
    return nn.Sequential(*layers), (width,)


def _python_layer(draw: _Draw, features: int) -> nn.Module:
    if draw(st.booleans()):
        return blocks.PythonLinear(features, features)
    first, _ = _square_layer(draw, features), None
    return blocks.Branching(first, _square_layer(draw, features))


def _square_layer(draw: _Draw, features: int) -> nn.Module:
    kinds: tuple[Callable[[], nn.Module], ...] = (
        lambda: nn.Linear(features, features, bias=False),
        lambda: blocks.FunctionalLinear(features, features),
        lambda: blocks.Matmul(features, features),
        lambda: blocks.Einsum(features, features),
        lambda: nn.Sequential(nn.Linear(features, 3), nn.ReLU(), nn.Linear(3, features)),
        lambda: blocks.TiedTranspose(features, 5),
        lambda: blocks.TiedModules(features),
    )
    return draw(st.sampled_from(kinds))()


def _vector_layer(draw: _Draw, features: int, depth: int) -> tuple[nn.Module, int]:
    width = draw(st.sampled_from((4, 6, 8)))
    kind = draw(st.sampled_from(("linear", "functional", "square", "residual", "reused", "concat", "norm", "dropout")))
    if kind == "linear":
        return nn.Sequential(nn.Linear(features, width), draw(st.sampled_from(_ACTIVATIONS))()), width
    if kind == "functional":
        made = draw(st.sampled_from((blocks.FunctionalLinear, blocks.Matmul, blocks.Einsum)))
        return made(features, width), width
    if kind == "residual":
        return blocks.Residual(_square_layer(draw, features)), features
    if kind == "reused":
        return blocks.Reused(_square_layer(draw, features)), features
    if kind == "concat" and depth:
        parts = [_vector_layer(draw, features, depth - 1) for _ in range(2)]
        return blocks.Concat([part for part, _ in parts]), sum(size for _, size in parts)
    if kind == "norm":
        norm = nn.LayerNorm(features) if draw(st.booleans()) else nn.BatchNorm1d(features)
        return nn.Sequential(_square_layer(draw, features), norm), features
    if kind == "dropout":
        return nn.Sequential(_square_layer(draw, features), nn.Dropout(0.3)), features
    return _square_layer(draw, features), features


def _image_model(draw: _Draw, branching: bool) -> tuple[nn.Module, tuple[int, ...]]:
    channels = start = draw(st.sampled_from((2, 4)))
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        layer, channels = _image_layer(draw, channels, depth=2)
        layers.append(layer)
    if branching:
        layers.append(blocks.Branching(_same_conv(draw, channels), _same_conv(draw, channels)))
    head = nn.Linear(channels, draw(st.integers(1, 4)))
    return blocks.Pooled(nn.Sequential(*layers), head), (start, 6, 6)


def _same_conv(draw: _Draw, channels: int) -> nn.Module:
    """A layer that keeps the shape (channels, 6, 6)."""
    kinds: tuple[Callable[[], nn.Module], ...] = (
        lambda: nn.Conv2d(channels, channels, 3, padding=1),
        lambda: nn.Conv2d(channels, channels, 3, padding=2, dilation=2, padding_mode="circular", bias=False),
        lambda: nn.Conv2d(channels, channels, 3, padding="same", groups=2),
        lambda: nn.ConvTranspose2d(channels, channels, 3, padding=1, groups=2),
        lambda: blocks.FunctionalConv(channels, channels),
        lambda: blocks.FunctionalConv(channels, channels, groups=2),
    )
    return draw(st.sampled_from(kinds))()


def _image_layer(draw: _Draw, channels: int, depth: int) -> tuple[nn.Module, int]:
    width = draw(st.sampled_from((2, 4)))
    kind = draw(st.sampled_from(("conv", "functional", "same", "residual", "reused", "concat", "norm")))
    if kind == "conv":
        return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), draw(st.sampled_from(_ACTIVATIONS))()), width
    if kind == "functional":
        return blocks.FunctionalConv(channels, width), width
    if kind == "residual":
        return blocks.Residual(_same_conv(draw, channels)), channels
    if kind == "reused":
        return blocks.Reused(_same_conv(draw, channels)), channels
    if kind == "concat" and depth:
        parts = [_image_layer(draw, channels, depth - 1) for _ in range(2)]
        return blocks.Concat([part for part, _ in parts]), sum(size for _, size in parts)
    if kind == "norm":
        norm = nn.BatchNorm2d(channels) if draw(st.booleans()) else nn.GroupNorm(2, channels)
        return nn.Sequential(_same_conv(draw, channels), norm, nn.ReLU()), channels
    return _same_conv(draw, channels), channels
