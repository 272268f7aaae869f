"""Fisher taps in a graph: where their statistics are, and how they are taken away again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
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
    """Holds statistics; they are no part of a state dict.

    Attributes:
        parameter_names: by own name of a statistic, the first name of its parameter.
        replaced: by name of a node, what it called before.
        runs: how often the graph has run in the present forward pass, where that is counted.
        repeated: whether it ran several times in one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runs, self.repeated = 0, False
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


def count_runs(module: nn.Module) -> None:
    """Let each graph with taps below the module itself count how often it runs in one forward pass of the module.

    Code outside of graphs may call one several times where the data say so, which no example run can foresee.
    """
    holders = {path: each for path, graph in modules_of(module) if (each := holder_of(graph)) is not None and path}
    if not holders:
        return
    module.register_forward_pre_hook(partial(_begin, tuple(holders.values())))
    for path, holder in holders.items():
        module.get_submodule(path).register_forward_pre_hook(partial(_count, holder))


def _begin(holders: tuple[Statistics, ...], module: nn.Module, args: object) -> None:
    for holder in holders:
        holder.runs = 0


def _count(holder: Statistics, graph: nn.Module, args: object) -> None:
    again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1  # by a backward pass
    if torch.is_grad_enabled() and not again:
        holder.runs += 1
        holder.repeated = holder.repeated or holder.runs > 1


def holder_of(graph: nn.Module) -> Statistics | None:
    """What holds the statistics of a graph; None where it has no taps."""
    holder = graph._modules.get(CONTAINER) if isinstance(graph, fx.GraphModule) else None
    return holder if isinstance(holder, Statistics) else None


def forget_runs(module: nn.Module) -> None:
    """Take away what `count_runs` has put on one module."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, partial) and hook.func in (_begin, _count):
            del module._forward_pre_hooks[key]


def erase_taps(graph: fx.GraphModule) -> bool:
    """Take the taps out of a graph, which is changed; its code is what it was before. Whether there were any."""
    holder = holder_of(graph)
    if holder is None:
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
        forget_runs(module)
        if isinstance(module, fx.GraphModule) and erase_taps(module):
            module.recompile()
    return clone
