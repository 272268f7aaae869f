"""masked_weights, masks, set_masks and tied parameters."""

import copy
import pickle
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxsparse.nn as fnn
from fxsparse.errors import ConfigError
from fxsparse.nn import DenseGradients, Guard, MaskSpec, Route
from fxsparse.sparsity import Mask, NByM


def half(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def network() -> nn.Sequential:
    mask = torch.tensor([[True, True, False, False] * 2] * 4)
    return nn.Sequential(
        fnn.Conv1d(1, 4, 3),
        nn.BatchNorm1d(4),
        nn.Flatten(),
        fnn.Linear(8, 4, pattern=NByM(2, 4), mask=mask),
        nn.Linear(4, 2),
    )


class LanguageModel(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, dtype=torch.float64)
        self.head = nn.Linear(4, 7, bias=False, dtype=torch.float64)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens))


def tied(mask: torch.Tensor | None = None) -> LanguageModel:
    model = LanguageModel()
    model.head = fnn.Linear.from_dense(model.head, mask=mask)
    fnn.tie_masks(model)
    return model


# Names


def test_masked_weights_in_parameter_order():
    model = network()
    weights = fnn.masked_weights(model)
    assert list(weights) == ["0.weight", "3.weight"]
    weight = weights["3.weight"]
    assert weight.name == "3.weight" and weight.names == ("3.weight",)
    assert weight.weight is model[3].weight and weight.mask is model[3].weight_mask
    assert weight.spec is model[3].mask_spec and weight.owners == ((model[3], "weight"),) and weight.row_order is None
    for name in fnn.masks(model):
        assert model.get_parameter(name) is weights[name].weight


def test_masks_is_a_read_only_view():
    model = network()
    masks = fnn.masks(model)
    assert isinstance(masks, Mapping) and masks["0.weight"] is model[0].weight_mask
    with pytest.raises(TypeError):
        masks["0.weight"] = torch.ones(1)
    assert dict(fnn.masks(nn.Linear(2, 2))) == {}


def test_a_module_used_twice_is_one_weight():
    layer = fnn.Linear(4, 4, mask=half(4, 4))
    model = nn.Sequential(layer, nn.ReLU(), layer)
    weights = fnn.masked_weights(model)
    assert list(weights) == ["0.weight"] and weights["0.weight"].names == ("0.weight", "2.weight")
    assert len(weights["0.weight"].owners) == 1
    with DenseGradients() as gradients:
        model(torch.randn(3, 4)).sum().backward()
    assert torch.equal(layer.weight.grad, gradients.read(layer.weight_mask) * layer.weight_mask)


# Setting


def test_set_masks_in_place_and_zero():
    model = network()
    buffer, storage = model[0].weight_mask, model[0].weight_mask.data_ptr()
    mask = half(4, 1, 3)
    fnn.set_masks(model, {"0.weight": mask})
    assert model[0].weight_mask is buffer and buffer.data_ptr() == storage
    assert torch.equal(model[0].weight == 0, ~mask)
    fnn.set_masks(model, {"0.weight": Mask(~mask)})  # grown weights start at zero, newly dead ones become zero
    assert torch.equal(model[0].weight_mask, ~mask) and not model[0].weight.any()
    fnn.set_masks(model, {})


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), density=st.floats(0, 1))
def test_dead_entries_are_zero_after_any_series_of_masks(seed, density):
    source = torch.Generator().manual_seed(seed)
    layer = fnn.Conv2d(3, 4, 2)
    for _ in range(3):
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=source))
        mask = torch.rand(layer.weight.shape, generator=source) < density
        fnn.set_masks(layer, {"weight": mask})
        assert torch.equal(layer.weight == 0, ~mask) and torch.equal(layer.weight_mask, mask)


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        ("3.wieght", half(4, 8), "`3.wieght` is not a masked parameter.*3.weight"),
        ("4.weight", half(2, 4), "`4.weight` is not a masked parameter"),
        ("3.weight", half(8, 4), r"`3.weight` \(=\(8, 4\)\).*\(4, 8\)"),
        ("3.weight", torch.ones(4, 8), "`3.weight`.*torch.float32.*bool"),
        ("3.weight", torch.eye(4, 8, dtype=torch.bool), "`3.weight`.*NByM"),
    ],
)
def test_set_masks_checks_everything_first(name, mask, message):
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        fnn.set_masks(model, {"0.weight": half(4, 1, 3), name: mask})
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_set_masks_on_a_dense_model_says_so():
    with pytest.raises(ConfigError, match="no masks"):
        fnn.set_masks(nn.Linear(2, 2), {"weight": half(2, 2)})


def test_apply_zeroes_what_an_optimizer_moved():
    model = network()
    weight = fnn.masked_weights(model)["3.weight"]
    with torch.no_grad():
        weight.weight.add_(1.0)
    weight.apply_()
    assert torch.equal(weight.weight == 0, ~weight.mask)


# Tied parameters


def test_tied_weights_share_parameter_and_mask():
    mask = half(7, 4)
    model = tied(mask)
    assert model.head.weight is model.embedding.weight and model.head.weight_mask is model.embedding.weight_mask
    weights = fnn.masked_weights(model)
    assert list(weights) == ["embedding.weight"]
    weight = weights["embedding.weight"]
    assert weight.names == ("embedding.weight", "head.weight") and len(weight.owners) == 2
    assert [name for name, _ in model.named_parameters()] == ["embedding.weight"]
    assert fnn.mask_spec(model.embedding, "weight").route is Route.PARAMETER
    assert fnn.mask_spec(model.head, "weight").route is Route.MODULE
    assert {fnn.mask_spec(m, "weight").guard for m in (model.embedding, model.head)} == {Guard.GRADIENT}
    assert torch.equal(model.embedding.weight == 0, ~mask)
    for name in ("head.weight", "embedding.weight"):
        new = half(7, 4, seed=3 + len(name))
        fnn.set_masks(model, {name: new})
        assert torch.equal(model.embedding.weight_mask, new) and torch.equal(model.head.weight_mask, new)


