"""The wide network's section: speeds from the numbers, a plot of them, escaped texts, and old files that have none."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_examples import example_metrics
from rich.console import Console

from fxsparse.report import Metrics, read_metrics, render_page, write_metrics
from fxsparse.report.metrics import Speed
from fxsparse.report.speed import file_rows, latency_figure, layer_rows, section, speedup, stage_rows, terminal_lines

TIMES = {
    "dense float": {1: 0.12, 16: 0.8, 128: 4.0},
    "ticket float": {1: 0.04, 16: 0.1, 128: 0.5},
    "dense int8": {1: 0.06, 16: 0.2, 128: 1.0},
    "ticket int8": {1: 0.04, 16: 0.08, 128: 0.4},
}


def example_speed() -> dict[str, Any]:
    return {
        "title": "Wide <MLP>",
        "group": 64,
        "sparsity": 0.9,
        "seeds": [0, 1],
        "stages": [
            {"name": "unstructured", "val_accuracy": [0.97, 0.95]},
            {"name": "magnitude", "val_accuracy": [0.5, 0.5]},
        ],
        "dense_test": [0.96, 0.94],
        "ticket_test": [0.95, 0.95],
        "files": [
            {"name": n, "onnx": f"onnx/{n}.onnx", "bytes": 8_690_000, "test_accuracy": 0.95, "latency_ms": t}
            for n, t in TIMES.items()
        ],
        "layers": [
            {"name": "fc", "shape": [8, 4], "density": 0.1, "form": "gather", "gain": 3.4, "reason": "59 us, not 202"},
            {"name": "out", "shape": [2, 8], "density": 1.0, "form": "dense", "gain": None, "reason": "no <zeros>"},
        ],
        "notes": ["files of seed 0"],
    }


@pytest.fixture
def speed() -> Speed:
    return Speed.model_validate(example_speed())


def test_rows_say_what_was_measured(speed: Speed) -> None:
    assert [round(speedup(speed, file, 128), 6) for file in speed.files] == [1.0, 8.0, 4.0, 10.0]
    heading, lines = file_rows(speed)
    assert heading == ("file", "test accuracy", "size", "batch 1", "batch 16", "batch 128")
    assert lines[1] == ("ticket float", "95.0 %", "8.69 MB", "0.040 ms 3.0x", "0.100 ms 8.0x", "0.500 ms 8.0x")
    assert stage_rows(speed)[1] == [("unstructured", "96.0 ± 1.4 %"), ("magnitude", "50.0 ± 0.0 %")]
    assert layer_rows(speed)[1][0] == ("fc", "8x4", "0.100", "gather", "3.4x expected", "59 us, not 202")
    assert layer_rows(speed)[1][1][4] == "–"


def test_the_plot_has_a_bar_for_every_file_and_batch(speed: Speed) -> None:
    figure = latency_figure(speed)
    assert figure["layout"]["yaxis"]["type"] == "log" and figure["layout"]["barmode"] == "group"
    assert {bar["name"]: dict(zip(map(int, bar["x"]), bar["y"], strict=True)) for bar in figure["data"]} == TIMES
    assert figure["data"][3]["text"] == ["3.0x", "10.0x", "10.0x"]
    assert len({bar["marker"]["color"] for bar in figure["data"]}) == 4


def test_the_terminal_fits_and_tells_all(speed: Speed) -> None:
    console = Console(file=io.StringIO(), width=100)
    for line in terminal_lines(speed):
        console.print(line, highlight=False)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in output and max(map(len, output.splitlines())) <= 100
    for word in (
        "90 % in shared supports of 64 rows",
        "10.0x",
        "unstructured 96.0 ± 1.4 %",
        "59 us, not 202",
        "seed 0",
    ):
        assert word in output


def test_the_section_is_escaped_and_in_the_page(speed: Speed, tmp_path: Path) -> None:
    page = section(speed)
    assert "<MLP>" not in page and "Wide &lt;MLP&gt;" in page and "no &lt;zeros&gt;" in page
    assert "10.0x" in page and "ticket int8, batch 128" in page
    (source,) = re.findall(r'data-target="speed">(.*?)</script>', page, re.S)
    assert json.loads(source) == json.loads(json.dumps(latency_figure(speed)))
    metrics = Metrics.model_validate({**example_metrics(), "speed": example_speed()})
    whole = render_page(metrics)
    assert page in whole and 'id="speed"' in whole
    write_metrics(metrics, tmp_path / "metrics.json")
    assert read_metrics(tmp_path / "metrics.json") == metrics


def test_files_without_the_section_are_read_and_shown() -> None:
    metrics = Metrics.model_validate(example_metrics())
    assert metrics.speed is None and 'id="speed"' not in render_page(metrics)
