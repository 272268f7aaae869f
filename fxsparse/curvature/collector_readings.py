"""What a Fisher collector tells of what it has collected, by task and key."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from fxsparse.curvature.collector_engine import Engine
from fxsparse.curvature.collector_moments import Moments
from fxsparse.curvature.collector_options import GroupInfo
from fxsparse.curvature.collector_tasks import Tasks
from fxsparse.curvature.fisher_squares import Entry
from fxsparse.curvature.groups import Grouping
from fxsparse.curvature.keys import Key, restrict
from fxsparse.curvature.storage import Storage
from fxsparse.errors import ConfigError
from fxsparse.training.gathered import Gathered

DEFAULT_TASK = "default"


class Readings:
    """Reads the running sums of tasks; `FisherCollector` collects them.

    Attributes:
        storage: format of what `consolidate` keeps.
    """

    storage: Storage
    _tasks: Tasks
    _engine: Engine
    _gathered: Gathered
    _aliases: Mapping[str, tuple[str, ...]]

    def get(
        self,
        task: str = DEFAULT_TASK,
        expand: bool = False,
        param: str | None = None,
        group_type: str | None = None,
    ) -> dict[str, Tensor]:
        """F by key: [groups], or the parameter's shape for single entries.

        Args:
            task: the task.
            expand: whether sums are spread evenly over their entries, into tensors of the parameters' shapes.
            param: only this parameter (its whole first name).
            group_type: only this group type.

        Raises:
            ConfigError: the task is not known, or nothing fits.
            DataError: it has no unit that counts.
        """
        state = self._tasks.seen(task)
        values = {str(Key(task, *entry)): entry for entry in state.entries()}
        chosen = restrict(values, param=param, group_type=group_type)
        if not chosen:
            raise ConfigError(
                f"`param` (={param!r}) with `group_type` (={group_type!r}) names nothing of task {task!r}"
            )
        return {key: self._read(entry, state.mean(entry), expand) for key, entry in chosen.items()}

    def parameters(self, task: str = DEFAULT_TASK) -> dict[str, Tensor]:
        """F by parameter name, in the parameters' shapes: what damage, EWC and merging take.

        Sums of groups are spread evenly over their entries; the groups of one parameter (queries, keys and values of a
        fused projection) are put together. A tied parameter comes under its first name.

        Raises:
            ConfigError: the task is not known.
            DataError: it has no unit that counts.
        """
        state, found = self._tasks.seen(task), dict[str, Tensor]()
        for entry in state.entries():
            spread = self._read(entry, state.mean(entry), True)
            found[entry[0]] = found[entry[0]] + spread if entry[0] in found else spread
        return found

    def effective_size(self, task: str = DEFAULT_TASK) -> dict[str, float]:
        """Effective number of units (samples or sequences) behind F, by key: V1^2 / V2 of their weights.

        A mean weighs all alike, so that it is their number; an exponential mean forgets: with equal batches of n it
        tends to n (1 + beta) / (1 - beta). It is 0 where `absent` (="skip") has left a parameter out so far.

        Raises:
            ConfigError: the task is not known.
        """
        state = self._tasks.known(task)
        return {str(Key(task, *entry)): state.effective(entry) for entry in state.entries()}

    def variance(self, task: str = DEFAULT_TASK) -> dict[str, Tensor]:
        """Unbiased variance over units (samples or sequences) of u, by key.

        Raises:
            ConfigError: the task is not known, or variances are not kept.
            DataError: fewer than two units.
        """
        return self._of_moments(task, Moments.variance)

    def standard_error(self, task: str = DEFAULT_TASK) -> dict[str, Tensor]:
        """Standard error of F, by key; per token that of the ratio of sums over sequences.

        Raises:
            ConfigError: the task is not known, or variances are not kept.
            DataError: fewer than two units.
        """
        return self._of_moments(task, Moments.standard_error)

    def consolidate(self, task: str = DEFAULT_TASK) -> dict[str, Tensor]:
        """Keep a snapshot of the task's F in the collector's storage format, and return what it reads as.

        Running sums stay as they are, in fp32 or wider; the snapshot is what `snapshot` and `save` know.

        Raises:
            ConfigError: the task is not known.
            DataError: it has no unit that counts.
        """
        self._tasks.seen(task).consolidate(self.storage)
        return self.snapshot(task)

    def snapshot(self, task: str = DEFAULT_TASK) -> dict[str, Tensor]:
        """What `consolidate` kept, by key.

        Raises:
            ConfigError: the task is not known or was not consolidated.
        """
        state = self._tasks.known(task)
        if not state.stored:
            raise ConfigError(f"`task` (={task!r}) was not consolidated: call consolidate first")
        return {str(Key(task, *entry)): self._shaped(entry, each.read()) for entry, each in state.stored.items()}

    def tasks(self) -> tuple[str, ...]:
        """The tasks with updates."""
        return tuple(self._tasks)

    def skipped(self, task: str = DEFAULT_TASK) -> int:
        """How many batches of the task held no unit that counts."""
        state = self._tasks.known(task)
        return state.skipped + state.shared_skipped

    def metadata(self, key: str) -> GroupInfo:
        """What belongs to a key.

        Raises:
            ConfigError: there is no such key.
        """
        parsed = Key.of(key)
        state = self._tasks.known(parsed.task)
        entry = parsed.param, parsed.group_type
        if entry not in state.entries():
            raise ConfigError(f"`key` (={key!r}) does not exist; keys look like {next(iter(state.entries()), None)}")
        aliases, slow = self._aliases[parsed.param], self._engine.slow.get(parsed.param, "")
        return GroupInfo.of(self._grouping(entry), aliases, state.units(entry), slow)

    def clear(self, task: str | None = None) -> None:
        """Forget a task altogether, or all of them.

        Raises:
            ConfigError: the task is not known.
        """
        if task is None:
            self._tasks.clear()
        else:
            self._tasks.known(task)
            del self._tasks[task]

    def _grouping(self, entry: Entry) -> Grouping:
        with self._gathered.stand_ins():
            return self._engine.grouping(entry)

    def _shaped(self, entry: Entry, values: Tensor) -> Tensor:
        return values.reshape(self._grouping(entry).output_shape).clone()

    def _read(self, entry: Entry, values: Tensor, expand: bool) -> Tensor:
        return self._grouping(entry).expand(values).clone() if expand else self._shaped(entry, values)

    def _of_moments(self, task: str, rule: Callable[[Moments], Tensor]) -> dict[str, Tensor]:
        state = self._tasks.seen(task)
        if not self._engine.recipe.separate:
            raise ConfigError("variances are kept by `variance` (=True) with `accumulate` (='mean') only")
        wholes = {entry: state.whole(entry) for entry in state.entries()}
        return {str(Key(task, *entry)): self._shaped(entry, rule(each)) for entry, each in wholes.items()}
