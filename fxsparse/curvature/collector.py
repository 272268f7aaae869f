"""The Fisher collector: group Fisher of any model, batch by batch, by task."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxsparse.curvature.arguments import check_batches, check_kind
from fxsparse.curvature.collector_blocks import Pool
from fxsparse.curvature.collector_engine import Collected, Engine, Recipe, check_recipe
from fxsparse.curvature.collector_options import check_options, chosen_parameters, declared_heads
from fxsparse.curvature.collector_ranks import own_draws, set_draws
from fxsparse.curvature.collector_readings import DEFAULT_TASK, Readings
from fxsparse.curvature.collector_settled import Settled, until_settled
from fxsparse.curvature.collector_tasks import Tasks, TaskState
from fxsparse.curvature.fisher_batch import FisherBatch, read_batch
from fxsparse.curvature.fisher_scope import check_batch_norms, collecting_scope
from fxsparse.curvature.fisher_types import FisherType
from fxsparse.curvature.groups_types import GroupRule, Heads, aliases_of, check_groups
from fxsparse.curvature.kept_state import KeptParameters
from fxsparse.curvature.keys import Key, check_parameters, check_task
from fxsparse.curvature.losses import CallableLoss, as_loss
from fxsparse.curvature.operator_data import one_output
from fxsparse.curvature.storage import Storage
from fxsparse.errors import ConfigError, DataError, FxSparseError
from fxsparse.graph.inputs import tensors_of
from fxsparse.training.distributed import unwrap
from fxsparse.training.gathered import Gathered

if TYPE_CHECKING:
    import torch.distributed as dist


class FisherCollector(Readings):
    """Collects the diagonal of a Fisher matrix, summed over groups of parameters: F_g = (1/M) sum_n u_n,g.

    u_n,g is the sum over the entries of a group of the squared gradient of sample n alone; all uses of a tied or reused
    parameter are added before they are squared. The model is run in evaluation mode and left exactly as it was. Its
    first batch is examined: per-sample gradients that the taps cannot get right are computed sample by sample, with a
    warning that says why; what cannot be had at all raises. Nothing is left out.

    Args:
        model: any module; wrappers of DDP and torch.compile are looked through.
        loss: a torch loss, an `OutputLoss`, a function of outputs and targets (empirical only), "cross_entropy", "mse"
            or "bce". It says how outputs are scored; its reduction over samples plays no part.
        kind: which Fisher; "sampled" is "sketch".
        unit: "sample" or "token": M counts samples, or positions that count (attention mask, `ignore_index`).
        groups: "auto" (channels, heads, tokens, elements by module type), "element", or a function of (name, parameter,
            module) that returns a `Grouping`, an int64 index over leading axes, "element" or None for "auto".
        accumulate: "mean" over all units, or "ema" over updates.
        beta: decay of the exponential mean, in [0, 1).
        samples: draws of MC and SKETCH per unit.
        support: "mask": dead entries of masked weights count as zero; "dense": masks are overlooked.
        storage: format of what `consolidate` keeps: "fp32", "cpu_fp32", "cpu_fp16".
        bn: BatchNorm in training mode is frozen on its running statistics ("freeze") or raises ("raise").
        chunk: samples of one forward pass; chosen by memory where it is not given.
        generator: for draws and signs, on the model's device; a private one where it is not given, seeded by the rank,
            so that the draws of several processes differ; give each rank one of its own.
        parameters: names of the parameters; all that require gradients where it is not given.
        heads: declared attention layouts.
        token_method: how positions of one sequence are told apart by "empirical" and "true" per token: one backward
            pass each ("exact"), random signs ("signs"), or layer by layer ("expand", exact only without mixing).
        absent: whether an exponential mean decays where no gradient reached a parameter ("zero") or stays ("skip").
        variance: whether variances are kept ("mean" only); for single entries that costs memory.
        output: takes the outputs [N, ...] out of what the model returns.

    Attributes:
        settled: whether the last `collect` ended because the largest groups had settled; None before one.

    Raises:
        ConfigError: an option that does not exist, no module, no parameter, or one that is complex or stored alive
            only.
        CoupledSamples: a norm that mixes samples.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any = "cross_entropy",
        kind: FisherType | str = FisherType.EMPIRICAL,
        unit: str = "sample",
        groups: str | GroupRule = "auto",
        accumulate: str = "mean",
        beta: float = 0.99,
        samples: int = 1,
        support: str = "mask",
        storage: Storage | str = Storage.FP32,
        bn: str = "freeze",
        chunk: int | None = None,
        generator: torch.Generator | None = None,
        *,
        parameters: Collection[str] | None = None,
        heads: Iterable[Heads] = (),
        token_method: str = "exact",
        absent: str = "skip",
        variance: bool = True,
        output: Callable[[Any], Tensor] = one_output,
    ) -> None:
        check_kind(model, "model", nn.Module)
        self.model = unwrap(model)
        self._gathered = Gathered.of(self.model)
        check_options(unit, accumulate, support, absent, beta, variance, output)
        heads = declared_heads(heads)
        if not isinstance(generator, torch.Generator | None):
            raise ConfigError(f"`generator` (={generator!r}) must be a torch.Generator, or None")
        check_groups(groups)
        check_batch_norms(self.model, bn)
        self.kind, self.unit, self.bn, self.storage = FisherType.of(kind), unit, bn, Storage.of(storage)
        self.accumulate, self.beta, self.absent = accumulate, beta, absent
        own = as_loss(loss, per_position=unit == "token")
        if isinstance(own, CallableLoss) and self.kind is not FisherType.EMPIRICAL:
            own.check_natural(torch.zeros(1, 1), None)
        keep = variance and accumulate == "mean"
        recipe = Recipe(own, self.kind, unit == "token", token_method, samples, support == "dense", keep, chunk)
        check_recipe(recipe)
        with self._gathered.stand_ins():
            chosen = chosen_parameters(self.model, parameters)
            check_parameters(chosen)
            self._aliases = aliases_of(self.model)
            self._engine = Engine(self.model, chosen, output, groups, heads, recipe)
        self._device = next(iter(chosen.values())).device
        self._generator = generator
        self._written = KeptParameters(self.model)
        self._tasks = Tasks()
        self.settled: bool | None = None

    def update(self, batch: Any, task: str = DEFAULT_TASK) -> None:
        """Take in a batch; one without units that count, or empty, is noted in `skipped` and changes nothing else.

        After an exception the collector is as it was before.

        Args:
            batch: ``(inputs, targets)``, a mapping with ``labels``, or inputs alone (see `read_batch`).
            task: to which task it belongs.

        Raises:
            ConfigError: a weight is stored alive only by now.
            DataError: a batch that cannot be read or run by the model, or whose squares are NaN or infinite.
            CoupledSamples: the loss of a sample depends on the others.
            UncoveredParameter: a parameter whose per-sample gradients cannot be had.
            UnsupportedLoss: the loss has no curvature of this kind.
        """
        found = self._collect(batch, check_task(task))
        state = self._tasks.setdefault(task, TaskState())
        state.add(found, self.beta if self.accumulate == "ema" else None, self.absent == "zero", self._place())

    def oneshot(self, batch: Any, task: str = DEFAULT_TASK) -> dict[str, Tensor]:
        """The Fisher of this batch alone, by key; no task's state is touched.

        Raises:
            DataError: it holds no unit that counts.
        """
        found = self._collect(batch, check_task(task))
        if not found.mass:
            raise DataError("the batch holds no unit that counts: every position is masked or ignored")
        return {str(Key(task, *entry)): self._shaped(entry, moments.mean()) for entry, moments in found.moments.items()}

    def collect(
        self, batches: Iterable[Any], task: str = DEFAULT_TASK, *, top: int, overlap: float = 0.99, patience: int = 3
    ) -> int:
        """Update until the `top` groups with the largest F (all keys pooled) have settled; `settled` tells whether.

        Where several processes run together, all of them call it: each looks at its own batches, and they stop after
        the same number, when all have settled or the first has no batch left.

        Args:
            batches: what to update with, in order.
            task: the task.
            top: how many groups.
            overlap: share of them that must be the same as after the batch before, in (0, 1].
            patience: for how many batches in a row.

        Returns:
            How many batches were used.

        Raises:
            ConfigError: a number out of range (nothing has changed then), or fewer than `top` groups.
            DataError: as `update`, here or on another rank, or a single batch that is not in a list.
        """
        check_batches(batches, "batches")
        check_task(task)
        watch = Settled(top, overlap, patience)

        def pooled() -> Tensor | None:
            state = self._tasks[task]
            return state.pooled() if state.entries() else None

        used, self.settled = until_settled(batches, lambda batch: self.update(batch, task), pooled, watch)
        return used

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up what the ranks have collected, so that all hold what one process would have.

        What was added up before counts once: it may be called as often as one likes, also after a state was loaded on
        all ranks or on one (load after `init_process_group`).

        Raises:
            ConfigError: processes do not run together, the mode is "ema", or ranks have loaded different states.
        """
        from fxsparse.curvature.collector_reduce import reduce_tasks

        if self.accumulate == "ema":
            raise ConfigError("`accumulate` (='ema') has steps that differ between ranks: reduce a 'mean' collector")
        reduce_tasks(self._tasks, self._place(), group)

    def state_dict(self) -> dict[str, Any]:
        """Everything collected: nested dicts of tensors and numbers with a schema version."""
        from fxsparse.curvature.collector_file import state_of

        return state_of(self._tasks, self._settings(), self._draws(), self._shapes())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ConfigError: another schema version, a collector with another loss or other settings, groups, parameters or
                shapes, the state of another one of several ranks with sums that were not reduced, or a damaged state.
                Nothing has changed then.
        """
        from fxsparse.curvature.collector_restore import tasks_of

        with self._gathered.stand_ins():
            known = self._engine.known()
        tasks = tasks_of(state, self._settings(), self._shapes(), known)
        set_draws(self._draws(), state["generator"], state["rank"])
        self._tasks = Tasks({task: held.to(self._place()) for task, held in tasks.items()})

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file, bit for bit, in one step.

        Raises:
            ConfigError: no path.
            OSError: it cannot be written.
        """
        from fxsparse.curvature.collector_file import write

        check_kind(path, "path", str, Path)
        write(self.state_dict(), Path(path))

    def load(self, path: str | Path) -> None:
        """Read a state that `save` wrote.

        Raises:
            ConfigError: as `load_state_dict`, or no such file of ours.
        """
        from fxsparse.curvature.collector_file import read

        check_kind(path, "path", str, Path)
        self.load_state_dict(read(Path(path)))

    def _collect(self, batch: Any, task: str) -> Collected:
        read = read_batch(batch, self._device)
        check_batch_norms(self.model, self.bn)
        draws = self._draws()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._gathered.whole())  # all ranks together, also with an empty batch
            if not read.samples:
                return Collected(Pool.of({}), 0.0, frozenset())
            stack.enter_context(collecting_scope(self.model))
            stack.enter_context(self._written.kept())
            stack.enter_context(self._engine.undone(draws))
            try:
                found = self._engine.collect(read, draws)
            except (FxSparseError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                self._check_runs(read, error)
                raise
            found.check_finite()
            return found

    def _check_runs(self, batch: FisherBatch, error: Exception) -> None:
        """Raise DataError where the model itself, as it is, cannot run on a batch or on one of its samples."""
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of(batch.fresh()))
        for part, what in ((batch, "this batch"), (batch.select([0]), "one sample of this batch")):
            args, kwargs = part.fresh()
            try:
                with torch.no_grad():
                    self.model(*args, **kwargs)
            except Exception as own:
                told = f"{type(own).__name__}: {own}"
                raise DataError(
                    f"the model cannot run on {what} (={shapes}), whose samples lie along axis 0; nothing was added: "
                    f"{told}"
                ) from error

    def _draws(self) -> torch.Generator:
        if self._generator is None:
            self._generator = own_draws(self._device)
        return self._generator

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self._engine.parameters.items()}

    def _settings(self) -> dict[str, str]:
        support = "dense" if self._engine.recipe.dense else "mask"
        own = {"kind": self.kind.value, "unit": self.unit, "accumulate": self.accumulate, "support": support}
        decay = {"beta": repr(float(self.beta)), "absent": self.absent} if self.accumulate == "ema" else {}
        return {**own, **decay, **self._engine.described()}

    def _place(self) -> torch.device:
        return self._device if self.storage is Storage.FP32 else torch.device("cpu")
