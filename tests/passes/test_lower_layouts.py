from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.passes.lower_layouts import (
    UNIT,
    AxisOrder,
    Size,
    fits_convolution,
    linear_order,
    natural,
    permuted,
    product_order,
    through_view,
)


def laid(tensor: torch.Tensor, order: AxisOrder) -> torch.Tensor:
    """The tensor with its axes in an order, as the definition says."""
    made = tensor.permute([label for label in order if label != UNIT])
    for axis, label in enumerate(order):
        if label == UNIT:
            made = made.unsqueeze(axis)
    return made.contiguous()


def sizes(shape: tuple[int, ...]) -> list[Size]:
    return [Size.of(size) for size in shape]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.data())
def test_a_view_is_a_view_of_memory_exactly_where_it_says_so(shape: list[int], data: st.DataObject) -> None:
    numel = torch.Size(shape).numel()
    shapes = [
        s for n in range(1, 5) for s in itertools.product(range(1, 7), repeat=n) if torch.Size(s).numel() == numel
    ]
    after = data.draw(st.sampled_from(shapes))
    order = tuple(data.draw(st.permutations(range(len(shape)))))
    if data.draw(st.booleans()):
        order = (UNIT, *order)
    found = through_view(order, sizes(tuple(shape)), sizes(after))
    if found is None:
        return
    tensor = torch.arange(numel).reshape(shape)
    expected = laid(tensor.reshape(after), found)
    assert torch.equal(laid(tensor, order).reshape(expected.shape), expected)


def test_heads_are_split_and_merged_in_channels_first_order() -> None:
    batch, tokens, width = Size.of(2), Size.of(7), Size.of(12)
    split = [batch, tokens, Size.of(3), Size.of(4)]
    assert through_view((0, 2, 1), [batch, tokens, width], split) == (0, 2, 3, 1)
    assert through_view((0, 2, 3, 1), split, [batch, tokens, width]) == (0, 2, 1)
    assert through_view((0, 3, 2, 1), split, [batch, tokens, width]) is None
    assert through_view(natural(3), [batch, tokens, width], split) == natural(4)


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(4)), st.permutations(range(4)))
def test_a_permutation_moves_nothing(dims: list[int], order: list[int]) -> None:
    tensor = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    after = permuted(tuple(order), dims)
    assert torch.equal(laid(tensor.permute(dims), after), laid(tensor, tuple(order)))


def test_the_orders_that_forms_ask_for() -> None:
    assert linear_order(sizes((5,))) == (UNIT, 0, UNIT)
    assert linear_order(sizes((5, 8))) == (UNIT, 1, 0)
    assert linear_order(sizes((2, 64, 8))) == (0, 2, 1)
    assert linear_order(sizes((64, 2, 8))) == (1, 2, 0)
    assert linear_order(sizes((2, 3, 4, 8))) == (0, 3, 1, 2)
    assert linear_order(sizes((1,) * 6)) is None
    assert product_order(2) == (1, 0) and product_order(3) == (0, 2, 1) and product_order(1) is None
    for rank in range(1, 6):
        order = linear_order(sizes((9,) * rank))
        assert order is not None and fits_convolution(order, rank)
    assert not fits_convolution((1, 0), 2)
