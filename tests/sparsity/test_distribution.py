from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.errors import ConfigError
from fxsparse.sparsity import (
    ERK,
    Block,
    Channel,
    ConstantFanIn,
    Custom,
    Distribution,
    Global,
    Layout,
    NByM,
    Normalize,
    Remainder,
    SharedSupport,
    Target,
    Uniform,
    WeightSpec,
    keep_count,
    round_to_total,
    solve_erk,
)
from fxsparse.sparsity.erk import at_least_one

LENET = [WeightSpec("fc1", (300, 784)), WeightSpec("fc2", (100, 300)), WeightSpec("out", (10, 100))]


def kept(targets: dict[str, Target]) -> list[int]:
    return [target.alive for target in targets.values()]


# --- uniform ---


def test_uniform() -> None:
    targets = Uniform().targets(LENET, 0.9)
    assert targets == {"fc1": Target(0.9, 23520), "fc2": Target(0.9, 3000), "out": Target(0.9, 100)}
    assert list(targets) == ["fc1", "fc2", "out"]


def test_uniform_dense_first_is_outside_the_target_unless_rebalanced() -> None:
    plain = Uniform(dense_first=True).targets(LENET, 0.1)
    assert plain["fc1"] == Target.dense(235200) and plain["fc2"] == Target.of(30000, 0.1)
    rest = [WeightSpec("a", (10, 10)), WeightSpec("b", (10, 40))]
    raised = Uniform(dense_first=True, rebalance=True).targets(rest, 0.4)
    assert raised["a"].alive == 100 and raised["b"] == Target.of(400, 0.5)
    assert sum(kept(raised)) == keep_count(500, 0.4)
    with pytest.raises(ConfigError, match="`a` dense.*1.125"):
        Uniform(dense_first=True, rebalance=True).targets(rest, 0.9)
    with pytest.raises(ConfigError, match="inf"):
        Uniform(dense_first=True, rebalance=True).targets(rest[:1], 0.5)
    assert Uniform(dense_first=True, rebalance=True).targets(rest, 0.0)["b"] == Target.dense(400)


# --- ERK ---


@pytest.mark.parametrize(
    ("sparsity", "epsilon", "dense", "alive"),
    [
        (0.9, 17.264151, (2,), (18714, 6906, 1000)),
        (0.98, 3.340025, (), (3621, 1336, 367)),
        (0.5, None, (1, 2), (102100, 30000, 1000)),
    ],
)
def test_golden_erk(sparsity: float, epsilon: float | None, dense: tuple[int, ...], alive: tuple[int, ...]) -> None:
    solution = ERK().solve(LENET, sparsity)
    assert solution.dense == dense and solution.alive == alive
    assert sum(alive) == sum(keep_count(w.numel, sparsity) for w in LENET)
    if epsilon is not None:
        assert solution.epsilon == pytest.approx(epsilon, abs=5e-7)
    assert kept(ERK().targets(LENET, sparsity)) == list(alive)
    if sparsity == 0.9:
        assert solution.densities == pytest.approx((0.079568, 0.230189, 1), abs=5e-7)
        assert sum(alive) == 26620
    if sparsity == 0.98:
        assert sum(alive) == 5324


SHAPES = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(SHAPES, st.floats(0, 0.999), st.sampled_from([1.0, 0.5, 2.0]))
def test_erk_is_a_fixed_point_of_exact_total(shapes: list[tuple[int, ...]], sparsity: float, power: float) -> None:
    solution = solve_erk(shapes, sparsity, power)
    sizes = [math.prod(shape) for shape in shapes]
    p = [(sum(shape) / math.prod(shape)) ** power for shape in shapes]
    assert sum(solution.alive) == sum(keep_count(n, sparsity) for n in sizes)
    assert all(1 <= k <= n for k, n in zip(solution.alive, sizes, strict=True))
    assert all(0 < d <= 1 for d in solution.densities)
    for i, density in enumerate(solution.densities):
        if i in solution.dense:
            assert density == 1 and (solution.epsilon == 0 or solution.epsilon * p[i] > 1 - 1e-9)
        else:
            assert density == pytest.approx(solution.epsilon * p[i])
    total = sum(d * n for d, n in zip(solution.densities, sizes, strict=True))
    assert total == pytest.approx(sum(solution.alive))
    for k, d, n in zip(solution.alive, solution.densities, sizes, strict=True):
        assert abs(k - d * n) <= max(1 + 1e-6, len(sizes)) and (abs(k - d * n) < 1 + 1e-6 or min(solution.alive) == 1)
    if sparsity == 0:
        assert list(solution.alive) == sizes


