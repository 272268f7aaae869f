"""The final table: one row a method and network, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from fxsparse.report import format as text
from fxsparse.report.charts import latencies
from fxsparse.report.metrics import Metrics, Network, Result
from fxsparse.report.statistics import summarise

COLUMNS = (
    "method",
    "sparsity",
    "test accuracy",
    "alive",
    "FLOPs dense",
    "FLOPs effective",
    "file",
    "dense ms",
    "ticket ms",
    "worst |Δ|",
    "note",
)
HEADS = (
    "method",
    "sparse",
    "test\nacc. %",
    "alive",
    "FLOPs\nall→alive",
    "file",
    "latency ms\ndense→this",
    "worst\n|Δ|",
    "",
)  # of the terminal, where dense and sparse share a column


@dataclass(frozen=True)
class Row:
    """One line of the table, formatted.

    Attributes:
        network: the network's title.
        cells: one text for each of COLUMNS.
        dense: whether this is the unpruned network.
    """

    network: str
    cells: tuple[str, ...]
    dense: bool


def rows(metrics: Metrics) -> tuple[list[Row], list[str]]:
    """All rows, and the notes that their last cells refer to by number."""
    notes: list[str] = []
    found = []
    for network in metrics.networks:
        for result in network.results:
            found.append(_row(network, result, notes))
    return found, notes


def terminal_table(metrics: Metrics, width: int = 80) -> tuple[Table, list[Text]]:
    """The table for a terminal of `width` columns (80 are enough), and its numbered notes."""
    lines, notes = rows(metrics)
    gap = 0 if width < 90 else 1 if width < 104 else 2
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0))
    for place, head in enumerate(HEADS):
        table.add_column(Text(head), justify="left" if place == 0 else "right", no_wrap=True)
    for place, row in enumerate(lines):
        if place == 0 or lines[place - 1].network != row.network:
            if place:
                table.add_row()
            table.add_row(Text(row.network, style="bold cyan"))
        cells = _merged(row.cells)
        style = "dim" if row.dense else ""
        table.add_row(*[Text("  " * (i == 0) + cell, style=style) for i, cell in enumerate(cells)])
    return table, [Text(f"{number}) {note}", style="dim") for number, note in enumerate(notes, 1)]


def _merged(cells: tuple[str, ...]) -> tuple[str, ...]:
    """Dense and sparse side by side in one cell, without the units that the heads name."""
    method, sparsity, accuracy, alive, dense, effective, file, before, after, worst, note = cells
    flops = f"{dense}→{effective}".replace(" ", "")
    values = (
        sparsity.replace(" ", ""),
        accuracy.removesuffix(" %").replace(" ", ""),
        alive,
        flops,
        file.replace(" ", ""),
    )
    return (method, *values, f"{before}→{after}", worst, note.replace(") ", ","))


def _row(network: Network, result: Result, notes: list[str]) -> Row:
    own, dense = latencies(result)
    sizes = [seed.onnx_bytes for seed in result.seeds if seed.onnx_bytes is not None]
    worst = [seed.worst_difference for seed in result.seeds if seed.worst_difference is not None]
    cells = (
        result.method,
        text.percent(result.sparsity),
        text.accuracy(summarise([seed.test_accuracy for seed in result.seeds])),
        text.count(result.alive),
        text.short_count(2 * result.macs_dense),
        text.short_count(2 * result.macs_effective),
        text.size(max(sizes)) if sizes else text.MISSING,
        _latency(dense),
        _latency(own),
        f"{max(worst):.1e}" if worst else text.MISSING,
        " ".join(_number(note, notes) for note in result.notes),
    )
    return Row(network.title, cells, result.sparsity == 0)


def _latency(value: float | None) -> str:
    return text.MISSING if value is None else text.milliseconds(value)


def _number(note: str, notes: list[str]) -> str:
    """The number of a note, which is added to the list when it is new."""
    if note not in notes:
        notes.append(note)
    return f"{notes.index(note) + 1})"


def markdown_table(metrics: Metrics) -> str:
    """The same table as GitHub-flavoured Markdown, notes below."""
    lines, notes = rows(metrics)
    out = [_line(("network", *COLUMNS)), _line(["---"] * (len(COLUMNS) + 1))]
    out += [_line((row.network, *row.cells)) for row in lines]
    return "\n".join([*out, "", *[f"{number}. {note}" for number, note in enumerate(notes, 1)]]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
