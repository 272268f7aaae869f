"""Which weights of a model are pruned, and masks for those that have none."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn

from fxsparse.errors import ConfigError
from fxsparse.lottery.ticket import install_parameter_mask
from fxsparse.nn import masked_weights, tie_masks

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def prunable_names(model: nn.Module) -> tuple[str, ...]:
    """The weights that are pruned by default, by parameter name, in model order.

    They are the masked weights of a model that has masks; else the weights of linear and convolution modules (depthwise
    ones excepted) and attention projections. Frozen ones are never among them.
    """
    frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    if found := masked_weights(model):
        return tuple(name for name, masked in found.items() if id(masked.weight) not in frozen)
    wanted = set()
    for module in model.modules():
        if isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.in_channels:
            continue
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            wanted.add(id(module.weight))
        elif isinstance(module, nn.MultiheadAttention):
            wanted |= {id(getattr(module, attribute)) for attribute in ATTENTION}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    wanted -= frozen | embeddings
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in wanted)


def choose(model: nn.Module, layers: Sequence[str] | None) -> tuple[str, ...]:
    """The prunable weights, narrowed to layers, parameters or globs of either.

    Raises:
        ConfigError: a name that matches nothing, or nothing left to prune.
    """
    names = prunable_names(model)
    if layers is not None:
        chosen: set[str] = set()
        for layer in layers:
            hits = {n for n in names if any(fnmatch.fnmatchcase(part, layer) for part in (n, n.rpartition(".")[0]))}
            if not hits:
                known = ", ".join(names) or "none"
                raise ConfigError(f"`prunable_layers` (={layer}) matches no prunable weight; there are: {known}")
            chosen |= hits
        names = tuple(name for name in names if name in chosen)
    if not names:
        raise ConfigError("`model` has no prunable weight: no linear or convolution weight that requires a gradient")
    return names


def ensure_masks(model: nn.Module, names: Sequence[str]) -> None:
    """Give every named weight that has no mask one at the parameter, all alive, in place."""
    present = masked_weights(model)
    if missing := [name for name in names if name not in present]:
        for name in missing:
            install_parameter_mask(model, name)
        tie_masks(model)
