"""masked_weight and DenseGradients against definitions written out by hand."""

import gc
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fxsparse.nn as fnn
from fxsparse.nn import DenseGradients, masked_weight
from fxsparse.nn.functional import collecting

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), max_size=4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    density=st.sampled_from((0.0, 0.5, 1.0)),
)
def test_values_and_gradients(shape, dtype, seed, density):
    source = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=source, dtype=torch.float64).to(dtype).requires_grad_()
    mask = torch.rand(shape, generator=source) < density
    with torch.no_grad():
        weight.view(-1)[0] = -0.0
        weight[~mask] = math.nan
    result = masked_weight(weight, mask)
    assert result.dtype is dtype and result.shape == weight.shape
    expected = [value if alive else 0.0 for value, alive in zip(weight.flatten().tolist(), mask.flatten(), strict=True)]
    assert [str(value) for value in result.flatten().tolist()] == [
        str(torch.tensor(v, dtype=dtype).item()) for v in expected
    ]
    upstream = torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)
    result.backward(upstream)
    assert torch.equal(weight.grad, upstream * mask)  # upstream is finite, so the product is exact


def test_full_mask_is_the_identity_bit_for_bit():
    weight = torch.tensor([-0.0, 0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45])
    result = masked_weight(weight, torch.ones(7, dtype=torch.bool))
    assert torch.equal(result.view(torch.int32), weight.view(torch.int32))


def test_dead_entries_read_as_positive_zero():
    weight = torch.tensor([-0.0, -math.inf, math.nan, -3.0])
    result = masked_weight(weight, torch.zeros(4, dtype=torch.bool))
    assert torch.equal(result.view(torch.int32), torch.zeros(4, dtype=torch.int32))


