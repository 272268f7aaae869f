from __future__ import annotations

import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity import Mask, MaskSet, tensor_sha256

GOLDEN = torch.tensor([[True, False, True, True, False], [False, False, True, True, True]])
GOLDEN_SHA = "8ca16541e0701cb835325a687438a4ae46863d1305a57b395ec6b95c9a19ac3e"
WEIGHT_SHA = "8c43f9c8eb22bd373d29217218f70af7ba8a442e20527d224e99f6ef30bcf38c"


@st.composite
def masks(draw: st.DrawFn, count: int = 1) -> list[Mask]:
    shape = draw(st.lists(st.integers(0, 5), min_size=0, max_size=3))
    size = torch.Size(shape).numel()
    lists = [draw(st.lists(st.booleans(), min_size=size, max_size=size)) for _ in range(count)]
    return [Mask(torch.tensor(bits, dtype=torch.bool).reshape(shape)) for bits in lists]


def test_golden_packing_and_hashes() -> None:
    mask = Mask(GOLDEN)
    assert bytes(mask.pack().tolist()) == bytes.fromhex("8d03")
    assert mask.sha256("fc.weight") == GOLDEN_SHA
    assert Mask(GOLDEN.t().contiguous().t()).sha256("fc.weight") == GOLDEN_SHA
    assert tensor_sha256("fc.weight", torch.arange(6.0).reshape(2, 3)) == WEIGHT_SHA
    assert tensor_sha256("fc.weight", torch.arange(6.0).reshape(3, 2).t().contiguous()) != WEIGHT_SHA
    assert mask.sha256("fc.bias") != GOLDEN_SHA and Mask(GOLDEN.reshape(5, 2)).sha256("fc.weight") != GOLDEN_SHA


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_tensor_hash_reads_every_dtype_and_shape(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1, 0], [1, 1]]).to(dtype)
    assert len({tensor_sha256("w", tensor), tensor_sha256("w", tensor[:1]), tensor_sha256("w", tensor.int())}) == 3
    assert tensor_sha256("w", tensor[0, 0]) == tensor_sha256("w", tensor[1, 1])
    assert tensor_sha256("w", tensor[:0]) == tensor_sha256("w", tensor[:0].clone())