def test_equal_shapes_are_clamped_together() -> None:
    solution = solve_erk([(4, 4), (4, 4), (200, 200)], 0.9)
    assert solution.dense == (0, 1)
    assert solution.alive[:2] == (16, 16)


def test_erk_without_kernel_dims() -> None:
    shapes = [(16, 8, 3, 3), (32, 16, 3, 3)]
    plain = solve_erk(shapes, 0.9, kernel=False)
    assert plain.densities[0] / plain.densities[1] == pytest.approx((24 / 128) / (48 / 512))
    full = solve_erk(shapes, 0.9)
    assert full.densities[0] / full.densities[1] == pytest.approx((30 / 1152) / (54 / 4608))


def test_erk_power_zero_is_uniform() -> None:
    solution = solve_erk([(10, 10), (20, 20)], 0.75, power=0.0)
    assert solution.densities == (0.25, 0.25)


def test_forced_dense_weights_are_paid_by_the_others() -> None:
    targets = ERK(dense=("fc2",)).targets(LENET, 0.8)
    assert targets["fc2"] == Target.dense(30000)
    assert sum(kept(targets)) == sum(keep_count(w.numel, 0.8) for w in LENET)
    with pytest.raises(ConfigError, match="budget"):
        ERK(dense=("fc1",)).targets(LENET, 0.9)
    with pytest.raises(ConfigError, match="unknown weight `fc9`"):
        ERK(dense=("fc9",)).targets(LENET, 0.9)


def test_largest_remainder_rounding() -> None:
    assert round_to_total([1.5, 1.5, 1.0], 4, [9, 9, 9]) == [2, 1, 1]  # ties to the lower index
    assert round_to_total([0.2, 0.9, 0.9], 2, [9, 9, 9]) == [0, 1, 1]
    assert round_to_total([2.0, 2.9, 0.1], 5, [2, 2, 9]) == [2, 2, 1]  # caps
    assert round_to_total([1.0, 1.0], 1, [9, 9]) == [1, 0]
    with pytest.raises(ConfigError, match="caps"):
        round_to_total([1.0], 3, [2])


def test_zero_counts_become_one_paid_by_the_largest() -> None:
    assert at_least_one([0, 5, 5, 0]) == [1, 4, 4, 1]
    assert at_least_one([0, 9, 3], locked=[1]) == [1, 9, 2]
    with pytest.raises(ConfigError, match="too few"):
        at_least_one([0, 0, 2])
    tiny = solve_erk([(1, 1000), (1000, 1000)], 0.9999, power=4.0)
    assert min(tiny.alive) >= 1 and sum(tiny.alive) == keep_count(1000, 0.9999) + keep_count(10**6, 0.9999)


# --- global ---


def test_global_ranks_all_weights_together() -> None:
    weights = [WeightSpec("a", (4,)), WeightSpec("b", (4,))]
    scores = {"a": torch.tensor([9.0, 8, 7, 1]), "b": torch.tensor([6.0, 5, 4, 3])}
    assert kept(Global().targets(weights, 0.5, scores)) == [3, 1]
    assert kept(Global(min_alive=2).targets(weights, 0.5, scores)) == [2, 2]
    scores["b"] = torch.zeros(4)
    assert kept(Global().targets(weights, 0.5, scores)) == [3, 1]  # one is forced in although a[3] is better
    ties = {"a": torch.ones(4), "b": torch.ones(4)}
    assert kept(Global().targets(weights, 0.5, ties)) == [3, 1]  # ties: the earlier weight, after forced ones


