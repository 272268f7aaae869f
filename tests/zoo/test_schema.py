"""The list of models: what is accepted, and how an error is worded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fxsparse.errors import ConfigError
from fxsparse.zoo.schema import load_zoo


def valid() -> dict[str, Any]:
    entry = {"name": "a/b", "lib": "a", "family": "f", "ctor": "m=1", "inputs": "args=(); kwargs={}"}
    return {"torch": "2.13.0", "batch": 2, "seed": "words", "entries": [entry]}


def write(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values))
    return path


def test_a_folder_and_a_file_are_the_same_list(tmp_path: Path) -> None:
    file = write(tmp_path / "zoo.json", valid())
    other = write(tmp_path / "mine.json", valid())
    assert load_zoo(tmp_path) == load_zoo(file) == load_zoo(other)
    zoo, folder = load_zoo(tmp_path)
    assert folder == tmp_path.resolve()
    assert zoo.entries[0].request() == {**valid()["entries"][0], "train_inputs": None}


def test_nothing_is_executed_on_reading(tmp_path: Path) -> None:
    values = valid()
    values["entries"][0]["ctor"] = f"open({str(tmp_path / 'made')!r}, 'w')"
    load_zoo(write(tmp_path / "zoo.json", values))
    assert not (tmp_path / "made").exists()


def drop(values: dict[str, Any], *path: Any) -> None:
    for step in path[:-1]:
        values = values[step]
    del values[path[-1]]


def put(values: dict[str, Any], value: Any, *path: Any) -> None:
    for step in path[:-1]:
        values = values[step]
    values[path[-1]] = value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: drop(v, "batch"), "`batch` is missing; add it"),
        (lambda v: drop(v, "entries", 0, "ctor"), "`entries.0.ctor` of a/b is missing; add it"),
        (lambda v: put(v, 1, "entries", 0, "ctr"), "`entries.0.ctr` of a/b is not a field; allowed: name, lib"),
        (lambda v: put(v, 1, "stages"), "`stages` is not a field; allowed: torch, batch, seed, entries"),
        (lambda v: put(v, "2", "batch"), "`batch` (='2') must be a valid integer"),
        (lambda v: put(v, 0, "batch"), "`batch` (=0) must be greater than or equal to 1"),
        (lambda v: put(v, 7, "entries", 0, "inputs"), "`entries.0.inputs` (=7) of a/b must be a valid string"),
        (lambda v: put(v, [], "entries"), "`entries`"),
        (lambda v: put(v, "", "entries", 0, "name"), "`entries.0.name`"),
        (
            lambda v: v["entries"].append(dict(v["entries"][0])),
            "`entries.1.name` (=a/b) stands at entries.0 too; rename one",
        ),
    ],
)
def test_an_error_names_the_field(tmp_path: Path, change: Any, words: str) -> None:
    values = valid()
    change(values)
    with pytest.raises(ConfigError) as caught:
        load_zoo(write(tmp_path / "zoo.json", values))
    assert words in str(caught.value)
    assert str(tmp_path / "zoo.json") in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3"])
def test_what_is_no_list_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "zoo.json").write_text(text)
    with pytest.raises(ConfigError, match=r"zoo\.json"):
        load_zoo(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read.*give a folder with a zoo\.json"):
        load_zoo(tmp_path / "nowhere")
