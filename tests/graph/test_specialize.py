"""One graph specialised to the example inputs: what it computes, what it refuses, and what its guards say."""

from __future__ import annotations

import copy
import pickle
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse.errors import CaptureError, ConfigError
from fxsparse.graph import CapturedModule, capture, specialisation
from fxsparse.nn import Route, masked_weights


@dataclass
class Out:
    hidden: Tensor
    steps: int
    extra: dict[str, Any]


class ByShape(nn.Module):
    """Control flow on shapes, a functional weight, norms, both kinds of dropout, a Python constant, a dataclass out."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 5))
        self.lin = nn.Linear(6, 4)
        self.bn = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor, n: int = 2, scale: Tensor | None = None) -> Out:
        for _ in range(x.shape[0] - 1):
            x = x + 0.1
        x = F.dropout(F.linear(x, self.w), 0.3, training=self.training)
        if scale is not None:
            x = x * scale
        hidden = self.drop(self.bn(self.lin(F.relu(x)))) + self.shift * n
        return Out(hidden, n, {"first": [hidden[0]], "shift": self.shift})


class Ste(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


class Straight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        for row in x:  # iteration: no generic graph
            x = x + row
        with torch.no_grad():
            mean = (x @ self.w.t()).mean()
        return Ste.apply(F.linear(x, self.w)) * mean


class OnValues(nn.Module):
    def __init__(self, read: str) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 5))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.w)
        if self.read == "sign":
            return y if bool(x.sum() > 0) else -y
        if self.read == "bounded":
            return y if bool(x.abs().max() < 100) else -y
        if self.read == "count":
            return y * len(range(x[x > 0].shape[0]))
        if self.read == "python":
            return y * random.random()
        if self.read == "draw":
            return y if bool(torch.rand(()) > 0.5) else -y
        if self.read == "outside":
            return y + torch.Tensor([1.0] * 4) * len(x)
        if self.read == "numpy":
            return y * float(x.detach().numpy().sum())
        if self.read == "modes":
            return y.relu() if self.training and len(x) else y + len(x)
        if self.read == "autocast":
            with torch.autocast("cpu", enabled=len(x) > 100):
                return y + 1
        if self.read == "parameter":
            return [y * len(x), self.w]
        if self.read == "state":
            self.seen = x.shape[0]
            return y * len(x)
        raise AssertionError(self.read)


def special(model: nn.Module, *args: Any, **kwargs: Any) -> CapturedModule:
    found = capture(model, (args, kwargs), specialize=True)
    assert found.specialised, found.refusals
    assert isinstance(found.module, CapturedModule)
    return found.module


def observed(model: nn.Module, x: Tensor, training: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Outputs, gradients and buffers of one run on a copy."""
    twin = copy.deepcopy(model).train(training)
    inputs = x.detach().clone().requires_grad_()
    torch.manual_seed(5)
    out = twin(inputs)
    hidden = out.hidden if isinstance(out, Out) else out
    (hidden * torch.arange(hidden.numel()).reshape(hidden.shape)).sum().backward()
    grads = [p.grad for p in twin.parameters() if p.grad is not None]
    assert inputs.grad is not None
    return [hidden.detach(), inputs.grad, *grads, *twin.buffers()]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [ByShape, Straight])
def test_outputs_and_gradients_equal_eager_bit_for_bit_in_both_modes(kind: type[nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(3, 5)
    assert "" not in capture(model, (x,)).graphs
    made = special(model, x)
    for other in (x, torch.randn(3, 5)):
        expected, found = observed(model, other, training), observed(made, other, training)
        assert len(expected) == len(found)
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b)


def test_straight_through_gradients_survive_and_no_grad_passes_none() -> None:
    model, x = Straight(), torch.randn(2, 5)
    made = special(model, x)
    assert any(getattr(node.target, "__name__", "") == "Ste" for node in made.graph.nodes)
    grads = [observed(m, x, False)[2] for m in (model, made)]
    assert torch.equal(*grads) and bool(grads[0].any())
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(observed(again, x, False)[2], grads[0])


def test_a_functional_weight_gets_a_mask_node_instead_of_a_guard() -> None:
    model, x = ByShape(), torch.randn(3, 5)
    routes = [
        {w.name: w.route for w in fxsparse.plan(model, (x,), sparsity=0.5, specialize=flag).masked}
        for flag in (False, True)
    ]
    assert routes[0]["w"] is Route.PARAMETER and routes[1]["w"] is Route.MASK_NODE
    assert routes[0]["lin.weight"] is routes[1]["lin.weight"] is Route.MODULE


def test_the_plan_and_the_report_say_what_the_graph_is_specialised_to() -> None:
    model, x = ByShape(), torch.randn(3, 5)
    said = "the graph is specialised to the example inputs: shapes x float32[3, 5], n 2, "
    plan = fxsparse.plan(model, (x,), sparsity=0.5, specialize=True)
    assert plan.specialised is not None and plan.specialised.startswith(said)
    assert sum(said in line for line in str(plan).splitlines()) == 1
    report = fxsparse.sparsity_report(pickle.loads(pickle.dumps(plan.apply())))
    assert report.notes == (plan.specialised,) and said in str(report)
    plain = fxsparse.transform(model, (x,), sparsity=0.5)
    assert fxsparse.plan(model, (x,)).specialised is None and specialisation(plain) is None
    assert fxsparse.sparsity_report(plain).notes == ()


def copies(model: nn.Module) -> list[nn.Module]:
    recompiled = copy.deepcopy(model)
    assert isinstance(recompiled, CapturedModule)
    recompiled.recompile()
    return [model, copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model)), recompiled]