def test_global_normalisation() -> None:
    weights = [WeightSpec("a", (4,)), WeightSpec("b", (4,))]
    scores = {"a": torch.tensor([400.0, 300, 200, 100]), "b": torch.tensor([0.004, 0.003, 0.002, 0.001])}
    assert kept(Global().targets(weights, 0.5, scores)) == [3, 1]
    assert kept(Global(Normalize.L2).targets(weights, 0.5, scores)) == [2, 2]
    scores["b"] = torch.zeros(4)
    assert kept(Global(Normalize.L2).targets(weights, 0.5, scores)) == [3, 1]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_global_counts_equal_a_slow_ranking(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    sparsity, least = data.draw(st.floats(0, 0.99)), data.draw(st.integers(1, 2))
    values = [data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)) for n in sizes]
    weights = [WeightSpec(str(i), (n,)) for i, n in enumerate(sizes)]
    scores = {str(i): torch.tensor(v, dtype=torch.float32) for i, v in enumerate(values)}
    total = keep_count(sum(sizes), sparsity)
    forced = [sorted(range(n), key=lambda j, v=v: (-v[j], j))[:least] for n, v in zip(sizes, values, strict=True)]
    taken = {(i, j) for i, own in enumerate(forced) for j in own}
    if sparsity and total < len(taken):
        with pytest.raises(ConfigError, match="min_alive"):
            Global(min_alive=least).targets(weights, sparsity, scores)
        return
    rest = sorted(
        ((-v[j], i, j) for i, v in enumerate(values) for j in range(len(v)) if (i, j) not in taken),
    )
    taken |= {(i, j) for _, i, j in rest[: total - len(taken)]}
    counts = [sum(1 for where, _ in taken if where == i) for i in range(len(sizes))]
    targets = Global(min_alive=least).targets(weights, sparsity, scores)
    assert kept(targets) == (counts if sparsity else sizes)


def test_global_counts_blocks_and_slices() -> None:
    weights = [WeightSpec("a", (4, 2), pattern=Channel(0)), WeightSpec("b", (6, 2), pattern=Channel(0))]
    scores = {"a": torch.tensor([[9.0, 0], [8, 0], [7, 0], [1, 0]]), "b": torch.arange(12.0).reshape(6, 2) / 12}
    targets = Global().targets(weights, 0.6, scores)  # 4 of 10 slices
    assert [w.pattern.units(w.shape).counts(targets[w.name]).tolist() for w in weights] == [[3], [1]]


def test_global_gives_segmented_patterns_the_density_of_their_elements() -> None:
    weights = [WeightSpec("a", (4, 8), pattern=SharedSupport(2)), WeightSpec("b", (4, 8))]
    scores = {"a": torch.zeros(4, 8), "b": torch.arange(32.0).reshape(4, 8)}
    scores["a"][:, :2] = 100.0
    targets = Global().targets(weights, 0.75, scores)  # 16 alive: 8 in each
    assert targets["a"].alive == 8 and weights[0].pattern.units((4, 8)).counts(targets["a"]).tolist() == [2, 2]


def test_global_counts_elements_for_shared_supports_whatever_their_groups():
    weights = [
        WeightSpec("small", (4, 10), pattern=SharedSupport(4)),  # one group
        WeightSpec("large", (16, 10), pattern=SharedSupport(4)),
    ]
    scores = {w.name: torch.arange(w.numel, dtype=torch.float64).reshape(w.shape) % 7 for w in weights}
    targets = Global().targets(weights, 0.5, scores)
    alive = sum(w.pattern.units(w.shape, w.layout).alive_elements(targets[w.name]) for w in weights)
    assert sum(target.alive for target in targets.values()) == 100
    assert abs(alive - 100) <= 20  # one position in each group at most


def test_global_needs_scores() -> None:
    with pytest.raises(ConfigError, match="`fc1` must be given"):
        Global().targets(LENET, 0.9)
    with pytest.raises(ConfigError, match="shape"):
        Global().targets(LENET[:1], 0.9, {"fc1": torch.zeros(3)})
    with pytest.raises(ConfigError, match="min_alive"):
        Global(min_alive=0)
    assert kept(Global().targets(LENET, 0.0)) == [w.numel for w in LENET]


# --- custom ---


def test_custom_rules() -> None:
    targets = Custom({"fc1": 0.5, "f.2": 0.8}).targets(LENET, 0.9)
    assert targets == {"fc1": Target.of(235200, 0.5), "fc2": Target.of(30000, 0.8), "out": Target.of(1000, 0.9)}
    assert Custom({"fc.*": 0.5}, default=0.0).targets(LENET, 0.9)["out"] == Target.dense(1000)
    assert Custom({"fc1": 0.5}).targets(LENET, 0.0)["fc1"].alive == 117600


