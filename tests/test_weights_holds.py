"""What holds for every masked model: modes, hooks, copies, states, half precision, compiling, functional transforms."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsparse.nn import masks, set_masks
from fxsparse.planning import finalize, transform
from tests.weight_cases import PLAIN, WeightCase, gradients, train

pytestmark = pytest.mark.filterwarnings("ignore")

SOME = tuple(
    case
    for case in PLAIN
    if case.name
    in ("subclasses", "functional", "conv1d", "batched experts", "self attention", "gru", "lstm cell", "tied")
)
some = pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
plain = pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)


class Block(nn.Module):
    """Batch norm and dropout, a layer, and a functional weight in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.mix = nn.Parameter(torch.randn(6, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.stem(x)).relu()).mean(2)
        if x.shape[0] > 999:
            return x
        return self.head(x @ self.mix)


def built() -> tuple[nn.Module, Tensor, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Block().double(), torch.randn(4, 3, 6).double()
        return model, x, transform(model, (x,), sparsity=0.6)


def with_zeros(model: nn.Module, sparse: nn.Module) -> nn.Module:
    oracle = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks(sparse).items():
            oracle.get_parameter(name).mul_(mask)
    return oracle


def test_modes_norms_and_dropout_are_those_of_the_model() -> None:
    model, x, sparse = built()
    oracle = with_zeros(model, sparse)
    for training in (True, False, True, False):
        sparse.train(training), oracle.train(training)
        assert sparse.norm.training is sparse.drop.training is training
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            expected = oracle(x)
            torch.manual_seed(1)
            assert torch.equal(sparse(x), expected)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(getattr(sparse.norm, name), getattr(oracle.norm, name))


def test_hooks_from_before_and_from_after_fire_once() -> None:
    model, x, _ = built()
    calls: list[str] = []

    def noting(what: str) -> Any:
        return lambda *args: calls.append(what)

    for path in ("", "stem", "head", "drop"):
        model.get_submodule(path).register_forward_hook(noting(f"before {path}"))
    sparse = transform(model.eval(), (x,), sparsity=0.5)
    calls.clear()
    handles = [
        sparse.get_submodule(path).register_forward_hook(noting(f"after {path}"))
        for path in ("", "stem", "head", "drop")
    ]
    handles += [sparse.stem.register_full_backward_hook(noting("backward stem"))]
    handles += [sparse.get_parameter(name).register_hook(noting(f"grad {name}")) for name in ("stem.weight", "mix")]
    sparse(x).sum().backward()
    expected = [f"{when} {path}" for path in ("", "stem", "head", "drop") for when in ("before", "after")]
    assert sorted(calls) == sorted([*expected, "backward stem", "grad stem.weight", "grad mix"])
    calls.clear()
    for handle in handles:
        handle.remove()
    sparse(x).sum().backward()
    assert sorted(calls) == sorted(f"before {path}" for path in ("", "stem", "head", "drop"))
    assert all(torch.equal(sparse.get_parameter(name) == 0, ~mask) for name, mask in masks(sparse).items())


@plain
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "twice"])
def test_copies_are_equal_and_independent(case: WeightCase, how: str) -> None:
    model, inputs = case()
    sparse = transform(model, inputs, sparsity=0.6, **case.options)
    twin = {
        "deepcopy": lambda: copy.deepcopy(sparse),
        "pickle": lambda: pickle.loads(pickle.dumps(sparse)),
        "twice": lambda: copy.deepcopy(pickle.loads(pickle.dumps(sparse))),
    }[how]()
    assert torch.equal(twin(*inputs), sparse(*inputs))
    kept = {name: value.clone() for name, value in sparse.state_dict().items()}
    train(twin, inputs, "adamw")
    for name, mask in masks(twin).items():
        assert torch.equal(twin.get_parameter(name) == 0, ~mask), name
    set_masks(twin, {name: torch.zeros_like(mask) for name, mask in masks(twin).items()})
    assert all(torch.equal(value, kept[name]) for name, value in sparse.state_dict().items())
    train(sparse, inputs, "adamw")
    assert all(torch.equal(sparse.get_parameter(name) == 0, ~mask) for name, mask in masks(sparse).items())


