"""Channels that leave an ONNX graph: each rule by hand, against shapes worked out on paper, and random graphs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fxsparse.exporters.file_channels import Removal, remove_channels
from tests.exporters.file_cases import Builder, Random, assert_equal, kinds, model_of, shapes_of

IMAGES = [{"x": np.random.default_rng(i).standard_normal((n, 4, 5, 5))} for i, n in enumerate((1, 3))]
ROWS = [{"x": np.random.default_rng(i).standard_normal((n, 4))} for i, n in enumerate((1, 3))]


def removed(proto: object, feeds: object) -> tuple[ir.Model, Removal]:
    model = model_of(proto)
    found = remove_channels(model)
    outputs = assert_equal(proto, model, feeds)  # type: ignore[arg-type]
    assert any(np.ptp(each) > 1e-6 for outs in outputs for each in outs if each.dtype.kind == "f")
    return model, found


def image(seed: int = 0, opset: int = 18) -> Builder:
    b = Builder(seed, opset)
    b.input("x", ["batch", 4, 5, 5])
    return b


def rows(seed: int = 0, opset: int = 18) -> Builder:
    b = Builder(seed, opset)
    b.input("x", ["batch", 4])
    return b


def first(b: Builder, out: int = 6, dead: Sequence[int] = (1, 4), bias: object = None, size: int = 1) -> str:
    operands = ["x", b.constant(b.weight(out, 4, size, size, dead=dead), "w")]
    if bias is not None:
        operands.append(b.constant(np.asarray(bias, np.float64), "b"))
    return str(b.node("Conv", operands))


def last(b: Builder, name: str, inputs: int, size: int = 1, pad: int = 0) -> str:
    return str(b.node("Conv", [name, b.constant(b.weight(3, inputs, size, size), "v")], pads=[pad] * 4))


BIAS = [0.3, -0.7, 0.2, 0.1, 0.9, 0.4]


def test_constants_of_dead_filters_go_into_the_next_bias() -> None:
    b = image()
    proto = b.proto(last(b, b.node("Sigmoid", [first(b, bias=BIAS)]), 6))
    model, found = removed(proto, IMAGES)
    assert found.channels == 2
    assert found.weights == {"w": ((6, 4, 1, 1), (4, 4, 1, 1)), "v": ((3, 6, 1, 1), (3, 4, 1, 1))}
    assert len([node for node in model.graph if node.op_type == "Conv" and len(node.inputs) == 3]) == 2


def test_a_constant_that_is_not_zero_stays_before_zero_padding() -> None:
    b = image()
    proto = b.proto(last(b, b.node("Relu", [first(b, bias=BIAS)]), 6, size=3, pad=1))
    _, found = removed(proto, IMAGES)
    # channel 1 is relu(-0.7) = 0 and goes; channel 4 is 0.9 and would miss the border
    assert found.weights["w"][1] == (5, 4, 1, 1)


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER"])
def test_automatic_padding_is_padding(auto: str) -> None:
    b = image()
    hidden = first(b, bias=BIAS)
    weight = b.constant(b.weight(3, 6, 3, 3), "v")
    _, found = removed(b.proto(b.node("Conv", [hidden, weight], auto_pad=auto)), IMAGES)
    assert found.channels == 0


def test_what_nobody_reads_goes_although_it_varies() -> None:
    b = image()
    hidden = first(b, dead=())
    weight = b.weight(3, 6, 1, 1)
    weight[:, [0, 5]] = 0
    _, found = removed(b.proto(b.node("Conv", [hidden, b.constant(weight, "v")])), IMAGES)
    assert found.weights["w"][1] == (4, 4, 1, 1) and found.channels == 2


def test_what_only_removed_rows_read_goes_as_well() -> None:
    b = rows()
    w = b.constant(b.weight(4, 6), "w")
    middle, last_weight = b.weight(6, 5), b.weight(5, 3)
    middle[2, :4] = 0  # input 2 is read by output 4 alone, which nobody reads
    last_weight[4] = 0
    hidden = b.node("MatMul", [b.node("MatMul", ["x", w]), b.constant(middle, "m")])
    model, _ = removed(b.proto(b.node("MatMul", [hidden, b.constant(last_weight, "v")])), ROWS)
    assert sorted(shapes_of(model).values()) == [(4, 3), (4, 5), (5, 4)]


def test_a_product_without_a_bias_gets_an_addition_also_where_it_is_the_output() -> None:
    b = rows()
    gemm = b.node("Gemm", ["x", b.constant(b.weight(6, 4, dead=(0, 3)), "w"), b.constant(np.asarray(BIAS))], transB=1)
    out = b.node("MatMul", [gemm, b.constant(b.weight(6, 3), "v")])
    proto = b.proto(out)
    model, _ = removed(proto, ROWS)
    assert kinds(model) == ["Gemm", "MatMul", "Add"]
    assert [value.name for value in model.graph.outputs] == [out]
    b.nodes.append(helper.make_node("Relu", [out], ["after"]))
    removed(b.proto(out, "after"), ROWS)  # read and an output


def test_outputs_of_the_graph_keep_all_channels() -> None:
    b = image()
    hidden = first(b)
    _, found = removed(b.proto(hidden, last(b, hidden, 6)), IMAGES)
    assert found.channels == 0 and found.weights == {}


def test_an_axis_keeps_one_entry() -> None:
    b = image()
    proto = b.proto(
        b.node("Conv", [first(b, dead=(0, 1, 2, 3, 4, 5)), b.constant(b.weight(3, 6, 1, 1))]), first_again(b)
    )
    model, _ = removed(proto, IMAGES)
    assert all(0 not in shape for shape in shapes_of(model).values())


def first_again(b: Builder) -> str:
    return str(b.node("Conv", ["x", b.constant(b.weight(2, 4, 1, 1))]))


def test_a_residual_addition_ties_channels() -> None:
    b = image()
    one, two = first(b, dead=(1, 4)), b.node("Conv", ["x", b.constant(b.weight(6, 4, 1, 1, dead=(4, 5)), "u")])
    _, found = removed(b.proto(last(b, b.node("Add", [one, two]), 6)), IMAGES)
    # channel 4 is dead in both; 1 and 5 vary in one of them
    assert found.weights["w"][1] == found.weights["u"][1] == (5, 4, 1, 1)


def test_a_product_with_a_dead_channel_is_dead() -> None:
    b = image()
    one, two = first(b, dead=(1, 4)), b.node("Conv", ["x", b.constant(b.weight(6, 4, 1, 1, dead=(5,)), "u")])
    _, found = removed(b.proto(last(b, b.node("Mul", [one, two]), 6)), IMAGES)
    assert found.weights["w"][1] == found.weights["u"][1] == (3, 4, 1, 1)


def test_an_operand_that_varies_over_channels_holds_them() -> None:
    b = image()
    b.input("y", ["batch", 6, 1, 1])
    feeds = [feed | {"y": np.random.default_rng(7).standard_normal((len(feed["x"]), 6, 1, 1))} for feed in IMAGES]
    _, found = removed(b.proto(last(b, b.node("Add", [first(b), "y"]), 6)), feeds)
    assert found.channels == 0 and "2 constant channels stay" in str(found.stops[0])


def test_an_operand_that_varies_over_channels_holds_those_that_nobody_reads() -> None:
    b = image()
    b.input("y", ["batch", 6, 1, 1])
    feeds = [feed | {"y": np.random.default_rng(7).standard_normal((len(feed["x"]), 6, 1, 1))} for feed in IMAGES]
    unread = b.weight(3, 6, 1, 1, dead=(2,), axis=1)
    proto = b.proto(b.node("Conv", [b.node("Add", [first(b, dead=()), "y"]), b.constant(unread)]))
    assert removed(proto, feeds)[1].channels == 0


def test_one_channel_that_is_broadcast_over_many_is_no_channel_of_theirs() -> None:
    b = image()
    single = b.node("Conv", ["x", b.constant(b.weight(1, 4, 1, 1), "s")])
    _, found = removed(b.proto(last(b, b.node("Mul", [first(b), single]), 6)), IMAGES)
    assert found.weights["w"][1] == (4, 4, 1, 1) and "s" not in found.weights


def test_a_constant_that_widens_one_channel() -> None:
    b = image()
    single = b.node("Conv", ["x", b.constant(b.weight(1, 4, 1, 1), "s")])
    many = b.node("Add", [single, b.constant(b.weight(6, 1, 1))])
    _, found = removed(b.proto(last(b, many, 6)), IMAGES)
    assert found.channels == 0


def test_depthwise_filters_follow_their_input_and_make_constants_of_their_own() -> None:
    b = image()
    dead = b.weight(6, 1, 3, 3, dead=(0,))
    middle = b.node("Conv", [first(b), b.constant(dead, "d"), b.constant(np.asarray(BIAS))], group=6, pads=[1] * 4)
    model, found = removed(b.proto(last(b, middle, 6)), IMAGES)
    # 1 and 4 come dead, 0 is made constant by its own filter
    assert found.weights["d"][1] == (3, 1, 3, 3) and found.weights["w"][1] == (3, 4, 1, 1)
    assert [node.attributes.get_int("group", 1) for node in model.graph] == [1, 3, 1]


def test_a_constant_meets_the_padding_of_its_own_filter() -> None:
    b = image()
    hidden = first(b, dead=(4,), bias=BIAS)  # channel 4 is 0.9 everywhere
    middle = b.node("Conv", [hidden, b.constant(b.weight(6, 1, 3, 3), "d")], group=6, pads=[1] * 4)
    _, found = removed(b.proto(last(b, middle, 6)), IMAGES)
    assert found.channels == 0
    b = image()
    middle = b.node("Conv", [first(b, dead=(4,), bias=BIAS), b.constant(b.weight(6, 1, 3, 3), "d")], group=6)
    _, found = removed(b.proto(last(b, middle, 6)), IMAGES)
    assert found.weights["d"][1] == (5, 1, 3, 3)


def test_several_filters_of_one_channel() -> None:
    b = image()
    middle = b.node("Conv", [first(b, dead=(1,)), b.constant(b.weight(12, 1, 1, 1), "d")], group=6)
    _, found = removed(b.proto(last(b, middle, 12)), IMAGES)
    assert found.weights["d"][1] == (10, 1, 1, 1) and found.weights["v"][1] == (3, 10, 1, 1)


def test_a_filter_for_each_channel_of_another_axis_holds_what_it_reads() -> None:
    b = Builder()
    b.input("x", ["batch", 4, 4])
    made = b.node("MatMul", ["x", b.constant(b.weight(4, 4, dead=(1,), axis=1), "w")])  # dead at axis 2
    out = b.node("Conv", [made, b.constant(b.weight(4, 1, 2), "d")], group=4)  # one filter for each of axis 1
    feeds = [{"x": np.random.default_rng(i).standard_normal((2, 4, 4))} for i in range(2)]
    _, found = removed(b.proto(b.node("Conv", [out, b.constant(b.weight(3, 4, 1))])), feeds)
    assert found.channels == 0


def test_no_more_stays_than_must() -> None:
    b = rows()
    hidden = b.node(
        "Gemm", ["x", b.constant(b.weight(64, 4, dead=range(0, 64, 2)), "w"), b.constant(b.weight(64))], transB=1
    )
    unread = b.weight(64, 48)
    last_weight = b.weight(48, 3, dead=range(8))
    proto = b.proto(b.node("MatMul", [b.node("MatMul", [hidden, b.constant(unread)]), b.constant(last_weight)]))
    _, found = removed(proto, ROWS)
    assert found.channels == 40 and found.weights["w"][1] == (32, 4)


def test_groups_of_several_channels_hold_them() -> None:
    b = image()
    middle = b.node("Conv", [first(b), b.constant(b.weight(6, 3, 1, 1), "g")], group=2)
    _, found = removed(b.proto(last(b, middle, 6)), IMAGES)
    assert found.channels == 0 and "groups of several channels" in str(found.stops[0])


def test_normalisation_by_running_statistics() -> None:
    b = image()
    scale = np.array([1.0, 2.0, 0.0, 1.0, 0.5, 3.0])
    parts = [scale, np.array(BIAS), np.full(6, 0.2), np.full(6, 1.5)]
    made = b.node("BatchNormalization", [first(b), *(b.constant(part) for part in parts)])
    _, found = removed(b.proto(last(b, made, 6)), IMAGES)
    assert found.weights["w"][1] == (3, 4, 1, 1)  # 1 and 4 dead, 2 scaled by zero


@pytest.mark.parametrize(("opset", "axes"), [(18, True), (13, False)])
def test_flatten_mean_squeeze_and_unsqueeze(opset: int, axes: bool) -> None:
    b = image(opset=opset)
    hidden = b.node("Unsqueeze", [first(b, bias=BIAS), b.constant(np.array([1, 3]))])
    hidden = b.node("Squeeze", [hidden, b.constant(np.array([3, 1]))])
    if axes:
        mean = b.node("ReduceMean", [hidden, b.constant(np.array([2, 3]))], keepdims=0)
    else:
        mean = b.node("ReduceMean", [hidden], axes=[2, 3], keepdims=0)
    made = b.node("Gemm", [mean, b.constant(b.weight(6, 3), "v")])
    _, found = removed(b.proto(made), IMAGES)
    assert found.weights["v"][1] == (4, 3)


def test_a_sum_over_positions_is_no_constant() -> None:
    b = image()
    summed = b.node("ReduceSum", [first(b, bias=BIAS), b.constant(np.array([2, 3]))], keepdims=0)
    _, found = removed(b.proto(b.node("MatMul", [summed, b.constant(b.weight(6, 3), "v")])), IMAGES)
    assert found.channels == 0


def test_a_mean_over_all_channels_holds_them() -> None:
    b = image()
    hidden = first(b)
    mean = b.node("ReduceMean", [hidden, b.constant(np.array([1]))])
    _, found = removed(b.proto(last(b, b.node("Sub", [hidden, mean]), 6)), IMAGES)
    assert found.channels == 0 and "reads all channels together" in str(found.stops[0])


@pytest.mark.parametrize("target", [[0, -1], [-1, 150], [0, 150], [1, 150]])
def test_a_reshape_merges_channels_with_their_positions(target: list[int]) -> None:
    b = image()
    rows = b.node("Reshape", [first(b, bias=BIAS), b.constant(np.array(target))])
    proto = b.proto(b.node("MatMul", [rows, b.constant(b.weight(150, 3), "v")]))
    _, found = removed(proto, IMAGES[:1] if target[0] == 1 else IMAGES)
    assert found.weights["v"][1] == (100, 3)


def test_a_reshape_to_computed_sizes() -> None:
    b = image()
    hidden = first(b, bias=BIAS)
    batch = b.node("Gather", [b.node("Shape", [hidden]), b.constant(np.array([0]))])
    shape = b.node("Concat", [batch, b.constant(np.array([6])), b.constant(np.array([25]))], axis=0)
    made = b.node("Reshape", [hidden, shape])
    rows = b.node("Transpose", [made], perm=[0, 2, 1])
    _, found = removed(b.proto(b.node("MatMul", [rows, b.constant(b.weight(6, 3), "v")])), IMAGES)
    assert found.weights["v"][1] == (4, 3)


@pytest.mark.parametrize(("dead", "left"), [((1, 4), 4), ((1, 2), 6), ((0, 1, 2), 3), ((1,), 6), ((0, 1, 4), 4)])
def test_a_reshape_that_cuts_channels_keeps_rows_of_equal_length(dead: tuple[int, ...], left: int) -> None:
    b = image()
    cut = b.node("Reshape", [first(b, dead=dead), b.constant(np.array([0, 2, 3, 25]))])
    back = b.node("Reshape", [b.node("Relu", [cut]), b.constant(np.array([0, 6, 5, 5]))])
    _, found = removed(b.proto(last(b, back, 6)), IMAGES)
    assert found.channels == 6 - left


def test_a_reshape_that_shifts_rows_holds_channels() -> None:
    b = image()
    cut = b.node("Reshape", [first(b), b.constant(np.array([0, 10, 15]))])
    back = b.node("Reshape", [cut, b.constant(np.array([0, 6, 5, 5]))])
    # 6 x 5 x 5 in rows of 15: two thirds of a channel
    _, found = removed(b.proto(last(b, back, 6), b.node("ReduceMax", [cut, b.constant(np.array([1]))])), IMAGES)
    assert found.channels == 0


def test_a_zero_in_the_target_that_copies_the_number_of_channels_elsewhere() -> None:
    b = Builder()
    b.input("x", [6, 4, 5])
    hidden = b.node("Conv", ["x", b.constant(b.weight(6, 4, 1, dead=(1, 4)), "w")])  # 6 samples, 6 channels
    made = b.node("Reshape", [hidden, b.constant(np.array([1, 0, 6, 5]))])  # the 0 copies 6, channels go to axis 2
    rows = b.node("Transpose", [made], perm=[0, 1, 3, 2])
    feeds = [{"x": np.random.default_rng(0).standard_normal((6, 4, 5))}]
    _, found = removed(b.proto(b.node("MatMul", [rows, b.constant(b.weight(6, 3))])), feeds)
    assert found.channels == 2  # and the 0 has become a 6


def test_the_number_of_channels_may_be_read() -> None:
    b = image()
    hidden = first(b)
    count = b.node("Gather", [b.node("Shape", [hidden]), b.constant(np.array(1))])
    scaled = b.node("Div", [hidden, b.node("Cast", [count], to=TensorProto.DOUBLE)])
    _, found = removed(b.proto(last(b, scaled, 6)), IMAGES)
    assert found.channels == 0 and "number of channels" in str(found.stops[0])


def test_parts_cut_joined_and_reordered() -> None:
    b = image()
    one, two = b.node("Split", [first(b), b.constant(np.array([2, 4]))], 2, axis=1)
    joined = b.node("Concat", [two, one, "x"], axis=1)
    mixed = b.node("Gather", [joined, b.constant(np.array([9, 0, 1, 2, 3, 4, 5, 6, 7, 8]))], axis=1)
    model, found = removed(b.proto(last(b, mixed, 10)), IMAGES)
    assert found.weights["v"][1] == (3, 8, 1, 1) and found.weights["w"][1] == (4, 4, 1, 1)


def test_a_split_into_equal_parts_becomes_one_of_explicit_sizes() -> None:
    b = image()
    one, two = b.node("Split", [first(b, dead=(1, 2))], 2, axis=1, num_outputs=2)
    _, found = removed(b.proto(last(b, one, 3), b.node("Conv", [two, b.constant(b.weight(2, 3, 1, 1))])), IMAGES)
    assert found.weights["w"][1] == (4, 4, 1, 1)
    b = image(opset=11)
    one, two = b.node("Split", [first(b, dead=(1, 2))], 2, axis=1, split=[3, 3])
    removed(b.proto(last(b, one, 3), b.node("Conv", [two, b.constant(b.weight(2, 3, 1, 1))])), IMAGES)


@pytest.mark.parametrize(("start", "end"), [(2, 5), (-4, -1), (0, 2**62), (3, 100)])
def test_a_slice_of_the_channels(start: int, end: int) -> None:
    b = image()
    left = len(range(6)[start:end])
    part = b.node("Slice", [first(b, dead=(2, 4)), *(b.constant(np.array([n])) for n in (start, end, 1))])
    removed(b.proto(last(b, part, left)), IMAGES)


def test_every_second_channel_holds_them() -> None:
    b = image()
    part = b.node("Slice", [first(b), *(b.constant(np.array([n])) for n in (0, 6, 1, 2))])
    _, found = removed(b.proto(last(b, part, 3)), IMAGES)
    assert found.channels == 0


@pytest.mark.parametrize(("counted", "left"), [(1, 6), (0, 5)])
def test_a_mean_of_neighbours_that_counts_the_padding(counted: int, left: int) -> None:
    b = image()
    hidden = first(b, dead=(4,), bias=BIAS)
    made = b.node("AveragePool", [hidden], kernel_shape=[2, 2], pads=[1, 1, 0, 0], count_include_pad=counted)
    model, _ = removed(b.proto(last(b, made, 6)), IMAGES)
    assert shapes_of(model)[[n for n in shapes_of(model) if n.startswith("w")][0]][0] == left


def test_resizing_and_padding() -> None:
    b = image()
    hidden = b.node("Pad", [first(b, dead=(1,)), b.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1]))])
    scales = b.constant(np.array([1, 1, 2, 2], np.float32))
    bigger = b.node("Resize", [hidden, "", scales], mode="nearest")
    sized = b.node("Resize", [bigger, "", "", b.constant(np.array([1, 6, 7, 7]))], mode="linear")
    _, found = removed(b.proto(last(b, sized, 6)), IMAGES[:1])
    assert found.weights["w"][1] == (5, 4, 1, 1)


def test_columns_of_a_table_that_is_looked_up() -> None:
    b = Builder()
    b.input("x", ["batch", 7], TensorProto.INT64)
    table = b.weight(9, 6, dead=(2,), axis=1)
    table[:, 3] = 0.5
    rows = b.node("Gather", [b.constant(table, "t"), "x"])
    proto = b.proto(b.node("MatMul", [rows, b.constant(b.weight(6, 3), "v")]))
    _, found = removed(proto, [{"x": np.array([[0, 1, 8, 3, 2, 2, 4]])}])
    assert found.weights == {"t": ((9, 6), (9, 4)), "v": ((6, 3), (4, 3))}


def test_layer_norm_and_softmax_read_all_channels() -> None:
    for kind in ("LayerNormalization", "Softmax"):
        b = rows()
        hidden = b.node("Gemm", ["x", b.constant(b.weight(6, 4, dead=(1,)), "w")], transB=1)
        extra = [b.constant(np.ones(6))] if kind == "LayerNormalization" else []
        made = b.node(kind, [hidden, *extra], axis=-1)
        _, found = removed(b.proto(b.node("MatMul", [made, b.constant(b.weight(6, 3))])), ROWS)
        assert found.channels == 0 and "reads all channels together" in str(found.stops[0])


def test_operators_without_a_rule_and_of_other_domains_hold_what_they_read() -> None:
    from fxsparse.exporters.file_rules import without_rule

    b = image()
    hidden = b.node("CumSum", [first(b, bias=BIAS), b.constant(np.array(1))])
    model, found = removed(b.proto(last(b, hidden, 6)), IMAGES)
    assert found.channels == 0 and "CumSum" in found.stops[0].what and without_rule(model.graph) == {"CumSum": 1}
    b = image()
    b.nodes.append(helper.make_node("Relu", [first(b, bias=BIAS)], ["foreign"], domain="acme"))
    value = helper.make_tensor_value_info("foreign", TensorProto.DOUBLE, ["batch", 6, 5, 5])
    model = ir.from_proto(_proto_with(b, value))
    found = remove_channels(model)
    assert found.channels == 0 and found.stops[0].what.startswith("acme.Relu")
    assert without_rule(model.graph) == {"acme.Relu": 1}


def _proto_with(b: Builder, value: object) -> object:
    out = last(b, "foreign", 6)
    made = helper.make_tensor_value_info(out, TensorProto.DOUBLE, ["batch", 3, 5, 5])
    graph = helper.make_graph(b.nodes, "g", b.inputs, [made], b.initializers, value_info=[value])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("acme", 1)])


def test_what_a_nested_graph_reads_stays() -> None:
    b = image()
    b.input("flag", [], TensorProto.BOOL)
    hidden = first(b, bias=BIAS)

    def branch(kind: str) -> object:
        node = helper.make_node(kind, [hidden], [f"{kind}_out"])
        out = helper.make_tensor_value_info(f"{kind}_out", TensorProto.DOUBLE, ["batch", 6, 5, 5])
        return helper.make_graph([node], kind, [], [out])

    made = b.node("If", ["flag"], then_branch=branch("Relu"), else_branch=branch("Neg"))
    feeds = [feed | {"flag": np.array(flag)} for feed in IMAGES for flag in (True, False)]
    _, found = removed(b.proto(last(b, made, 6)), feeds)
    assert found.channels == 0 and "nested graph" in str(found.stops[0])


def test_initializers_that_are_inputs_are_no_constants() -> None:
    b = image()
    proto = b.proto(last(b, first(b), 6))
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.DOUBLE, [6, 4, 1, 1]))
    model = model_of(proto)
    assert remove_channels(model).channels == 0


def test_scaled_or_varying_products_hold_their_channels() -> None:
    b = rows()
    hidden = b.node("Gemm", ["x", b.constant(b.weight(6, 4, dead=(1,)), "w")], transB=1)
    made = b.node("Gemm", [hidden, b.constant(b.weight(6, 3))], alpha=0.5)
    _, found = removed(b.proto(made, b.node("MatMul", [hidden, b.node("Transpose", [hidden])])), ROWS)
    assert found.channels == 0


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(0, 999), min_size=2, max_size=12), st.integers(0, 10**6))
def test_random_graphs_compute_the_same(steps: list[int], seed: int) -> None:
    with np.errstate(all="ignore"):
        proto = Random(seed=seed).grow(steps)
        model = model_of(proto)
        remove_channels(model)
        again = ir.from_proto(ir.to_proto(model))
        feeds = [{"x": np.random.default_rng(seed + n).standard_normal((n, 4, 6, 6))} for n in (1, 3)]
        assert_equal(proto, model, feeds)
        remove_channels(again)
        assert_equal(proto, again, feeds)


def test_random_graphs_do_lose_channels() -> None:
    lost = 0
    for seed in range(20):
        proto = Random(seed=seed).grow([int(n) for n in np.random.default_rng(seed).integers(0, 999, 8)])
        lost += remove_channels(model_of(proto)).channels > 0
    assert lost >= 12
