"""The plotly page of a comparison: accuracy against sparsity, one curve per method, one figure per pattern."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from fxsparse.comparison.config import DENSE, Reference
from fxsparse.comparison.results import Arm, columns, lines
from fxsparse.errors import ConfigError
from fxsparse.report.metrics import write_atomically


def write_page(arms: Sequence[Arm], path: Path, title: str, reference: Reference | None = None) -> None:
    """One self-contained HTML file.

    Raises:
        ConfigError: plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError("the page needs plotly, which is not installed: pip install 'fxsparse[report]'") from error
    figures = []
    dense = next((arm for arm in arms if arm.label == DENSE), None)
    for pattern in dict.fromkeys(arm.pattern for arm in arms if arm.label != DENSE):
        figure = go.Figure()
        for label, longer in dict.fromkeys((arm.label, arm.longer) for arm in arms if arm.label != DENSE):
            kind = label, pattern, longer
            own = sorted((a for a in arms if (a.label, a.pattern, a.longer) == kind), key=lambda arm: arm.sparsity)
            spread = [100 * (arm.accuracy.half_width or 0.0) for arm in own]
            figure.add_scatter(
                x=[arm.sparsity for arm in own],
                y=[100 * arm.accuracy.mean for arm in own],
                error_y={"type": "data", "array": spread},
                mode="lines+markers",
                name=f"{label}, equal FLOPs" if longer else label,
                line={"dash": "dash" if longer else "solid"},
            )
        if dense is not None:
            figure.add_hline(100 * dense.accuracy.mean, line_dash="dot", annotation_text=DENSE)
        figure.update_layout(title=pattern, xaxis_title="sparsity", yaxis_title="test accuracy %")
        figures.append(figure.to_html(full_html=False, include_plotlyjs=False))
    head = "".join(f"<th>{escape(name)}</th>" for name in columns(reference))
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in lines(arms))
    write_atomically(
        path,
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<script>{get_plotlyjs()}</script><style>body{{font-family:sans-serif;max-width:1100px;margin:2rem auto}}"
        "td,th{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:right}</style>"
        f"<h1>{escape(title)}</h1>{''.join(figures)}<table><tr>{head}</tr>{rows}</table></html>",
    )
