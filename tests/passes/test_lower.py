from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxsparse
from fxsparse.passes.lower_shared_support import Form, lower_shared_support
from tests.passes.lower_cases import FORMS, NETWORKS, assert_equal, calls, lowered_all, sparse, wish
from tests.passes.lower_models import Residual, with_statistics


@settings(max_examples=12, deadline=None)
@given(
    lead=st.lists(st.integers(2, 5), max_size=3),
    inputs=st.integers(8, 40),
    rows=st.integers(8, 50),
    group=st.integers(4, 20),
    sparsity=st.floats(0.4, 0.95),
    bias=st.booleans(),
    form=st.sampled_from(FORMS),
    permuted=st.booleans(),
)
def test_a_linear_layer(
    lead: list[int], inputs: int, rows: int, group: int, sparsity: float, bias: bool, form: Form, permuted: bool
) -> None:
    model = nn.Linear(inputs, rows, bias).double()
    pattern = fxsparse.SharedSupport(group)
    order = torch.randperm(rows) if permuted else None
    model.weight.data *= pattern.mask(torch.rand(rows, inputs), sparsity, row_order=order)
    x = torch.randn(*lead, inputs, dtype=torch.float64)
    result = lower_shared_support(model, (x,), choose=wish(form))
    assert_equal(result.model, model, x)
    if int((model.weight != 0).sum()) <= 0.5 * rows * inputs and group >= 8:
        assert result.forms["weight"] is (form if lead else Form.GATHER_CONV)


@settings(max_examples=12, deadline=None)
@given(
    spatial=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    inputs=st.integers(4, 12),
    rows=st.integers(4, 16),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same"]),
    dilation=st.integers(1, 2),
    group=st.integers(4, 16),
    sparsity=st.floats(0.4, 0.9),
    bias=st.booleans(),
)
def test_a_convolution(
    spatial: int,
    groups: int,
    inputs: int,
    rows: int,
    kernel: int,
    stride: int,
    padding: int | str,
    dilation: int,
    group: int,
    sparsity: float,
    bias: bool,
) -> None:
    kind = {1: nn.Conv1d, 2: nn.Conv2d}[spatial]
    stride = 1 if padding == "same" else stride
    model = kind(groups * inputs, groups * rows, kernel, stride, padding, dilation, groups, bias).double()
    layout = fxsparse.nn.layout_of(model)
    model.weight.data *= fxsparse.SharedSupport(group).mask(torch.rand(model.weight.shape), sparsity, layout)
    x = torch.randn(2, groups * inputs, *(9,) * spatial, dtype=torch.float64)
    result = lower_shared_support(model, (x,), choose=wish(Form.GATHER_CONV))
    assert_equal(result.model, model, x)
    smaller = torch.randn(3, groups * inputs, *(9,) * spatial, dtype=torch.float64)
    assert_equal(result.model, model, smaller)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, form: Form) -> None:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    x = torch.randn(2, *shape)
    masked = sparse(make(), (x,))
    result = lower_shared_support(masked, (x,), choose=wish(form))
    assert result.worst <= 1e-12
    assert result.records and any(each is not Form.DENSE for each in result.forms.values())
    for record in result.records:
        assert not record.reason.startswith("left as it is"), str(record)
    for batch in (1, 2, 5):  # the batch stays free
        assert_equal(result.model, masked, torch.randn(batch, *shape, dtype=torch.float64))


def test_a_chain_has_transposes_at_its_ends_only() -> None:
    x = torch.randn(4, 32)
    masked = sparse(NETWORKS["mlp"][0](), (x,))
    found = calls(lower_shared_support(masked, (x,), choose=wish(Form.GATHER_CONV)).model)
    assert found == {"permute": 2, "unsqueeze": 1, "squeeze": 1, "index_select": 3, "conv1d": 3, "relu": 1, "gelu": 1}
    found = calls(lower_shared_support(masked, (x,), choose=wish(Form.GATHER_MATMUL)).model)
    assert found == {"permute": 2, "index_select": 3, "matmul": 3, "reshape": 6, "add": 3, "relu": 1, "gelu": 1}


def test_one_batched_product_however_many_groups() -> None:
    x = torch.randn(4, 64)
    masked = sparse(nn.Sequential(nn.Linear(64, 256)), (x,), group=8)
    found = calls(lower_shared_support(masked, (x,), choose=wish(Form.GATHER_MATMUL)).model)
    assert found["matmul"] == 1 and found["index_select"] == 1


@pytest.mark.parametrize("name", ["fused attention", "split attention"])
def test_a_block_has_transposes_around_its_norms_only(name: str) -> None:
    make, shape = NETWORKS[name]
    x = torch.randn(2, *shape)
    found = calls(lower_shared_support(sparse(make(), (x,)), (x,), choose=wish(Form.GATHER_CONV)).model)
    assert found["permute"] == 4  # into and out of both branches
    assert found["transpose"] == 2  # of an operand of a product, which runtimes fuse
    assert found["scaled_dot_product_attention"] == 0


def test_permutations_of_the_model_cancel_with_those_of_the_layers() -> None:
    make, shape = NETWORKS["channels last"]
    x = torch.randn(2, *shape)
    found = calls(lower_shared_support(sparse(make(), (x,)), (x,), choose=wish(Form.GATHER_CONV)).model)
    assert found["permute"] == 2  # before and after the norm; the last one of the model is gone


def test_permuted_rows_are_folded_into_the_next_layer() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10)).double()
    for layer in (model[0], model[2]):
        rows = layer.weight.shape[0]
        pattern = fxsparse.SharedSupport(16)
        layer.weight.data *= pattern.mask(torch.rand(layer.weight.shape), 0.75, row_order=torch.randperm(rows))
    x = torch.randn(4, 32, dtype=torch.float64)
    result = lower_shared_support(model, (x,), choose=wish(Form.GATHER_CONV))
    assert_equal(result.model, model, x)
    assert calls(result.model)["index_select"] == 3  # two layers, and the rows of the last of them


def test_permuted_rows_meet_the_constants_of_their_channels() -> None:
    model = with_statistics(nn.Sequential(nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3)))
    model = model.double().eval()
    for layer in (model[0], model[3]):
        pattern = fxsparse.SharedSupport(8)
        layer.weight.data *= pattern.mask(torch.rand(layer.weight.shape), 0.75, row_order=torch.randperm(32))
    x = torch.randn(2, 16, 7, 7, dtype=torch.float64)
    result = lower_shared_support(model, (x,), choose=wish(Form.GATHER_CONV))
    assert_equal(result.model, model, x)
    assert calls(result.model)["index_select"] == 3
    scaled = Residual(32).double()
    for weight in (scaled.one.weight, scaled.two.weight):
        weight.data *= fxsparse.SharedSupport(8).mask(torch.rand(32, 32), 0.75, row_order=torch.randperm(32))
    assert_equal(
        lower_shared_support(scaled, (y := torch.randn(3, 32).double(),), choose=wish(Form.GATHER_CONV)).model,
        scaled,
        y,
    )


def test_a_smaller_last_group_is_cut_off_at_the_end_only() -> None:
    x = torch.randn(4, 40)
    masked = sparse(nn.Sequential(nn.Linear(40, 44), nn.ReLU(), nn.Linear(44, 36)), (x,), group=16)
    result = lower_shared_support(masked, (x,), choose=wish(Form.GATHER_CONV))
    assert lowered_all(result) and calls(result.model)["slice"] == 1
    assert_equal(result.model, masked, x.double())
