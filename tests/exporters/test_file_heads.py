"""Attention heads that leave an ONNX graph: forms by hand and of torch, in float64, with shapes worked out on paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from torch import nn

from fxsparse.exporters import optimize_file
from fxsparse.exporters.file_channels import Removal, remove_channels
from fxsparse.exporters.file_sizes import join_transpositions, settle_sizes
from fxsparse.exporters.file_tables import counts, uneven
from fxsparse.exporters.file_targets import Factor, match
from tests.exporters.file_cases import Builder, assert_equal, kinds, model_of
from tests.exporters.test_file_optimize import export

HEADS, SIZE = 4, 3
WIDE = HEADS * SIZE
FEEDS = [{"x": np.random.default_rng(n).standard_normal((n, s, 6))} for n, s in ((1, 5), (3, 2))]


def sequence() -> Builder:
    b = Builder()
    b.input("x", ["batch", "seq", 6])
    return b


def linear(
    b: Builder, x: str, inputs: int, name: str, outputs: int = WIDE, dead: object = (), bias: bool = True
) -> str:
    weight = b.weight(inputs, outputs, dead=list(dead), axis=1)  # type: ignore[call-overload]
    out = b.node("MatMul", [x, b.constant(weight, name)])
    return str(b.node("Add", [out, b.constant(b.weight(outputs), f"{name}_bias")]) if bias else out)


def in_heads(b: Builder, x: str, order: tuple[int, ...] = (0, 2, 1, 3), heads: int = HEADS, size: int = SIZE) -> str:
    cut = b.node("Reshape", [x, b.constant(np.array([0, 0, heads, size]))])
    return str(b.node("Transpose", [cut], perm=list(order)))


def attend(b: Builder, q: str, k: str, v: str) -> str:
    scores = b.node("Mul", [b.node("MatMul", [q, k]), b.constant(np.float64(0.6))])
    return str(b.node("MatMul", [b.node("Softmax", [scores], axis=-1), v]))


def out_of_heads(b: Builder, x: str, dead: object = (), width: int = WIDE) -> str:
    rows = b.node("Reshape", [b.node("Transpose", [x], perm=[0, 2, 1, 3]), b.constant(np.array([0, 0, width]))])
    weight = b.weight(width, 6, dead=list(dead))  # type: ignore[call-overload]
    return str(b.node("MatMul", [rows, b.constant(weight, "o")]))


def head(*numbers: int) -> list[int]:
    return [n * SIZE + i for n in numbers for i in range(SIZE)]


def removed(b: Builder, out: str, feeds: object = None) -> tuple[ir.Model, Removal]:
    proto = b.proto(out)
    model = model_of(proto)
    found = remove_channels(model)
    shown = assert_equal(proto, model, FEEDS if feeds is None else feeds)  # type: ignore[arg-type]
    assert all(np.ptp(out) > 1e-6 for outs in shown for out in outs)
    return model, found


def width(found: Removal, name: str, axis: int = 1) -> int | None:
    return found.weights[name][1][axis] if name in found.weights else None


def plain(q: object = (), k: object = (), v: object = (), o: object = (), bias: bool = True) -> tuple[Builder, str]:
    b = sequence()
    queries = in_heads(b, linear(b, "x", 6, "q", dead=q, bias=bias))
    keys = in_heads(b, linear(b, "x", 6, "k", dead=k, bias=bias), (0, 2, 3, 1))
    values = in_heads(b, linear(b, "x", 6, "v", dead=v, bias=bias))
    return b, out_of_heads(b, attend(b, queries, keys, values), dead=o)


def test_a_head_that_nobody_reads_goes_with_its_queries_keys_and_values() -> None:
    b, out = plain(o=head(1, 3))
    model, found = removed(b, out)
    assert [width(found, name) for name in "qkv"] == [6, 6, 6] and found.weights["o"][1] == (6, 6)
    targets = [list(n.inputs[1].const_value.numpy()) for n in model.graph if n.op_type == "Reshape"]  # type: ignore[union-attr]
    assert targets == [[0, 0, 2, 3]] * 3 + [[0, 0, 6]]


def test_a_head_of_constant_values_becomes_a_bias() -> None:
    b, out = plain(v=head(2))
    model, found = removed(b, out)
    assert [width(found, name) for name in "qkv"] == [9, 9, 9]
    assert kinds(model)[-1] == "Add"  # the weights of attention sum to one, so the values' bias passes


def test_constant_values_under_weights_that_do_not_sum_to_one_stay() -> None:
    b = sequence()
    q, v = in_heads(b, linear(b, "x", 6, "q")), in_heads(b, linear(b, "x", 6, "v", dead=head(2)))
    k = in_heads(b, linear(b, "x", 6, "k"), (0, 2, 3, 1))
    mixed = b.node("MatMul", [b.node("Sigmoid", [b.node("MatMul", [q, k])]), v])
    _, found = removed(b, out_of_heads(b, mixed))
    assert found.channels == 0


def test_an_early_softmax_without_an_axis_sums_over_all_but_the_batch() -> None:
    b = sequence()
    b.opset = 12
    q, v = in_heads(b, linear(b, "x", 6, "q")), in_heads(b, linear(b, "x", 6, "v", dead=head(2)))
    k = in_heads(b, linear(b, "x", 6, "k"), (0, 2, 3, 1))
    mixed = b.node("MatMul", [b.node("Softmax", [b.node("MatMul", [q, k])]), v])
    _, found = removed(b, out_of_heads(b, mixed))
    assert found.channels == 0  # the weights of a head do not sum to one, so constant values vary


def test_entries_of_heads_go_where_every_head_loses_as_many() -> None:
    uneven_dead = [0, 4, 8, 10]  # entry 0 of head 0, 1 of head 1, 2 of head 2, 1 of head 3
    b, out = plain(v=uneven_dead, bias=False)
    _, found = removed(b, out)
    assert (width(found, "v"), width(found, "q"), found.weights["o"][1][0]) == (8, None, 8)
    b, out = plain(v=uneven_dead[:3], bias=False)
    assert removed(b, out)[1].channels == 0  # head 3 needs all of its entries


def test_queries_that_are_zero_take_their_keys_along() -> None:
    dead = [0, 4, 8, 10]
    b, out = plain(q=dead, bias=False)
    _, found = removed(b, out)
    assert (width(found, "q"), width(found, "k"), width(found, "v")) == (8, 8, None)
    b, out = plain(q=dead)  # with a bias the constant queries still meet keys that vary
    assert removed(b, out)[1].channels == 0


def test_a_head_whose_scores_are_zero_still_averages() -> None:
    b, out = plain(q=head(1), k=head(1), bias=False)
    _, found = removed(b, out)
    assert found.channels == 0  # its values are needed, so one entry stays in every head, and heads are of equal size


def test_all_heads_dead_leave_one() -> None:
    b, out = plain(o=head(0, 1, 2, 3))
    b.nodes.append(onnx.helper.make_node("Add", [out, linear(b, "x", 6, "rest", 6)], ["sum"]))
    _, found = removed(b, "sum")
    assert all((width(found, name) or 0) >= 1 for name in "qkv")


def test_fused_queries_keys_and_values() -> None:
    b = sequence()
    dead = [2 * WIDE + i for i in head(0)]
    both = linear(b, "x", 6, "qkv", 3 * WIDE, dead=dead)
    parts = b.node("Reshape", [both, b.constant(np.array([0, 0, 3, HEADS, SIZE]))])
    turned = b.node("Transpose", [parts], perm=[2, 0, 3, 1, 4])
    q, k, v = (b.node("Gather", [turned, b.constant(np.array(i))], axis=0) for i in range(3))
    out = out_of_heads(b, attend(b, q, b.node("Transpose", [k], perm=[0, 1, 3, 2]), v), dead=head(3))
    _, found = removed(b, out)
    assert width(found, "qkv") == 3 * 2 * SIZE and found.weights["o"][1] == (2 * SIZE, 6)


@pytest.mark.parametrize("how", ["split", "slice"])
def test_a_split_of_heads_is_cut_with_them(how: str) -> None:
    b = sequence()
    cut = b.node("Reshape", [linear(b, "x", 6, "qkv", 3 * WIDE), b.constant(np.array([0, 0, 3 * HEADS, SIZE]))])
    turned = b.node("Transpose", [cut], perm=[0, 2, 1, 3])
    if how == "split":
        q, k, v = b.node("Split", [turned, b.constant(np.array([HEADS] * 3))], 3, axis=1)
    else:
        q, k, v = (
            b.node("Slice", [turned, *(b.constant(np.array([n])) for n in (i * HEADS, (i + 1) * HEADS, 1))])
            for i in range(3)
        )
    out = out_of_heads(b, attend(b, q, b.node("Transpose", [k], perm=[0, 1, 3, 2]), v), dead=head(1))
    model, found = removed(b, out)
    assert width(found, "qkv") == (3 * 3 * SIZE if how == "split" else None)
    if how == "split":
        split = next(n for n in model.graph if n.op_type == "Split")
        assert list(split.inputs[1].const_value.numpy()) == [3, 3, 3]  # type: ignore[union-attr]


@pytest.mark.parametrize("dead_heads", [(0, 1), (1, 2), (2,)])
def test_keys_that_several_heads_share_go_with_all_of_them(dead_heads: tuple[int, ...]) -> None:
    b = sequence()
    q = in_heads(b, linear(b, "x", 6, "q"))

    def expanded(name: str) -> str:
        few = in_heads(b, linear(b, "x", 6, name, 2 * SIZE), heads=2)
        five = b.node("Unsqueeze", [few, b.constant(np.array([2]))])
        many = b.node("Expand", [five, b.constant(np.array([1, 2, 2, 1, SIZE]))])
        return str(b.node("Reshape", [many, b.constant(np.array([0, HEADS, -1, SIZE]))]))

    k, v = b.node("Transpose", [expanded("k")], perm=[0, 1, 3, 2]), expanded("v")
    feeds = [feed for feed in FEEDS if len(feed["x"]) == 1] + [{"x": FEEDS[1]["x"]}]
    _, found = removed(b, out_of_heads(b, attend(b, q, k, v), dead=head(*dead_heads)), feeds)
    both = dead_heads == (0, 1)  # else a head that lives needs the same keys
    assert [width(found, name) for name in "qkv"] == ([6, 3, 3] if both else [None] * 3)


def test_a_size_that_is_read_stays_and_whole_heads_go() -> None:
    b = sequence()
    q = in_heads(b, linear(b, "x", 6, "q", dead=[0, 3, 6, 9], bias=False))
    size = b.node("Gather", [b.node("Shape", [q]), b.constant(np.array(3))])
    scaled = b.node("Div", [q, b.node("Sqrt", [b.node("Cast", [size], to=TensorProto.DOUBLE)])])
    k = in_heads(b, linear(b, "x", 6, "k"), (0, 2, 3, 1))
    v = in_heads(b, linear(b, "x", 6, "v"))
    proto = out_of_heads(b, attend(b, scaled, k, v), dead=head(2))
    _, found = removed(b, proto)
    # a zero query in every head, but without it the scale would be another
    assert [width(found, name) for name in "qkv"] == [9, 9, 9]


def test_a_number_of_heads_that_is_read_holds_them() -> None:
    b, out = plain(o=head(1))
    q = next(node.output[0] for node in b.nodes if node.op_type == "Transpose")
    count = b.node("Cast", [b.node("Gather", [b.node("Shape", [q]), b.constant(np.array(1))])], to=TensorProto.DOUBLE)
    _, found = removed(b, str(b.node("Mul", [out, count])))
    assert found.channels == 0


def test_rotations_keep_heads_whole() -> None:
    b = sequence()
    b.input("angle", ["seq", 4])
    feeds = [feed | {"angle": np.random.default_rng(9).standard_normal((feed["x"].shape[1], 4))} for feed in FEEDS]

    def turned(name: str) -> str:
        whole = in_heads(b, linear(b, "x", 6, name, 16), size=4)
        one, two = (
            b.node("Slice", [whole, *(b.constant(np.array([n])) for n in (start, start + 2, 3))]) for start in (0, 2)
        )
        mirrored = b.node("Concat", [b.node("Neg", [two]), one], axis=-1)
        left = b.node("Mul", [whole, b.node("Cos", ["angle"])])
        return str(b.node("Add", [left, b.node("Mul", [mirrored, b.node("Sin", ["angle"])])]))

    q, k = turned("q"), b.node("Transpose", [turned("k")], perm=[0, 1, 3, 2])
    v = in_heads(b, linear(b, "x", 6, "v", 16), size=4)
    out = out_of_heads(b, attend(b, q, k, v), dead=range(4, 8), width=16)
    _, found = removed(b, out, feeds)
    assert [width(found, name) for name in "qkv"] == [12, 12, 12]


def test_masks_and_biases_of_heads() -> None:
    b = sequence()
    b.input("keep", ["batch", 1, 1, "seq"], TensorProto.BOOL)
    feeds = []
    for feed in (FEEDS[0], FEEDS[1]):
        keep = np.ones((len(feed["x"]), 1, 1, feed["x"].shape[1]), bool)
        keep[..., -1] = False
        feeds.append(feed | {"keep": keep})
    q, v = in_heads(b, linear(b, "x", 6, "q")), in_heads(b, linear(b, "x", 6, "v"))
    scores = b.node("MatMul", [q, in_heads(b, linear(b, "x", 6, "k"), (0, 2, 3, 1))])
    scores = b.node("Add", [scores, b.constant(b.weight(HEADS, 1, 1), "slope")])
    scores = b.node("Where", ["keep", scores, b.constant(np.float64(-1e9))])
    weights = b.node("Softmax", [scores], axis=-1)
    safe = b.node("Where", [b.node("IsNaN", [weights]), b.constant(np.float64(0)), weights])
    model, found = removed(b, out_of_heads(b, b.node("MatMul", [safe, v]), dead=head(0, 2)), feeds)
    assert [width(found, name) for name in "qkv"] == [6, 6, 6]
    assert any(v.const_value is not None and tuple(v.const_value.shape) == (2, 1, 1)
               for v in model.graph.initializers.values())  # fmt: skip


def test_a_mask_of_every_head_holds_them() -> None:
    b = sequence()
    b.input("bias", ["batch", HEADS, 1, "seq"])
    feeds = [
        f | {"bias": np.random.default_rng(3).standard_normal((len(f["x"]), HEADS, 1, f["x"].shape[1]))} for f in FEEDS
    ]
    q, v = in_heads(b, linear(b, "x", 6, "q")), in_heads(b, linear(b, "x", 6, "v"))
    scores = b.node("Add", [b.node("MatMul", [q, in_heads(b, linear(b, "x", 6, "k"), (0, 2, 3, 1))]), "bias"])
    mixed = b.node("MatMul", [b.node("Softmax", [scores], axis=-1), v])
    assert removed(b, out_of_heads(b, mixed, dead=head(1)), feeds)[1].channels == 0


def test_weights_of_attention_that_are_an_output_hold_their_heads() -> None:
    b, out = plain(o=head(1))
    scores = next(node.output[0] for node in b.nodes if node.op_type == "Softmax")
    proto = b.proto(out, scores)
    model = model_of(proto)
    found = remove_channels(model)
    assert_equal(proto, model, FEEDS)
    assert [width(found, name) for name in "qk"] == [None, None]


def test_a_mean_over_heads_holds_them_and_one_over_entries_does_not() -> None:
    for axis, left in ((1, None), (3, 9)):
        b = sequence()
        v = in_heads(b, linear(b, "x", 6, "v"))
        mean = b.node("Mul", [v, b.node("ReduceMean", [v, b.constant(np.array([axis]))])])
        _, found = removed(b, out_of_heads(b, mean, dead=head(1)))
        assert width(found, "v") == left


def test_normalised_heads_go_whole() -> None:
    b = sequence()
    q = in_heads(b, linear(b, "x", 6, "q"))
    q = b.node("LayerNormalization", [q, b.constant(b.weight(SIZE)), b.constant(b.weight(SIZE))], axis=-1)
    k = in_heads(b, linear(b, "x", 6, "k"), (0, 2, 3, 1))
    mixed = attend(b, q, k, in_heads(b, linear(b, "x", 6, "v")))
    _, found = removed(b, out_of_heads(b, mixed, dead=head(3)))
    assert [width(found, name) for name in "qkv"] == [9, 9, 9]


def test_what_has_no_rule_for_heads_is_named() -> None:
    b = sequence()
    v = in_heads(b, linear(b, "x", 6, "v", dead=head(1)))
    _, found = removed(b, out_of_heads(b, b.node("CumSum", [v, b.constant(np.array(2))])))
    assert found.channels == 0 and "CumSum" in str(found.stops[0])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_dead_entries_leave_the_same_numbers(data: st.DataObject) -> None:
    some = st.lists(st.integers(0, WIDE - 1), max_size=9, unique=True)
    q, k, v, o = (data.draw(some) for _ in range(4))
    b, out = plain(q, k, v, o, bias=data.draw(st.booleans()))
    proto = b.proto(out)
    model = model_of(proto)
    remove_channels(model)
    assert_equal(proto, model, FEEDS)


class Attention(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.qkv, self.o = form, nn.Linear(24, 72), nn.Linear(24, 24)
        self.mha = nn.MultiheadAttention(24, 4, batch_first=True) if form == "module" else None
        parts = [self.qkv, self.o] if self.mha is None else [self.mha, self.mha.out_proj]
        with torch.no_grad():
            weight = parts[0].weight if self.mha is None else self.mha.in_proj_weight
            weight[48 + 6 : 48 + 12] = 0
            parts[1].weight[:, 12:18] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mha is not None:
            return self.mha(x, x, x, need_weights=False)[0]
        rows, length, size = x.shape
        if self.form == "chunk":
            q, k, v = (part.view(rows, length, 4, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        else:
            q, k, v = self.qkv(x).reshape(rows, length, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(mixed.transpose(1, 2).reshape(rows, length, size))


@pytest.mark.parametrize(("form", "dynamo"), [("chunk", True), ("chunk", False), ("unbind", False), ("module", False)])
def test_exports_of_torch_lose_their_dead_heads(tmp_path: Path, form: str, dynamo: bool) -> None:
    torch.manual_seed(0)
    options: dict[str, object] = {"dynamo": dynamo}
    if dynamo:
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    else:
        options |= {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    source = export(Attention(form), (torch.randn(2, 5, 24),), tmp_path / "a.onnx", **options)
    before = source.read_bytes()
    report = optimize_file(source, tmp_path / "b.onnx", latency=False)
    assert sorted(new for _, new in report.resized.values()) in ([(12, 24), (24, 36)], [(24, 12), (24, 36)])
    assert report.verification is not None and report.verification.exact is not None, str(report)
    assert source.read_bytes() == before


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_exports_of_old_operator_sets_lose_their_dead_heads(tmp_path: Path, opset: int) -> None:
    torch.manual_seed(0)

    class Old(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows, length, size = x.shape
            q, k, v = self.qkv(x).reshape(rows, length, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = (q @ k.transpose(2, 3) * 0.4).softmax(-1) @ v
            return self.o(mixed.transpose(1, 2).reshape(rows, length, size))

    options = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}, "opset_version": opset}
    source = export(Old("unbind"), (torch.randn(2, 5, 24),), tmp_path / "a.onnx", dynamo=False, **options)
    report = optimize_file(source, tmp_path / "b.onnx", latency=False)
    # before set 13 a Softmax over the last axis of four is one too
    assert sorted(new for _, new in report.resized.values()) == [(12, 24), (24, 36)]
    assert report.verification is not None and report.verification.exact is not None


def test_counts_and_what_makes_rows_even() -> None:
    kept = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1]], bool)
    assert counts(kept) == (2, 3) and counts(np.zeros((2, 2), bool)) == (0, 0)
    assert list(uneven(~kept)) == [(0, 1)]
    assert list(uneven(~np.array([[1, 1], [0, 0], [1, 1]], bool))) == []
    deep = np.ones((2, 2, 2), bool)
    deep[0, 1] = False  # the second row of block 0, of which block 1 has both
    assert list(uneven(~deep)) == [(0, 1, 0)]


def factors(*sizes: int | str | None) -> list[Factor]:
    return [
        Factor(i, n if isinstance(n, int) else None, n if isinstance(n, str) else None) for i, n in enumerate(sizes)
    ]


def test_axes_of_a_reshape_are_matched_only_where_that_follows() -> None:
    found = match(factors("b", "s", 12), factors("b", "s", 4, 3), {2})
    assert found is not None and [[f.size for f in b.behind] for b in found.blocks if len(b.behind) > 1] == [[4, 3]]
    tiled = match(factors("s", "b", 12), factors("s", None, 3), {2})
    assert tiled is not None and tiled.tiled == {1}
    assert match(factors("s", "b", 12), factors(None, "t", 3), {2}) is None  # t may be s, b, or neither
    resolved = match(factors("b", 5, 12), factors("b", 5, 4, None), {2})
    assert resolved is not None and resolved.sizes == {3: 3} and not resolved.tiled
    assert match(factors("a", 5, 12), factors("b", 5, 4, None), {2}) is None
    assert match(factors("b", 10, 15), factors("b", 6, 25), {1}) is not None  # one block
    assert match(factors("b", 12, "s"), factors("b", 4, 3, "t"), {1}) is not None  # t is s, as the rest is equal
    assert match(factors("b", 12, "s"), factors("c", 4, 3, "t"), {1}) is None


def test_fixed_sizes_become_constants() -> None:
    b = sequence()
    shape = b.node("Shape", ["x"])
    size = b.node("Gather", [shape, b.constant(np.array(2))])
    rest = b.node("Slice", [shape, b.constant(np.array([-1])), b.constant(np.array([9]))])
    free = b.node("Gather", [shape, b.constant(np.array(1))])
    kinds_ = [b.node("Cast", [n], to=TensorProto.DOUBLE) for n in (size, rest, free)]
    total = b.node("Add", [b.node("Add", kinds_[:2]), kinds_[2]])
    proto = b.proto(b.node("Mul", ["x", total]))
    model = model_of(proto)
    assert settle_sizes(model) == 2
    assert_equal(proto, model, FEEDS)


def test_a_transposition_in_three_steps_becomes_one() -> None:
    b = sequence()
    heads = in_heads(b, linear(b, "x", 6, "w"))
    shape = b.node("Shape", [heads])
    lead, s, d = (
        b.node("Slice", [shape, b.constant(np.array([i])), b.constant(np.array([j]))])
        for i, j in ((0, 2), (2, 3), (3, 4))
    )
    merged = b.node("Reshape", [heads, b.node("Concat", [b.constant(np.array([-1])), s, d], axis=0)])
    turned = b.node("Transpose", [merged], perm=[0, 2, 1])
    proto = b.proto(b.node("Reshape", [turned, b.node("Concat", [lead, d, s], axis=0)]))
    model = model_of(proto)
    assert join_transpositions(model) == 1
    assert_equal(proto, model, FEEDS)
    other = Builder()
    other.input("x", ["batch", 4, 3, 3])
    merged = other.node("Reshape", ["x", other.constant(np.array([-1, 6, 6]))])
    turned = other.node("Transpose", [merged], perm=[0, 2, 1])
    proto = other.proto(other.node("Reshape", [turned, other.constant(np.array([-1, 4, 3, 3]))]))
    assert join_transpositions(model_of(proto)) == 0
