from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity import (
    ERK,
    Block,
    Channel,
    ConstantFanIn,
    Global,
    Layout,
    MaskSet,
    NByM,
    Normalize,
    Pattern,
    Pooling,
    Positions,
    Remainder,
    SharedSupport,
    Uniform,
    Unstructured,
    WeightSpec,
    build_masks,
    keep_count,
    random_masks,
    top_k,
)

ALL: tuple[Pattern, ...] = (
    Unstructured(),
    Block(2, 4),
    Channel(0),
    Channel(1),
    ConstantFanIn(),
    SharedSupport(4),
    SharedSupport(4, Positions.ELEMENT),
    NByM(2, 4),
    NByM(2, 4, exact=False),
    NByM(1, 2, remainder=Remainder.TAIL),
)


def model(pattern: Pattern) -> list[WeightSpec]:
    return [
        WeightSpec("conv", (8, 8, 3, 3), Layout.conv(), pattern),
        WeightSpec("up", (8, 12, 2, 2), Layout.conv_transpose(2), pattern),
        WeightSpec("fc", (12, 16), Layout.linear(), pattern),
    ]


def scores_of(weights: list[WeightSpec], seed: int = 0) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {w.name: torch.rand(w.shape, generator=source) for w in weights}


@pytest.mark.parametrize("pattern", ALL, ids=str)
@pytest.mark.parametrize("distribution", [Uniform(), ERK(), Uniform(dense_first=True), Global()], ids=str)
def test_masks_hold_pattern_and_counts(pattern: Pattern, distribution: Uniform | ERK | Global) -> None:
    weights = model(pattern)
    scores = scores_of(weights)
    targets = distribution.targets(weights, 0.5, scores)
    drawn = random_masks(weights, distribution, 0.5, seed=3)
    for masks in (build_masks(weights, distribution, 0.5, scores, Pooling.MEAN), drawn):
        assert list(masks) == ["conv", "up", "fc"]
        for weight in weights:
            mask = masks[weight.name]
            pattern.check(mask, weight.layout)
            if masks is drawn and isinstance(distribution, Global):
                continue  # its counts come from its own draw
            units = pattern.units(weight.shape, weight.layout)
            assert int(mask.sum()) == units.alive_elements(targets[weight.name])


@pytest.mark.parametrize("pattern", ALL, ids=str)
def test_sparsity_zero_is_all_true(pattern: Pattern) -> None:
    weights = model(pattern)
    nothing = {w.name: torch.full(w.shape, float("nan")) for w in weights}
    for masks in (build_masks(weights, Uniform(), 0.0, nothing), random_masks(weights, Global(), 0.0, 0)):
        assert all(bool(mask.all()) for mask in masks.values())


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 0.9), st.integers(0, 999), st.sampled_from([None, Normalize.L2]))
def test_global_masks_are_one_prefix_of_one_ranking(sparsity: float, seed: int, normalize: Normalize | None) -> None:
    weights = model(Unstructured())
    source = torch.Generator().manual_seed(seed)
    scores = {w.name: torch.randint(1, 50, w.shape, generator=source).float() for w in weights}
    masks = build_masks(weights, Global(normalize), sparsity, scores)
    total = sum(w.numel for w in weights)
    assert MaskSet(masks).alive == keep_count(total, sparsity)
    if normalize is None and all(int(m.sum()) > 1 for m in masks.values()):
        flat = torch.cat([scores[w.name].reshape(-1) for w in weights])
        together = torch.cat([masks[w.name].reshape(-1) for w in weights])
        assert torch.equal(together, top_k(flat, keep_count(total, sparsity)))


@pytest.mark.parametrize("pattern", ALL, ids=str)
def test_random_masks_depend_on_the_seed_and_the_position_only(pattern: Pattern) -> None:
    weights = model(pattern)
    before = torch.random.get_rng_state()
    first = MaskSet(random_masks(weights, Uniform(), 0.5, 7))
    torch.rand(3)
    torch.random.set_rng_state(before)
    assert first == MaskSet(random_masks(weights, Uniform(), 0.5, 7))
    assert first != MaskSet(random_masks(weights, Uniform(), 0.5, 8))
    assert torch.equal(before, torch.random.get_rng_state())
    twins = [WeightSpec("a", (8, 8), pattern=pattern), WeightSpec("b", (8, 8), pattern=pattern)]
    masks = random_masks(twins, Uniform(), 0.5, 7)
    assert not torch.equal(masks["a"], masks["b"])
    alone = random_masks(twins[:1], Uniform(), 0.5, 7)
    assert torch.equal(alone["a"], masks["a"])


def test_random_masks_are_the_same_in_another_process() -> None:
    code = (
        "from fxsparse.sparsity import *\n"
        "w = [WeightSpec('a', (9, 7)), WeightSpec('b', (6, 8), pattern=SharedSupport(2))]\n"
        "print(MaskSet(random_masks(w, ERK(), 0.7, 5)).digest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    weights = [WeightSpec("a", (9, 7)), WeightSpec("b", (6, 8), pattern=SharedSupport(2))]
    assert runs == {MaskSet(random_masks(weights, ERK(), 0.7, 5)).digest() + "\n"}


def test_random_shared_support_draws_positions() -> None:
    """Every position is equally likely: units are drawn, not elements."""
    weights = [WeightSpec("a", (4, 6, 3), Layout.conv(), SharedSupport(2))]
    hits = torch.zeros(2, 6)
    for seed in range(600):
        mask = random_masks(weights, Uniform(), 0.5, seed)["a"]
        hits += mask[::2, :, 0]
    assert bool(((hits - 300).abs() < 5 * 150**0.5).all())


def test_bad_scores_name_the_weight() -> None:
    weights = model(Unstructured())
    scores = scores_of(weights)
    with pytest.raises(ConfigError, match="`up` are missing"):
        build_masks(weights, Uniform(), 0.5, {"conv": scores["conv"]})
    with pytest.raises(ConfigError, match="`up` have shape"):
        build_masks(weights, Uniform(), 0.5, {**scores, "up": scores["fc"]})
    scores["fc"][0, 0] = float("nan")
    with pytest.raises(DataError, match="weight `fc`: 1 of 192 scores are NaN"):
        build_masks(weights, Uniform(), 0.5, scores)
    with pytest.raises(DataError, match="NaN"):
        build_masks(weights, Global(), 0.5, scores)
