from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.errors import CaptureError, ConfigError
from fxsparse.nn import masked_weights
from fxsparse.passes.lower_cost import CostRule
from fxsparse.passes.lower_shared_support import Form, Layer, legal_forms, lower_shared_support
from tests.passes.lower_cases import FORMS, NETWORKS, assert_equal, lowered_all, sparse, wish
from tests.passes.lower_models import Block, Residual, SplitAttention, Unexportable


def test_a_layer_with_nothing_alive_gives_its_bias() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).double()
    nn.init.zeros_(model[0].weight)
    x = torch.randn(3, 16, dtype=torch.float64)
    result = lower_shared_support(model, (x,), choose=wish(Form.GATHER_MATMUL))
    assert result.forms["0.weight"] is Form.GATHER_MATMUL
    assert_equal(result.model, model, x)


def test_dense_layers_stay_with_the_reason() -> None:
    x = torch.randn(3, 16)
    model = nn.Sequential(nn.Linear(16, 16))
    result = lower_shared_support(model, (x,))
    (record,) = result.records
    assert record.form is Form.DENSE and record.gain == 1.0
    assert record.reason == "no speed-up expected: nothing in it is dead"
    assert_equal(result.model, model, x.double())


def test_unstructured_and_depthwise_weights_stay_with_the_reason() -> None:
    x = torch.randn(2, 16, 9)
    model = nn.Sequential(nn.Conv1d(16, 16, 3, groups=16), nn.Conv1d(16, 32, 1)).eval()
    for layer in model:
        layer.weight.data *= fxsparse.Unstructured().mask(torch.rand(layer.weight.shape), 0.5)
    reasons = [record.reason for record in lower_shared_support(model, (x,)).records]
    assert "depthwise" in reasons[0] and "share a support" in reasons[1]
    assert all(reason.startswith("no speed-up expected: ") for reason in reasons)


def test_a_masked_weight_that_no_product_reads_has_a_record() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(16, 16), nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.scale

    x = torch.randn(16, 16)
    masked = fxsparse.transform(Scaled().eval(), (x,), sparsity=0.5, include=["linear.weight", "scale"])
    result = lower_shared_support(masked, (x,), choose=wish(Form.GATHER_CONV))
    assert set(result.forms) == {"linear.weight", "scale"}
    assert "not the weight of a linear layer" in result.records[-1].reason


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_with_several_uses_is_stored_once(form: Form) -> None:
    x = torch.randn(3, 32)
    masked = sparse(Residual(32), (x,))
    result = lower_shared_support(masked, (x,), choose=wish(form))
    assert len(result.records[0].layer.inputs) == 2
    names = [name for name, _ in result.model.named_parameters()]
    assert sorted(names) == ["one.weight_bias", "one.weight_blocks", *(["scale_moved"]), "two.weight_blocks"]
    assert result.records[0].tensors == ("one.weight_positions", "one.weight_blocks", "one.weight_bias")


def test_tied_layers_share_their_groups() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model[2].weight = model[0].weight
    x = torch.randn(3, 32)
    masked = sparse(model, (x,))
    result = lower_shared_support(masked, (x,), choose=wish(Form.GATHER_CONV))
    assert list(result.forms) == ["0.weight"]
    names = [name for name, _ in result.model.named_parameters()]
    assert names == ["0.weight_blocks", "0.weight_bias", "0.weight_bias_1"] or sorted(names)[-1] == "0.weight_blocks"
    assert_equal(result.model, masked, x.double())


def test_the_zeros_of_a_finalized_model_are_enough() -> None:
    x = torch.randn(3, 32)
    masked = sparse(NETWORKS["mlp"][0](), (x,))
    plain = fxsparse.finalize(masked)
    one, other = (lower_shared_support(model, (x,), choose=wish(Form.GATHER_CONV)) for model in (masked, plain))
    assert one.forms == other.forms and lowered_all(other)
    assert [r.layer.macs for r in one.records] == [r.layer.macs for r in other.records]


def test_the_mask_tells_groups_that_the_values_hide() -> None:
    x = torch.randn(3, 32)
    masked = sparse(nn.Sequential(nn.Linear(32, 32)), (x,))
    (weight,) = masked_weights(masked).values()
    with torch.no_grad():
        weight.weight[torch.rand(32, 32) < 0.5] = 0.0  # alive and zero
    result = lower_shared_support(masked, (x,), choose=wish(Form.GATHER_CONV))
    assert result.records[0].layer.macs == int(weight.mask.sum())
    assert_equal(result.model, masked, x.double())


