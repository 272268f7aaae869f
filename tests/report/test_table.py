"""The final table: exact cells, widths of real terminals, notes by number."""

from __future__ import annotations

import io

import pytest
from report_examples import example_metrics
from rich.console import Console

from fxsparse.report import Metrics, markdown_table, terminal_table
from fxsparse.report.table import COLUMNS, rows


def metrics() -> Metrics:
    return Metrics.model_validate(example_metrics())


def test_cells_of_one_row() -> None:
    found, notes = rows(metrics())
    assert [row.network for row in found] == ["LeNet-300-100"] * 3 + ["Small conv net"] * 3
    assert dict(zip(COLUMNS, found[1].cells, strict=True)) == {
        "method": "IMP",
        "sparsity": "90.0 %",
        "test accuracy": "96.0 ± 0.4 %",
        "alive": "100",
        "FLOPs dense": "100 k",
        "FLOPs effective": "10.0 k",
        "file": "205 kB",
        "dense ms": "0.012",
        "ticket ms": "0.012",
        "worst |Δ|": "1.2e-06",
        "note": "1) 2)",
    }
    assert notes[0] == "a zero in a dense matrix is multiplied like any other number"
    assert len(notes) == 2  # said once, for four rows
    assert [row.dense for row in found] == [True, False, False] * 2


def test_what_was_not_measured_is_a_dash() -> None:
    data = example_metrics()
    for seed in data["networks"][0]["results"][1]["seeds"]:
        for key in ("onnx_bytes", "latency_ms", "dense_latency_ms", "worst_difference"):
            seed[key] = None
    cells = dict(zip(COLUMNS, rows(Metrics.model_validate(data))[0][1].cells, strict=True))
    assert [cells[key] for key in ("file", "dense ms", "ticket ms", "worst |Δ|")] == ["–"] * 4


def test_the_worst_difference_is_the_largest_over_seeds() -> None:
    data = example_metrics()
    data["networks"][0]["results"][2]["seeds"][1]["worst_difference"] = 0.5
    assert rows(Metrics.model_validate(data))[0][2].cells[COLUMNS.index("worst |Δ|")] == "5.0e-01"


@pytest.mark.parametrize("width", [80, 100, 140])
def test_terminal_table_fits_without_cutting(width: int) -> None:
    data = example_metrics()
    for network in data["networks"]:
        for result in network["results"]:
            result |= {"alive": 29_072, "macs_dense": 1_352_000, "macs_effective": 337_210}
    table, notes = terminal_table(Metrics.model_validate(data), width)
    screen = Console(file=io.StringIO(), width=width, color_system=None)
    screen.print(table)
    output = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in output
    assert max(map(len, output.splitlines())) <= width
    assert (
        output.count("29,072") == 6
        and output.count("±0.4") == 6
        and output.count("2.70M→674k") == 6
        and output.count("1,2)") == 4
    )
    assert str(notes[0]).startswith("1) a zero")


def test_markdown_has_every_row_and_escapes_bars() -> None:
    lines = markdown_table(metrics()).splitlines()
    assert lines[0].startswith("| network | method |") and "worst \\|Δ\\|" in lines[0]
    assert sum(line.startswith("| LeNet-300-100") for line in lines) == 3
    assert len({line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}) == 1
