"""The rewriting of an exported graph: layers lowered, axes left where they are best until somebody minds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx, nn

from fxsparse.graph import edit
from fxsparse.passes.lower_elementwise import is_binary, is_unary, name_of
from fxsparse.passes.lower_emit import Emitter, Lowered
from fxsparse.passes.lower_export import holding
from fxsparse.passes.lower_forms import Form
from fxsparse.passes.lower_layouts import AxisOrder, linear_order, natural, permuted, product_order, through_view
from fxsparse.passes.lower_rules import PARTS, PERMUTES, VIEWS, permutation, rule_for
from fxsparse.passes.lower_sites import Constants
from fxsparse.passes.lower_values import ATEN, NAME, Scribe, Value, Values, sizes_of


class Rewriter:
    """One rewriting of one exported module, in place.

    1. A lowered layer takes its input in the order that its form needs, or has it already, and leaves its output so.
    2. What reads only moved values, and knows how, computes on them as they lie: a permutation of the model's axes
       moves nothing, a reshape nothing where the axes lie side by side.
    3. Anything else reads the model's own tensors, which are made once, where they are first needed.

    Args:
        module: An exported module, functional, with the sizes of its values.
        lowered: What its sites become; those that are missing stay.
        constants: Values of the nodes that depend on parameters only.
        inside: Whether a bias may become a column of its weight.
    """

    def __init__(
        self, module: fx.GraphModule, lowered: Sequence[Lowered], constants: Constants, inside: bool = True
    ) -> None:
        self.module = module
        self.scribe = Scribe(module)
        self.values = Values(self.scribe)
        self.constants = constants
        self.lowered = {each.site.node: each for each in lowered}
        self.parts: dict[fx.Node, Callable[[int], Value]] = {}
        self.wishes: Mapping[fx.Node, AxisOrder] = {}
        self.emitter = Emitter(self.values, inside)
        self.refused: list[str] = []

    def run(self) -> nn.Module:
        """Rewrite; return a module that holds only what it still reads."""
        nodes = list(self.module.graph.nodes)
        for node in nodes:
            value = self.constants(node)
            sizes = sizes_of(node)
            if value is not None and sizes is not None:
                self.values[node] = Value(node, natural(len(sizes)), sizes, None, value)
        self.wishes = wishes(nodes, self.lowered)
        for node in nodes:
            self.scribe.at = node
            self._visit(node)
        for node in reversed(list(self.module.graph.nodes)):
            replaced = node in self.lowered or node in self.parts or self.values.known(node) is not None
            if not node.users and (replaced or not edit.is_impure(node)) and node.op not in ("placeholder", "output"):
                edit.erase(node)
        edit.lint(self.module)
        return holding(self.module, self.module.graph)

    def _visit(self, node: fx.Node) -> None:
        if node.op not in ("call_function", "output"):
            return
        if node in self.lowered:
            self.scribe.source = self.lowered[node].site.name
            value = self.emitter.emit(self.lowered[node], self.wishes.get(node))
            self.scribe.source = ""
            if value is not None:
                self.values[node] = value
                return
            self.refused.append(self.lowered[node].site.name)
        if name_of(node) == "sym_size":
            self._size(node)
        elif node.target is operator.getitem and node.args[0] in self.parts:
            self.values[node] = self.parts[node.args[0]](node.args[1])  # type: ignore[index, arg-type]  # of a split
        elif any(self._moved(found) for found in node.all_input_nodes):
            self._moved_inputs(node)

    def _moved(self, node: fx.Node) -> bool:
        value = self.values.known(node)
        return value is not None and (value.moved or value.node is not node)

    def _size(self, node: fx.Node) -> None:
        source, label = node.args[:2]
        assert isinstance(source, fx.Node) and isinstance(label, int)
        value = self.values[source]
        if not self._moved(source) or (value.channels is not None and value.channels.axis == label % value.rank):
            return
        found = self.scribe.call(ATEN.sym_size.int, value.node, value.order.index(label % value.rank))
        edit.replace_uses(node, found)

    def _moved_inputs(self, node: fx.Node) -> None:
        rule = rule_for(node) if sizes_of(node) is not None or name_of(node) in PARTS else None
        value = rule(self, node) if rule is not None else None
        if value is not None:
            self.values[node] = value
            return
        if node in self.parts:
            return
        for found in node.all_input_nodes:
            if self._moved(found):
                made = self.values.natural(self.values[found])
                if _random(node):  # draws its numbers in the order of memory
                    made = self.scribe.call(ATEN.clone.default, made, memory_format=torch.contiguous_format)
                node.replace_input_with(found, made)
        if name_of(node) in ("view", "_unsafe_view"):  # its input may be permuted now
            edit.retarget(node, ATEN.reshape.default, pass_name=NAME, what="reads a moved value")


def _random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def wishes(nodes: Sequence[fx.Node], lowered: Mapping[fx.Node, Lowered]) -> dict[fx.Node, AxisOrder]:
    """In which order the readers of each value would like its axes, where a lowered layer is behind them."""
    found: dict[fx.Node, AxisOrder] = {}
    for node in reversed(nodes):
        sizes = sizes_of(node)
        if sizes is None:
            continue
        for user in node.users:
            order = _wish_of(user, node, lowered, found)
            if order is not None:
                found[node] = order
                break
    return found


def _wish_of(
    user: fx.Node, node: fx.Node, lowered: Mapping[fx.Node, Lowered], found: Mapping[fx.Node, AxisOrder]
) -> AxisOrder | None:
    sizes = sizes_of(node)
    assert sizes is not None
    if user in lowered:
        site, form = lowered[user].site, lowered[user].form
        if site.input is not node or site.kind == "conv":
            return None
        return product_order(len(sizes)) if form is Form.GATHER_MATMUL else linear_order(sizes)
    wish, after = found.get(user), sizes_of(user)
    if wish is None or after is None:
        return None
    if is_unary(user):
        return wish
    if is_binary(user):
        return wish if after == sizes else None
    if name_of(user) in PERMUTES:
        dims = permutation(user, len(sizes))
        return permuted(wish, [dims.index(axis) for axis in range(len(dims))])
    if name_of(user) in VIEWS:
        return through_view(wish, after, sizes)
    return None
