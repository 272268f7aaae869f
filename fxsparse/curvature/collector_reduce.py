"""Sums of several ranks: the same as one process that saw all the batches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fxsparse.curvature.collector_blocks import merged
from fxsparse.curvature.collector_moments import Moments
from fxsparse.curvature.collector_ranks import told
from fxsparse.curvature.collector_tasks import TaskState
from fxsparse.curvature.fisher_squares import Entry
from fxsparse.errors import ConfigError

Packed = dict[Entry, tuple[dict[str, float], dict[str, Tensor]]]


@dataclass(frozen=True, eq=False)
class _News:
    """What a rank tells of a task.

    Attributes:
        origin: names what it holds as reduced.
        skipped: batches without units since then.
        moments: what it collected since then.
    """

    origin: str
    skipped: int
    moments: Packed

    def __bool__(self) -> bool:
        return bool(self.skipped or self.moments)


def reduce_tasks(tasks: dict[str, TaskState], device: torch.device, group: dist.ProcessGroup | None) -> None:
    """Merge what the ranks collected since the last reduction, in the order of ranks, into what all of them share.

    A, M and Q are merged by Chan's rule; means are never averaged. A task or key that a rank lacks counts as unseen;
    what was reduced before is taken over by a rank that lacks it, and never added twice.

    Raises:
        ConfigError: processes do not run together, or ranks hold different sums as reduced ones.
    """
    mine = {name: _News(state.origin, state.skipped, _packed(state.moments)) for name, state in tasks.items()}
    every = told(mine, group)
    names = dict.fromkeys(name for rank in every for name in rank)
    origins = {name: _origin(name, every) for name in names}
    bases = _bases(tasks, every, origins, group)
    for name in names:
        state = tasks.setdefault(name, TaskState())
        news = [rank[name] for rank in every if name in rank]
        if name in bases:
            state.shared_skipped, state.shared = bases[name][0], _unpacked(bases[name][1])
            state.origin = origins[name]
        if not any(news):
            state.shared = {entry: moments.to(device) for entry, moments in state.shared.items()}
            continue
        together: Mapping[Entry, Moments] = {entry: moments.to("cpu") for entry, moments in state.shared.items()}
        for each in news:
            together = merged(together, _unpacked(each.moments))
        state.shared = {entry: moments.to(device) for entry, moments in together.items()}
        state.shared_skipped += sum(each.skipped for each in news)
        state.origin = digest(origins[name], *(_digest_of(each) for each in news))
        state.moments, state.skipped = {}, 0


def share(state: TaskState) -> None:
    """Take all that a process alone has collected as reduced."""
    state.shared = {entry: state.whole(entry) for entry in {**state.shared, **state.moments}}
    state.shared_skipped += state.skipped
    state.moments, state.skipped = {}, 0
    state.origin = digest(_digest_of(_News(state.origin, state.shared_skipped, _packed(state.shared))))


def digest(*parts: str) -> str:
    """A name for what these parts are."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _origin(name: str, every: list[dict[str, _News]]) -> str:
    """What the ranks share of a task; "" for nothing."""
    held = {rank[name].origin for rank in every if name in rank} - {""}
    if len(held) > 1:
        raise ConfigError(
            f"`task` (={name!r}) has sums on the ranks that were reduced apart or loaded from different states: clear "
            "the task, or load one state on all ranks"
        )
    return next(iter(held), "")


def _bases(
    tasks: Mapping[str, TaskState],
    every: list[dict[str, _News]],
    origins: Mapping[str, str],
    group: dist.ProcessGroup | None,
) -> dict[str, tuple[int, Packed]]:
    """What is reduced already of tasks of which a rank lacks it, as the first rank that has it tells."""
    lacking = [
        name
        for name, origin in origins.items()
        if origin and any(name not in rank or rank[name].origin != origin for rank in every)
    ]
    if not lacking:
        return {}
    holders = {
        name: next(number for number, rank in enumerate(every) if name in rank and rank[name].origin)
        for name in lacking
    }
    own = dist.get_rank(group)
    mine = {name: (tasks[name].shared_skipped, _packed(tasks[name].shared)) for name in lacking if holders[name] == own}
    found: dict[str, tuple[int, Packed]] = {}
    for rank in told(mine, group):
        found.update(rank)
    return found


def _digest_of(news: _News) -> str:
    parts = [news.origin, str(news.skipped)]
    for entry, (numbers, tensors) in sorted(news.moments.items()):
        parts.append(repr((entry, sorted(numbers.items()))))
        for name, tensor in sorted(tensors.items()):
            parts.append(name + hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest())
    return digest(*parts)


def _packed(moments: Mapping[Entry, Moments]) -> Packed:
    return {entry: (each.numbers(), _on_cpu(each.tensors())) for entry, each in moments.items()}


def _on_cpu(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _unpacked(packed: Packed) -> dict[Entry, Moments]:
    return {entry: Moments.restored(*each) for entry, each in packed.items()}
