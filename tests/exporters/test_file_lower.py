"""Shared supports in ONNX graphs: found, lowered, and equal in float64; layouts by what nodes are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from fxsparse.exporters.file_choose import choose
from fxsparse.exporters.file_costs import expected_gain
from fxsparse.exporters.file_graph import remove_unused
from fxsparse.exporters.file_lower import Lowering
from fxsparse.exporters.file_supports import Layer, Support, layer_of, supports_of
from tests.exporters.file_cases import Builder, assert_equal, feeds, kinds, model_of, rows, shapes_of, shared

Pick = Callable[[list[Support]], Support]


def smallest(found: list[Support]) -> Support:
    """The one with the fewest stored numbers, of those the one with the largest groups."""
    return min(found, key=lambda support: (support.rows.size * support.k, -support.group))


def lowered(proto: Any, pick: Pick = smallest) -> ir.Model:
    """Every layer that can be, whatever it costs."""
    model = model_of(proto)
    choices = {}
    for node in model.graph:
        layer = layer_of(node)
        found = supports_of(layer) if layer is not None else []
        if layer is not None and found:
            choices[node] = layer, pick(found)
    Lowering(model, choices).run()
    remove_unused(model.graph)
    return model


def layer(alive: Any, parts: int = 1) -> Layer:
    return Layer(ir.node("MatMul", []), "w", np.asarray(alive, bool), parts)


def test_groups_are_found_whatever_their_size() -> None:
    random = np.random.default_rng(0)
    for rows_, group, k in ((64, 16, 5), (96, 8, 4), (60, 12, 3), (512, 256, 7)):
        found = supports_of(layer(shared(random, rows_, 40, group, k) != 0))
        assert (found[0].group, found[0].k) == (group, k) or any((s.group, s.k) == (group, k) for s in found)
        assert all(s.k <= 0.75 * 40 for s in found)


def test_a_support_covers_every_weight_exactly_once() -> None:
    random = np.random.default_rng(1)
    uneven = np.concatenate([shared(random, n, 30, n, 6) for n in (13, 9, 16, 11)])
    for alive in (uneven != 0, (uneven != 0)[random.permutation(49)], shared(random, 64, 30, 16, 5) != 0):
        found = supports_of(layer(alive))
        assert found
        for support in found:
            seen = np.zeros(alive.shape, int)
            for group, columns, real in zip(support.rows, support.columns, support.real, strict=True):
                for row in group[group >= 0]:
                    seen[row, columns[real]] += 1
            assert (seen <= 1).all() and (seen[alive] == 1).all()


def test_no_support_where_there_is_none() -> None:
    random = np.random.default_rng(2)
    assert supports_of(layer(random.random((64, 40)) < 0.3)) == []  # scattered
    assert supports_of(layer(np.ones((64, 40)))) == []
    assert supports_of(layer(np.zeros((64, 40)))) == []
    assert supports_of(layer(shared(random, 4, 40, 4, 3) != 0)) == []  # fewer rows than a group has


def test_a_lost_weight_does_not_break_a_group() -> None:
    weight = shared(np.random.default_rng(3), 64, 40, 16, 8)
    weight[5, np.flatnonzero(weight[5])[0]] = 0
    weight[20] = 0
    found = supports_of(layer(weight != 0))
    assert (16, 8) in {(support.group, support.k) for support in found}
    assert any(support.k == 8 and support.rows.size == 64 for support in found[1:])


def linear(b: Builder, x: str, weight: Any, kind: str = "MatMul", bias: Any = None) -> str:
    if kind == "MatMul":
        out = b.node("MatMul", [x, b.constant(weight.T)])
        return str(out if bias is None else b.node("Add", [out, b.constant(bias)]))
    operands = [x, b.constant(weight if kind == "Gemm" else weight.T), *([] if bias is None else [b.constant(bias)])]
    return str(b.node("Gemm", operands, transB=int(kind == "Gemm")))


def test_a_chain_has_one_transpose_at_each_end() -> None:
    b = rows()
    out = "x"
    for kind in ("MatMul", "Gemm", "plain Gemm"):
        out = b.node("Relu", [linear(b, out, shared(b.random, 24, 24, 8, 4), kind, b.random.standard_normal(24))])
    proto = b.proto(out)
    model = lowered(proto)
    found = kinds(model)
    assert found.count("Transpose") == 2 and found.count("Gather") == found.count("MatMul") == 3
    assert "Gemm" not in found
    assert sorted(s for s in shapes_of(model).values() if len(s) == 3) == [(3, 8, 4)] * 3
    assert_equal(proto, model, feeds((1, 24), (5, 24)))


def test_filled_groups_cost_no_copy_inside_a_chain() -> None:
    b = rows()
    sizes = (9, 12, 11)
    uneven = np.concatenate([shared(b.random, n, 24, n, 4) for n in sizes])
    first = b.node("Sigmoid", [linear(b, "x", uneven, "Gemm", b.random.standard_normal(32))])
    proto = b.proto(linear(b, first, shared(b.random, 16, 32, 8, 4)))
    model = lowered(proto)
    assert kinds(model).count("Gather") == 2  # none to take the filling out
    assert_equal(proto, model, feeds((1, 24), (4, 24)))


def test_columns_that_fill_a_group_have_no_weight() -> None:
    b = rows()
    weight = np.zeros((16, 24))
    weight[:8, [0, 5]] = b.random.standard_normal((8, 2))  # reads column 0, with which it is filled up
    weight[8:, 10:14] = b.random.standard_normal((8, 4))
    proto = b.proto(linear(b, "x", weight))
    model = lowered(proto, lambda found: next(s for s in found if (s.group, s.k) == (8, 4)))
    assert_equal(proto, model, feeds((1, 24), (4, 24)))
    stored = next(v.const_value.numpy() for v in model.graph.initializers.values() if len(v.shape) == 3)
    assert (stored[0][:, 2:] == 0).all() and (stored[1] != 0).all()


def test_values_whose_free_sizes_may_differ_are_not_added_as_they_lie() -> None:
    b = Builder()
    b.input("x", ["batch", "time", 24])
    b.input("z", ["one", "time", 24])
    parts = [b.node("Relu", [linear(b, name, shared(b.random, 24, 24, 8, 4))]) for name in ("x", "z")]
    proto = b.proto(linear(b, b.node("Add", parts), shared(b.random, 16, 24, 8, 4)))
    model = lowered(proto)
    assert kinds(model).count("Gather") == 3
    random = np.random.default_rng(0)
    assert_equal(proto, model, [{"x": random.standard_normal((3, 5, 24)), "z": random.standard_normal((1, 5, 24))}])


def test_features_that_lie_elsewhere_are_not_added_as_they_lie() -> None:
    b = rows()
    one, two = (np.concatenate([shared(b.random, n, 24, n, 4) for n in sizes]) for sizes in ((9, 12, 11), (12, 9, 11)))
    total = b.node("Add", [linear(b, "x", one), linear(b, "x", two)])
    proto = b.proto(linear(b, total, shared(b.random, 16, 32, 8, 4)))
    assert_equal(proto, lowered(proto), feeds((1, 24), (4, 24)))


def test_rows_that_were_permuted_come_back_in_order() -> None:
    b = rows()
    weight = shared(b.random, 32, 24, 8, 4)[b.random.permutation(32)]
    proto = b.proto(linear(b, "x", weight, "Gemm", b.random.standard_normal(32)))
    model = lowered(proto)
    assert kinds(model).count("Gather") == 2
    assert_equal(proto, model, feeds((1, 24), (4, 24)))


@pytest.mark.parametrize("shape", [("batch", 6, 24), ("batch", "length", 24), (2, 3, "length", 24)])
def test_more_axes_also_free_ones(shape: tuple[Any, ...]) -> None:
    b = rows(*shape)
    one = linear(b, "x", shared(b.random, 32, 24, 8, 4), bias=b.random.standard_normal(32))
    two = linear(b, b.node("Tanh", [one]), shared(b.random, 24, 32, 8, 5))
    proto = b.proto(b.node("Add", [two, "x"]))
    model = lowered(proto)
    assert kinds(model).count("Transpose") == 2
    sized = [tuple(n if isinstance(n, int) else free for n in shape) for free in (1, 6)]
    assert_equal(proto, model, feeds(*sized))


def test_siblings_share_the_turned_input_and_what_is_read_twice_is_turned_back_once() -> None:
    b = rows()
    q, k = (linear(b, "x", shared(b.random, 24, 24, 8, 4)) for _ in range(2))
    both = b.node("Mul", [b.node("Softmax", [q]), k])
    proto = b.proto(both, q)
    model = lowered(proto)
    assert kinds(model).count("Transpose") == 3
    assert [value.name for value in model.graph.outputs] == [both, q]
    assert_equal(proto, model, feeds((1, 24), (5, 24)))


def test_what_lies_between_and_cannot_be_turned_stays_as_it_is() -> None:
    b = rows("batch", 3, 24)
    one = linear(b, "x", shared(b.random, 24, 24, 8, 4))
    shifted = b.node("Add", [one, b.constant(b.random.standard_normal((3, 24)))])  # varies over rows
    two = linear(
        b, b.node("Max", [b.node("Add", [shifted, "x"]), b.constant(np.zeros((1, 1, 1, 1)))]), np.ones((3, 24))
    )
    proto = b.proto(two, linear(b, b.node("Softmax", [one]), shared(b.random, 24, 24, 8, 4)))
    assert_equal(proto, lowered(proto), feeds((1, 3, 24), (4, 3, 24)))


def test_a_scalar_of_many_axes_does_not_add_axes() -> None:
    b = rows("batch", 3, 24)
    scalar = b.constant(np.array([[[2.0]]]))
    one = b.node("Mul", [linear(b, "x", shared(b.random, 24, 24, 8, 4)), scalar])
    proto = b.proto(linear(b, b.node("Clip", [one, b.constant(np.float64(-1.0))]), shared(b.random, 24, 24, 8, 4)))
    model = lowered(proto)
    assert kinds(model).count("Transpose") == 2
    turned = next(node for node in model.graph if node.op_type == "Mul")
    assert len(turned.inputs[1].const_value.shape) == 1
    assert_equal(proto, model, feeds((1, 3, 24), (4, 3, 24)))


def test_tied_weights_are_stored_once() -> None:
    b = rows()
    weight = b.constant(shared(b.random, 24, 24, 8, 4), "tied")
    out = "x"
    for _ in range(3):
        out = b.node("Relu", [b.node("Gemm", [out, weight], transB=1)])
    proto = b.proto(out)
    model = lowered(proto)
    assert [s for s in shapes_of(model).values() if len(s) == 3] == [(3, 8, 4)]
    assert_equal(proto, model, feeds((2, 24)))


def conv_weight(b: Builder, outputs: int, inputs: int, group: int, k: int, *kernel: int) -> Any:
    mask = shared(b.random, outputs, inputs, group, k) != 0
    return b.random.standard_normal((outputs, inputs, *kernel)) * mask.reshape(outputs, inputs, *[1] * len(kernel))


@pytest.mark.parametrize("options", [{}, {"strides": [2, 2], "pads": [1, 0, 2, 1]}, {"auto_pad": "SAME_LOWER"},
                                     {"dilations": [2, 1]}])  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_convolutions(options: dict[str, Any], bias: bool) -> None:
    b = rows("batch", 20, 7, 7)
    operands = ["x", b.constant(conv_weight(b, 32, 20, 16, 5, 3, 2))]
    operands += [b.constant(b.random.standard_normal(32))] if bias else []
    proto = b.proto(b.node("Conv", operands, **options))
    model = lowered(proto)
    assert kinds(model) == ["Gather", "Conv"] and (32, 5, 3, 2) in shapes_of(model).values()
    assert_equal(proto, model, feeds((1, 20, 7, 7), (3, 20, 7, 7)))


def test_convolutions_with_groups_of_one_axis_and_with_filled_groups() -> None:
    b = rows("batch", 20, 9)
    weight = np.concatenate([conv_weight(b, 16, 10, 8, 3, 3) for _ in range(2)])
    grouped = b.node("Conv", ["x", b.constant(weight)], group=2)
    uneven = np.concatenate([conv_weight(b, n, 32, n, 5, 1) for n in (9, 11, 12)])
    operands = [grouped, b.constant(uneven), b.constant(b.random.standard_normal(32))]
    proto = b.proto(b.node("Conv", operands))
    model = lowered(proto)
    assert [node.attributes.get_int("group", 1) for node in model.graph if node.op_type == "Conv"] == [4, 3]
    assert_equal(proto, model, feeds((1, 20, 9), (3, 20, 9)))


def test_other_products_are_left_alone() -> None:
    b = rows()
    weight = shared(b.random, 24, 24, 8, 4)
    scaled = b.node("Gemm", ["x", b.constant(weight)], alpha=2.0)
    left = b.node("MatMul", [b.constant(weight), b.node("Transpose", [scaled])])
    turned = b.node("Gemm", [left, b.constant(weight[:, :16])], transA=0, beta=0.5)
    assert all(layer_of(node) is None or not supports_of(layer_of(node)) for node in model_of(b.proto(turned)).graph)  # type: ignore[arg-type]


def test_the_estimate_follows_the_measurements_it_was_taken_from() -> None:
    random = np.random.default_rng(0)
    node = ir.node("Gemm", [ir.val("x"), ir.val("w", shape=ir.Shape((3072, 768)))])
    for density, gains in ((0.1, (2.7, 4.7, 5.1)), (0.05, (3.3, 8.0, 7.2))):
        alive = shared(random, 3072, 768, 64, int(768 * density)) != 0
        wide = Layer(node, "w", alive)
        support = next(s for s in supports_of(wide) if s.group == 64)
        for batch, gain in zip((1, 16, 128), gains, strict=True):
            assert 0.6 < expected_gain(wide, support, [(batch, batch, 1)]) / gain < 1.6


def test_small_layers_stay_dense_and_the_report_says_why() -> None:
    b = Builder()
    b.input("x", ["batch", 24], TensorProto.DOUBLE)
    small = linear(b, "x", shared(b.random, 24, 24, 8, 4))
    scattered = linear(b, small, b.random.standard_normal((64, 24)) * (b.random.random((64, 24)) < 0.2))
    proto = b.proto(linear(b, scattered, np.zeros((4, 64))))
    choice = choose(model_of(proto), [{"x": np.zeros((4, 24))}], measure=False, threads=1)
    assert choice.lowered == {}
    reasons = [report.reason for report in choice.reports]
    assert "expected 0." in reasons[0] and "not shared by groups" in reasons[1] and "nothing in it" in reasons[2]
    assert all("no speed-up expected" in str(report) for report in choice.reports)


def test_sizes_that_are_not_known_keep_a_layer_dense() -> None:
    b = rows("batch", 24)
    proto = b.proto(linear(b, "x", shared(b.random, 512, 24, 64, 4)))
    (report,) = choose(model_of(proto), [{}], measure=False, threads=1).reports
    assert report.form == "dense" and "not known" in report.reason


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_measured_choices(kind: str) -> None:
    b = Builder()
    if kind == "linear":
        b.input("x", ["batch", 512], TensorProto.FLOAT)
        weight = shared(b.random, 2048, 512, 128, 20).astype(np.float32)
        proto = b.proto(b.node("Gemm", ["x", b.constant(weight, "w")], transB=1))
        feed = {"x": np.zeros((32, 512), np.float32)}
    else:
        b.input("x", ["batch", 128, 14, 14], TensorProto.FLOAT)
        weight = conv_weight(b, 256, 128, 64, 8, 3, 3).astype(np.float32)
        proto = b.proto(b.node("Conv", ["x", b.constant(weight, "w")]))
        feed = {"x": np.zeros((1, 128, 14, 14), np.float32)}
    choice = choose(model_of(proto), [feed], measure=True, threads=1)
    (report,) = choice.reports
    assert report.measured and report.weight == "w" and report.gain is not None and report.gain > 1.05
    assert len(choice.lowered) == 1 and "measured" in str(report)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data(), st.integers(0, 10**6))
def test_random_chains(data: st.DataObject, seed: int) -> None:
    random = np.random.default_rng(seed)
    lead = data.draw(st.sampled_from([("batch",), ("batch", 3), ("batch", "length")]))
    b = Builder(seed)
    width = data.draw(st.sampled_from([16, 24, 40]))
    b.input("x", [*lead, width])
    out, earlier = "x", [("x", width)]
    for _ in range(data.draw(st.integers(1, 7))):
        kind = data.draw(st.sampled_from(["linear", "linear", "unary", "binary", "join", "both"]))
        if kind == "linear":
            rows_, group = data.draw(st.sampled_from([(16, 8), (32, 8), (48, 16), (27, 9), (33, 11)]))
            weight = shared(random, rows_, width, group, data.draw(st.integers(1, width // 3)))
            if data.draw(st.booleans()):
                weight = weight[random.permutation(rows_)]
            if data.draw(st.booleans()):
                weight = np.delete(weight, random.permutation(rows_)[:3], axis=0)
            gemm = data.draw(st.booleans()) and len(lead) == 1
            bias = random.standard_normal(len(weight)) if data.draw(st.booleans()) else None
            out, width = linear(b, out, weight, "Gemm" if gemm else "MatMul", bias), len(weight)
        elif kind == "unary":
            out = b.node(data.draw(st.sampled_from(["Relu", "Sigmoid", "Neg", "Softmax"])), [out])
        elif kind == "binary":
            shape = data.draw(st.sampled_from([(width,), (1,), (), (1, width), (1, 1)]))
            operands = [out, b.constant(random.standard_normal(shape))]
            operands = operands[::-1] if data.draw(st.booleans()) else operands
            out = b.node(data.draw(st.sampled_from(["Add", "Mul", "Sub", "Max"])), operands)
        elif kind == "join":
            out = b.node("Add", [out, data.draw(st.sampled_from([n for n, w in earlier if w == width] or [out]))])
        else:
            out = b.node("Mul", [b.node("Tanh", [out]), b.node("Sigmoid", [out])])
        earlier.append((out, width))
    extra = data.draw(st.sampled_from([name for name, _ in earlier if name != "x"] or [out]))
    proto = b.proto(*dict.fromkeys([out, extra])) if out != "x" else b.proto(b.node("Relu", [out]))
    model = lowered(proto, lambda found: found[seed % len(found)])
    sized = [tuple(n if isinstance(n, int) else free for n in lead) for free in (1, 4)]
    assert_equal(proto, model, feeds(*((*shape, b_width(b)) for shape in sized)))


def b_width(b: Builder) -> int:
    return int(b.inputs[0].type.tensor_type.shape.dim[-1].dim_value)
