"""Generated models: what `transform` promises, against slow oracles.

`FXSPARSE_EXAMPLES=5000` runs thousands (see tests/generated.py).
"""

from __future__ import annotations

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxsparse.nn import masks
from fxsparse.planning import plan, transform
from fxsparse.sparsity import Layout, Unstructured
from fxsparse.testing import PLAIN, Program, programs
from fxsparse.training import Initial, Static, attach
from tests.generated import (
    Planned,
    anything,
    assert_close,
    assert_dead_are_zero,
    assert_same_function,
    assert_same_outputs,
    call,
    evaluated,
    examples,
    loss,
    masked_at_parameters,
    multiplied,
    planned,
    trained,
    with_dead_zeroed,
)

PRODUCT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)


@examples(50)
@given(anything())
def test_at_sparsity_zero_nothing_changes(program: Program) -> None:
    model, inputs = program.model(), program.inputs()
    sparse = transform(model, inputs)
    assert masks(sparse) and all(mask.all() for mask in masks(sparse).values())
    for given_inputs in (inputs, program.inputs(batch=program.batch + 4, seed=program.seed + 1)):
        assert_same_function(sparse, model, given_inputs)
        for training in (False, True):
            found, expected = trained(sparse, given_inputs, training), trained(model, given_inputs, training)
            assert_same_outputs(found.outputs, expected.outputs)
            assert_close(found.gradients, expected.gradients)
            assert_close(found.buffers, expected.buffers, 0.0)


@examples(50)
@given(anything())
def test_every_weight_is_masked_or_named_with_a_reason(program: Program) -> None:
    model, inputs = program.model(), program.inputs()
    decided = plan(model, inputs, sparsity=0.5)
    listed = {weight.name: weight for weight in decided.weights}
    assert listed.keys() >= {name for name, p in model.named_parameters() if p.ndim >= 2}
    assert all(weight.reason for weight in decided.weights)
    sparse = decided.apply()
    assert masks(sparse).keys() == {name for name, weight in listed.items() if weight.route is not None}
    first = {id(p): name for name, p in model.named_parameters()}
    ran = _layers_that_ran(model, inputs)
    for module in ran:
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            assert first[id(module.in_proj_weight)] in masks(sparse)
        depthwise = 1 < getattr(module, "groups", 1) == getattr(module, "in_channels", None)
        if type(module) in PRODUCT_LAYERS and not depthwise and "parametrizations" not in module._modules:
            weight = listed[first[id(module.weight)]]
            tied_to_table = any(
                getattr(other, "weight", None) is module.weight for other in ran if isinstance(other, nn.Embedding)
            )
            assert weight.route is not None or tied_to_table, weight
    for name in masks(sparse):
        assert 0 < int(masks(sparse)[name].sum()) < masks(sparse)[name].numel() or masks(sparse)[name].numel() < 3, name


def _layers_that_ran(model: nn.Module, inputs: object) -> list[nn.Module]:
    twin, ran = copy.deepcopy(model), []
    paths = {id(module): path for path, module in twin.named_modules()}
    handles = [
        module.register_forward_hook(lambda module, args, output: ran.append(paths[id(module)]))
        for module in twin.modules()
    ]
    call(twin, inputs)
    for handle in handles:
        handle.remove()
    return [model.get_submodule(path) for path in dict.fromkeys(ran)]


@examples(60)
@given(planned())
def test_a_sparse_model_computes_with_the_masked_weights(drawn: Planned) -> None:
    model, inputs = drawn.model, drawn.inputs
    sparse = drawn.plan.apply()
    assert_same_function(model, drawn.program.model(), inputs)  # the model stayed as it was
    if not masked_at_parameters(sparse):  # `weight * mask` is no oracle for computed weights
        return
    assert_dead_are_zero(sparse)
    for name, mask in masks(sparse).items():
        (weight,) = (weight for weight in drawn.plan.weights if weight.name == name)
        weight.pattern.check(mask, weight.layout or Layout())
        assert weight.pattern != Unstructured() or int(mask.sum()) == weight.target.alive
    zeroed = with_dead_zeroed(model, sparse)
    for given_inputs in (inputs, drawn.other_inputs()):
        assert_same_function(sparse, zeroed, given_inputs)
        found, expected = trained(sparse, given_inputs), multiplied(model, sparse, given_inputs)
        for a, b in zip(found.outputs, expected.outputs, strict=True):
            assert_close({"output": a}, {"output": b})
        assert_close(found.gradients, expected.gradients)
        assert_close(found.buffers, expected.buffers)
        dense = trained(zeroed, given_inputs).gradients
        for name, gradient in found.gradients.items():
            expected_gradient = (
                torch.where(masks(sparse)[name], dense[name], 0) if name in masks(sparse) else dense[name]
            )
            assert_close({name: gradient}, {name: expected_gradient})


@examples(50)
@given(planned(), st.booleans(), st.booleans())
def test_dead_weights_stay_dead_through_optimizer_steps(drawn: Planned, adam: bool, attached: bool) -> None:
    sparse, inputs = drawn.plan.apply().train(), drawn.inputs
    if not masked_at_parameters(sparse):  # `weight * mask` is no oracle for computed weights
        return
    held = {name: mask.clone() for name, mask in masks(sparse).items()}
    optimizer = (
        torch.optim.AdamW(sparse.parameters(), lr=0.01)
        if adam
        else torch.optim.SGD(sparse.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    )
    handle = attach(sparse, optimizer, Static(initial=Initial.KEEP)) if attached else None
    before = {name: sparse.get_parameter(name).detach().clone() for name in held}
    reached = set()
    for _ in range(3):
        optimizer.zero_grad()
        loss(call(sparse, inputs)).backward()
        reached |= {name for name in held if sparse.get_parameter(name).grad is not None}
        optimizer.step()
        for name, mask in masks(sparse).items():
            assert torch.equal(mask, held[name])
            assert not sparse.get_parameter(name).detach()[~mask].any(), name
    if handle is not None:
        handle.detach()
    for name in reached:
        moved = sparse.get_parameter(name).detach() != before[name]
        assert not moved[~held[name]].any() and (moved[held[name]].any() or not held[name].any()), name


@examples(25)
@given(planned(programs(ingredients=PLAIN)))
def test_half_precision_runs(drawn: Planned) -> None:
    sparse = drawn.plan.apply().bfloat16()
    half = tuple(x.bfloat16() if x.is_floating_point() else x for x in drawn.inputs)
    try:
        expected = evaluated(drawn.model.bfloat16(), half)
    except RuntimeError:  # torch has no such operation in half precision
        return
    found = evaluated(sparse, half)
    assert [a.dtype for a in found] == [b.dtype for b in expected]
    assert_dead_are_zero(sparse)
    run = trained(sparse, half)
    for name, mask in masks(sparse).items():
        assert name not in run.gradients or not run.gradients[name][~mask].any(), name
