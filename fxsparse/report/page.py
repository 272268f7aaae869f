"""The self-contained page: metrics in, one HTML file out; nothing is loaded from anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from html import escape
from pathlib import Path

from fxsparse.errors import ConfigError
from fxsparse.report import charts, template
from fxsparse.report import format as text
from fxsparse.report.metrics import Metrics, Network, Result, read_metrics, write_atomically
from fxsparse.report.speed import section
from fxsparse.report.statistics import summarise
from fxsparse.report.table import COLUMNS, rows


def write_report(metrics_path: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Turn a `metrics.json` into one HTML file (about 5 MB, plotly inlined), written atomically.

    Raises:
        DataError: the metrics cannot be read or break their schema.
        ConfigError: plotly is not installed.
    """
    target = Path(out)
    write_atomically(target, render_page(read_metrics(metrics_path)))
    return target


def render_page(metrics: Metrics) -> str:
    """The page as text.

    Raises:
        ConfigError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError("the report needs plotly, which is not installed: pip install 'fxsparse[report]'") from error
    networks = [_network(network, place) for place, network in enumerate(metrics.networks)]
    speed = [] if metrics.speed is None else [section(metrics.speed)]
    subtitle = f"{metrics.data.get('name', '')} · {len(metrics.networks)} networks · {_seeds(metrics)}"
    return template.PAGE.format(
        title=escape(metrics.title),
        subtitle=escape(subtitle),
        css=template.CSS,
        plotly=get_plotlyjs(),
        body="\n".join([_results(metrics), *speed, *networks, _setup(metrics)]),
        footer=escape(f"Written by fxsparse {metrics.environment.get('fxsparse', '')}".strip() + "."),
        script=template.SCRIPT,
    )


def _seeds(metrics: Metrics) -> str:
    count = max(len(result.seeds) for network in metrics.networks for result in network.results)
    return f"{count} seeds" if count > 1 else "1 seed"


def _network(network: Network, place: int) -> str:
    curve = _figure(f"curve-{place}", "Accuracy against sparsity", charts.sparsity_accuracy(network))
    bars = _figure(f"latency-{place}", "Latency in onnxruntime", charts.latency_bars(network))
    parts = [
        f"<section><h2>{escape(network.title)}</h2>",
        _cards(network),
        '<div class="pair"><div><h3>Accuracy against sparsity</h3>',
        '<p class="lead">Validation split. Shaded: 95 % interval of the mean over seeds. Stars: what was exported.</p>',
        curve,
        _round_table(network),
        "</div><div><h3>Latency in onnxruntime</h3>",
        '<p class="lead">Median, both files measured interleaved in one process.</p>',
        bars,
        "</div></div>",
    ]
    if network.rounds:
        parts += [
            "<h3>Where the weights survive</h3>",
            '<p class="lead">Alive share of each weight after each round, in percent; mean over seeds.</p>',
            _figure(f"density-{place}", "Density of each layer in each round", charts.density_heat_map(network)),
        ]
    return "\n".join([*parts, "</section>"])


def _figure(name: str, label: str, figure: charts.Figure) -> str:
    """An empty box and its figure; `<` is escaped so that no text can end the script element."""
    source = json.dumps(figure, allow_nan=False).replace("<", "\\u003c")
    return (
        f'<div id="{name}" class="chart" role="img" aria-label="{escape(label)}"></div>'
        f'<script type="application/json" data-target="{name}">{source}</script>'
    )


def _cards(network: Network) -> str:
    dense = next((result for result in network.results if result.sparsity == 0), None)
    sparse = [result for result in network.results if result.sparsity > 0]
    cards = []
    if dense is not None:
        cards.append((_test(dense), "dense test accuracy"))
    cards += [(_test(result), f"{result.method} at {text.percent(result.sparsity, 0)} sparsity") for result in sparse]
    if sparse:
        smallest = min(sparse, key=lambda result: result.alive)
        alive = f"{text.count(smallest.alive)} / {text.count(smallest.parameters)}"
        cards.append((alive, "parameters alive"))
        cards.append(
            (
                f"{text.short_count(2 * smallest.macs_effective)} / {text.short_count(2 * smallest.macs_dense)}",
                "FLOPs effective / dense",
            )
        )
    boxes = [f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in cards]
    return f'<div class="cards">{"".join(boxes)}</div>'


def _test(result: Result) -> str:
    return text.accuracy(summarise([seed.test_accuracy for seed in result.seeds]))


def _round_table(network: Network) -> str:
    if not network.rounds:
        return ""
    lines = []
    for entry in sorted(network.rounds, key=lambda item: item.round):
        accuracy = summarise([seed.val_accuracy for seed in entry.seeds])
        values = (entry.round, text.percent(entry.global_sparsity), text.count(entry.active_params))
        lines.append(_cells([*map(str, values), text.accuracy(accuracy)]))
    head = _cells(("round", "sparsity", "alive", "validation accuracy"), "th")
    return (
        f"<details><summary>Data</summary><table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table></details>"
    )


def _results(metrics: Metrics) -> str:
    lines, notes = rows(metrics)
    body = []
    for place, row in enumerate(lines):
        if place == 0 or lines[place - 1].network != row.network:
            body.append(f'<tr class="group"><td colspan="{len(COLUMNS)}">{escape(row.network)}</td></tr>')
        body.append(_cells(row.cells, row_class="dense" if row.dense else ""))
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return "\n".join(
        (
            "<section><h2>Results</h2>",
            '<p class="lead">± is the standard deviation over seeds. FLOPs = 2 x multiply-accumulates of one sample; '
            "effective counts alive weights only. Worst |Δ| is the largest difference between onnxruntime and "
            "PyTorch in float64 on random inputs.</p>",
            f'<div class="scroll"><table id="results"><thead>{_cells(COLUMNS, "th")}</thead>',
            f"<tbody>{''.join(body)}</tbody></table></div>",
            f'<ol class="notes">{listed}</ol></section>',
        )
    )


def _setup(metrics: Metrics) -> str:
    groups = (("Data", metrics.data), ("Settings", metrics.settings), ("Environment", metrics.environment))
    parts = ["<section><h2>How it was measured</h2>"]
    for title, pairs in groups:
        entries = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in pairs.items())
        parts.append(f"<h3>{title}</h3><dl>{entries}</dl>")
    return "".join([*parts, f'<p class="lead">The last call took {text.duration(metrics.seconds)}.</p></section>'])


def _cells(values: Iterable[str], tag: str = "td", row_class: str = "") -> str:
    attribute = f' class="{row_class}"' if row_class else ""
    return f"<tr{attribute}>{''.join(f'<{tag}>{escape(value)}</{tag}>' for value in values)}</tr>"
