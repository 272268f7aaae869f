"""Models that cannot be transformed, or only in part: typed errors that name the mend, or documented behaviour."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse.errors import CaptureError, ConfigError, DataError
from fxsparse.nn import masks
from fxsparse.planning import finalize, plan, sparsity_report, transform
from tests.torchrun import one_rank

pytestmark = pytest.mark.filterwarnings("ignore")


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def x() -> tuple[Tensor, ...]:
    return (torch.randn(3, 8),)


def trained(sparse: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        sparse(*inputs).float().square().mean().backward()
        optimizer.step()
    for name, mask in masks(sparse).items():
        assert torch.equal(sparse.get_parameter(name) == 0, ~mask), name


# --- quantised, scripted ----------------------------------------------------------------------------------------------


def quantised(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


needs_engine = pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="no quantised engine")


@needs_engine
def test_a_quantised_model_has_nothing_to_mask() -> None:
    with pytest.raises(ConfigError, match="`0`: Linear holds packed quantised weights; prune first, quantise"):
        plan(quantised(mlp()), x())


@needs_engine
def test_a_quantised_part_is_named_and_the_rest_is_masked() -> None:
    model = mlp()
    model[0] = quantised(nn.Sequential(model[0]))[0]
    decided = plan(model, x(), sparsity=0.5)
    assert "packed quantised weights" in str(decided)
    sparse = decided.apply()
    assert set(masks(sparse)) == {"2.weight"}
    trained(sparse, x())


def test_integer_parameters_are_refused_by_name() -> None:
    model = mlp()
    model.codes = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    assert set(masks(transform(model, x()))) == {"0.weight", "2.weight"}
    with pytest.raises(ConfigError, match="`codes` was asked for.*dtype is torch.int8; prune before quantising"):
        plan(model, x(), include="codes")


def test_a_scripted_model_is_refused() -> None:
    for made in (torch.jit.script(mlp()), torch.jit.trace(mlp(), x()[0])):
        with pytest.raises(CaptureError, match="scripted.*before torch.jit.script"):
            plan(made, x())


@pytest.mark.parametrize("freeze", [torch.jit.script, lambda module: torch.jit.trace(module, torch.randn(3, 8))])
def test_a_scripted_part_is_named_and_the_rest_is_masked(freeze: Callable[[nn.Module], nn.Module]) -> None:
    model = mlp()
    model[0] = freeze(model[0])
    sparse = transform(model, x(), sparsity=0.5)
    assert set(masks(sparse)) == {"2.weight"}
    assert "its module `0` is scripted" in str(sparsity_report(sparse))
    with pytest.raises(ConfigError, match="scripted"):
        plan(nn.Sequential(freeze(nn.Linear(8, 4))), x())


# --- compiled, distributed --------------------------------------------------------------------------------------------


def test_compiled_models_and_parts() -> None:
    with pytest.raises(ConfigError, match=r"`model` \(=OptimizedModule\) is compiled; give `model._orig_mod`"):
        plan(torch.compile(mlp(), backend="eager"))
    model = mlp()
    model[0] = torch.compile(model[0], backend="eager")
    with pytest.raises(ConfigError, match="`0` .*is compiled; give `model.0._orig_mod` and compile the result"):
        plan(model, x())
    for path in ("", "0"):
        model = mlp()
        model.get_submodule(path).compile(backend="eager")
        with pytest.raises(ConfigError, match=f"`{path or 'model'}` .*compiled in place; transform before"):
            plan(model, x())


def test_a_model_in_data_parallel() -> None:
    with pytest.raises(ConfigError, match="is a wrapper; give `model.module` and wrap the result"):
        plan(nn.DataParallel(mlp()))
    model = mlp()
    model[0] = nn.DataParallel(model[0])  # a part may be: it is a plain module
    sparse = transform(model, x(), sparsity=0.5)
    assert set(masks(sparse)) == {"0.module.weight", "2.weight"}
    trained(sparse, x())


@pytest.fixture
def group() -> Iterator[None]:
    with one_rank():
        yield


def test_distributed_models_and_parts(group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor

    with pytest.raises(ConfigError, match="give `model.module`"):
        plan(nn.parallel.DistributedDataParallel(mlp()), x())
    model = mlp()
    model[0] = nn.parallel.DistributedDataParallel(model[0])
    with pytest.raises(ConfigError, match="`0` .*is a wrapper; give `model.0.module`"):
        plan(model, x())
    mesh = init_device_mesh("cpu", (1,))
    model = mlp()
    fully_shard(model[0], mesh=mesh)
    with pytest.raises(ConfigError, match="`0` .*is sharded; transform before `fully_shard`"):
        plan(model, x())
    model = mlp()
    model.spread = nn.Parameter(distribute_tensor(torch.randn(4, 4), mesh, [Replicate()]))
    with pytest.raises(ConfigError, match="`spread` was asked for.*it is a DTensor; transform the model before"):
        plan(model, include="spread")
    assert set(masks(transform(model))) == {"0.weight", "2.weight"}


def test_hooks_fire_once_for_each_backward_under_data_parallel_training(group: None) -> None:
    inputs = x()
    sparse = transform(nn.Sequential(nn.Linear(8, 6), Squared(6)), inputs, sparsity=0.5)
    calls: dict[str, int] = {}
    for name, parameter in sparse.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.update({name: calls.get(name, 0) + 1}))
    wrapped = nn.parallel.DistributedDataParallel(sparse)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    for step in range(1, 3):
        optimizer.zero_grad()
        wrapped(*inputs).square().mean().backward()
        optimizer.step()
        assert set(calls.values()) == {step}
    for name, mask in masks(sparse).items():
        assert torch.equal(sparse.get_parameter(name) == 0, ~mask)
        assert not sparse.get_parameter(name).grad[~mask].any()


class Squared(nn.Module):
    """A functional weight in code that no trace takes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if x.sum() < 1e9 else x


