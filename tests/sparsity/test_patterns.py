from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations, product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity import (
    PATTERNS,
    Block,
    Channel,
    ConstantFanIn,
    Layout,
    NByM,
    Pattern,
    Pooling,
    Positions,
    Remainder,
    SharedSupport,
    Target,
    Unstructured,
    keep_count,
)


def bits(text: str) -> list[bool]:
    return [character == "1" for character in text if character in "01"]


# --- a slow oracle, written from the definitions: segments of units of flat indices ---


@dataclass
class Unit:
    members: list[int]
    score: float


def rows_of(shape: tuple[int, ...], layout: Layout) -> list[list[list[int]]]:
    """Flat indices as [row][input][kernel offset]."""
    flat = torch.arange(math.prod(shape)).reshape(shape)
    rows = []
    if layout.out_axis == 0:
        for out in range(shape[0]):
            rows.append([flat[out, i].reshape(-1).tolist() for i in range(shape[1])])
    else:
        per_group = shape[0] // layout.groups
        for group, out in product(range(layout.groups), range(shape[1])):
            rows.append([flat[group * per_group + i, out].reshape(-1).tolist() for i in range(per_group)])
    return rows


def segments_of(pattern: Pattern, scores: Tensor, layout: Layout, pooling: Pooling) -> Iterator[list[Unit]]:
    shape, values = tuple(scores.shape), scores.double().reshape(-1).tolist()
    flat = torch.arange(scores.numel()).reshape(shape)
    match pattern:
        case Unstructured():
            yield [Unit([i], values[i]) for i in range(len(values))]
        case Channel(axis):
            slices = [flat.select(axis, i).reshape(-1).tolist() for i in range(shape[axis])]
            yield [Unit(members, sum(values[i] for i in members)) for members in slices]
        case Block(height, width):
            corners = product(range(0, shape[0], height), range(0, shape[1], width))
            blocks = [flat[r : r + height, c : c + width].reshape(-1).tolist() for r, c in corners]
            yield [Unit(members, sum(values[i] for i in members) / len(members)) for members in blocks]
        case NByM():
            length = shape[pattern.axis]
            for line in flat.movedim(pattern.axis, -1).reshape(-1, length).tolist():
                for start in range(0, length, pattern.m):
                    yield [Unit([i], values[i]) for i in line[start : start + pattern.m]]
        case ConstantFanIn():
            for row in rows_of(shape, layout):
                yield [Unit([i], values[i]) for position in row for i in position]
        case SharedSupport(group, positions):
            rows = rows_of(shape, layout)
            if positions is Positions.ELEMENT:
                rows = [[[i] for position in row for i in position] for row in rows]
            for start in range(0, len(rows), group):
                units = []
                for position in range(len(rows[0])):
                    members = [i for row in rows[start : start + group] for i in row[position]]
                    own = [values[i] for i in members]
                    mean = sum(own) / len(own)
                    rms = (sum(v * v for v in own) / len(own)) ** 0.5
                    units.append(Unit(members, {"rms": rms, "mean": mean, "sum": sum(own)}[pooling.value]))
                yield units


