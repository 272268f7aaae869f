"""What a model costs when channels go: parameters, multiply-accumulates, latency, channels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fxsparse.errors import ConfigError
from fxsparse.graph.channels import Channels
from fxsparse.graph.channels_atoms import Labels
from fxsparse.graph.channels_products import WeightProduct, weight_products
from fxsparse.planning.latency_table import LatencyTable

Bools = npt.NDArray[np.bool_]


class Costs:
    """Costs of one model, as functions of the classes of channels that go.

    Args:
        channels: its channels.
        shapes: its parameters, by first name.
        counted: the classes that count as channels.
    """

    def __init__(self, channels: Channels, shapes: Mapping[str, Sequence[int]], counted: Labels) -> None:
        self.channels, self.counted = channels, counted
        self.products: tuple[WeightProduct, ...] = weight_products(channels, shapes)
        self._arrays: list[Labels] = []
        self._places: dict[int, int] = {}
        self._parameters = [self._parameter(name, shape) for name, shape in shapes.items()]
        self._factors = [(p.fixed, [self._place(labels) for labels in p.factors]) for p in self.products]
        self._ends = [
            tuple(None if e is None else self._place(e) for e in (p.inputs, p.outputs)) for p in self.products
        ]
        lengths = [labels.size for labels in self._arrays]
        self._starts = np.cumsum([0, *lengths[:-1]]) if lengths else np.zeros(0, dtype=np.int64)
        self._flat = np.concatenate([channels.classes[labels] for labels in self._arrays]) if lengths else None

    def _place(self, labels: Labels) -> int:
        if id(labels) not in self._places:
            self._places[id(labels)] = len(self._arrays)
            self._arrays.append(labels)
        return self._places[id(labels)]

    def _parameter(self, name: str, shape: Sequence[int]) -> tuple[int, list[int]]:
        dims = self.channels.sources.get(name, (None,) * len(shape))
        fixed, places = 1, []
        for size, labels in zip(shape, dims, strict=True):
            if labels is None:
                fixed *= size
            else:
                places.append(self._place(labels))
        return fixed, places

    def sizes(self, removed: Bools) -> npt.NDArray[np.int64]:
        """How many of each distinct dimension stay."""
        if self._flat is None:
            return np.zeros(0, dtype=np.int64)
        result: npt.NDArray[np.int64] = np.add.reduceat((~removed[self._flat]).astype(np.int64), self._starts)
        return result

    def prunable(self, removed: Bools) -> int:
        """Counted channels that stay."""
        return int((~removed[self.counted]).sum())

    def parameters(self, removed: Bools) -> int:
        """Elements of all parameters."""
        return _total(self._parameters, self.sizes(removed))

    def macs(self, removed: Bools) -> int:
        """Multiply-accumulates of all products with weights, on the example inputs."""
        return _total(self._factors, self.sizes(removed))

    def latency(self, removed: Bools, table: LatencyTable) -> float:
        """Seconds of all products that the table can tell, added up.

        Raises:
            ConfigError: a product that was not measured.
        """
        sizes, seconds = self.sizes(removed), 0.0
        known: dict[tuple[object, int, int], float] = {}
        for product, (inputs, outputs) in zip(self.products, self._ends, strict=True):
            if product.key is None:
                continue
            before = product.key.channels
            i = before[0] if inputs is None else int(sizes[inputs])
            o = before[1] if outputs is None else int(sizes[outputs])
            entry = (product.key, i, o)
            if entry not in known:
                known[entry] = table.seconds(product.key, i, o)
            seconds += known[entry]
        return seconds

    def check(self, table: LatencyTable) -> None:
        """Raise ConfigError unless the table has all products and there is one."""
        if not any(product.key is not None for product in self.products):
            raise ConfigError("the model has no product whose latency can be measured: use a budget of parameters")
        self.latency(np.zeros(self.channels.classes.size, dtype=bool), table)


def _total(terms: Sequence[tuple[int, list[int]]], sizes: npt.NDArray[np.int64]) -> int:
    return sum(fixed * math.prod(int(sizes[place]) for place in places) for fixed, places in terms)
