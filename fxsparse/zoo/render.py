"""The matrix as a table: in the terminal, as JSON lines, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from fxsparse.zoo.records import EntryResult, StageResult, Status
from fxsparse.zoo.summary import stage_counts, target_rows

MARKS = {Status.PASS: "✓", Status.FAIL: "✗", Status.NOT_APPLICABLE: "–"}
_STYLES = {Status.PASS: "green", Status.FAIL: "bold red", Status.NOT_APPLICABLE: "dim"}


def mark(stage: StageResult | None) -> str:
    """One character for a stage; a dot where it was not run."""
    return "·" if stage is None else MARKS[stage.status]


def masked_share(result: EntryResult) -> str:
    """Masked elements among those of all weights of two or more axes, in percent."""
    stage = result.stage("transform")
    numbers = stage.numbers if stage is not None else {}
    if not numbers.get("weight_elements"):
        return ""
    return f"{100 * numbers['masked_elements'] / numbers['weight_elements']:.0f} %"


def removed_share(result: EntryResult) -> str:
    """Parameters that compaction removed, in percent of the model's."""
    stage = result.stage("compact")
    numbers = stage.numbers if stage is not None else {}
    before, after = numbers.get("parameters_before"), numbers.get("parameters_after")
    return f"{100 * (before - after) / before:.0f} %" if before and after is not None else ""


def structure(result: EntryResult) -> str:
    """What executes: one graph, or so many in Python."""
    stage = result.stage("transform")
    if stage is None or "graphs" not in stage.numbers:
        return ""
    count = stage.numbers["graphs"]
    return "one graph" if stage.numbers["root_graph"] else f"{count} in Python" if count else "Python"


def matrix_table(results: Sequence[EntryResult]) -> Table:
    """The matrix for the terminal."""
    counts = stage_counts(results)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for name in counts:
        table.add_column(name, justify="center")
    for heading in ("masked", "removed", "runs as", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        cells = [result.stage(name) for name in counts]
        marks = [Text(mark(cell), style=_STYLES[cell.status] if cell else "dim") for cell in cells]
        table.add_row(
            Text(result.name),
            *marks,
            masked_share(result),
            removed_share(result),
            structure(result),
            f"{result.seconds:.0f}",
        )
    table.add_section()
    table.add_row(Text("pass / applies", style="bold"), *[str(count) for count in counts.values()], "", "", "", "")
    return table


def target_table(results: Sequence[EntryResult]) -> Table:
    """The targets for the terminal."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("", "target", "wanted", "found", "missed by"):
        table.add_column(heading, overflow="fold")
    for row in target_rows(results):
        sign = Text("✓", style="green") if row.met else Text("✗", style="bold red")
        table.add_row(sign, Text(row.name), Text(row.wanted), Text(row.found), Text(_few(row.worst)))
    return table


def failure_lines(results: Sequence[EntryResult]) -> list[str]:
    """One line for every failed stage."""
    return [
        f"{result.name} {stage.stage}: {stage.reason}"
        for result in results
        for stage in result.stages
        if stage.status is Status.FAIL
    ]


def json_lines(results: Sequence[EntryResult]) -> str:
    """One JSON object a line and model, everything in it."""
    return "".join(json.dumps(result.plain(), ensure_ascii=False) + "\n" for result in results)


def markdown(results: Sequence[EntryResult], made: str) -> str:
    """Targets, matrix and failures as GitHub-flavoured Markdown; `made` says how it was measured."""
    counts = stage_counts(results)
    out = [made, "", _line(["target", "wanted", "found", "met", "missed by"]), _line(["---"] * 5)]
    out += [
        _line([row.name, row.wanted, row.found, "yes" if row.met else "**no**", _few(row.worst)])
        for row in target_rows(results)
    ]
    heads = ["model", *counts, "masked", "removed", "runs as", "seconds"]
    out += ["", _line(heads), _line(["---", *[":-:"] * len(counts), "--:", "--:", "---", "--:"])]
    for result in results:
        marks = [mark(result.stage(name)) for name in counts]
        out.append(
            _line(
                [
                    result.name,
                    *marks,
                    masked_share(result),
                    removed_share(result),
                    structure(result),
                    f"{result.seconds:.0f}",
                ]
            )
        )
    out.append(_line(["**pass / applies**", *[f"**{count}**" for count in counts.values()], "", "", "", ""]))
    failures = failure_lines(results)
    if failures:
        out += ["", "What failed:", "", *[f"- {_safe(line)}" for line in failures]]
    return "\n".join(out) + "\n"


def _shares(result: EntryResult) -> tuple[str, str, str]:
    return masked_share(result), removed_share(result), structure(result)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_safe(cell) for cell in cells) + " |"


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
