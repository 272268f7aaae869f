from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity import (
    AliveStorage,
    Channel,
    Layout,
    Pooling,
    Positions,
    SharedSupport,
    keep_count,
)

LAYOUTS = st.sampled_from([Layout.linear(), Layout.conv(2), Layout.conv_transpose(), Layout.conv_transpose(2)])


def test_last_group_may_be_smaller() -> None:
    pattern = SharedSupport(3)
    units = pattern.units((4, 6))
    assert (units.segments, units.group_sizes().tolist()) == (2, [3, 1])
    scores = torch.zeros(4, 6)
    scores[3, 5] = 1.0
    mask = pattern.mask(scores, 5 / 6)
    assert mask[3].tolist() == [False] * 5 + [True]
    assert mask[:3].tolist() == [[True] + [False] * 5] * 3
    assert "1 of 3 rows" in str(pattern.remark((4, 6)))
    assert pattern.remark((6, 6)) is None and SharedSupport(9).remark((4, 6)) is None


def test_poolings() -> None:
    scores = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 0.0]])
    units = SharedSupport(2).units((3, 2))
    assert units.pool(scores, Pooling.SUM).tolist() == [[4, 4], [5, 0]]
    assert units.pool(scores, Pooling.MEAN).tolist() == [[2, 2], [5, 0]]
    assert torch.allclose(units.pool(scores, Pooling.RMS), torch.tensor([[5**0.5, 2.0], [5.0, 0.0]]).double())
    assert SharedSupport(3).mask(scores, 0.5, pooling=Pooling.RMS)[0].tolist() == [True, False]
    conv = torch.tensor([[[1.0, 3.0]], [[5.0, 7.0]]])  # two rows, one channel, two kernel offsets
    pooled = [SharedSupport(2).units((2, 1, 2)).pool(conv, pooling).tolist() for pooling in Pooling]
    assert pooled == [[[21**0.5]], [[4.0]], [[16.0]]]
    squares = torch.tensor([[2.0, 0.0], [2.0, 3.0]])  # the mean prefers column 0, the root mean square column 1
    assert SharedSupport(2).mask(squares, 0.5, pooling=Pooling.MEAN)[0].tolist() == [True, False]
    assert SharedSupport(2).mask(squares, 0.5, pooling=Pooling.RMS)[0].tolist() == [False, True]


def test_positions_of_a_convolution() -> None:
    scores = torch.rand(4, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    channel = SharedSupport(2).mask(scores, 0.5, Layout.conv())
    assert SharedSupport(2).units(scores.shape, Layout.conv()).width == 6
    assert bool((channel.flatten(2).all(2) == channel.flatten(2).any(2)).all())
    assert bool((channel[:, :, 0, 0].sum(1) == 3).all()) and torch.equal(channel[0], channel[1])
    element = SharedSupport(2, Positions.ELEMENT).mask(scores, 0.5, Layout.conv())
    assert bool((element.flatten(1).sum(1) == keep_count(54, 0.5)).all()) and torch.equal(element[0], element[1])
    assert not torch.equal(element, channel)


def test_grouped_transposed_convolution_counts_inputs_per_group() -> None:
    units = SharedSupport(3).units((8, 3, 5), Layout.conv_transpose(2))
    assert (units.segments, units.width) == (2, 4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 5), st.floats(0, 0.99), st.integers(0, 99))
