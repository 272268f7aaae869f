"""Where channels end: the products that read them, what those need of them, and where a constant can be folded to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from fxsparse.graph.channels import Channels
from fxsparse.graph.channels_atoms import Labels
from fxsparse.graph.channels_flow import bound, op_of, shape_of, tensor_arguments
from fxsparse.graph.channels_recurrent import recurrent_of
from fxsparse.passes import compact_recurrent
from fxsparse.passes.compact_known import Known
from fxsparse.passes.compact_products import blocks, pads

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Fold:
    """Where the contribution of a constant input goes: `sign` times it is added to the parameter or buffer `name`."""

    name: str
    sign: float


@dataclass(frozen=True, eq=False)
class Sink:
    """A product with a weight made of parameters, in groups: out[g, o] = sum_i weight[g, o, i] x[g, i].

    Attributes:
        node: the operator.
        weight: the parameter that is the weight; None where it is derived from several or by an operator.
        axis: the dimension of that parameter along which the inputs lie.
        inputs: labels of the inputs, (groups, in).
        outputs: labels of the outputs, (groups, out).
        alive: which weights are not zero, (groups, out, in).
        columns: the inputs that are a constant other than 0 in any group, ascending.
        total: the weights of those inputs, summed over the taps of a convolution, (groups, out, columns).
        known: which inputs are constant, (groups, in).
        value: those constants.
        fold: where constants go; None = nowhere.
        blocked: why a constant other than zero cannot be folded; "" = it can.
        mergeable: whether the weights of several constants may be added up in one of them: nobody else reads
            them.
    """

    node: fx.Node
    weight: str | None
    axis: int
    inputs: Labels
    outputs: Labels
    alive: Bools
    columns: npt.NDArray[np.int64]
    total: Floats
    known: Bools
    value: Floats
    fold: Fold | None
    blocked: str
    mergeable: bool


@dataclass(frozen=True, eq=False)
class Meeting:
    """Channels read together without a weight: they can go only where `harmless`, because they contribute nothing."""

    node: fx.Node
    labels: Labels
    harmless: Bools
    reason: str


def find_sinks(
    channels: Channels, found: Mapping[fx.Node, Known], through: Collection[str] = ("sum",)
) -> tuple[list[Sink], list[Meeting]]:
    """All the places where channels end, in the order of the graph; mixings of the kinds `through` miss no zeros."""
    finder = Finder(channels, found)
    for graph in channels.graphs:
        for node in graph.graph.nodes:
            if node.op == "call_function":
                finder.visit(node)
    for mixing in channels.flow.mixings:
        axis = next((i for i, d in enumerate(channels.flow.of(mixing.operand)) if d is mixing.labels), None)
        harmless = np.zeros(mixing.labels.size, dtype=bool)
        if mixing.kind in through and axis is not None:
            harmless = finder.zero(mixing.operand, axis, mixing.labels.size)
        finder.meetings.append(Meeting(mixing.node, mixing.labels, harmless, f"is read as a whole by a {mixing.kind}"))
    return finder.sinks, finder.meetings


class Finder:
    """Finds them, node by node.

    Args:
        channels: the channels of a model.
        found: its constants.
    """

    def __init__(self, channels: Channels, found: Mapping[fx.Node, Known]) -> None:
        self.channels, self.flow, self.found = channels, channels.flow, found
        self.sinks: list[Sink] = []
        self.meetings: list[Meeting] = []
        self.readers: dict[str, int] = {}
        self.home: dict[str, fx.Graph] = {}  # the first graph that reads a parameter decides about it
        for graph in channels.graphs:
            for node in graph.graph.find_nodes(op="get_attr"):
                source = graph.source(node)
                if source is not None and self.home.setdefault(source, node.graph) is node.graph:
                    self.readers[source] = self.readers.get(source, 0) + len(node.users)

    def visit(self, node: fx.Node) -> None:
        """Note what ends at one operator."""
        name = op_of(node)
        if name == "linear":
            a = bound(node)
            self._product(node, a["input"], -1, a["weight"], -1, a["bias"])
        elif name in ("matmul", "mm", "bmm", "mv", "dot"):
            left, right = tensor_arguments(node)[:2]
            self._matmul(node, left, right, None)
        elif name == "addmm":
            added, left, right = tensor_arguments(node)[:3]
            self._matmul(node, left, right, added)
        elif "conv" in name and len(node.args) > 1:
            self._conv(node)
        elif name == "einsum":
            self._einsum(node)
        elif name == "bilinear":
            self._bilinear(node)
        elif name == "_grouped_mm":
            a = bound(node)
            self._meet(node, ((a["self"], -1), (a["mat2"], -2)))
        elif (call := recurrent_of(node)) is not None:
            self.sinks += compact_recurrent.sinks(self, node, call)
        elif "scaled_dot_product" in name:
            a = bound(node)
            self._meet(node, ((a["query"], -1), (a["key"], -1)))

    def zero(self, node: fx.Node, axis: int, size: int) -> Bools:
        """Where along an axis a value is known to be 0 everywhere."""
        held = self.found.get(node)
        if held is None:
            return np.zeros(size, dtype=bool)
        axis %= held.value.ndim
        zero = held.zero.broadcast_to(held.value.shape).movedim(axis, 0).reshape(held.value.shape[axis], -1).all(1)
        result: Bools = zero.expand(size).numpy()
        return result

    def static(self, node: fx.Node) -> Tensor | None:
        """The values of what is made of parameters only."""
        held = self.found.get(node)
        return held.stored if held is not None and held.static else None

    def labels(self, node: fx.Node, axis: int) -> Labels:
        """The labels of a dimension; the fixed one where it has none."""
        labels = self.flow.of(node)[axis]
        return np.zeros(shape_of(node)[axis], dtype=np.int64) if labels is None else labels

    def _meet(self, node: fx.Node, operands: tuple[tuple[fx.Node, int], ...]) -> None:
        labels = next((d for o, axis in operands if (d := self.flow.of(o)[axis]) is not None), None)
        if labels is None:
            return
        harmless = np.zeros(labels.size, dtype=bool)
        for operand, axis in operands:
            harmless |= self.zero(operand, axis, labels.size)
        self.meetings.append(Meeting(node, labels, harmless, "is summed over in a product of activations"))

    def _matmul(self, node: fx.Node, a: fx.Node, b: fx.Node, bias: fx.Node | None) -> None:
        if len(shape_of(b)) == 2 and self.static(b) is not None and self.static(a) is None:
            self._product(node, a, -1, b, -2, bias)
        elif len(shape_of(a)) == 2 and len(shape_of(b)) > 1 and self.static(a) is not None and self.static(b) is None:
            self._product(node, b, -2, a, -1, None)
        else:
            self._meet(node, ((a, -1), (b, -2 if len(shape_of(b)) > 1 else -1)))

    def _product(self, node: fx.Node, x: fx.Node, axis: int, weight: fx.Node, inner: int, bias: fx.Node | None) -> None:
        """A product with a matrix whose dimension `inner` is contracted with dimension `axis` of x."""
        table = self.static(weight)
        if table is None or table.ndim != 2 or self.static(x) is not None:
            self._meet(node, ((x, axis), (weight, inner)))
            return
        table = table if inner % 2 else table.T
        outer = self.labels(weight, 0 if inner % 2 else 1)
        fold, blocked = self.fold(node, bias, False)
        self._add(node, weight, inner % 2, self.labels(x, axis)[None], outer[None], table[None], x, axis, fold, blocked)

    def _conv(self, node: fx.Node) -> None:
        a = bound(node)
        weight, x, groups = self.static(a["weight"]), a["input"], int(a["groups"])
        axis = len(shape_of(x)) - len(shape_of(a["weight"])) + 1
        transposed = bool(a.get("transposed", "transpose" in op_of(node)))
        if weight is None:
            labels = self.flow.of(x)[axis]
            if labels is not None:
                harmless = self.zero(x, axis, labels.size)
                self.meetings.append(Meeting(node, labels, harmless, "meets a weight that is computed"))
            return
        inputs = self.labels(x, axis).reshape(groups, -1)
        outputs = self.labels(node, axis).reshape(groups, -1)
        taps = weight.reshape(groups, -1, *weight.shape[1:])
        if transposed:
            taps = taps.transpose(1, 2)
        fold, blocked = self.fold(node, a["bias"], pads(node) or transposed)
        self._add(node, a["weight"], 0 if transposed else 1, inputs, outputs, taps, x, axis, fold, blocked)

    def _add(
        self,
        node: fx.Node,
        weight: fx.Node,
        inner: int,
        inputs: Labels,
        outputs: Labels,
        taps: Tensor,
        x: fx.Node,
        axis: int,
        fold: Fold | None,
        blocked: str,
    ) -> None:
        known, value = self.constants(x, axis, inputs.size)
        known, value = known.reshape(inputs.shape), value.reshape(inputs.shape)
        self.sinks += self.sink(node, weight, inner, inputs, outputs, taps, known, value, fold, blocked)

    def sink(
        self,
        node: fx.Node,
        weight: fx.Node,
        inner: int,
        inputs: Labels,
        outputs: Labels,
        taps: Tensor,
        known: Bools,
        value: Floats,
        fold: Fold | None,
        blocked: str,
    ) -> list[Sink]:
        """One product, with `taps` (groups, out, in, ...); none where another graph decides about the weight."""
        flat = taps.reshape(*taps.shape[:3], -1)
        finite = [part.sum(-1, dtype=torch.float64).isfinite().all(1) for part in blocks(flat, 1)]
        known = known & torch.stack(finite).all(0).numpy()  # even 0 times infinity is something
        columns = np.flatnonzero((known & (value != 0)).any(0))
        total = flat[:, :, torch.from_numpy(columns)].sum(-1, dtype=torch.float64).numpy()
        name = self.channels.source(weight) if weight.op == "get_attr" else None
        if name is not None and self.home[name] is not node.graph:
            return []
        return [
            Sink(
                node=node,
                weight=name,
                axis=inner,
                inputs=inputs,
                outputs=outputs,
                alive=torch.cat([(part != 0).any(-1) for part in blocks(flat, 1)], 1).numpy(),
                columns=columns,
                total=total,
                known=known,
                value=value,
                fold=fold,
                blocked=blocked,
                mergeable=name is not None and self.readers[name] == 1,
            )
        ]

    def meet_labels(self, node: fx.Node, labels: Labels, harmless: Bools, reason: str) -> None:
        """Channels that are read without a weight."""
        self.meetings.append(Meeting(node, labels, harmless, reason))

    def constants(self, node: fx.Node, axis: int, size: int) -> tuple[Bools, Floats]:
        """Which channels along an axis are one number everywhere, and those numbers."""
        held = self.found.get(node)
        if held is None or not held.value.is_floating_point():
            return np.zeros(size, dtype=bool), np.zeros(size)
        value = held.value.movedim(axis, 0).reshape(held.value.shape[axis], -1)
        known = held.known.broadcast_to(held.value.shape).movedim(axis, 0).reshape(value.shape)
        same = known.all(1) & (value == value[:, :1]).all(1) & torch.isfinite(value[:, 0])
        numbers = torch.where(same, value[:, 0], 0.0)
        return same.expand(size).numpy(), numbers.double().expand(size).numpy()

    def fold(self, node: fx.Node, bias: object, padded: bool) -> tuple[Fold | None, str]:
        """Where a product's constants go: into the bias; without one into the mean of the BatchNorm that follows."""
        if padded:
            return None, "enters a convolution with zero padding"
        if isinstance(bias, fx.Node):
            name = self.channels.source(bias)
            single = name is not None and self.readers[name] == 1 and len(shape_of(bias)) == 1
            return (Fold(name, 1.0), "") if name is not None and single else (None, "its bias has several readers")
        users = list(node.users)
        if len(users) == 1 and op_of(users[0]) in ("batch_norm", "_native_batch_norm_legit_no_training"):
            a = bound(users[0])
            mean = a["running_mean"]
            name = self.channels.source(mean) if isinstance(mean, fx.Node) else None
            if a["input"] is node and name is not None and self.readers[name] == 1:
                return Fold(name, -1.0), ""
        return None, "the layer behind it has no bias"

    def _bilinear(self, node: fx.Node) -> None:
        a = bound(node)
        for name, axis in (("input1", 1), ("input2", 2)):
            self._meet(node, ((a[name], -1), (a["weight"], axis)))

    def _einsum(self, node: fx.Node) -> None:
        equation = str(node.args[0]).replace(" ", "")
        left, _, right = equation.partition("->")
        terms, operands = left.split(","), tensor_arguments(node)
        for letter in sorted(set(left) - set(right) - {",", "."}):
            holders = tuple((o, t.index(letter)) for t, o in zip(terms, operands, strict=True) if letter in t)
            if len(holders) > 1 and "." not in equation:
                self._meet(node, holders)
