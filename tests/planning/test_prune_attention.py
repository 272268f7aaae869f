"""Structured pruning of torch's attention layers, and through layer norms."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxsparse
from fxsparse.nn.attention import SizedMultiheadAttention
from fxsparse.nn.layer_norm import SizedLayerNorm
from fxsparse.planning.compaction import compact
from fxsparse.planning.prune_budgets import ChannelBudget, ParameterBudget
from fxsparse.planning.prune_channels import plan_channels
from tests.planning.prune_checks import filled, floats, pruned, same


class Attended(nn.Module):
    """An attention layer between two linear ones."""

    def __init__(self, need_weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(6, 16), nn.Linear(16, 3)
        self.mha, self.need_weights = nn.MultiheadAttention(16, 4, **options), need_weights
        self.batch_first = bool(options.get("batch_first"))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.before(x)
        z, _ = self.mha(y, y, y, need_weights=self.need_weights, key_padding_mask=mask)
        return self.after(z)


ATTENTION: dict[str, dict[str, Any]] = {
    "packed": {},
    "batch first": {"batch_first": True},
    "unbiased": {"batch_first": True, "bias": False},
    "added keys": {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"batch_first": True, "kdim": 16, "vdim": 16},
}


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
def test_heads_and_positions_of_torch_attention_go(options: dict[str, Any], weights: bool) -> None:
    model = filled(Attended(weights, **options))
    plan = pruned(model, (floats(5, 3, 6),))
    places = {place for group in plan.groups for place in group.places}
    assert ("mha.out_proj.weight", 1) in places  # the inside of the layer
    assert any(group.channels == 4 and group.removed for group in plan.groups)


def test_padding_is_masked_in_the_smaller_layer() -> None:
    model = filled(Attended(batch_first=True))
    mask = torch.tensor([[False] * 4, [False, False, True, True]])
    pruned(model, (floats(2, 4, 6), mask))


class Described(nn.Module):
    """Returns the mean of the heads' weights, so that every head is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.mha(x, x, x)
        return y, weights


def test_heads_stay_where_their_weights_are_returned_and_positions_go() -> None:
    plan = pruned(filled(Described()), (floats(2, 3, 8),))
    assert all(group.channels == 4 for group in plan.groups)  # positions of queries and keys, and of values
    assert any("read together by mean" in str(each) for each in plan.excluded)


def test_an_attention_layer_is_pruned_again_and_its_state_loads() -> None:
    model, x = filled(Attended(batch_first=True)), floats(2, 3, 6)
    once = plan_channels(model, (x,), budget=ChannelBudget(0.7)).apply()
    assert isinstance(once.mha, SizedMultiheadAttention) and type(model.mha) is nn.MultiheadAttention
    assert set(once.state_dict()) == set(model.state_dict())
    copied = copy.deepcopy(once)
    copied.load_state_dict(once.state_dict())
    assert same(once(x), copied(x))
    plan = pruned(once, (x,))
    assert plan.parameters[1] < plan.parameters[0]


def test_encoders_lose_heads_and_hidden_units_and_keep_their_width() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = filled(nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 2)))
    plan = pruned(model, (floats(2, 3, 6),))
    small = plan.apply()
    assert small[1].layers[0].linear1.out_features < 32 and small[1].layers[0].self_attn.num_heads < 4
    assert small[1].layers[0].norm1.normalized_shape == (16,)
    assert all(type(module) is not SizedLayerNorm for module in small.modules())


def test_masks_of_an_attention_layer_move_along() -> None:
    model, x = filled(Attended(batch_first=True)), floats(2, 3, 6)
    sparse = fxsparse.transform(model, (x,), sparsity=0.5)
    plan = plan_channels(sparse, (x,), budget=ChannelBudget(0.5))
    small = plan.apply()
    with torch.no_grad():
        assert same(plan.masked().eval()(x), small.eval()(x))
    masks = fxsparse.masks(small)
    assert masks["mha.in_proj_weight"].shape == small.get_parameter("mha.in_proj_weight").shape


