"""Group Fisher: how much the loss of single samples feels a channel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError, DataError
from fxsparse.graph.channels_groups import ChannelGroup, Member
from fxsparse.graph.scopes import mode_of
from fxsparse.nn.recurrence import differentiable_recurrence
from fxsparse.passes.compact_verify import owned_copy
from fxsparse.planning.prune_groups import prunable_groups
from fxsparse.planning.prune_saliency import slices

Sample = TypeVar("Sample")


def group_fisher(
    model: nn.Module, example_inputs: Any, samples: Iterable[Sample], loss: Callable[[nn.Module, Sample], Tensor]
) -> dict[int, Tensor]:
    """Mean over samples of the squared gradient of the loss with respect to a mask on each channel.

    The mask stands before everything that reads the channel, so that its gradient is sum g w over the weights that read
    it (Liu et al. 2021, arXiv 2108.00708, equations 5 to 7). A copy of the model runs, in eval mode.

    Args:
        model: any module; it stays as it is.
        example_inputs: the inputs for which it is planned: a tuple of positional ones, or ``(args, kwargs)``.
        samples: one sample each: the square is taken before the mean.
        loss: a copy of the model and a sample -> the loss, a scalar.

    Returns:
        Group's number -> scores of shape (channels,), float64: a saliency for `plan_channels`.

    Raises:
        ConfigError: no samples, or a loss that is no scalar with a gradient.
        DataError: a loss that is not finite.
        CaptureError: the model cannot be run on the example inputs.
    """
    groups = prunable_groups(model, example_inputs)
    copy = owned_copy(model)
    parameters = {name: p.requires_grad_(True) for name, p in copy.named_parameters() if p.is_floating_point()}
    totals = {group.id: torch.zeros(group.channels, dtype=torch.float64) for group in groups}
    count = 0
    with mode_of(copy, False), torch.enable_grad(), differentiable_recurrence(copy):
        for sample in samples:
            value = loss(copy, sample)
            _check(value, count)
            found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            products = {
                name: (gradient * parameter).detach()
                for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
                if gradient is not None
            }
            for group in groups:
                totals[group.id] += _mask_gradient(group, products).square()
            count += 1
    if not count:
        raise ConfigError("`samples` (=empty) must hold at least one sample")
    return {number: total / count for number, total in totals.items()}


def _check(value: object, count: int) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"`loss` (={shown}) must return a scalar that depends on the model's parameters")
    if not bool(torch.isfinite(value.detach()).all()):
        raise DataError(f"`loss` (={float(value.detach())}) of sample {count} is not finite")


def _mask_gradient(group: ChannelGroup, products: dict[str, Tensor]) -> Tensor:
    """Sum g w over the weights that read each channel; over all weights where it is not known which do."""
    parts = [(member, part.double().cpu().sum(1)) for member, part in slices(group, products)]
    reading = [part for member, part in parts if _reads(member)] or [part for _, part in parts]
    return torch.stack(reading).sum(0) if reading else torch.zeros(group.channels, dtype=torch.float64)


def _reads(member: Member) -> bool:
    """Whether the dimension is the one along which a product sums."""
    op, _, argument = member.role.partition(".")
    if argument != "weight" or not (op == "linear" or "conv" in op):
        return False
    return member.dim == (0 if "transpose" in op else 1)
