"""How long a layer takes dense and lowered: the default rule by which forms are chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxsparse.passes.lower_forms import Form, Layer


@dataclass(frozen=True)
class CostRule:
    """Times from measured rates of one thread; only their ratios matter much.

    A product runs at `macs` multiply-accumulates per microsecond when it is large, slower when its blocks are small,
    and no faster than its weight can be read at `bytes` per microsecond. A gather costs `row` for each row and moves
    `copied` bytes per microsecond. Every lowered layer costs `overhead` microseconds more for its nodes.

    Attributes:
        macs: Multiply-accumulates per microsecond.
        bytes: Bytes of a weight per microsecond.
        copied: Bytes gathered per microsecond.
        row: Microseconds per gathered row.
        overhead: Microseconds per lowered layer.
        least: The smallest gain for which a layer is lowered.
    """

    macs: float = 110e3
    bytes: float = 34e3
    copied: float = 40e3
    row: float = 0.005
    overhead: float = 3.0
    least: float = 1.15

    def dense(self, layer: Layer) -> float:
        """Microseconds of the dense layer."""
        work = layer.weights * layer.columns
        return max(work / self.macs, 4 * layer.weights / self.bytes)

    def lowered(self, layer: Layer) -> float:
        """Microseconds of the lowered layer."""
        if not layer.groups:
            return float("inf")
        work = layer.macs * layer.kernel * layer.columns
        inner = layer.k * layer.kernel
        rate = self.macs * layer.group / (layer.group + 24) * inner / (inner + 12)
        product = max(work / rate, 4 * layer.macs * layer.kernel / self.bytes)
        return product + self._gather(layer) + self.overhead * layer.batches

    def _gather(self, layer: Layer) -> float:
        """Microseconds of the gathers: rows of memory, each copied at once."""
        axis = 1 if layer.kind == "conv" else -1
        columns = sum(math.prod(shape) // max(1, shape[axis]) for shape in layer.inputs)
        copies = sum(shape[0] if len(shape) > 2 else 1 for shape in layer.inputs)
        return layer.groups * layer.k * (self.row * copies + 4 * columns / self.copied)

    def gain(self, layer: Layer, form: Form) -> float:
        """Expected time of the dense layer over that of a form."""
        return 1.0 if form is Form.DENSE else self.dense(layer) / self.lowered(layer)

    def __call__(self, layer: Layer) -> Form:
        """The form to take."""
        lowered = [form for form in (Form.GATHER_CONV, Form.GATHER_MATMUL) if form in layer.forms]
        if not lowered or self.gain(layer, lowered[0]) < self.least:
            return Form.DENSE
        return lowered[0]
