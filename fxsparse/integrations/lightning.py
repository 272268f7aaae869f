"""A callback for Lightning (extra `lightning`): a method drives the masks of the module that a Trainer fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fxsparse.errors import ConfigError
from fxsparse.nn import masked_weights
from fxsparse.training.attach import attach, make_loadable
from fxsparse.training.handle import Handle
from fxsparse.training.updater import Method

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "the Lightning callback needs the package lightning: pip install 'fxsparse[lightning]'"
    ) from error


class SparseTraining(Callback):
    """Trains a LightningModule sparse; the module, its optimizers and the Trainer stay as they are.

    The module holds a model with masks, `self.net = fxsparse.transform(net, (example,))`, or is one. Automatic and
    manual optimization, accumulation, precision plugins and DDP work as in `fxsparse.attach`. Checkpoints hold what the
    method needs: `trainer.fit(module, ckpt_path=...)` goes on bit for bit. A second `fit` with the same callback goes
    on where the first ended. The averaged models of Lightning's own callbacks (`WeightAveraging`, `EMAWeightAveraging`,
    `StochasticWeightAveraging`) follow, in any order of the callbacks.

    Args:
        method: A frozen method, such as `RigL(sparsity=0.9)`.
        total_steps: Length of the training in optimizer steps; what the Trainer estimates by default. Give it where the
            training is cut into several calls of `fit`.
        log: Log `sparsity` (share of dead masked weights) after each mask update.

    Attributes:
        handle: The handle; None before the first `fit`, detached after each.

    Raises:
        ConfigError: when the fit starts: as `fxsparse.attach`, or no optimizer holds all masked weights.
    """

    def __init__(self, method: Method, total_steps: int | None = None, *, log: bool = True) -> None:
        if not isinstance(method, Method):
            raise ConfigError(f"`method` (={method!r}) must be a fxsparse method such as RigL(sparsity=0.9)")
        self.method, self.total_steps, self.log_sparsity = method, total_steps, log
        self.handle: Handle | None = None
        self._state: Mapping[str, Any] | None = None
        self._logged = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before a checkpoint is loaded."""
        if stage == "fit":
            for model in (pl_module, *_averages(trainer)):
                make_loadable(model, self.method)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: the optimizers are there, and the checkpoint's weights and masks."""
        optimizer = _optimizer(trainer.optimizers, pl_module)
        self.handle = attach(pl_module, optimizer, self.method, self._steps(trainer), state=self._state)
        for average in _averages(trainer):
            self.handle.follow(average)
        self._logged = self.handle.updates

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """Log the sparsity where the masks were updated."""
        if self.handle is None or not self.log_sparsity or self.handle.updates == self._logged:
            return
        self._logged = self.handle.updates
        masks = [weight.mask for weight in masked_weights(pl_module).values()]
        alive = sum(int(mask.sum()) for mask in masks)
        pl_module.log("sparsity", torch.tensor(1 - alive / sum(mask.numel() for mask in masks)))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizer; a further fit goes on from here. Dead weights are zero, whoever wrote them last."""
        if stage == "fit":
            self._detach()
            for weight in masked_weights(pl_module).values():
                weight.apply_()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the optimizer of a fit that failed."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """The handle's state; empty before the first fit."""
        if self.handle is not None and self.handle.attached:
            return self.handle.state_dict()
        return dict(self._state or {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next fit goes on from this state."""
        self._state = state_dict or None

    def _steps(self, trainer: Trainer) -> int | None:
        if self.total_steps is not None:
            return self.total_steps
        steps = trainer.estimated_stepping_batches
        return int(steps) if math.isfinite(steps) and steps > 0 else None

    def _detach(self) -> None:
        if self.handle is not None and self.handle.attached:
            self._state = self.handle.state_dict()
            self.handle.detach()


def _averages(trainer: Trainer) -> list[nn.Module]:
    """The averaged copies that other callbacks keep of the module."""
    every: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # the Trainer's own list
    found = [getattr(callback, "_average_model", None) for callback in every]
    return [average for average in found if isinstance(average, nn.Module)]


def _optimizer(optimizers: list[Optimizer], module: LightningModule) -> Optimizer:
    """The optimizer of the masked weights."""
    wanted = {id(weight.weight) for weight in masked_weights(module).values()}
    for optimizer in optimizers:
        if wanted <= {id(each) for group in optimizer.param_groups for each in group["params"]}:
            return optimizer
    if len(optimizers) == 1:
        return optimizers[0]  # attach says what it lacks
    raise ConfigError(
        f"none of the {len(optimizers)} optimizers of `{type(module).__name__}` holds all masked weights; give them to "
        "one optimizer, or exclude the others' weights from the masks"
    )
