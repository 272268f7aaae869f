"""Fisher of coupled channels: what removing a channel everywhere costs, per memory or FLOPs that it saves.

A gate on a channel scales what the weights that read it take in, so that its gradient in sample n is the sum of w g_n
over those weights: the sum of a da over all positions of all coupled inputs, added before it is squared (Liu et al.,
arXiv 2108.00708). Channels that nobody reads are gated where they are made (Theis et al., arXiv 1801.05787).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from fxsparse.curvature.arguments import check_kind, check_listed, shown
from fxsparse.curvature.importance import channel_scores
from fxsparse.curvature.operator import CurvatureOperator
from fxsparse.errors import ConfigError, DataError
from fxsparse.graph import ChannelGroup, channels, record, split_inputs
from fxsparse.graph.recorder import Use
from fxsparse.nn import masked_weights
from fxsparse.planning import finalize
from fxsparse.planning.layouts import use_layout
from fxsparse.sparsity import Layout
from fxsparse.training.distributed import unwrap


class Cost(enum.Enum):
    """What removing one channel saves, for one sample."""

    MEMORY = "memory"
    """Elements of the activations that are made with it."""
    FLOPS = "flops"
    """Multiply-accumulates of the weights that make and read it."""


@dataclass(frozen=True, eq=False)
class ChannelImportance:
    """The scores of one channel group.

    Attributes:
        group: The channels and the weights that hold them.
        scores: mean_n (sum a da)^2 / 2 of each channel, over the cost.
        cost: What one channel saves; 1 where none was asked for.
        gated: Names of the weights whose inputs (or, where nobody reads the channels, outputs) are gated.
    """

    group: ChannelGroup
    scores: Float64[Tensor, " channels"]
    cost: float
    gated: tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    parameter: str
    dim: int
    index: Tensor
    """The channel of each index of the dimension; -1 for none."""


def channel_importance(
    model: nn.Module,
    loss: Any,
    data: Any,
    example_inputs: Any,
    cost: Cost | str | None = Cost.MEMORY,
    *,
    chunk: int | None = None,
) -> list[ChannelImportance]:
    """Score the channels of every prunable group; the model stays as it is.

    Args:
        model: With or without masks.
        loss: As for `CurvatureOperator`; of every sample alone.
        data: Batches `(inputs, targets)`.
        example_inputs: A tuple of positional inputs, or `(args, kwargs)`, for the analysis of the channels.
        cost: See `Cost`; None = the plain score.
        chunk: Most samples whose gradients are held at once.

    Raises:
        ConfigError: an unknown cost, no prunable channels, or no module.
        DataError: gradients of a sample that are NaN or infinite.
        CaptureError: the model cannot be analysed.
    """
    check_kind(model, "model", nn.Module)
    model = unwrap(model)
    chosen = None if cost is None else _cost(cost)
    plain = finalize(model) if masked_weights(model) else model
    groups = [group for group in channels(plain, example_inputs).groups if group.prunable]
    if not groups:
        raise ConfigError("the model has no channels that can be removed")
    args, kwargs = split_inputs(example_inputs)
    uses = [use for use in record(plain, args, kwargs).uses if use.macs and len(use.weight_shape) > 1]
    layouts = _layouts(uses, dict(plain.named_parameters()))
    places = [_gated(group, layouts, dict(plain.named_parameters())) for group in groups]
    sums = _gate_gradients(model, loss, data, groups, places, chunk)
    samples = len(next(iter(args), next(iter(kwargs.values()), [0])))
    found = []
    for group, own, gradients in zip(groups, places, sums, strict=True):
        price = 1.0 if chosen is None else _price(chosen, group, uses, layouts, samples)
        gated = tuple(dict.fromkeys(place.parameter for place in own))
        found.append(ChannelImportance(group, channel_scores([gradients], price), price, gated))
    return found


def channel_element_scores(
    found: Sequence[ChannelImportance],
    shapes: Mapping[str, Sequence[int]],
    layouts: Mapping[str, Layout] | None = None,
) -> dict[str, Float64[Tensor, "*shape"]]:
    """Scores of elements whose sums over an output slice are the score of its channel, for `GivenScores`.

    A weight whose outputs are in no group, such as that of the last layer, is scored by the channels that it reads, in
    the same way over input slices. A weight in no group at all has one score everywhere, the highest of all others:
    nothing tells its elements apart.

    Args:
        found: What `channel_importance` returned.
        shapes: The weights to score.
        layouts: Their layouts; output axis 0 otherwise.

    Returns:
        Scores by name, of all `shapes`; channels in no group of a weight that has others in one score infinity.

    Raises:
        ConfigError: an argument of another type, or a shape that has fewer indices than there are channels in it.
    """
    found, sizes = check_listed(found, "found", ChannelImportance), _sizes(shapes)
    check_kind(layouts, "layouts", Mapping, type(None))
    for layout in (layouts or {}).values():
        check_kind(layout, "layouts", Layout)
    scores = {}
    for name, shape in sizes.items():
        own = 0 if layouts is None or name not in layouts else layouts[name].out_axis
        for axis in sorted(range(len(shape)), key=lambda dim: dim != own):
            slices = _slices(found, name, axis, shape[axis])
            if not bool(slices.isinf().all()):
                width = max(shape.numel() // shape[axis], 1)
                view = [-1 if dim == axis else 1 for dim in range(len(shape))]
                scores[name] = (slices / width).reshape(view).expand(shape).clone()
                break
    highest = max((float(each[each.isfinite()].max()) for each in scores.values()), default=0.0)
    others = {n: torch.full(shape, highest, dtype=torch.float64) for n, shape in sizes.items() if n not in scores}
    return {name: {**scores, **others}[name] for name in sizes}


def _sizes(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Size]:
    check_kind(shapes, "shapes", Mapping)
    for name, shape in shapes.items():
        sizes = shape if isinstance(shape, tuple | list) else [None]
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ConfigError(f"`shapes` of `{name}` (={shown(shape)}) must be a shape, a tuple of sizes")
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def _slices(found: Sequence[ChannelImportance], name: str, axis: int, size: int) -> Float64[Tensor, " size"]:
    """The score of the channel at each index of a dimension; infinity where there is none."""
    slices = torch.full((size,), torch.inf, dtype=torch.float64)
    for each in found:
        for member in each.group.members:
            if (member.parameter, member.dim) == (name, axis):
                if max((index for indices in member.indices for index in indices), default=0) >= size:
                    raise ConfigError(f"`shapes` of `{name}` (={size} at axis {axis}) must hold its channels")
                for score, indices in zip(each.scores.cpu(), member.indices, strict=True):
                    slices[list(indices)] = score
    return slices


def _cost(cost: Cost | str) -> Cost:
    try:
        return Cost(cost)
    except ValueError:
        raise ConfigError(f"`cost` (={cost!r}) must be memory, flops or None") from None


def _layouts(uses: Sequence[Use], parameters: Mapping[str, Tensor]) -> dict[str, tuple[Layout, bool]]:
    """Weight -> its layout, and whether each output reads the input of its own index (depthwise)."""
    found: dict[str, tuple[Layout, bool]] = {}
    for use in uses:
        shape = tuple(parameters[use.parameter].shape)
        groups = 1
        if use.op.startswith("conv") and use.input_shape is not None:
            spatial = len(shape) - 2
            fan = use.input_shape[-1 - spatial]
            groups = fan // shape[1] if "transpose" not in use.op else 1
        layout = use_layout(use.op, use.argument, use.derived, shape, use.weight_shape, max(groups, 1))
        if layout is not None:
            found.setdefault(use.parameter, (layout, groups > 1 and shape[1] == 1))
    return found


def _gated(
    group: ChannelGroup, layouts: Mapping[str, tuple[Layout, bool]], parameters: Mapping[str, Tensor]
) -> list[_Place]:
    """The weights that read the channels; else those that make them; else whatever holds them."""
    readers, makers, others = [], [], []
    for member in group.members:
        if member.parameter not in parameters:
            continue
        index = torch.full((parameters[member.parameter].shape[member.dim],), -1)
        for channel, indices in enumerate(member.indices):
            index[list(indices)] = channel
        place = _Place(member.parameter, member.dim, index)
        layout, depthwise = layouts.get(member.parameter, (None, False))
        if layout is None:
            others.append(place)
        elif member.dim == layout.in_axis or depthwise:
            readers.append(place)
        else:
            makers.append(place)
    return readers or makers or others


def _gate_gradients(
    model: nn.Module,
    loss: Any,
    data: Any,
    groups: Sequence[ChannelGroup],
    places: Sequence[Sequence[_Place]],
    chunk: int | None,
) -> list[Float64[Tensor, "n channels"]]:
    parameters = dict(model.named_parameters())
    names = sorted({place.parameter for own in places for place in own})
    operator = CurvatureOperator(model, names, loss, data, "empirical", chunk=chunk, check=False)
    parts: list[list[Tensor]] = [[] for _ in groups]
    for gradients in operator.sample_gradients(chunk):
        products = {n: (g * parameters[n].detach()).double() for n, g in gradients.items()}
        for name, product in products.items():
            if not bool(product.isfinite().all()):
                raise DataError(
                    f"`{name}` has gradients in `data` that are NaN or infinite, or such weights: look for NaN or huge "
                    "values in the inputs, the targets and the weights"
                )
        count = len(next(iter(products.values())))
        for number, (group, own) in enumerate(zip(groups, places, strict=True)):
            total = torch.zeros(count, group.channels + 1, dtype=torch.float64, device=operator.space.device)
            for place in own:
                slices = products[place.parameter].movedim(place.dim + 1, 1).flatten(2).sum(2)
                total.index_add_(1, torch.where(place.index < 0, group.channels, place.index).to(total.device), slices)
            parts[number].append(total[:, :-1])
    return [torch.cat(each) for each in parts]


def _price(
    cost: Cost,
    group: ChannelGroup,
    uses: Sequence[Use],
    layouts: Mapping[str, tuple[Layout, bool]],
    samples: int,
) -> float:
    total = 0.0
    for member in group.members:
        for use in (use for use in uses if use.parameter == member.parameter):
            layout, depthwise = layouts.get(member.parameter, (None, False))
            share = len(member.indices[0]) / use.weight_shape[member.dim] if member.dim < len(use.weight_shape) else 0.0
            if cost is Cost.FLOPS:
                total += (use.macs or 0) * share
            elif layout is not None and (member.dim == layout.out_axis or depthwise):
                total += math.prod(use.output_shape or ()) * share
    return total / max(samples, 1) if total > 0 else 1.0
