"""torch's attention layers, whose code derives the sizes of heads, made ready to lose heads and positions in them."""

from __future__ import annotations

import numpy as np
from torch import nn

from fxsparse.graph import isolated_clone
from fxsparse.graph.channels import Channels
from fxsparse.graph.channels_atoms import Labels
from fxsparse.nn.attention import SizedMultiheadAttention
from fxsparse.passes.compact_sinks import Bools


def opened(model: nn.Module) -> nn.Module:
    """The model to be analysed: with attention layers of open sizes, sharing its parameters; itself without any."""
    if not any(type(module) is nn.MultiheadAttention for module in model.modules()):
        return model
    clone = isolated_clone(model, to_run=True)
    for module in list(clone.modules()):
        if type(module) is nn.MultiheadAttention:  # a subclass may compute something else
            SizedMultiheadAttention.of(module)
    return clone


def resize(model: nn.Module, channels: Channels, removed: Bools) -> None:
    """Open the attention layers that lose channels, and count their heads; the model is edited in place."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
    for module in list(model.modules()):
        if type(module) is not nn.MultiheadAttention and not isinstance(module, SizedMultiheadAttention):
            continue
        held = [*module._parameters.values(), *module.out_proj._parameters.values()]
        names = [first[id(parameter)] for parameter in held if parameter is not None]
        dims = [labels for name in names for labels in channels.sources.get(name, ()) if labels is not None]
        if not any(removed[channels.classes[labels]].any() for labels in dims):
            continue
        values = channels.sources[first[id(module.out_proj.weight)]][1]
        module.num_heads = _heads(values, module.num_heads, channels, removed)
        SizedMultiheadAttention.of(module)


def _heads(values: Labels | None, heads: int, channels: Channels, removed: Bools) -> int:
    """How many runs of the columns of the output projection keep any."""
    if values is None:
        return heads
    kept = ~removed[channels.classes[values]]
    return int(np.count_nonzero(kept.reshape(heads, -1).any(1)))
