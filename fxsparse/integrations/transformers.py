"""A callback for the Hugging Face Trainer (extra `transformers`): a method drives the masks of the trained model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fxsparse.errors import ConfigError, DataError
from fxsparse.lottery.run_directory import committed
from fxsparse.training.attach import attach, make_loadable
from fxsparse.training.handle import Handle
from fxsparse.training.snapshot import Snapshot
from fxsparse.training.updater import Method

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "the Hugging Face callback needs the package transformers: pip install 'fxsparse[transformers]'"
    ) from error

FOLDER = "fxsparse"


class SparseTraining(TrainerCallback):
    """Trains a model sparse: `Trainer(model=fxsparse.transform(model, ...), callbacks=[SparseTraining(method)], ...)`.

    The Trainer, its arguments and its optimizer stay as they are; accumulation, mixed precision, clipping and DDP are
    as in `fxsparse.attach`. Each checkpoint of the Trainer gets a folder `fxsparse` (safetensors and JSON) with what
    the method needs, and `trainer.train(resume_from_checkpoint=...)` goes on bit for bit.

    Args:
        method: A frozen method, such as `RigL(sparsity=0.9)`.
        total_steps: Length of the training in optimizer steps; the Trainer's `max_steps` by default.
        resume_from: The checkpoint's folder, where it is neither `args.resume_from_checkpoint` nor in `output_dir`.

    Attributes:
        handle: The handle; None before the training, detached after it.

    Raises:
        ConfigError: when the training starts: as `fxsparse.attach`.
        DataError: a resumed checkpoint has no state of the method.
    """

    def __init__(
        self, method: Method, total_steps: int | None = None, *, resume_from: str | Path | None = None
    ) -> None:
        if not isinstance(method, Method):
            raise ConfigError(f"`method` (={method!r}) must be a fxsparse method such as RigL(sparsity=0.9)")
        self.method, self.total_steps, self.resume_from = method, total_steps, resume_from
        self.handle: Handle | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Before a checkpoint is loaded."""
        if isinstance(given.get("model"), nn.Module):
            make_loadable(given["model"], self.method)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Attach: the optimizer is there; a resumed checkpoint is loaded."""
        model: nn.Module = given["model"]
        optimizer: Optimizer = given["optimizer"]
        kept = self._saved(args, state) if state.global_step > 0 else None
        self.handle = attach(model, optimizer, self.method, self.total_steps or state.max_steps, state=kept)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Put the method's state into the checkpoint."""
        if self.handle is not None and self.handle.attached and state.is_world_process_zero:
            _write(Snapshot.of(self.handle.state_dict()), _checkpoint(args, state) / FOLDER)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Let go of the optimizer."""
        if self.handle is not None:
            self.handle.detach()

    def _saved(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        named = args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else None
        places = [Path(each) for each in (self.resume_from, named) if each is not None] or [_checkpoint(args, state)]
        for place in places:
            if (place / FOLDER).is_dir():
                found: dict[str, Any] = Snapshot.read(place / FOLDER).state()
                return found
        raise DataError(
            f"`{places[0]}` has no folder `{FOLDER}` of the method {type(self.method).__name__}; give `resume_from` "
            "the checkpoint that the Trainer goes on from"
        )


def _write(snapshot: Snapshot, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run, whose checkpoint the Trainer has just written over
    with committed(folder, manifest=False) as temporary:
        snapshot.write(temporary)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
