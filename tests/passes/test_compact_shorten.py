"""Shortening opens masks where something is added to a dead entry: else the addition would be masked away."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.nn import masks, set_masks
from fxsparse.passes.compact_apply import shorten
from fxsparse.passes.compact_solve import Merge


def two_layers() -> tuple[nn.Module, dict[str, Tensor]]:
    """Two masked layers in double precision; the bias of the first has a mask too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    x = torch.randn(2, 3).double()
    sparse = fxsparse.transform(model, (x,), include=["0.weight", "0.bias", "2.weight"])
    dead = {
        "0.bias": torch.tensor([True, False, False, True]),
        "2.weight": torch.tensor([[True, False, True, False], [False, False, False, False]] * 2),
    }
    set_masks(sparse, dead)
    return sparse, {name: mask.clone() for name, mask in masks(sparse).items()}


@pytest.mark.parametrize("rows", [None, (0, 2), (1, 3)])
def test_a_merge_opens_the_mask_where_a_source_is_alive(rows: tuple[int, int] | None) -> None:
    model, before = two_layers()
    weight = model.get_parameter("2.weight").detach().clone()
    merge = Merge("2.weight", 1, 1, np.array([2, 3]), np.array([0.5, -2.0]), rows)
    shorten(model, {}, {}, [merge])
    here = slice(*rows) if rows else slice(None)
    expected, mask = weight.clone(), before["2.weight"].clone()
    expected[here, 1] += 0.5 * weight[here, 2] - 2.0 * weight[here, 3]
    mask[here, 1] |= mask[here, 2] | mask[here, 3]
    assert torch.equal(masks(model)["2.weight"], mask) and not torch.equal(mask, before["2.weight"])
    torch.testing.assert_close(model.get_parameter("2.weight").detach(), expected)
    hidden = torch.randn(5, 4).double()
    torch.testing.assert_close(model.get_submodule("2")(hidden), hidden @ expected.T + model.get_parameter("2.bias"))


def test_a_fold_opens_the_mask_exactly_where_something_is_added() -> None:
    model, before = two_layers()
    bias = model.get_parameter("0.bias").detach().clone()
    delta = np.array([0.0, 0.25, 0.0, -1.0])
    shorten(model, {}, {"0.bias": delta})
    assert masks(model)["0.bias"].tolist() == [True, True, False, True]
    assert torch.equal(masks(model)["2.weight"], before["2.weight"])
    torch.testing.assert_close(model.get_parameter("0.bias").detach(), bias + torch.from_numpy(delta))
