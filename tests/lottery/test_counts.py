"""Alive counts: golden tables and an oracle written from the definition."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fxsparse.errors import ConfigError
from fxsparse.lottery import CountRule, FinalRound, rounds_needed
from fxsparse.lottery.counts import half_up, rational, shrink, target_alive
from fxsparse.sparsity import keep_count

LENET = {"fc1": 235_200, "fc2": 30_000, "out": 1_000}
CONV2 = {"c1": 1_728, "c2": 36_864, "f1": 16_384 * 256, "f2": 65_536, "out": 2_560}
CONV4 = {"c1": 1_728, "c2": 36_864, "c3": 73_728, "c4": 147_456, "f1": 8_192 * 256, "f2": 65_536, "out": 2_560}


@pytest.mark.parametrize(
    ("size", "golden"),
    [
        (266_200, (212_960, 170_368, 136_294, 109_035, 87_228, 69_782, 55_826, 44_661, 35_729, 28_583, 26_620)),
        (
            1_627_734,
            (1_302_187, 1_041_750, 833_400, 666_720, 533_376, 426_701, 341_361, 273_089, 218_471, 174_777, 162_774),
        ),
        (
            2_130_048,
            (1_704_038, 1_363_230, 1_090_584, 872_467, 697_974, 558_379, 446_703, 357_362, 285_890, 228_712, 213_005),
        ),
    ],
)
def test_global_golden(size: int, golden: tuple[int, ...]) -> None:
    assert CountRule("0.2", "0.9").counts({"w": size}).totals == (size, *golden)
    assert CountRule(0.2, 0.9, num_rounds=11).counts({"w": size}).totals == (size, *golden)


def test_ten_rounds_are_refused_and_eleven_named() -> None:
    # 0.8 ** 10 = 0.1074: ten rounds of 20 % stop at 0.8926
    with pytest.raises(ConfigError, match=r"`num_rounds` \(=10\).* needs 11 rounds"):
        CountRule(num_rounds=10).counts(LENET)
    assert rounds_needed("0.2", "0.9") == 11


def test_ten_rounds_stretch_to_the_target() -> None:
    totals = CountRule(num_rounds=10, final_round=FinalRound.STRETCH).counts(LENET).totals
    assert len(totals) == 11 and totals[9] == 35_729 and totals[10] == 26_620


def test_one_shot_is_one_stretched_round() -> None:
    assert CountRule(num_rounds=1, final_round=FinalRound.STRETCH).counts(LENET).totals == (266_200, 26_620)


def test_one_weight_too_many_a_round_would_show() -> None:
    # a percentile threshold gives 28,582 or 28,577 after ten rounds
    assert CountRule(target="0.95").counts(LENET).totals[10] == 28_583


def test_layerwise_golden() -> None:
    rows = CountRule(target="0.99", factors={"out": "0.5"}).counts(LENET, layerwise=True).alive
    assert rows[3] == (120_422, 15_360, 729)
    assert rows[7] == (49_325, 6_291, 478)
    assert rows[9] == (31_568, 4_026, 387)
    assert rows[12] == (16_162, 2_062, 282)
    assert rows[15] == (8_275, 1_056, 206)
    assert rows[18] == (4_237, 541, 149)
    percent = [round(100 * sum(rows[r]) / 266_200, 2) for r in (3, 7, 9, 12, 15, 18)]
    assert percent == [51.28, 21.07, 13.52, 6.95, 3.58, 1.85]


def test_layerwise_clipped_golden() -> None:
    counts = CountRule(target="0.9", factors={"out": "0.5"}).counts(LENET, layerwise=True)
    assert counts.rounds == 11
    assert counts.alive[-1] == (23_312, 2_973, 335)
    assert counts.totals[-1] == 26_620


@pytest.mark.parametrize(
    ("sizes", "labels"), [(CONV2, {11: 8.8, 14: 4.6}), (CONV4, {11: 11.1, 12: 9.2})], ids=["conv2", "conv4"]
)
def test_published_conv_labels(sizes: dict[str, int], labels: dict[int, float]) -> None:
    factors = {name: "0.5" for name in sizes if name.startswith("c") or name == "out"}
    totals = CountRule(target="0.99", factors=factors).counts(sizes, layerwise=True).totals
    for index, label in labels.items():
        assert round(100 * totals[index] / totals[0], 1) == label


def _oracle(size: int, rate: Fraction, goal: int) -> list[int]:
    alive = [size]
    while alive[-1] > goal:
        pruned = int(rate * alive[-1] + Fraction(1, 2))  # both are positive: int is floor
        alive.append(max(goal, alive[-1] - (pruned or 1)))
    return alive


decimals = st.integers(1, 999).map(lambda n: str(Decimal(n) / 1000))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), decimals, decimals)
def test_global_counts_follow_the_definition(size: int, rate: str, target: str) -> None:
    totals = list(CountRule(rate, target).counts({"w": size}).totals) if size > 1 else [1]
    goal = keep_count(size, float(target))
    assert totals == _oracle(size, Fraction(rate), goal)
    assert totals[-1] == goal
    assert all(one > other for one, other in zip(totals, totals[1:], strict=False))  # at least one a round


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=5),
    decimals,
    decimals,
    st.lists(st.integers(1, 10), min_size=5, max_size=5),
    st.integers(0, 3),
)
def test_layerwise_counts(sizes: list[int], rate: str, target: str, tenths: list[int], least: int) -> None:
    named = {f"w{i}": size for i, size in enumerate(sizes)}
    factors = {name: str(Decimal(tenths[i]) / 10) for i, name in enumerate(named)}
    rule = CountRule(rate, target, factors=factors, min_alive=least)
    goal = keep_count(sum(sizes), float(target))
    if sum(min(least, size) for size in sizes) > goal:
        with pytest.raises(ConfigError, match="min_alive_per_layer"):
            rule.counts(named, layerwise=True)
        return
    rows = rule.counts(named, layerwise=True).alive
    assert sum(rows[-1]) == goal
    for before, after in zip(rows, rows[1:], strict=False):
        assert sum(after) < sum(before)
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            assert min(least, sizes[i]) <= b <= a
            wanted = half_up(Fraction(rate) * Fraction(tenths[i], 10) * a)
            if sum(after) > goal and a - wanted >= least and wanted:  # an unclipped round
                assert b == a - wanted


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 300), min_size=1, max_size=4), st.integers(1, 4))
@example([2, 2, 2], 1)
def test_layerwise_stretch_hits_the_target(sizes: list[int], rounds: int) -> None:
    named = {f"w{i}": size for i, size in enumerate(sizes)}
    rule = CountRule("0.1", "0.7", num_rounds=rounds, final_round=FinalRound.STRETCH)
    if target_alive(sum(sizes), "0.7") < len(sizes):  # not one weight for each layer
        with pytest.raises(ConfigError, match="fewer than the"):
            rule.counts(named, layerwise=True)
        return
    counts = rule.counts(named, layerwise=True)
    assert counts.rounds <= rounds and counts.totals[-1] == target_alive(sum(sizes), "0.7")
    assert all(1 <= b <= a for a, b in zip(counts.alive[-2], counts.alive[-1], strict=True))


def test_slow_rates_need_more_rounds_than_the_logarithm() -> None:
    # 1000 weights at 0.14 %: 1.4 rounds down to one weight a round
    assert rounds_needed("0.0014", "0.1") == 76
    assert CountRule("0.0014", "0.1").counts({"w": 1000}).rounds == 100


def test_shrink_takes_the_largest_remainder_then_the_lower_index() -> None:
    assert shrink([1, 1, 1], 2) == [1, 1, 0]
    assert shrink([10, 1], 6) == [5, 1]
    assert shrink([3, 4], 9) == [3, 4]


def test_rates_are_read_as_decimal_text() -> None:
    assert rational(0.1) == Fraction(1, 10)  # not the binary neighbour
    assert rational("1e-2") == Fraction(1, 100)
    assert half_up(Fraction(5, 2)) == 3 and half_up(Fraction(3, 2)) == 2
    for bad in ("x", "", "nan", "inf", float("nan")):
        with pytest.raises(ConfigError, match="rate"):
            rational(bad)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"rate": 0}, "prune_rate_per_round"),
        ({"rate": "1"}, "prune_rate_per_round"),
        ({"target": 1.0}, "target_sparsity"),
        ({"target": -0.1}, "target_sparsity"),
        ({"num_rounds": 0}, "num_rounds"),
        ({"factors": {"a": 0}}, "rate_factors.a"),
        ({"factors": {"a": 1.5}}, "rate_factors.a"),
        ({"min_alive": -1}, "min_alive_per_layer"),
    ],
)
def test_ranges(options: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        CountRule(**options)  # type: ignore[arg-type]  # wrong on purpose


def test_impossible_requests() -> None:
    with pytest.raises(ConfigError, match="no weight to prune"):
        CountRule().counts({})
    with pytest.raises(ConfigError, match=r"`rate_factors` \(=nope\)"):
        CountRule(factors={"nope": "0.5"}).counts({"w": 10}, layerwise=True)
    with pytest.raises(ConfigError, match="scope: layerwise"):
        CountRule(factors={"w": "0.5"}).counts({"w": 10})
    with pytest.raises(ConfigError, match="min_alive_per_layer"):
        CountRule(min_alive=20).counts({"a": 50, "b": 50}, layerwise=True)
