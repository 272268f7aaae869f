"""The matrix as one self-contained HTML page; nothing is loaded from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from fxsparse.report import template
from fxsparse.report.format import duration
from fxsparse.zoo.records import EntryResult, StageResult, Status
from fxsparse.zoo.render import mark, masked_share, removed_share, structure
from fxsparse.zoo.summary import stage_counts, target_rows

_CSS = """
td.pass { color: #0d9488; font-weight: 700; } td.fail { color: #be123c; font-weight: 700; background: #fff1f2; }
td.na, td.none { color: #94a3b8; } #matrix td:not(:first-child), #matrix th:not(:first-child) { text-align: center; }
#targets td, #targets th, table.numbers td { text-align: left; white-space: normal; vertical-align: top; }
tr.missed td { background: #fff1f2; } input { padding: .4rem .6rem; border: 1px solid var(--line); border-radius: 8px; }
details.entry { border-bottom: 1px solid var(--line); padding: .45rem 0; margin: 0; color: var(--ink); }
details.entry summary span { color: var(--soft); } pre { overflow-x: auto; font-size: .75rem; background: var(--ground);
  padding: .7rem; border-radius: 8px; } .reason { color: #be123c; } .quiet { color: var(--soft); }
#matrix thead th { position: sticky; top: 0; background: var(--paper); }
"""

_SCRIPT = """
const filter = document.getElementById('filter');
filter.addEventListener('input', () => {
  const words = filter.value.toLowerCase();
  for (const row of document.querySelectorAll('[data-name]'))
    row.hidden = !row.dataset.name.includes(words);
});
document.documentElement.dataset.ready = 'yes';
""".strip()

_CLASSES = {Status.PASS: "pass", Status.FAIL: "fail", Status.NOT_APPLICABLE: "na"}


def render_page(results: Sequence[EntryResult], title: str, settings: Mapping[str, str]) -> str:
    """The page as text.

    Args:
        results: what was found.
        title: headline.
        settings: how it was measured, as text pairs.
    """
    failed = sum(1 for result in results if result.failed)
    body = [_targets(results), _matrix(results), _entries(results), _settings(settings)]
    return template.PAGE.format(
        title=escape(title),
        subtitle=escape(f"{len(results)} models · {failed} with a failed stage"),
        css=template.CSS + _CSS,
        plotly="",
        body="\n".join(body),
        footer=escape(f"Written by fxsparse {settings.get('fxsparse', '')}".strip() + "."),
        script=_SCRIPT,
    )


def _targets(results: Sequence[EntryResult]) -> str:
    rows = []
    for row in target_rows(results):
        cells = (("✓ " if row.met else "✗ ") + row.name, row.wanted, row.found, ", ".join(row.worst[:12]))
        rows.append(_row(cells, "" if row.met else "missed"))
    head = _row(("target", "wanted", "found", "missed by"), tag="th")
    table = f'<div class="scroll"><table id="targets"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    return f"<section><h2>Targets</h2>{table}</section>"


def _matrix(results: Sequence[EntryResult]) -> str:
    counts = stage_counts(results)
    lines = []
    for place, result in enumerate(results):
        cells = [f'<td><a href="#e{place}">{escape(result.name)}</a></td>']
        cells += [_cell(result.stage(name)) for name in counts]
        rest = (masked_share(result), removed_share(result), structure(result), f"{result.seconds:.0f}")
        cells += [f"<td>{escape(text)}</td>" for text in rest]
        lines.append(f'<tr data-name="{escape(result.name.lower())}">{"".join(cells)}</tr>')
    head = _row(("model", *counts, "masked", "removed", "runs as", "seconds"), tag="th")
    total = _row(("pass / applies", *map(str, counts.values()), "", "", "", ""), "dense")
    return (
        '<section><h2>Matrix</h2><p class="lead">✓ holds, ✗ fails, – the original does not do it either; the '
        "reasons are below and under the pointer.</p>"
        '<p><input id="filter" placeholder="filter by name" aria-label="filter"></p>'
        f'<div class="scroll"><table id="matrix"><thead>{head}</thead>'
        f"<tbody>{''.join(lines)}{total}</tbody></table></div></section>"
    )


def _cell(stage: StageResult | None) -> str:
    if stage is None:
        return '<td class="none">·</td>'
    text = stage.reason or f"{stage.seconds:.1f} s"
    return f'<td class="{_CLASSES[stage.status]}" title="{escape(text[:400])}">{mark(stage)}</td>'


def _entries(results: Sequence[EntryResult]) -> str:
    parts = ["<section><h2>Models</h2>"]
    for place, result in enumerate(results):
        failed = ", ".join(result.failed)
        note = f'<span class="reason">{escape(failed)} failed</span>' if failed else "<span>all hold</span>"
        parts.append(
            f'<details class="entry" id="e{place}" data-name="{escape(result.name.lower())}"><summary>'
            f"{escape(result.name)} {note}</summary>{''.join(map(_stage, result.stages))}</details>"
        )
    return "".join([*parts, "</section>"])


def _stage(stage: StageResult) -> str:
    kind = "reason" if stage.status is Status.FAIL else "quiet"
    parts = [f"<h3>{mark(stage)} {escape(stage.stage)} <span class='quiet'>{duration(stage.seconds)}</span></h3>"]
    if stage.reason:
        parts.append(f'<p class="{kind}">{escape(stage.reason)}</p>')
    if stage.numbers:
        rows = "".join(_row((key.replace("_", " "), _text(value))) for key, value in stage.numbers.items())
        parts.append(f'<table class="numbers"><tbody>{rows}</tbody></table>')
    if stage.detail:
        parts.append(f"<pre>{escape(stage.detail)}</pre>")
    return "".join(parts)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {item}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _settings(settings: Mapping[str, str]) -> str:
    entries = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in settings.items())
    return f"<section><h2>How it was measured</h2><dl>{entries}</dl></section>"


def _row(values: Iterable[str], row_class: str = "", tag: str = "td") -> str:
    attribute = f' class="{row_class}"' if row_class else ""
    return f"<tr{attribute}>{''.join(f'<{tag}>{escape(value)}</{tag}>' for value in values)}</tr>"
