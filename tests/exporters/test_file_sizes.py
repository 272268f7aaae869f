"""Sizes of ONNX graphs, and the numbers computed from them, against what the operators really give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from fxsparse.exporters.file_forward import read_sizes
from fxsparse.exporters.file_graph import remove_unused
from fxsparse.exporters.file_numbers import names
from fxsparse.exporters.file_sizes import settle_sizes
from tests.exporters.file_cases import Builder, assert_equal, kinds, model_of

FREE = ({"batch": 2, "time": 7}, {"batch": 3, "time": 5})


def start(opset: int = 18) -> Builder:
    b = Builder(opset=opset)
    b.input("x", ["batch", "time", 12])
    return b


def finished(b: Builder, *outputs: str, ranks: tuple[int, ...] = ()) -> Any:
    """The graph as a message; sizes of outputs stay open."""
    types = [(TensorProto.DOUBLE, [None] * rank) if rank else (TensorProto.INT64, []) for rank in ranks]
    made = [helper.make_tensor_value_info(name, *each) for name, each in zip(outputs, types, strict=bool(types))]
    made = made or [helper.make_empty_tensor_value_info(name) for name in outputs]
    graph = helper.make_graph(b.nodes, "g", b.inputs, made, b.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", b.opset)])
    model.ir_version = 10
    return model


def real(proto: Any, free: dict[str, int]) -> dict[str, Any]:
    """The arrays of all values, by ONNX's own reference."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    every = [name for node in proto.graph.node for name in node.output]
    del copy.graph.output[:]
    copy.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in every)
    x = np.random.default_rng(0).standard_normal((free["batch"], free["time"], 12))
    return dict(zip(every, ReferenceEvaluator(copy).run(None, {"x": x}), strict=True))


def checked(proto: Any) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """The sizes and numbers that are known, all of them compared with the real ones, on two sizes of the input."""
    model = model_of(proto)
    computed = {value.name or "": entries for value, entries in read_sizes(model).items()}
    sizes = {value.name or "": names(value) for node in model.graph for value in node.outputs}
    for free in FREE:
        for name, array in real(proto, free).items():
            if (found := computed.get(name)) is not None:
                array = np.asarray(array)
                assert found.shape == array.shape, name
                for entry, actual in zip(found.reshape(-1).tolist(), array.reshape(-1).tolist(), strict=True):
                    assert entry is None or (free[entry] if isinstance(entry, str) else entry) == actual, name
            for entry, actual in zip(sizes[name] or np.shape(array), np.shape(array), strict=True):
                if isinstance(entry, int) or entry in free:
                    assert (free[entry] if isinstance(entry, str) else entry) == actual, (name, sizes[name])
    return {k: v.tolist() for k, v in computed.items()}, {k: v for k, v in sizes.items() if v is not None}


Case = Callable[[Builder, str], str]


def part(b: Builder, shape: str, *cut: Any) -> str:
    return str(b.node("Slice", [shape, *(b.constant(np.array(each)) for each in cut)]))


