"""The forms of a lowered product in an ONNX graph: convolution, batched product, and where its bias is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from fxsparse.errors import ExportError
from fxsparse.exporters import file_double, file_proof, optimize_file
from fxsparse.exporters.file_choose import choose
from fxsparse.exporters.file_costs import dense_us, lowered_us
from fxsparse.exporters.file_graph import remove_unused
from fxsparse.exporters.file_io import to_bytes
from fxsparse.exporters.file_lower import Lowering
from fxsparse.exporters.file_supports import Layer, Support, forms_of, layer_of, supports_of
from fxsparse.exporters.runtime import open_session
from tests.exporters.file_cases import Builder, assert_equal, feeds, kinds, model_of, rows, shapes_of, shared

CONV, PRODUCT, INSIDE = (True, False), (False, False), (False, True)
FORMS = {"conv": CONV, "product": PRODUCT, "inside": INSIDE}


def lowered(proto: Any, form: tuple[bool, bool], group: int = 0) -> ir.Model:
    """Every layer in one form (convolutions stay convolutions), with the fewest stored numbers."""
    model = model_of(proto)
    choices = {}
    for node in model.graph:
        layer = layer_of(node)
        found = [s for s in supports_of(layer) if not group or s.group == group] if layer is not None else []
        if layer is not None and found:
            best = min(found, key=lambda support: (support.rows.size * support.k, -support.group))
            inside = form[1] and layer.bias is not None
            choices[node] = layer, replace(best, as_conv=layer.is_conv or form[0], inside=inside)
    assert choices
    Lowering(model, choices).run()
    remove_unused(model.graph)
    return model


def gemm(b: Builder, x: str, weight: Any, bias: Any = None, flip: int = 1) -> str:
    operands = [x, b.constant(weight if flip else weight.T), *([] if bias is None else [b.constant(bias)])]
    return str(b.node("Gemm", operands, transB=flip))


def uneven(b: Builder, width: int = 24) -> Any:
    return np.concatenate([shared(b.random, n, width, n, 4) for n in (9, 12, 11)])


BIASES: dict[str, tuple[int, ...]] = {"of rows": (32,), "a row": (1, 32), "one number": (), "one in a list": (1,)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("flip", [0, 1])
def test_a_gemm_with_any_bias_in_any_form(form: str, bias: str, flip: int) -> None:
    b = rows()
    first = gemm(b, "x", shared(b.random, 32, 24, 8, 4), b.random.standard_normal(BIASES[bias]), flip)
    filled = gemm(b, b.node("Sigmoid", [first]), uneven(b, 32), b.random.standard_normal(BIASES[bias]), flip)
    last = gemm(b, b.node("Tanh", [filled]), shared(b.random, 16, 32, 8, 4)[b.random.permutation(16)])
    proto = b.proto(last)
    model = lowered(proto, FORMS[form])
    found = kinds(model)
    assert found.count("Conv") == (3 if form == "conv" else 0)
    assert found.count("MatMul") == (0 if form == "conv" else 3)
    assert (found.count("Add"), found.count("Pad")) == {"conv": (0, 0), "product": (2, 0), "inside": (0, 2)}[form]
    assert found.count("Transpose") == 2 and "Gemm" not in found
    assert_equal(proto, model, feeds((1, 24), (5, 24)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("shape", [(32,), (1, 32), (1, 1, 32)])
def test_what_is_added_behind_a_product_is_its_bias(form: str, first: bool, shape: tuple[int, ...]) -> None:
    b = rows("batch", "time", 24)
    made = b.node("MatMul", ["x", b.constant(uneven(b).T)])
    held = b.constant(b.random.standard_normal(shape))
    added = b.node("Add", [held, made] if first else [made, held])
    proto = b.proto(b.node("Add", [b.node("MatMul", [b.node("Relu", [added]), b.constant(np.eye(32)[:, :24])]), "x"]))
    model = lowered(proto, FORMS[form])
    assert kinds(model).count("Add") == (2 if form == "product" else 1)  # the last one is no bias
    assert_equal(proto, model, feeds((1, 2, 24), (3, 5, 24)))


def test_a_constant_that_is_made_behind_the_product_is_no_operand_of_it() -> None:
    b = rows()
    made = b.node("MatMul", ["x", b.constant(shared(b.random, 32, 24, 8, 4).T)])
    held = b.node("Constant", [], value=numpy_helper.from_array(b.random.standard_normal(32)))
    proto = b.proto(b.node("Add", [made, held]))
    for form in FORMS.values():
        model = lowered(proto, form)
        onnx.checker.check_model(ir.to_proto(model))  # it is in an order in which it can be computed
        assert_equal(proto, model, feeds((1, 24), (5, 24)))


def no_bias(b: Builder, made: str, case: str) -> Sequence[str]:
    vector = b.constant(b.random.standard_normal(32))
    if case == "read twice":
        return [b.node("Add", [made, vector]), b.node("Relu", [made])]
    if case == "an output":
        return [b.node("Add", [made, vector]), made]
    if case == "added to itself":
        return [b.node("Add", [made, made])]
    if case == "subtracted":
        return [b.node("Sub", [made, vector])]
    if case == "varies over rows":
        return [b.node("Add", [made, b.constant(b.random.standard_normal((3, 32)))])]
    if case == "more axes":
        return [b.node("Add", [made, b.constant(b.random.standard_normal((1, 1, 1, 32)))])]
    if case == "one number":
        return [b.node("Add", [made, b.constant(np.float64(0.5))])]
    return [b.node("Add", [made, b.input("z", [32])])]


@pytest.mark.parametrize(
    "case", ["read twice", "an output", "added to itself", "subtracted", "varies over rows", "more axes", "given",
             "one number"],
)  # fmt: skip
def test_what_is_no_bias_stays_an_operator(case: str) -> None:
    b = rows("batch", 3, 24)
    made = b.node("MatMul", ["x", b.constant(shared(b.random, 32, 24, 8, 4).T)])
    proto = b.proto(*no_bias(b, made, case))
    node = next(node for node in model_of(proto).graph if node.op_type == "MatMul")
    layer = layer_of(node)
    assert layer is not None and layer.bias is None and layer.adder is None
    extra = {"z": np.random.default_rng(9).standard_normal(32)} if case == "given" else {}
    assert_equal(proto, lowered(proto, CONV), [each | extra for each in feeds((1, 3, 24), (4, 3, 24))])


def pixels(b: Builder, outputs: int, inputs: int, group: int, *kernel: int) -> Any:
    mask = shared(b.random, outputs, inputs, group, 4) != 0
    return b.random.standard_normal((outputs, inputs, *kernel)) * mask.reshape(outputs, inputs, *[1] * len(kernel))


@pytest.mark.parametrize("options", [{}, {"strides": [2, 3]}, {"auto_pad": "VALID"}, {"auto_pad": "SAME_UPPER"},
                                     {"group": 2}, {"dilations": [2, 2]}])  # fmt: skip
@pytest.mark.parametrize("order", ["as they are", "permuted", "filled"])
def test_a_convolution_of_single_pixels_computes_its_bias(options: dict[str, Any], order: str) -> None:
    b = rows("batch", 20, 5, 4)
    weight = pixels(b, 32, 20 // options.get("group", 1), 16, 1, 1)
    if order == "permuted" and "group" not in options:
        weight = weight[b.random.permutation(32)]
    if order == "filled" and "group" not in options:
        weight = np.concatenate([pixels(b, n, 20, n, 1, 1) for n in (9, 12, 11)])
    operands = ["x", b.constant(weight), b.constant(b.random.standard_normal(32))]
    proto = b.proto(b.node("Relu", [b.node("Conv", operands, **options)]))
    model = lowered(proto, (True, True))
    (made,) = [node for node in model.graph if node.op_type == "Conv"]
    assert len(made.inputs) == 2 and kinds(model).count("Pad") == 1
    assert_equal(proto, model, feeds((1, 20, 5, 4), (3, 20, 5, 4)))


def test_layers_that_read_one_value_share_the_ones_and_a_tied_weight_has_each_bias() -> None:
    b = rows("batch", 20, 7)
    weight = b.constant(pixels(b, 32, 20, 16, 1))
    parts = [b.node("Conv", ["x", weight, b.constant(b.random.standard_normal(32))]) for _ in range(2)]
    proto = b.proto(b.node("Mul", parts))
    model = lowered(proto, (True, True))
    assert kinds(model).count("Pad") == 1
    assert [shape for shape in shapes_of(model).values() if len(shape) == 3] == [(32, 5, 1)] * 2
    assert_equal(proto, model, feeds((1, 20, 7), (3, 20, 7)))


def test_a_tied_weight_with_one_bias_is_stored_once_in_every_form() -> None:
    for form in FORMS.values():
        b = rows()
        weight, bias, out = b.constant(shared(b.random, 24, 24, 8, 4)), b.constant(b.random.standard_normal(24)), "x"
        for _ in range(3):
            out = b.node("Relu", [b.node("Gemm", [out, weight, bias], transB=1)])
        proto = b.proto(out)
        model = lowered(proto, form)
        assert sum(len(shape) == 3 for shape in shapes_of(model).values()) == 1
        assert_equal(proto, model, feeds((2, 24)))


def forms(b: Builder, out: str) -> list[tuple[bool, bool]]:
    model = model_of(b.proto(out))
    layer = next(layer for node in model.graph if (layer := layer_of(node)) is not None)
    return [(form.as_conv, form.inside) for form in forms_of(layer, supports_of(layer)[0])]


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16])
def test_which_forms_are_legal(kind: int) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    b = Builder()
    b.input("x", ["batch", 24], kind)
    weight = shared(b.random, 32, 24, 8, 4).astype(dtype)
    plain = forms(b, gemm(b, "x", weight))
    assert plain == ([PRODUCT, CONV] if kind == TensorProto.FLOAT else [PRODUCT])
    biased = Builder()
    biased.input("x", ["batch", 24], kind)
    out = gemm(biased, "x", weight, np.zeros(32, dtype))
    legal = {TensorProto.FLOAT: [PRODUCT, INSIDE, CONV], TensorProto.DOUBLE: [PRODUCT, INSIDE]}.get(kind, [PRODUCT])
    assert forms(biased, out) == legal


@pytest.mark.parametrize("kernel, options, bias, inside", [
    ((1, 1), {}, True, True), ((1, 1), {}, False, False), ((1, 1), {"pads": [0, 0, 1, 0]}, True, False),
    ((1, 1), {"auto_pad": "VALID"}, True, True), ((3, 1), {}, True, False), ((1, 2), {}, True, False),
    ((1, 1), {"pads": [0] * 4, "strides": [2, 2]}, True, True),
])  # fmt: skip
def test_where_a_convolution_may_compute_its_bias(
    kernel: tuple[int, ...], options: dict[str, Any], bias: bool, inside: bool
) -> None:
    b = rows("batch", 20, 7, 7)
    operands = ["x", b.constant(pixels(b, 32, 20, 16, *kernel)), *([b.constant(np.zeros(32))] if bias else [])]
    assert forms(b, b.node("Conv", operands, **options)) == [(True, False), *([(True, True)] if inside else [])]


def test_a_convolution_whose_bias_is_given_is_left_alone() -> None:
    b = rows("batch", 20, 7)
    proto = b.proto(b.node("Conv", ["x", b.constant(pixels(b, 32, 20, 16, 1)), b.input("z", [32])]))
    assert all(layer_of(node) is None for node in model_of(proto).graph)


def test_rows_that_are_picked_by_values_may_be_none_so_their_layer_stays() -> None:
    b = Builder()
    b.input("x", ["batch", 256], TensorProto.FLOAT)
    weight = shared(b.random, 512, 256, 64, 16).astype(np.float32)
    picked = b.node("NonZero", [b.node("ReduceMax", ["x", b.constant(np.array([1]))], keepdims=0)])
    some = b.node("Gather", ["x", b.node("Squeeze", [picked])])
    model = model_of(b.proto(gemm(b, some, weight), gemm(b, "x", weight)))
    one, other = [node for node in model.graph if node.op_type == "Gemm"]
    for measure in (False, True):  # a convolution of no rows stops
        choice = choose(model, [{"x": np.ones((64, 256), np.float32)}], measure=measure, threads=1)
        assert one not in choice.lowered and other in choice.lowered
        assert "sizes of its input are not known" in choice.reports[0].reason


# microseconds that one thread of an AVX-512 core saves with the bias inside: features, rows, 90 % dead, groups of 64
SAVED = [
    (1024, 1024, 16, 10.0), (1024, 1024, 128, 34.0), (256, 1024, 16, 8.0), (256, 1024, 128, 14.0),
    (768, 3072, 16, 25.0), (512, 512, 16, 2.0), (1024, 256, 512, -34.0), (1024, 512, 512, -34.0),
    (1024, 1024, 512, -100.0), (1024, 256, 128, -5.0), (3072, 768, 512, -83.0),
]  # fmt: skip


@pytest.mark.parametrize("inputs, outputs, batch, saved", SAVED)
def test_the_estimate_has_the_sign_of_the_measured_savings(inputs: int, outputs: int, batch: int, saved: float) -> None:
    support, layer = wide(inputs, outputs)
    points = [(batch, batch, 1)]
    apart = lowered_us(layer, support, points) - lowered_us(layer, replace(support, inside=True), points)
    assert np.sign(apart) == np.sign(saved) and abs(saved) / 3 < abs(apart) < 6 * abs(saved)
    alone = [(1, 1, 1)]
    assert lowered_us(layer, support, alone) == pytest.approx(
        lowered_us(layer, replace(support, inside=True), alone), abs=1
    )
    conv = lowered_us(layer, replace(support, as_conv=True), points)
    assert conv < lowered_us(layer, support, points)
    assert lowered_us(layer, support, points) < dense_us(layer, points)


def wide(inputs: int, outputs: int) -> tuple[Support, Layer]:
    alive = shared(np.random.default_rng(0), outputs, inputs, 64, inputs // 10) != 0
    node = ir.node("Gemm", [ir.val("x"), ir.val("w", shape=ir.Shape((outputs, inputs))), ir.val("b")])
    layer = Layer(node, "w", alive, bias=node.inputs[2])
    return next(support for support in supports_of(layer) if support.group == 64), layer


def test_the_column_of_a_bias_is_a_column_to_compute() -> None:
    alive = np.zeros((512, 64), bool)
    alive[:, :3] = True
    node = ir.node("Gemm", [ir.val("x"), ir.val("w", shape=ir.Shape((512, 64))), ir.val("b")])
    two, three = (next(iter(supports_of(Layer(node, "w", alive & (np.arange(64) < k))))) for k in (2, 3))
    points = [(100, 100, 1)]
    copied = 2.5 + 64 * 100 * 1e-4
    inside = lowered_us(Layer(node, "w", alive, bias=node.inputs[2]), replace(two, inside=True), points)
    assert (two.k, three.k) == (2, 3)
    assert inside == pytest.approx(lowered_us(Layer(node, "w", alive), three, points) + copied)


def test_the_estimate_of_images() -> None:
    for inputs, outputs, pixels_, better in ((64, 256, 784, True), (256, 1024, 196, True), (512, 512, 196, False)):
        alive = shared(np.random.default_rng(0), outputs, inputs, 64, inputs // 10) != 0
        shape = ir.Shape((outputs, inputs, 1, 1))
        node = ir.node("Conv", [ir.val("x"), ir.val("w", shape=shape), ir.val("b")])
        layer = Layer(node, "w", alive, bias=node.inputs[2])
        support = next(support for support in supports_of(layer) if support.group == 64)
        for batch in (1, 16):
            points = [(batch * pixels_, batch * pixels_, batch)]
            apart = lowered_us(layer, support, points) - lowered_us(layer, replace(support, inside=True), points)
            assert (apart > 0) is better


def net(tmp_path: Path, kind: int = TensorProto.FLOAT) -> Path:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    b = Builder()
    b.input("x", ["batch", 256], kind)
    out = "x"
    for inputs in (256, 512):
        weight = shared(b.random, 512, inputs, 64, inputs // 16).astype(dtype)
        out = b.node("Relu", [gemm(b, out, weight, b.random.standard_normal(512).astype(dtype))])
    source = tmp_path / "a.onnx"
    onnx.save(b.proto(out), source)
    return source


def test_a_file_in_single_precision_gets_convolutions_proved_in_float64(tmp_path: Path) -> None:
    report = optimize_file(net(tmp_path), tmp_path / "b.onnx", channels=False, latency=False, batches=(16,))
    assert [layer.form for layer in report.layers] == ["gather + conv"] * 2
    proof = report.verification
    assert proof is not None and proof.exact is not None and proof.exact.relative < 1e-12
    assert [node.op_type for node in onnx.load(report.path).graph.node].count("Conv") == 2


def test_a_file_in_double_precision_gets_products(tmp_path: Path) -> None:
    source = net(tmp_path, TensorProto.DOUBLE)
    report = optimize_file(source, tmp_path / "b.onnx", channels=False, latency=False, batches=(16,))
    found = [node.op_type for node in onnx.load(report.path).graph.node]
    assert [layer.form for layer in report.layers] == ["gather + matmul"] * 2 and "Conv" not in found
    assert all(layer.bias_inside for layer in report.layers) and found.count("Pad") == 2 and "Add" not in found
    assert "its bias computed with the product" in str(report.layers[0])


def test_the_proof_goes_on_with_products_where_nothing_runs_the_convolutions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped:
        def run(self, names: Any, feed: Any) -> Any:
            raise RuntimeError("no such operator")

    asked = []

    def stopped(message: bytes) -> Stopped:
        asked.append([node.op_type for node in onnx.load_model_from_string(message).graph.node])
        return Stopped()

    monkeypatch.setattr(file_double, "_reference", stopped)
    report = optimize_file(net(tmp_path), tmp_path / "b.onnx", channels=False, latency=False, batches=(16,))
    assert len(asked) == 1 and asked[0].count("Conv") == 2
    proof = report.verification
    assert proof is not None and proof.exact is not None and proof.exact.relative < 1e-12
    assert [layer.form for layer in report.layers] == ["gather + conv"] * 2

    b = Builder()  # a convolution that was one before has no other form: no proof, and no accusation either
    b.input("x", ["batch", 20, 7], TensorProto.FLOAT)
    onnx.save(b.proto(b.node("Conv", ["x", b.constant(pixels(b, 32, 20, 16, 1).astype(np.float32))])),
              tmp_path / "c.onnx")  # fmt: skip
    plain = optimize_file(tmp_path / "c.onnx", tmp_path / "d.onnx", channels=False, latency=False, batches=(16,))
    assert plain.verification is not None and plain.verification.exact is None
    assert "float64 does not run" in plain.verification.reason


def test_a_proof_that_finds_a_difference_does_not_try_another_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = file_proof.applied
    calls = []

    def wrong(compacted: Any, keys: Any) -> Any:
        made = right(compacted, keys)
        calls.append(keys)
        for value in made.model.graph.initializers.values():
            if value.const_value is not None and len(value.const_value.shape) == 3:
                value.const_value = ir.tensor(value.const_value.numpy() * 1.5)
        return made

    monkeypatch.setattr(file_proof, "applied", wrong)
    with pytest.raises(Exception, match="float64 copies differ"):
        optimize_file(net(tmp_path), tmp_path / "b.onnx", channels=False, latency=False, batches=(16,))
    assert len(calls) == 1 and not (tmp_path / "b.onnx").exists()


@pytest.mark.parametrize("lower", [True, False])
def test_a_proof_that_cannot_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lower: bool) -> None:
    right, calls = file_proof.runner_of, []

    def runner_of(model: Any) -> Any:
        calls.append(model)
        if len(calls) > 1:
            raise file_double.CannotRun("not today")
        return right(model)

    monkeypatch.setattr(file_proof, "runner_of", runner_of)
    report = optimize_file(net(tmp_path), tmp_path / "b.onnx", channels=False, latency=False, batches=(16,),
                           lower=lower)  # fmt: skip
    assert len(calls) == (3 if lower else 2)  # the source, its convolutions, its products
    assert report.verification is not None and "not today" in str(report.verification)


def test_a_form_that_stops_is_not_replaced_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = file_proof.differences, []

    def differences(*given: Any) -> Any:
        calls.append(given)
        if len(calls) > 1:
            raise ExportError("verification failed: output 0 has another shape")
        return right(*given)

    monkeypatch.setattr(file_proof, "differences", differences)
    with pytest.raises(ExportError, match="another shape"):
        optimize_file(net(tmp_path), tmp_path / "b.onnx", channels=False, latency=False, batches=(16,))
    assert len(calls) == 2 and not (tmp_path / "b.onnx").exists()


def test_measured_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best form of each of the three best groups is timed, and all of the best, with the bias that an Add holds."""
    from fxsparse.exporters import file_choose

    b = Builder()
    b.input("x", ["batch", 128], TensorProto.FLOAT)
    weights = [b.constant(shared(b.random, 512, 128, 64, 10).T.astype(np.float32)) for _ in range(2)]
    shift = b.constant(b.random.standard_normal(512).astype(np.float32))
    made = [b.node("MatMul", ["x", weight]) for weight in (*weights, weights[0])]
    proto = b.proto(b.node("Add", [made[0], shift]), made[1], b.node("Add", [made[2], shift]))
    timed: list[Any] = []
    asked: list[Any] = []
    right = file_choose._measured

    def measured(model: Any, layer: Layer, supports: list[Support], *rest: Any) -> list[float]:
        asked.append([support.key for support in supports])
        return right(model, layer, supports, *rest)

    def interleaved(calls: Any, seconds: float) -> dict[str, list[float]]:
        outputs = [calls[name]()[0] for name in calls]
        for other in outputs[1:]:
            np.testing.assert_allclose(other, outputs[0], rtol=0, atol=1e-5 * np.abs(outputs[0]).max())
        timed.append(len(outputs))
        return {name: [10.0 / (i + 1)] * 4 for i, name in enumerate(calls)}

    monkeypatch.setattr(file_choose, "interleaved", interleaved)
    monkeypatch.setattr(file_choose, "_measured", measured)
    choice = choose(model_of(proto), [{"x": np.zeros((4, 128), np.float32)}], measure=True, threads=1)
    assert timed == [6, 5]  # dense and lowered ones; the third layer is like the first, the second has no bias
    for keys, others in zip(asked, ([INSIDE, PRODUCT], [PRODUCT]), strict=True):
        assert len({key[:3] for key in keys[:3]}) == 3 and [key[3:] for key in keys] == [CONV] * 3 + others
        assert all(key[:3] == keys[0][:3] for key in keys[3:])
    supports = [support for _, support in choice.lowered.values()]
    assert [(support.as_conv, support.inside) for support in supports] == [PRODUCT] * 3  # the last is the fastest
    assert [report.gain for report in choice.reports] == pytest.approx([6.0, 5.0, 6.0])
    assert all(report.measured for report in choice.reports)


