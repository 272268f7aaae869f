"""The solves against slow oracles in float64: least squares, one removal at a time, one column at a time."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxsparse.curvature.compensate_elements import best_of_segments, eliminate_elements
from fxsparse.curvature.compensate_grams import Gram
from fxsparse.curvature.compensate_layer import LayerProblem, Solver, solve_layer
from fxsparse.curvature.compensate_solve import (
    by_columns,
    change,
    damped,
    inverse,
    obs_scores,
    restricted,
    restricted_least_squares,
)
from fxsparse.curvature.compensate_supports import SharedUnits, eliminate
from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity import (
    Block,
    Channel,
    ConstantFanIn,
    Layout,
    NByM,
    Positions,
    SharedSupport,
    Target,
    Unstructured,
)

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
H2 = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


def problem_of(seed: int, rows: int, width: int, samples: int = 0, classes: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, inputs [classes, width, samples] with strong correlations, class of each row."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(classes, width, width, generator=draw, dtype=torch.float64)
    x = mix @ torch.randn(classes, width, samples or 3 * width, generator=draw, dtype=torch.float64)
    weight = torch.randn(rows, width, generator=draw, dtype=torch.float64)
    return weight, x, torch.arange(rows) * classes // rows


def best(weight: Tensor, x: Tensor, alive: Tensor) -> Tensor:
    """One row by least squares on the inputs themselves."""
    new = torch.zeros_like(weight)
    if bool(alive.any()):
        new[alive] = torch.linalg.lstsq(x[alive].T, (weight @ x)[:, None], driver="gelsd").solution[:, 0]
    return new


def test_golden_values() -> None:
    one = torch.ones(1, 2, dtype=torch.float64)
    scores = obs_scores(one, inverse(H2[None]), torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(scores, torch.full_like(scores, 0.75), rtol=1e-14, atol=0)
    new = restricted_least_squares(one, H2, torch.tensor([[False, True]]))
    torch.testing.assert_close(new, torch.tensor([[0.0, 1.5]], dtype=torch.float64), rtol=1e-14, atol=0)
    of_row = torch.zeros(1, dtype=torch.int64)
    assert change(one, new, H2[None], of_row) / 2 == pytest.approx(0.75, abs=1e-15)
    both = restricted_least_squares(one, H2, torch.zeros(1, 2, dtype=torch.bool))
    assert change(one, both, H2[None], of_row) / 2 == pytest.approx(3.0, abs=1e-15)  # not the sum of singles, 1.5


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 3), st.floats(0, 1), st.integers(0, 10_000))
def test_fixed_masks_against_least_squares(rows: int, width: int, classes: int, density: float, seed: int) -> None:
    classes = min(classes, rows)
    weight, x, of_row = problem_of(seed, rows, width, classes=classes)
    mask = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) < density
    mask[rows // 2 :] = mask[0].clone()  # rows of equal support are solved together
    found = restricted(weight, x @ x.mT, of_row, mask)
    expected = torch.stack([best(w, x[c], m) for w, c, m in zip(weight, of_row, mask, strict=True)])
    scale = expected.abs().max() + 1
    torch.testing.assert_close(found / scale, expected / scale, rtol=1e-6, atol=1e-7)
    assert bool((found[~mask] == 0).all())
    slope = torch.stack([(w - v) @ x[c] @ x[c].T for w, v, c in zip(weight, found, of_row, strict=True)])
    assert float((slope * mask).abs().max()) <= 1e-7 * float((x @ x.mT).abs().max()) * float(weight.abs().max())


def test_damping_is_ridge_towards_the_old_weights() -> None:
    weight, x, _ = problem_of(3, 4, 6)
    gram, mask = x[0] @ x[0].T, torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    found = restricted_least_squares(weight, gram, mask, damping=0.3)
    extra = math.sqrt(0.3 * float(gram.diagonal().mean())) * torch.eye(6, dtype=torch.float64)
    wider = torch.cat([x[0], extra], dim=1)
    torch.testing.assert_close(found, torch.stack([best(w, wider, m) for w, m in zip(weight, mask, strict=True)]))


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, x, _ = problem_of(1, 2, 4)
    x[0, 2] = 0
    mask = torch.tensor([[True, False, True, True]] * 2)
    found = restricted_least_squares(weight, x[0] @ x[0].T, mask)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[:, 2], weight[:, 2])
    none = restricted_least_squares(weight, torch.zeros(4, 4), mask, damping=0.01)
    torch.testing.assert_close(none, weight * mask)


def test_refusals_of_the_plain_solve() -> None:
    weight = torch.ones(2, 3)
    gram, mask = torch.eye(3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ConfigError, match="`gram`"):
        restricted_least_squares(weight, torch.eye(2), mask)
    with pytest.raises(ConfigError, match="bool"):
        restricted_least_squares(weight, gram, mask.float())
    with pytest.raises(DataError, match="`gram` holds NaN or Inf"):
        restricted_least_squares(weight, gram * math.nan, mask)
    with pytest.raises(DataError, match="raise `damping`"):
        restricted_least_squares(weight, torch.ones(3, 3), mask)
    with pytest.raises(ConfigError, match="`damping`"):
        restricted_least_squares(weight, gram, mask, damping=-1.0)


def columns_oracle(weight: Tensor, gram: Tensor, mask: Tensor) -> Tensor:
    """Each dead weight is removed by OBS among the columns from its own on; earlier ones are done."""
    now = weight.clone()
    for row, column in itertools.product(range(len(now)), range(now.shape[1])):
        if not mask[row, column]:
            rest = torch.linalg.inv(gram[column:, column:])
            now[row, column:] -= now[row, column] / rest[0, 0] * rest[:, 0]
            now[row, column] = 0
    return now


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 11), st.integers(1, 12), st.integers(0, 10_000))
def test_columns_against_one_removal_after_the_other(rows: int, width: int, block: int, seed: int) -> None:
    weight, x, of_row = problem_of(seed, rows, width, classes=min(2, rows))
    gram = damped(x @ x.mT, 0.01)
    mask = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) < 0.5
    found, alive = by_columns(weight, gram, of_row, lambda _, places: mask[:, places], block=block)
    expected = torch.cat([columns_oracle(weight[of_row == c], gram[c], mask[of_row == c]) for c in of_row.unique()])
    assert torch.equal(alive, mask)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max() + 1))


def test_columns_in_another_order_are_the_permuted_problem() -> None:
    weight, x, of_row = problem_of(5, 4, 9)
    gram = damped(x @ x.mT, 0.01)
    mask = torch.rand(4, 9, generator=torch.Generator().manual_seed(5)) < 0.5
    order = torch.randperm(9, generator=torch.Generator().manual_seed(6))
    found, _ = by_columns(weight, gram, of_row, lambda _, places: mask[:, places], block=4, order=order)
    moved, _ = by_columns(
        weight[:, order], gram[:, order][:, :, order], of_row, lambda _, places: mask[:, order][:, places], block=4
    )
    torch.testing.assert_close(found[:, order], moved, **TIGHT)


def test_scores_of_columns_are_obs_among_the_columns_to_come() -> None:
    weight, x, of_row = problem_of(8, 3, 6)
    gram, seen = damped(x @ x.mT, 0.01), []

    def keep(scores: Tensor, places: Tensor) -> Tensor:
        seen.append((int(places[0]), scores[:, 0]))
        return torch.ones_like(scores, dtype=torch.bool)

    by_columns(weight, gram, of_row, keep, block=4, select=2)
    assert [first for first, _ in seen] == [0, 2, 4]
    for first, scores in seen:
        rest = torch.linalg.inv(gram[0][first:, first:])
        torch.testing.assert_close(scores, weight[:, first] ** 2 / (2 * rest[0, 0]), **TIGHT)


def greedy_shared(weight: Tensor, x: Tensor, of_row: Tensor, shared: SharedUnits, segment: int, keep: int) -> list[int]:
    """The unit whose removal raises the error least, by least squares for every candidate."""
    rows = (shared.segment == segment).nonzero().flatten()
    alive = list(range(shared.positions.shape[1]))
    while len(alive) > keep:
        errors = []
        for unit in alive:
            places = torch.zeros(weight.shape[1], dtype=torch.bool)
            places[shared.positions[segment][[other for other in alive if other != unit]].flatten()] = True
            lost = [(weight[r] - best(weight[r], x[of_row[r]], places)) @ x[of_row[r]] for r in rows]
            errors.append(sum(float(each.square().sum()) for each in lost))
        alive.pop(min(range(len(errors)), key=errors.__getitem__))
    return alive


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("pattern", "shape", "layout"),
    [
        (SharedSupport(2), (4, 6), Layout()),
        (SharedSupport(3), (5, 6), Layout()),  # a smaller last group
        (SharedSupport(2), (4, 4, 2), Layout()),  # a channel is two positions
        (SharedSupport(2, Positions.ELEMENT), (4, 3, 2), Layout()),
        (SharedSupport(4), (4, 6, 2), Layout(groups=2)),  # a group over two classes of rows
        (SharedSupport(2), (8, 5), Layout(blocks=2)),
        (Channel(1), (4, 6), Layout()),
    ],
    ids=str,
)
def test_one_at_a_time_is_greedy_obs(pattern, shape, layout, seed: int) -> None:
    rows, inputs, kernel = layout.matrix_shape(shape)
    weight, x, of_row = problem_of(seed, rows, inputs * kernel, classes=layout.groups)
    shared = SharedUnits.of(pattern.units(shape, layout), layout, weight.device)
    assert shared is not None
    width = shared.positions.shape[1]
    mask = eliminate(weight, x @ x.mT, of_row, shared, 2, rounds=width)
    for segment in range(len(shared.positions)):
        kept = torch.zeros(inputs * kernel, dtype=torch.bool)
        kept[shared.positions[segment][greedy_shared(weight, x, of_row, shared, segment, 2)].flatten()] = True
        for row in (shared.segment == segment).nonzero().flatten().tolist():
            assert torch.equal(mask[row], kept)


def test_which_patterns_have_shared_units() -> None:
    shape, layout = (6, 8), Layout()

    def shared(pattern) -> bool:
        return SharedUnits.of(pattern.units(shape, layout), layout, torch.device("cpu")) is not None

    assert shared(SharedSupport(3)) and shared(Channel(1)) and shared(ConstantFanIn())
    assert not shared(NByM(1, 4)) and not shared(Block(2, 2)) and not shared(Channel(0))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(2, 7), st.integers(0, 10_000))
def test_single_elements_one_at_a_time_are_greedy_obs(rows: int, width: int, seed: int) -> None:
    weight, x, of_row = problem_of(seed, rows, width, classes=min(2, rows))
    segment = torch.arange(rows)[:, None].expand(-1, width)
    keep = max(1, width // 3)
    mask = eliminate_elements(weight, x @ x.mT, of_row, segment, torch.full((rows,), keep), rounds=64)
    for row in range(rows):
        own = SharedUnits(torch.zeros(1, dtype=torch.int64), torch.arange(width).reshape(1, width, 1))
        alive = greedy_shared(weight[row : row + 1], x, of_row[row : row + 1], own, 0, keep)
        assert mask[row].nonzero().flatten().tolist() == alive


def test_elements_of_a_whole_weight_compete() -> None:
    weight, x, of_row = problem_of(2, 6, 8)
    weight[0] *= 100
    zeros = torch.zeros(6, 8, dtype=torch.int64)
    mask = eliminate_elements(weight, damped(x @ x.mT, 0.01), of_row, zeros, torch.tensor([11]), rounds=12)
    assert int(mask.sum()) == 11
    assert bool(mask[0].all())


def test_best_of_segments_takes_exact_counts_and_lower_indices() -> None:
    scores = torch.tensor([[1.0, 1.0, 1.0, -torch.inf], [0.0, 3.0, 2.0, 5.0]])
    segment = torch.tensor([[0, 0, 0, 0], [1, 1, 2, 2]])
    found = best_of_segments(scores, segment, torch.tensor([2, 1, 2]))
    assert found.tolist() == [[True, True, False, False], [False, True, True, True]]
    assert best_of_segments(scores, segment, torch.tensor([4, 0, 0])).sum() == 3  # -inf is never taken


CASES = [
    (Unstructured(), 0.7),
    (Unstructured(), 0.5),
    (NByM(2, 4), 0.5),
    (NByM(1, 4, axis=0), 0.75),
    (NByM(2, 4, exact=False), 0.7),
    (ConstantFanIn(), 0.6),
    (Channel(1), 0.5),
    (Channel(0), 0.5),
    (Block(2, 4), 0.5),
    (SharedSupport(4), 0.6),
    (SharedSupport(3), 0.6),
]


@pytest.mark.parametrize("cheap", [True, False], ids=["rounds", "columns"])
@pytest.mark.parametrize("solver", [None, Solver.EXACT, Solver.COLUMNS])
@pytest.mark.parametrize(("pattern", "sparsity"), CASES, ids=str)
def test_every_pattern_is_met_and_compensation_helps(pattern, sparsity, solver, cheap, monkeypatch) -> None:
    if not cheap:
        monkeypatch.setattr("fxsparse.curvature.compensate_layer._CHEAP", 0.0)
    weight, x, of_row = problem_of(11, 8, 16)
    layout = Layout()
    gram = Gram(x @ x.mT, of_row, (x.shape[2],))
    target = pattern.target((8, 16), layout, Target.of(128, sparsity))
    found = solve_layer(LayerProblem(weight.float(), gram, layout, pattern), target, solver=solver, block=8)
    pattern.check(found.mask, layout)
    assert int(found.mask.sum()) == pattern.units((8, 16), layout).alive_elements(target) or not getattr(
        pattern, "exact", True
    )
    assert bool((found.weight[~found.mask] == 0).all())
    assert found.after <= found.before * (1 + 1e-12)
    if pattern != Channel(0):
        assert found.after < 0.97 * found.before
    w = weight.float().double()  # the errors are those of the outputs
    scale = (w @ x[0]).square().sum()
    assert found.after == pytest.approx(float(((w - found.weight) @ x[0]).square().sum() / scale), rel=1e-6)
    masked = torch.where(found.mask, w, 0.0)
    assert found.before == pytest.approx(float(((w - masked) @ x[0]).square().sum() / scale), rel=1e-6)
    expected_solver = solver or (Solver.EXACT if cheap else Solver.COLUMNS)
    assert found.solver is expected_solver


def test_whole_rows_go_by_what_their_outputs_are_worth() -> None:
    weight, x, of_row = problem_of(4, 6, 5)
    found = solve_layer(LayerProblem(weight, Gram(x @ x.mT, of_row, (15,)), Layout(), Channel(0)), Target.of(30, 0.5))
    energy = (weight @ x[0]).square().sum(1)
    assert found.mask[:, 0].nonzero().flatten().tolist() == energy.topk(3).indices.sort().values.tolist()


def test_more_rounds_lose_less() -> None:
    lost = []
    for rounds in (1, 12):
        total = 0.0
        for seed in range(5):
            weight, x, of_row = problem_of(seed, 32, 48)
            problem = LayerProblem(weight, Gram(x @ x.mT, of_row, (144,)), Layout(), SharedSupport(8))
            total += solve_layer(problem, Target.of(weight.numel(), 0.8), rounds=rounds).after
        lost.append(total)
    assert lost[1] < 0.9 * lost[0]


def test_a_dense_target_changes_nothing() -> None:
    weight, x, of_row = problem_of(0, 4, 6)
    problem = LayerProblem(weight, Gram(x @ x.mT, of_row, (18,)), Layout(), SharedSupport(2))
    found = solve_layer(problem, Target.dense(24))
    assert torch.equal(found.weight, weight) and found.before == found.after == 0.0
    with pytest.raises(ConfigError, match="`target`"):
        solve_layer(problem, None)
