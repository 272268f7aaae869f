"""The figures of the page, as plain plotly JSON: data and layout, no import of plotly."""

from __future__ import annotations

from typing import Any

from fxsparse.report import format as text
from fxsparse.report.metrics import Network, Result, Round
from fxsparse.report.statistics import Summary, summarise

Figure = dict[str, Any]

DENSE = "#64748b"
METHODS = ("#4f46e5", "#ea580c", "#0d9488", "#be185d")  # in the order of the results after `dense`
GRID = "#e8ebf1"
TICKS = (0.0, 0.2, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


def sparsity_accuracy(network: Network) -> Figure:
    """Validation accuracy against sparsity: pruning rounds with their 95 % band, the dense band, other methods.

    The horizontal axis is logarithmic in 1 / density, so that every round of a constant rate is one equal step.
    """
    rounds = sorted(network.rounds, key=lambda entry: entry.round)
    traces: list[Figure] = []
    sparsities = [entry.global_sparsity for entry in rounds] + [result.sparsity for result in network.results]
    right = max([*sparsities, 0.5])
    dense = [result for result in network.results if result.sparsity == 0]
    if dense:
        values = summarise([seed.val_accuracy for seed in dense[0].seeds])
        traces += _band([0.0, right], [values, values], DENSE, "dense", dash="dash")
    if rounds:
        series = [summarise([seed.val_accuracy for seed in entry.seeds]) for entry in rounds]
        levels = [entry.global_sparsity for entry in rounds]
        traces += _band(levels, series, METHODS[0], "iterative magnitude pruning", markers=True)
        traces.append(_dots(rounds))
    traces += _points(network.results, bool(rounds))
    return {"data": traces, "layout": _curve_layout(right)}


def density_heat_map(network: Network) -> Figure:
    """Alive share of every weight in every round; dark is dense."""
    rounds = sorted(network.rounds, key=lambda entry: entry.round)
    names = list(rounds[0].per_layer_sparsity) if rounds else []
    density = [[1 - entry.per_layer_sparsity[name].sparsity for entry in rounds] for name in names]
    labels = [[f"{100 * value:.0f}" for value in row] for row in density]
    layout = base_layout("round (sparsity)", "")
    layout["xaxis"] |= {"type": "category", "showgrid": False}
    layout["yaxis"] |= {"autorange": "reversed", "type": "category", "automargin": True, "showgrid": False}
    layout["height"] = 110 + 34 * max(len(names), 2)
    trace = {
        "type": "heatmap",
        "x": [f"{entry.round}<br>{100 * entry.global_sparsity:.0f} %" for entry in rounds],
        "y": names,
        "z": density,
        "zmin": 0,
        "zmax": 1,
        "xgap": 2,
        "ygap": 2,
        "colorscale": [[0, "#f5f6ff"], [0.15, "#d5d8fd"], [0.5, "#818cf8"], [1, "#312e81"]],
        "showscale": False,
        "text": labels,
        "texttemplate": "%{text}",
        "textfont": {"size": 11},
        "hovertemplate": "%{y}, round %{x}<br>density %{z:.1%}<extra></extra>",
    }
    return {"data": [trace], "layout": layout}


def latency_bars(network: Network) -> Figure:
    """Median latency in onnxruntime of each method's file beside the dense one, in milliseconds."""
    rows = [row for row in network.results if row.sparsity > 0 and latencies(row)[0] is not None]
    layout = base_layout("", "median latency (ms)")
    layout |= {"barmode": "group", "bargap": 0.45, "bargroupgap": 0.12}
    layout["xaxis"] |= {"showgrid": False, "type": "category"}
    layout["yaxis"]["rangemode"] = "tozero"
    bars = []
    for label, index, colour in (("dense network", 1, DENSE), ("exported ticket", 0, METHODS[0])):
        values = [latencies(row)[index] for row in rows]
        bars.append(
            {
                "type": "bar",
                "name": label,
                "x": [row.method for row in rows],
                "y": values,
                "marker": {"color": colour, "cornerradius": 4},
                "text": [text.MISSING if value is None else text.milliseconds(value) for value in values],
                "textposition": "outside",
                "cliponaxis": False,
                "hovertemplate": "%{x}, " + label + "<br>%{y:.4f} ms<extra></extra>",
            }
        )
    return {"data": bars, "layout": layout}


def latencies(result: Result) -> tuple[float | None, float | None]:
    """Latency of the exported file and of the dense network, averaged over the seeds that have both (ms)."""
    pairs = [
        (seed.latency_ms, seed.dense_latency_ms)
        for seed in result.seeds
        if seed.latency_ms is not None and seed.dense_latency_ms is not None
    ]
    if not pairs:
        return None, None
    own, dense = zip(*pairs, strict=True)
    return sum(own) / len(own), sum(dense) / len(dense)


def _compression(sparsity: float) -> float:
    return 1 / (1 - min(sparsity, 0.9999))


def _band(
    levels: list[float], series: list[Summary], colour: str, name: str, dash: str = "solid", markers: bool = False
) -> list[Figure]:
    """A mean line with its 95 % band (no band for a single seed)."""
    x = [_compression(level) for level in levels]
    traces: list[Figure] = []
    if all(entry.half_width is not None for entry in series):
        upper = [min(100.0, 100 * (entry.mean + (entry.half_width or 0))) for entry in series]
        lower = [max(0.0, 100 * (entry.mean - (entry.half_width or 0))) for entry in series]
        traces.append(
            {
                "type": "scatter",
                "x": x + x[::-1],
                "y": upper + lower[::-1],
                "fill": "toself",
                "fillcolor": _transparent(colour, 0.13),
                "line": {"width": 0},
                "mode": "lines",
                "hoverinfo": "skip",
                "name": f"{name}, 95 % interval of the mean",
                "legendgroup": name,
                "showlegend": False,
            }
        )
    hover = [f"sparsity {text.percent(level)}<br>{text.accuracy(s)}" for level, s in zip(levels, series, strict=True)]
    traces.append(
        {
            "type": "scatter",
            "x": x,
            "y": [100 * entry.mean for entry in series],
            "mode": "lines+markers" if markers else "lines",
            "line": {"color": colour, "width": 2.5, "dash": dash},
            "marker": {"size": 8, "color": colour, "line": {"color": "white", "width": 1.5}},
            "text": hover,
            "hovertemplate": f"{name}<br>%{{text}}<extra></extra>",
            "name": name,
            "legendgroup": name,
        }
    )
    return traces


def _dots(rounds: list[Round]) -> Figure:
    """One faint dot a seed and round."""
    pairs = [(entry.global_sparsity, seed) for entry in rounds for seed in entry.seeds]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [_compression(level) for level, _ in pairs],
        "y": [100 * seed.val_accuracy for _, seed in pairs],
        "marker": {"size": 5, "color": _transparent(METHODS[0], 0.4)},
        "text": [f"seed {seed.seed}" for _, seed in pairs],
        "hovertemplate": "%{text}: %{y:.1f} %<extra></extra>",
        "name": "single seeds",
    }


