"""Shortening the parameters, buffers and masks of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from fxsparse.errors import ConfigError
from fxsparse.nn.attention import SizedMultiheadAttention
from fxsparse.nn.masked import beside_mask, bind_guard, mask_name, mask_of, row_order_name
from fxsparse.nn.slot import slots_of
from fxsparse.nn.spec import MaskSpec
from fxsparse.passes import compact_recurrent
from fxsparse.passes.compact_solve import Merge
from fxsparse.passes.places import replace_in_attributes
from fxsparse.sparsity import Unstructured

Indices = npt.NDArray[np.int64]


@torch.no_grad()
def shorten(
    model: nn.Module,
    kept: Mapping[tuple[str, int], Indices],
    folds: Mapping[str, npt.NDArray[np.float64]],
    merges: Sequence[Merge] = (),
) -> tuple[str, ...]:
    """Keep only some indices of some dimensions, after adding the folded constants; the model is edited in place.

    Args:
        model: a model that owns all its tensors, with masks or without.
        kept: (first name of a parameter or buffer, dimension) -> the indices that stay.
        folds: name -> what is added before, in the old length.
        merges: weights that are added to others before.

    Returns:
        The names of masks whose pattern does not fit the shorter weight; they are unstructured now.
    """
    by_name: dict[str, dict[int, Indices]] = {}
    for (name, dim), indices in kept.items():
        by_name.setdefault(name, {})[dim] = indices
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    holders = _holders(model)
    for merge in merges:
        _merge(parameters[merge.weight], merge, holders)
    _fold(parameters, buffers, folds, holders)
    shorter: dict[int, nn.Parameter] = {}
    loosened: list[str] = []
    done: dict[int, tuple[Tensor, Tensor]] = {}  # the old ones, too: else another tensor might get their id
    for name, dims in by_name.items():
        if name in buffers:
            buffer = buffers[name]
            for module, attribute in holders[id(buffer)]:
                module._buffers[attribute] = _once(buffer, dims, done)
        else:
            old = parameters[name]
            shape, shorter[id(old)] = old.shape, _shortened(old, dims)
            for module, attribute in holders[id(old)]:
                module._parameters[attribute] = shorter[id(old)]
                if attribute in slots_of(module) and _shorten_mask(module, attribute, shape, dims, done):
                    loosened.append(name)
    replace_in_attributes(model, shorter)
    for module in model.modules():
        describe(module)
    return tuple(dict.fromkeys(loosened))


def _once(buffer: Tensor, dims: Mapping[int, Indices], done: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    """The buffer shortened; the same one for all who share it."""
    if id(buffer) not in done:
        done[id(buffer)] = buffer, narrowed(buffer, dims)
    return done[id(buffer)][1]


def _holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """The modules and attributes that hold each parameter and buffer, by its id."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            holders.setdefault(id(tensor), []).append((module, attribute))
    return holders


def _shortened(old: nn.Parameter, dims: Mapping[int, Indices]) -> nn.Parameter:
    """A shorter parameter; the old one stays, without its memory, so that whoever holds it can be found."""
    fresh = nn.Parameter(narrowed(old.detach(), dims), requires_grad=old.requires_grad)
    fresh.__dict__.update(old.__dict__)
    old.data = old.data.new_empty(0)
    return fresh


def narrowed(tensor: Tensor, dims: Mapping[int, Indices]) -> Tensor:
    """The tensor with only some indices of some dimensions, in the same memory format."""
    result = tensor
    for dim, indices in dims.items():
        result = result.index_select(dim, torch.from_numpy(indices).to(tensor.device))
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        return result.contiguous(memory_format=torch.channels_last)
    return result.contiguous()


def _fold(
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    folds: Mapping[str, npt.NDArray[np.float64]],
    holders: Mapping[int, Sequence[tuple[nn.Module, str]]],
) -> None:
    for name, delta in folds.items():
        target = parameters[name] if name in parameters else buffers[name]
        target.copy_(target.double() + torch.from_numpy(delta).to(target.device))
        for module, attribute in holders[id(target)]:
            if attribute in slots_of(module):
                mask_of(module, attribute).logical_or_(torch.from_numpy(delta != 0).to(target.device))


def _merge(weight: nn.Parameter, merge: Merge, holders: Mapping[int, Sequence[tuple[nn.Module, str]]]) -> None:
    sources = torch.from_numpy(merge.sources).to(weight.device)
    factors = torch.from_numpy(merge.factors).to(weight.device)
    part = weight.data if merge.rows is None else weight.data[merge.rows[0] : merge.rows[1]]
    moved = part.index_select(merge.axis, sources).double().movedim(merge.axis, -1) @ factors
    part.select(merge.axis, merge.target).add_(moved.to(part.dtype))
    for module, attribute in holders[id(weight)]:
        if attribute in slots_of(module):
            mask = mask_of(module, attribute)
            mask = mask if merge.rows is None else mask[merge.rows[0] : merge.rows[1]]
            alive = mask.index_select(merge.axis, sources).any(merge.axis)
            mask.select(merge.axis, merge.target).logical_or_(alive)


def _shorten_mask(
    module: nn.Module,
    attribute: str,
    shape: torch.Size,
    dims: Mapping[int, Indices],
    done: dict[int, tuple[Tensor, Tensor]],
) -> bool:
    """Shorten a mask with what belongs to it; returns whether its pattern had to be given up."""
    slot = slots_of(module)[attribute]
    names = (mask_name(attribute), *beside_mask(slot))
    for name in names:
        buffer = module._buffers[name]
        if buffer is not None and buffer.shape == shape:  # else it is a value of the graph, and short already
            module._buffers[name] = _once(buffer, dims, done)
    loosened = not _legal(slot.spec, mask_of(module, attribute))
    if loosened:
        order = row_order_name(attribute)
        if slot.spec.row_order is not None and order in module._buffers:
            delattr(module, order)
        slot.spec = dataclasses.replace(slot.spec, pattern=Unstructured(), row_order=None)
    bind_guard(module, attribute)
    return loosened


def _legal(spec: MaskSpec, mask: Tensor) -> bool:
    if spec.row_order is not None:
        return False
    try:
        spec.pattern.units(mask.shape, spec.layout, None)
        if not bool(mask.all()):
            spec.pattern.check(mask, spec.layout, None)
    except ConfigError:
        return False
    return True


def describe(module: nn.Module) -> None:
    """Let the attributes of torch's own layers say what shape their parameters have."""
    if isinstance(module, torch.jit.ScriptModule):
        return
    if isinstance(module, SizedMultiheadAttention):
        module.describe()
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        compact_recurrent.describe(module)
    weight = module._parameters.get("weight")
    if weight is None:
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, _ConvNd):
        first, second = weight.shape[0], weight.shape[1] * module.groups
        if module.transposed:
            module.in_channels, module.out_channels = first, second
        else:
            module.out_channels, module.in_channels = first, second
    elif isinstance(module, _NormBase):
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.embedding_dim = weight.shape[1]
    elif isinstance(module, nn.Bilinear):
        module.out_features, module.in1_features, module.in2_features = weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]