# --- parameters of odd kinds ------------------------------------------------------------------------------------------


def test_frozen_parameters_are_masked_and_stay_frozen() -> None:
    model = nn.Sequential(nn.Linear(8, 6), Squared(6), nn.Linear(6, 4))
    for path in ("0", "1"):
        model.get_submodule(path).requires_grad_(False)
    inputs = x()
    sparse = transform(model, inputs, sparsity=0.5)
    assert [p.requires_grad for p in sparse.parameters()] == [False] * 3 + [True] * 2
    kept = {name: sparse.get_parameter(name).clone() for name in ("0.weight", "1.weight")}
    trained(sparse, inputs)
    assert all(torch.equal(sparse.get_parameter(name), value) for name, value in kept.items())
    for path in ("0", "1"):
        sparse.get_submodule(path).requires_grad_(True)  # thawed later: still masked
    trained(sparse, inputs)
    assert not any(torch.equal(sparse.get_parameter(name), value) for name, value in kept.items())


def test_parameters_that_cannot_hold_a_mask_are_refused_by_name() -> None:
    model = mlp()
    model.sparse = nn.Parameter(torch.eye(4).to_sparse())
    model[0].weight = nn.Parameter(torch.randn(8).expand(6, 8))
    model.empty = nn.Parameter(torch.empty(0, 4))
    inputs = x()
    decided = plan(model, inputs, sparsity=0.5)
    assert {weight.name for weight in decided.masked} == {"2.weight"}
    for name, match in (
        ("sparse", "layout is torch.sparse_coo; store it dense"),
        ("0.weight", r"share one place in memory \(expanded\); give it its own by `.contiguous\(\)`"),
        ("empty", "no elements; leave it out"),
    ):
        with pytest.raises(ConfigError, match=f"`{name}` was asked for and cannot be masked.*{match}"):
            plan(model, inputs, include=name)
    sparse = decided.apply()
    assert set(masks(sparse)) == {"2.weight"}
    model[0].weight = nn.Parameter(model[0].weight.detach().contiguous())  # the mend
    model.sparse = nn.Parameter(model.sparse.detach().to_dense())
    assert set(masks(transform(model, inputs, include=["0.weight", "sparse"]))) == {"0.weight", "sparse"}


