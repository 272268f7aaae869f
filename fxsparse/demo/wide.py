"""The wide network: trained dense, pruned without a pattern, regrouped into shared supports, healed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fxsparse.demo.settings import WideSettings
from fxsparse.demo.train import Place, publish
from fxsparse.lottery import Ticket, load_ticket, save_ticket
from fxsparse.lottery.regroup_ticket import regroup_ticket
from fxsparse.lottery.run_directory import committed, is_committed, set_aside
from fxsparse.sparsity import SharedSupport
from fxsparse.training import GMP, attach
from fxsparse.training.loop import EpochRow, Task, TrainState, evaluate, fit, start, start_from

STEPS = ("dense", "unstructured", "magnitude", "compensated", "fine-tuned")
DENSE_TICKET, UNSTRUCTURED, SHARED = "dense.ticket", "unstructured.ticket", "shared.ticket"


@dataclass(frozen=True)
class WideTrained:
    """The finished trainings of one seed.

    Attributes:
        seed: their seed.
        dense: the dense network.
        shared: the ticket with shared supports.
        stages: validation accuracy after each step, by name.
    """

    seed: int
    dense: Ticket
    shared: Ticket
    stages: Mapping[str, float]


def train_wide(place: Place, wide: WideSettings, seed: int) -> WideTrained:
    """Train one seed, or find it finished; the ticket is copied to `tickets/`."""
    path = place.directory / "wide" / place.network.name / f"seed_{seed}"
    if is_committed(path):
        place.display.advance(work_of(wide), fresh=False)
    else:
        set_aside(path)
        with committed(path) as temporary:
            _train(place, wide, seed, temporary)
    dense, shared = load_ticket(path / DENSE_TICKET), load_ticket(path / SHARED)
    name = f"{place.network.name}-shared{wide.group}-seed{seed}.ticket"
    shared = publish(shared.path, place.directory / "tickets" / name, shared.ticket_id)
    measured = {"dense": dense.metrics["validation_accuracy"], **shared.metrics["stages"]}
    return WideTrained(seed, dense, shared, {name: float(measured[name]) for name in STEPS})


def work_of(wide: WideSettings) -> float:
    """Work units of one seed."""
    return wide.network.cost * (wide.epochs + wide.prune_epochs + wide.tune_epochs)


def _train(place: Place, wide: WideSettings, seed: int, path: Path) -> None:
    title = f"{place.network.title}, seed {seed}"
    task = place.settings.task(place.network, place.splits, wide.epochs)
    state = start(task, seed)
    initial = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    place.display.begin(title, task.total_steps, "dense")
    fit(state, task, on_epoch=_shower(place, "dense", task))
    _save(place, state.model, path / DENSE_TICKET, initial, "dense", seed)
    model = _pruned(place, wide, seed, state.model)
    ticket = _save(place, model, path / UNSTRUCTURED, initial, "gmp", seed)
    healing = replace(place.settings, learning_rate=wide.tune_rate).task(place.network, place.splits, wide.tune_epochs)
    place.display.begin(title, healing.total_steps, "regrouping")
    show = _shower(place, "fine-tuning", healing)

    def tell(_: str, row: EpochRow | None) -> None:
        if row is not None:
            show(None, row)

    regroup_ticket(
        ticket,
        path / SHARED,
        healing,
        SharedSupport(wide.group),
        model=place.network.build(),
        example_inputs=(place.splits.train.inputs[:2],),
        seed=seed,
        progress=tell,
    )


def _pruned(place: Place, wide: WideSettings, seed: int, model: nn.Module) -> nn.Module:
    task = place.settings.task(place.network, place.splits, wide.prune_epochs)
    state = start_from(task, model, seed)
    method = GMP(sparsity=float(wide.sparsity), every=wide.prune_every, seed=seed)
    handle = attach(state.model, state.optimizer, method, task.total_steps)
    place.display.begin(f"{place.network.title}, seed {seed}", task.total_steps, "pruning")
    fit(state, task, on_epoch=_shower(place, "pruning", task))
    handle.detach()
    return state.model


def _save(place: Place, model: nn.Module, path: Path, initial: Mapping[str, Tensor], method: str, seed: int) -> Ticket:
    origin = place.origin
    with torch.no_grad():
        accuracy = evaluate(model, place.splits.validation).accuracy
    return save_ticket(
        model,
        path,
        weights=initial,
        lineage={"method": method, "seed": seed, "data_fingerprint": origin.data_fingerprint},
        metrics={"validation_accuracy": accuracy},
        factory=origin.factory,
        arguments=origin.arguments,
        input_signature=origin.input_signature,
    )


def _shower(place: Place, what: str, task: Task) -> Callable[[TrainState | None, EpochRow], None]:
    def show(_: TrainState | None, row: EpochRow) -> None:
        seen = "" if row.validation is None else f" val {100 * row.validation.accuracy:.1f} %"
        where = f"step {row.step}/{task.total_steps} loss {row.train_loss:.3f}{seen}"
        place.display.update(row.step, f"{what} {where}")
        place.display.advance(place.network.cost)

    return show