def test_tied_weights_train_as_their_masked_definition():
    mask = half(7, 4)
    model = tied(mask)
    free = model.embedding.weight.detach().clone().requires_grad_()
    tokens = torch.tensor([[0, 3, 3], [6, 1, 2]])
    with DenseGradients() as gradients:
        model(tokens).square().sum().backward()
    F.linear(F.embedding(tokens, free), free).square().sum().backward()
    weight = fnn.masked_weights(model)["embedding.weight"]
    torch.testing.assert_close(gradients.read(weight.mask), free.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.weight.grad, free.grad * mask, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_the_tie(duplicate):
    model = tied(half(7, 4))
    other = duplicate(model)
    assert other.head.weight is other.embedding.weight and other.head.weight_mask is other.embedding.weight_mask
    assert other.head.weight_mask is not model.head.weight_mask
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        other(torch.tensor([0, 1, 5])).square().sum().backward()
        optimizer.step()
    assert torch.equal(other.head.weight == 0, ~other.head.weight_mask)
    assert torch.equal(model.head.weight_mask, other.head.weight_mask)


@pytest.mark.parametrize("order", ["embedding first", "head first"])
def test_dense_checkpoints_of_tied_models_load(order):
    model, dense = tied(half(7, 4)), LanguageModel()
    state = dict(reversed(dense.state_dict().items())) if order == "head first" else dense.state_dict()
    model.load_state_dict(state)
    assert torch.equal(model.head.weight, torch.where(half(7, 4), dense.head.weight, 0.0))
    other = tied()
    other.load_state_dict(model.state_dict())
    assert other.head.weight_mask is other.embedding.weight_mask
    assert torch.equal(other.head.weight_mask, half(7, 4)) and torch.equal(other.head.weight, model.head.weight)


def test_masks_that_came_apart_are_shared_again():
    model = tied(half(7, 4))
    model.head._buffers["weight_mask"] = model.head.weight_mask.clone()  # what a move to another device does
    fnn.set_masks(model, {"head.weight": half(7, 4, seed=5)})
    assert model.head.weight_mask is model.embedding.weight_mask
    assert torch.equal(model.head.weight_mask, half(7, 4, seed=5))
    assert torch.equal(model.head.weight == 0, ~(half(7, 4) & half(7, 4, seed=5)))


def test_contradicting_masks_are_an_error():
    model = LanguageModel()
    fnn.install_mask(model.embedding, "weight", MaskSpec(route=Route.PARAMETER, guard=Guard.GRADIENT), half(7, 4))
    fnn.install_mask(model.head, "weight", MaskSpec(route=Route.PARAMETER, guard=Guard.GRADIENT), half(7, 4, seed=1))
    with pytest.raises(ConfigError, match="tie_masks"):
        fnn.masked_weights(model)
    with pytest.raises(ConfigError, match="`embedding.weight`, `head.weight`.*different masks"):
        fnn.tie_masks(model)
    model = tied(half(7, 4))
    both = {"embedding.weight": half(7, 4, seed=1), "head.weight": half(7, 4, seed=2)}
    with pytest.raises(ConfigError, match="`head.weight` is tied to `embedding.weight`"):
        fnn.set_masks(model, both)
    assert torch.equal(model.head.weight_mask, half(7, 4))
    fnn.set_masks(model, {name: both["head.weight"] for name in both})


def test_a_full_mask_yields_when_tying():
    model = LanguageModel()
    fnn.install_mask(model.embedding, "weight", MaskSpec(route=Route.PARAMETER, guard=Guard.GRADIENT))
    model.head = fnn.Linear.from_dense(model.head, mask=half(7, 4))
    fnn.tie_masks(model)
    fnn.tie_masks(model)  # again: nothing to do
    assert model.head.weight_mask is model.embedding.weight_mask and torch.equal(model.head.weight_mask, half(7, 4))


def test_two_sparse_layers_sharing_a_weight_stay_forward_masked():
    first = nn.Linear(4, 4)
    second = nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(fnn.Linear.from_dense(first, mask=half(4, 4)), fnn.Linear.from_dense(second))
    fnn.tie_masks(model)
    assert model[0].weight_mask is model[1].weight_mask and torch.equal(model[1].weight_mask, half(4, 4))
    assert {layer.mask_spec.guard for layer in model} == {Guard.FORWARD}
    with DenseGradients() as gradients:
        model(torch.randn(3, 4)).sum().backward()
    assert torch.equal(first.weight.grad == 0, ~half(4, 4))
    assert gradients.read(model[0].weight_mask).all()


def test_untied_models_are_left_alone_by_tie_masks():
    model = network()
    buffers = dict(model.named_buffers())
    fnn.tie_masks(model)
    assert all(buffers[name] is buffer for name, buffer in model.named_buffers())


def test_what_is_no_module_or_no_mapping_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"`model` \(=int\) must be a torch.nn.Module"):
        fnn.masks(3)
    with pytest.raises(ConfigError, match=r"`masks` \(=list\) must be a mapping"):
        fnn.set_masks(nn.Linear(2, 2), [1])
