"""Ways to a product: one run of the model, several columns, operators without rules, and what is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import fxsparse
from fxsparse.curvature.operator import CurvatureOperator
from tests.curvature.operator_oracle import cross_entropy, dense, hessian_product


class Counted(nn.Module):
    """Layers that count their runs, with an attention and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 4)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 3] -> [N, 4]."""
        type(self).total += 1
        h = self.norm(torch.tanh(self.first(x)))
        return self.last(F.scaled_dot_product_attention(h, h, h).mean(1))

    total = 0


class Stopped(nn.Module):
    """A branch of which no gradient is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3] -> [N, 4]."""
        return self.a(x) * self.b(x).detach().exp()


class _Cubed(torch.autograd.Function):
    """No forward-mode rule, none for vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * delta


class Ruleless(nn.Module):
    """An operator without a forward-mode rule; the reference, which is made by transforms, has another one for it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3] -> [N, 4]."""
        h = self.first(x)
        return self.last(h**3 if torch._C._are_functorch_transforms_active() else _Cubed.apply(h))


class Constant(nn.Module):
    """Some parameters play no part, and the outputs of half of the others have no tangent."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(3, 4), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3] -> [N, 4]."""
        return self.used(x)


def case(make: type[nn.Module], *shape: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    return make().double(), torch.randn(5, *shape, 3, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 0])


CASES = {"counted": (Counted, 4), "stopped": (Stopped,), "ruleless": (Ruleless,), "constant": (Constant,)}


@pytest.mark.parametrize("name", CASES)
def test_products_of_one_and_of_several_vectors_are_the_dense_matrix(name: str) -> None:
    model, x, y = case(*CASES[name])
    ggn = CurvatureOperator(model, None, "cross_entropy", (x, y))
    v = torch.randn(ggn.space.size, 3, dtype=torch.float64)
    expected = dense(model, (x,), y, cross_entropy) @ v
    assert torch.allclose(ggn.mm(v), expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(ggn.mv(v[:, 1]), expected[:, 1], rtol=1e-10, atol=1e-12)
    assert ggn.quadform(v[:, 2]) == pytest.approx(float(v[:, 2] @ expected[:, 2]), rel=1e-10)


@pytest.mark.parametrize("name", ["counted", "ruleless", "constant"])
def test_hessian_products_of_one_and_of_several_vectors(name: str) -> None:
    model, x, y = case(*CASES[name])
    hessian = CurvatureOperator(model, None, "cross_entropy", (x, y), "hessian")
    v = torch.randn(hessian.space.size, 2, dtype=torch.float64)
    expected = torch.stack([hessian_product(model, (x,), y, cross_entropy, each) for each in v.T], 1)
    assert torch.allclose(hessian.mm(v), expected, rtol=1e-9, atol=1e-11)
    assert torch.allclose(hessian.mv(v[:, 0]), expected[:, 0], rtol=1e-9, atol=1e-11)
    assert hessian.units == 5


@pytest.mark.parametrize("kind", ["ggn", "empirical", "hessian"])
def test_a_product_runs_the_model_once(kind: str) -> None:
    model, x, y = case(Counted, 4)
    operator = CurvatureOperator(model, None, "cross_entropy", [(x[:2], y[:2]), (x[2:], y[2:])], kind)
    v = torch.randn(operator.space.size, dtype=torch.float64)
    operator.mv(v)
    before = Counted.total
    operator.mv(v)
    assert Counted.total == before + 2


def test_nothing_is_kept_between_products() -> None:
    """Weights and data that change in place are seen by the next product."""
    model, x, y = case(Counted, 4)
    ggn = CurvatureOperator(model, None, "cross_entropy", (x, y))
    v = torch.randn(ggn.space.size, dtype=torch.float64)
    ggn.mv(v)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
        x.mul_(0.5)
    assert torch.allclose(ggn.mv(v), dense(model, (x,), y, cross_entropy) @ v, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_no_dual_level_stays_open(kind: str) -> None:
    model, x, y = case(Counted, 4)
    operator = CurvatureOperator(model, None, "cross_entropy", (x, y), kind)
    v = torch.randn(operator.space.size, dtype=torch.float64)
    operator.mv(v)
    assert forward_ad._current_level == -1
    flags = [(p.requires_grad, p.grad, id(p)) for p in model.parameters()]

    def failing(*_: Any) -> None:
        raise LookupError("in the middle")

    handle = model.last.register_forward_hook(failing)
    with pytest.raises(LookupError, match="in the middle"):
        operator.mv(v)
    handle.remove()
    assert forward_ad._current_level == -1
    assert torch.is_grad_enabled()
    assert flags == [(p.requires_grad, p.grad, id(p)) for p in model.parameters()]


def test_products_are_no_part_of_a_graph_of_the_caller() -> None:
    model, x, y = case(Counted, 4)
    ggn = CurvatureOperator(model, None, "cross_entropy", (x, y))
    v = torch.randn(ggn.space.size, dtype=torch.float64, requires_grad=True)
    found = ggn.mv(v)
    assert not found.requires_grad
    with torch.no_grad():
        assert torch.equal(ggn.mv(v), found)
    with torch.inference_mode():
        assert torch.equal(ggn.mv(torch.Tensor.clone(v)), found)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_run_as_they_were_written(whole: bool) -> None:
    """Code that was compiled for a reverse pass has no forward mode; it runs again afterwards."""
    model, x, y = case(Counted, 4)
    expected = dense(model, (x,), y, cross_entropy)
    if whole:
        compiled = torch.compile(model, backend="aot_eager")
    else:
        compiled = model
        compiled.last.compile(backend="aot_eager")
    before = compiled(x)
    v = torch.randn(len(expected), dtype=torch.float64)
    for kind in ("ggn", "hessian"):
        operator = CurvatureOperator(compiled, None, "cross_entropy", (x, y), kind)
        wanted = expected @ v if kind == "ggn" else hessian_product(model, (x,), y, cross_entropy, v)
        assert torch.allclose(operator.mv(v), wanted, rtol=1e-9, atol=1e-11)
    assert torch.equal(compiled(x), before)


@pytest.mark.parametrize("support", ["off", "dense"])
def test_what_lies_under_an_opened_mask_is_read_as_zero(support: str) -> None:
    """Dead entries that hold something are zeros to the model, and so they are to products that see them."""
    torch.manual_seed(0)
    model = fxsparse.transform(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double(), sparsity=0.5)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 0, 1])
    v = torch.randn(44, 2, dtype=torch.float64)
    operator = CurvatureOperator(model, None, "cross_entropy", (x, y), mask=support)
    expected, diagonal = operator.mm(v), operator.diag()
    assert float(diagonal.abs().max()) > 0
    with torch.no_grad():
        for name, mask in fxsparse.masks(model).items():
            model.get_parameter(name).masked_fill_(~mask, 3.0)
    again = CurvatureOperator(model, None, "cross_entropy", (x, y), mask=support)
    assert torch.allclose(again.mm(v), expected, rtol=1e-12, atol=1e-14)
    assert torch.allclose(again.mv(v[:, 0]), expected[:, 0], rtol=1e-12, atol=1e-14)
    assert torch.allclose(again.diag(), diagonal, rtol=1e-12, atol=1e-14)
