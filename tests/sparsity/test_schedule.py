from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.errors import ConfigError
from fxsparse.sparsity import (
    ConstantSparsity,
    CosineSparsity,
    CubicSparsity,
    CustomSparsity,
    DropFraction,
    DropKind,
    LinearSparsity,
    QuadraticOutSparsity,
    SparsitySchedule,
    UpdateSteps,
)

RISING = (LinearSparsity, QuadraticOutSparsity, CosineSparsity, CubicSparsity)


@pytest.mark.parametrize(
    ("step", "values"),
    [
        (10, (0.09, 0.171, 0.02202, 0.2439)),
        (25, (0.225, 0.39375, 0.1318, 0.52031)),
        (50, (0.45, 0.675, 0.45, 0.7875)),
        (75, (0.675, 0.84375, 0.7682, 0.88594)),
        (90, (0.81, 0.891, 0.87798, 0.8991)),
    ],
)
def test_golden_sparsities(step: int, values: tuple[float, ...]) -> None:
    for kind, expected in zip(RISING, values, strict=True):
        assert kind(0.0, 0.9, 0, 100)(step) == pytest.approx(expected, abs=5.1e-6)
        assert kind(0.0, 0.9, 0, 100)(100) == 0.9


def test_golden_cubic() -> None:
    cubic = CubicSparsity(0.0, 0.9, 1000, 5000)
    found = [cubic(step) for step in (1000, 2000, 3000, 4000, 5000, 6000)]
    assert found == pytest.approx([0, 0.52031, 0.7875, 0.88594, 0.9, 0.9], abs=5.1e-6)
    assert cubic(5000) == cubic(10**9) == 0.9 and cubic(0) == 0.0


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(RISING), st.floats(0, 0.99), st.floats(0, 0.99), st.integers(0, 1000), st.integers(0, 1000))
def test_schedules_are_monotone_with_exact_ends(
    kind: type[SparsitySchedule], one: float, other: float, start: int, length: int
) -> None:
    low, high = sorted((one, other))
    schedule = kind(low, high, start, start + length)
    steps = sorted({0, start, start + 1, start + length // 3, start + length // 2, start + length, start + length + 9})
    values = [schedule(step) for step in steps]
    assert all(a <= b + 1e-12 for a, b in zip(values, values[1:], strict=False))
    assert all(low - 1e-12 <= value <= high + 1e-12 for value in values)
    assert schedule(start + length) == high
    if length and start:
        assert schedule(start) == low == schedule(start - 1)


def test_equal_ends_are_one_shot() -> None:
    for kind in RISING:
        schedule = kind(0.1, 0.9, 50, 50)
        assert (schedule(49), schedule(50), schedule(51)) == (0.1, 0.9, 0.9)


def test_constant_ignores_the_initial_sparsity() -> None:
    schedule = ConstantSparsity(0.0, 0.8, 100, 200)
    assert {schedule(step) for step in (0, 99, 100, 150, 200, 500)} == {0.8}


def test_cosine_is_shifted_by_its_start() -> None:
    assert CosineSparsity(0.0, 0.9, 500, 1500)(1000) == pytest.approx(0.45)


def test_cycles_reach_the_final_sparsity_even_when_there_is_one() -> None:
    schedule = LinearSparsity(0.1, 0.9, 0, 1)
    assert schedule.at_cycle(0, 1) == 0.9
    assert [schedule.at_cycle(cycle, 3) for cycle in range(3)] == pytest.approx([0.1, 0.5, 0.9])
    for cycle, cycles in ((3, 3), (-1, 3), (0, 0)):
        with pytest.raises(ConfigError, match="cycle"):
            schedule.at_cycle(cycle, cycles)


def test_custom_list() -> None:
    schedule = CustomSparsity(((10, 0.5), (20, 0.8)), initial=0.2)
    assert [schedule(step) for step in (0, 9, 10, 19, 20, 99)] == [0.2, 0.2, 0.5, 0.5, 0.8, 0.8]
    assert (schedule.start, schedule.end, schedule.final) == (10, 20, 0.8)
    for points in ((), ((10, 0.5), (10, 0.6)), ((20, 0.5), (10, 0.6)), ((-1, 0.5),), ((5, 1.0),)):
        with pytest.raises(ConfigError):
            CustomSparsity(points)


@pytest.mark.parametrize(
    ("step", "values"),
    [
        (100, (0.292658, 0.27, 0.2187)),
        (250, (0.256066, 0.225, 0.126562)),
        (500, (0.15, 0.15, 0.0375)),
        (750, (0.043934, 0.075, 0.004687)),
        (900, (0.007342, 0.03, 0.0003)),
        (1000, (0.0, 0.0, 0.0)),
    ],
)
def test_golden_drop_fractions(step: int, values: tuple[float, ...]) -> None:
    kinds = (DropKind.COSINE, DropKind.LINEAR, DropKind.POWER)
    found = [DropFraction(kind, 0.3, 0, 1000, power=3)(step) for kind in kinds]
    assert found == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize("kind", DropKind)
def test_drop_fraction_is_alpha_at_first_and_zero_from_the_end_on(kind: DropKind) -> None:
    fraction = DropFraction(kind, 0.3, 100, 500)
    assert fraction(0) == fraction(100) == 0.3
    assert fraction(500) == fraction(501) == 0.0
    assert DropFraction(kind, 0.3, 100, 100)(100) == 0.0
    if kind is DropKind.CONSTANT:
        assert fraction(499) == 0.3


def test_golden_update_steps() -> None:
    assert UpdateSteps(100, 0, 750).steps() == [100, 200, 300, 400, 500, 600, 700]
    assert UpdateSteps(100, 0, 700).steps() == [100, 200, 300, 400, 500, 600]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 40), st.booleans())
def test_update_steps_equal_their_definition(every: int, start: int, length: int, inclusive: bool) -> None:
    end = start + length
    updates = UpdateSteps(every, start, end, inclusive)
    expected = []
    for t in range(end + 20):
        regular = t > 0 and t >= start and (t - start) % every == 0
        if inclusive:
            if (regular and t <= end) or (t == end and t > 0):
                expected.append(t)
        elif regular and t < end:
            expected.append(t)
    assert [t for t in range(end + 20) if updates(t)] == expected == updates.steps()


def test_a_forced_last_update_reaches_the_final_sparsity() -> None:
    cubic, updates = CubicSparsity(0.0, 0.9, 0, 250), UpdateSteps(100, 0, 250, inclusive_end=True)
    assert updates.steps() == [100, 200, 250] and cubic(updates.steps()[-1]) == 0.9


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="start"):
        LinearSparsity(0, 0.9, 10, 5)
    with pytest.raises(ConfigError, match="start"):
        LinearSparsity(0, 0.9, -1, 5)
    with pytest.raises(ConfigError, match="final"):
        CubicSparsity(0, 1.0, 0, 5)
    with pytest.raises(ConfigError, match="initial"):
        CubicSparsity(math.nan, 0.5, 0, 5)
    with pytest.raises(ConfigError, match="alpha"):
        DropFraction(DropKind.COSINE, 1.5, 0, 10)
    with pytest.raises(ConfigError, match="power"):
        DropFraction(DropKind.POWER, 0.5, 0, 10, power=0)
    with pytest.raises(ConfigError, match="every"):
        UpdateSteps(0, 0, 10)
