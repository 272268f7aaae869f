"""Averaged copies of a model (EMA, SWA), which lose the same channels as the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from fxsparse.errors import ConfigError
from fxsparse.graph.taps import without_taps
from fxsparse.nn import masks, set_masks
from fxsparse.passes.compact_channels import Compacted, compact_channels
from fxsparse.passes.compact_classes import Place
from fxsparse.passes.compact_verify import owned_copy
from fxsparse.planning.sparsify import finalize


class Followers:
    """Copies that average a model's weights, and are compacted with it.

    Args:
        followers: wrappers whose attribute `module` is a copy of the model, as of
            `torch.optim.swa_utils.AveragedModel`; one, or several.
        model: the model.
        captured: the form of a model that is compacted.

    Raises:
        ConfigError: a follower holds no copy of the model.
    """

    def __init__(
        self, followers: nn.Module | Iterable[nn.Module], model: nn.Module, captured: Callable[[nn.Module], nn.Module]
    ) -> None:
        self.followers = [followers] if isinstance(followers, nn.Module) else list(followers)
        self.captured, self.made = captured, list[nn.Module]()
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for follower in self.followers:
            inner = without_taps(getattr(follower, "module", None))  # type: ignore[arg-type]  # checked in the next line
            found = dict(inner.named_parameters()) if isinstance(inner, nn.Module) else {}
            if {name: tuple(parameter.shape) for name, parameter in found.items()} != shapes:
                raise ConfigError(
                    f"`followers` (={type(follower).__name__}) must be wrappers whose `module` is a copy of the model, "
                    "such as torch.optim.swa_utils.AveragedModel"
                )

    def prepare(
        self, found: Compacted, example_inputs: Any, dead: Mapping[str, torch.Tensor], zero: Callable[[nn.Module], None]
    ) -> None:
        """Make the smaller copies; nothing has changed yet.

        Args:
            found: what the model lost.
            example_inputs: its inputs.
            dead: the model's masks, by parameter name: what is dead there is zero in the copies.
            zero: writes further zeros.

        Raises:
            ConfigError: a copy needs a channel that the model could lose.
        """
        channels = found.channels
        lost = {} if channels is None else {place: _lost(found, place) for place in found.solution.kept}
        for follower in self.followers:
            copy = owned_copy(self.captured(without_taps(follower.module)))  # type: ignore[arg-type]  # a module, as was checked
            _share_masks(copy, dead)
            zero(copy)
            made = compact_channels(copy, finalize(copy) if masks(copy) else copy, example_inputs, only=lost)
            left = [place for place, kept in found.solution.kept.items() if not _same(made, place, kept)]
            if left:
                name, dim = left[0]
                raise ConfigError(
                    f"`followers` (={type(follower).__name__}): `{name}`[{dim}] cannot lose there what it loses in the "
                    "model; make the average anew from the result"
                )
            self.made.append(made.module)

    def commit(self) -> None:
        """Put the smaller copies in place of the old ones."""
        for follower, module in zip(self.followers, self.made, strict=True):
            module.train(follower.module.training)  # type: ignore[union-attr]  # a module, as was checked
            follower.module = module


def _lost(found: Compacted, place: Place) -> tuple[int, ...]:
    assert found.channels is not None
    labels = found.channels.sources[place[0]][place[1]]
    assert labels is not None
    return tuple(map(int, np.setdiff1d(np.arange(labels.size), found.solution.kept[place])))


def _same(made: Compacted, place: Place, kept: Any) -> bool:
    return place in made.solution.kept and np.array_equal(made.solution.kept[place], kept)


@torch.no_grad()
def _share_masks(copy: nn.Module, dead: Mapping[str, torch.Tensor]) -> None:
    held = masks(copy)
    set_masks(copy, {name: mask for name, mask in dead.items() if name in held})
    for name, mask in dead.items():
        if name not in held:
            copy.get_parameter(name).mul_(mask)