@st.composite
def attention_calls(draw: st.DrawFn) -> tuple[nn.MultiheadAttention, tuple[Tensor, ...], dict[str, Any]]:
    """Any layer and call that torch takes."""
    heads, size = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    width, batch, steps, keys = heads * size, draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    others = draw(st.booleans())
    options = {name: draw(st.booleans()) for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = nn.MultiheadAttention(width, heads, kdim=5 if others else None, vdim=3 if others else None, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    inputs = [
        torch.randn(batch, length, d)
        for length, d in zip((steps, keys, keys), (width, *((5, 3) if others else (width,) * 2)), strict=True)
    ]
    unbatched = draw(st.booleans())
    if unbatched:
        inputs, batch = [x[0] for x in inputs], 1
    elif not options["batch_first"]:
        inputs = [x.transpose(0, 1) for x in inputs]
    call: dict[str, Any] = {"need_weights": draw(st.booleans()), "average_attn_weights": draw(st.booleans())}
    padding = torch.zeros(batch, keys, dtype=torch.bool)
    padding[:, 1:] = torch.rand(batch, keys - 1) < 0.4
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    if draw(st.booleans()):
        rows = padding[0] if unbatched else padding
        call["key_padding_mask"] = rows if kind != "float" else torch.zeros(rows.shape).masked_fill(rows, -math.inf)
    if kind != "none":
        shape = (batch * heads, steps, keys) if draw(st.booleans()) else (steps, keys)
        mask = torch.rand(shape) < 0.3
        mask[..., 0] = False
        call["attn_mask"] = mask if kind == "bool" else torch.zeros(shape).masked_fill(mask, -math.inf)
    return (
        layer.double().eval(),
        tuple(x.double() for x in inputs),
        {
            key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for key, value in call.items()
        },
    )


@settings(max_examples=60, deadline=None)
@given(attention_calls())
def test_the_sized_layer_is_torchs_where_nothing_was_removed(drawn: Any) -> None:
    layer, inputs, call = drawn
    sized = SizedMultiheadAttention.of(copy.deepcopy(layer))
    with torch.no_grad():
        expected, found = layer(*inputs, **call), sized(*inputs, **call)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    assert (found[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)


def gated(width: int = 8) -> nn.Module:
    return filled(nn.Sequential(nn.Linear(6, width), nn.LayerNorm(width), nn.Linear(width, 3)))


def test_features_of_a_layer_norm_go_where_nothing_else_can() -> None:
    plan = pruned(gated(), (floats(4, 6),))
    small = plan.apply()
    assert "count them as zeros" in str(plan)
    assert type(small[1]) is SizedLayerNorm and small[1].total == 8 and small[1].normalized_shape == (4,)
    again = pruned(small, (floats(4, 6),))
    assert again.apply()[1].total == 8 and again.apply()[1].normalized_shape == (2,)


def test_features_of_a_layer_norm_go_only_where_the_rest_does_not_meet_the_budget() -> None:
    layers = [nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)]
    model, x = filled(nn.Sequential(*layers)), floats(4, 6)
    few = plan_channels(model, (x,), budget=ParameterBudget(0.6))
    many = plan_channels(model, (x,), budget=ParameterBudget(0.2))
    assert ("0.weight", 0) not in few.removed and type(few.apply()[1]) is nn.LayerNorm
    assert ("0.weight", 0) in many.removed and type(many.apply()[1]) is SizedLayerNorm
    assert same(many.masked()(x), many.apply()(x))


def test_dead_features_of_a_layer_norm_are_not_compacted() -> None:
    """A norm of another kind costs time: only who asks for it gets it."""
    model, x = gated(), floats(4, 6)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1], model[1].weight[1], model[1].bias[1] = 0.0, 0.0, 0.0, 0.0
    small = compact(model, (x,))
    assert type(small[1]) is nn.LayerNorm and small[0].out_features == 8 and same(model(x), small(x))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 5), st.booleans(), st.booleans(), st.integers(0, 999))
def test_a_sized_layer_norm_is_the_norm_of_what_was(kept: int, gone: int, affine: bool, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    norm = nn.LayerNorm(kept + gone, elementwise_affine=affine, bias=bias).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 2, kept + gone).double()
    x[..., kept:] = 0.0
    small = SizedLayerNorm.of(copy.deepcopy(norm))
    if affine:
        small.weight = nn.Parameter(norm.weight[:kept].detach().clone())
        small.bias = nn.Parameter(norm.bias[:kept].detach().clone()) if bias else None
    torch.testing.assert_close(small(x[..., :kept]), norm(x)[..., :kept], rtol=1e-12, atol=1e-12)