def _points(results: list[Result], curve: bool) -> list[Figure]:
    """Sparse results as stars with their interval; the first one ends the curve, whose band shows its interval."""
    traces = []
    for place, result in enumerate([entry for entry in results if entry.sparsity > 0]):
        values = summarise([seed.val_accuracy for seed in result.seeds])
        colour = METHODS[place % len(METHODS)]
        half = 0.0 if curve and place == 0 else 100 * (values.half_width or 0.0)
        interval = {
            "array": [min(half, 100 - 100 * values.mean)],
            "arrayminus": [min(half, 100 * values.mean)],
            "symmetric": False,
            "visible": half > 0,
            "color": colour,
            "thickness": 1.5,
            "width": 5,
        }
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [_compression(result.sparsity)],
                "y": [100 * values.mean],
                "error_y": interval,
                "marker": {"symbol": "star", "size": 17, "color": colour, "line": {"color": "white", "width": 1.5}},
                "text": [f"sparsity {text.percent(result.sparsity)}<br>{text.accuracy(values)}"],
                "hovertemplate": f"{result.method}<br>%{{text}}<extra></extra>",
                "name": f"{result.method} (exported)",
            }
        )
    return traces


def _curve_layout(right: float) -> Figure:
    layout = base_layout("sparsity", "validation accuracy (%)")
    shown = [level for level in TICKS if level <= right + 0.002]  # a target is met to the weight, not to the digit
    layout["xaxis"] |= {
        "type": "log",
        "tickvals": [_compression(level) for level in shown],
        "ticktext": [f"{100 * level:.0f} %" for level in shown],
    }
    layout["yaxis"]["ticksuffix"] = " "
    return layout


def base_layout(x: str, y: str) -> Figure:
    """Fonts, colours and axes that all figures share, with the titles of the axes."""
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": "#cbd5e1", "ticks": "", "automargin": True}
    return {
        "font": {"family": "Inter, system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 13, "color": "#334155"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 64, "r": 16, "t": 12, "b": 56},
        "height": 400,
        "xaxis": {**axis, "title": {"text": x, "standoff": 12}},
        "yaxis": {**axis, "title": {"text": y, "standoff": 12}},
        "legend": {"orientation": "h", "y": -0.24, "x": 0, "font": {"size": 12}},
        "hoverlabel": {"bgcolor": "white", "bordercolor": "#cbd5e1", "font": {"color": "#0f172a"}},
    }


def _transparent(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
