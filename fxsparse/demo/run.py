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
from fxsparse.lottery import IMP, Round, RunDirectory
from fxsparse.report import Metrics, terminal_table, write_metrics, write_report
from fxsparse.report.format import duration, percent
from fxsparse.report.metrics import Network

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
        metrics = results.whole(settings, splits, run.path, networks, time.monotonic() - began)
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
        return len(settings.seeds) * sum(map(of, settings.networks))


def _print(console: Console, metrics: Metrics, directory: Path) -> None:
    table, notes = terminal_table(metrics, console.width)
    count = len(metrics.networks[0].results[0].seeds)
    console.print()
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)
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