def slow_mask(pattern: Pattern, scores: Tensor, sparsity: float, layout: Layout, pooling: Pooling) -> Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    segments = list(segments_of(pattern, scores, layout, pooling))
    n = scores.numel()
    kept = keep_count(n, sparsity)
    if sparsity == 0.0 or (kept == n and not (isinstance(pattern, NByM) and not pattern.exact)):
        return torch.ones_like(scores, dtype=torch.bool)
    if isinstance(pattern, NByM) and not pattern.exact:
        taken = [0] * len(segments)
        ranked = [(-unit.score, unit.members[0], which) for which, units in enumerate(segments) for unit in units]
        total = 0
        for _, index, which in sorted(ranked):
            limit = math.ceil(pattern.n * len(segments[which]) / pattern.m)
            if total < kept and taken[which] < limit:
                mask[index] = True
                taken[which] += 1
                total += 1
        return mask.reshape(scores.shape)
    for units in segments:
        match pattern:
            case Unstructured():
                k = kept
            case NByM(n=n_, m=m):
                k = math.ceil(n_ * len(units) / m)
            case ConstantFanIn():
                k = min(len(units), kept // len(segments))
            case _:
                k = keep_count(len(units), sparsity)
        for unit in sorted(units, key=lambda u: (-u.score, u.members[0]))[:k]:
            mask[unit.members] = True
    return mask.reshape(scores.shape)


SHAPES = st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Pattern, Tensor, float, Layout, Pooling]:
    """Small integer scores with many ties, so that every pooled score is compared without rounding."""
    kind = draw(st.sampled_from(PATTERNS))
    shape = draw(SHAPES)
    sparsity = draw(st.floats(0, 0.999) | st.sampled_from([0.0, 0.5, 0.9, 1 / 3]))
    pattern: Pattern
    if kind is NByM:
        m = draw(st.integers(2, 4))
        n = draw(st.integers(1, m))
        exact = draw(st.booleans())
        pattern = NByM(n, m, draw(st.integers(0, len(shape) - 1)), exact, Remainder.TAIL)
        sparsity = draw(st.sampled_from([0.0, 1 - n / m])) if exact else sparsity
    elif kind is Block:
        pattern = Block(draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    elif kind is Channel:
        pattern = Channel(draw(st.integers(0, len(shape) - 1)))
    elif kind is SharedSupport:
        pattern = SharedSupport(draw(st.integers(1, 8)), draw(st.sampled_from(Positions)))
    else:
        pattern = kind()
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if shape[0] % g == 0]))
    layout = draw(st.sampled_from([Layout.linear(), Layout.conv(groups), Layout.conv_transpose(groups)]))
    values = draw(st.lists(st.integers(0, 4), min_size=math.prod(shape), max_size=math.prod(shape)))
    if isinstance(pattern, ConstantFanIn):
        rows = layout.matrix_shape(shape)[0]
        assume(keep_count(math.prod(shape), sparsity) >= rows)
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    scores = torch.tensor(values, dtype=dtype).reshape(shape)
    return pattern, scores, sparsity, layout, draw(st.sampled_from(Pooling))


@settings(max_examples=400, deadline=None)
@given(cases())
def test_masks_equal_the_slow_oracle_and_hold_their_pattern(
    case: tuple[Pattern, Tensor, float, Layout, Pooling],
) -> None:
    pattern, scores, sparsity, layout, pooling = case
    before = scores.clone()
    mask = pattern.mask(scores, sparsity, layout, pooling)
    assert torch.equal(mask, slow_mask(pattern, scores, sparsity, layout, pooling))
    assert mask.is_contiguous() and mask.dtype == torch.bool and torch.equal(scores, before)
    pattern.check(mask, layout)
    units = pattern.units(scores.shape, layout)
    chosen = units.collect(mask)
    assert chosen.shape == (units.segments, units.width)
    assert torch.equal(units.spread(chosen), mask)
    if isinstance(pattern, NByM) and not pattern.exact:
        assert int(mask.sum()) <= units.alive_elements(sparsity)
    else:
        assert torch.equal(chosen.sum(1), units.counts(sparsity))
    if isinstance(pattern, Block):
        assert int(mask.sum()) <= units.alive_elements(sparsity)
    elif not isinstance(pattern, NByM) or pattern.exact:
        assert int(mask.sum()) == units.alive_elements(sparsity)
    if units.valid is not None:
        assert not bool((chosen & ~units.valid).any())
        assert int(units.valid.sum()) == scores.numel()


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 2**31))
def test_masks_do_not_depend_on_memory_layout_or_dtype(
    case: tuple[Pattern, Tensor, float, Layout, Pooling], seed: int
) -> None:
    pattern, scores, sparsity, layout, pooling = case
    scores = torch.randn(scores.shape, generator=torch.Generator().manual_seed(seed)).abs()
    expected = pattern.mask(scores, sparsity, layout, pooling)
    reversed_axes = tuple(reversed(range(scores.ndim)))
    strided = scores.permute(reversed_axes).contiguous().permute(reversed_axes)
    assert torch.equal(pattern.mask(strided, sparsity, layout, pooling), expected)
    assert torch.equal(pattern.mask(scores.double(), sparsity, layout, pooling), expected)
    padded = torch.stack([scores, scores + 1], -1)[..., 0]
    assert torch.equal(pattern.mask(padded, sparsity, layout, pooling), expected)


