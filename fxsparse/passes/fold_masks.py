"""Masks become zeros in plain weights."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from fxsparse.errors import ConfigError
from fxsparse.graph import edit
from fxsparse.nn import (
    Guard,
    MaskedWeight,
    Route,
    SparseModule,
    check_mask_edit,
    fold_effective,
    masked_weight,
    masked_weights,
    remove_mask,
    unmask_effective,
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
    4. A mask of an effective weight that values of the parameters can express (weight norm, spectral norm): they are
       written. A slice of a weight norm without alive entries gets g = 0 and v = 1, because 0 / 0 has no value.
    5. A mask of an effective weight that no values can express (weight standardisation, an orthogonal map, a spectral
       norm without alive entries, which would divide 0 by 0): it stays, `masked_weights` goes on naming it, and the
       record says so.
    6. Any other mask: the buffer and the hooks go.

    Gradients of dead entries, which the masks hid, are dense afterwards, and so are those of the g of a slice without
    alive entries. While the input lives, its own guards stay on
    the parameters that it shares with the result; `finalize` takes them off.
    """

    idempotent = True

    def requires(self, module: nn.Module) -> None:
        """No resurrection phase; weights read unmasked are zero at dead entries; no hook would divide 0 by 0."""
        for found in module.modules():
            check_mask_edit(found)
        for name, weight in masked_weights(module).items():
            if weight.spec.guard is Guard.GRADIENT and _dead_values(weight):
                raise ConfigError(
                    f"`{name}` has values at dead entries, which its readers see; write zeros there before, by "
                    "`set_masks(model, masks(model))`"
                )
            if _divides_by_zero(weight):
                raise ConfigError(
                    f"`{name}` has no alive entry, and the spectral_norm around it would divide 0 by 0; keep an entry "
                    "alive, or use torch.nn.utils.parametrizations.spectral_norm, whose masked weight is zero"
                )

    def call(self, module: nn.Module) -> bool:
        """Fold all masks."""
        found = masked_weights(module)
        weights = {name: weight for name, weight in found.items() if not _stays(weight)}
        for name in found.keys() - weights.keys():  # case 5
            self.record(name, "the mask stays: no values of the parameters make its effective weight")
        for weight in weights.values():
            if _dead_bits(weight):  # case 1
                _write(module, weight.weight, torch.where(weight.mask, weight.weight.detach(), 0.0))
        for graph_module in graphs_of(module).values():
            for node in _plain_mask_nodes(graph_module):  # case 2
                edit.replace_uses(node, node.all_input_nodes[0])
        for name, weight in weights.items():
            self._fold(module, name, weight)
        return bool(weights)

    def _fold(self, module: nn.Module, name: str, weight: MaskedWeight) -> None:
        alive = f"{int(weight.mask.sum())} of {weight.mask.numel()}" if not weight.mask.is_meta else "?"
        effective = weight.spec.route is Route.EFFECTIVE
        for owner, attribute in weight.owners:
            if isinstance(owner, SparseModule):  # case 3
                replace_module(module, owner, owner.to_dense())
                continue
            values = fold_effective(owner, attribute) if effective else None
            if values is not None:
                unmask_effective(owner, attribute)
            remove_mask(owner, attribute)  # case 6
            for other, value in (values or {}).items():  # case 4
                _write(module, owner._parameters[other], value)
        self.record(name, f"mask folded, {alive} alive")

    def ensures(self, before: nn.Module, after: nn.Module) -> None:
        """No mask is left but those of case 5; the state keeps its names."""
        left = [name for name, weight in masked_weights(after).items() if not _stays(weight)]
        nodes = [node for found in graphs_of(after).values() for node in _plain_mask_nodes(found)]
        if left or nodes:
            raise ConfigError(f"masks are left: {', '.join(left + [node.name for node in nodes])}")
        check_same_state(before, after)


def _stays(weight: MaskedWeight) -> bool:
    effective = weight.spec.route is Route.EFFECTIVE
    return effective and any(fold_effective(owner, attribute) is None for owner, attribute in weight.owners)


def _plain_mask_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """The mask nodes that mask a parameter itself."""
    nodes = module.graph.find_nodes(op="call_function", target=masked_weight)
    return [node for node in nodes if isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr"]


def _write(module: nn.Module, parameter: nn.Parameter | None, values: Tensor) -> None:
    """Put a new parameter with these values in the place of one, unless it has them already, bit for bit."""
    assert parameter is not None
    if not parameter.is_meta and not _same_bits(parameter.detach(), values):
        replace_parameter(module, parameter, nn.Parameter(values, requires_grad=parameter.requires_grad))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    parts = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in (one, other)]
    return torch.equal(parts[0], parts[1]) and torch.equal(parts[0].signbit(), parts[1].signbit())


def _divides_by_zero(weight: MaskedWeight) -> bool:
    """Whether the old spectral norm divides a weight without alive entries by its norm."""
    hooks = ((attribute, hook) for owner, attribute in weight.owners for hook in owner._forward_pre_hooks.values())
    normed = any(isinstance(hook, SpectralNorm) and attribute == f"{hook.name}_orig" for attribute, hook in hooks)
    return normed and not weight.mask.is_meta and not bool(weight.mask.any())


def _dead_values(weight: MaskedWeight) -> bool:
    return not weight.mask.is_meta and bool((weight.weight.detach()[~weight.mask] != 0).any())


def _dead_bits(weight: MaskedWeight) -> bool:
    """Whether anything but +0 stands at a dead entry."""
    if weight.mask.is_meta:
        return False
    dead = weight.weight.detach()[~weight.mask]
    parts = torch.view_as_real(dead) if dead.is_complex() else dead
    return bool(((parts != 0) | parts.signbit()).any())
