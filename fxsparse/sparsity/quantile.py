"""Thresholds of score streams that are too large to sort.

Pruned are the `dead` smallest scores: all below the threshold t (the `dead`-th smallest score), then equals of t from
the highest index down. Chunks come in canonical order: weights in the model's order, elements in flat order.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity.counts import fraction_count
from fxsparse.sparsity.random import generator
from fxsparse.sparsity.top_k import order_scores

Chunks = Callable[[], Iterable[Tensor]]

_BINS = 1 << 16
_CPU_SLICE = 1 << 13  # temporaries of a slice stay under 256 KiB
_DEVICE_SLICE = 1 << 22
_FORMATS = {torch.float32: ("<i", "<f", 32), torch.float64: ("<q", "<d", 64)}


@dataclass(frozen=True)
class Threshold:
    """An exact threshold.

    Attributes:
        value: The `dead`-th smallest score; -inf when nothing is pruned.
        total: Number of scores n.
        dead: Number of scores to prune Z.
        below: Number of scores smaller than `value`.
        equal: Number of scores equal to `value`.
    """

    value: float
    total: int
    dead: int
    below: int
    equal: int

    def masks(self, chunks: Iterable[Float[Tensor, "*shape"]]) -> Iterator[Bool[Tensor, "*shape"]]:
        """The mask (True = alive) of each chunk of the same stream; exactly `total - dead` are alive in all."""
        spared = self.equal - (self.dead - self.below) if self.dead else 0
        for chunk in chunks:
            scores = order_scores(chunk)
            if not self.dead:
                yield torch.ones_like(scores, dtype=torch.bool)
                continue
            alive, tied = scores > self.value, scores == self.value
            count = int(tied.sum())
            if count and spared:
                alive |= tied if count <= spared else tied & (tied.reshape(-1).cumsum(0).reshape_as(tied) <= spared)
            spared -= min(count, spared)
            yield alive


@dataclass(frozen=True)
class Approximation:
    """A threshold with a bound on its rank: fewer than `high` scores lie below `value`, at least `low` up to it.

    Attributes:
        value: Approximately the `dead`-th smallest score.
        total: Number of scores n.
        dead: Rank that was asked for.
        low: Lower end of the rank interval.
        high: Upper end of the rank interval.
        relative_error: Bound of |value - t| / |t| for normal numbers; None where only ranks are bounded.
        confidence: Probability that the rank interval holds.
    """

    value: float
    total: int
    dead: int
    low: int
    high: int
    relative_error: float | None = None
    confidence: float = 1.0


class StreamingThreshold:
    """Exact selection by 16-bit histograms of order-preserving keys: 2 passes for float32, 4 for float64.

    Feed every score with `update`, then call `next_pass`, until `done`. The state is one int64 histogram of 512 KiB,
    whatever the number of scores and the size of the chunks; over ranks, sum `histogram` before `next_pass`.
    Half precision is cast exactly to float32.
    """

    def __init__(
        self, dead: int | None = None, *, fraction: float | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Select the `dead`-th smallest score, or that of rank floor(fraction n + 1e-6).

        Raises:
            ConfigError: not exactly one of `dead` and `fraction` is given, or `dtype` is not float32 or float64.
        """
        if (dead is None) == (fraction is None):
            raise ConfigError(f"give exactly one of `dead` (={dead}) and `fraction` (={fraction})")
        if dead is not None and dead < 0:
            raise ConfigError(f"`dead` (={dead}) must be at least 0")
        if fraction is not None:
            fraction_count(fraction, 0)
        if dtype not in _FORMATS:
            raise ConfigError(f"`dtype` (={dtype}) must be torch.float32 or torch.float64")
        self.dtype = dtype
        self.histogram: Int64[Tensor, " bins"] = torch.zeros(_BINS, dtype=torch.int64)
        self._dead, self._fraction = dead, fraction
        self._bits = _FORMATS[dtype][2]
        self._one = torch.ones(1, dtype=torch.int64)
        self._level = 0
        self._prefix = 0
        self._total = self._below = 0
        self._equal = 0

    @property
    def passes(self) -> int:
        """Passes over the scores that an exact answer needs."""
        return self._bits // 16

    @property
    def done(self) -> bool:
        """Whether `result` is exact."""
        return self._level == self.passes

    def update(self, chunk: Float[Tensor, "*shape"]) -> None:
        """Count a chunk in the current pass.

        Raises:
            ConfigError: the chunk is wider than `dtype`, or all passes are done.
            DataError: a score is NaN.
        """
        if self.done:
            raise ConfigError("all passes are done; make a new StreamingThreshold for other scores")
        if torch.promote_types(chunk.dtype, self.dtype) != self.dtype:
            raise ConfigError(f"a chunk of `dtype` (={chunk.dtype}) does not fit {self.dtype}; use torch.float64")
        flat = chunk.detach().reshape(-1)
        if self.histogram.device != flat.device:
            self.histogram, self._one = self.histogram.to(flat.device), self._one.to(flat.device)
        step = _CPU_SLICE if flat.device.type == "cpu" else _DEVICE_SLICE
        for start in range(0, flat.numel(), step):
            self._count(flat[start : start + step])

    def merge(self, other: StreamingThreshold) -> None:
        """Add the counts of another shard of the same pass.

        Raises:
            ConfigError: the other one is in another pass or of another dtype.
        """
        if (self._level, self._prefix, self.dtype) != (other._level, other._prefix, other.dtype):
            raise ConfigError("shards must be merged within the same pass and dtype; call `next_pass` on both first")
        self.histogram += other.histogram.to(self.histogram.device)

    def next_pass(self) -> None:
        """Close the current pass: select the bin of the threshold.

        Raises:
            ConfigError: there are fewer scores than `dead`.
        """
        if self.done:
            raise ConfigError("all passes are done; read `result`")
        cumulative = self.histogram.cumsum(0)
        if self._level == 0:
            self._total = int(cumulative[-1])
            if self._fraction is not None:
                self._dead = fraction_count(self._fraction, self._total)
        rank = self._rank - self._below
        if self._rank > self._total:
            raise ConfigError(f"`dead` (={self._rank}) must be at most the number of scores (={self._total})")
        if self._rank:
            bin_ = int(torch.searchsorted(cumulative, rank))
            self._equal = int(self.histogram[bin_])
            self._below += int(cumulative[bin_]) - self._equal
            self._prefix = bin_ - (_BINS >> 1) if self._level == 0 else (self._prefix << 16) | bin_
        self._level += 1
        self.histogram.zero_()

    def result(self) -> Threshold:
        """The exact threshold.

        Raises:
            ConfigError: passes are missing.
        """
        if not self.done:
            raise ConfigError(
                f"pass {self._level + 1} of {self.passes} is open; feed the scores, then call `next_pass`"
            )
        value = self._value(self._prefix) if self._rank else -math.inf
        return Threshold(value, self._total, self._rank, self._below, self._equal)

    def interval(self) -> Approximation:
        """What is known after at least one pass: after the first, |value - t| <= 2^-7 |t| (float64: 2^-4).

        Raises:
            ConfigError: no pass is closed.
        """
        if self._level == 0:
            raise ConfigError("no pass is closed; feed the scores, then call `next_pass`")
        if not self._rank:
            return Approximation(-math.inf, self._total, 0, 0, 0, 0.0)
        rest = self._bits - 16 * self._level
        nearest_zero = (self._prefix << rest) | (0 if self._prefix >= 0 else (1 << rest) - 1)
        mantissa = 7 if self._bits == 32 else 4
        error = 0.0 if self.done else 2.0 ** -(mantissa + 16 * (self._level - 1))
        high = self._below + self._equal
        return Approximation(self._value(nearest_zero), self._total, self._rank, self._below, high, error)

    @property
    def _rank(self) -> int:
        return self._dead or 0

    def _count(self, scores: Tensor) -> None:
        values = scores.to(self.dtype) + 0.0
        if bool(values.isnan().any()):
            raise DataError("a score is NaN; mend the weights or gradients that it comes from")
        keys = values.view(torch.int32 if self._bits == 32 else torch.int64)
        sign = keys >> (self._bits - 1)
        keys.bitwise_xor_(sign.bitwise_and_((1 << (self._bits - 1)) - 1))  # signed integers in the order of the floats
        shift = self._bits - 16 * (self._level + 1)
        if self._level == 0:
            bins = (keys >> shift).add_(_BINS >> 1)
        else:
            selected = keys[(keys >> (shift + 16)) == self._prefix]
            bins = (selected >> shift).bitwise_and_(_BINS - 1)
        self.histogram.index_add_(0, bins, self._one.expand(bins.numel()))

    def _value(self, key: int) -> float:
        as_int, as_float, bits = _FORMATS[self.dtype]
        raw = key if key >= 0 else key ^ ((1 << (bits - 1)) - 1)
        return float(struct.unpack(as_float, struct.pack(as_int, raw))[0])


