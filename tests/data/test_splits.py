"""Exact stratified counts, members, standardisation and the fingerprint."""

from __future__ import annotations

import builtins
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.data import Split, digits, fingerprint, split_counts, stratified_split
from fxsparse.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("count", "expected"),
    [(7, [5, 1, 1]), (10, [7, 2, 1]), (13, [9, 3, 1]), (99, [69, 20, 10]), (12_500, [8_750, 2_500, 1_250])],
)
def test_golden_counts(count: int, expected: list[int]) -> None:
    assert split_counts(count, ("0.7", "0.2", "0.1")) == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5000), st.lists(st.integers(0, 50), min_size=1, max_size=5))
def test_counts_sum_and_stay_within_one(count: int, weights: list[int]) -> None:
    total = sum(weights)
    if total == 0:
        weights, total = [1], 1
    texts = [f"{w}/{total}" for w in weights]
    counts = split_counts(count, texts)
    assert sum(counts) == count
    for n, w in zip(counts, weights, strict=True):
        assert abs(n * total - w * count) < total  # within one sample of the exact share


@pytest.mark.parametrize("fractions", [("0.7", "0.2"), ("1.1", "-0.1"), ("0.5", "0.6")])
def test_fractions_must_sum_to_one(fractions: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="sum to exactly 1"):
        split_counts(10, fractions)


def test_split_is_a_partition_and_stratified() -> None:
    labels = torch.tensor([0] * 13 + [2] * 99 + [1] * 10)[
        torch.randperm(122, generator=torch.Generator().manual_seed(3))
    ]
    parts = stratified_split(labels, ("0.7", "0.2", "0.1"), seed=5)
    assert sorted(torch.cat(parts).tolist()) == list(range(122))
    for label, counts in ((0, [9, 3, 1]), (2, [69, 20, 10]), (1, [7, 2, 1])):
        assert [int((labels[part] == label).sum()) for part in parts] == counts
    again = stratified_split(labels, ("0.7", "0.2", "0.1"), seed=5)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    other = stratified_split(labels, ("0.7", "0.2", "0.1"), seed=6)
    assert not torch.equal(parts[0], other[0])


def test_too_few_samples_of_a_class() -> None:
    with pytest.raises(DataError, match=r"class 1 has `count` \(=3\)"):
        stratified_split(torch.tensor([0] * 20 + [1] * 3), ("0.7", "0.2", "0.1"))


def test_digits_shapes_and_balance() -> None:
    splits = digits()
    assert splits.train.inputs.shape == (1078, 1, 8, 8)
    assert splits.train.inputs.dtype == torch.float32
    assert splits.train.labels.dtype == torch.int64
    assert len(splits.validation) == 362 and len(splits.test) == 357
    for part in (splits.train, splits.validation, splits.test):
        shares = torch.bincount(part.labels, minlength=10) / len(part)
        assert float((shares - 0.1).abs().max()) < 0.006


def test_digits_are_standardised_by_the_training_part_only() -> None:
    from sklearn.datasets import load_digits

    splits = digits(3)
    assert abs(float(splits.train.inputs.double().mean())) < 1e-6
    assert abs(float(splits.train.inputs.double().std(correction=0)) - 1) < 1e-6
    parts = (splits.train, splits.validation, splits.test)
    pixels = torch.cat([p.inputs for p in parts]).double() * splits.deviation + splits.mean
    ours = sorted(map(bytes, pixels.round().to(torch.uint8).reshape(-1, 64).numpy()))
    raw, _ = load_digits(return_X_y=True)
    assert ours == sorted(map(bytes, raw.astype(np.uint8)))  # every digit once: no sample in two parts


def test_digits_pair_inputs_with_their_labels() -> None:
    """Nearest class mean of the training part recognises the test part: labels went with their images."""
    splits = digits()
    x, y = splits.train.inputs.flatten(1), splits.train.labels
    means = torch.stack([x[y == c].mean(0) for c in range(10)])
    guess = torch.cdist(splits.test.inputs.flatten(1), means).argmin(1)
    assert float((guess == splits.test.labels).float().mean()) > 0.85


def test_digits_are_the_same_in_every_process() -> None:
    code = "from fxsparse.data import digits; print(digits(1).fingerprint)"
    prints = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": h}
        ).stdout.strip()
        for h in ("1", "2")
    }
    assert prints == {digits(1).fingerprint}
    assert digits(2).fingerprint not in prints


def test_fingerprint_sees_values_labels_and_membership() -> None:
    a, b = Split(torch.zeros(2, 3), torch.tensor([0, 1])), Split(torch.ones(1, 3), torch.tensor([1]))
    base = fingerprint((a, b))
    assert base == fingerprint((Split(a.inputs.clone(), a.labels.clone()), b))
    changed = [
        (b, a),
        (Split(a.inputs.reshape(3, 2), a.labels), b),
        (Split(a.inputs, torch.tensor([1, 0])), b),
        (Split(a.inputs + torch.tensor([[0, 0, 0], [0, 0, 1e-7]]), a.labels), b),
        (Split(a.inputs.double(), a.labels), b),
    ]
    assert base not in {fingerprint(parts) for parts in changed}


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: object) -> object:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"fxsparse\[demo\]"):
        digits()


def test_importing_data_does_not_import_scikit_learn() -> None:
    code = "import sys, fxsparse.data, fxsparse.models; raise SystemExit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
