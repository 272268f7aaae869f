"""Rules of ONNX operators in their less usual forms: what they read together, scale, count or shift."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from fxsparse.exporters.file_channels import remove_channels
from tests.exporters.file_cases import Builder, assert_equal, model_of, shapes_of
from tests.exporters.test_file_channels import BIAS, IMAGES, ROWS, first, image, last, removed, rows


def columns(b: Builder, name: str, perm: list[int], width: int = 6) -> str:
    """A product over the channels, which are turned to the end."""
    turned = b.node("Transpose", [name], perm=perm)
    return str(b.node("MatMul", [turned, b.constant(b.weight(width, 3), "v")]))


@pytest.mark.parametrize(("multiple", "left"), [(1, 17), (8, 17), (16, 17), (5, 20), (4, 20)])
def test_channels_that_were_no_multiple_need_not_stay_one(multiple: int, left: int) -> None:
    b = image()
    hidden = b.node("Conv", ["x", b.constant(b.weight(20, 4, 1, 1, dead=range(3)), "w")])
    proto = b.proto(b.node("Conv", [hidden, b.constant(b.weight(3, 20, 1, 1), "v")]))
    model = model_of(proto)
    remove_channels(model, multiple)
    assert_equal(proto, model, IMAGES)
    assert sorted(shapes_of(model).values()) == sorted([(left, 4, 1, 1), (3, left, 1, 1)])


def test_a_cast_to_whole_numbers_rounds_constants() -> None:
    b = image()
    whole = b.node("Cast", [first(b, bias=BIAS)], to=TensorProto.INT64)
    _, found = removed(b.proto(last(b, b.node("Cast", [whole], to=TensorProto.DOUBLE), 6)), IMAGES)
    assert found.channels == 0


def test_the_mask_of_a_dropout_has_all_channels() -> None:
    b = image()
    kept, mask = b.node("Dropout", [first(b)], 2)
    told = b.node("Cast", [mask], to=TensorProto.DOUBLE)
    _, found = removed(b.proto(last(b, kept, 6), told), IMAGES)
    assert found.channels == 0 and "draws at random" in str(found.stops[0])
    b = image()
    kept, _ = b.node("Dropout", [first(b)], 2)
    assert removed(b.proto(last(b, kept, 6)), IMAGES)[1].channels == 2


def test_a_split_without_sizes_gives_the_last_part_what_is_left() -> None:
    b = image()
    parts = b.node("Split", [first(b, out=7, dead=(1, 6))], 3, axis=1, num_outputs=3)  # 3, 3 and 1
    joined = b.node("Concat", [parts[2], parts[0], parts[1]], axis=1)
    _, found = removed(b.proto(last(b, joined, 7)), IMAGES)
    assert found.channels == 1  # the part of one keeps it


def test_a_mean_over_an_axis_before_the_channels_moves_them() -> None:
    b = image()
    mean = b.node("ReduceMean", [first(b, bias=BIAS), b.constant(np.array([0]))], keepdims=0)
    _, found = removed(b.proto(columns(b, mean, [1, 2, 0])), IMAGES)
    assert found.weights["v"] == ((6, 3), (4, 3))
    b = image()
    mean = b.node("ReduceMean", [first(b, bias=BIAS), b.constant(np.array([2]))], keepdims=0)
    assert removed(b.proto(columns(b, mean, [0, 2, 1])), IMAGES)[1].weights["v"] == ((6, 3), (4, 3))


def test_a_resize_that_reaches_beyond_the_image_makes_no_constants() -> None:
    b = image()
    region, scales = np.array([0, 0, 0, 0, 1, 1, 1.5, 1.5]), np.array([1, 1, 2, 2], np.float32)
    bigger = b.node("Resize", [first(b, bias=BIAS), b.constant(region), b.constant(scales)], mode="linear",
                    coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=3.0)  # fmt: skip
    _, found = removed(b.proto(last(b, bigger, 6)), IMAGES)
    assert found.channels == 0


@pytest.mark.parametrize("scaled", [{"beta": 0.5}, {"alpha": 2.0}, {"alpha": 0.5, "beta": 0.5}])
def test_a_scaled_product_with_a_bias_holds_its_channels(scaled: dict[str, float]) -> None:
    b = rows()
    operands = ["x", b.constant(b.weight(4, 6, dead=(1, 4), axis=1), "w"), b.constant(np.array(BIAS))]
    hidden = b.node("Sigmoid", [b.node("Gemm", operands, **scaled)])
    _, found = removed(b.proto(b.node("Gemm", [hidden, b.constant(b.weight(6, 3), "v")])), ROWS)
    assert found.channels == 0


def test_a_bias_that_varies_over_rows_makes_no_constants() -> None:
    b = Builder()
    b.input("x", [3, 4])
    bias = b.constant(np.arange(18.0).reshape(3, 6))
    hidden = b.node("Gemm", ["x", b.constant(b.weight(4, 6, dead=(1, 4), axis=1), "w"), bias])
    proto = b.proto(b.node("Gemm", [hidden, b.constant(b.weight(6, 3), "v")]))
    assert removed(proto, ROWS[1:])[1].channels == 0


def test_picking_along_another_axis_moves_channels() -> None:
    b = image()
    one = b.node("Gather", [first(b, bias=BIAS), b.constant(np.array(0))], axis=0)
    assert removed(b.proto(columns(b, one, [1, 2, 0])), IMAGES)[1].weights["v"] == ((6, 3), (4, 3))
    b = image()
    four = b.node("Gather", [first(b, bias=BIAS), b.constant(np.array([[0, 0], [-1, 0]]))], axis=0)
    assert removed(b.proto(columns(b, four, [0, 1, 3, 4, 2])), IMAGES)[1].weights["v"] == ((6, 3), (4, 3))
    b = image()
    behind = b.node("Gather", [first(b, bias=BIAS), b.constant(np.array(2))], axis=3)
    assert removed(b.proto(columns(b, behind, [0, 2, 1])), IMAGES)[1].weights["v"] == ((6, 3), (4, 3))
