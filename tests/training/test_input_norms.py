"""Norms of inputs against slow oracles: linear, convolution of every kind, functional uses, attention."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxsparse.errors import ConfigError
from fxsparse.nn import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    Guard,
    Linear,
    MaskSpec,
    Route,
    install_mask,
    masked_weight,
    masked_weights,
)
from fxsparse.training import InputNorms

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def collected(model: nn.Module, *batches, **kwargs) -> InputNorms:
    with torch.no_grad(), InputNorms(masked_weights(model), **kwargs) as found:
        for batch in batches:
            model(*batch) if isinstance(batch, tuple) else model(batch)
    return found


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 3]),
    st.sampled_from([(4, 8, 1), (4, 8, 2), (6, 6, 6), (1, 3, 1)]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from([0, 1, 2, "same"]),
    st.integers(1, 2),
    st.sampled_from(["zeros", "circular", "reflect"]),
    st.integers(0, 1000),
)
def test_convolutions_against_patches(axes, channels, kernel, stride, padding, dilation, mode, seed):
    ins, outs, groups = channels
    stride = 1 if padding == "same" else stride
    kind = (Conv1d, Conv2d, Conv3d)[axes - 1]
    generator = torch.Generator().manual_seed(seed)
    module = kind(ins, outs, kernel, stride, padding, dilation, groups, padding_mode=mode)
    x = torch.randn(2, ins, *(6, 5, 7)[:axes], generator=generator)
    found = collected(module, x).norms()["weight"]
    # the oracle moves one element of one patch at a time
    pads = (
        [p for p in reversed(module._reversed_padding_repeated_twice[::2])] if padding == "same" else [padding] * axes
    )
    rights = list(reversed(module._reversed_padding_repeated_twice[1::2])) if padding == "same" else pads
    spec = [p for left, right in zip(reversed(pads), reversed(rights), strict=True) for p in (left, right)]
    padded = F.pad(x.double(), spec, mode={"zeros": "constant"}.get(mode, mode))
    spans = [(size - dilation * (kernel - 1) - 1) // stride + 1 for size in padded.shape[2:]]
    expected = torch.zeros(outs, ins // groups, *([kernel] * axes), dtype=torch.float64)
    for channel, offset in itertools.product(range(ins), itertools.product(range(kernel), repeat=axes)):
        where = [
            slice(o * dilation, o * dilation + (n - 1) * stride + 1, stride) for o, n in zip(offset, spans, strict=True)
        ]
        norm = padded[(slice(None), channel, *where)].square().sum().sqrt()
        group, inner = divmod(channel, ins // groups)
        expected[(slice(group * outs // groups, (group + 1) * outs // groups), inner, *offset)] = norm
    torch.testing.assert_close(found, expected, **TIGHT)


@pytest.mark.parametrize("kind", [ConvTranspose1d, ConvTranspose2d])
@pytest.mark.parametrize(
    ("stride", "padding", "groups", "dilation"), [(1, 0, 1, 1), (2, 1, 2, 1), (3, 0, 1, 2), (2, 2, 2, 2)]
)
def test_transposed_convolutions(kind, stride, padding, groups, dilation):
    module = kind(4, 6, 3, stride, padding, 0, groups, True, dilation)
    x = torch.randn(2, 4, *(7, 6)[: 1 + (kind is ConvTranspose2d)], generator=torch.Generator().manual_seed(0))
    weight = torch.ones_like(module.weight, dtype=torch.float64).requires_grad_()
    transpose = F.conv_transpose1d if kind is ConvTranspose1d else F.conv_transpose2d
    out = transpose(x.double().square(), weight, None, stride, padding, 0, groups, dilation)
    (gradient,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(collected(module, x).norms()["weight"], gradient.sqrt(), **TIGHT)


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (2, 4, 5, 3), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_inputs_of_any_rank(shape, dtype):
    module = Linear(3, 2, dtype=dtype)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = x.double().reshape(-1, 3).square().sum(0).sqrt().expand(2, 3)
    torch.testing.assert_close(collected(module, x).norms()["weight"], expected, **TIGHT)


@pytest.mark.parametrize("module", [Linear(3, 2), Conv2d(3, 2, 3, padding=1)], ids=["linear", "conv"])
def test_batches_add_up(module):
    x = torch.randn(6, *(3, 5, 4)[: 1 if isinstance(module, nn.Linear) else 3])
    whole, parts = collected(module, x).norms(), collected(module, x[:1], x[1:4], x[4:]).norms()
    torch.testing.assert_close(whole["weight"], parts["weight"], **TIGHT)
    last = collected(module, x[4:]).norms()["weight"]
    assert not torch.allclose(last, whole["weight"])  # the trap: norms of the last batch only


def test_collecting_goes_on_over_blocks_and_states():
    module, x = Linear(3, 2), torch.randn(6, 3)
    first = InputNorms(masked_weights(module))
    with torch.no_grad():
        with first:
            module(x[:2])
        second = InputNorms(masked_weights(module))
        second.load_state_dict(first.state_dict())
        for found in (first, second):
            with found:
                module(x[2:])
    assert torch.equal(first.norms()["weight"], second.norms()["weight"])
    torch.testing.assert_close(first.norms()["weight"], collected(module, x).norms()["weight"], **TIGHT)
    first.reset()
    with pytest.raises(ConfigError, match="`weight` are not known: no forward"):
        first.norms()


def test_moments():
    module, x = Conv1d(2, 4, 3, groups=2), torch.randn(3, 2, 8, dtype=torch.float32)
    found = collected(module, x, moments=True)
    patches = x.double().unfold(2, 3, 1)  # sample, channel, position, offset
    mean, variance = patches.mean((0, 2)), patches.var((0, 2), correction=0)
    torch.testing.assert_close(found.means()["weight"], mean.repeat_interleave(2, 0)[:, None], **TIGHT)
    torch.testing.assert_close(
        found.variances()["weight"], variance.repeat_interleave(2, 0)[:, None], rtol=1e-9, atol=1e-12
    )


class Functional(nn.Module):
    """A parameter used through a mask node, transposed, in parts, and copied."""

    def __init__(self, use) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        install_mask(self, "weight", MaskSpec(route=Route.MASK_NODE), torch.rand(4, 3) > 0.3)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, masked_weight(self.weight, self.weight_mask))


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: F.linear(x, w),
        lambda x, w: x @ w.t(),
        lambda x, w: torch.einsum("bi,oi->bo", x, w),
        lambda x, w: torch.cat([F.linear(x, part) for part in w.chunk(2)], 1),
        lambda x, w: F.linear(x.to(torch.float64), w.to(torch.float64)),
        lambda x, w: (w @ x.t()).t(),
        lambda x, w: torch.addmm(torch.zeros(4), x, w.t().contiguous()),
        lambda x, w: torch.stack([w @ row for row in x]),
        lambda x, w: F.conv1d(x[:, :, None], w[:, :, None]),
    ],
    ids=["linear", "matmul", "einsum", "parts", "cast", "left", "addmm", "mv", "conv of a view"],
)
def test_functional_uses(use):
    torch.manual_seed(0)
    model, x = Functional(use), torch.randn(5, 3)
    expected = x.double().square().sum(0).sqrt().expand(4, 3)
    torch.testing.assert_close(collected(model, x).norms()["weight"], expected, **TIGHT)


def test_two_uses_add_up():
    model, x = Functional(lambda x, w: F.linear(x, w) + F.linear(2 * x, w)), torch.randn(5, 3)
    expected = (5 * x.double().square().sum(0)).sqrt().expand(4, 3)
    torch.testing.assert_close(collected(model, x).norms()["weight"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("use", "why"),
    [(lambda x, w: x * w.sum(), "sum"), (lambda x, w: F.linear(x, w * 2), "mul"), (lambda x, w: x, "no forward")],
)
def test_unknown_inputs_are_refused_by_name(use, why):
    with pytest.raises(ConfigError, match=f"inputs of `weight` are not known: .*{why}"):
        collected(Functional(use), torch.randn(5, 3)).norms()


@pytest.mark.parametrize("same", [True, False])
def test_attention_projections(same):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    at_parameter = MaskSpec(route=Route.PARAMETER, guard=Guard.GRADIENT)
    install_mask(attention, "in_proj_weight", at_parameter)
    install_mask(attention.out_proj, "weight", at_parameter)
    x = torch.randn(2, 5, 8)
    y = x if same else torch.randn(2, 7, 8)
    fast = torch.backends.mha.get_fastpath_enabled()
    found = collected(attention, (x, y, y)).norms()
    assert torch.backends.mha.get_fastpath_enabled() is fast
    columns = [each.double().square().sum((0, 1)).sqrt() for each in (x, y, y)]
    expected = torch.cat([column.expand(8, 8) for column in columns])
    torch.testing.assert_close(found["in_proj_weight"], expected, **TIGHT)
    rows = found["out_proj.weight"]
    assert bool((rows > 0).all()) and torch.equal(rows, rows[:1].expand(8, 8))


def test_the_model_is_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(Linear(3, 4), nn.BatchNorm1d(4), Linear(4, 2)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 3)
    plain = model(x)
    with InputNorms(masked_weights(model)):
        watched = model(x)
    assert torch.equal(plain, watched)
    watched.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
