"""Stratified splits: exact counts per class, the same members on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fxsparse.errors import ConfigError, DataError

NAMES = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Inputs and labels of one part of a data set.

    Attributes:
        inputs: float32, first dimension is the sample.
        labels: int64 class indices, one a sample.
    """

    inputs: Float[Tensor, "sample ..."]
    labels: Int[Tensor, " sample"]

    def __len__(self) -> int:
        return int(self.labels.numel())


@dataclass(frozen=True)
class Splits:
    """A data set in three parts; mean and deviation are those of the training part before standardisation.

    Attributes:
        train: seen by the optimizer.
        validation: used for every choice.
        test: read once, at the end.
        classes: number of classes.
        mean: subtracted from every value.
        deviation: every value was divided by it.
        fingerprint: SHA-256 over the content and the membership of all three parts.
    """

    train: Split
    validation: Split
    test: Split
    classes: int
    mean: float
    deviation: float
    fingerprint: str


def split_counts(count: int, fractions: Sequence[str]) -> list[int]:
    """Divide `count` samples in proportion to `fractions` by largest remainder; ties go to the earlier part.

    Args:
        count: samples to divide.
        fractions: decimal texts that sum to exactly 1 (text, so that no binary rounding decides a count).

    Raises:
        ConfigError: a fraction outside [0, 1], or a sum other than 1.

    >>> split_counts(13, ("0.7", "0.2", "0.1"))
    [9, 3, 1]
    """
    exact = [Fraction(text) for text in fractions]
    if any(not 0 <= part <= 1 for part in exact) or sum(exact) != 1:
        raise ConfigError(f"`fractions` (={list(fractions)}) must lie in [0, 1] and sum to exactly 1")
    shares = [part * count for part in exact]
    counts = [int(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))  # largest remainder first
    for i in order[: count - sum(counts)]:
        counts[i] += 1
    return counts


def stratified_split(
    labels: Int[Tensor, " sample"], fractions: Sequence[str], seed: int = 0
) -> tuple[Int[Tensor, " part"], ...]:
    """Sample indices of each part, ascending; counts are exact per class.

    Members are chosen by the order of SHA-256(seed, class, index), which no library version and no platform changes.

    Args:
        labels: one class index a sample.
        fractions: one decimal text a part, summing to 1; a part of fraction "0" stays empty.
        seed: another seed gives other members, never other counts.

    Raises:
        DataError: a class too small to give every non-zero part a sample.
    """
    parts: list[list[int]] = [[] for _ in fractions]
    for label in torch.unique(labels).tolist():
        members = torch.nonzero(labels == label).flatten().tolist()
        counts = split_counts(len(members), fractions)
        empty = [i for i, n in enumerate(counts) if n == 0 and Fraction(fractions[i]) > 0]
        if empty:
            raise DataError(
                f"class {label} has `count` (={len(members)}) samples: too few for `fractions` (={list(fractions)}); "
                "every part needs a sample of every class, so add samples or merge parts"
            )
        members.sort(key=lambda i: hashlib.sha256(f"{seed}:{label}:{i}".encode()).digest())
        start = 0
        for part, size in zip(parts, counts, strict=True):
            part.extend(members[start : start + size])
            start += size
    return tuple(torch.tensor(sorted(part), dtype=torch.int64) for part in parts)


def fingerprint(parts: Sequence[Split]) -> str:
    """SHA-256 over the shapes, bytes and order of the parts' inputs and labels, as hexadecimal text."""
    digest = hashlib.sha256()
    for part in parts:
        for tensor in (part.inputs, part.labels):
            raw = tensor.detach().cpu().contiguous().numpy().tobytes()
            digest.update(f"{tensor.dtype}{list(tensor.shape)}{len(raw)};".encode())
            digest.update(raw)
    return digest.hexdigest()