@pytest.mark.parametrize(
    "pattern", [Channel(0), Channel(1), Block(5, 7), SharedSupport(16), SharedSupport(16, Positions.ELEMENT)]
)
@pytest.mark.parametrize("shape", [(67, 90, 3, 5), (400, 300), (30, 20, 50)])
def test_pooled_scores_are_the_same_bits_on_any_memory_layout_and_thread_count(
    pattern: Pattern, shape: tuple[int, ...]
) -> None:
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    units = pattern.units(scores.shape)
    expected = units.pool(scores)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for order in permutations(range(len(shape))):
                strided = scores.permute(order).contiguous().permute([order.index(axis) for axis in range(len(shape))])
                assert torch.equal(units.pool(strided), expected), (count, order)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("pattern", [Unstructured(), Channel(0), Block(2, 3), ConstantFanIn(), SharedSupport(2)])
def test_sparsity_zero_needs_no_scores(pattern: Pattern) -> None:
    assert bool(pattern.mask(torch.full((4, 6), float("nan")), 0.0).all())
    assert bool(pattern.mask(torch.full((4, 6), float("nan")), Target.dense(24)).all())
    with pytest.raises(DataError, match="NaN"):
        pattern.mask(torch.full((4, 6), float("nan")), 0.5)


@pytest.mark.parametrize("pattern", [Unstructured(), Channel(1), Block(2, 3), ConstantFanIn(), SharedSupport(2)])
def test_infinite_scores_are_legal(pattern: Pattern) -> None:
    scores = torch.ones(4, 6)
    scores[1, 2] = float("inf")
    assert bool(pattern.mask(scores, 0.5)[1, 2])


# --- golden tables ---

SCORES = torch.tensor([[1.0, 1, 1, 1, 4, 4]] * 2 + [[2.0, 2, 2, 2, 0, 0]] * 2)


def test_golden_n_by_m() -> None:
    row = torch.tensor([[1.0, 1, 1, 1, 3, 1, 2, 2]])
    assert NByM(2, 4).mask(row, 0.5)[0].tolist() == bits("1100 1010")


def test_golden_n_by_m_tail() -> None:
    row = torch.tensor([[5.0, 4, 3, 2, 1, 9, 8, 7, 1, 2]])
    assert NByM(2, 4, remainder=Remainder.TAIL).mask(row, 0.5)[0].tolist() == bits("1100 0110 01")


def test_golden_n_by_m_not_exact() -> None:
    row = torch.tensor([[9.0, 8, 7, 6, 1, 5, 2, 2]])
    pattern = NByM(2, 4, exact=False)
    assert pattern.mask(row, Target(0.625, 3))[0].tolist() == bits("1100 0100")
    assert pattern.mask(row, 0.625)[0].tolist() == bits("1100 0100")
    assert int(pattern.mask(row, 0.1).sum()) == 4  # every group is full


def test_golden_block() -> None:
    mask = Block(2, 4).mask(SCORES, 0.5)
    assert Block(2, 4).units((4, 6)).pool(SCORES).tolist() == [[1, 4, 2, 0]]
    assert mask.tolist() == [bits("000011")] * 2 + [bits("111100")] * 2
    assert int(mask.sum()) == 12


