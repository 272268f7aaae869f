"""The trainings of the demo: pruning with rewinding, and RigL. Each is found again when it is on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fxsparse.data import Splits
from fxsparse.demo.progress import Display
from fxsparse.demo.settings import DemoNetwork, DemoSettings
from fxsparse.lottery import IMP, Origin, Progress, Round, Ticket, find_tickets, load_ticket, save_ticket
from fxsparse.lottery.run_directory import committed, is_committed, set_aside
from fxsparse.training import RigL, attach
from fxsparse.training.loop import EpochRow, TrainState, evaluate, fit, start

DENSE, PRUNED, RIGL = "dense", "IMP", "RigL"


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        method: DENSE, PRUNED or RIGL.
        seed: its seed.
        ticket: the ticket directory with the trained weights.
        ticket_id: names its content.
        val_accuracy: on the validation split, as a fraction.
        steps: optimizer steps that it took, all rounds together.
    """

    method: str
    seed: int
    ticket: Path
    ticket_id: str
    val_accuracy: float
    steps: int


@dataclass(frozen=True)
class Place:
    """Where a training belongs.

    Attributes:
        settings: of the demo.
        network: what is trained.
        splits: on what.
        directory: of the run.
        display: told of the progress.
    """

    settings: DemoSettings
    network: DemoNetwork
    splits: Splits
    directory: Path
    display: Display

    @property
    def origin(self) -> Origin:
        """What the tickets say about where they come from."""
        factory = f"fxsparse.models:{self.network.name}"
        return Origin(factory, self.network.arguments, (self.splits.train.inputs[:2],), None, self.splits.fingerprint)


def prune(place: Place, seed: int) -> tuple[Round, ...]:
    """Iterative magnitude pruning of one seed; the first round is the dense training."""
    settings, display = place.settings, place.display
    task = settings.task(place.network, place.splits, settings.epochs)
    imp = IMP(rate=settings.rate, target=settings.sparsity)
    place_in = place.directory / "rounds" / place.network.name / f"seed_{seed}"

    def show(now: Progress) -> None:
        if now.row is None:
            title = f"{place.network.title}, seed {seed}"
            display.begin(title, task.total_steps, f"round {now.round}/{now.rounds}")
            return
        where = f"round {now.round}/{now.rounds} step {now.step}/{now.until}"
        display.update(now.step, f"{where} {_losses(now.row)}")
        display.advance(place.network.cost)

    rounds = find_tickets(task, imp, place_in, seed, origin=place.origin, progress=show)
    display.advance(place.network.cost * settings.epochs * sum(not entry.trained for entry in rounds), fresh=False)
    return rounds


def grow(place: Place, seed: int) -> Trained:
    """RigL at the sparsity of the ticket, once, from scratch."""
    settings = place.settings
    path = place.directory / "rigl" / place.network.name / f"seed_{seed}"
    if not is_committed(path):
        set_aside(path)
        _train_rigl(place, seed, path)
    else:
        place.display.advance(place.network.cost * settings.rigl_epochs, fresh=False)
    ticket = load_ticket(path / "rigl.ticket")
    metrics = ticket.metrics
    return Trained(RIGL, seed, ticket.path, ticket.ticket_id, metrics["validation_accuracy"], metrics["steps"])


def _train_rigl(place: Place, seed: int, path: Path) -> None:
    settings = place.settings
    task = settings.task(place.network, place.splits, settings.rigl_epochs)
    state = start(task, seed)
    initial = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    method = RigL(sparsity=float(settings.sparsity), seed=seed, every=settings.rigl_every)
    handle = attach(state.model, state.optimizer, method, task.total_steps)
    place.display.begin(f"{place.network.title}, seed {seed}", task.total_steps, RIGL)
    fit(state, task, on_epoch=_shower(place, task.total_steps))
    handle.detach()
    accuracy = evaluate(state.model, place.splits.validation).accuracy
    origin = place.origin
    lineage = {"method": "rigl", "seed": seed, "rates": {"target_sparsity": settings.sparsity}}
    with committed(path) as temporary:
        save_ticket(
            state.model,
            temporary / "rigl.ticket",
            weights=initial,
            lineage=lineage | {"data_fingerprint": origin.data_fingerprint},
            metrics={"validation_accuracy": accuracy, "steps": state.step, "updates": handle.updates},
            factory=origin.factory,
            input_signature=origin.input_signature,
        )


def _shower(place: Place, steps: int) -> Callable[[TrainState, EpochRow], None]:
    def show(_: TrainState, row: EpochRow) -> None:
        place.display.update(row.step, f"{RIGL} step {row.step}/{steps} {_losses(row)}")
        place.display.advance(place.network.cost)

    return show


def _losses(row: EpochRow) -> str:
    accuracy = "" if row.validation is None else f" val {100 * row.validation.accuracy:.1f} %"
    return f"loss {row.train_loss:.3f}{accuracy}"


def as_trained(rounds: tuple[Round, ...], steps: int, seed: int) -> tuple[Trained, Trained]:
    """The dense training and the ticket of one seed; `steps` is the length of one round."""
    dense, last = rounds[0], rounds[-1]
    return (
        Trained(DENSE, seed, dense.ticket, dense.ticket_id, dense.metrics["validation_accuracy"], steps),
        Trained(PRUNED, seed, last.ticket, last.ticket_id, last.metrics["validation_accuracy"], steps * len(rounds)),
    )


def publish(ticket: Path, target: Path, ticket_id: str) -> Ticket:
    """Copy a ticket to where users look for it; one that is there already stays."""
    if target.is_dir() and (found := load_ticket(target)).ticket_id == ticket_id:
        return found
    set_aside(target)
    with committed(target, manifest=False) as temporary:
        shutil.copytree(ticket, temporary, dirs_exist_ok=True)
    return load_ticket(target)