def test_a_name_is_a_name_before_it_is_an_expression() -> None:
    weights = [WeightSpec("a.b", (4,)), WeightSpec("axb", (4,))]
    assert kept(Custom({"a.b": 0.5}).targets(weights, 0.0)) == [2, 4]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"fc9": 0.5}, "`fc9` matches no weight"),
        ({"fc": 0.5}, "`fc` matches no weight"),
        ({"fc1": 0.5, "fc.*": 0.6}, "`fc1` matches two rules"),
        ({"(": 0.5}, "regular expression"),
    ],
)
def test_custom_refusals(rules: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Custom(rules).targets(LENET, 0.9)


def test_custom_sparsities_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"`fc1` \(=1.0\)"):
        Custom({"fc1": 1.0})
    with pytest.raises(ConfigError, match="default"):
        Custom({}, default=-0.5)


# --- patterns ---


@pytest.mark.parametrize("distribution", [Uniform(), ERK(), Custom({})])
def test_n_by_m_is_dense_or_n_by_m(distribution: Distribution) -> None:
    weights = [WeightSpec("a", (8, 8), pattern=NByM(2, 4)), WeightSpec("b", (64, 64), pattern=NByM(2, 4))]
    targets = distribution.targets(weights, 0.5)
    assert all(
        t in (Target.dense(w.numel), Target(0.5, w.numel // 2)) for w, t in zip(weights, targets.values(), strict=True)
    )
    assert targets["b"] == Target(0.5, 2048)
    with pytest.raises(ConfigError, match="weight `a`.*must be 0 or 1 - n/m"):
        distribution.targets(weights, 0.9)


def test_erk_makes_small_n_by_m_weights_dense() -> None:
    weights = [WeightSpec("a", (4, 4), pattern=NByM(2, 4)), WeightSpec("b", (64, 64), pattern=NByM(2, 4))]
    assert ERK().targets(weights, 0.5)["a"] == Target.dense(16)


def test_n_by_m_left_dense_by_its_remainder() -> None:
    weights = [WeightSpec("a", (4, 6), pattern=NByM(2, 4, remainder=Remainder.DENSE))]
    assert Uniform().targets(weights, 0.5)["a"] == Target.dense(24)


def test_errors_name_the_weight() -> None:
    with pytest.raises(ConfigError, match="weight `out`.*at most the alive elements"):
        Uniform().targets([*LENET[:2], WeightSpec("out", (10, 3), pattern=ConstantFanIn())], 0.9)
    with pytest.raises(ConfigError, match="weight `a`.*divisible"):
        Uniform().targets([WeightSpec("a", (4, 6), pattern=NByM(2, 4))], 0.5)
    with pytest.raises(ConfigError, match="weight `a`.*2 axes"):
        Global().targets([WeightSpec("a", (4,), pattern=Block(2, 2))], 0.5, {"a": torch.zeros(4)})
    with pytest.raises(ConfigError, match="`fc1` is listed twice"):
        Uniform().targets([LENET[0], LENET[0]], 0.5)
    with pytest.raises(ConfigError, match="sparsity"):
        Uniform().targets(LENET, 1.0)
    assert Uniform().targets([], 0.5) == {}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(2, 16), st.integers(2, 12), st.floats(0.01, 0.99))
def test_erk_budgets_of_shared_support_are_met_within_a_position_a_group(
    group: int, rows: int, inputs: int, sparsity: float
) -> None:
    shapes = [(rows, inputs), (3 * rows, 2 * inputs)]
    weights = [WeightSpec(str(i), s, Layout(), SharedSupport(group)) for i, s in enumerate(shapes)]
    targets = ERK().targets(weights, sparsity)
    for weight in weights:
        target = targets[weight.name]
        units = weight.pattern.units(weight.shape)
        assert abs(units.alive_elements(target) - target.alive) <= weight.shape[0] * (1 + len(shapes) / rows)


def test_custom_rules_must_be_a_mapping() -> None:
    with pytest.raises(ConfigError, match=r"`rules` \(=3\) must be a mapping"):
        Custom(3)
