"""The page: valid figures, nothing loaded from outside, no injection, and a real browser."""

from __future__ import annotations

import builtins
import json
import re
import shutil
import subprocess
from pathlib import Path

import plotly.graph_objects as go
import pytest
from report_examples import example_metrics

from fxsparse.errors import ConfigError
from fxsparse.report import Metrics, read_metrics, render_page, write_metrics, write_report
from fxsparse.report.charts import density_heat_map, latencies, latency_bars, sparsity_accuracy
from fxsparse.report.metrics import Network

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def network() -> Network:
    return Metrics.model_validate(example_metrics()).networks[0]


@pytest.mark.parametrize("build", [sparsity_accuracy, density_heat_map, latency_bars])
def test_figures_are_valid_plotly(build: object) -> None:
    figure = build(network())  # type: ignore[operator]
    go.Figure(figure)  # raises on any unknown property
    json.dumps(figure, allow_nan=False)


def test_curve_shows_the_measured_means() -> None:
    traces = {trace["name"]: trace for trace in sparsity_accuracy(network())["data"]}
    curve = traces["iterative magnitude pruning"]
    assert curve["x"] == pytest.approx([1, 1.25, 1 / 0.64, 1 / 0.512, 1 / 0.4096, 1 / 0.32768, 10])
    expected = [97.2 - s**4 for s in (0, 0.2, 0.36, 0.488, 0.5904, 0.67232, 0.9)]  # mean of the three seeds
    assert curve["y"] == pytest.approx(expected)
    assert traces["RigL (exported)"]["y"] == pytest.approx([96.5])
    band = traces["iterative magnitude pruning, 95 % interval of the mean"]
    half = 4.303 * 0.2 / 3**0.5  # seeds differ by 0.2 points
    assert band["y"][0] == pytest.approx(97.2 + half) and band["y"][-1] == pytest.approx(97.2 - half)
    assert len(traces["single seeds"]["x"]) == 21


def test_a_single_seed_has_a_line_but_no_band() -> None:
    data = example_metrics()["networks"][0]
    for entry in [*data["rounds"], *data["results"]]:
        entry["seeds"] = entry["seeds"][:1]
    names = [trace["name"] for trace in sparsity_accuracy(Network.model_validate(data))["data"]]
    assert "iterative magnitude pruning" in names
    assert not any("interval" in name for name in names)


def test_heat_map_is_density_not_sparsity() -> None:
    trace = density_heat_map(network())["data"][0]
    assert trace["y"] == ["fc1.weight", "output.weight"]
    assert trace["z"][0] == pytest.approx([1, 0.8, 0.64, 0.512, 0.4096, 0.32768, 0.1])
    assert trace["z"][1][-1] == pytest.approx(0.55)


def test_latency_is_the_mean_over_seeds_that_have_both() -> None:
    data = example_metrics()["networks"][0]
    seeds = data["results"][1]["seeds"]
    seeds[0] |= {"latency_ms": 1.0, "dense_latency_ms": 3.0}
    seeds[1] |= {"latency_ms": 2.0, "dense_latency_ms": 5.0}
    seeds[2] |= {"latency_ms": None}
    assert latencies(Network.model_validate(data).results[1]) == (1.5, 4.0)


def test_page_loads_nothing_from_outside() -> None:
    page = render_page(Metrics.model_validate(example_metrics()))
    frame = re.sub(r"<script>.*?</script>", "", page, flags=re.S)  # the scripts themselves are judged by the policy
    assert not re.search(r"\b(src|href)\s*=\s*[\"']?(https?:)?//", frame)
    assert '<link rel="stylesheet' not in frame and "@import" not in frame
    assert "default-src 'none'" in frame
    assert page.count("newPlot(") >= 1


def test_texts_are_escaped() -> None:
    data = example_metrics()
    evil = "</script><script>alert(1)</script>"
    data["title"] = evil
    data["networks"][0]["title"] = evil
    data["networks"][0]["results"][1]["method"] = evil
    data["networks"][0]["results"][1]["notes"] = [evil]
    data["settings"] = {evil: evil}
    layers = data["networks"][0]["rounds"]
    for entry in layers:
        entry["per_layer_sparsity"][evil] = {"sparsity": 0.0, "total": 1}
    page = render_page(Metrics.model_validate(data))
    assert evil not in page and "alert(1)</script>" not in page


def test_without_rounds_there_is_no_heat_map(tmp_path: Path) -> None:
    data = example_metrics()
    for entry in data["networks"]:
        entry["rounds"] = []
    page = render_page(Metrics.model_validate(data))
    assert "Where the weights survive" not in page and 'id="curve-0"' in page


def test_missing_plotly_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: object) -> object:
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"fxsparse\[report\]"):
        render_page(Metrics.model_validate(example_metrics()))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the page is not opened in a browser")
def test_page_draws_in_a_real_browser_without_a_network(tmp_path: Path) -> None:
    write_metrics(Metrics.model_validate(example_metrics()), tmp_path / "metrics.json")
    page = write_report(tmp_path / "metrics.json", tmp_path / "report.html")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=10000"
    ).split()
    result = subprocess.run(
        [str(CHROMIUM), *flags, "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
         "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    dom = re.sub(r"<script.*?</script>", "", result.stdout, flags=re.S)
    assert 'data-ready="yes"' in dom  # the last line of the page's script ran
    assert len(re.findall(r'class="[^"]*js-plotly-plot', dom)) == 6
    assert dom.count('class="heatmaplayer') >= 2 and len(re.findall(r'class="points"', dom)) >= 4
    assert "96.0 ± 0.4 %" in dom


def test_intervals_stay_below_100_percent_and_the_last_tick_is_the_target() -> None:
    data = example_metrics()["networks"][1]
    for result in data["results"][1:]:
        result["sparsity"] = 0.8999
        for seed in result["seeds"]:
            seed["val_accuracy"] = 0.99 + 0.005 * seed["seed"]
    data["rounds"][-1]["global_sparsity"] = 0.8999
    figure = sparsity_accuracy(Network.model_validate(data))
    traces = {trace["name"]: trace for trace in figure["data"]}
    star = traces["RigL (exported)"]
    assert star["y"][0] + star["error_y"]["array"][0] == pytest.approx(100)
    assert star["error_y"]["arrayminus"][0] == pytest.approx(4.303 * 0.5 / 3**0.5)
    assert traces["IMP (exported)"]["error_y"]["visible"] is False  # its interval is the end of the band
    assert all(max(trace["y"]) <= 100 for trace in figure["data"])
    assert figure["layout"]["xaxis"]["ticktext"][-1] == "90 %"


def test_layers_keep_the_order_of_the_model(tmp_path: Path) -> None:
    data = example_metrics()
    for entry in data["networks"][0]["rounds"]:
        entry["per_layer_sparsity"] = dict(reversed(entry["per_layer_sparsity"].items()))
    write_metrics(Metrics.model_validate(data), tmp_path / "m.json")
    first = read_metrics(tmp_path / "m.json").networks[0]
    assert density_heat_map(first)["data"][0]["y"] == ["output.weight", "fc1.weight"]
