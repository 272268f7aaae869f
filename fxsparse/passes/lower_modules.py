"""The lowering of models that cannot be exported: layers are replaced one by one, each with its own transposes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.errors import CaptureError
from fxsparse.graph import fresh_inputs, isolated_clone
from fxsparse.graph.scopes import mode_of, seeded
from fxsparse.nn.lowered import GatheredConv, GatheredLinear
from fxsparse.passes.lower_forms import Form
from fxsparse.passes.lower_plan import KnownMask, Use, Weight, layer_of, support_of
from fxsparse.passes.lower_sites import widened
from fxsparse.passes.lower_support import Support
from fxsparse.passes.places import replace_modules

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SEED = 20252


def weights_of_modules(
    folded: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], masks: Mapping[str, KnownMask]
) -> list[Weight]:
    """The weights of the layers that a model without masks runs.

    Raises:
        CaptureError: the model does not run.
    """
    uses = _seen(folded, args, kwargs)
    found = []
    for path, module in folded.named_modules():
        name = f"{path}.weight" if path else "weight"
        if path not in uses:
            continue
        weight = module._parameters["weight"]
        assert weight is not None
        known = masks.get(name)
        mask, order = (known.mask, known.row_order) if known is not None else (None, None)
        support = support_of(weight, getattr(module, "groups", 1), mask, order)
        layer = layer_of(name, weight, uses[path], [support])
        forms = tuple(form for form in layer.forms if form is not Form.GATHER_MATMUL)
        layer = dataclasses.replace(layer, forms=forms)
        found.append(Weight(layer, (), {}, weight.requires_grad, said=str(support) if support is not None else ""))
    return found


def _seen(folded: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, list[Use]]:
    """The uses of each layer that ran on the example inputs, by its path, if it pads zeros."""
    clone = isolated_clone(folded, copied=[name for name, _ in folded.named_parameters(remove_duplicate=False)])
    found: dict[str, list[Use]] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            if not given or not isinstance(given[0], Tensor):
                return
            weight = module._parameters["weight"]
            assert weight is not None
            kind = "linear" if isinstance(module, nn.Linear) else "conv"
            columns = max(1, output.numel() // weight.shape[0])
            use = Use(kind, tuple(given[0].shape), columns, getattr(module, "groups", 1), weight.detach())
            found.setdefault(path, []).append(use)

        return hook

    for path, module in clone.named_modules():
        if path and type(module) in _KINDS and getattr(module, "padding_mode", "zeros") == "zeros":
            module.register_forward_hook(watch(path))
    try:
        with seeded(_SEED), torch.no_grad(), mode_of(clone, False):
            given = fresh_inputs(args, kwargs)
            clone(*given[0], **given[1])
    except Exception as error:
        raise CaptureError(f"the model raises {type(error).__name__} on the example inputs: {error}") from error
    return found


def replaced(folded: nn.Module, names: Sequence[str], masks: Mapping[str, KnownMask]) -> nn.Module:
    """A copy in which the layers of the named weights are lowered."""
    clone = isolated_clone(folded, copied=[name for name, _ in folded.named_parameters(remove_duplicate=False)])
    new: dict[nn.Module, nn.Module] = {}
    for name in names:
        module = clone.get_submodule(name.rpartition(".")[0])
        known = masks.get(name)
        mask, order = (known.mask, known.row_order) if known is not None else (None, None)
        weight = module._parameters["weight"]
        assert weight is not None
        support = support_of(weight, getattr(module, "groups", 1), mask, order)
        assert support is not None
        new[module] = gathered(module, support).train(module.training)
    replace_modules(clone, new)
    return clone


def gathered(module: nn.Module, support: Support) -> GatheredConv:
    """The lowered form of a layer."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None
    linear = isinstance(module, nn.Linear)
    wide = widened(weight.detach(), getattr(module, "groups", 1))
    kernel = (1,) if linear else tuple(weight.shape[2:])
    blocks = [
        batch.blocks(wide).reshape(batch.groups * batch.group, batch.k, *kernel).contiguous()
        for batch in support.batches
    ]
    biases = [None if bias is None else batch.bias(bias.detach()).flatten() for batch in support.batches]
    index = None if support.index is None else support.index.to(weight.device)
    options = {} if linear else {name: getattr(module, name) for name in ("stride", "padding", "dilation")}
    made = (GatheredLinear if linear else GatheredConv)(
        [batch.positions.flatten().to(weight.device) for batch in support.batches],
        [nn.Parameter(block, requires_grad=weight.requires_grad) for block in blocks],
        [None if found is None else nn.Parameter(found, requires_grad=weight.requires_grad) for found in biases],
        [batch.groups for batch in support.batches],
        index,
        **options,
    )
    return made
