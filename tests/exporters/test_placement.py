"""Weights are found in the file under any name and order of axes, and a revived weight is noticed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.errors import ExportError
from fxsparse.exporters.placement import Placement, check_zeros, fill_dead, find

RNG = np.random.default_rng(0)
W = RNG.standard_normal((3, 4)).astype(np.float32)


def test_found_by_name_by_bits_and_transposed_all_at_once() -> None:
    found = find("w", ["w"], W, {"w": W, "val_1": W.T.copy(), "other": W + 1, "wide": W.astype(np.float64)})
    assert found == [Placement("w", "w", (0, 1), True), Placement("w", "val_1", (1, 0), True)]


def test_a_tied_weight_is_found_under_an_alias_when_rescaled() -> None:
    assert find("w", ["w", "v.weight"], W, {"v.weight": 2 * W}) == [Placement("w", "v.weight", (0, 1), False)]


def test_a_rescaled_weight_of_unknown_name_is_found_by_its_zeros() -> None:
    pruned = np.where(RNG.random(W.shape) < 0.5, 0, W).astype(np.float32)
    stored = {"val_7": 3 * pruned.T, "other": W.T.copy()}
    assert find("w", ["w"], pruned, stored) == [Placement("w", "val_7", (1, 0), False)]


def test_a_reshaped_weight_is_found_and_checked() -> None:
    kernel = np.where(RNG.random((3, 4)) < 0.5, 0, W).astype(np.float32)
    (place,) = find("w", ["w"], kernel, {"val_1": kernel.T.reshape(4, 3, 1, 1), "other": W.reshape(2, 6)})
    assert (place.initializer, place.axes, place.exact) == ("val_1", (1, 0), True)
    stored = kernel.T.reshape(4, 3, 1, 1).copy()
    check_zeros(place, kernel != 0, stored)
    stored[tuple(np.argwhere(stored == 0)[0])] = 1.0
    with pytest.raises(ExportError, match="1 dead entries are not zero in initializer `val_1`"):
        check_zeros(place, kernel != 0, stored)
    dense = fill_dead(place, kernel != 0, kernel.T.reshape(4, 3, 1, 1))
    assert dense.shape == (4, 3, 1, 1) and np.all(dense != 0)


BIG = RNG.standard_normal((6, 4)).astype(np.float32)
OTHER = RNG.standard_normal((2, 6, 4)).astype(np.float32)

PARTS = {
    "split": {"q": BIG[:2], "k": BIG[2:4].T.copy(), "v": BIG[4:], "other": W},
    "reordered": {"r": BIG[[4, 5, 0, 1, 2, 3]]},
    "joined with another": {"w2": np.stack([BIG, OTHER[0]])},
    "split by columns": {"a": BIG[:, :1].copy(), "b": BIG[:, 1:].T.copy()},
}


@pytest.mark.parametrize("name", PARTS)
def test_a_weight_in_parts_is_found(name: str) -> None:
    stored = PARTS[name]
    found = find("w", ["w"], BIG, stored, [OTHER[0]])
    assert {p.initializer for p in found} == set(stored) - {"other"}
    assert all(p.part and p.exact and p.axes == () for p in found)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_with_one_other_number_is_not_found(name: str) -> None:
    stored = {key: value.copy() for key, value in PARTS[name].items()}
    first = next(iter(stored.values()))
    first.flat[0] = 7.0
    assert find("w", ["w"], BIG, stored, [OTHER[0]]) == []


def test_a_row_of_unknown_origin_could_be_a_revived_one() -> None:
    pruned = BIG.copy()
    pruned[3] = 0
    assert find("w", ["w"], pruned, {"dense": BIG.copy()}) == []
    assert find("w", ["w"], BIG, {"w2": np.stack([BIG, OTHER[0]])}, [OTHER[1]]) == []


def test_rows_without_an_alive_entry_need_no_place() -> None:
    weight = BIG.copy()
    weight[3] = 0
    assert [p.initializer for p in find("w", ["w"], weight, {"a": weight[:3], "b": weight[4:]})] == ["a", "b"]


def test_neither_dense_nor_empty_weights_are_guessed_from_zeros() -> None:
    assert find("w", ["w"], W, {"other": W + 100}) == []
    assert find("w", ["w"], np.zeros_like(W), {"other": W}) == []


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_any_order_of_axes_is_found(shape: list[int], data: st.DataObject) -> None:
    values = np.arange(1, 1 + int(np.prod(shape)), dtype=np.float32).reshape(shape)
    axes = data.draw(st.sampled_from(list(itertools.permutations(range(len(shape))))))
    (place,) = find("w", ["w"], values, {"x": values.transpose(axes).copy()})
    assert place.exact and np.array_equal(values.transpose(place.axes), values.transpose(axes))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 11), st.sampled_from([(0, 1), (1, 0)]))
def test_one_revived_entry_raises_and_names_it(position: int, axes: tuple[int, int]) -> None:
    alive = np.ones(12, dtype=bool)
    alive[[position, (position + 5) % 12]] = False
    alive = alive.reshape(3, 4)
    stored = np.where(alive, W, 0).astype(np.float32).transpose(axes).copy()
    place = Placement("layer.weight", "val_3", axes, True)
    check_zeros(place, alive, stored)
    stored[tuple(np.argwhere(~alive.transpose(axes))[0])] = 1e-30
    with pytest.raises(ExportError, match=r"`layer\.weight`: 1 dead entries are not zero in initializer `val_3`"):
        check_zeros(place, alive, stored)


def test_the_dense_twin_has_no_zero_and_the_same_alive_entries() -> None:
    alive = RNG.random((3, 4)) < 0.5
    stored = np.where(alive, W, 0).astype(np.float32).T.copy()
    dense = fill_dead(Placement("w", "w", (1, 0), True), alive, stored)
    assert dense.dtype == np.float32 and dense.shape == (4, 3) and np.all(dense != 0)
    assert np.array_equal(dense[alive.T], stored[alive.T])
    all_dead = fill_dead(Placement("w", "w", (0, 1), True), np.zeros((3, 4), bool), np.zeros((3, 4), np.float32))
    assert np.all(all_dead > 0)