def test_one_node_for_tracers_and_modes():
    mask = torch.rand(7, 5) < 0.5
    layer = fnn.Linear(5, 7, mask=mask)
    traced = torch.fx.symbolic_trace(layer)
    nodes = [node for node in traced.graph.nodes if node.target is masked_weight]
    assert len(nodes) == 1 and [argument.target for argument in nodes[0].args] == ["weight", "weight_mask"]
    assert not any(node.target is torch.where for node in traced.graph.nodes)
    input = torch.randn(2, 5)
    assert torch.equal(traced(input), layer(input))

    seen = []

    class Spy(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Spy():
        layer(input)
    assert masked_weight in seen and torch.where not in seen


def test_float64_gradcheck():
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 4) < 0.6
    assert torch.autograd.gradcheck(lambda w: masked_weight(w, mask) ** 2, (weight,))
    assert torch.autograd.gradgradcheck(lambda w: masked_weight(w, mask) ** 3, (weight,))


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's forward mode uses it
def test_torch_func_transforms():
    mask = torch.rand(3, 4) < 0.5
    layer = fnn.Linear(4, 3, dtype=torch.float64, mask=mask)
    inputs = torch.randn(5, 4, dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(values, input):
        return functional_call(layer, values, (input,)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, inputs)
    for index, input in enumerate(inputs):
        layer.zero_grad()
        layer(input).square().sum().backward()
        torch.testing.assert_close(per_sample["weight"][index], layer.weight.grad, rtol=1e-12, atol=1e-12)
    assert not per_sample["weight"][:, ~mask].any()

    direction = torch.randn(3, 4, dtype=torch.float64)
    value, tangent = jvp(lambda w: masked_weight(w, mask), (parameters["weight"],), (direction,))
    assert torch.equal(tangent, torch.where(mask, direction, 0.0))

    stacked = torch.randn(6, 3, 4, dtype=torch.float64)
    assert torch.equal(vmap(lambda w: masked_weight(w, mask))(stacked), torch.where(mask, stacked, 0.0))


def test_functional_call_does_not_touch_the_module_and_may_replace_the_mask():
    layer = fnn.Linear(4, 3, mask=torch.rand(3, 4) < 0.5)
    other = torch.randn(3, 4)
    full = torch.ones(3, 4, dtype=torch.bool)
    input = torch.randn(2, 4)
    result = functional_call(layer, {"weight": other, "weight_mask": full}, (input,))
    assert torch.equal(result, F.linear(input, other, layer.bias))


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_holds_the_mask(strict):
    mask = torch.rand(3, 4) < 0.5
    layer = fnn.Linear(4, 3, mask=mask)
    program = torch.export.export(layer, (torch.randn(2, 4),), strict=strict)
    assert set(program.state_dict) == {"weight", "bias", "weight_mask"}
    with torch.no_grad():
        layer.weight[~mask] = math.nan
    input = torch.randn(2, 4)
    assert torch.equal(program.module()(input), layer(input))
    convolution = fnn.ConvTranspose2d(2, 3, 3, mask=torch.rand(2, 3, 3, 3) < 0.5)
    image = torch.randn(1, 2, 5, 5)
    program = torch.export.export(convolution, (image,), strict=strict)
    assert torch.equal(program.module()(image), convolution(image))


def test_autocast_computes_low_and_keeps_float32_gradients():
    mask = torch.rand(7, 5) < 0.5
    dense = nn.Linear(5, 7)
    layer = fnn.Linear.from_dense(dense, mask=mask)
    input = torch.randn(3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16), DenseGradients() as gradients:
        output = layer(input)
        assert output.dtype is torch.bfloat16 and torch.equal(output, dense(input))
        output.float().sum().backward()
    assert layer.weight.grad.dtype is torch.float32
    assert torch.equal(layer.weight.grad, gradients.read(layer.weight_mask) * mask)


def dense_gradient(layer: nn.Module, inputs: list[torch.Tensor]) -> torch.Tensor:
    """The gradient at a free copy of the effective weight, summed over uses."""
    weight = torch.where(layer.weight_mask, layer.weight, 0.0).detach().requires_grad_()
    for input in inputs:
        F.linear(input, weight, layer.bias.detach()).square().sum().backward()
    return weight.grad


def test_collects_uses_and_micro_batches():
    layer = fnn.Linear(4, 3, dtype=torch.float64, mask=torch.rand(3, 4) < 0.5)
    inputs = [torch.randn(2, 4, dtype=torch.float64) for _ in range(3)]
    gradients = DenseGradients()
    gradients.start()
    (layer(inputs[0]).square().sum() + layer(inputs[1]).square().sum()).backward()
    layer(inputs[2]).square().sum().backward()
    gradients.stop()
    expected = dense_gradient(layer, inputs)
    assert expected[~layer.weight_mask].all()
    torch.testing.assert_close(gradients.read(layer.weight_mask), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(layer.weight.grad, expected * layer.weight_mask, rtol=1e-13, atol=0)
    layer(inputs[0]).sum().backward()  # stopped: nothing is added
    torch.testing.assert_close(gradients.read(layer.weight_mask), expected, rtol=1e-13, atol=0)
    gradients.clear()
    assert gradients.read(layer.weight_mask) is None


def test_clipping_in_place_does_not_reach_the_sums():
    layer = fnn.Linear(4, 3, mask=torch.rand(3, 4) < 0.5)
    input = torch.randn(2, 4)
    with DenseGradients() as gradients:
        layer(input).square().sum().backward()
        expected = gradients.read(layer.weight_mask).clone()
        nn.utils.clip_grad_norm_(layer.parameters(), 1e-3)
        layer.zero_grad(set_to_none=False)
    assert torch.equal(gradients.read(layer.weight_mask), expected)


def test_sums_own_their_values():
    weight, mask, upstream = torch.ones(3, requires_grad=True), torch.ones(3, dtype=torch.bool), torch.ones(3)
    with DenseGradients() as gradients:
        masked_weight(weight, mask).backward(upstream)
    upstream.zero_()
    assert torch.equal(gradients.read(mask), torch.ones(3))


def test_selects_masks_and_nests():
    first, second = fnn.Linear(4, 4), fnn.Linear(4, 4)
    outer, inner = DenseGradients(), DenseGradients([second.weight_mask])
    with outer:
        with inner:
            assert collecting() == (outer, inner)
            second(first(torch.randn(2, 4))).sum().backward()
        assert collecting() == (outer,)
    assert collecting() == ()
    assert inner.read(first.weight_mask) is None
    assert torch.equal(inner.read(second.weight_mask), outer.read(second.weight_mask))
    assert torch.equal(outer.read(first.weight_mask), first.weight.grad)


def test_stops_after_an_exception_and_starts_once():
    gradients = DenseGradients()
    with pytest.raises(RuntimeError), gradients:
        gradients.start()
        assert collecting() == (gradients,) and gradients.active
        raise RuntimeError
    assert collecting() == () and not gradients.active


def test_pending_graph_of_a_stopped_collector_adds_nothing():
    layer = fnn.Linear(4, 3)
    gradients = DenseGradients()
    with gradients:
        loss = layer(torch.randn(2, 4)).sum()
    loss.backward()
    assert gradients.read(layer.weight_mask) is None


def test_inactive_collection_leaves_no_hook():
    layer = fnn.Linear(4, 3)
    assert layer.effective_weight._backward_hooks is None
    with DenseGradients():
        assert layer.effective_weight._backward_hooks
        with torch.no_grad():
            assert layer.effective_weight._backward_hooks is None
        layer.weight.requires_grad_(False)
        assert layer.effective_weight._backward_hooks is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant):
    layer = fnn.Linear(4, 4, dtype=torch.float64, mask=torch.rand(4, 4) < 0.5)
    input = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    with DenseGradients() as gradients:
        checkpoint(layer, input, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(
        gradients.read(layer.weight_mask), dense_gradient(layer, [input.detach()]), rtol=1e-13, atol=0
    )


def test_torch_func_inside_a_collector_is_left_alone():
    layer = fnn.Linear(4, 3)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    with DenseGradients() as gradients:
        grad(lambda values: functional_call(layer, values, (torch.randn(2, 4),)).sum())(parameters)
    assert gradients.read(layer.weight_mask) is None


def test_sums_die_with_their_mask():
    layer = fnn.Linear(4, 3)
    with DenseGradients() as gradients:
        layer(torch.randn(2, 4)).sum().backward()
    assert len(gradients._sums) == 1
    del layer
    gc.collect()
    assert len(gradients._sums) == 0


def test_sink_is_the_key():
    weight, mask, sink = (
        torch.randn(3, requires_grad=True),
        torch.ones(3, dtype=torch.bool),
        torch.zeros(3, dtype=torch.bool),
    )
    with DenseGradients() as gradients:
        masked_weight(weight, mask, sink).sum().backward()
    assert gradients.read(mask) is None and torch.equal(gradients.read(sink), torch.ones(3))


def test_compiled_layers_do_not_recompile_on_mask_edits():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = nn.Sequential(fnn.Linear(4, 8), nn.ReLU(), fnn.Linear(8, 3))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    input = torch.randn(2, 4)
    compiled(input)
    for seed in range(3):
        source = torch.Generator().manual_seed(seed)
        chosen = {name: torch.rand(mask.shape, generator=source) < 0.5 for name, mask in fnn.masks(model).items()}
        fnn.set_masks(model, chosen)
        assert torch.equal(compiled(input), model(input))
    assert len(graphs) == 1


@pytest.mark.parametrize("named", [False, True])
def test_compiled_layers_can_be_collected(named):
    torch._dynamo.reset()
    layer = fnn.Linear(4, 3, dtype=torch.float64, mask=torch.rand(3, 4) < 0.5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    inputs = [torch.randn(2, 4, dtype=torch.float64) for _ in range(3)]
    compiled(inputs[0]).sum().backward()  # compiled while nothing collects
    with (
        torch.compiler.set_stance("fail_on_recompile"),
        DenseGradients([layer.weight_mask] if named else None) as found,
    ):
        for input in inputs[:2]:
            compiled(input).square().sum().backward()
        layer(inputs[2]).square().sum().backward()
    compiled(inputs[0]).sum().backward()
    torch.testing.assert_close(found.read(layer.weight_mask), dense_gradient(layer, inputs), rtol=1e-13, atol=0)
    found.clear()
    assert found.read(layer.weight_mask) is None


def test_compiled_transforms_of_masked_layers():
    layer = fnn.Linear(4, 3, dtype=torch.float64, mask=torch.rand(3, 4) < 0.5)
    values, input = dict(layer.named_parameters()), torch.randn(5, 4, dtype=torch.float64)

    def loss(values, input):
        return functional_call(layer, values, (input,)).square().sum()

    def tangent():
        change = layer.weight.detach() + 1
        return jvp(lambda weight: loss({**values, "weight": weight}, input), (layer.weight.detach(),), (change,))[1]

    for found in (
        lambda: grad(loss)(values, input)["weight"],
        lambda: vmap(grad(loss), (None, 0))(values, input)["weight"],
    ):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(found, backend="aot_eager")(), found(), rtol=1e-12, atol=1e-14)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(tangent, backend="aot_eager")(), tangent(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_full_mask_changes_no_bit_of_inputs_with_any_strides(context, frozen):
    dense = nn.Linear(8, 5, dtype=torch.float64)
    sparse = fnn.Linear(8, 5, dtype=torch.float64)
    sparse.load_state_dict(dense.state_dict(), strict=False)
    for layer in (dense, sparse):
        layer.requires_grad_(not frozen)
    for seed in range(20):
        source = torch.Generator().manual_seed(seed)
        input = torch.randn(4, 8, 3, generator=source, dtype=torch.float64).transpose(1, 2)
        with context():
            assert torch.equal(sparse(input), dense(input))
            assert sparse(input).requires_grad == dense(input).requires_grad
            assert sparse.effective_weight.requires_grad is not frozen


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_other_machinery_takes_masked_weights_as_before(context):
    layer, input = fnn.Linear(8, 5), torch.randn(4, 3, 8)
    layer.weight_mask[0] = False
    expected = layer(input).detach()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    values = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    with context():
        assert torch.equal(compiled(input), expected) and torch.equal(fx.symbolic_trace(layer)(input), expected)
        close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
        close(vmap(layer)(input), expected)
        close(vmap(lambda x: functional_call(layer, values, x))(input), expected)
        assert grad(lambda each: functional_call(layer, each, input).sum())(values)["weight"].shape == (5, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(input).dtype is torch.bfloat16
            assert not layer.effective_weight.requires_grad  # autocast would keep the cast of each
    with torch.no_grad():
        assert torch.equal(torch.export.export(layer, (input,)).module()(input), expected)
        assert torch.equal(torch.jit.trace(layer, (input,))(input), expected)
    with context():
        made_here = fnn.Linear(8, 5)
        assert made_here(input).shape == (4, 3, 5)


def test_a_collector_that_nobody_holds_ends():
    gradients = DenseGradients()
    gradients.start()
    del gradients
    gc.collect()
    assert collecting() == ()