@pytest.mark.parametrize("pattern", [fxsparse.Channel(1), fxsparse.Channel(0), fxsparse.Block(8, 4)], ids=str)
def test_other_patterns_that_happen_to_share_supports(pattern: Any) -> None:
    x = torch.randn(3, 32)
    masked = fxsparse.transform(NETWORKS["mlp"][0]().eval(), (x,), sparsity=0.75, pattern=pattern).eval()
    result = lower_shared_support(masked, (x,), choose=wish(Form.GATHER_CONV))
    assert any(form is Form.GATHER_CONV for form in result.forms.values())
    assert_equal(result.model, masked, x.double())


def test_element_positions_of_a_convolution() -> None:
    x = torch.randn(2, 16, 8, 8)
    pattern = fxsparse.SharedSupport(16, fxsparse.sparsity.Positions.ELEMENT)
    masked = fxsparse.transform(nn.Sequential(nn.Conv2d(16, 32, 3)).eval(), (x,), sparsity=0.97, pattern=pattern).eval()
    result = lower_shared_support(masked, (x,), choose=wish(Form.GATHER_CONV))
    assert lowered_all(result)
    assert_equal(result.model, masked, x.double())


def test_cross_attention_whose_weight_is_taken_apart() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.attention(x, y, y, need_weights=False)[0]

    x, y = torch.randn(2, 17, 32), torch.randn(2, 18, 32)
    masked = sparse(Cross(), (x, y))
    result = lower_shared_support(masked, (x, y), choose=wish(Form.GATHER_CONV))
    assert lowered_all(result)
    assert_equal(result.model, masked, x.double(), y.double())


def test_a_model_that_cannot_be_exported_is_lowered_layer_by_layer() -> None:
    x = torch.randn(2, 17, 32)
    masked = sparse(Unexportable(32), (x,))
    result = lower_shared_support(masked, (x,), choose=wish(Form.GATHER_MATMUL))
    assert lowered_all(result) and any("layer by layer" in note for note in result.notes)
    assert set(result.forms.values()) == {Form.GATHER_CONV}
    assert_equal(result.model, masked, x.double())
    assert legal_forms(masked, (x.double(),))["linear.weight"] == (Form.DENSE, Form.GATHER_CONV)


def test_a_model_that_fixes_its_dtype_is_compared_in_it() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.float())

    x = torch.randn(3, 32)
    masked = sparse(Single(), (x,))
    result = lower_shared_support(masked, (x,), choose=wish(Form.GATHER_CONV))
    assert lowered_all(result) and "own precision" in result.notes[0]
    torch.testing.assert_close(result.model(x), masked(x))


def test_free_axes_stay_free() -> None:
    x = torch.randn(2, 17, 32)
    masked = sparse(Block(32, SplitAttention(32, 4)), (x,))
    result = lower_shared_support(masked, (x,), choose=wish(Form.GATHER_CONV), free=[{0: "batch", 1: "tokens"}])
    assert_equal(result.model, masked, torch.randn(3, 23, 32, dtype=torch.float64))
    fixed = lower_shared_support(masked, (x,), choose=wish(Form.GATHER_MATMUL), free=[{}])
    assert_equal(fixed.model, masked, x.double())


def test_keyword_inputs_and_nested_outputs() -> None:
    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Any]:
            y = self.linear(x)
            return {"y": y, "both": [y * scale, x]}

    x, scale = torch.randn(3, 32), torch.randn(3, 32)
    masked = sparse(Keyed(), ((x,), {"scale": scale}))  # type: ignore[arg-type]  # the other form of inputs
    result = lower_shared_support(masked, ((x,), {"scale": scale}), choose=wish(Form.GATHER_CONV))
    old, new = masked(x, scale=scale), result.model(x, scale=scale)
    torch.testing.assert_close(new["both"][0], old["both"][0])
    assert torch.equal(new["both"][1], x)


def test_the_model_and_the_global_state_stay_as_they_were() -> None:
    x = torch.randn(3, 32)
    masked = sparse(NETWORKS["mlp"][0](), (x,)).train()
    state = {name: tensor.clone() for name, tensor in masked.state_dict().items()}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    result = lower_shared_support(masked, (x,), choose=wish(Form.GATHER_CONV))
    assert torch.equal(before, torch.get_rng_state())
    assert masked.training and not result.model.training
    assert all(torch.equal(state[name], tensor) for name, tensor in masked.state_dict().items())
    ours = {tensor.data_ptr() for tensor in masked.state_dict().values()}
    with torch.no_grad():
        for parameter in result.model.parameters():
            assert parameter.data_ptr() not in ours
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_lowered_model_can_be_copied_and_its_parameters_are_trained() -> None:
    import copy

    x = torch.randn(3, 32)
    result = lower_shared_support(sparse(NETWORKS["mlp"][0](), (x,)), (x,), choose=wish(Form.GATHER_CONV))
    twin = copy.deepcopy(result.model)
    assert torch.equal(twin(x), result.model(x))
    twin(x).sum().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())