@some
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(case: WeightCase, dtype: torch.dtype) -> None:
    model, inputs = case()
    sparse = transform(model, inputs, sparsity=0.6, **case.options).to(dtype)
    low = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    oracle = with_zeros(model.to(dtype), sparse)
    assert torch.equal(sparse(*low), oracle(*low)) and sparse(*low).dtype is dtype
    assert all(mask.dtype is torch.bool for mask in masks(sparse).values())
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        sparse(*low).float().square().mean().backward()
        optimizer.step()
    for name, mask in masks(sparse).items():
        assert not sparse.get_parameter(name)[~mask].any() and not sparse.get_parameter(name).grad[~mask].any()


@some
def test_autocast(case: WeightCase) -> None:
    model, inputs = case()
    model, inputs = model.float(), tuple(x.float() if x.is_floating_point() else x for x in inputs)
    sparse = transform(model, inputs, sparsity=0.6, **case.options)
    oracle = with_zeros(model, sparse)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sparse(*inputs), oracle(*inputs))
        sparse(*inputs).float().square().mean().backward()
    for name, mask in masks(sparse).items():
        assert not sparse.get_parameter(name).grad[~mask].any()


@pytest.mark.parametrize("name", ["functional", "self attention", "batched experts"])
def test_a_compiled_result_is_one_graph_and_trains(name: str) -> None:
    case = next(case for case in PLAIN if case.name == name)
    model, inputs = case()
    sparse = transform(model, inputs, sparsity=0.6, **case.options)
    torch._dynamo.reset()
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), sparse(*inputs), rtol=1e-10, atol=1e-10)
    expected = gradients(sparse, inputs)
    found = gradients(compiled, inputs)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[f"_orig_mod.{key}"], gradient, rtol=1e-9, atol=1e-9)
    train(compiled, inputs, "adamw")
    for key, mask in masks(sparse).items():
        assert torch.equal(sparse.get_parameter(key) == 0, ~mask)
    fewer = {
        key: mask & (torch.arange(mask.numel()).reshape(mask.shape) % 2 > 0) for key, mask in masks(sparse).items()
    }
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(*inputs)
        set_masks(sparse, fewer)
        after = compiled(*inputs)
    torch.testing.assert_close(after, sparse(*inputs), rtol=1e-10, atol=1e-10)


@some
def test_functional_transforms(case: WeightCase) -> None:
    model, inputs = case()
    sparse = transform(model, inputs, sparsity=0.6, **case.options)
    oracle = with_zeros(model, sparse)
    values = {name: parameter.detach().clone() for name, parameter in sparse.named_parameters()}

    def loss(found: nn.Module, each: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(found, each, inputs).square().sum()

    mine, slow = torch.func.grad(lambda v: loss(sparse, v))(values), torch.func.grad(lambda v: loss(oracle, v))(values)
    for name, gradient in slow.items():
        mask = masks(sparse).get(name, torch.ones_like(gradient, dtype=torch.bool))
        torch.testing.assert_close(mine[name][mask], gradient[mask], rtol=1e-10, atol=1e-10)


def test_per_sample_gradients() -> None:
    model, x, sparse = built()
    sparse.eval()
    values = {name: parameter.detach() for name, parameter in sparse.named_parameters()}
    buffers = dict(sparse.named_buffers())

    def loss(each: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(sparse, {**each, **buffers}, (row[None],)).square().sum()

    every = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    for sample in range(len(x)):
        sparse.zero_grad()
        sparse(x[sample : sample + 1]).square().sum().backward()
        for name, parameter in sparse.named_parameters():
            mask = masks(sparse).get(name, torch.ones_like(parameter, dtype=torch.bool))
            torch.testing.assert_close(every[name][sample][mask], parameter.grad[mask], rtol=1e-9, atol=1e-11)


@plain
def test_other_batch_sizes(case: WeightCase) -> None:
    model, inputs = case()
    sparse = transform(model, inputs, sparsity=0.6, **case.options)
    oracle = with_zeros(model, sparse)
    for copies in (2, 3):
        larger = tuple(torch.cat([x] * copies) for x in inputs)
        assert torch.equal(sparse(*larger), oracle(*larger))


@some
def test_devices_and_dtypes_come_back(case: WeightCase) -> None:
    model, inputs = case()
    sparse = transform(model, inputs, sparsity=0.6, **case.options)
    expected = {name: mask.clone() for name, mask in masks(sparse).items()}
    sparse.to("cpu").float().double()
    assert all(torch.equal(mask, expected[name]) for name, mask in masks(sparse).items())
    train(sparse, inputs, "sgd")
    assert all(torch.equal(sparse.get_parameter(name) == 0, ~mask) for name, mask in masks(sparse).items())
    assert not masks(finalize(sparse))
