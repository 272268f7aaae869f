"""From results to counts, targets, tables and the page."""

from __future__ import annotations

import builtins
import json
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from fxsparse.zoo import render
from fxsparse.zoo.page import render_page
from fxsparse.zoo.records import EntryResult, StageResult, Status
from fxsparse.zoo.summary import all_met, stage_counts, target_rows

P, F, N = Status.PASS, Status.FAIL, Status.NOT_APPLICABLE


def stage(name: str, status: Status = P, reason: str = "", wrong: bool = False, **numbers: Any) -> StageResult:
    return StageResult(name, status, reason, 1.0, wrong, numbers)


def result(name: str, *stages: StageResult) -> EntryResult:
    return EntryResult(name, "lib", "family", {}, 3.0, (stage("eager"), *stages))


def transform(status: Status = P, seconds: float = 1.0, ratio: float = 2.0, **numbers: Any) -> StageResult:
    numbers = {
        "silent_count": 0,
        "masked_elements": 3,
        "weight_elements": 4,
        "graphs": 1,
        "root_graph": True,
        **numbers,
    }
    return stage("transform", status, transform_s=seconds, ratio=ratio, **numbers)


def row(results: list[EntryResult], words: str) -> Any:
    (found,) = (each for each in target_rows(results) if words in each.name)
    return found


def test_counts_leave_out_what_does_not_apply() -> None:
    results = [
        result("a", stage("half")),
        result("b", stage("half", F)),
        result("c", stage("half", N)),
        result("d"),
    ]
    count = stage_counts(results)["half"]
    assert (count.good, count.total, count.others) == (1, 2, ("b",))
    assert str(count) == "1/2"
    assert row(results, "bfloat16").found == "50.0 % (1/2)"
    assert not row(results, "bfloat16").met
    assert not all_met(results)


def test_the_core_needs_all_its_stages() -> None:
    results = [result("a", transform(), stage("train"), stage("reload", F)), result("b", transform(), stage("train"))]
    found = row(results, "transform + train")
    assert (found.found, found.met, found.worst) == ("50.0 % (1/2)", False, ("a",))


def test_a_stage_that_does_not_apply_takes_nothing_from_the_core() -> None:
    assert row([result("a", transform(), stage("train", N), stage("reload"))], "transform + train").met


@pytest.mark.parametrize(("good", "met"), [(95, True), (94, False)])
def test_onnx_needs_95_percent(good: int, met: bool) -> None:
    results = [result(str(i), stage("onnx", P if i < good else F)) for i in range(100)]
    assert row(results, "ONNX").met is met


def test_without_anything_to_try_a_target_is_met_and_says_so() -> None:
    found = row([result("a", stage("half", N))], "bfloat16")
    assert (found.met, found.found) == (True, "none to try")


def test_an_original_that_does_not_run_misses_a_target() -> None:
    broken = EntryResult("a", "l", "f", {}, 1.0, (stage("eager", F, "why"), stage("half", N)))
    assert not row([broken], "builds and runs").met


def test_silent_skips_and_wrong_outputs_are_counted() -> None:
    results = [result("a", transform(silent_count=2)), result("b", transform(), stage("half", F, wrong=True))]
    assert (row(results, "silent").found, row(results, "silent").worst) == ("2", ("a",))
    assert (row(results, "wrong").found, row(results, "wrong").worst) == ("1", ("b",))


@pytest.mark.parametrize(
    ("seconds", "ratio", "ratio_met", "seconds_met"),
    [(1.0, 3.0, True, True), (1.0, 3.1, False, True), (0.1, 9.0, True, True), (10.0, 2.0, True, True)]
    + [(10.1, 2.0, True, False)],
)
def test_time_targets(seconds: float, ratio: float, ratio_met: bool, seconds_met: bool) -> None:
    results = [result("a", transform(seconds=seconds, ratio=ratio)), result("b", transform())]
    assert row(results, "recorder run").met is ratio_met
    assert row(results, "slowest").met is seconds_met


NASTY = "a/<script>alert(1)</script>|b"


def nasty() -> list[EntryResult]:
    reason = "broke | here <b>\nand there"
    return [
        result("plain", transform(), stage("half", N, "no bfloat16")),
        result(NASTY, transform(graphs=0, root_graph=False), stage("half", F, reason, wrong=True)),
    ]


def test_the_terminal_tables_hold_every_model_and_target() -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render.matrix_table(nasty()))
    console.print(render.target_table(nasty()))
    text = console.export_text()
    console.file.close()
    for words in ("plain", NASTY, "✓", "✗", "–", "75 %", "one graph", "Python", "wrong outputs", "2/2", "0/1"):
        assert words in text


def test_json_lines_can_be_read_back() -> None:
    lines = render.json_lines(nasty()).splitlines()
    assert [EntryResult.from_plain(json.loads(line)) for line in lines] == nasty()


def test_markdown_keeps_its_columns() -> None:
    text = render.markdown(nasty(), "made so")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = {line.replace("\\|", "").count("|") for line in tables}
    assert widths == {6, 9}
    assert "<script" not in text
    assert "What failed:" in text and "half: broke \\| here" in text
    assert render.markdown([nasty()[0]], "made so").count("What failed") == 0


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]


def test_the_page_is_whole_safe_and_needs_no_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    page = render_page(nasty(), "Title <x>", {"fxsparse": "1.0"})
    reader = Reader()
    reader.feed(page)
    assert all(address.startswith(("#", "data:")) for address in reader.addresses)
    assert reader.tags.count("script") == 2  # the empty place of plotly, and the filter
    assert "alert(1)</script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert reader.tags.count("details") == 2
    for words in ("broke | here &lt;b&gt;", "no bfloat16", "Title &lt;x&gt;", "wrong outputs"):
        assert words in page
