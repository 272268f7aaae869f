"""Properties of transform, masks, fold and passes over generated models."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxsparse.errors import ConfigError
from fxsparse.nn import Route, SparseModule, masked_weight, masks, set_masks
from fxsparse.passes import FoldMasks, graphs_of
from fxsparse.planning import finalize, plan, sparsity_report, transform
from fxsparse.sparsity import ERK, Global, Pattern, Uniform, Unstructured, keep_count
from fxsparse.testing import TRACEABLE, Ingredient, densities, models, patterns, shapes, sparsities
from tests.strategies import OPTIMIZERS, Optimizer, optimizers

generated = settings(
    max_examples=15,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # models are small; shrinking them takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
GRAPHS = TRACEABLE - {Ingredient.ATTENTION, Ingredient.SUBCLASS, Ingredient.TYING, Ingredient.OUTSIDE}
"""Models of which a graph sees every use of every weight that is masked by default."""
Drawn = tuple[nn.Module, tuple[Tensor, ...]]


def masked_models() -> st.SearchStrategy[Drawn]:
    """Models whose masks are all of parameters, none of a weight that is computed from them."""
    return models().filter(lambda drawn: all(w.route is not Route.EFFECTIVE for w in plan(*drawn).weights))


def outputs(model: nn.Module, inputs: tuple[Tensor, ...], training: bool) -> Tensor:
    twin = copy.deepcopy(model).train(training)  # batch norm moves its buffers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return twin(*inputs).detach()


def gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    twin = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        result = twin(*inputs)
    (result * torch.linspace(-1, 2, result.numel(), dtype=result.dtype).reshape(result.shape)).sum().backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def written(model: nn.Module) -> tuple[object, ...]:
    """Everything that a transform must not change, by value."""
    return (
        [(path, type(module).__name__, module.training) for path, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters(remove_duplicate=False)],
        [(name, value.detach().numpy().tobytes()) for name, value in model.state_dict().items()],
        [(path, found.code, str(found.graph)) for path, found in graphs_of(model).items()],
        [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
        [sorted(vars(module)) for module in model.modules()],
    )


def assert_zeros_are_dead(model: nn.Module) -> None:
    for name, mask in masks(model).items():
        weight = model.get_parameter(name).detach()
        assert not weight[~mask].any(), name
        assert int((weight == 0).sum()) == int((~mask).sum()) + int((weight[mask] == 0).sum())


@generated
@given(masked_models())
def test_at_sparsity_zero_outputs_are_bit_identical_and_gradients_equal(drawn: Drawn) -> None:
    model, inputs = drawn
    before = written(model)
    sparse = transform(model, inputs)
    assert written(model) == before
    assert masks(sparse) and all(mask.all() for mask in masks(sparse).values())
    for training in (False, True):
        assert torch.equal(outputs(model, inputs, training), outputs(sparse, inputs, training))
    old, new = gradients(model, inputs), gradients(sparse, inputs)
    assert old.keys() == new.keys()
    for name in old:
        torch.testing.assert_close(new[name], old[name], rtol=1e-12, atol=1e-12 * float(old[name].abs().max()))


@generated
@given(masked_models(), sparsities(), st.booleans())
def test_masked_model_equals_the_model_with_zeros_written_in(drawn: Drawn, sparsity: float, known: bool) -> None:
    model, inputs = drawn
    try:
        sparse = transform(model, inputs if known else None, sparsity=sparsity)
    except ConfigError as error:  # nothing but functional uses in untraceable code is known without inputs
        assert not known and "no weight" in str(error)
        return
    oracle = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks(sparse).items():
            assert int(mask.sum()) == keep_count(mask.numel(), sparsity)
            oracle.get_parameter(name).mul_(mask)
    for training in (False, True):
        assert torch.equal(outputs(oracle, inputs, training), outputs(sparse, inputs, training))
    old = gradients(oracle, inputs)
    for name, gradient in gradients(sparse, inputs).items():
        expected = torch.where(masks(sparse)[name], old[name], 0.0) if name in masks(sparse) else old[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-12 * (1 + float(old[name].abs().max())))


@generated
@given(masked_models(), sparsities())
def test_fold_after_mask_is_mask(drawn: Drawn, sparsity: float) -> None:
    model, inputs = drawn
    sparse = transform(model, inputs, sparsity=sparsity)
    before = written(sparse)
    dense = finalize(sparse)
    assert written(sparse) == before
    for training in (False, True):
        assert torch.equal(outputs(sparse, inputs, training), outputs(dense, inputs, training))
    for name, mask in masks(sparse).items():
        assert torch.equal(dense.get_parameter(name), torch.where(mask, sparse.get_parameter(name), 0.0))
    assert not masks(dense) and not any(isinstance(module, SparseModule) for module in dense.modules())
    assert all(node.target is not masked_weight for g in graphs_of(dense).values() for node in g.graph.nodes)
    assert list(dense.state_dict()) == list(model.state_dict())
    assert FoldMasks()(dense).modified is False


@generated
@given(masked_models())
def test_every_pass_leaves_its_input_untouched(drawn: Drawn) -> None:
    model, inputs = drawn
    decided = plan(model, inputs)
    module = decided.captured
    for each in (*decided.pipeline().passes, FoldMasks()):
        before = written(module)[:4]  # all but the guards of shared parameters, which act only for their own module
        buffers = {name: id(buffer) for name, buffer in module.named_buffers(remove_duplicate=False)}
        result = each(module, inputs)
        assert written(module)[:4] == before
        assert buffers == {name: id(buffer) for name, buffer in module.named_buffers(remove_duplicate=False)}
        assert result.module is not module and result.verification.compared
        for name, parameter in module.named_parameters(remove_duplicate=False):
            assert result.module.get_parameter(name) is parameter
        module = result.module
    assert [n for n in module.state_dict()] == [n for n in model.state_dict()]


@generated
@given(masked_models(), sparsities(), optimizers(), st.integers(1, 4))
def test_dead_weights_stay_zero_under_any_optimizer(
    drawn: Drawn, sparsity: float, optimizer: Optimizer, steps: int
) -> None:
    model, inputs = drawn
    sparse = transform(model, inputs, sparsity=sparsity)
    stepper = optimizer(sparse.parameters())
    with torch.random.fork_rng(devices=[]):
        for _ in range(steps):
            stepper.zero_grad()
            result = sparse(*inputs)
            (result * torch.linspace(-1, 2, result.numel(), dtype=result.dtype).reshape(result.shape)).sum().backward()
            stepper.step()
            assert_zeros_are_dead(sparse)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda made: made.func.__name__)
def test_each_optimizer_moves_alive_weights(optimizer: Optimizer) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
        x = torch.randn(4, 6)
    sparse = transform(model, (x,), sparsity=0.5)
    start = {name: sparse.get_parameter(name).detach().clone() for name in masks(sparse)}
    stepper = optimizer(sparse.parameters())
    for _ in range(3):
        stepper.zero_grad()
        sparse(x).pow(2).sum().backward()
        stepper.step()
    assert_zeros_are_dead(sparse)
    for name, mask in masks(sparse).items():
        assert (sparse.get_parameter(name) != start[name])[mask].all()


@generated
@given(masked_models(), sparsities())
def test_copies_pickles_and_state_dicts_carry_everything(drawn: Drawn, sparsity: float) -> None:
    model, inputs = drawn
    sparse = transform(model, inputs, sparsity=sparsity)
    fresh = transform(copy.deepcopy(model), inputs, sparsity=0.0)
    fresh.load_state_dict(sparse.state_dict())
    for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse)), fresh):
        assert torch.equal(outputs(sparse, inputs, True), outputs(twin, inputs, True))
        assert all(torch.equal(mask, masks(twin)[name]) for name, mask in masks(sparse).items())
        for name, gradient in gradients(twin, inputs).items():
            assert name not in masks(twin) or not gradient[~masks(twin)[name]].any()


@generated
@given(masked_models(), sparsities())
def test_dense_checkpoints_load_strictly_and_masks_stay(drawn: Drawn, sparsity: float) -> None:
    model, inputs = drawn
    sparse = transform(model, inputs, sparsity=sparsity)
    state = {name: torch.full_like(value, 2) for name, value in model.state_dict().items()}
    kept = {name: mask.clone() for name, mask in masks(sparse).items()}
    sparse.load_state_dict(state)
    assert all(torch.equal(mask, kept[name]) for name, mask in masks(sparse).items())
    assert_zeros_are_dead(sparse)
    for name, mask in masks(sparse).items():
        assert (sparse.get_parameter(name)[mask] == 2).all()


@generated
@given(masked_models(), st.integers(0, 2**16), st.data())
def test_set_masks_is_what_masks_returns(drawn: Drawn, seed: int, data: st.DataObject) -> None:
    model, inputs = drawn
    sparse = transform(model, inputs)
    generator = torch.Generator().manual_seed(seed)
    drawn_masks = {name: torch.rand(m.shape, generator=generator) < 0.5 for name, m in masks(sparse).items()}
    chosen = data.draw(st.sets(st.sampled_from(sorted(drawn_masks))))
    note(f"set {sorted(chosen)}")
    set_masks(sparse, {name: drawn_masks[name] for name in chosen})
    for name, mask in masks(sparse).items():
        assert torch.equal(mask, drawn_masks[name]) if name in chosen else mask.all()
    assert_zeros_are_dead(sparse)
    rows = {row.name: row for row in sparsity_report(sparse).masked}
    assert rows.keys() == masks(sparse).keys()
    assert all(rows[name].alive == int(mask.sum()) for name, mask in masks(sparse).items())


class OneWeight(nn.Module):
    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        kind = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d}[len(shape)]
        kernel = () if len(shape) == 2 else (shape[2:],)
        self.layer = kind(shape[1], shape[0], *kernel, bias=False, dtype=torch.float64)
        with torch.no_grad():  # many ties
            self.layer.weight.copy_(torch.randint(-3, 4, shape, generator=generator).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@settings(max_examples=60, deadline=None)
@given(shapes(max_side=6), densities(), st.integers(0, 99), st.data())
def test_alive_counts_are_exact_for_every_pattern(
    shape: tuple[int, ...], density: float, seed: int, data: st.DataObject
) -> None:
    sparsity = min(1.0 - density, 0.999999)
    pattern = data.draw(patterns(shape, sparsity=sparsity))
    assume(0 not in shape)
    sparse = transform(OneWeight(shape, seed), sparsity=sparsity, pattern=pattern)
    mask = masks(sparse)["layer.weight"]
    pattern.check(mask)
    assert int(mask.sum()) == expected_alive(pattern, shape, sparsity, mask)
    if isinstance(pattern, Unstructured):
        weight = OneWeight(shape, seed).layer.weight.detach().abs().flatten().tolist()
        best = sorted(range(len(weight)), key=lambda i: (-weight[i], i))[: keep_count(len(weight), sparsity)]
        assert sorted(best) == mask.flatten().nonzero().flatten().tolist()


def expected_alive(pattern: Pattern, shape: tuple[int, ...], sparsity: float, mask: Tensor) -> int:
    """Counts by the definitions, slowly."""
    numel, kind = math.prod(shape), type(pattern).__name__
    if sparsity == 0:
        return numel
    if kind == "Unstructured":
        return keep_count(numel, sparsity)
    if kind == "NByM":
        return numel * pattern.n // pattern.m
    if kind == "Channel":
        return keep_count(shape[pattern.axis], sparsity) * numel // shape[pattern.axis]
    if kind == "ConstantFanIn":
        return shape[0] * min(numel // shape[0], keep_count(numel, sparsity) // shape[0])
    if kind == "SharedSupport":
        return shape[0] * keep_count(shape[1], sparsity) * math.prod(shape[2:])
    blocks = 0
    for top in range(0, shape[0], pattern.height):
        for left in range(0, shape[1], pattern.width):
            block = mask[top : top + pattern.height, left : left + pattern.width]
            assert block.all() or not block.any()
            blocks += int(block.all())
    across = math.ceil(shape[0] / pattern.height) * math.ceil(shape[1] / pattern.width)
    assert blocks == keep_count(across, sparsity)
    return int(mask.sum())


@generated
@given(masked_models(), sparsities(), st.sampled_from((Uniform(), ERK(), Global())))
def test_budgets_of_distributions(drawn: Drawn, sparsity: float, distribution: object) -> None:
    model, inputs = drawn
    elements = [weight.numel for weight in plan(model, inputs).masked]
    if isinstance(distribution, Global) and sparsity and keep_count(sum(elements), sparsity) < len(elements):
        with pytest.raises(ConfigError, match="min_alive"):
            plan(model, inputs, sparsity=sparsity, distribution=distribution)
        return
    decided = plan(model, inputs, sparsity=sparsity, distribution=distribution)
    sparse = decided.apply()
    for weight in decided.masked:
        assert int(masks(sparse)[weight.name].sum()) == weight.target.alive >= 1
    total = sum(weight.numel for weight in decided.masked)
    alive = sum(weight.target.alive for weight in decided.masked)
    if isinstance(distribution, Global):
        assert alive == keep_count(total, sparsity)
    else:
        assert alive == sum(keep_count(weight.numel, sparsity) for weight in decided.masked)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(models(traceable=False))
def test_models_that_no_tracer_takes_lose_no_weight(drawn: Drawn) -> None:
    model, inputs = drawn
    decided = plan(model, inputs)
    assert decided.refusals
    assert {w.name for w in decided.weights} == {n for n, p in model.named_parameters() if p.ndim >= 2}
    assert all(weight.reason for weight in decided.weights)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(models(ingredients=GRAPHS))
def test_traceable_models_are_masked_in_modules_and_graphs_only(drawn: Drawn) -> None:
    model, inputs = drawn
    decided = plan(model, inputs)
    assert {weight.route for weight in decided.masked} <= {Route.MODULE, Route.MASK_NODE, Route.EFFECTIVE}
    assert not decided.refusals