def test_golden_shared_support() -> None:
    pattern = SharedSupport(2)
    units = pattern.units((4, 6))
    assert units.pool(SCORES).tolist() == [[1, 1, 1, 1, 4, 4], [2, 2, 2, 2, 0, 0]]
    assert units.counts(0.5).tolist() == [3, 3]
    mask = pattern.mask(SCORES, 0.5)
    assert mask.tolist() == [bits("100011")] * 2 + [bits("111000")] * 2
    assert int(mask.sum()) == 12 == units.alive_elements(0.5)


def test_golden_constant_fan_in() -> None:
    scores = torch.rand(16, 27, generator=torch.Generator().manual_seed(0))
    mask = ConstantFanIn().mask(scores, 0.9)
    assert mask.sum(1).tolist() == [2] * 16 and int(mask.sum()) == 32
    active = torch.arange(16) >= 6
    mask = ConstantFanIn().mask(scores, 0.9, active=active)
    assert mask.sum(1).tolist() == [0] * 6 + [4] * 10 and int(mask.sum()) == 40
    ConstantFanIn().check(mask)


# --- what does not fit is refused, with the mend ---


def test_n_by_m_accepts_two_sparsities_only() -> None:
    for sparsity in (0.9, 0.25, 0.499):
        with pytest.raises(ConfigError, match=r"must be 0 or 1 - n/m \(=0.5\)"):
            NByM(2, 4).mask(torch.rand(2, 8), sparsity)
    with pytest.raises(ConfigError, match="must be 0 or 1"):
        NByM(2, 4).mask(torch.rand(1, 4), 0.1)  # too small for a single dead element, wrong all the same
    NByM(1, 3).mask(torch.rand(2, 6), 1 - 1 / 3)
    NByM(1, 3).mask(torch.rand(2, 6), 0.6666667)


def test_n_by_m_remainders() -> None:
    scores = torch.rand(3, 10)
    with pytest.raises(ConfigError, match=r"axis 1 \(=10\).*divisible by `m` \(=4\).*remainder"):
        NByM(2, 4).mask(scores, 0.5)
    dense = NByM(2, 4, remainder=Remainder.DENSE)
    assert bool(dense.mask(scores, 0.5).all())
    assert dense.remark((3, 10)) is not None and "left dense" in str(dense.remark((3, 10)))
    assert dense.remark((3, 8)) is None
    assert dense.target((3, 10), Layout(), Target.of(30, 0.5)) == Target.dense(30)
    with pytest.raises(ConfigError, match="must be alive"):
        dense.check(scores > 0.5)
    assert "2 of 4" in str(NByM(2, 4, remainder=Remainder.TAIL).remark((3, 10)))


def test_n_by_m_axis_of_a_convolution_is_the_input_channel() -> None:
    scores = torch.rand(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    mask = NByM(2, 4).mask(scores, 0.5)
    assert bool((mask.sum(1) == 2).all())
    assert bool((NByM(1, 3, axis=-1).mask(scores, 1 - 1 / 3).sum(3) == 1).all())


def test_n_by_m_counts_without_exact_are_refused() -> None:
    with pytest.raises(ConfigError, match="exact=False"):
        NByM(2, 4, exact=False).units((2, 8)).counts(0.7)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 2)])
def test_n_by_m_numbers(n: int, m: int) -> None:
    with pytest.raises(ConfigError, match=rf"`n` \(={n}\)"):
        NByM(n, m)


def test_constant_fan_in_needs_an_element_a_row() -> None:
    with pytest.raises(ConfigError, match="at most the alive elements"):
        ConstantFanIn().mask(torch.rand(16, 4), 0.9)
    with pytest.raises(ConfigError, match="must be at least 4"):
        ConstantFanIn().mask(torch.rand(8, 4), 0.5, active=torch.arange(8) < 3)
    assert int(ConstantFanIn().mask(torch.rand(8, 4), 0.5, active=torch.arange(8) < 4).sum()) == 16
    with pytest.raises(ConfigError, match="active"):
        ConstantFanIn().mask(torch.rand(8, 4), 0.5, active=torch.ones(8))


