"""Sums of several ranks: the same as one process that saw all the batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fxsparse.curvature.collector_blocks import merged
from fxsparse.curvature.collector_moments import Moments
from fxsparse.curvature.collector_tasks import TaskState
from fxsparse.errors import ConfigError


def reduce_tasks(tasks: dict[str, TaskState], device: torch.device, group: dist.ProcessGroup | None) -> None:
    """Merge the moments of all ranks, in the order of ranks, into `tasks` on each of them.

    A, M and Q are merged by Chan's rule; means are never averaged. A task or key that a rank lacks counts as unseen.

    Raises:
        ConfigError: processes do not run together.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError("`all_reduce` needs processes that run together: call torch.distributed.init_process_group")
    mine: dict[str, Any] = {
        name: (
            state.skipped,
            {entry: (moments.numbers(), _packed(moments)) for entry, moments in state.moments.items()},
        )
        for name, state in tasks.items()
    }
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group=group)
    together: dict[str, TaskState] = {}
    for rank in every:
        for name, (skipped, entries) in rank.items():
            state = together.setdefault(name, TaskState())
            state.skipped += skipped
            restored = {entry: Moments.restored(*each) for entry, each in entries.items()}
            state.moments = merged(state.moments, restored)
    for name, state in together.items():
        place = device if name not in tasks else _place(tasks[name], device)
        state.moments = {entry: moments.to(place) for entry, moments in state.moments.items()}
        tasks[name] = state


def _packed(moments: Moments) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in moments.tensors().items()}


def _place(state: TaskState, device: torch.device) -> torch.device:
    for moments in state.moments.values():
        if moments.total is not None:
            return moments.total.device
    return device