def exact_threshold(
    chunks: Chunks, dead: int | None = None, *, fraction: float | None = None, dtype: torch.dtype = torch.float32
) -> Threshold:
    """The exact threshold of a stream that `chunks()` can start again for every pass.

    Raises:
        ConfigError: as `StreamingThreshold`, or `dead` exceeds the number of scores.
        DataError: a score is NaN.
    """
    state = StreamingThreshold(dead, fraction=fraction, dtype=dtype)
    while not state.done:
        for chunk in chunks():
            state.update(chunk)
            del chunk  # before the next one is made
        state.next_pass()
    return state.result()


def one_pass_threshold(
    chunks: Iterable[Tensor],
    dead: int | None = None,
    *,
    fraction: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Approximation:
    """An approximate threshold from one pass: relative error at most 2^-7 (float64: 2^-4), ranks exact.

    Raises:
        ConfigError: as `StreamingThreshold`, or `dead` exceeds the number of scores.
        DataError: a score is NaN.
    """
    state = StreamingThreshold(dead, fraction=fraction, dtype=dtype)
    for chunk in chunks:
        state.update(chunk)
        del chunk  # before the next one is made
    state.next_pass()
    return state.interval()


def sample_threshold(
    chunks: Iterable[Tensor],
    total: int,
    dead: int | None = None,
    *,
    fraction: float | None = None,
    size: int,
    seed: int,
    confidence: float = 0.99,
) -> Approximation:
    """An approximate threshold from `size` scores drawn with replacement.

    The rank is off by at most n (sqrt(ln(2 / (1 - confidence)) / (2 size)) + 1 / size), the bound of Dvoretzky,
    Kiefer and Wolfowitz with Massart's constant.

    Args:
        chunks: The scores, once.
        total: Their number n, at least 1.
        dead: Rank, or:
        fraction: Rank as a fraction of n.
        size: Number of draws m.
        seed: Seed of the draws.
        confidence: Probability that the rank interval holds.

    Raises:
        ConfigError: an argument is out of range, or `total` is not the number of scores.
        DataError: a drawn score is NaN.
    """
    if (dead is None) == (fraction is None):
        raise ConfigError(f"give exactly one of `dead` (={dead}) and `fraction` (={fraction})")
    if size < 1 or total < 1 or not 0 < confidence < 1:
        raise ConfigError(
            f"`size` (={size}) and `total` (={total}) must be at least 1, `confidence` (={confidence}) inside (0, 1)"
        )
    rank = fraction_count(fraction, total) if fraction is not None else (dead or 0)
    if not 0 <= rank <= total:
        raise ConfigError(f"`dead` (={rank}) must be from 0 to `total` (={total})")
    if not rank:
        return Approximation(-math.inf, total, 0, 0, 0, confidence=1.0)
    drawn = _draw(chunks, total, size, seed)
    place = max(math.ceil(rank / total * size), 1)
    slack = math.sqrt(math.log(2 / (1 - confidence)) / (2 * size)) + 1 / size
    low = max(math.floor(rank - slack * total), 0)
    high = min(math.ceil(rank + slack * total), total)
    return Approximation(float(drawn.sort().values[place - 1]), total, rank, low, high, confidence=confidence)


def _draw(chunks: Iterable[Tensor], total: int, size: int, seed: int) -> Tensor:
    index = torch.randint(total, (size,), generator=generator(seed, 0, 0, "threshold_sample")).sort().values
    parts: list[Tensor] = []
    start = 0
    for chunk in chunks:
        flat = chunk.detach().reshape(-1)
        own = index[(index >= start) & (index < start + flat.numel())] - start
        parts.append(order_scores(flat[own.to(flat.device)]).cpu())
        start += flat.numel()
    if start != total:
        raise ConfigError(f"`total` (={total}) must be the number of scores (={start})")
    return torch.cat(parts)


def smallest(chunks: Chunks, dead: int, *, dtype: torch.dtype = torch.float32) -> Iterator[Bool[Tensor, "*shape"]]:
    """For each chunk, which of its scores are among the `dead` smallest of the whole stream.

    Among equals of the threshold those of the highest index are taken first.

    Raises:
        ConfigError: `dead` exceeds the number of scores.
        DataError: a score is NaN.
    """
    for alive in exact_threshold(chunks, dead, dtype=dtype).masks(chunks()):
        yield ~alive