@settings(max_examples=80, deadline=None)
@given(masks())
def test_packing_round_trips(drawn: list[Mask]) -> None:
    mask = drawn[0]
    packed = mask.pack()
    assert packed.dtype == torch.uint8 and packed.shape == (-(-mask.numel // 8),)
    flat = mask.tensor.reshape(-1).tolist()
    for index, alive in enumerate(flat):
        assert bool(int(packed[index // 8]) >> (index % 8) & 1) == alive
    assert sum(bin(byte).count("1") for byte in packed.tolist()) == mask.alive  # padding is zero
    assert Mask.unpack(packed, mask.shape) == mask


def test_unpacking_checks_size_dtype_and_padding() -> None:
    packed = Mask(GOLDEN).pack()
    for shape in ((2, 4), (3, 6)):
        with pytest.raises(DataError, match="bytes|padding"):
            Mask.unpack(packed, shape)
    with pytest.raises(DataError, match="2 bytes"):
        Mask.unpack(packed[:1], (2, 5))
    with pytest.raises(DataError, match="uint8"):
        Mask.unpack(packed.to(torch.int16), (2, 5))
    corrupt = packed.clone()
    corrupt[1] |= 128
    with pytest.raises(DataError, match="padding"):
        Mask.unpack(corrupt, (2, 5))


@settings(max_examples=80, deadline=None)
@given(masks(3))
def test_set_algebra(drawn: list[Mask]) -> None:
    a, b, c = drawn
    sets = [{i for i, alive in enumerate(m.tensor.reshape(-1).tolist()) if alive} for m in drawn]
    everything = set(range(a.numel))

    def as_set(mask: Mask) -> set[int]:
        return {i for i, alive in enumerate(mask.tensor.reshape(-1).tolist()) if alive}

    for op in (operator.and_, operator.or_, operator.xor, operator.sub):
        assert as_set(op(a, b)) == op(sets[0], sets[1])
    for compare in (operator.le, operator.lt, operator.ge, operator.gt, operator.eq, operator.ne):
        assert compare(a, b) == compare(sets[0], sets[1])
        assert compare(a, a) == compare(sets[0], sets[0])
    assert as_set(~a) == everything - sets[0]
    assert ~(a | b) == ~a & ~b and a - b == a & ~b and (a ^ b) == (a | b) - (a & b)
    assert a & (b | c) == (a & b) | (a & c)
    assert a & b <= a <= a | b
    assert (a.alive, a.dead, a.numel) == (len(sets[0]), a.numel - len(sets[0]), a.numel)
    assert a.density + a.sparsity == 1.0


def test_density_counts_the_mask_exactly() -> None:
    big = torch.ones(5000, 4000, dtype=torch.bool)  # beyond the integers that float32 can count
    big[0, 0] = False
    assert Mask(big).alive == 19_999_999 and Mask(big).density == 19_999_999 / 20_000_000
    assert Mask(torch.zeros(0, dtype=torch.bool)).density == 1.0


def test_mask_refusals() -> None:
    with pytest.raises(ConfigError, match=r"torch\.bool"):
        Mask(torch.ones(2))
    with pytest.raises(ConfigError, match="shape"):
        Mask(GOLDEN) & Mask(GOLDEN[:1])
    assert Mask(GOLDEN) != Mask(GOLDEN[:1]) and Mask(GOLDEN) != "mask"
    with pytest.raises(TypeError):
        hash(Mask(GOLDEN))
    assert "alive=6" in repr(Mask(GOLDEN))


def test_mask_set() -> None:
    first = MaskSet({"a": GOLDEN, "b": Mask(torch.ones(2, dtype=torch.bool))})
    second = MaskSet({"b": torch.tensor([True, False]), "a": torch.zeros_like(GOLDEN)})
    assert (len(first), first.numel, first.alive, first.density) == (2, 12, 8, 8 / 12)
    assert first.sparsity == 1 - 8 / 12 and list(first) == ["a", "b"]
    assert second.is_nested_in(first) and second <= first and not first <= second
    assert first & second == second and first | second == first
    assert (first - second).alive == 7 and (first ^ second).alive == 7 and (~first).alive == 4
    assert first != second and first == MaskSet({"b": first["b"], "a": first["a"]})
    assert torch.equal(first.tensors()["a"], GOLDEN)
    with pytest.raises(ConfigError, match="`b`"):
        first.is_nested_in(MaskSet({"a": GOLDEN}))
    with pytest.raises(ConfigError, match="`c`"):
        first | MaskSet({"a": GOLDEN, "b": GOLDEN[0, :2], "c": GOLDEN})
    assert MaskSet({}).density == 1.0 and MaskSet({}) == MaskSet({})


def test_digest_sees_names_shapes_and_bits_but_not_order() -> None:
    base = MaskSet({"a": GOLDEN, "b": GOLDEN[0]})
    assert base.digest() == MaskSet({"b": GOLDEN[0], "a": GOLDEN}).digest()
    others = [
        MaskSet({"a": GOLDEN, "c": GOLDEN[0]}),
        MaskSet({"a": GOLDEN.reshape(5, 2), "b": GOLDEN[0]}),
        MaskSet({"a": ~GOLDEN, "b": GOLDEN[0]}),
        MaskSet({"a": GOLDEN}),
    ]
    assert len({base.digest(), *(other.digest() for other in others)}) == 5


def test_sets_of_masks_compare_like_sets() -> None:
    small = MaskSet({"a": torch.tensor([True, False]), "b": torch.tensor([False, False])})
    large = MaskSet({"a": torch.tensor([True, False]), "b": torch.tensor([True, False])})
    other = MaskSet({"a": torch.tensor([False, True]), "b": torch.tensor([True, True])})
    assert small < large and large > small and small <= small and not small < small and large >= small
    assert not small <= other and not other >= small
    assert (small.dead, large.dead) == (3, 2)