def test_constant_fan_in_shortfall_is_less_than_a_row_count() -> None:
    for rows, width, sparsity in product((1, 3, 7, 16), (5, 9), (0.1, 0.33, 0.5, 0.8)):
        budget = keep_count(rows * width, sparsity)
        if budget < rows:
            continue
        alive = int(ConstantFanIn().mask(torch.rand(rows, width), sparsity).sum())
        assert 0 <= budget - alive < rows


def test_block_reports_partial_blocks() -> None:
    assert Block(2, 4).remark((4, 8, 3, 3)) is None
    assert "border" in str(Block(2, 4).remark((5, 8)))
    units = Block(2, 4).units((3, 6))
    assert (units.segments, units.width) == (1, 4)
    assert units.alive_elements(0.75) == 8 and units.alive_elements(0.5) == 12  # the largest: 8, then 4


@pytest.mark.parametrize(
    ("pattern", "shape", "message"),
    [
        (Block(2, 2), (4,), "at least 2 axes"),
        (ConstantFanIn(), (4,), "at least 2 axes"),
        (SharedSupport(2), (4,), "at least 2 axes"),
        (NByM(2, 4), (4,), r"`axis` \(=1\)"),
        (Channel(2), (4, 4), r"`axis` \(=2\)"),
        (Channel(-3), (4, 4), r"`axis` \(=-3\)"),
        (Unstructured(), (0, 4), "non-empty"),
        (SharedSupport(2), (0, 4), "empty"),
        (Unstructured(), (), "at least 1 axis"),
    ],
)
def test_shapes_that_do_not_fit(pattern: Pattern, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pattern.units(shape)


@pytest.mark.parametrize("make", [lambda: Block(0, 1), lambda: Block(1, -1), lambda: SharedSupport(0)])
def test_sizes_must_be_positive(make: object) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        make()  # type: ignore[operator]


def test_row_order_belongs_to_shared_support() -> None:
    for pattern in (Unstructured(), NByM(2, 4), Block(1, 1), Channel(), ConstantFanIn()):
        with pytest.raises(ConfigError, match="row_order"):
            pattern.units((4, 4), row_order=torch.arange(4))


def test_target_must_fit_the_weight() -> None:
    with pytest.raises(ConfigError, match=r"`alive` \(=25\)"):
        Unstructured().mask(torch.rand(4, 6), Target(0.1, 25))
    for sparsity in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="sparsity"):
            Unstructured().mask(torch.rand(4, 6), sparsity)


# --- check names the first violation ---


def test_check_refuses_other_dtypes() -> None:
    with pytest.raises(ConfigError, match="torch.bool"):
        Unstructured().check(torch.ones(2, 2))


@pytest.mark.parametrize(
    ("pattern", "index"),
    [(Channel(0), (1, 3)), (Channel(1), (1, 3)), (Block(2, 3), (1, 4)), (SharedSupport(2), (1, 3))],
)
def test_check_names_the_broken_element(pattern: Pattern, index: tuple[int, int]) -> None:
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[index] = False
    with pytest.raises(ConfigError, match=rf"at index \({index[0]}, {index[1]}\) it is False"):
        pattern.check(mask)


