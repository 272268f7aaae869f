"""What shows that two ONNX models are equal: the comparison itself, the float64 copies, and what they run in."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from fxsparse.errors import ConfigError, ExportError
from fxsparse.exporters import optimize_file, verify_file
from fxsparse.exporters.file_compare import Difference, blind, check_equal, difference
from fxsparse.exporters.file_double import _reference, double, runner_of
from fxsparse.exporters.file_wire import hollow, write_model
from tests.exporters.file_cases import Builder, model_of

NONE = Difference()


def of(expected: Any, got: Any) -> Difference:
    return difference([np.asarray(expected)], [np.asarray(got)])


def test_differences_are_relative_to_the_largest_value() -> None:
    found = of([1.0, -4.0], [1.5, -4.0])
    assert (found.absolute, found.relative, found.unequal) == (0.5, 0.125, 0)
    assert of([0.0, 0.0], [0.0, 1e-30]).relative == np.inf  # of zeros alone nothing may differ
    assert of([0.0, 0.0], [0.0, 0.0]) == NONE
    assert of([1, 2, 3], [1, 0, 0]).unequal == 2


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        ([np.nan, 1.0], [np.nan, 1.0], True),
        ([np.inf, 1.0], [np.inf, 1.0], True),
        ([np.inf, 1.0], [-np.inf, 1.0], False),
        ([np.nan, 1.0], [np.inf, 1.0], False),
        ([0.0, 1.0], [np.nan, 1.0], False),
        ([np.nan, 1.0], [0.0, 1.0], False),
        ([1.0, 2.0], [1.0, np.inf], False),
    ],
)
def test_what_is_no_number_has_to_be_the_same(expected: list[float], got: list[float], same: bool) -> None:
    assert of(expected, got).relative == (0.0 if same else np.inf)


@pytest.mark.parametrize(
    ("single", "exact", "fits"),
    [
        (Difference(1.0, 1e-5), None, True),
        (Difference(1.0, 1e-3), None, False),
        (Difference(1.0, np.nan), None, False),
        (Difference(unequal=1), None, False),  # nothing says that it is a near tie
        (Difference(unequal=1), NONE, True),
        (NONE, Difference(unequal=1), False),
        (NONE, Difference(1.0, 1e-13), True),
        (NONE, Difference(1.0, 1e-11), False),
        (NONE, Difference(1.0, np.nan), False),
    ],
)
def test_what_is_allowed(single: Difference, exact: Difference | None, fits: bool) -> None:
    if fits:
        check_equal(single, 1e-4, exact)
    else:
        with pytest.raises(ExportError, match="verification failed"):
            check_equal(single, 1e-4, exact)


def test_operands_that_an_operator_takes_in_float32_only_stay_so_in_the_float64_copy() -> None:
    b = Builder()
    b.input("x", ["batch", 2, 3, 3], TensorProto.FLOAT)
    scales = b.constant(np.array([1, 1, 2, 2], np.float32))
    wide = double(model_of(b.proto(b.node("Resize", ["x", "", scales], mode="linear"))))
    resize = next(node for node in wide.graph if node.op_type == "Resize")
    assert resize.inputs[0].dtype == ir.DataType.DOUBLE and resize.inputs[2].producer().op_type == "Cast"  # type: ignore[union-attr]
    onnx.checker.check_model(ir.to_proto(wide), full_check=True)
    x = np.random.default_rng(0).standard_normal((1, 2, 3, 3))
    with runner_of(wide) as runner:
        found = runner.run(None, {"x": x})[0]
    assert found.dtype == np.float64 and found.shape == (1, 2, 6, 6)


CONVOLUTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"pads": [1, 0, 2, 1]},
    {"dilations": [2, 1], "strides": [1, 2]},
    {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
    {"auto_pad": "SAME_LOWER"},
    {"auto_pad": "VALID", "strides": [2, 1]},
    {"group": 2, "pads": [1, 1, 1, 1]},
)


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("size", [(2, 3), (4, 2)])
def test_convolutions_of_the_float64_run(options: dict[str, Any], size: tuple[int, int]) -> None:
    b = Builder()
    b.input("x", [2, 4, 7, 6])
    weight = b.constant(b.weight(6, 4 // options.get("group", 1), *size))
    proto = b.proto(b.node("Conv", ["x", weight, b.constant(b.weight(6))], **options))
    x = np.random.default_rng(0).standard_normal((2, 4, 7, 6))
    expected = ReferenceEvaluator(proto).run(None, {"x": x})[0]
    found = _reference(proto.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_a_message_beyond_two_gigabytes_is_refused_before_anything_is_written() -> None:
    def never() -> ir.Tensor:
        raise AssertionError("its content is not asked for")

    b = Builder()
    b.input("x", ["batch", 2], TensorProto.FLOAT)
    model = ir.from_proto(b.proto(b.node("Relu", ["x"])))
    shape = ir.Shape([2**29])
    tensor = ir.LazyTensor(never, dtype=ir.DataType.FLOAT, shape=shape, name="w")
    model.graph.register_initializer(
        ir.Value(name="w", const_value=tensor, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    )
    file = io.BytesIO()
    with pytest.raises(ValueError, match="larger than ONNX takes"):
        write_model(model, hollow(model), file)
    assert file.getvalue() == b""


def test_outputs_without_a_finite_number_show_nothing() -> None:
    nan, some = np.full((2, 3), np.nan), np.array([[np.nan, np.inf, 1.0]])
    assert blind([[nan, some], [np.full((2, 3), np.inf), nan[:1]]]) == (0,)
    assert blind([[some, np.zeros((0, 3))], [nan, np.zeros((0, 3))]]) == ()
    assert blind([[nan, np.array([1, 2])]]) == (0,)  # whole numbers are always something
    assert blind([[np.zeros((0, 3))]]) == () and blind([]) == ()
    with pytest.raises(ExportError, match="hold no finite number on random inputs"):
        blind([[nan, nan], [nan, nan]])


def nan_file(path: Path, both: bool) -> Path:
    b = Builder()
    b.input("x", ["batch", 4], TensorProto.FLOAT)
    made = b.node("MatMul", ["x", b.constant(np.eye(4, dtype=np.float32)[:, :3])])
    bad = b.node("Log", [b.node("Sub", [b.constant(np.float32(-1)), b.node("Abs", [made])])])
    onnx.save(b.proto(*([made] if both else []), bad), path)
    return path


def test_a_file_whose_outputs_are_not_finite_is_refused_or_named(tmp_path: Path) -> None:
    source = nan_file(tmp_path / "a.onnx", both=False)
    with pytest.raises(ExportError, match="no finite number"):
        optimize_file(source, tmp_path / "b.onnx", latency=False)
    assert not (tmp_path / "b.onnx").exists()
    assert verify_file(source, source).passed is False
    assert optimize_file(source, tmp_path / "b.onnx", latency=False, verify=False).verification is None
    both = nan_file(tmp_path / "c.onnx", both=True)
    proof = optimize_file(both, tmp_path / "d.onnx", latency=False).verification
    assert proof is not None and proof.blind == (1,) and "nothing is shown of output 1" in str(proof)
    verdict = verify_file(tmp_path / "d.onnx", both)
    assert verdict.passed and "nothing of output 1" in str(verdict)


@pytest.mark.parametrize("tolerance", [-1e-9, float("nan"), float("inf")])
def test_a_tolerance_that_is_none(tmp_path: Path, tolerance: float) -> None:
    source = nan_file(tmp_path / "a.onnx", both=True)
    with pytest.raises(ConfigError, match="`tolerance`"):
        optimize_file(source, tmp_path / "b.onnx", tolerance=tolerance)
    with pytest.raises(ConfigError, match="`tolerance`"):
        verify_file(source, source, tolerance=tolerance)
    assert verify_file(source, source, tolerance=0.0).passed


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"none\.onnx\): there is no such file"):
        optimize_file(tmp_path / "none.onnx", tmp_path / "b.onnx")
