"""The whole demo: train, prune, export, verify, compare, write the run directory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from fxsparse.data import Splits, digits
from fxsparse.demo import results
from fxsparse.demo.exports import Exported, export
from fxsparse.demo.progress import Display
from fxsparse.demo.settings import DemoNetwork, DemoSettings
from fxsparse.demo.train import DENSE, Place, Trained, as_trained, grow, prune, publish
from fxsparse.demo.wide import train_wide, work_of
from fxsparse.demo.wide_files import export_wide
from fxsparse.lottery import IMP, Round, RunDirectory
from fxsparse.report import Metrics, terminal_table, write_metrics, write_report
from fxsparse.report.format import duration, percent
from fxsparse.report.metrics import Network, Speed
from fxsparse.report.speed import terminal_lines

WIDE_COST = 600.0  # work of the wide network's four exports and their timing, likewise
EXPORT_COST = 60.0  # work of one export, in training epochs of the cheapest network


def run_demo(settings: DemoSettings, results_dir: Path, console: Console) -> Path:
    """Run the demo, or what is left of it; finished trainings and exports are found again and not repeated.

    Args:
        settings: what is trained.
        results_dir: the run directory `demo-<hash>` appears in it.
        console: where progress and the table are printed.

    Returns:
        the run directory: `tickets/`, `onnx/`, `metrics.json`, `report.html`, and all rounds.

    Raises:
        ConfigError: another process holds the directory, or a package of the extra `demo` is missing.
        TicketError: the directory cannot be written.
        ExportError: an export differs from PyTorch.
    """
    began = time.monotonic()
    splits = digits(settings.data_seed)
    with (
        RunDirectory.open(results_dir, "demo", settings.describe(), splits.fingerprint) as run,
        one_thread(),
        Display(console, _work(settings, splits)) as display,
    ):
        networks = [_network(Place(settings, net, splits, run.path, display)) for net in settings.networks]
        speed = _speed(settings, splits, run.path, display)
        metrics = results.whole(settings, splits, run.path, networks, speed, time.monotonic() - began)
        write_metrics(metrics, run.path / "metrics.json")
        write_report(run.path / "metrics.json", run.path / "report.html")
    _print(console, metrics, run.path)
    return run.path


def _network(place: Place) -> Network:
    steps = place.settings.task(place.network, place.splits, place.settings.epochs).total_steps
    rounds: dict[int, tuple[Round, ...]] = {}
    finished: list[tuple[Trained, Exported]] = []
    for seed in place.settings.seeds:
        began = time.monotonic()
        rounds[seed] = prune(place, seed)
        trained = [*as_trained(rounds[seed], steps, seed), grow(place, seed)]
        finished += [_finish(place, each) for each in trained]
        _tell(place, seed, trained, time.monotonic() - began)
    return results.network_record(place, rounds, finished)


def _speed(settings: DemoSettings, splits: Splits, directory: Path, display: Display) -> Speed | None:
    """The wide network: all seeds trained, the first one's files timed."""
    wide = settings.wide
    if wide is None:
        return None
    place = Place(settings, wide.network, splits, directory, display)
    trained = []
    for seed in settings.seeds:
        began = time.monotonic()
        trained.append(train_wide(place, wide, seed))
        steps = ", ".join(f"{name} {percent(value)}" for name, value in trained[-1].stages.items())
        display.line(f"{wide.network.title}, seed {seed}: {steps}  ({duration(time.monotonic() - began)})")
    files, fresh = export_wide(place, wide, trained[0])
    display.advance(WIDE_COST, fresh=fresh)
    return results.speed_record(place, wide, trained, files)


def _finish(place: Place, trained: Trained) -> tuple[Trained, Exported]:
    """Export a training; what is sparse is copied to `tickets/`."""
    if trained.method != DENSE:
        name = f"{place.network.name}-{trained.method.lower()}-seed{trained.seed}.ticket"
        ticket = publish(trained.ticket, place.directory / "tickets" / name, trained.ticket_id)
        trained = replace(trained, ticket=ticket.path)
    exported, fresh = export(place, trained)
    place.display.advance(EXPORT_COST, fresh=fresh)
    return trained, exported


def _tell(place: Place, seed: int, trained: list[Trained], seconds: float) -> None:
    found = ", ".join(f"{each.method} {percent(each.val_accuracy)}" for each in trained)
    place.display.line(f"{place.network.title}, seed {seed}: validation accuracy {found}  ({duration(seconds)})")


def _work(settings: DemoSettings, splits: Splits) -> float:
    def of(network: DemoNetwork) -> float:
        sizes = {n: p.numel() for n, p in network.build().named_parameters() if p.ndim >= 2}
        rounds = IMP(rate=settings.rate, target=settings.sparsity).counts(sizes).rounds + 1
        return network.cost * (rounds * settings.epochs + settings.rigl_epochs) + 3 * EXPORT_COST

    with torch.random.fork_rng():
        networks = len(settings.seeds) * sum(map(of, settings.networks))
    if settings.wide is None:
        return networks
    return networks + len(settings.seeds) * work_of(settings.wide) + WIDE_COST


def _print(console: Console, metrics: Metrics, directory: Path) -> None:
    table, notes = terminal_table(metrics, console.width)
    count = len(metrics.networks[0].results[0].seeds)
    console.print()
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)
    if metrics.speed is not None:
        console.print()
        for line in terminal_lines(metrics.speed):
            console.print(line, highlight=False)
        console.print()
    spread = f"± standard deviation over {count} seeds; " if count > 1 else ""
    console.print(Text(f"{spread}latency: {metrics.settings['latency']}", style="dim"), highlight=False)
    console.print()
    for name, path in (
        ("report", "report.html"),
        ("tickets", "tickets"),
        ("ONNX files", "onnx"),
        ("numbers", "metrics.json"),
    ):
        console.print(Text(f"{name:<11}", style="bold") + Text(str(directory / path)), highlight=False, soft_wrap=True)
    console.print(Text(f"done in {duration(metrics.seconds)}", style="green"), highlight=False)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: the networks are too small to share, and results do not depend on the core count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
