"""Squares from blocks of a Gram matrix, and moments of many entries side by side."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxsparse.curvature import FisherCollector, collector_blocks, taps_formulas
from fxsparse.curvature.collector_blocks import merged, moments_of
from fxsparse.curvature.collector_moments import Moments
from fxsparse.curvature.collector_settled import Settled
from fxsparse.curvature.taps_formulas import gram_rows, product_rows
from fxsparse.errors import ConfigError


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("positions", [1, 2, 31, 32, 33, 64, 95, 100])
def test_the_gram_form_equals_the_squares_of_the_gradients(positions: int) -> None:
    x, d = drawn(3, positions, 7), drawn(3, positions, 5, seed=1)
    expected = (d.mT @ x).square().sum(2)
    assert torch.allclose(gram_rows(x, d), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("positions", "inputs", "outputs", "gram"),
    [(8, 64, 64, True), (32, 64, 64, False), (31, 64, 64, True), (64, 128, 128, True), (96, 128, 128, False)],
)
def test_the_cheaper_form_is_taken(
    positions: int, inputs: int, outputs: int, gram: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T (i + o) times the fraction of the Gram matrix that is made, 1, 3/4, 2/3 for 1, 2, 3 blocks, against i o."""
    seen = []
    own = taps_formulas.gram_rows
    monkeypatch.setattr(taps_formulas, "gram_rows", lambda x, d: seen.append(len(x)) or own(x, d))
    monkeypatch.setattr(taps_formulas, "_GRAM_CHUNK", 2 * positions * max(inputs, outputs))
    x, d = drawn(5, positions, inputs), drawn(5, positions, outputs, seed=1)
    assert torch.allclose(product_rows(x, d, None), (d.mT @ x).square().sum(2), rtol=1e-11)
    assert seen == ([2, 2, 1] if gram else [])


@pytest.mark.parametrize("positions", [1, 5, 64])
def test_dead_entries_do_not_count(positions: int) -> None:
    x, d = drawn(3, positions, 7), drawn(3, positions, 5, seed=1)
    mask = drawn(5, 7, seed=2) > 0
    expected = ((d.mT @ x) * mask).square().sum(2)
    assert torch.allclose(product_rows(x, d, mask), expected, rtol=1e-12, atol=1e-12)


def same(one: Moments, other: Moments) -> None:
    assert one.numbers() == other.numbers()
    assert one.tensors().keys() == other.tensors().keys()
    for name, tensor in one.tensors().items():
        assert tensor.dtype == other.tensors()[name].dtype
        assert torch.allclose(tensor, other.tensors()[name], rtol=1e-13, atol=1e-13), name


def values(seed: int) -> dict[str, Tensor]:
    sizes = {"a": 3, "b": 1, "large": 40, "c": 5, "d": 4}
    found = {name: drawn(6, size, seed=seed + k).square() for k, (name, size) in enumerate(sizes.items())}
    return {**found, "half": found["a"].float()}


@pytest.mark.parametrize("masses", [None, torch.tensor([1.0, 0.0, 4.0, 2.0, 2.0, 7.0])])
@pytest.mark.parametrize(("block", "alone"), [(1 << 20, 1 << 20), (64, 200), (1 << 20, 60), (64, 0)])
def test_moments_side_by_side_are_those_of_each(
    masses: Tensor | None, block: int, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector_blocks, "_BLOCK", block)
    monkeypatch.setattr(collector_blocks, "_ALONE", alone)
    first, second = values(0), values(10)
    second["new"] = drawn(6, 2, seed=30)
    mine, theirs = moments_of(first, masses), moments_of(second, masses)
    assert list(mine) == list(first)
    for name, each in first.items():
        same(mine[name], Moments.of(each, masses))
    both = merged(mine, theirs)
    assert set(both) == set(second)
    for name, each in theirs.items():
        same(both[name], mine[name].merge(each) if name in mine else each)
    again = merged(both, both)
    for name, each in both.items():
        same(again[name], each.merge(each))


def test_batches_of_other_sizes_are_merged_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many samples there are, the entries lie in the same blocks, so that none is taken out of its own."""
    monkeypatch.setattr(collector_blocks, "_ALONE", 60)
    one, two = moments_of(values(0), None), moments_of({k: each[:2] for k, each in values(10).items()}, None)
    assert (both := one.merge(two)) is not None
    for name, each in two.items():
        same(both[name], one[name].merge(each))


def test_entries_that_saw_other_units_are_merged_each_by_its_own_numbers() -> None:
    """Of "b" two batches were seen before, of the others one; and the spread of "c" is not known."""
    one, two = dict(moments_of(values(0), None)), moments_of(values(10), None)
    one["b"] = one["b"].merge(two["b"])
    one["c"] = Moments.of_sum(values(0)["c"].sum(0), 6, 6.0)
    del one["d"]
    both = merged(one, two)
    for name, each in two.items():
        same(both[name], one[name].merge(each) if name in one else each)
    assert both["b"].count == 18 and both["a"].count == 12
    assert both["c"].spread is None


def test_nothing_that_was_collected_shares_memory_with_the_state_that_is_given_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    collector = FisherCollector(model, "cross_entropy")
    for _ in range(2):
        collector.update((torch.randn(5, 3), torch.randint(2, (5,))))
    state = collector.state_dict()
    tensors = [t for e in state["tasks"]["default"]["entries"].values() for t in e["tensors"].values()]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    before = {key: value.clone() for key, value in collector.get().items()}
    for tensor in [*tensors, *collector.get().values()]:
        tensor.zero_()
    assert all(torch.equal(value, before[key]) for key, value in collector.get().items())


def test_the_largest_have_settled_after_so_many_looks_in_a_row() -> None:
    one, two = torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 2.0, 3.0])
    settled = Settled(top=2, overlap=1.0, patience=2)
    assert [settled.look(each) for each in (one, one, two, two, two, two)] == [False, False, False, False, True, True]
    assert [Settled(2, 0.5, 1).look(one)] == [False]
    half = Settled(top=2, overlap=0.5, patience=1)
    half.look(one)
    assert half.look(torch.tensor([3.0, 0.0, 2.0, 1.0]))
    assert not half.look(torch.tensor([0.0, 3.0, 0.0, 1.0]))


@pytest.mark.parametrize("options", [(0, 0.5, 1), (1, 0.0, 1), (1, 1.1, 1), (1, 0.5, 0)])
def test_what_cannot_settle_is_refused(options: tuple[int, float, int]) -> None:
    with pytest.raises(ConfigError, match="^`(top|overlap|patience)` .*must be"):
        Settled(*options)