def test_one_group_is_channel_of_the_inputs(rows: int, inputs: int, extra: int, sparsity: float, seed: int) -> None:
    scores = torch.randint(5, (rows, inputs, 2), generator=torch.Generator().manual_seed(seed)).float()
    shared = SharedSupport(rows + extra).mask(scores, sparsity, pooling=Pooling.SUM)
    assert torch.equal(shared, Channel(1).mask(scores, sparsity))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_row_order_is_the_natural_order_of_permuted_rows(data: st.DataObject) -> None:
    rows, inputs = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 5))
    group, sparsity = data.draw(st.integers(1, 8)), data.draw(st.floats(0, 0.99))
    order = torch.tensor(data.draw(st.permutations(range(rows))))
    scores = torch.rand(rows, inputs, 2, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    pattern = SharedSupport(group, data.draw(st.sampled_from(Positions)))
    mask = pattern.mask(scores, sparsity, row_order=order)
    expected = torch.empty_like(mask)
    expected[order] = pattern.mask(scores[order], sparsity)
    assert torch.equal(mask, expected)
    pattern.check(mask, row_order=order)
    units = pattern.units(scores.shape, row_order=order)
    assert torch.equal(units.spread(units.collect(mask)), mask)


def test_row_order_must_be_a_permutation() -> None:
    pattern = SharedSupport(2)
    for order in (torch.tensor([0, 1]), torch.tensor([0, 1, 2, 2]), torch.tensor([0.0, 1.0, 2.0, 3.0])):
        with pytest.raises(ConfigError, match="row_order"):
            pattern.units((4, 6), row_order=order)
    mask = pattern.mask(torch.rand(4, 6), 0.5, row_order=torch.tensor([0, 2, 1, 3]))
    if not torch.equal(mask[0], mask[1]):
        with pytest.raises(ConfigError, match="breaks"):
            pattern.check(mask)


@settings(max_examples=80, deadline=None)
@given(st.data(), LAYOUTS, st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
def test_alive_storage_round_trips_bit_for_bit(data: st.DataObject, layout: Layout, dtype: torch.dtype) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
    if layout.in_axis == 0:
        shape = (shape[0] * layout.groups, *shape[1:])
    pattern = SharedSupport(data.draw(st.integers(1, 6)), data.draw(st.sampled_from(Positions)))
    rows, inputs, kernel = layout.matrix_shape(shape)
    order = torch.tensor(data.draw(st.permutations(range(rows)))) if data.draw(st.booleans()) else None
    source = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randn(shape, generator=source).to(dtype)
    weight.reshape(-1)[0] = -0.0  # an alive zero keeps its sign, and does not count as dead
    mask = pattern.mask(weight.abs(), data.draw(st.floats(0, 0.99)), layout, row_order=order)
    weight = torch.where(mask, weight, 0.0)
    stored = AliveStorage.pack(weight, mask, pattern, layout, order)
    units = pattern.units(shape, layout, order)
    k = int(units.collect(mask)[0].sum())
    assert stored.positions.shape == (units.segments, k) and stored.positions.dtype == torch.int32
    assert stored.values.shape[:3] == (units.segments, units.group, k) and stored.values.dtype == dtype
    wide = kernel > 1 and pattern.positions is Positions.CHANNEL
    assert stored.values.ndim == (4 if wide else 3)
    back_weight, back_mask = stored.unpack()
    assert torch.equal(back_mask, mask)
    raw = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    assert torch.equal(back_weight.view(raw), weight.view(raw))


def test_alive_storage_pads_with_zeros_that_are_never_read() -> None:
    weight = torch.arange(1.0, 13.0).reshape(3, 4)
    mask = torch.tensor([[True, False, True, False]] * 2 + [[False, True, False, True]])
    stored = AliveStorage.pack(torch.where(mask, weight, 0.0), mask, SharedSupport(2))
    assert stored.values.tolist() == [[[1, 3], [5, 7]], [[10, 12], [0, 0]]]
    assert stored.positions.tolist() == [[0, 2], [1, 3]]
    stored.values[1, 1] = float("nan")
    assert torch.equal(stored.unpack()[0], torch.where(mask, weight, 0.0))


def test_alive_storage_refuses_what_it_would_lose() -> None:
    mask = torch.tensor([[True, False]] * 2)
    with pytest.raises(DataError, match="2 dead elements"):
        AliveStorage.pack(torch.ones(2, 2), mask, SharedSupport(2))
    with pytest.raises(ConfigError, match="breaks"):
        AliveStorage.pack(torch.zeros(2, 2), torch.tensor([[True, False], [False, True]]), SharedSupport(2))
