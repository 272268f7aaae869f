"""Masks beside parameters: installing, loading, guarding, removing."""

import copy
import gc
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse.nn as fnn
from fxsparse.errors import ConfigError
from fxsparse.nn import DenseGradients, Guard, MaskSpec, Route
from fxsparse.nn.slot import SLOTS, GradientHook
from fxsparse.sparsity import NByM, SharedSupport, Unstructured

PARAMETER = MaskSpec(route=Route.PARAMETER, guard=Guard.GRADIENT)


def half(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


class Reader(nn.Module):
    """Reads its own parameter by a functional call, and its child's from outside."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, dtype=dtype))
        self.child = nn.Linear(3, 4, dtype=dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input @ self.kernel, self.child.weight)


def guarded_reader(**kwargs: torch.dtype) -> Reader:
    model = Reader(**kwargs)
    fnn.install_mask(model, "kernel", PARAMETER, half(4, 3))
    fnn.install_mask(model.child, "weight", PARAMETER, half(4, 3, seed=1))
    return model


def hooks_on(parameter: nn.Parameter) -> int:
    return len(parameter._post_accumulate_grad_hooks or ())


# Installing


def test_install_adds_one_buffer_and_zeroes():
    model = Reader()
    mask, before = half(4, 3), model.kernel.detach().clone()
    parameter = model.kernel
    fnn.install_mask(model, "kernel", mask=mask)
    assert model.kernel is parameter and torch.equal(parameter, torch.where(mask, before, 0.0))
    assert list(model.state_dict()) == ["kernel", "kernel_mask", "child.weight", "child.bias"]
    assert model.kernel_mask.dtype is torch.bool and model.kernel_mask is not mask
    assert fnn.mask_spec(model, "kernel") == MaskSpec()
    assert fnn.mask_spec(model, "other") is None and fnn.mask_spec(model.child, "weight") is None


@pytest.mark.parametrize(
    ("attribute", "spec", "mask", "message"),
    [
        ("missing", None, None, "`missing` is not a parameter of Reader"),
        ("child", None, None, "`child` is not a parameter"),
        ("kernel", None, torch.ones(3, 4, dtype=torch.bool), r"`kernel` \(=\(3, 4\)\).*\(4, 3\)"),
        ("kernel", None, torch.ones(4, 3), r"`kernel` \(=torch.float32\).*bool"),
        ("kernel", None, [[True]], r"`kernel` \(=list\).*bool"),
        ("kernel", MaskSpec(NByM(2, 4, axis=0)), half(4, 3), "`kernel`.*NByM"),
        ("kernel", MaskSpec(NByM(2, 4)), None, "`kernel`"),
    ],
)
def test_install_refuses_and_changes_nothing(attribute, spec, mask, message):
    model = Reader()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        fnn.install_mask(model, attribute, spec, mask)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert SLOTS not in model.__dict__ and not model._load_state_dict_pre_hooks


def test_install_refuses_what_has_no_mask_to_take():
    model = guarded_reader()
    with pytest.raises(ConfigError, match="has a mask already"):
        fnn.install_mask(model, "kernel")
    model.taken = nn.Parameter(torch.zeros(2))
    model.taken_mask = "mine"
    with pytest.raises(ConfigError, match="`taken_mask`.*taken"):
        fnn.install_mask(model, "taken")
    model.counts = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    with pytest.raises(ConfigError, match=r"`counts`.*torch.int64.*floating"):
        fnn.install_mask(model, "counts")
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="parametrization"):
        fnn.install_mask(layer, "weight")
    with pytest.raises(ConfigError, match="no mask"):
        fnn.remove_mask(nn.Linear(2, 2), "weight")
    with pytest.raises(ConfigError, match="no mask"):
        fnn.set_guard(nn.Linear(2, 2), "weight", Guard.GRADIENT)


def test_a_parameter_route_needs_the_gradient_guard():
    with pytest.raises(ConfigError, match="Guard.GRADIENT"):
        MaskSpec(route=Route.PARAMETER)


def test_remove_mask_restores_the_plain_module():
    model = guarded_reader()
    plain = Reader()
    kernel = model.kernel
    mask = model.kernel_mask
    with torch.no_grad():
        model.kernel[~mask] = 5.0
    fnn.remove_mask(model, "kernel")
    fnn.remove_mask(model.child, "weight")
    assert model.kernel is kernel and torch.equal(kernel == 0, ~mask)
    assert set(model.__dict__) == set(plain.__dict__) and set(model.child.__dict__) == set(plain.child.__dict__)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not model._load_state_dict_pre_hooks and not model._load_state_dict_post_hooks
    assert hooks_on(kernel) == 0
    model.load_state_dict(plain.state_dict())
    model(torch.randn(2, 4, dtype=torch.float64)).sum().backward()
    assert kernel.grad.all()


# Loading


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_dense_checkpoints_load_and_masks_stay(strict, assign):
    model, checkpoint = guarded_reader(), Reader().state_dict()
    kept = {name: mask.clone() for name, mask in fnn.masks(model).items()}
    buffers = [model.kernel_mask, model.child.weight_mask]
    checkpoint = {name: value.clone() for name, value in checkpoint.items()}
    original = {name: value.clone() for name, value in checkpoint.items()}
    result = model.load_state_dict(checkpoint, strict=strict, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert list(checkpoint) == list(original)
    assert buffers[0] is model.kernel_mask and buffers[1] is model.child.weight_mask
    for name, mask in fnn.masks(model).items():
        assert torch.equal(mask, kept[name])
        assert torch.equal(model.get_parameter(name), torch.where(mask, original[name], 0.0))
    assert torch.equal(model.child.bias, original["child.bias"])
    model(torch.randn(2, 4, dtype=torch.float64)).sum().backward()
    assert torch.equal(model.kernel.grad == 0, ~model.kernel_mask)  # the guard watches the present parameter


@pytest.mark.parametrize("assign", [False, True])
def test_sparse_checkpoints_reload_exactly_in_place(assign):
    source, model = guarded_reader(), Reader()
    fnn.set_masks(source, {"kernel": half(4, 3, seed=7), "child.weight": half(4, 3, seed=8)})
    fnn.install_mask(model, "kernel", PARAMETER)
    fnn.install_mask(model.child, "weight", PARAMETER)
    buffer, storage = model.kernel_mask, model.kernel_mask.data_ptr()
    stream = io.BytesIO()
    torch.save(source.state_dict(), stream)
    stream.seek(0)
    model.load_state_dict(torch.load(stream, weights_only=True), assign=assign)
    assert model.kernel_mask is buffer and buffer.data_ptr() == storage
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    input = torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(model(input), source(input))
    model(input).sum().backward()
    assert not model.kernel.grad[~source.kernel_mask].any()


def test_missing_weights_are_still_missing():
    model = guarded_reader()
    with pytest.raises(RuntimeError, match='Missing key.*"kernel"'):
        model.load_state_dict({})
    with pytest.raises(RuntimeError, match='Unexpected key.*"stray"'):
        model.load_state_dict({**Reader().state_dict(), "stray": torch.zeros(1)})


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 3), "torch.float32"),
        (torch.ones(3, 4, dtype=torch.bool), r"\(3, 4\)"),
        (torch.tensor([[True, False, False]] * 3 + [[False] * 3]), "SharedSupport"),
    ],
)
def test_wrong_masks_in_a_checkpoint_are_refused_and_the_masks_stay(mask, message):
    model = Reader()
    good = torch.tensor([[True, False, True]] * 4)
    fnn.install_mask(model, "kernel", MaskSpec(SharedSupport(4)), good)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({**model.state_dict(), "kernel_mask": mask})
    assert torch.equal(model.kernel_mask, good) and not model.kernel[~good].any()


def test_a_meta_model_materialises_from_a_checkpoint():
    source = guarded_reader()
    with torch.device("meta"):
        model = Reader()
        fnn.install_mask(model, "kernel", PARAMETER)
        fnn.install_mask(model.child, "weight", PARAMETER)
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model.kernel_mask, source.kernel_mask)
    model(torch.randn(2, 4, dtype=torch.float64)).sum().backward()
    assert not model.kernel.grad[~source.kernel_mask].any() and not model.kernel[~source.kernel_mask].any()
    with torch.device("meta"):
        model = Reader()
    fnn.install_mask(model, "kernel", PARAMETER)
    model.to_empty(device="cpu")
    model.load_state_dict({"kernel_mask": half(4, 3), **Reader().state_dict()})
    assert torch.equal(model.kernel == 0, ~half(4, 3))


def test_row_orders_are_saved_with_the_mask():
    order = torch.tensor([3, 1, 0, 2])
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[[3, 1], 0], mask[[0, 2], 2] = True, True
    spec = MaskSpec(SharedSupport(2))
    source, model = Reader(), Reader()
    with pytest.raises(ConfigError, match="SharedSupport"):
        fnn.install_mask(source, "kernel", spec, mask)  # legal in that order only
    fnn.install_mask(source, "kernel", spec, mask, order)
    assert fnn.mask_spec(source, "kernel").row_order == "kernel_row_order"
    assert torch.equal(fnn.masked_weights(source)["kernel"].row_order, order)
    fnn.install_mask(model, "kernel", spec)
    model.load_state_dict(source.state_dict())
    assert torch.equal(model.kernel_row_order, order) and torch.equal(model.kernel_mask, mask)
    assert "kernel_row_order" in model.state_dict()
    model.load_state_dict(Reader().state_dict())
    assert torch.equal(model.kernel_row_order, order) and torch.equal(model.kernel == 0, ~mask)
    weight = fnn.masked_weights(model)["kernel"]
    natural = torch.tensor([[True, False, False]] * 2 + [[False, True, False]] * 2)
    with pytest.raises(ConfigError, match="SharedSupport"):
        weight.set_mask_(natural)
    weight.set_mask_(natural, torch.arange(4))
    assert torch.equal(model.kernel_row_order, torch.arange(4)) and torch.equal(model.kernel_mask, natural)
    with pytest.raises(ConfigError, match="row"):
        weight.set_mask_(natural, torch.zeros(4, dtype=torch.int64))
    fnn.remove_mask(model, "kernel")
    assert not hasattr(model, "kernel_row_order")
    plain = Reader()
    with pytest.raises(ConfigError, match="row order|row_order"):
        fnn.install_mask(plain, "kernel", MaskSpec(Unstructured()), mask, order)


# The guard of the gradient


def train(model: nn.Module, steps: int = 5, **options: float) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, **options)
    for step in range(steps):
        optimizer.zero_grad()
        source = torch.Generator().manual_seed(step)
        model(torch.randn(5, 4, generator=source, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_dead_weights_stay_zero_and_alive_ones_train_as_in_a_masked_forward():
    model = guarded_reader()
    reference = Reader()
    reference.load_state_dict({name: model.state_dict()[name] for name in reference.state_dict()})
    masks = dict(fnn.masks(model))

    class Masked(Reader):
        def forward(self, input):
            kernel, weight = self.kernel * masks["kernel"], self.child.weight * masks["child.weight"]
            return F.linear(input @ kernel, weight)

    reference.__class__ = Masked
    for ours, theirs in zip(train(model), train(reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) == 0, ~mask)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "structural"])
def test_copies_are_guarded_without_running_them_first(how):
    model = guarded_reader()
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif how == "save":
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    else:
        memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        other = copy.deepcopy(model, memo)
        assert other.kernel is model.kernel and other.kernel_mask is model.kernel_mask
        del model
        gc.collect()
    masks = {name: mask.clone() for name, mask in fnn.masks(other).items()}
    assert hooks_on(other.kernel) == 1 and hooks_on(other.child.weight) == 1
    train(other)
    for name, mask in masks.items():
        assert torch.equal(other.get_parameter(name) == 0, ~mask)
    if how != "structural":
        assert other.kernel is not model.kernel
        fnn.set_masks(other, {"kernel": torch.ones(4, 3, dtype=torch.bool)})
        assert not torch.equal(model.kernel_mask, other.kernel_mask)


def test_a_twin_may_go_while_the_other_stays_guarded():
    model = guarded_reader()
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo)
    fnn.remove_mask(twin, "kernel")
    assert hooks_on(model.kernel) == 1 and "kernel_mask" in model._buffers
    train(model, steps=1)
    assert torch.equal(model.kernel == 0, ~model.kernel_mask)
    fnn.remove_mask(model, "kernel")
    assert hooks_on(model.kernel) == 0


def test_the_guard_ends_with_its_module():
    model = guarded_reader()
    kernel, mask = model.kernel, model.kernel_mask
    del model
    kernel.square().sum().backward()
    (kernel * 1.0).sum().backward()
    assert kernel.grad[~mask].all()


def test_frozen_parameters_are_guarded_once_they_thaw():
    model = Reader()
    model.kernel.requires_grad_(False)
    fnn.install_mask(model, "kernel", PARAMETER, half(4, 3))
    assert not model.kernel.requires_grad
    model.kernel.requires_grad_(True)
    model(torch.randn(2, 4, dtype=torch.float64)).sum().backward()
    assert torch.equal(model.kernel.grad == 0, ~model.kernel_mask)


def test_guarded_gradients_are_collected_dense_over_micro_batches():
    model = guarded_reader()
    inputs = [torch.randn(2, 4, dtype=torch.float64) for _ in range(3)]
    with DenseGradients() as gradients:
        for input in inputs:
            model(input).square().sum().backward()
    total = model.kernel.grad.clone()
    free = copy.deepcopy(model)
    fnn.remove_mask(free, "kernel")
    free.zero_grad()
    for input in inputs:
        free(input).square().sum().backward()
    torch.testing.assert_close(gradients.read(model.kernel_mask), free.kernel.grad, rtol=1e-12, atol=1e-12)
    assert torch.equal(total, torch.where(model.kernel_mask, gradients.read(model.kernel_mask), 0.0))
    assert gradients.read(model.kernel_mask)[~model.kernel_mask].all()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_create_graph_keeps_a_differentiable_masked_gradient():
    model = guarded_reader()
    model(torch.randn(2, 4, dtype=torch.float64)).pow(3).sum().backward(create_graph=True)
    gradient = model.kernel.grad
    assert gradient.requires_grad and torch.equal(gradient == 0, ~model.kernel_mask)
    (second,) = torch.autograd.grad(gradient.square().sum(), model.kernel)
    assert second.abs().sum() > 0
    model.zero_grad()


def test_sparse_gradients_of_embeddings():
    table = nn.Embedding(6, 4, sparse=True)
    mask = half(6, 4)
    fnn.install_mask(table, "weight", PARAMETER, mask)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    with DenseGradients() as gradients:
        table(torch.tensor([1, 1, 4])).sum().backward()
    assert table.weight.grad.is_sparse
    dense = torch.zeros(6, 4)
    dense[1], dense[4] = 2.0, 1.0
    assert torch.equal(table.weight.grad.to_dense(), dense * mask)
    assert torch.equal(gradients.read(table.weight_mask), dense)
    optimizer.step()
    assert torch.equal(table.weight == 0, ~mask)


def test_guard_can_change():
    layer = fnn.Linear(4, 3, mask=half(3, 4))
    assert hooks_on(layer.weight) == 0
    fnn.set_guard(layer, "weight", Guard.GRADIENT)
    assert hooks_on(layer.weight) == 1 and layer.effective_weight is layer.weight
    layer(torch.randn(2, 4)).sum().backward()
    assert torch.equal(layer.weight.grad == 0, ~layer.weight_mask)
    fnn.set_guard(layer, "weight", Guard.FORWARD)
    assert hooks_on(layer.weight) == 0 and layer.effective_weight is not layer.weight


def test_one_hook_however_often_it_is_bound():
    model = guarded_reader()
    for _ in range(3):
        fnn.masked_weights(model)
        fnn.set_masks(model, {"kernel": half(4, 3, seed=2)})
        model.load_state_dict(model.state_dict())
    assert hooks_on(model.kernel) == 1
    assert len(GradientHook.of(model.kernel)._slots) == 1


def test_a_replaced_parameter_is_guarded_again():
    model = guarded_reader()
    old = model.kernel
    model.kernel = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    fnn.masked_weights(model)
    assert hooks_on(old) == 0 and hooks_on(model.kernel) == 1


def test_requires_grad_and_rng_are_left_alone():
    model = Reader()
    state = torch.get_rng_state()
    fnn.install_mask(model, "kernel", PARAMETER, half(4, 3))
    fnn.set_masks(model, {"kernel": half(4, 3, seed=1)})
    assert torch.equal(state, torch.get_rng_state())


def test_a_copied_graph_module_keeps_its_masks():
    """torch's own deep copy of a GraphModule drops plain attributes."""

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return x @ self.weight.t()

    graph = torch.fx.symbolic_trace(Functional())
    before = dict(graph.meta)
    mask = torch.rand(4, 3) > 0.5
    fnn.install_mask(graph, "weight", MaskSpec(), mask)
    copied = copy.deepcopy(graph)
    assert torch.equal(fnn.masked_weights(copied)["weight"].mask, mask)
    fnn.masked_weights(copied)["weight"].set_mask_(torch.ones_like(mask))
    assert torch.equal(fnn.masked_weights(graph)["weight"].mask, mask)
    fnn.remove_mask(graph, "weight")
    assert dict(graph.meta) == before and not fnn.masked_weights(copy.deepcopy(graph))
