"""Selection by magnitude against a sort written in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.errors import ConfigError, DataError
from fxsparse.lottery import prune_global, prune_layerwise
from fxsparse.sparsity import Mask


def _oracle(weights: dict[str, torch.Tensor], masks: dict[str, torch.Tensor], alive: int) -> dict[str, list[bool]]:
    rows = [
        (-abs(float(w)), tensor, index, name)
        for tensor, name in enumerate(masks)
        for index, (w, m) in enumerate(
            zip(weights[name].float().reshape(-1), masks[name].reshape(-1).tolist(), strict=True)
        )
        if m
    ]
    kept = {(name, index) for _, _, index, name in sorted(rows)[:alive]}
    return {name: [(name, i) in kept for i in range(mask.numel())] for name, mask in masks.items()}


values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1e-42, -1e-42, 1e-45, 3.0, 2.0**-130])


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_global_equals_a_sort(data: st.DataObject, dtype: torch.dtype) -> None:
    weights, masks = {}, {}
    for name, shape in (("a", (2, 3)), ("b", (4,)), ("c", (1, 1, 5))):
        size = math.prod(shape)
        drawn = data.draw(st.lists(values, min_size=size, max_size=size))
        weights[name] = torch.tensor(drawn, dtype=dtype).reshape(shape)
        masks[name] = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).reshape(shape)
    total = sum(int(mask.sum()) for mask in masks.values())
    alive = data.draw(st.integers(0, total))
    pruned = prune_global(weights, masks, alive, min_alive=0)
    assert {name: mask.reshape(-1).tolist() for name, mask in pruned.items()} == _oracle(weights, masks, alive)
    assert sum(int(mask.sum()) for mask in pruned.values()) == alive
    assert all(Mask(pruned[name]) <= Mask(masks[name]) for name in masks)


def test_ties_keep_the_lower_index_and_never_go_as_a_group() -> None:
    weights = {"a": torch.ones(4), "b": -torch.ones(4)}
    masks = {name: torch.ones(4, dtype=torch.bool) for name in weights}
    pruned = prune_global(weights, masks, 5, min_alive=0)
    assert pruned["a"].tolist() == [True] * 4
    assert pruned["b"].tolist() == [True, False, False, False]


def test_a_global_ranking_is_not_a_ranking_per_layer() -> None:
    weights = {"small": torch.full((10,), 0.1), "large": torch.full((10,), 5.0)}
    masks = {name: torch.ones(10, dtype=torch.bool) for name in weights}
    pruned = prune_global(weights, masks, 12, min_alive=0)
    assert int(pruned["large"].sum()) == 10 and int(pruned["small"].sum()) == 2
    layered = prune_layerwise(weights, masks, {"small": 6, "large": 6})
    assert int(layered["large"].sum()) == 6 and int(layered["small"].sum()) == 6


def test_every_layer_keeps_its_minimum() -> None:
    weights = {"tiny": torch.tensor([0.1, 0.3, 0.2]), "big": torch.arange(1.0, 8.0)}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    pruned = prune_global(weights, masks, 4, min_alive=1)
    assert pruned["tiny"].tolist() == [False, True, False]
    assert pruned["big"].tolist() == [False] * 4 + [True] * 3
    assert not prune_global(weights, masks, 4, min_alive=0)["tiny"].any()
    with pytest.raises(ConfigError, match="min_alive"):
        prune_global(weights, masks, 1, min_alive=1)


def test_the_dead_never_come_back() -> None:
    weights = {"a": torch.tensor([9.0, 1.0, 8.0, 2.0])}
    masks = {"a": torch.tensor([False, True, False, True])}
    assert prune_global(weights, masks, 1)["a"].tolist() == [False, False, False, True]
    with pytest.raises(ConfigError):
        prune_layerwise(weights, masks, {"a": 3})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_raise(bad: float) -> None:
    weights = {"fc.weight": torch.tensor([1.0, bad])}
    masks = {"fc.weight": torch.ones(2, dtype=torch.bool)}
    with pytest.raises(DataError, match=r"`fc.weight`.*NaN or Inf \(=1 values\)"):
        prune_global(weights, masks, 1)
    with pytest.raises(DataError, match="fc.weight"):
        prune_layerwise(weights, masks, {"fc.weight": 1})
