"""The wide network's part of the report: how fast its files are, what they keep, and why."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape

from rich import box
from rich.table import Table
from rich.text import Text

from fxsparse.report import charts
from fxsparse.report import format as text
from fxsparse.report.metrics import Speed, SpeedFile
from fxsparse.report.statistics import summarise

COLOURS = {"dense float": "#64748b", "ticket float": "#4f46e5", "dense int8": "#a8b3c4", "ticket int8": "#0d9488"}


def speedup(speed: Speed, file: SpeedFile, batch: int) -> float:
    """How many times as fast as the first file a file is at a batch size."""
    return speed.files[0].latency_ms[batch] / file.latency_ms[batch]


def latency_figure(speed: Speed) -> charts.Figure:
    """Bars of the median latency by batch size, a colour a file; the axis is logarithmic."""
    layout = charts.base_layout("batch size", "median latency (ms)")
    layout |= {"barmode": "group", "bargap": 0.3, "bargroupgap": 0.1}
    layout["xaxis"] |= {"type": "category", "showgrid": False}
    layout["yaxis"] |= {"type": "log"}
    bars = []
    for file in speed.files:
        batches = sorted(file.latency_ms)
        bars.append(
            {
                "type": "bar",
                "name": file.name,
                "x": [str(batch) for batch in batches],
                "y": [file.latency_ms[batch] for batch in batches],
                "marker": {"color": COLOURS.get(file.name, charts.DENSE), "cornerradius": 4},
                "text": [f"{speedup(speed, file, batch):.1f}x" for batch in batches],
                "textposition": "outside",
                "cliponaxis": False,
                "hovertemplate": f"{file.name}, batch %{{x}}<br>%{{y:.4f}} ms, %{{text}}<extra></extra>",
            }
        )
    return {"data": bars, "layout": layout}


def file_rows(speed: Speed) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings, and one line a file: accuracy, size, latency and speed at each batch size."""
    batches = sorted(speed.files[0].latency_ms)
    heading = ("file", "test accuracy", "size", *(f"batch {batch}" for batch in batches))
    lines = [
        (
            file.name,
            text.percent(file.test_accuracy),
            text.size(file.bytes),
            *(f"{text.milliseconds(file.latency_ms[b])} ms {speedup(speed, file, b):.1f}x" for b in batches),
        )
        for file in speed.files
    ]
    return heading, lines


def layer_rows(speed: Speed) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings, and one line a weight: what it is in the ticket's file, what that gains and why."""
    heading = ("weight", "shape", "density", "in the file", "gain", "reason")
    lines: list[tuple[str, ...]] = [
        (
            layer.name,
            "x".join(map(str, layer.shape)),
            f"{layer.density:.3f}",
            layer.form,
            text.MISSING if layer.gain is None else f"{layer.gain:.1f}x expected",
            layer.reason,
        )
        for layer in speed.layers
    ]
    return heading, lines


def stage_rows(speed: Speed) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings, and one line a step: validation accuracy over the seeds."""
    lines: list[tuple[str, ...]] = [
        (stage.name, text.accuracy(summarise(stage.val_accuracy))) for stage in speed.stages
    ]
    return ("step", "validation accuracy"), lines


def terminal_lines(speed: Speed) -> list[Table | Text]:
    """What the terminal shows: title, files, the steps' accuracy, the layers."""
    heading, lines = file_rows(speed)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    for place, head in enumerate(heading):
        table.add_column(Text(head), justify="left" if place == 0 else "right", no_wrap=True)
    for line in lines:
        dense = line[0] == speed.files[0].name
        table.add_row(*[Text("  " * (i == 0) + cell, style="dim" if dense else "") for i, cell in enumerate(line)])
    steps = ", ".join(f"{name} {accuracy}" for name, accuracy in stage_rows(speed)[1])
    title, notes = Text(_title(speed), style="bold cyan"), []
    notes.append(Text(f"validation accuracy: {steps}", style="dim"))
    for name, shape, density, form, gain, reason in layer_rows(speed)[1]:
        said = "" if gain == text.MISSING else f" ({gain})"
        notes.append(Text(f"{name} {shape}, density {density}: {form}{said}; {reason}", style="dim"))
    return [title, table, *notes, *(Text(note, style="dim") for note in speed.notes)]


def _title(speed: Speed) -> str:
    return f"{speed.title}, {text.percent(speed.sparsity, 0)} in shared supports of {speed.group} rows"


def section(speed: Speed) -> str:
    """The section of the page."""
    best = max((speedup(speed, file, b), b, file.name) for file in speed.files for b in file.latency_ms)
    cards = (
        (text.accuracy(summarise(speed.dense_test)), "dense test accuracy"),
        (text.accuracy(summarise(speed.ticket_test)), f"ticket at {text.percent(speed.sparsity, 0)} sparsity"),
        (f"{best[0]:.1f}x", f"as fast as the dense float file: {best[2]}, batch {best[1]}"),
        (f"{text.size(speed.files[1].bytes)} / {text.size(speed.files[0].bytes)}", "float file: ticket / dense")
        if len(speed.files) > 1
        else (text.size(speed.files[0].bytes), "file"),
    )
    boxes = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in cards
    )
    source = json.dumps(latency_figure(speed), allow_nan=False).replace("<", "\\u003c")
    return "\n".join(
        (
            f"<section><h2>{escape(_title(speed))}</h2>",
            f'<div class="cards">{boxes}</div>',
            '<div class="pair"><div><h3>Latency in stock onnxruntime</h3>',
            '<p class="lead">Medians of all files measured interleaved in one process, one thread, logarithmic. '
            "Above the bars: times as fast as the dense float file.</p>",
            '<div id="speed" class="chart" role="img" aria-label="Latency by batch size"></div>',
            f'<script type="application/json" data-target="speed">{source}</script>',
            "</div><div><h3>What each step costs</h3>",
            '<p class="lead">Validation split; ± is the standard deviation over seeds.</p>',
            _table(*stage_rows(speed)),
            "</div></div><h3>Files</h3>",
            '<p class="lead">Accuracy of the file itself in onnxruntime, on the test split.</p>',
            f'<div class="scroll">{_table(*file_rows(speed), name="speed-files")}</div>',
            "<h3>What became of each layer, and why</h3>",
            f'<div class="scroll">{_table(*layer_rows(speed))}</div>',
            "".join(f'<p class="lead">{escape(note)}</p>' for note in speed.notes),
            "</section>",
        )
    )


def _table(heading: Iterable[str], lines: Iterable[Iterable[str]], name: str = "") -> str:
    def row(cells: Iterable[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    body = "".join(row(line, "td") for line in lines)
    identity = f' id="{name}"' if name else ""
    return f"<table{identity}><thead>{row(heading, 'th')}</thead><tbody>{body}</tbody></table>"
