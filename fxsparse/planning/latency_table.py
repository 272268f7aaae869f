"""Latencies of products at several widths, interpolated between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from fxsparse.errors import ConfigError
from fxsparse.graph.channels_products import ProductKey


@dataclass(frozen=True)
class LatencyGrid:
    """The latency of one product at several numbers of channels.

    Attributes:
        inputs: numbers of input channels, ascending; empty for a grouped convolution, whose inputs go with its outputs.
        outputs: numbers of output channels, ascending.
        seconds: for every number of inputs (one row where there are none) the seconds at every number of outputs.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        table = np.array(self.seconds, dtype=np.float64)
        shape = (max(len(self.inputs), 1), len(self.outputs))
        if table.shape != shape:
            raise ConfigError(f"`seconds` of shape (={table.shape}) must be {shape}: one row per number of inputs")
        if not np.isfinite(table).all() or (table <= 0).any():
            raise ConfigError(f"`seconds` (={self.seconds}) must be positive and finite")
        for name, widths in (("inputs", self.inputs), ("outputs", self.outputs)):
            if list(widths) != sorted(set(widths)) or any(width < 1 for width in widths):
                raise ConfigError(f"`{name}` (={widths}) must ascend from at least 1")

    def at(self, inputs: int, outputs: int) -> float:
        """Seconds at these widths: linear between those measured, and as at the smallest below it.

        More channels never take less: where a measurement says so, the larger of the two holds.
        """
        table = np.maximum.accumulate(np.maximum.accumulate(np.array(self.seconds), axis=0), axis=1)
        row = np.array([np.interp(outputs, self.outputs, each) for each in table])
        return float(np.interp(inputs, self.inputs, row)) if self.inputs else float(row[0])


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Measured latencies of the products of a model.

    Attributes:
        grids: what was measured, by product.
        runtime: what ran them, in words.
    """

    grids: Mapping[ProductKey, LatencyGrid]
    runtime: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "grids", MappingProxyType(dict(self.grids)))

    def seconds(self, key: ProductKey, inputs: int, outputs: int) -> float:
        """Seconds of one product with fewer channels.

        Raises:
            ConfigError: a product that was not measured.
        """
        if key not in self.grids:
            raise ConfigError(f"`table` has no entry for {key}: measure it on this model and these example inputs")
        return self.grids[key].at(inputs, outputs)
