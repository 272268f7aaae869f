"""The forms into which a layer can be lowered, and who chooses one."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn


class Form(enum.Enum):
    """What a layer with a sparse weight becomes."""

    DENSE = "dense"
    """The layer stays as it is; dead weights are zeros."""
    GATHER_MATMUL = "gather + batched product"
    """Rows of the feature-major input are gathered per group, then one batched product of dense blocks."""
    GATHER_CONV = "gather + grouped convolution"
    """Channels are gathered per group, then one convolution with a group of its own for each."""


@dataclass(frozen=True)
class Layer:
    """What is known about one weight when its form is chosen.

    Attributes:
        name: The weight's parameter name.
        kind: "linear" or "conv".
        shape: The shape of the weight.
        inputs: Shapes of the inputs of all uses, on the example inputs.
        columns: Columns of the product on the example inputs, of all uses: samples, times tokens or output pixels.
        density: Alive fraction of the weight.
        forms: The legal forms, DENSE first.
        reason: Why only DENSE is legal; empty where others are.
        kernel: Offsets of the kernel; 1 for a linear layer.
        groups: Groups of the lowered form; 0 where there is none, as in what follows.
        group: Rows of a group.
        k: Positions that a group reads, the mean over all groups, padding included.
        batches: Products among which the groups are divided.
        macs: Multiply-accumulates per column and kernel offset, padding included.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    columns: int
    density: float
    forms: tuple[Form, ...] = (Form.DENSE,)
    reason: str = ""
    kernel: int = 1
    groups: int = 0
    group: int = 0
    k: float = 0.0
    batches: int = 0
    macs: int = 0

    @property
    def weights(self) -> int:
        """Entries of the weight."""
        return math.prod(self.shape)


Policy: TypeAlias = Callable[[Layer], Form]
"""Chooses one of `Layer.forms`."""


@dataclass(frozen=True)
class LayerRecord:
    """What was done with one weight, and why.

    Attributes:
        name: The weight's parameter name.
        form: What it became.
        layer: What was known about it.
        what: What was done, in words.
        reason: Why: where it stays dense, "no speed-up expected: ...".
        gain: Expected time of the dense layer over that of this form (1.0 where it stays dense).
        tensors: Names of the parameters and buffers that hold the lowered weight.
    """

    name: str
    form: Form
    layer: Layer
    what: str
    reason: str
    gain: float = 1.0
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        tail = f" (expected {self.gain:.1f}x)" if self.form is not Form.DENSE else ""
        return f"{self.name}: {self.what}{tail}; {self.reason}"


@dataclass(frozen=True)
class LoweringResult:
    """A lowered model.

    Attributes:
        model: The lowered model in eval form; where nothing was lowered, a copy of the input without masks.
        records: One for each weight of a linear layer or convolution, in the model's order.
        notes: What was compared, and what was found on the way.
        worst: Largest difference of an output in float64, relative to the largest value of that output.
    """

    model: nn.Module
    records: tuple[LayerRecord, ...]
    notes: tuple[str, ...] = ()
    worst: float = 0.0

    @property
    def forms(self) -> Mapping[str, Form]:
        """Weight's name -> its form."""
        return {record.name: record.form for record in self.records}

    def __str__(self) -> str:
        return "\n".join([*map(str, self.records), *self.notes])
