"""What transform compares by default, and by verify=FULL: wrong rewrites and wrong graphs are caught."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxsparse.errors import CaptureError, ConfigError, PassError
from fxsparse.graph import CapturedModule, capture
from fxsparse.graph.compare import observe
from fxsparse.nn import Linear, masks
from fxsparse.passes import SwapModules, Verify
from fxsparse.planning import plan, transform

X = torch.linspace(-2.0, 3.0, 40).reshape(8, 5)
compare = sys.modules["fxsparse.graph.compare"]


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(params=[False, True], ids=["much work", "little work"])
def work(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both kinds of models are checked, whatever their size."""
    monkeypatch.setattr(compare, "_LITTLE_WORK", 2**60 if request.param else 0)
    return bool(request.param)


class Net(nn.Module):
    """A graph and Python around it: the second layer runs in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.3)
        self.extra, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.first(x)))
        if self.training:
            x = x + self.extra(x)
        return self.last(x)


def flat() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))


def sparse_layers(module: nn.Module) -> list[Linear]:
    return [child for child in module.modules() if isinstance(child, Linear)]


class Scaled(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 1e-5)


class Detached(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.detach(), self.bias)


class Doubled(Linear):
    """The right output, twice the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight + (self.weight - self.weight.detach()), self.bias)


