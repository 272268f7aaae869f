from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity import generator, order_scores, random_scores, segment_top_k, top_k

INF = float("inf")
VALUES = st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.0, -1.0, 0.5, INF, -INF, 1e-40, -1e-40])
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


def slow_top_k(scores: list[float], k: int, candidates: list[bool]) -> list[bool]:
    order = sorted((i for i in range(len(scores)) if candidates[i]), key=lambda i: (-scores[i], i))
    return [i in set(order[:k]) for i in range(len(scores))]


@settings(max_examples=150, deadline=None)
@given(st.data(), DTYPES)
def test_equals_the_sorted_prefix(data: st.DataObject, dtype: torch.dtype) -> None:
    scores = torch.tensor(data.draw(st.lists(VALUES, min_size=1, max_size=24))).to(dtype)
    alive = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)) | st.none())
    room = alive or [True] * len(scores)
    k = data.draw(st.integers(0, sum(room)))
    picked = top_k(scores, k, None if alive is None else torch.tensor(alive))
    assert picked.dtype == torch.bool
    assert picked.tolist() == slow_top_k(scores.double().tolist(), k, room)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_segments_equal_rows_on_their_own(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 7))
    size = rows * width
    scores = torch.tensor(data.draw(st.lists(VALUES, min_size=size, max_size=size))).reshape(rows, width)
    alive = data.draw(st.lists(st.booleans(), min_size=size, max_size=size) | st.none())
    candidates = None if alive is None else torch.tensor(alive).reshape(rows, width)
    room = [width] * rows if candidates is None else candidates.sum(1).tolist()
    counts = [data.draw(st.integers(0, r)) for r in room]
    picked = segment_top_k(scores, torch.tensor(counts), candidates)
    for row in range(rows):
        allowed = [True] * width if candidates is None else candidates[row].tolist()
        assert picked[row].tolist() == slow_top_k(scores[row].double().tolist(), counts[row], allowed)


def test_ties_keep_the_lower_index_and_unstable_thresholds_would_not() -> None:
    scores = torch.tensor([3.0, 3.0, 3.0, 5.0, 3.0])
    assert top_k(scores, 3).tolist() == [True, True, False, True, False]
    threshold = scores.kthvalue(3).values
    assert int((scores > threshold).sum()) == 1  # what a bare value threshold keeps


def test_negative_zero_is_zero() -> None:
    assert top_k(torch.tensor([-0.0, 0.0, -0.0]), 1).tolist() == [True, False, False]
    assert top_k(torch.tensor([-1.0, -0.0, 0.0]), 1).tolist() == [False, True, False]
    assert not torch.signbit(order_scores(torch.tensor([-0.0])))[0]


def test_minus_infinity_candidates_come_before_non_candidates() -> None:
    scores = torch.tensor([[9.0, -INF, 8.0, -INF], [1.0, 2.0, 3.0, 4.0]])
    candidates = torch.tensor([[False, True, False, True], [True, True, True, True]])
    assert segment_top_k(scores, torch.tensor([1, 2]), candidates).tolist() == [
        [False, True, False, False],
        [False, False, True, True],
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_raises(dtype: torch.dtype) -> None:
    with pytest.raises(DataError, match="1 of 3 scores are NaN"):
        top_k(torch.tensor([1.0, float("nan"), 2.0], dtype=dtype), 1)


def test_half_precision_is_compared_exactly() -> None:
    ordered = order_scores(torch.tensor([0.1, 0.2], dtype=torch.bfloat16, requires_grad=True))
    assert ordered.dtype == torch.float32 and not ordered.requires_grad
    assert order_scores(torch.tensor([1.0], dtype=torch.float64)).dtype == torch.float64


def test_integer_and_bool_scores_are_exact_and_complex_ones_refused() -> None:
    big = torch.tensor([2**53 + 1, 2**53])
    assert top_k(big.flip(0), 1).tolist() == [False, True]
    assert top_k(torch.tensor([False, True]), 1).tolist() == [False, True]
    with pytest.raises(DataError, match="complex"):
        top_k(torch.tensor([1j]), 1)


@pytest.mark.parametrize("k", [-1, 5])
def test_counts_beyond_the_candidates_are_refused(k: int) -> None:
    with pytest.raises(ConfigError, match=rf"`k` \(={k}\)"):
        top_k(torch.zeros(4), k)
    with pytest.raises(ConfigError, match="segment 1"):
        segment_top_k(torch.zeros(2, 3), 2, torch.tensor([[True, True, True], [False, False, True]]))


def test_empty_tensor() -> None:
    assert top_k(torch.zeros(0), 0).shape == (0,)


@pytest.mark.parametrize("distinct", [3, 1000, 10**9])
def test_large_tensors_equal_a_stable_sort_on_any_memory_layout_and_thread_count(distinct: int) -> None:
    source = torch.Generator().manual_seed(0)
    scores = torch.randint(distinct, (300, 700), generator=source).float()
    k = 60_001
    order = scores.reshape(-1).sort(descending=True, stable=True).indices[:k]
    expected = torch.zeros(scores.numel(), dtype=torch.bool).index_fill_(0, order, True).reshape(300, 700)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(top_k(scores, k), expected)
            assert torch.equal(top_k(scores.t().contiguous().t(), k), expected)
    finally:
        torch.set_num_threads(threads)


def _state() -> Tensor:
    return torch.random.get_rng_state()


def test_random_draws_depend_on_every_part_of_the_key_and_on_nothing_else() -> None:
    before = _state()
    base = random_scores((5,), generator(1, 2, 3, "grow"))
    assert torch.equal(base, random_scores((5,), generator(1, 2, 3, "grow")))
    for key in [(0, 2, 3, "grow"), (1, 0, 3, "grow"), (1, 2, 0, "grow"), (1, 2, 3, "drop"), (12, 3, 3, "grow")]:
        assert not torch.equal(base, random_scores((5,), generator(*key)))
    assert base.dtype == torch.float64 and bool(((base >= 0) & (base < 1)).all())
    assert torch.equal(before, _state())


def test_random_draws_are_the_same_in_every_process() -> None:
    drawn = random_scores((2,), generator(0, 0, 0, "initial_mask"))
    assert drawn.tolist() == [0.9052209470432291, 0.5290237818501936]


def test_random_subsets_are_uniform() -> None:
    hits = torch.zeros(10)
    for update in range(2000):
        hits += top_k(random_scores((10,), generator(0, 0, update, "grow")), 3)
    assert bool(((hits - 600).abs() < 5 * (2000 * 0.3 * 0.7) ** 0.5).all())