def test_other_inputs_raise_in_every_copy() -> None:
    model, x = ByShape(), torch.randn(3, 5)
    sparse = fxsparse.transform(model, (x,), sparsity=0.5, specialize=True)
    for each in copies(sparse):
        each.eval()
        assert torch.equal(each(x).hidden, sparse.eval()(x=x).hidden)
        with pytest.raises(CaptureError, match=r"`x` \(=float32\[4, 5\]\) is not like .*\[3, 5\]\) .*capture anew"):
            each(torch.randn(4, 5))
        with pytest.raises(CaptureError, match=r"`x` \(=float64\[3, 5\]\)"):
            each(x.double())
        with pytest.raises(CaptureError, match=r"`x` \(=\[float32\[3, 5\]\]\)"):
            each([x])
        with pytest.raises(CaptureError, match=r"`n` \(=3\) is not like the example input \(2\)"):
            each(x, n=3)
        with pytest.raises(CaptureError, match=r"`n` \(=2.0\)"):
            each(x, 2.0)
        with pytest.raises(CaptureError, match=r"`scale` \(=float32\[1\]\) .*\(None\)"):
            each(x, scale=torch.ones(1))
    with pytest.raises(CaptureError, match=r"`dtype of lin.bias` \(=torch.float64\)"):
        copy.deepcopy(sparse).double()(x)


def test_keyword_and_nested_inputs_are_bound_and_guarded() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 5))

        def forward(self, parts: dict[str, list[Tensor]], *rest: Tensor, flag: bool = False, **more: Tensor) -> Tensor:
            x = sum(parts["a"]) + rest[0]
            for _ in range(x.shape[0]):
                x = x + more["bias"]
            return F.linear(x, self.w) if flag else x

    x, bias = torch.randn(2, 5), torch.randn(5)
    model = Nested()
    made = special(model, {"a": [x, 2 * x]}, x, flag=True, bias=bias)
    y = torch.randn(2, 5)
    assert torch.equal(made({"a": [y, x]}, y, bias=bias, flag=True), model({"a": [y, x]}, y, flag=True, bias=bias))
    with pytest.raises(CaptureError, match=r"`parts` \(=\{a: \[float32\[2, 5\]\]\}\)"):
        made({"a": [x]}, x, flag=True, bias=bias)
    with pytest.raises(CaptureError, match=r"`flag` \(=False\)"):
        made({"a": [x, x]}, x, bias=bias)
    with pytest.raises(CaptureError, match=r"`more`"):
        made({"a": [x, x]}, x, flag=True, bias=bias, other=bias)


def test_dataclass_outputs_are_rebuilt_and_fresh_each_time() -> None:
    model, x = ByShape().eval(), torch.randn(3, 5)
    made = special(model, x)
    first, second = made(x), made(x)
    assert type(first) is Out and first.steps == 2
    assert torch.equal(first.extra["first"][0], first.hidden[0]) and first.extra["shift"] is made.shift
    assert first.extra is not second.extra
    first.extra.clear()
    assert set(made(x).extra) == {"first", "shift"}


def test_state_dict_is_the_originals_and_training_keeps_zeros() -> None:
    model, x = ByShape(), torch.randn(3, 5)
    made = special(model, x)
    assert list(made.state_dict()) == list(model.state_dict())
    made.load_state_dict(model.state_dict(), strict=True)
    sparse = fxsparse.transform(model, (x,), sparsity=0.8, specialize=True)
    sparse.load_state_dict(copy.deepcopy(sparse.state_dict()), strict=True)
    optimizer = torch.optim.SGD(sparse.parameters(), 0.1, momentum=0.9)
    before = sparse.bn.running_mean.clone()
    sparse.train()
    for _ in range(3):
        optimizer.zero_grad()
        sparse(x).hidden.pow(2).sum().backward()
        optimizer.step()
    assert not torch.equal(before, sparse.bn.running_mean)
    out = sparse.eval()(x).hidden
    assert torch.equal(out, sparse(x).hidden)
    dense = fxsparse.finalize(sparse).eval()
    assert torch.equal(dense(x).hidden, out)
    for name, weight in masked_weights(sparse).items():
        assert torch.equal(dense.get_parameter(name) == 0, ~weight.mask)


