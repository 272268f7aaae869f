"""Rows of single samples and columns of products that are made at once: wrong rules of operators are noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsparse.curvature import operator_engine
from fxsparse.curvature.fisher_types import CoupledSamples
from fxsparse.curvature.operator import CurvatureOperator
from tests.curvature import operator_oracle as oracle
from tests.curvature.test_operator_input import drawn, near


class Slopes(nn.Module):
    """torch's batching rule for the reverse pass of PReLU takes the first sample for all, in vmap inside of vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.slope, self.last = nn.Parameter(torch.randn(3, 4)), nn.PReLU(4), nn.Bilinear(4, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.slope(torch.einsum("ni,ij->nj", x, self.first)), x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", ["ggn", "empirical"])
def test_slopes_of_samples_with_other_signs(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Slopes().double(), drawn(6, 3)
    x[1] = 1.5 * x[0]  # the first piece does not show it
    y = torch.tensor([0, 1, 2, 1, 0, 2])
    expected = oracle.dense(model, (x,), y, oracle.cross_entropy, kind)
    for chunk in (None, 1, 2):
        op = CurvatureOperator(model, None, "cross_entropy", (x, y), kind, chunk=chunk)
        near(op.dense(), expected)
        near(op.diag(), expected.diagonal())
        near(op.block(["first", "slope.weight"])[:16, :16], expected[:16, :16])


class _Tripled(torch.autograd.Function):
    """w x w, whose own batching rule is wrong: it takes the first sample for all."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dw: Tensor) -> Tensor:
        x, w = ctx.saved_tensors
        return dx * w + x * dw

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return delta * w, (delta * x).sum(0)

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, int | None], x: Tensor, w: Tensor) -> tuple[Tensor, int]:
        first = x.movedim(dims[0], 0)[:1].expand(info.batch_size, *x.movedim(dims[0], 0).shape[1:])  # type: ignore[arg-type]
        return _Tripled.apply(first.flatten(0, 1), w).reshape(first.shape), 0


class Tripled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.randn(3)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(_Tripled.apply(x, self.scale).tanh())


def test_every_piece_is_looked_at() -> None:
    """The first batch has one sample over and over; only the second shows that the rule is wrong."""
    torch.manual_seed(0)
    model, x = Tripled().double(), drawn(6, 3)
    x[1:3] = x[0]
    y = torch.tensor([0, 1, 2, 1, 0, 2])
    op = CurvatureOperator(model, None, "cross_entropy", [(x[:3], y[:3]), (x[3:], y[3:])])
    expected = oracle.dense(model.requires_grad_(), (x,), y, oracle.cross_entropy)
    near(op.dense(), expected)
    slopes = torch.cat([row["scale"] for row in op.sample_gradients()])
    for n in range(6):
        value = oracle.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        near(slopes[n], torch.autograd.grad(value, model.scale)[0])


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_columns_at_once_are_compared_with_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), drawn(5, 3), torch.arange(5) % 3
    v = drawn(31, 3, seed=1)
    expected = torch.stack([CurvatureOperator(model, None, "cross_entropy", (x, y), kind).mv(c) for c in v.T], 1)
    vmap = operator_engine.vmap

    def wrong(rule: Any, *args: Any, **options: Any) -> Any:
        """The first column for all."""

        def first(found: Any) -> Any:
            return (
                {name: each[:1].expand_as(each) for name, each in found.items()} if isinstance(found, dict) else found
            )

        return lambda *given: first(vmap(rule, *args, **options)(*given))

    monkeypatch.setattr(operator_engine, "vmap", wrong)
    op = CurvatureOperator(model, None, "cross_entropy", (x, y), kind)
    near(op.mm(v), expected)
    near(op.mm(v), expected)


class Centred(nn.Module):
    """The outputs of a sample depend on the others."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.layer, self.where = nn.Linear(3, 3), where

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "input":
            return self.layer(x - x.mean(0))
        z = self.layer(x)
        return z - z.mean(0) if self.where == "output" else z * (1 if float(x.sum()) > 0 else -1)


@pytest.mark.parametrize("where", ["input", "output", "branch"])
@pytest.mark.parametrize("kind", ["ggn", "empirical"])
def test_samples_that_depend_on_each_other_are_refused_where_they_are_cut(where: str, kind: str) -> None:
    torch.manual_seed(0)
    model, x, y = Centred(where).double(), drawn(4, 3), torch.tensor([0, 1, 2, 0])
    x[0, 0] += 2 * x[0].sum().abs() + x.sum().abs()
    x[1:, 0] -= x[1:].sum(1)  # one sample above zero, so that the batch is, and the others are at it
    x[1:, 1] -= 0.1
    op = CurvatureOperator(model, None, "cross_entropy", (x, y), kind)
    cut = CurvatureOperator(model, None, "cross_entropy", (x, y), kind, chunk=2, check=False)
    v = torch.ones(12)
    assert bool(op.mv(v).isfinite().all())  # of the whole batch
    for call in (op.diag, op.dense, lambda: list(op.sample_gradients()), lambda: cut.mv(v), lambda: cut.quadform(v)):
        with pytest.raises(CoupledSamples, match="remove what mixes samples"):
            call()


def test_rows_that_do_not_add_up_are_refused() -> None:
    """A sample alone has the outputs that it has in company, but not the gradients."""

    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.layer(x)
            return z + (z.sum(0) - z.sum(0).detach())

    model, x, y = Detached().double(), drawn(4, 3), torch.tensor([0, 1, 2, 0])
    op = CurvatureOperator(model, None, "cross_entropy", (x, y), "empirical", check=False)
    for call in (op.dense, lambda: list(op.sample_gradients())):
        with pytest.raises(CoupledSamples, match="do not add up"):
            call()


class Squeezed(nn.Module):
    """Drops the axis of a single sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return (self.layer(x) * (1 if scale is None else scale)).squeeze(0)


@pytest.mark.parametrize("several", [False, True])
def test_models_that_drop_the_axis_of_one_sample(several: bool) -> None:
    torch.manual_seed(0)
    model, x, y = Squeezed().double(), drawn(4, 3), torch.tensor([0, 1, 2, 0])
    inputs = (x, drawn(4, 3, seed=1)) if several else (x,)
    whole = x * 1.0
    j = torch.stack(
        [torch.kron(torch.diag(inputs[1][n] if several else torch.ones(3).double()), whole[n]) for n in range(4)]
    )
    bias = torch.stack([torch.diag(inputs[1][n]) if several else torch.eye(3).double() for n in range(4)])
    rows = torch.cat([j.view(4, 3, 9), bias], 2)
    p = model(*inputs).softmax(1)
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    expected = torch.einsum("nci,ncd,ndj->ij", rows, h, rows).detach() / 4
    v = drawn(12, seed=2)
    for chunk in (None, 2):
        op = CurvatureOperator(model, None, "cross_entropy", (inputs, y), chunk=chunk)
        near(op.mv(v), expected @ v)
        near(op.diag(), expected.diagonal())
        near(op.dense(), expected)