def test_check_names_the_broken_count() -> None:
    mask = NByM(2, 4).mask(torch.rand(2, 8), 0.5)
    extra = mask.clone()
    extra[1, 4:8] = torch.tensor([True, True, True, False])
    for pattern in (NByM(2, 4), NByM(2, 4, exact=False)):
        with pytest.raises(ConfigError, match="group 3 along axis 1 has 3 alive"):
            pattern.check(extra)
    fewer = mask.clone()
    fewer[0, :4] = torch.tensor([True, False, False, False])
    NByM(2, 4, exact=False).check(fewer)
    with pytest.raises(ConfigError, match="group 0 along axis 1 has 1 alive, not 2"):
        NByM(2, 4).check(fewer)
    NByM(2, 4).check(torch.ones(2, 8, dtype=torch.bool))

    rows = torch.tensor([bits("1100"), bits("0000"), bits("0111")])
    with pytest.raises(ConfigError, match="row 0 has 2 alive while another row has 3"):
        ConstantFanIn().check(rows)
    with pytest.raises(ConfigError, match="no row"):
        ConstantFanIn().check(torch.zeros(2, 2, dtype=torch.bool))

    groups = torch.tensor([bits("1100")] * 2 + [bits("0111")] * 2)
    with pytest.raises(ConfigError, match="group 1 has 3 alive positions while group 0 has 2"):
        SharedSupport(2).check(groups)
    with pytest.raises(ConfigError, match="no alive position"):
        SharedSupport(2).check(torch.zeros(4, 4, dtype=torch.bool))


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(0, 10**6))
def test_check_accepts_exactly_the_masks_of_the_definition(
    case: tuple[Pattern, Tensor, float, Layout, Pooling], where: int
) -> None:
    """Flip one element: the result is legal iff it is built of whole units with legal counts."""
    pattern, scores, sparsity, layout, pooling = case
    mask = pattern.mask(scores, sparsity, layout, pooling).reshape(-1)
    mask[where % mask.numel()] ^= True
    alive = mask.tolist()
    segments = list(segments_of(pattern, scores, layout, pooling))
    whole = all(len({alive[i] for i in unit.members}) == 1 for units in segments for unit in units)
    counts = [sum(alive[unit.members[0]] for unit in units) for units in segments]
    legal = whole
    if isinstance(pattern, NByM):
        limits = [math.ceil(pattern.n * len(units) / pattern.m) for units in segments]
        pairs = list(zip(counts, limits, strict=True))
        legal = all(alive) or (counts == limits if pattern.exact else all(c <= most for c, most in pairs))
    elif isinstance(pattern, SharedSupport):
        legal = whole and len(set(counts)) == 1 and counts[0] > 0
    elif isinstance(pattern, ConstantFanIn):
        legal = len(set(counts) - {0}) == 1
    if legal:
        pattern.check(mask.reshape(scores.shape), layout)
    else:
        with pytest.raises(ConfigError, match="`mask` breaks"):
            pattern.check(mask.reshape(scores.shape), layout)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: NByM("2", 4), "n"),
        (lambda: NByM(2, 4.0), "m"),
        (lambda: Block(2.5, 1), "height"),
        (lambda: Block(1, True), "width"),
        (lambda: SharedSupport(2.5), "group"),
    ],
)
def test_sizes_must_be_whole_numbers(make, name) -> None:
    with pytest.raises(ConfigError, match=rf"`{name}` \(=.*\) must be an integer of at least 1"):
        make()


def test_axes_must_be_whole_numbers() -> None:
    with pytest.raises(ConfigError, match=r"`axis` \(='a'\) does not exist"):
        Channel("a").units((2, 3))


@pytest.mark.parametrize(
    ("pattern", "written"),
    [
        (Unstructured(), "Unstructured()"),
        (NByM(2, 4), "NByM(2, 4)"),
        (NByM(2, 4, exact=False, remainder=Remainder.TAIL), "NByM(2, 4, exact=False, remainder=Remainder.TAIL)"),
        (Block(2, 4), "Block(2, 4)"),
        (Channel(), "Channel()"),
        (Channel(1), "Channel(axis=1)"),
        (SharedSupport(64), "SharedSupport(64)"),
        (SharedSupport(8, Positions.ELEMENT), "SharedSupport(8, positions=Positions.ELEMENT)"),
    ],
)
def test_a_pattern_prints_as_it_is_written(pattern, written):
    assert str(pattern) == written
    assert eval(written, {**globals()}) == pattern