def test_one_mode_for_all_modules_that_read_it() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, self.training)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.w = Inner(), Inner(), nn.Parameter(torch.randn(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * len(x)) @ self.w

    made = special(Outer(), torch.randn(2, 5)).eval()
    made.a.train()
    with pytest.raises(CaptureError, match=r"`b` \(=False\) differs from `a` \(=True\)"):
        made(torch.randn(2, 5))


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        ("sign", "other values of the same shapes"),
        ("python", "draws random numbers in Python"),
        ("draw", "random draws"),
        ("outside", "no recorded function made"),
        ("numpy", "`numpy` of a tensor"),
        ("modes", "differ in more than constants"),
        ("autocast", "autocast"),
        ("parameter", "returns the parameter `w`"),
        ("state", "changes the attribute `seen`"),
    ],
)
def test_what_cannot_be_specialised_stays_piecewise_with_the_reason(read: str, reason: str) -> None:
    torch.manual_seed(0)
    model, x = OnValues(read), torch.rand(3, 5)
    plain, found = capture(model, (x,)), capture(model, (x,), specialize=True)
    assert found.specialised is None and found.graphs == plain.graphs
    said = [str(r) for r in found.refusals if r.path == "" and r.reason.startswith("not specialised: ")]
    assert len(said) == 1 and reason in said[0]
    plan = fxsparse.plan(model, (x,), sparsity=0.5, specialize=True)
    assert "not specialised" in str(plan) and [w.name for w in plan.masked] == ["w"]
    assert vars(model).keys() - vars(OnValues(read)).keys() == set()


def test_values_that_python_reads_are_guarded() -> None:
    model, x = OnValues("bounded"), torch.rand(3, 5)
    made = special(model, x)
    assert torch.equal(made(-x), model(-x))
    with pytest.raises(CaptureError, match=r"`bool` \(=False\) was True when the graph was specialised"):
        made(x + 1000)


def test_shapes_that_depend_on_values_are_guarded() -> None:
    model, x = OnValues("count"), torch.rand(3, 5) + 0.5
    found = capture(model, (x,), specialize=True)
    assert found.specialised is None  # negated inputs select nothing
    assert any("behaves differently on other values" in r.reason for r in found.refusals)


def test_overrides_of_the_class_stay_in_force() -> None:
    model, x = Frozen(), torch.randn(3, 5)
    made = special(model, x)
    for each in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        each.train()
        assert each.training and not each.bn.training and isinstance(each, Frozen)


class Frozen(ByShape):
    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.bn.eval()
        return self


def test_hooks_of_root_and_layers_run_once() -> None:
    model, x = ByShape(), torch.randn(3, 5)
    seen: list[str] = []
    model.register_forward_hook(lambda m, a, o: seen.append("root"))
    model.lin.register_forward_hook(lambda m, a, o: o + 1)
    expected = observed(model, x, False)[0]
    made = special(model, x)
    seen.clear()
    assert torch.equal(made.eval()(x).hidden, expected)
    assert seen == ["root"]


def test_generic_models_stay_generic_and_inputs_are_needed() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU())
    found = capture(model, (torch.randn(2, 5),), specialize=True)
    assert found.specialised is None and found.graphs == ("",) and not found.refusals
    assert found.module(torch.randn(7, 5)).shape == (7, 4)
    with pytest.raises(ConfigError, match="`specialize` \\(=True\\) needs `example_inputs`"):
        fxsparse.plan(model, specialize=True)


def test_the_model_and_the_generators_stay_as_they_were() -> None:
    model, x = ByShape(), torch.randn(3, 5)
    state, before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    apply, flags = torch.autograd.Function.__dict__["apply"], [m.training for m in model.modules()]
    special(model, x)
    assert torch.equal(before, torch.get_rng_state()) and torch.is_grad_enabled()
    assert torch.autograd.Function.__dict__["apply"] is apply and "training" not in nn.Module.__dict__
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_full_verification_compares_in_the_guarded_dtype() -> None:
    model, x = ByShape(), torch.randn(3, 5)
    sparse = fxsparse.transform(model, (x,), sparsity=0.5, specialize=True, verify=fxsparse.passes.Verify.FULL)
    assert set(masked_weights(sparse)) == {"w", "lin.weight"}


def test_in_place_writes_run_in_order() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 5))
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(x, self.w)
            for index in range(x.shape[0]):
                y[index] = y[index] * index
            y.view(-1).add_(1)
            self.count.add_(len(x))
            return y + self.count

    model, x = Writes(), torch.randn(3, 5)
    made = special(model, x)
    twins = copy.deepcopy(model), copy.deepcopy(made)
    for _ in range(2):
        assert torch.equal(twins[0](x), twins[1](x))
    assert float(twins[1].count) == 6.0
    sparse = fxsparse.transform(model, (x,), sparsity=0.5, specialize=True)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense.w.mul_(masked_weights(sparse)["w"].mask)
    assert torch.equal(sparse(x), dense(x))
