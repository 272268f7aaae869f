"""What an export is made for: the runtime and its numbers, what to optimise, which axes stay free."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from fxsparse.errors import ConfigError


class Exporter(enum.Enum):
    """How the graph was taken from Python."""

    EXPORT = "torch.export"
    """``torch.onnx.export(dynamo=True)``."""
    TRACE = "legacy exporter"
    """``torch.onnx.export(dynamo=False)``: a trace of the example, accepted only after verification."""


class Target(enum.Enum):
    """The runtime that a file is made for."""

    STOCK = "stock"
    """onnxruntime as it is installed, standard operators, float tensors with zeros."""
    INT8 = "int8"
    """onnxruntime, 8-bit weights and activations (static QDQ), calibrated on the user's data."""
    INT8_DYNAMIC = "int8-dynamic"
    """onnxruntime, 8-bit weights; the ranges of the activations are found at each call."""
    TENSORRT = "tensorrt"
    """TensorRT: float tensors in their own layout with their 2:4 zeros; layers are neither lowered nor, by default,
    compacted."""

    @property
    def is_int8(self) -> bool:
        """Whether weights are 8-bit."""
        return self in (Target.INT8, Target.INT8_DYNAMIC)


class Optimize(enum.Enum):
    """What the autotuner makes small."""

    LATENCY = "latency"
    """The time of a call on the example inputs, measured in onnxruntime on one thread."""
    SIZE = "size"
    """The bytes of the file."""


class Dynamic(enum.Enum):
    """Which axes of the inputs are free in the file, unless they are named one by one."""

    FIXED = "fixed"
    """None: the shapes of the example."""
    BATCH = "batch"
    """Axis 0 of the inputs that share the example's batch size."""
    SEQUENCE = "sequence"
    """The batch, and axis 1 where the model runs at another length of it."""


class Calibrate(enum.Enum):
    """How the range of an activation is found in the calibration data."""

    MINMAX = "MinMax"
    ENTROPY = "Entropy"
    PERCENTILE = "Percentile"


@dataclass(frozen=True)
class Int8:
    """Options of the 8-bit targets.

    Attributes:
        max_error: largest relative error of any floating output, ||int8 - float|| / ||float|| over all calibration
            samples; a file beyond it is not written.
        min_agreement: smallest share of samples, in [0, 1], on which the largest entry of an output over its last axis
            (the class, where the output is logits) is the one of the float model, of every output of 2 or 3 axes.
        exclude: paths of modules or names of parameters, or wildcards of them, whose products stay float.
        per_channel: whether every output channel of a weight has its own scale.
        method: how the ranges of activations are found (static only).
        reduce_range: 7-bit weights, against overflow on processors without 8-bit dot products.
        batches: items of the calibration data that are read at most.

    Raises:
        ConfigError: for a value out of range.
    """

    max_error: float = 0.1
    min_agreement: float = 0.0
    exclude: tuple[str, ...] = ()
    per_channel: bool = True
    method: Calibrate = Calibrate.MINMAX
    reduce_range: bool = False
    batches: int = 256

    def __post_init__(self) -> None:
        if not 0.0 < self.max_error < float("inf"):
            raise ConfigError(f"`max_error` (={self.max_error}) must be positive: it is relative to the output")
        if not 0.0 <= self.min_agreement <= 1.0:
            raise ConfigError(f"`min_agreement` (={self.min_agreement}) must be in [0, 1]: a share of the samples")
        if self.batches < 1:
            raise ConfigError(f"`batches` (={self.batches}) must be at least 1")
        if not isinstance(self.exclude, tuple) or not all(isinstance(name, str) for name in self.exclude):
            raise ConfigError(f"`exclude` (={self.exclude!r}) must be a tuple of paths, ('head',) for one")
        if not isinstance(self.method, Calibrate):
            raise ConfigError(f"`method` (={self.method!r}) must be one of {', '.join(map(str, Calibrate))}")
