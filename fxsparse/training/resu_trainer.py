"""RESU for people without a training loop."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fxsparse.errors import ConfigError
from fxsparse.training.attach import attach
from fxsparse.training.loop import EpochRow, Evaluation, TrainState, evaluate, fit, start
from fxsparse.training.resu import RESU
from fxsparse.training.resu_handle import ResuHandle
from fxsparse.training.resu_phases import Phase
from fxsparse.training.resu_tournament import ResuReport
from fxsparse.training.snapshot import Snapshot
from fxsparse.training.task import Task


class RESUTrainer:
    """A task trained by RESU from its first step to its last; whoever has a loop uses `attach`.

    Args:
        task: What is trained; `task.build` returns a model with masks, as `fxsparse.transform` does.
        method: The method.
        seed: Decides initialisation, order of the samples and the model's own draws.

    Attributes:
        task: The task.
        state: Model, optimizer and position.
        handle: What `attach` returned.

    Raises:
        ConfigError: not a RESU, a model without masks, or a training that is too short for the cycles.

    >>> import torch
    >>> from fxsparse.nn import Linear
    >>> from fxsparse.training.loop import Samples
    >>> samples = Samples(torch.randn(64, 8), torch.arange(64) % 4)
    >>> task = Task(build=lambda: Linear(8, 4), train=samples, epochs=20, batch_size=16)
    >>> trainer = RESUTrainer(task, RESU(sparsity=0.75, cycles=2))
    >>> report = trainer.run()
    >>> int(trainer.model.weight_mask.sum()), trainer.phase.value
    (8, 'final')
    """

    def __init__(self, task: Task, method: RESU, seed: int = 0) -> None:
        if not isinstance(method, RESU):
            raise ConfigError(f"`method` (={method!r}) must be a RESU; use attach for other methods")
        self.task = task
        self.state: TrainState = start(task, seed)
        handle = attach(self.state.model, self.state.optimizer, method, task.total_steps)
        assert isinstance(handle, ResuHandle)
        self.handle = handle
        self.state.extras["resu"] = handle

    @property
    def model(self) -> nn.Module:
        """The model, trained in place."""
        return self.state.model

    @property
    def phase(self) -> Phase:
        """The phase of the next step."""
        return self.handle.phase

    def run(
        self,
        until: int | None = None,
        *,
        on_step: Callable[[TrainState, Tensor], None] | None = None,
        on_epoch: Callable[[TrainState, EpochRow], None] | None = None,
    ) -> ResuReport:
        """Train to step `until` (default: the task's last) and say what was resurrected; arguments as in `fit`."""
        fit(self.state, self.task, until, on_step=on_step, on_epoch=on_epoch)
        return self.handle.report()

    def evaluate(self) -> Evaluation:
        """Loss and accuracy on the task's validation samples.

        Raises:
            ConfigError: the task has none.
        """
        if self.task.validation is None:
            raise ConfigError("`validation` (=None) of the task must be given to evaluate")
        return evaluate(self.model, self.task.validation, self.task)

    def snapshot(self) -> Snapshot:
        """Everything that the continuation depends on; `restore` in a trainer of the same task and method goes on."""
        return self.state.capture()

    def restore(self, snapshot: Snapshot) -> None:
        """Go on where a snapshot was taken.

        Raises:
            ConfigError: it is of another model or method.
        """
        self.state.restore(snapshot)
