from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity import (
    StreamingThreshold,
    exact_threshold,
    one_pass_threshold,
    sample_threshold,
    smallest,
    top_k,
)

INF = float("inf")
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-39, 3.5, 3.5000002, INF, -INF, 1e38]) | st.floats(
    width=32, allow_nan=False
)


def chunked(scores: Tensor, size: int) -> Callable[[], Iterable[Tensor]]:
    return lambda: scores.split(size)


def slow_dead(scores: list[float], dead: int) -> list[bool]:
    """Smallest first; among equals the highest index first."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], -i))[:dead]
    return [i in set(order) for i in range(len(scores))]


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
def test_equals_the_sort_bit_for_bit(data: st.DataObject, dtype: torch.dtype) -> None:
    scores = torch.tensor(data.draw(st.lists(VALUES, max_size=40)), dtype=torch.float64).to(dtype)
    dead = data.draw(st.integers(0, len(scores)))
    size = data.draw(st.integers(1, 50))
    counter = torch.float64 if dtype == torch.float64 else torch.float32
    found = exact_threshold(chunked(scores, size), dead, dtype=counter)
    values = scores.double().tolist()
    expected = slow_dead(values, dead)
    alive = list(found.masks(chunked(scores, size)()))
    assert [not kept for part in alive for kept in part.tolist()] == expected
    assert [part.shape for part in alive] == [part.shape for part in scores.split(size)]
    assert (found.total, found.dead) == (len(values), dead)
    if dead:
        value = sorted(values)[dead - 1]
        assert found.value == value and not (value == 0 and math.copysign(1, found.value) < 0)
        assert (found.below, found.equal) == (sum(v < value for v in values), values.count(value))
    else:
        assert found.value == -INF
    flat = torch.cat([part.reshape(-1) for part in smallest(chunked(scores, size), dead, dtype=counter)])
    assert flat.tolist() == expected


@pytest.mark.parametrize("kind", ["ties", "normal", "outlier", "equal", "denormal", "zeros"])
@pytest.mark.parametrize("fraction", [0.0, 0.29, 0.5, 0.999, 1.0])
def test_a_million_values(kind: str, fraction: float) -> None:
    source = torch.Generator().manual_seed(0)
    n = 10**6 if kind in ("ties", "normal") else 10**5
    scores = torch.randn(n, generator=source)
    if kind == "ties":
        scores = torch.randint(100, (n,), generator=source) / 7.0
    elif kind == "outlier":
        scores = scores.abs() / 100
        scores[n // 3] = 1e6
    elif kind == "equal":
        scores = torch.full((n,), 2.5)
    elif kind == "denormal":
        scores = (torch.randint(-500, 500, (n,), generator=source, dtype=torch.int32)).abs().view(torch.float32)
    elif kind == "zeros":
        scores = torch.where(scores > 0, 0.0, -0.0)
    found = exact_threshold(chunked(scores, 77_777), fraction=fraction)
    dead = math.floor(fraction * n + 1e-6)
    alive = torch.cat(list(found.masks(scores.split(77_777))))
    assert found.dead == dead and int(alive.sum()) == n - dead
    assert torch.equal(alive, top_k(scores, n - dead))
    if dead:
        assert found.value == float(scores.sort().values[dead - 1])


def test_fractions_follow_the_count_rule() -> None:
    assert exact_threshold(chunked(torch.arange(100.0), 10), fraction=0.29).dead == 29
    assert exact_threshold(chunked(torch.arange(10.0), 3), fraction=0.9).dead == 9


@pytest.mark.parametrize("scores", [torch.zeros(0), torch.tensor([3.0])])
def test_none_and_one(scores: Tensor) -> None:
    n = len(scores)
    found = exact_threshold(chunked(scores, 1), fraction=1.0)
    assert found.dead == n and found.value == (3.0 if n else -INF)
    assert exact_threshold(chunked(scores, 1), 0).value == -INF
    assert exact_threshold(lambda: [], 0).total == 0


@pytest.mark.parametrize(("dtype", "passes"), [(torch.float32, 2), (torch.float64, 4)])
def test_passes_and_merging_of_shards(dtype: torch.dtype, passes: int) -> None:
    scores = torch.randn(10_001, generator=torch.Generator().manual_seed(1), dtype=dtype)
    whole = StreamingThreshold(5000, dtype=dtype)
    shards = [StreamingThreshold(5000, dtype=dtype) for _ in range(3)]
    assert whole.passes == passes
    for _ in range(passes):
        assert not whole.done
        whole.update(scores)
        for shard, part in zip(shards, scores.split(4000), strict=True):
            shard.update(part)
        total = sum((shard.histogram for shard in shards[1:]), shards[0].histogram)
        assert torch.equal(total, whole.histogram) and int(total.sum()) > 0
        shards[0].merge(shards[1])
        shards[0].merge(shards[2])
        for shard in shards[1:]:
            shard.histogram.copy_(shards[0].histogram)
        for state in (whole, *shards):
            state.next_pass()
    assert whole.done and len({state.result() for state in (whole, *shards)}) == 1
    assert whole.result().value == float(scores.sort().values[4999])


@settings(max_examples=100, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=30), st.data(), st.booleans())
def test_one_pass_bounds_value_and_rank(values: list[float], data: st.DataObject, wide: bool) -> None:
    dtype = torch.float64 if wide else torch.float32
    scores = torch.tensor(values, dtype=dtype)
    ordered = scores.double().sort().values.tolist()
    dead = data.draw(st.integers(1, len(ordered)))
    found = one_pass_threshold(scores.split(7), dead, dtype=dtype)
    exact = ordered[dead - 1]
    assert found.relative_error == (2**-4 if wide else 2**-7) and found.confidence == 1.0
    if math.isinf(exact) or abs(exact) >= 1.2e-38:
        assert found.value == exact or abs(found.value - exact) <= found.relative_error * abs(exact)
    else:
        assert abs(found.value - exact) <= 1.2e-38
    assert found.low < dead <= found.high  # the bin holds ranks low + 1 ... high
    assert sum(v < found.value for v in ordered) <= found.high and sum(v <= exact for v in ordered) > found.low
    assert (found.total, found.dead) == (len(ordered), dead)


@pytest.mark.parametrize("exact", [-INF, INF, -1.0, 1.0, -1.00001, 3e38, -3e38, 1.2e-38, 0.0, -0.0, -1e-45])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_pass_errs_towards_zero(exact: float, dtype: torch.dtype) -> None:
    scores = torch.tensor([exact, INF], dtype=dtype)
    found = one_pass_threshold([scores], 1, dtype=dtype)
    exact = float(scores[0])
    assert found.value == exact or (abs(found.value) <= abs(exact) and found.value * exact >= 0)


def test_one_pass_of_nothing_pruned() -> None:
    found = one_pass_threshold([torch.arange(5.0)], 0)
    assert (found.value, found.low, found.high) == (-INF, 0, 0)


def test_equal_width_bins_would_be_fooled_by_one_outlier() -> None:
    scores = torch.rand(99_999, generator=torch.Generator().manual_seed(0))
    scores = torch.cat([scores, torch.tensor([1e6])])
    counts = torch.histc(scores, 65536)
    edge = float(counts.cumsum(0).ge(50_000).nonzero()[0]) / 65536 * 1e6
    assert float((scores <= edge + 1e6 / 65536).float().mean()) > 0.9999
    alive = torch.cat(list(exact_threshold(chunked(scores, 9999), fraction=0.5).masks(scores.split(9999))))
    assert int(alive.sum()) == 50_000


def test_sampling_states_a_bound_that_holds() -> None:
    scores = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    ordered = scores.sort().values
    held = 0
    for seed in range(60):
        found = sample_threshold(scores.split(3000), 20_000, 5_000, size=400, seed=seed, confidence=0.9)
        slack = math.sqrt(math.log(2 / 0.1) / 800) + 1 / 400
        assert (found.low, found.high) == (math.floor(5000 - slack * 20_000), math.ceil(5000 + slack * 20_000))
        assert found.confidence == 0.9 and found.relative_error is None
        below, upto = int((ordered < found.value).sum()), int((ordered <= found.value).sum())
        held += below < found.high and upto >= found.low
    assert held >= 54
    first = sample_threshold(scores.split(3000), 20_000, 5_000, size=400, seed=1)
    assert first == sample_threshold(scores.split(7000), 20_000, fraction=0.25, size=400, seed=1)
    assert first.value != sample_threshold(scores.split(3000), 20_000, 5_000, size=400, seed=2).value
    assert sample_threshold(scores.split(3000), 20_000, 0, size=400, seed=1).value == -INF
    assert sample_threshold([torch.ones(9)], 9, 9, size=3, seed=0).value == 1.0


def test_refusals() -> None:
    with pytest.raises(DataError, match="NaN"):
        exact_threshold(chunked(torch.tensor([1.0, float("nan")]), 1), 0)
    with pytest.raises(DataError, match="NaN"):
        sample_threshold([torch.full((5,), float("nan"))], 5, 2, size=3, seed=0)
    with pytest.raises(ConfigError, match=r"`dead` \(=4\)"):
        exact_threshold(chunked(torch.zeros(3), 1), 4)
    for both in ({}, {"dead": 1, "fraction": 0.5}):
        with pytest.raises(ConfigError, match="exactly one"):
            StreamingThreshold(**both)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="exactly one"):
            sample_threshold([], 1, size=1, seed=0, **both)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dead"):
        StreamingThreshold(-1)
    with pytest.raises(ConfigError, match="fraction"):
        StreamingThreshold(fraction=1.5)
    with pytest.raises(ConfigError, match="dtype"):
        StreamingThreshold(1, dtype=torch.float16)
    with pytest.raises(ConfigError, match="float64"):
        StreamingThreshold(1).update(torch.zeros(2, dtype=torch.float64))
    for arguments in ({"size": 0}, {"total": 0}, {"confidence": 1.0}, {"dead": 6}, {"total": 4}):
        with pytest.raises(ConfigError):
            sample_threshold([torch.zeros(5)], **{"total": 5, "dead": 2, "size": 3, "seed": 0, **arguments})  # type: ignore[arg-type]


def test_passes_must_be_run_in_order() -> None:
    state = StreamingThreshold(1)
    state.update(torch.arange(4.0))
    with pytest.raises(ConfigError, match="no pass"):
        state.interval()
    other = StreamingThreshold(1)
    other.update(torch.arange(4.0))
    state.next_pass()
    with pytest.raises(ConfigError, match="pass 2 of 2 is open"):
        state.result()
    with pytest.raises(ConfigError, match="same pass"):
        state.merge(other)
    state.update(torch.arange(4.0))
    state.next_pass()
    assert state.result().value == 0.0 == state.interval().value and state.interval().relative_error == 0.0
    with pytest.raises(ConfigError, match="done"):
        state.update(torch.zeros(1))
    with pytest.raises(ConfigError, match="done"):
        state.next_pass()


class Allocations(TorchDispatchMode):
    """Bytes of storages born under this mode that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


@pytest.mark.parametrize("length", [1 << 18, 1 << 20])
def test_peak_memory_is_a_chunk_and_a_histogram(length: int) -> None:
    chunks = 12

    def stream() -> Iterator[Tensor]:
        for index in range(chunks):
            yield torch.rand(length, generator=torch.Generator().manual_seed(index))

    with Allocations() as allocations:
        found = exact_threshold(stream, fraction=0.9)
    assert found.total == chunks * length
    assert 4 * length < allocations.peak <= 4 * length + 768 * 1024


def test_the_allocation_counter_sees_what_it_must() -> None:
    with Allocations() as allocations:
        first = torch.zeros(1000)
        second = first + 1
        del first, second
        torch.zeros(10)
    assert allocations.peak == 8000
