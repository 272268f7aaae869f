"""What the tests of lowering share: how models are made sparse and compared, and the networks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

import fxsparse
from fxsparse.passes.lower_shared_support import Form, Layer, LoweringResult
from tests.passes.lower_models import (
    Block,
    ChannelsLast,
    Functional,
    FusedAttention,
    Moves,
    Residual,
    SplitAttention,
    conv_net,
    with_statistics,
)

FORMS = (Form.GATHER_CONV, Form.GATHER_MATMUL)


def wish(form: Form) -> Callable[[Layer], Form]:
    """The form where it is legal, else the last."""
    return lambda layer: form if form in layer.forms else layer.forms[-1]


def sparse(model: nn.Module, x: tuple[Tensor, ...], group: int = 8, sparsity: float = 0.75, **kwargs: Any) -> nn.Module:
    return fxsparse.transform(
        model.eval(), x, sparsity=sparsity, pattern=fxsparse.SharedSupport(group), **kwargs
    ).eval()  # fmt: skip


def outputs(model: nn.Module, *x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = model(*x)
    return list(found) if isinstance(found, tuple) else [found]


def assert_equal(lowered: nn.Module, masked: nn.Module, *x: Tensor) -> None:
    """In float64, to 1e-12 of the scale of each output."""
    expected = outputs(masked.double(), *x)
    found = outputs(lowered.double(), *x)
    assert len(expected) == len(found)
    for old, new in zip(expected, found, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-12, atol=1e-12 * max(1.0, float(old.abs().max())))


def calls(model: nn.Module) -> Counter[str]:
    """How often each operator is called."""
    assert isinstance(model, fx.GraphModule)
    return Counter(str(node.target).split(".")[1] for node in model.graph.nodes if str(node.target).startswith("aten."))


def lowered_all(result: LoweringResult) -> bool:
    return all(form is not Form.DENSE for form in result.forms.values())


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 24)),
        (32,),
    ),
    "mlp of tokens": (lambda: nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)), (17, 32)),
    "residual": (lambda: Residual(32), (32,)),
    "residual of tokens": (lambda: Residual(32), (18, 32)),
    "fused attention": (lambda: Block(32, FusedAttention(32, 4)), (19, 32)),
    "split attention": (lambda: Block(32, SplitAttention(32, 4)), (19, 32)),
    "causal attention": (lambda: Block(32, SplitAttention(32, 4, causal=True)), (19, 32)),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (17, 32)),
    "moves": (lambda: Moves(32), (17, 32)),
    "functional": (lambda: Functional(32), (17, 32)),
    "channels last": (lambda: ChannelsLast(32), (32, 9, 9)),
    "conv net": (lambda: with_statistics(conv_net()), (3, 16, 16)),
}