CASES: dict[str, tuple[Case, Any]] = {
    "gather": (lambda b, s: b.node("Gather", [s, b.constant(np.array(-1))]), 12),
    "gather a list": (lambda b, s: b.node("Gather", [s, b.constant(np.array([2, 0]))]), [12, "batch"]),
    "slice": (lambda b, s: part(b, s, [1], [3]), ["time", 12]),
    "slice from behind": (lambda b, s: part(b, s, [-2], [2**63 - 1], [0]), ["time", 12]),
    "slice backwards": (lambda b, s: part(b, s, [-1], [-(2**62)], [0], [-2]), [12, "batch"]),
    "concat": (lambda b, s: b.node("Concat", [s, b.constant(np.array([4]))], axis=0), ["batch", "time", 12, 4]),
    "identity": (lambda b, s: b.node("Identity", [s]), ["batch", "time", 12]),
    "to int32": (lambda b, s: b.node("Cast", [s], to=TensorProto.INT32), ["batch", "time", 12]),
    "squeeze": (lambda b, s: b.node("Squeeze", [part(b, s, [2], [3])]), 12),
    "unsqueeze": (
        lambda b, s: b.node("Unsqueeze", [b.node("Gather", [s, b.constant(np.array(1))]), b.constant(np.array([0]))]),
        ["time"],
    ),
    "reshape": (
        lambda b, s: b.node("Reshape", [b.node("Gather", [s, b.constant(np.array(2))]), b.constant(np.array([-1]))]),
        [12],
    ),
    "reshape to a number": (
        lambda b, s: b.node("Reshape", [part(b, s, [2], [3]), b.constant(np.zeros(0, np.int64))]),
        12,
    ),
    "add": (lambda b, s: b.node("Add", [s, b.constant(np.array(5))]), [None, None, 17]),
    "sub": (lambda b, s: b.node("Sub", [b.constant(np.array([5])), s]), [None, None, -7]),
    "mul": (lambda b, s: b.node("Mul", [s, b.constant(np.array([1, 2, 3]))]), [None, None, 36]),
    "div": (lambda b, s: b.node("Div", [s, b.constant(np.array(5))]), [None, None, 2]),
    "div of a negative": (lambda b, s: b.node("Div", [s, b.constant(np.array(-5))]), [None, None, None]),
    "mod": (lambda b, s: b.node("Mod", [s, b.constant(np.array(5))]), [None, None, 2]),
    "mod of a negative": (lambda b, s: b.node("Mod", [s, b.constant(np.array(-5))]), [None, None, None]),
    "max": (lambda b, s: b.node("Max", [s, b.constant(np.array(13))]), [None, None, 13]),
    "min": (lambda b, s: b.node("Min", [s, b.constant(np.array(13)), b.constant(np.array([11]))]), [None, None, 11]),
    "equal": (lambda b, s: b.node("Equal", [s, b.constant(np.array([-1, 7, 12]))]), [0, None, 1]),
    "where": (
        lambda b, s: b.node(
            "Where", [b.node("Equal", [b.constant(np.array([-1, 3, -1])), b.constant(np.array(-1))]), s,
                      b.constant(np.array([1, 2, 3]))]
        ),
        ["batch", 2, 12],
    ),
    "filled": (
        lambda b, s: b.node(
            "ConstantOfShape", [b.node("Shape", [s])], value=helper.make_tensor("v", TensorProto.INT64, [1], [-4])
        ),
        [-4, -4, -4],
    ),
    "filled with float": (lambda b, s: b.node("ConstantOfShape", [b.node("Shape", [s])]), None),
    "product": (lambda b, s: b.node("ReduceProd", [b.node("Concat", [part(b, s, [2], [3])] * 2, axis=0)]), [144]),
    "product as a number": (
        lambda b, s: b.node("ReduceProd", [b.node("Concat", [part(b, s, [2], [3])] * 2, axis=0)], keepdims=0),
        144,
    ),
    "a product of free sizes": (lambda b, s: b.node("ReduceProd", [s]), None),
    "beyond 32 bits": (lambda b, s: b.node("Mul", [s, b.constant(np.array(2**40))]), [None, None, None]),
    "of floats": (lambda b, s: b.node("Cast", [s], to=TensorProto.DOUBLE), None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_numbers_that_are_computed_from_sizes(case: str) -> None:
    b = start()
    make, expected = CASES[case]
    out = make(b, b.node("Shape", ["x"]))
    assert checked(finished(b, out))[0].get(out) == expected


def test_a_part_of_a_shape_and_one_of_a_value_that_varies() -> None:
    b = start()
    assert checked(finished(b, out := b.node("Shape", ["x"], start=1, end=-1)))[0][out] == ["time"]
    b = start()
    longest = b.node("ReduceMax", [b.node("Cast", ["x"], to=TensorProto.INT64)], keepdims=0)
    one = b.node("Unsqueeze", [longest, b.constant(np.array([0]))])
    out = b.node("Concat", [part(b, b.node("Shape", ["x"]), [0], [1]), one], axis=0)
    assert checked(finished(b, out))[0][out] == ["batch", None]


def chunk(b: Builder, x: str, parts: int) -> list[str]:
    """Equal parts of the last axis, cut where its size divided says, as torch's older exporter writes them."""
    size = b.node("Gather", [b.node("Shape", [x]), b.constant(np.array([-1]))])
    up = b.node("Add", [size, b.constant(np.array([parts - 1]))])
    step = b.node("Div", [up, b.constant(np.array([parts]))])
    ends = [b.node("Mul", [step, b.constant(np.array([i]))]) for i in range(parts + 1)]
    last = b.constant(np.array([-1]))
    return [b.node("Slice", [x, a, z, last]) for a, z in zip(ends, ends[1:], strict=False)]


def unflatten(b: Builder, x: str, *sizes: int) -> str:
    """The last axis as several, by a shape that is cut where a remainder says."""
    rank = b.node("Mod", [b.constant(np.array([5])), b.constant(np.array([3]))])
    lead = b.node("Slice", [b.node("Shape", [x]), b.constant(np.array([0])), rank])
    return str(b.node("Reshape", [x, b.node("Concat", [lead, b.constant(np.array(sizes))], axis=0)]))


def test_sizes_behind_divisions_and_remainders_are_known_in_every_layer() -> None:
    b, x, cuts = start(), "x", []
    for _ in range(3):
        a, c = chunk(b, x, 2)
        cuts += [a, unflatten(b, b.node("Add", [a, c]), 2, 3)]
        x = b.node("Concat", [a, c], axis=-1)
    proto = finished(b, x, ranks=(3,))
    found = checked(proto)[1]
    assert [found[cut] for cut in cuts] == [["batch", "time", 6], ["batch", "time", 2, 3]] * 3
    assert found[x] == ["batch", "time", 12]
    model = model_of(proto)
    assert settle_sizes(model) > 0
    remove_unused(model.graph)
    assert not {"Shape", "Div", "Gather", "Add", "Mul"} & set(kinds(model))
    feeds = [{"x": np.random.default_rng(0).standard_normal((f["batch"], f["time"], 12))} for f in FREE]
    assert_equal(proto, model, feeds)


RESHAPES: tuple[tuple[list[int], list[Any]], ...] = (
    ([0, 0, 3, 4], ["batch", "time", 3, 4]),
    ([0, 0, -1, 4], ["batch", "time", 3, 4]),
    ([0, -1, 12], ["batch", "time", 12]),
    ([-1, 12], [None, 12]),
    ([0, -1], ["batch", None]),
    ([-1], [None]),
    ([0, 0, 12, 1], ["batch", "time", 12, 1]),
    ([0, -1, 6], ["batch", None, 6]),
)


@pytest.mark.parametrize(("target", "expected"), RESHAPES)
def test_reshapes(target: list[int], expected: list[Any]) -> None:
    b = start()
    out = b.node("Reshape", ["x", b.constant(np.array(target))])
    found = checked(finished(b, out))[1][out]
    assert [size if isinstance(size, int) or size in FREE[0] else None for size in found] == expected


def divided(b: Builder, number: int) -> str:
    """A number in a list, by a division: what ONNX's own inference does not follow."""
    return str(b.node("Div", [b.constant(np.array([2 * number])), b.constant(np.array([2]))]))


@pytest.mark.parametrize(("allowzero", "expected"), [(1, [0, 5]), (0, ["batch", 5])])
def test_a_zero_in_a_target_copies_a_size_or_is_one(allowzero: int, expected: list[Any]) -> None:
    b = start()
    empty = part(b, "x", [0], [0], [2])
    target = b.node("Concat", [divided(b, 0), divided(b, 5)], axis=0)
    out = b.node("Reshape", [empty, target], allowzero=allowzero)
    assert names(next(n for n in model_of(finished(b, out)).graph if n.op_type == "Reshape").outputs[0]) == expected


def test_the_rest_of_a_reshape_by_a_size_of_another_value_is_unknown() -> None:
    b = Builder()
    b.input("x", ["batch", 12])
    b.input("z", ["other", 12])
    other = b.node("Gather", [b.node("Shape", ["z"]), b.constant(np.array([0]))])
    out = b.node("Reshape", ["x", b.node("Concat", [other, b.constant(np.array([-1])), divided(b, 12)], axis=0)])
    found = names(model_of(finished(b, out)).graph.outputs[0])
    assert found is not None and found[0] == "other" and found[2] == 12
    assert found[1] not in ("batch", "other", 1)  # batch / other


@pytest.mark.parametrize("opset", [9, 13])
def test_free_sizes_keep_their_names_behind_a_cut(opset: int) -> None:
    b = start(opset)
    cut = {"starts": [0], "ends": [4], "axes": [-1]}
    if opset == 9:
        out = b.node("Slice", ["x"], **cut)
    else:
        out = b.node("Slice", ["x", *(b.constant(np.array(each)) for each in cut.values())])
    rest = b.node("Slice", ["x"], starts=[1], ends=[4], axes=[0]) if opset == 9 else part(b, "x", [1], [4], [0])
    whole = (
        b.node("Slice", ["x"], starts=[0], ends=[2**31], axes=[1]) if opset == 9 else part(b, "x", [0], [2**31], [1])
    )
    found = checked(finished(b, out, rest, whole))[1]
    assert found[out] == ["batch", "time", 4] and found[whole] == ["batch", "time", 12]
    assert found[rest][1:] == ["time", 12] and found[rest][0] not in ("batch", "time")


@pytest.mark.parametrize(
    ("target", "expected"), [([2, 1, 1, 1], [2, "batch", "time", 12]), ([5, 12], ["batch", None, 12])]
)
def test_expansions(target: list[int], expected: list[Any]) -> None:
    b = start()
    shape = b.node("Concat", [b.constant(np.array(target[:1])), b.constant(np.array(target[1:]))], axis=0)
    out = b.node("Expand", ["x", shape])
    sizes = {v.name: names(v) for node in model_of(finished(b, out)).graph for v in node.outputs}
    if expected[1] is None:
        assert sizes[out] == ["batch", 5, 12]  # what is expanded to 5 is 5, or does not run
    else:
        assert checked(finished(b, out))[1][out] == expected


def test_operators_are_inferred_from_numbers_that_were_computed() -> None:
    b = start()
    half = b.node(
        "Div", [b.node("Gather", [b.node("Shape", ["x"]), b.constant(np.array([2]))]), b.constant(np.array([3]))]
    )
    sizes = b.node("Concat", [half, b.node("Sub", [b.constant(np.array([12])), half])], axis=0)
    one, other = b.node("Split", ["x", sizes], outputs=2, axis=2)
    zeros = b.node("ConstantOfShape", [b.node("Concat", [b.node("Shape", [one]), half], axis=0)])
    found = checked(finished(b, one, other, zeros))[1]
    assert found[one] == ["batch", "time", 4] and found[other] == ["batch", "time", 8]
    assert found[zeros] == ["batch", "time", 4, 4]


def test_what_no_rule_reads_stays_unknown() -> None:
    b = start()
    out = b.node("Foreign", ["x"], domain="some.where")
    kept = b.node("Relu", [out])
    proto = finished(b, kept)
    proto.opset_import.append(helper.make_opsetid("some.where", 1))
    model = model_of(proto)
    assert names(model.graph.outputs[0]) is None


def test_constants_that_take_the_place_of_numbers_have_their_type_and_outputs_stay() -> None:
    b = start()
    size = b.node("Gather", [b.node("Shape", ["x"]), b.constant(np.array([2]))])
    narrow = b.node("Cast", [size], to=TensorProto.INT32)
    used = b.node("Cast", [narrow], to=TensorProto.DOUBLE)
    test = b.node("Equal", [size, b.constant(np.array([12]))])
    proto = finished(
        b, b.node("Where", [test, used, b.constant(np.array([0.5]))]), b.node("Squeeze", [size]), ranks=(1, 0)
    )
    model = model_of(proto)
    settle_sizes(model)
    remove_unused(model.graph)
    assert kinds(model).count("Equal") == 1  # a truth value is no number
    made = {v.const_value.dtype for name, v in model.graph.initializers.items() if name.endswith("_size")}
    assert made == {ir.DataType.INT32, ir.DataType.INT64}
    outputs = assert_equal(proto, model, [{"x": np.zeros((2, 3, 12))}])
    assert outputs[0][0].tolist() == [12.0] and outputs[0][1].tolist() == 12


LISTS = ("Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "Concat", "Slice", "Gather", "Equal", "Where", "Cast")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(LISTS), st.integers(0, 9), st.integers(0, 9), st.integers(1, 9)), max_size=12)
)
def test_random_numbers_are_never_wrong(steps: list[tuple[str, int, int, int]]) -> None:
    b = start()
    lists = [b.node("Shape", ["x"]), b.constant(np.array([3])), b.constant(np.array([5, 1, 2]))]
    lengths = [3, 1, 3]
    for kind, i, j, k in steps:
        one, other = lists[i % len(lists)], lists[j % len(lists)]
        a, c = lengths[i % len(lists)], lengths[j % len(lists)]
        if kind == "Concat":
            made, length = b.node("Concat", [one, other], axis=0), a + c
        elif kind == "Slice":
            made, length = part(b, one, [0], [k]), min(a, k)
        elif kind == "Gather":
            made, length = b.node("Gather", [one, b.constant(np.array([k % a, 0]))]), 2
        elif kind == "Cast":
            made, length = b.node("Cast", [one], to=TensorProto.INT64), a
        elif a != c and 1 not in (a, c):
            continue
        elif kind in ("Div", "Mod"):
            made, length = b.node(kind, [one, b.constant(np.array([k]))]), a
        elif kind in ("Equal", "Where"):
            test = b.node("Equal", [one, b.constant(np.array([k - 3]))])
            made, length = b.node("Where", [test, one, other]), max(a, c)
        else:
            made, length = b.node(kind, [one, other]), max(a, c)
        lists.append(made)
        lengths.append(length)
    checked(finished(b, b.node("Identity", [lists[-1]])))
