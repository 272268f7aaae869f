"""Models and settings that transforms are known to break on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError, PassError
from fxsparse.nn import Linear, masks
from fxsparse.planning import finalize, plan, transform


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def with_zeros(model: nn.Module, sparse: nn.Module) -> nn.Module:
    oracle = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks(sparse).items():
            oracle.get_parameter(name).mul_(mask)
    return oracle


def test_the_fast_path_of_the_transformer_reads_true_zeros() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 8)
    sparse = transform(model, (x,), sparsity=0.5)
    assert len(masks(sparse)) == 8
    with torch.no_grad():  # the fast path runs without gradients only
        assert torch.equal(with_zeros(model, sparse)(x), sparse(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=dtype), nn.Linear(4, 2, dtype=dtype))
    x = torch.randn(3, 4).to(dtype)
    sparse = transform(model, (x,), sparsity=0.5)
    assert torch.equal(sparse(x), with_zeros(model, sparse)(x)) and sparse(x).dtype is dtype
    assert all(p.dtype is dtype for p in sparse.parameters())


def test_frozen_weights_stay_frozen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    sparse = transform(model, (torch.randn(2, 4),), sparsity=0.5)
    assert [p.requires_grad for p in sparse.parameters()] == [False, False, True, True]


def test_strides_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    sparse = transform(model, (x,), sparsity=0.5)
    assert sparse.get_parameter("0.weight").is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(sparse(x), with_zeros(model, sparse)(x))


def test_export_and_compile_take_the_result() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).eval()
    x = torch.randn(2, 1, 6, 6)
    sparse = transform(model, (x,), sparsity=0.5)
    exported = torch.export.export(sparse, (x,)).module()
    torch.testing.assert_close(exported(x), sparse(x), rtol=0, atol=0)
    compiled = torch.compile(sparse, backend="eager")
    torch.testing.assert_close(compiled(x), sparse(x), rtol=0, atol=0)


def test_functional_transforms_take_the_result() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    x = torch.randn(5, 4)
    sparse = transform(model, (x,), sparsity=0.5)
    weights = dict(sparse.named_parameters())

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(sparse, values, (row,)).sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    assert not each["0.weight"][:, ~masks(sparse)["0.weight"]].any()


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList([torch.randn(4, 4) for _ in range(3)])
        self.heads = nn.ParameterDict({"a": torch.randn(4, 2)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(x @ layer)
        return x @ self.heads["a"]


def test_parameter_lists_and_dicts_stay_lists_and_dicts() -> None:
    model, x = Lists(), torch.randn(2, 4)
    sparse = transform(model, (x,), sparsity=0.5)
    assert set(masks(sparse)) == {"layers.0", "layers.1", "layers.2", "heads.a"}
    assert len(sparse.layers) == 3 and list(sparse.heads) == ["a"]
    assert torch.equal(sparse(x), with_zeros(model, sparse)(x))


def test_a_graph_module_of_the_users_is_taken() -> None:
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    x = torch.randn(2, 3)
    sparse = transform(model, (x,), sparsity=0.5)
    assert torch.equal(sparse(x), with_zeros(model, sparse)(x))
    assert torch.equal(finalize(sparse)(x), sparse(x))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_a_module_under_two_names_stays_one() -> None:
    x = torch.randn(2, 4)
    sparse = transform(Shared(), (x,), sparsity=0.5)
    assert sparse.a is sparse.b and set(masks(sparse)) == {"a.weight"}
    dense = finalize(sparse)
    assert dense.a is dense.b and type(dense.a) is nn.Linear


class KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, *, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return self.layer(x) if shift is None else self.layer(x) + shift


def test_keyword_only_and_optional_inputs() -> None:
    model, x = KeywordOnly(), torch.randn(2, 3)
    sparse = transform(model, ((), {"x": x}), sparsity=0.5)
    assert torch.equal(sparse(x=x, shift=torch.ones(2)), with_zeros(model, sparse)(x=x, shift=torch.ones(2)))


def test_a_sparse_root_is_finalized() -> None:
    dense = finalize(Linear(4, 3, mask=torch.ones(3, 4, dtype=torch.bool)))
    assert type(dense) is nn.Linear


def test_inference_tensors_are_refused() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ConfigError, match="`0.weight` was made under torch.inference_mode"):
        transform(model)


def test_quantised_parts_are_named() -> None:
    class Linear(nn.Module):  # stands for torch.ao.nn.quantized.Linear, whose making is deprecated
        pass

    Linear.__module__ = "torch.ao.nn.quantized.modules.linear"
    model = nn.Sequential(Linear(), nn.Linear(3, 3))
    (refusal,) = plan(model).refusals
    assert refusal.path == "0" and "quantised" in refusal.reason


class Drifting(nn.Module):
    """Never gives the same output twice."""

    count = 0

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        Drifting.count += 1
        return self.layer(x) + float(Drifting.count)


def test_a_result_that_cannot_be_compared_is_not_passed_over_in_silence() -> None:
    with pytest.warns(UserWarning, match="could not be compared with the model: .*repeat itself"):
        transform(Drifting(), (torch.randn(2, 3),))


class TypeReader(nn.Module):
    """Asks for the exact type of its layer, which a swap changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.layer) is nn.Linear and x.sum() != 0.5:
            return self.layer(x)
        return self.layer(x) * 2


def test_a_rewrite_that_changes_the_function_is_refused_with_the_name_of_the_pass() -> None:
    with pytest.raises(PassError, match="^swap_modules: eval mode: output 0 differs"):
        transform(TypeReader(), (torch.randn(2, 3),))


def test_transforming_twice_in_place_needs_no_copy() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    first = transform(model, inplace=True)
    second = transform(finalize(first, inplace=True), inplace=True, sparsity=0.5)
    assert second.get_parameter("0.weight") is model[0].weight
    assert torch.equal(model[0].weight == 0, ~masks(second)["0.weight"])
