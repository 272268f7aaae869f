"""A float ONNX file -> one with 8-bit weights, by onnxruntime's quantizer: static (QDQ, calibrated) or dynamic."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fxsparse.errors import ConfigError, ExportError
from fxsparse.exporters.inputs import first_line
from fxsparse.exporters.program import quiet
from fxsparse.exporters.quantize_graph import (
    KERNEL,
    Product,
    convolve_left_products,
    products_of,
    sums_outside_convolutions,
)
from fxsparse.exporters.runtime import open_session
from fxsparse.exporters.targets import Int8, Target

_MOVES = (
    *("Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Add", "Reshape", "Transpose", "Squeeze"),
    *("Unsqueeze", "Flatten", "Gather", "Split", "Slice", "Concat", "Pad", "Resize"),
)
"""Operators that work on 8-bit numbers as they are, so that a chain of products stays 8-bit."""

_STATIC = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_DYNAMIC = ("Gemm", "MatMul")
_TRIES = 20


@dataclass(frozen=True)
class Quantized:
    """What was made 8-bit in a file.

    Attributes:
        target: static or dynamic.
        products: products with a constant operand (node names) that are 8-bit now.
        kept: those that stay float, with the reason.
        weights: initializer of a product -> whether that product is 8-bit; names as in the float file.
    """

    target: Target
    products: tuple[str, ...]
    kept: Mapping[str, str]
    weights: Mapping[str, bool]

    def __str__(self) -> str:
        total = len(self.products) + len(self.kept)
        reasons = "; ".join(sorted(set(self.kept.values())))
        return f"{len(self.products)} of {total} products are 8-bit" + (f"; float: {reasons}" if reasons else "")


def quantize(
    source: Path,
    file: Path,
    target: Target,
    feeds: Iterable[Mapping[str, Any]],
    options: Int8,
    keep: Mapping[str, str] | None = None,
) -> Quantized:
    """Write an 8-bit twin of a float file, which onnxruntime loads.

    Products with a constant operand (Conv, Gemm, MatMul; dynamic: no Conv, which has no fast kernel there) become
    8-bit, and static also what lies between them; products of two activations, as in attention, stay float. What
    onnxruntime cannot make 8-bit stays float, with its reason.

    Args:
        source: the float file.
        file: where to write, in an existing folder.
        target: `Target.INT8` or `Target.INT8_DYNAMIC`.
        feeds: for the static one: input arrays by name.
        options: see `Int8`.
        keep: initializer of a product that stays float -> reason.

    Raises:
        ConfigError: `exclude` names nothing in the file.
        ExportError: no product can be 8-bit, or onnxruntime refuses the result.
    """
    import onnx

    proto = onnx.load(source)
    proto.graph.ClearField("value_info")  # the quantizer transposes weights, and would find their old shapes
    kept = _kept(products_of(proto), target, options, dict(keep or {}))
    if target is Target.INT8:
        convolve_left_products(proto, skip=kept)
    products = products_of(proto)
    prepared = file.with_name(f"{file.name}.float.onnx")
    collected = list(feeds)
    try:
        for _ in range(_TRIES):
            if all(product.node in kept for product in products):
                break
            onnx.save(proto, prepared)
            culprit = _try(prepared, file, target, collected, options, products, kept)
            if culprit is None:
                return _result(target, products, kept)
            kept |= culprit
    finally:
        prepared.unlink(missing_ok=True)
    reasons = "; ".join(sorted(set(kept.values()))) or "it has no product of float32 numbers with a constant operand"
    raise ExportError(f"no layer of the model can be 8-bit ({reasons}): export it with Target.STOCK")


def _kept(products: Sequence[Product], target: Target, options: Int8, keep: Mapping[str, str]) -> dict[str, str]:
    """The products that stay float from the start, by node name."""
    operators = _STATIC if target is Target.INT8 else _DYNAMIC
    kept: dict[str, str] = {}
    for product in products:
        if product.operator not in operators:
            kept[product.node] = f"{product.operator} has no fast 8-bit kernel for dynamic ranges"
        elif product.weight in keep:
            kept[product.node] = keep[product.weight]
        elif target is Target.INT8_DYNAMIC and product.left:
            kept[product.node] = "the constant is the left operand, which dynamic ranges do not take"
    for pattern in options.exclude:
        found = [product.node for product in products if _names(product, pattern)]
        if not found:
            known = ", ".join(sorted({product.weight for product in products})[:20])
            raise ConfigError(f"`exclude` (={pattern!r}) names no product of the file; its weights are {known}")
        kept |= dict.fromkeys(found, "named in `exclude`")
    return kept


def _names(product: Product, pattern: str) -> bool:
    paths = [product.weight, product.module]
    return any(fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*") for path in paths if path)


def _try(
    source: Path,
    file: Path,
    target: Target,
    feeds: Sequence[Mapping[str, Any]],
    options: Int8,
    products: Sequence[Product],
    kept: Mapping[str, str],
) -> dict[str, str] | None:
    """Quantize and load; None on success, else the product that has to stay float."""
    try:
        _run(source, file, target, feeds, options, products, kept)
        session = open_session(file)
        if feeds:
            session.run(None, dict(feeds[0]))
        return None
    except OSError:
        raise
    except Exception as error:  # the quantizer and onnxruntime raise whatever they meet
        names = re.findall(r"[Nn]ame:\s*'([^']+)'|node \(([^)]+)\)", str(error))
        said = {name.removesuffix("_quant") for pair in names for name in pair}
        blamed = [p.node for p in products if p.node not in kept and p.node in said]
        if not blamed:
            raise ExportError(
                f"onnxruntime cannot make this model 8-bit ({first_line(error)}): name the layers that it stops at in "
                "`exclude`, or export it with Target.STOCK"
            ) from error
        return dict.fromkeys(blamed[:1], f"onnxruntime refuses its 8-bit form ({first_line(error)[:120]})")


def _run(
    source: Path,
    file: Path,
    target: Target,
    feeds: Sequence[Mapping[str, Any]],
    options: Int8,
    products: Sequence[Product],
    kept: Mapping[str, str],
) -> None:
    import onnx
    from onnxruntime import quantization

    common: dict[str, Any] = {
        "per_channel": options.per_channel,
        "reduce_range": options.reduce_range,
        "weight_type": quantization.QuantType.QInt8,
    }
    if target is Target.INT8_DYNAMIC:
        with _silent():
            quantization.quantize_dynamic(
                source, file, op_types_to_quantize=list(_DYNAMIC), nodes_to_exclude=list(kept), **common
            )
        return
    proto = onnx.load(source)
    activations = _activation_products(proto, products)
    outside = sums_outside_convolutions(proto)
    extra: dict[str, Any] = {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]}
    whole = {p.weight: [{"quant_type": quantization.QuantType.QInt8}] for p in products if p.rank > 2 and p.is_matmul}
    if whole:  # batched products take one scale for the whole constant
        extra["TensorQuantOverrides"] = whole
    with _silent():
        quantization.quantize_static(
            source,
            file,
            _reader(feeds),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=[*_STATIC, *_MOVES],
            nodes_to_exclude=[*kept, *activations, *outside],
            activation_type=quantization.QuantType.QUInt8,
            calibrate_method=quantization.CalibrationMethod[options.method.value],
            extra_options=extra,
            **common,
        )


def _activation_products(proto: Any, products: Sequence[Product]) -> list[str]:
    """Products without a constant operand."""
    constant = {product.node for product in products}
    return [node.name for node in proto.graph.node if node.op_type in _STATIC and node.name not in constant]


def _result(target: Target, products: Sequence[Product], kept: Mapping[str, str]) -> Quantized:
    done = tuple(product.node for product in products if product.node not in kept)
    weights = {product.weight.removesuffix(KERNEL): product.node not in kept for product in products}
    return Quantized(target, done, dict(kept), weights)


def _reader(feeds: Sequence[Mapping[str, Any]]) -> Any:
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # untyped in onnxruntime
        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            found = next(self.left, None)
            return None if found is None else dict(found)

    return Reader()


@contextmanager
def _silent() -> Iterator[None]:
    """Silence the quantizer; its calls of the root logger would give that a handler for good."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        root.addHandler(logging.NullHandler())
        root.setLevel(logging.CRITICAL + 1)
        with quiet():
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
