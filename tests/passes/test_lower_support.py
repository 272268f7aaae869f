from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxsparse.passes.lower_support import Support, find_support
from fxsparse.sparsity import Block, Channel, NByM, SharedSupport, Unstructured


def product(support: Support, weight: Tensor, x: Tensor) -> Tensor:
    """The product by plain loops over groups and rows."""
    made = torch.full((support.rows, x.shape[1]), torch.nan, dtype=x.dtype)
    for batch in support.batches:
        blocks = batch.blocks(weight)
        for group in range(batch.groups):
            for row, block in zip(batch.rows[group].tolist(), blocks[group], strict=True):
                if row >= 0:
                    made[row] = block @ x[batch.positions[group]]
                else:
                    assert not block.any()
    return made


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(8, 90),
    positions=st.integers(4, 40),
    group=st.integers(5, 40),
    sparsity=st.floats(0.3, 0.95),
    permuted=st.booleans(),
    holes=st.floats(0.0, 0.1),
    seed=st.integers(0, 99),
)
def test_groups_compute_the_product(
    rows: int, positions: int, group: int, sparsity: float, permuted: bool, holes: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator) if permuted else None
    scores = torch.rand(rows, positions, generator=generator)
    mask = SharedSupport(group).mask(scores, sparsity, row_order=order)
    mask &= torch.rand(rows, positions, generator=generator) >= holes  # alive values may be zero
    support = find_support(mask, order)
    if support is None:
        return
    weight = torch.randn(rows, positions, generator=generator, dtype=torch.float64) * mask
    x = torch.randn(positions, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(product(support, weight, x), weight @ x, rtol=1e-12, atol=1e-12)
    assert support.macs < rows * positions
    assert sorted(support.computed[support.computed >= 0].tolist()) == list(range(rows))
    index = support.index
    if index is not None:
        assert torch.equal(support.computed[index], torch.arange(rows))


def test_a_shared_support_is_found_as_it_was_made_and_in_its_order() -> None:
    mask = SharedSupport(16).mask(torch.rand(64, 50), 0.8)
    support = find_support(mask)
    assert support is not None and len(support.batches) == 1
    assert (support.batches[0].groups, support.batches[0].group, support.batches[0].k) == (4, 16, 10)
    assert support.index is None and support.macs == int(mask.sum())


def test_permuted_rows_are_found_without_their_order_and_the_index_brings_them_back() -> None:
    mask = SharedSupport(16).mask(torch.rand(64, 50), 0.8, row_order=torch.randperm(64))
    support = find_support(mask)
    assert support is not None and support.index is not None
    assert support.macs == int(mask.sum())


def test_a_smaller_last_group_is_padded_and_needs_no_reordering() -> None:
    support = find_support(SharedSupport(16).mask(torch.rand(40, 50), 0.8))
    assert support is not None and support.index is not None
    assert torch.equal(support.index, torch.arange(40))
    assert support.batches[0].groups == 3


def test_zeros_among_alive_values_do_not_break_a_group() -> None:
    mask = SharedSupport(32).mask(torch.rand(128, 100), 0.9)
    holed = mask & (torch.rand(128, 100) > 0.03)
    support = find_support(holed)
    assert support is not None
    assert support.macs <= 1.1 * int(mask.sum())


def test_groups_of_very_different_supports_do_not_wait_for_each_other() -> None:
    mask = torch.zeros(256, 400, dtype=torch.bool)
    mask[:64, :300] = True
    for group in range(1, 4):
        mask[64 * group : 64 * (group + 1), 10 * group : 10 * group + 8] = True
    support = find_support(mask)
    assert support is not None and len(support.batches) == 2
    assert support.macs == int(mask.sum())


def test_a_weight_with_nothing_alive_is_computed_on_one_position() -> None:
    support = find_support(torch.zeros(16, 8, dtype=torch.bool))
    assert support is not None and support.macs == 16
    weight, x = torch.zeros(16, 8), torch.randn(8, 2)
    assert not product(support, weight, x).any()


@pytest.mark.parametrize("shape", [(8, 8), (0, 4), (4, 0)])
def test_nothing_is_found_where_all_is_alive_or_there_is_nothing(shape: tuple[int, int]) -> None:
    assert find_support(torch.ones(shape, dtype=torch.bool)) is None


def test_unstructured_masks_have_no_groups() -> None:
    assert find_support(Unstructured().mask(torch.rand(128, 128), 0.9)) is None
    assert find_support(NByM(2, 4).mask(torch.rand(128, 128), 0.5)) is None


def test_blocks_and_columns_happen_to_share_supports() -> None:
    columns = find_support(Channel(1).mask(torch.rand(64, 32), 0.5))
    assert columns is not None and columns.batches[0].groups == 1 and columns.batches[0].k == 16
    blocks = Block(16, 4).mask(torch.rand(128, 128), 0.9)
    found = find_support(blocks)
    assert found is not None and found.macs <= 2 * int(blocks.sum())


def test_padded_positions_repeat_one_of_the_group_so_that_no_foreign_value_is_read() -> None:
    mask = SharedSupport(16).mask(torch.rand(32, 50), 0.8)
    support = find_support(mask)
    assert support is not None
    wide = support.aligned(16)
    batch = wide.batches[0]
    assert batch.k == 16 and int(batch.used.sum()) == 20
    for positions, used in zip(batch.positions, batch.used, strict=True):
        assert set(positions[~used].tolist()) <= set(positions[used].tolist())
    weight = torch.randn(32, 50, dtype=torch.float64) * mask
    x = torch.randn(50, 2, dtype=torch.float64)
    torch.testing.assert_close(product(wide, weight, x), weight @ x, rtol=1e-12, atol=1e-12)