def test_the_default_rule_lowers_what_is_large_and_sparse_only() -> None:
    x = torch.randn(16, 512)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 16))
    masked = sparse(model, (x,), group=64, sparsity=0.9)
    result = lower_shared_support(masked, (x,))
    assert result.forms == {"0.weight": Form.GATHER_CONV, "2.weight": Form.DENSE}
    assert result.records[0].gain > 2 and "us instead of" in result.records[0].reason
    assert "times as fast" in result.records[1].reason
    thick = sparse(nn.Sequential(nn.Linear(512, 512)), (x,), group=64, sparsity=0.1)
    assert lower_shared_support(thick, (x,)).forms == {"0.weight": Form.DENSE}


def test_expected_times_grow_with_the_work_and_fall_with_the_group() -> None:
    rule = CostRule()
    common: dict[str, Any] = {"name": "w", "kind": "linear", "shape": (1024, 1024), "batches": 1, "density": 0.1}

    def layer(columns: int, group: int, k: int) -> Layer:
        groups = 1024 // group
        return Layer(
            inputs=((columns, 1024),), columns=columns, groups=groups, group=group, k=k, macs=1024 * k, **common
        )  # fmt: skip

    assert rule.lowered(layer(128, 64, 102)) < rule.lowered(layer(128, 64, 204)) < rule.dense(layer(128, 64, 204))
    assert rule.lowered(layer(128, 128, 102)) < rule.lowered(layer(128, 16, 102))
    assert rule.gain(layer(128, 64, 102), Form.DENSE) == 1.0
    assert 3 < rule.gain(layer(1, 64, 102), Form.GATHER_CONV) < 10
    assert 4 < rule.gain(layer(128, 64, 102), Form.GATHER_CONV) < 10


def test_choices_by_name_and_by_policy() -> None:
    x = torch.randn(3, 32)
    masked = sparse(NETWORKS["mlp"][0](), (x,))
    result = lower_shared_support(masked, (x,), choose={"0.weight": Form.GATHER_MATMUL, "2.weight": Form.DENSE})
    assert result.forms == {"0.weight": Form.GATHER_MATMUL, "2.weight": Form.DENSE, "4.weight": Form.DENSE}
    assert "chosen so" in result.records[1].reason
    seen: list[Layer] = []

    def policy(layer: Layer) -> Form:
        seen.append(layer)
        return Form.DENSE

    assert set(lower_shared_support(masked, (x,), choose=policy).forms.values()) == {Form.DENSE}
    assert [(layer.name, layer.columns, layer.group, layer.k) for layer in seen][0] == ("0.weight", 3, 8, 8.0)
    assert legal_forms(masked, (x,))["0.weight"] == (Form.DENSE, *FORMS)


def test_bad_input_is_refused() -> None:
    x = torch.randn(3, 32)
    masked = sparse(NETWORKS["mlp"][0](), (x,))
    with pytest.raises(ConfigError, match="`model` .* must be a torch.nn.Module"):
        lower_shared_support(object(), (x,))  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ConfigError, match="must be a tuple"):
        lower_shared_support(masked, x)
    with pytest.raises(ConfigError, match=r"`1\.weight`, which no product reads; close names: .*0\.weight"):
        lower_shared_support(masked, (x,), choose={"1.weight": Form.DENSE})
    with pytest.raises(ConfigError, match="cannot take the form"):
        lower_shared_support(nn.Linear(32, 32), (x,), choose={"weight": Form.GATHER_CONV})
    with pytest.raises(ConfigError, match="cannot take the form 'dense'"):
        lower_shared_support(masked, (x,), choose={"0.weight": "dense"})  # type: ignore[dict-item]  # on purpose
    with pytest.raises(ConfigError, match="`choose` .* must be a mapping"):
        lower_shared_support(masked, (x,), choose=3)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ConfigError, match="`free` has 2 entries"):
        lower_shared_support(masked, (x,), free=[{}, {}])
    with pytest.raises(ConfigError, match="`free` names axis 7"):
        lower_shared_support(masked, (x,), free=[{7: "x"}])
    with pytest.raises(CaptureError):
        lower_shared_support(masked, (torch.randn(3, 31),))


def test_one_layer_on_inputs_of_several_ranks() -> None:
    class Ranks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.linear(x), self.linear(x[0]), self.linear(x.unsqueeze(1)), self.linear(x[0, 0])

    x = torch.randn(2, 17, 32)
    masked = sparse(Ranks(), (x,))
    for form in FORMS:
        result = lower_shared_support(masked, (x,), choose=wish(form))
        assert lowered_all(result)
        assert_equal(result.model, masked, x.double())
        masked.float()