def test_a_layer_without_outputs_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 0))
    assert set(masks(transform(model, x(), sparsity=0.5))) == {"0.weight"}


def test_weights_of_other_strides() -> None:
    model = mlp()
    model[0].weight = nn.Parameter(torch.randn(8, 6).t())
    model[2].weight = nn.Parameter(torch.randn(4, 12)[:, ::2])
    inputs = x()
    sparse = transform(model, inputs, sparsity=0.5)
    trained(sparse, inputs)
    assert len(masks(sparse)) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128])
def test_weights_of_every_floating_dtype(dtype: torch.dtype) -> None:
    model, inputs = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).to(dtype), (torch.randn(3, 8).to(dtype),)
    sparse = transform(model, inputs, sparsity=0.5)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        sparse(*inputs).abs().square().mean().backward()
        optimizer.step()
    assert all(torch.equal(sparse.get_parameter(name) == 0, ~mask) for name, mask in masks(sparse).items())
    assert finalize(sparse)[0].weight.dtype is dtype


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 2] = value
        model[2].weight[0, 0] = -value
    with pytest.raises(DataError, match="`2.weight` holds 2 NaN or infinite"):
        plan(model, x(), sparsity=0.5)


def test_finite_values_whose_sum_is_not() -> None:
    model = mlp().half()
    with torch.no_grad():
        model[0].weight.fill_(60000.0)
    assert set(masks(transform(model, sparsity=0.5))) == {"0.weight", "2.weight"}


def test_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(CaptureError, match="`0.weight` has no shape yet.*run one forward pass before"):
        plan(model, x())
    model(*x())  # the mend
    assert set(masks(transform(model, x(), sparsity=0.5))) == {"0.weight"}


def test_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 6), Squared(6))
    with pytest.raises(ConfigError, match="`0.weight` is on the meta device.*use `sparsity` 0"):
        plan(model, sparsity=0.5, include=["0", "1"])
    sparse = transform(model, include=["0", "1"])
    assert all(mask.is_meta for mask in masks(sparse).values())
    sparse.to_empty(device="cpu")
    filled = nn.Sequential(nn.Linear(8, 6), Squared(6))
    state = transform(filled, x(), sparsity=0.5, include=["0", "1"]).state_dict()
    sparse.load_state_dict(state)
    assert all(int(mask.sum()) == mask.numel() // 2 for mask in masks(sparse).values())


# --- forwards that write ----------------------------------------------------------------------------------------------


class Renormed(nn.Module):
    """Its forward writes into its weight and counts in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        with torch.no_grad():
            self.layer.weight.mul_(0.9).add_(0.01)
        return self.layer(x)


def test_a_forward_that_writes_into_its_weight_never_sees_dead_entries() -> None:
    model, inputs = Renormed(), x()
    before = copy.deepcopy(model.state_dict())
    decided = plan(model, inputs, sparsity=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "writes into it" in next(weight for weight in decided.masked).reason
    sparse = decided.apply()
    mask = masks(sparse)["layer.weight"]
    weight = sparse.layer.weight.detach().clone()
    expected = F.linear(inputs[0], (weight * 0.9 + 0.01) * mask, sparse.layer.bias)
    torch.testing.assert_close(sparse(*inputs), expected)
    assert float(sparse.calls) == 1


def test_shared_modules_have_one_mask_under_all_names() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 8))
    model.alias = shared
    inputs = x()
    sparse = transform(model, inputs, sparsity=0.5)
    assert set(masks(sparse)) == {"0.weight", "3.weight"}
    assert sparse[0] is sparse[2] is sparse.alias
    trained(sparse, inputs)


def test_a_generator_is_masked_without_a_comparison() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Iterator[Tensor]:
            yield self.layer(x)
            yield x

    inputs = x()
    sparse = transform(Stream(), inputs, sparsity=0.5)
    assert set(masks(sparse)) == {"layer.weight"}
    assert len(list(sparse(*inputs))) == 2
