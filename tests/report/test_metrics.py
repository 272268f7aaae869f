"""The metrics file: round trip, refusals by path, atomic writes."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from report_examples import example_metrics

from fxsparse.errors import DataError
from fxsparse.report import Metrics, read_metrics, write_metrics


def test_round_trip(tmp_path: Path) -> None:
    metrics = Metrics.model_validate(example_metrics())
    write_metrics(metrics, tmp_path / "metrics.json")
    assert read_metrics(tmp_path / "metrics.json") == metrics
    raw = json.loads((tmp_path / "metrics.json").read_text())
    assert raw["schema"] == "fxsparse.metrics/1"
    assert raw["networks"][0]["results"][1]["alive"] == 100
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def _with(path: list[Any], value: Any) -> dict[str, Any]:
    data = copy.deepcopy(example_metrics())
    place: Any = data
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["schema"], "fxsparse.metrics/2"),
        (["networks"], []),
        (["networks", 0, "results"], []),
        (["networks", 0, "results", 1, "sparsity"], 1.5),
        (["networks", 0, "results", 1, "sparsity"], math.nan),
        (["networks", 1, "results", 0, "seeds", 2, "test_accuracy"], math.inf),
        (["networks", 0, "rounds", 0, "active_params"], -1),
        (["networks", 0, "rounds", 3, "seeds"], []),
        (["networks", 0, "rounds", 3, "surprise"], 1),
        (["seconds"], "soon"),
    ],
)
def test_a_bad_field_is_named_by_its_path(tmp_path: Path, path: list[Any], value: Any) -> None:
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps(_with(path, value)))
    with pytest.raises(DataError) as caught:
        read_metrics(file)
    assert ".".join(map(str, path)) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_no_metrics_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "metrics.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match="metrics.json"):
        read_metrics(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.json"):
        read_metrics(tmp_path / "nowhere.json")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.json"
    file.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_metrics(Metrics.model_validate(example_metrics()), file)
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]
