"""What a collector knows of one task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxsparse.curvature.collector_blocks import merged
from fxsparse.curvature.collector_engine import Collected
from fxsparse.curvature.collector_moments import Decaying, Moments
from fxsparse.curvature.fisher_squares import Entry
from fxsparse.curvature.storage import Storage, Stored, store
from fxsparse.errors import ConfigError, DataError


@dataclass(eq=False)
class TaskState:
    """The running sums of one task.

    Attributes:
        moments: by entry, of "mean": what this rank collected since the last reduction.
        shared: by entry, of "mean": what was reduced, the same on all ranks.
        origin: names what is shared: two ranks with the same one hold the same; "" for nothing.
        decaying: by entry, of "ema".
        mass: by entry, the units seen by "ema".
        stored: the last snapshot.
        skipped: batches without a unit that counts, since the last reduction.
        shared_skipped: the same, reduced.
    """

    moments: Mapping[Entry, Moments] = field(default_factory=dict)
    shared: Mapping[Entry, Moments] = field(default_factory=dict)
    origin: str = ""
    decaying: dict[Entry, Decaying] = field(default_factory=dict)
    mass: dict[Entry, float] = field(default_factory=dict)
    stored: dict[Entry, Stored] = field(default_factory=dict)
    skipped: int = 0
    shared_skipped: int = 0

    def entries(self) -> tuple[Entry, ...]:
        """What was collected."""
        return tuple({**self.shared, **self.moments} or self.decaying)

    def whole(self, entry: Entry) -> Moments:
        """The moments of an entry, reduced or not."""
        return self.shared.get(entry, Moments()).merge(self.moments.get(entry, Moments()))

    def mean(self, entry: Entry) -> Tensor:
        """F of an entry, flat."""
        return self.decaying[entry].mean() if entry in self.decaying else self.whole(entry).mean()

    def units(self, entry: Entry) -> float:
        """M of an entry."""
        return self.mass[entry] if entry in self.decaying else self.whole(entry).mass

    def effective(self, entry: Entry) -> float:
        """V1^2 / V2 of an entry."""
        return self.decaying[entry].effective if entry in self.decaying else self.whole(entry).effective

    def pooled(self) -> Tensor:
        """F of all entries, one after the other."""
        return torch.cat([self.mean(entry).flatten().cpu() for entry in self.entries()])

    def add(self, found: Collected, beta: float | None, zeros: bool, place: torch.device) -> None:
        """Take in a batch; `beta` None stands for a plain mean, `zeros` lets absent entries decay."""
        if not found.mass:
            self.skipped += 1
            return
        if beta is None:
            self.moments = merged(self.moments, found.moments.to(place))
            return
        for entry, new in found.moments.items():
            assert new.total is not None
            total = new.total.to(place)
            running = self.decaying.setdefault(entry, Decaying(torch.zeros_like(total)))
            if zeros or entry in found.present:
                running.step(total, found.mass, beta, new.count)
            self.mass[entry] = self.mass.get(entry, 0.0) + found.mass

    def to(self, device: torch.device) -> TaskState:
        """The same on a device, snapshots too, which lie with the sums unless they are stored on the CPU."""
        self.moments = {entry: each.to(device) for entry, each in self.moments.items()}
        self.shared = {entry: each.to(device) for entry, each in self.shared.items()}
        for running in self.decaying.values():
            running.num = None if running.num is None else running.num.to(device)
        self.stored = {entry: each.to(device) for entry, each in self.stored.items()}
        return self

    def consolidate(self, storage: Storage) -> None:
        """Keep a snapshot."""
        self.stored = {entry: store(self.mean(entry), storage) for entry in self.entries()}


class Tasks(dict[str, TaskState]):
    """The states by task."""

    def known(self, task: str) -> TaskState:
        """The state of a task.

        Raises:
            ConfigError: it has had no update.
        """
        if task not in self:
            known = ", ".join(map(repr, self)) or "none yet"
            raise ConfigError(f"`task` (={task!r}) is not known; tasks with updates: {known}")
        return self[task]

    def seen(self, task: str) -> TaskState:
        """The state of a task with units.

        Raises:
            ConfigError: it has had no update.
            DataError: it has had no unit that counts.
        """
        state = self.known(task)
        if not state.entries():
            raise DataError(f"`task` (={task!r}) has no unit that counts (every batch was skipped): update it further")
        return state