def test_a_key_names_one_support() -> None:
    random = np.random.default_rng(0)
    for weight in (shared(random, 64, 40, 16, 6), shared(random, 64, 40, 8, 6)[random.permutation(64)]):
        found = supports_of(Layer(ir.node("MatMul", []), "w", weight != 0))
        assert len({support.key for support in found}) == len(found) > 0


@pytest.mark.parametrize("bias", BIASES)
def test_onnxruntime_takes_the_bias_of_a_convolution(bias: str) -> None:
    random = np.random.default_rng(0)
    b = Builder()
    b.input("x", ["batch", 24], TensorProto.FLOAT)
    shift = random.standard_normal(BIASES[bias]).astype(np.float32)
    proto = b.proto(gemm(b, "x", shared(random, 32, 24, 8, 4).astype(np.float32), shift))
    feed = {"x": random.standard_normal((5, 24)).astype(np.float32)}
    (expected,), (got,) = (
        open_session(to_bytes(model)).run(None, feed) for model in (model_of(proto), lowered(proto, CONV))
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_a_product_whose_sizes_nobody_wrote_down() -> None:
    b = rows("batch", 3, 24)
    proto = b.proto(b.node("MatMul", ["x", b.constant(shared(b.random, 32, 24, 8, 4).T)]))
    model = model_of(proto)
    (node,) = model.graph
    node.outputs[0].shape = None
    layer = layer_of(node)
    assert layer is not None
    Lowering(model, {node: (layer, supports_of(layer)[0])}).run()
    model.graph.outputs[0].shape = ir.Shape(["batch", 3, 32])
    remove_unused(model.graph)
    assert_equal(proto, model, feeds((1, 3, 24), (4, 3, 24)))
