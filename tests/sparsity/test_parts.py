"""Weights of several parts: every pattern treats each part as a weight of its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.sparsity import (
    AliveStorage,
    Block,
    Channel,
    ConstantFanIn,
    Layout,
    NByM,
    Pattern,
    SharedSupport,
    Unstructured,
)
from fxsparse.sparsity.units import PartUnits

PATTERNS = (ConstantFanIn(), SharedSupport(3), SharedSupport(2), Channel(0), Channel(1), Block(2, 3), NByM(1, 2))


def parts_by_hand(tensor: Tensor, layout: Layout) -> list[Tensor]:
    """The parts, cut out one by one, (out, in, *kernel) where the layout says so for the whole."""
    found = [tensor]
    for axis in reversed(layout.batch):
        found = [one for part in found for one in part.unbind(axis)]
    if len(layout.batch) == 2:  # the outer axis first
        outer = tensor.shape[layout.batch[0]]
        found = [found[i] for i in torch.arange(len(found)).reshape(-1, outer).t().flatten().tolist()]
    out = layout.out_axis - sum(axis < layout.out_axis for axis in layout.batch)
    return [block for part in found for block in part.chunk(layout.blocks, out)]


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, Layout]:
    blocks = draw(st.sampled_from([1, 2, 3]))
    out, inputs = blocks * draw(st.integers(2, 5)), 2 * draw(st.integers(1, 3))
    experts = draw(st.sampled_from([(), (2,), (3,)]))
    flipped = draw(st.booleans())
    lead = len(experts)
    shape = (*experts, inputs, out) if flipped else (*experts, out, inputs)
    axes = (lead + 1, lead) if flipped else (lead, lead + 1)
    seed = draw(st.integers(0, 99))
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return values, Layout(*axes, blocks=blocks, batch=tuple(range(lead)))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@settings(max_examples=25, deadline=None)
@given(drawn=weights(), sparsity=st.sampled_from([0.0, 0.5]))
def test_the_mask_of_a_weight_is_the_masks_of_its_parts(
    pattern: Pattern, drawn: tuple[Tensor, Layout], sparsity: float
) -> None:
    scores, layout = drawn
    sizes, one = layout.part(scores.shape)
    assume(not isinstance(pattern, NByM) or sizes[1] % 2 == 0)
    mask = pattern.mask(scores, sparsity, layout)
    pattern.check(mask, layout)
    for part, values in zip(parts_by_hand(mask, layout), parts_by_hand(scores, layout), strict=True):
        assert torch.equal(part, pattern.mask(values, sparsity, one))
    units = pattern.units(scores.shape, layout)
    assert torch.equal(units.spread(units.collect(mask)), mask)
    assert units.alive_elements(sparsity) == int(mask.sum()) or isinstance(pattern, Block)
    chosen = units.collect(mask)
    assert torch.equal(chosen.sum(1), units.counts(sparsity))


@settings(max_examples=40, deadline=None)
@given(drawn=weights())
def test_parts_and_rows_come_back(drawn: tuple[Tensor, Layout]) -> None:
    values, layout = drawn
    parts = layout.to_parts(values)
    assert parts.shape == (layout.parts(values.shape), *layout.part(values.shape)[0])
    assert all(torch.equal(a, b) for a, b in zip(parts, parts_by_hand(values, layout), strict=True))
    assert torch.equal(layout.from_parts(parts, values.shape), values)
    rows = layout.to_rows(values)
    assert rows.shape == layout.matrix_shape(values.shape)
    assert torch.equal(layout.from_rows(rows, values.shape), values)
    _, one = layout.part(values.shape)
    by_hand = torch.cat([one.to_rows(part) for part in parts_by_hand(values, layout)])
    assert torch.equal(rows, by_hand)


def test_two_batch_axes() -> None:
    values, layout = torch.rand(2, 6, 3, 4), Layout(1, 3, blocks=2, batch=(0, 2))
    assert all(torch.equal(a, b) for a, b in zip(layout.to_parts(values), parts_by_hand(values, layout), strict=True))
    mask = SharedSupport(2).mask(values, 0.5, layout)
    for part, scores in zip(parts_by_hand(mask, layout), parts_by_hand(values, layout), strict=True):
        assert torch.equal(part, SharedSupport(2).mask(scores, 0.5))


@pytest.mark.parametrize("group", [2, 4, 5])
def test_no_group_has_rows_of_two_parts(group: int) -> None:
    units = SharedSupport(group).units((9, 4), Layout(blocks=3))
    chosen = torch.zeros(units.segments, 4, dtype=torch.bool)
    for segment in range(units.segments):
        one = chosen.clone()
        one[segment] = True
        rows = units.spread(one).any(1).nonzero()[:, 0]
        assert len(set((rows // 3).tolist())) == 1
    assert int(units.group_sizes().sum()) == 9


def test_storage_of_a_weight_of_several_parts() -> None:
    layout, pattern = Layout(blocks=3), SharedSupport(2)
    weight = torch.randn(9, 6)
    mask = pattern.mask(weight.abs(), 0.5, layout)
    packed = AliveStorage.pack(weight * mask, mask, pattern, layout)
    unpacked, found = packed.unpack()
    assert torch.equal(unpacked, weight * mask) and torch.equal(found, mask)


def test_row_orders_stay_within_parts() -> None:
    pattern, layout = SharedSupport(2), Layout(blocks=2)
    order = torch.tensor([2, 0, 1, 5, 4, 3])
    scores = torch.rand(6, 4)
    mask = pattern.mask(scores, 0.5, layout, row_order=order)
    for half, part in ((slice(0, 3), scores[:3]), (slice(3, 6), scores[3:])):
        assert torch.equal(mask[half], pattern.mask(part, 0.5, row_order=order[half] - half.start))
    with pytest.raises(ConfigError, match="rows of each of the 2 parts"):
        pattern.units((6, 4), layout, torch.tensor([3, 0, 1, 5, 4, 2]))


def test_unstructured_masks_rank_the_whole_weight() -> None:
    scores = torch.rand(3, 4, 5)
    assert torch.equal(Unstructured().mask(scores, 0.5, Layout(1, 2, batch=(0,))), Unstructured().mask(scores, 0.5))


def test_without_parts_units_are_the_plain_ones() -> None:
    assert not isinstance(Channel(0).units((4, 4)), PartUnits)
    assert isinstance(Channel(0).units((4, 4), Layout(blocks=2)), PartUnits)
    assert NByM(2, 4).units((2, 3, 8), Layout(1, 2, batch=(0,))).segments == 2 * 3 * 2


@pytest.mark.parametrize(
    "options, match",
    [
        ({"blocks": 0}, "`blocks`"),
        ({"batch": (0,)}, "`batch`"),
        ({"batch": (3, 2)}, "`batch`"),
        ({"batch": (2, 2)}, "`batch`"),
        ({"batch": (-1,)}, "`batch`"),
        ({"groups": 2, "blocks": 2}, "`groups`"),
    ],
)
def test_layouts_that_make_no_sense(options: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Layout(**options)  # type: ignore[arg-type]


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"axis 0 \(=7\) must be divisible by `blocks`"):
        SharedSupport(2).units((7, 4), Layout(blocks=3))
    with pytest.raises(ConfigError, match="no axis 2"):
        SharedSupport(2).units((6, 4), Layout(0, 1, batch=(2,)))
    with pytest.raises(ConfigError, match="each of the 2 blocks"):
        NByM(1, 2, axis=0).units((18, 4), Layout(blocks=2))
