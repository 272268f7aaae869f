"""Fisher taps in a graph: where their statistics are, and how they are taken away again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxsparse.graph import edit, provenance
from fxsparse.graph.clone import structural_clone
from fxsparse.graph.tree import modules_of

CONTAINER = "fisher_statistics"
"""The submodule of a graph that holds its statistics."""
BEHIND = "taps the output"
"""What the provenance of a tap behind a node says."""
_PASS = "instrument_fisher"


@dataclass(frozen=True)
class Replaced:
    """What a node called before a tap took its place, and with how many arguments; None where it has them still."""

    op: str
    target: Any
    args: int | None
    kwargs: tuple[str, ...]

    def restore(self, node: fx.Node) -> None:
        """Make the node call again what it called."""
        if self.args is None:
            node.op, node.target = self.op, self.target
            return
        operands = node.args[: self.args + len(self.kwargs)]
        node.op, node.target = self.op, self.target
        node.args = operands[: self.args]
        node.kwargs = dict(zip(self.kwargs, operands[self.args :], strict=True))


class Statistics(nn.Module):
    """Holds statistics; they are no part of a state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter_names: dict[str, str] = {}
        self.replaced: dict[str, Replaced] = {}
        self.register_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]  # untyped in torch
        self.register_load_state_dict_pre_hook(_provide)  # type: ignore[no-untyped-call]  # untyped in torch


def _forget(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    for name in module._parameters:
        state.pop(prefix + name, None)


def _provide(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for name, parameter in module._parameters.items():
        state.setdefault(prefix + name, parameter)


def erase_taps(graph: fx.GraphModule) -> bool:
    """Take the taps out of a graph, which is changed; its code is what it was before. Whether there were any."""
    holder = getattr(graph, CONTAINER, None)
    if not isinstance(holder, Statistics):
        return False
    for node in reversed(list(graph.graph.nodes)):
        if node.name in holder.replaced:
            holder.replaced[node.name].restore(node)
            continue
        stamp = provenance.read(node)
        if stamp is None or stamp.pass_name != _PASS:
            continue
        if stamp.what == BEHIND:
            node.replace_all_uses_with(node.args[0])
        edit.erase(node)
    graph.delete_submodule(CONTAINER)
    return True


def without_taps(model: nn.Module) -> nn.Module:
    """The model itself, or where it has taps a clone without them that shares its parameters and buffers."""
    if not isinstance(model, nn.Module) or not any(isinstance(module, Statistics) for _, module in modules_of(model)):
        return model
    clone = structural_clone(model)
    for _, module in modules_of(clone):
        if isinstance(module, fx.GraphModule) and erase_taps(module):
            module.recompile()
    return clone
