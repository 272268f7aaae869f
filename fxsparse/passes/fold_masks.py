"""Masks become zeros in plain weights."""

from __future__ import annotations

import torch
from torch import nn

from fxsparse.errors import ConfigError
from fxsparse.graph import edit
from fxsparse.nn import (
    Guard,
    MaskedWeight,
    MaskOwner,
    SparseModule,
    masked_weight,
    masked_weights,
    remove_mask,
)
from fxsparse.passes.infra import Pass
from fxsparse.passes.places import replace_module, replace_parameter
from fxsparse.passes.snapshot import graphs_of
from fxsparse.passes.structure import check_same_state


class FoldMasks(Pass):
    """Removes every mask; dead weights are zeros afterwards, and all modules and nodes are torch's own.

    1. A weight with something else than zeros at dead entries: a new parameter takes its place, so that the input keeps
       its own. All other parameters stay the same objects.
    2. A mask node: its readers read the weight.
    3. A sparse module: the plain torch module with the same contents.
    4. Any other mask: the buffer and the hooks go.

    Gradients of dead entries, which the masks hid, are dense afterwards. While the input lives, its own guards stay on
    the parameters that it shares with the result; `finalize` takes them off.
    """

    idempotent = True

    def requires(self, module: nn.Module) -> None:
        """No resurrection phase; weights that are read unmasked are zero at dead entries."""
        for found in module.modules():
            if isinstance(found, MaskOwner):
                found.check_mask_edit()
        for name, weight in masked_weights(module).items():
            if weight.spec.guard is Guard.GRADIENT and _dead_values(weight):
                raise ConfigError(
                    f"`{name}` has values at dead entries, which its readers see; write zeros there before, by "
                    "`set_masks(model, masks(model))`"
                )

    def call(self, module: nn.Module) -> bool:
        """Fold all masks."""
        weights = masked_weights(module)
        for weight in weights.values():
            if _dead_bits(weight):  # case 1
                folded = torch.where(weight.mask, weight.weight.detach(), 0.0)
                fresh = nn.Parameter(folded, requires_grad=weight.weight.requires_grad)
                replace_parameter(module, weight.weight, fresh)
        for graph_module in graphs_of(module).values():
            for node in graph_module.graph.find_nodes(op="call_function", target=masked_weight):  # case 2
                edit.replace_uses(node, node.args[0])
        for name, weight in weights.items():
            self._fold(module, name, weight)
        return bool(weights)

    def _fold(self, module: nn.Module, name: str, weight: MaskedWeight) -> None:
        alive = f"{int(weight.mask.sum())} of {weight.mask.numel()}" if not weight.mask.is_meta else "?"
        for owner, attribute in weight.owners:
            if isinstance(owner, SparseModule):  # case 3
                replace_module(module, owner, owner.to_dense())
            else:  # case 4
                remove_mask(owner, attribute)
        self.record(name, f"mask folded, {alive} alive")

    def ensures(self, before: nn.Module, after: nn.Module) -> None:
        """No mask is left; the state keeps its names."""
        left = list(masked_weights(after))
        graphs = [found.graph for found in graphs_of(after).values()]
        nodes = [node for graph in graphs for node in graph.find_nodes(op="call_function", target=masked_weight)]
        if left or nodes:
            raise ConfigError(f"masks are left: {', '.join(left + [node.name for node in nodes])}")
        check_same_state(before, after)


def _dead_values(weight: MaskedWeight) -> bool:
    return not weight.mask.is_meta and bool((weight.weight.detach()[~weight.mask] != 0).any())


def _dead_bits(weight: MaskedWeight) -> bool:
    """Whether anything but +0 stands at a dead entry."""
    if weight.mask.is_meta:
        return False
    dead = weight.weight.detach()[~weight.mask]
    parts = torch.view_as_real(dead) if dead.is_complex() else dead
    return bool(((parts != 0) | parts.signbit()).any())