class Forgetful(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.detach() * 0 + self.bias if self.training else y


def scale_output(module: nn.Module) -> None:
    sparse_layers(module)[-1].__class__ = Scaled


def lose_gradient(module: nn.Module) -> None:
    sparse_layers(module)[0].__class__ = Detached


def double_gradient(module: nn.Module) -> None:
    sparse_layers(module)[0].__class__ = Doubled


def forget_in_train_mode(module: nn.Module) -> None:
    sparse_layers(module)[0].__class__ = Forgetful


def drop_norm_update(module: nn.Module) -> None:
    next(child for child in module.modules() if isinstance(child, nn.BatchNorm1d)).momentum = 0.0


class Frozen(nn.BatchNorm1d):
    """Normalises as it should and does not update its statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.running_mean.clone(), self.running_var.clone(), *self.affine_training())

    def affine_training(self) -> tuple[Any, ...]:
        return self.weight, self.bias, self.training, self.momentum, self.eps


def freeze_norm(module: nn.Module) -> None:
    next(child for child in module.modules() if isinstance(child, nn.BatchNorm1d)).__class__ = Frozen


def skip_dropout(module: nn.Module) -> None:
    next(child for child in module.modules() if isinstance(child, nn.Dropout)).p = 0.0


def shift_a_buffer(module: nn.Module) -> None:
    next(child for child in module.modules() if isinstance(child, nn.BatchNorm1d)).running_mean += 1e-6


MUTATIONS = (scale_output, lose_gradient, forget_in_train_mode, drop_norm_update, freeze_norm, skip_dropout)


def mutate(monkeypatch: pytest.MonkeyPatch, mutation: Callable[[nn.Module], None]) -> None:
    honest = SwapModules.call

    def call(self: SwapModules, module: nn.Module) -> bool:
        changed = honest(self, module)
        mutation(module)
        return changed

    monkeypatch.setattr(SwapModules, "call", call)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", [flat, Net])
@pytest.mark.parametrize("mutation", [*MUTATIONS, shift_a_buffer], ids=lambda mutation: mutation.__name__)
def test_a_wrong_rewrite_is_caught_by_default(
    mutation: Any, make: Any, training: bool, work: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch, mutation)
    model = make().train(training)
    with pytest.raises(PassError):
        transform(model, (X,))
    with pytest.raises(PassError):
        plan(model, (X,)).apply()


def test_a_wrong_gradient_is_caught_where_it_costs_little_and_by_the_full_check(
    work: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch, double_gradient)
    if work:
        with pytest.raises(PassError):
            transform(flat(), (X,))
    else:  # what the quick check leaves out, as `Verify.QUICK` says
        transform(flat(), (X,))
    with pytest.raises(PassError, match="gradient of `0.weight` differs"):
        transform(flat(), (X,), verify=Verify.FULL)
    with pytest.raises(PassError, match="gradient of `0.weight` differs"):
        plan(flat(), (X,)).apply(verify=Verify.FULL)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("verify", list(Verify))
@pytest.mark.parametrize("make", [flat, Net])
def test_an_honest_transform_passes(make: Any, verify: Verify, training: bool, work: bool) -> None:
    model = make().train(training)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    sparse = transform(model, (X,), verify=verify)
    assert sparse.training is training and masks(sparse)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(sparse.state_dict()[name], value) for name, value in state.items())


def test_the_kind_of_check_is_an_enum() -> None:
    with pytest.raises(ConfigError, match=r"`verify` \(='full'\)"):
        transform(flat(), (X,), verify="full")  # type: ignore[arg-type]


def test_a_failed_transform_in_place_leaves_no_hook_on_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, scale_output)
    model = flat()
    with pytest.raises(PassError):
        transform(model, (X,), inplace=True, sparsity=0.5)
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    assert not any((p == 0).any() for p in model.parameters() if p.ndim == 2)


def break_graphs(monkeypatch: pytest.MonkeyPatch, edit: Callable[[fx.Graph], None]) -> None:
    module = sys.modules["fxsparse.graph.capture"]
    honest = module.trace

    def trace(root: nn.Module) -> Any:
        found = honest(root)
        edit(found.graph)
        return found

    monkeypatch.setattr(module, "trace", trace)


def without_dropout(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op == "call_module" and node.target == "2":
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_graph_that_behaves_differently_goes_back_to_python(
    training: bool, work: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_graphs(monkeypatch, without_dropout)
    model = flat().train(training)
    captured = capture(model, (X,))
    assert captured.graphs == () and "behaves differently" in captured.refusals[0].reason
    assert "train mode" in captured.refusals[0].reason
    sparse = transform(model, (X,))
    assert not isinstance(sparse, CapturedModule) and set(masks(sparse)) == {"0.weight", "3.weight"}


def test_the_caller_may_compare_later() -> None:
    captured = capture(flat(), (X,), compare=False)
    assert captured.graphs == ("",) and not captured.compared and captured.reference is not None
    assert captured.reference.difference(captured.module, exact=True) is None
    assert capture(flat(), (X,)).compared


class Writes(nn.Module):
    """Writes into a parameter, a buffer and its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.weight.mul_(0.5)
        self.count.add_(1)
        y = self.layer(x)
        x.zero_()
        return y


def test_runs_leave_no_trace_in_a_model_that_writes(work: bool) -> None:
    model, x = Writes(), X.clone()
    before = model.layer.weight.detach().clone()
    recording, reference = observe(model, (x,), {})
    assert recording.written == ("layer.weight",)
    assert reference.difference(model, exact=True) is None
    assert torch.equal(model.layer.weight, before) and torch.equal(x, X) and model.count == 0
    sparse = transform(model, (x,))
    assert torch.equal(model.layer.weight, before) and torch.equal(x, X) and model.count == 0
    assert torch.equal(sparse(x.clone()), model(x.clone())) and sparse.count == 1
    assert torch.equal(sparse.layer.weight, before * 0.5)


class WritesInTrainMode(Writes):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else self.layer(x)


def test_writes_in_the_other_mode_are_undone(work: bool) -> None:
    model = WritesInTrainMode().eval()
    before = model.layer.weight.detach().clone()
    transform(model, (X.clone(),))
    assert torch.equal(model.layer.weight, before) and model.count == 0


class NeedsMoreThanOne(nn.Module):
    """Fails in train mode on the example inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(5, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


def test_a_model_that_fails_in_its_own_mode_is_recorded_in_the_other(work: bool) -> None:
    model = NeedsMoreThanOne()
    decided = plan(model, (X[:1],))
    assert decided.notes[0].startswith("train mode: the model itself raises ValueError")
    assert f"not compared: {decided.notes[0]}" in str(decided)
    sparse = transform(model, (X[:1],))
    assert sparse.training and set(masks(sparse)) == {"layer.weight"}
    assert torch.equal(sparse.eval()(X), model.eval()(X))


class Forces(nn.Module):
    """Needs gradients inside its forward pass, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        (force,) = torch.autograd.grad(self.layer(x).square().sum(), x, create_graph=True)
        return force


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_model_that_needs_gradients_inside(training: bool, work: bool) -> None:
    model, x = Forces().train(training), X.clone().requires_grad_()
    sparse = transform(model, (x,), sparsity=0.5)
    assert set(masks(sparse)) == {"layer.weight"}
    transform(model, (x,), verify=Verify.FULL)


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None
    steps: int = 3


class Odd(nn.Module):
    """Returns what `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        if self.kind == "generator":
            return (row for row in y)
        return {
            "none": None,
            "int": 3,
            "string": "text",
            "mixed": (y, None, {"a": [y, 1, 2.5]}),
            "dataclass": Output(y),
            "nested dataclass": [Output(y, y)],
        }[self.kind]


@pytest.mark.parametrize("kind", ["none", "int", "string", "mixed", "dataclass", "nested dataclass", "generator"])
def test_outputs_of_any_kind(kind: str, work: bool) -> None:
    model = Odd(kind)
    sparse = transform(model, (X,), sparsity=0.5)
    assert type(sparse(X)) is type(model(X)) and set(masks(sparse)) == {"layer.weight"}


@pytest.mark.parametrize("kind", ["dataclass", "nested dataclass", "generator"])
def test_differences_inside_unknown_containers_are_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, scale_output)
    with pytest.raises(PassError):
        transform(Odd(kind), (X,))


def test_wrong_inputs_say_what_the_model_said() -> None:
    with pytest.raises(CaptureError, match="fails on `example_inputs`.*mat1 and mat2"):
        transform(flat(), (X[:, :3],))
    with pytest.raises(CaptureError, match="fails on `example_inputs` .TypeError: .*positional argument"):
        transform(flat(), (X, X))
    with pytest.raises(CaptureError, match="fails on `example_inputs`.*unexpected keyword"):
        transform(flat(), ((X,), {"scale": 2}))
    with pytest.raises(ConfigError, match=r"`example_inputs` \(=Tensor\) must be a tuple"):
        transform(flat(), X)


def test_without_inputs_and_on_the_meta_device() -> None:
    assert set(masks(transform(flat(), sparsity=0.5))) == {"0.weight", "3.weight"}
    model = flat().to("meta")
    sparse = transform(model, (X.to("meta"),))
    assert set(masks(sparse)) == {"0.weight", "3.weight"} and sparse(X.to("meta")).shape == (8, 3)
    with pytest.raises(ConfigError, match="meta device"):
        transform(model, (X.to("meta"),), sparsity=0.5)
