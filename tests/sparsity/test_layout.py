from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv2d, conv_transpose2d

from fxsparse.errors import ConfigError
from fxsparse.sparsity import Layout


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=5).map(tuple),
    st.sampled_from([Layout(), Layout(1, 0), Layout(1, 0, 2), Layout(0, 1, 2), Layout(2, 1), Layout(1, 2)]),
)
def test_rows_round_trip(shape: tuple[int, ...], layout: Layout) -> None:
    if max(layout.out_axis, layout.in_axis) >= len(shape) or shape[layout.in_axis] % layout.groups:
        return
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    rows = layout.to_rows(tensor)
    assert rows.shape == layout.matrix_shape(shape)
    back = layout.from_rows(rows, shape)
    assert torch.equal(back, tensor) and back.is_contiguous()


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_row_holds_exactly_the_weights_of_one_output_unit(groups: int) -> None:
    """Zero one row of the weight: exactly one output channel of the layer becomes zero."""
    for layout, weight, apply in [
        (Layout.conv(groups), torch.rand(6, 12 // groups, 3, 3) + 1, conv2d),
        (Layout.conv_transpose(groups), torch.rand(12, 6 // groups, 3, 3) + 1, conv_transpose2d),
    ]:
        rows = layout.to_rows(weight)
        assert rows.shape == (6, 12 // groups, 9)
        for row in range(6):
            cut = rows.clone()
            cut[row] = 0
            out = apply(torch.ones(1, 12, 5, 5), layout.from_rows(cut, weight.shape), groups=groups)
            dead = (out == 0).all(dim=(0, 2, 3)).nonzero().flatten().tolist()
            assert dead == [row]


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="out_axis"):
        Layout(1, 1)
    with pytest.raises(ConfigError, match="out_axis"):
        Layout(-1, 0)
    with pytest.raises(ConfigError, match="groups"):
        Layout(0, 1, 0)
    with pytest.raises(ConfigError, match=r"axis 0 \(=4\) must be divisible by `groups` \(=3\)"):
        Layout.conv_transpose(3).matrix_shape((4, 2, 1))
    with pytest.raises(ConfigError, match="at least 2 axes"):
        Layout.linear().matrix_shape((4,))
    with pytest.raises(ConfigError, match="empty"):
        Layout.linear().matrix_shape((4, 0))
