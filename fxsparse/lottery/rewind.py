"""Where each round starts from: the whole state after k dense steps, masked.

Source: Frankle & Carbin, ICLR 2019 (k = 0); Frankle et al., ICML 2020 (arXiv 1912.05671, late rewinding); Renda et al.,
ICLR 2020 (arXiv 2003.02389, learning-rate rewinding and fine-tuning).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsparse.errors import ConfigError
from fxsparse.nn import masked_weights, set_masks
from fxsparse.training.loop import TrainState
from fxsparse.training.snapshot import Snapshot


class Rewind(enum.Enum):
    """What a round restores."""

    INIT = "init"
    """The state at initialisation, k = 0."""
    STEP = "step"
    """The state after k > 0 steps."""
    LR = "lr"
    """Weights and buffers are kept; optimizer fresh, schedule at step k."""
    NONE = "none"
    """Weights and buffers are kept; optimizer fresh, constant final learning rate."""


class RewindOptimizer(enum.Enum):
    """The optimizer's moments after a rewind."""

    RESTORE = "restore"
    """Those of step k, masked."""
    FRESH = "fresh"
    """None; the schedule stands at step k."""


class DataOrder(enum.Enum):
    """The batches that a round sees."""

    REPLAY = "replay"
    """Those of round 0, from step k on."""
    FRESH = "fresh"
    """A function of seed and round."""


@dataclass(frozen=True)
class Step:
    """A position in a training: whole epochs plus iterations."""

    epochs: int = 0
    iterations: int = 0

    @classmethod
    def parse(cls, text: str | int, name: str = "rewind_step") -> Step:
        """Read ``"2ep"``, ``"500it"``, ``"2ep50it"`` or a number of iterations.

        Raises:
            ConfigError: any other text.

        Examples:
            >>> Step.parse("2ep50it").resolve(steps_per_epoch=100)
            250
        """
        match = re.fullmatch(r"(?:(\d+)ep)?(?:(\d+)(?:it)?)?", str(text).strip())
        if match is None or isinstance(text, bool) or not any(match.groups()):
            raise ConfigError(f"`{name}` (={text!r}) must look like 2ep, 500it or 2ep50it")
        epochs, iterations = match.groups()
        return cls(int(epochs or 0), int(iterations or 0))

    def resolve(self, steps_per_epoch: int) -> int:
        """The step, in optimizer steps."""
        return self.epochs * steps_per_epoch + self.iterations

    def __str__(self) -> str:
        return (f"{self.epochs}ep" if self.epochs else "") + (
            f"{self.iterations}it" if self.iterations or not self.epochs else ""
        )


def rewind(
    state: TrainState,
    origin: Snapshot,
    masks: Mapping[str, Tensor],
    optimizer: RewindOptimizer = RewindOptimizer.RESTORE,
    kept: Mapping[str, Tensor] | None = None,
) -> None:
    """Set a training to the start of a round, in place: step k, masked weights, masked moments.

    Args:
        state: a training of a masked model.
        origin: the whole state at step k.
        masks: the round's masks, for every masked weight.
        optimizer: whether the moments of step k come back; the schedule stands at step k either way.
        kept: parameters and buffers that stay trained (`Rewind.LR`, `Rewind.NONE`); the optimizer is fresh then.
    """
    state.restore(origin)
    if kept is not None:
        live = {**dict(state.model.named_parameters()), **dict(state.model.named_buffers())}
        with torch.no_grad():
            for name, tensor in kept.items():
                live[name].copy_(tensor)
    if kept is not None or optimizer is RewindOptimizer.FRESH:
        groups = state.optimizer.state_dict()["param_groups"]
        state.optimizer.load_state_dict({"state": {}, "param_groups": groups})
    set_masks(state.model, masks)
    mask_moments(state.model, state.optimizer)


def moments(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Every optimizer state tensor shaped like its masked weight: (weight's name, slot, tensor, mask)."""
    for name, masked in masked_weights(model).items():
        for slot, value in optimizer.state.get(masked.weight, {}).items():
            if isinstance(value, Tensor) and value.shape == masked.weight.shape:
                yield name, slot, value, masked.mask


@torch.no_grad()
def mask_moments(model: nn.Module, optimizer: Optimizer) -> None:
    """Write exact zeros to the dead entries of every moment, in place."""
    for _, _, value, mask in moments(model, optimizer):
        value.masked_fill_(~mask, 0.0)


class DeadWeights:
    """Writes exact zeros to the dead weights after every optimizer step, until `close`.

    Gradients of dead weights are masked before the step by the model's own masks; this is the second half of the
    guarantee, for optimizers that move a weight without a gradient.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model = model
        self.refresh()
        self._hook = optimizer.register_step_post_hook(self._zero)

    def refresh(self) -> None:
        """Read the masks again; call it after they have changed."""
        found = masked_weights(self.model).values()
        self._dead = [(masked.weight, ~masked.mask) for masked in found if not bool(masked.mask.all())]

    @torch.no_grad()
    def _zero(self, *_: object) -> None:
        for weight, dead in self._dead:
            weight.masked_fill_(dead, 0.0)

    def close(self) -> None:
        """Take the hook off."""
        self._hook.remove()
