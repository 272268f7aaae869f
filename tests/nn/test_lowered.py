from __future__ import annotations

import pytest
import torch
from torch import nn

from fxsparse.nn.lowered import GatheredConv, GatheredLinear
from fxsparse.passes.lower_modules import gathered
from fxsparse.passes.lower_support import find_support
from fxsparse.sparsity import SharedSupport


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (3,), (2, 7), (2, 3, 4), (1, 2, 3, 4)], ids=str)
def test_a_linear_layer_of_any_rank(lead: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(20, 36, bias).double()
    mask = SharedSupport(16).mask(torch.rand(36, 20), 0.7, row_order=torch.randperm(36))
    layer.weight.data *= mask
    support = find_support(mask)
    assert support is not None
    made = gathered(layer, support)
    assert isinstance(made, GatheredLinear)
    x = torch.randn(*lead, 20, dtype=torch.float64)
    torch.testing.assert_close(made(x), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}], ids=str)
def test_a_convolution(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 24, 3, **options).double()  # type: ignore[arg-type]  # torch's own options
    mask = SharedSupport(8).mask(torch.rand(24, 12, 3, 3), 0.6)
    layer.weight.data *= mask
    support = find_support(mask.flatten(2).any(2))
    assert support is not None
    made = gathered(layer, support)
    assert type(made) is GatheredConv and "3 groups of 8 rows" in repr(made)
    x = torch.randn(2, 12, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(made(x), layer(x), rtol=1e-12, atol=1e-12)


def test_weights_are_parameters_and_positions_buffers() -> None:
    layer = nn.Linear(16, 16)
    mask = SharedSupport(8).mask(torch.rand(16, 16), 0.5)
    support = find_support(mask)
    assert support is not None
    made = gathered(layer, support)
    assert {name for name, _ in made.named_parameters()} == {"blocks.0", "biases.0"}
    assert {name for name, _ in made.named_buffers()} == {"positions0"}
    made(torch.randn(3, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
