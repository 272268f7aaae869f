"""`fxsparse zoo` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxsparse.cli import main

INPUTS = "args=(torch.randn(B,4),); kwargs={}"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["zoo", *arguments])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def zoo(path: Path, *constructors: str) -> Path:
    entries = [
        {"name": f"own/{i}", "lib": "own", "family": "tiny", "ctor": f"from torch import nn; {ctor}", "inputs": INPUTS}
        for i, ctor in enumerate(constructors)
    ]
    path.write_text(json.dumps({"torch": "2.13.0", "batch": 2, "seed": "0, 1", "entries": entries}))
    return path


def test_a_list_without_failures_ends_with_zero_and_writes_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = zoo(tmp_path / "mine.json", "m=nn.Sequential(nn.Linear(4,4),nn.Tanh(),nn.Linear(4,2))")
    out, matrix = tmp_path / "out", tmp_path / "matrix.md"
    arguments = [str(path), "--out", str(out), "--stages", "compile,transform,compact"]
    code, text, _ = run(capsys, *arguments, "--report", "--markdown", str(matrix))
    assert code == 0, text
    assert "[1/1] own/0  eager ✓ transform ✓ compile ✓ compact" in text
    assert "wrong outputs" in text
    assert json.loads((out / "results.jsonl").read_text())["name"] == "own/0"
    assert "own/0" in (out / "report.html").read_text()
    assert matrix.read_text() == (out / "matrix.md").read_text()


def test_a_failure_ends_with_one_and_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = zoo(tmp_path / "mine.json", "m=nn.BatchNorm1d(4)", "m=undefined")
    code, text, _ = run(capsys, str(path), "--out", str(tmp_path / "out"), "--stages", "transform", "--jobs", "2")
    assert code == 1
    assert "own/0 transform: ConfigError: `model` (=BatchNorm1d)" in text
    assert "own/1 eager: NameError: name 'undefined' is not defined" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--stages", "transform,fly"], "`stages` (=transform,fly) must be some of"),
        (["--retry", "all"], "`retry` (=all) must be `failed`"),
        (["--only", "hf/*"], "`only` (=hf/*) fits none of 1 entries"),
        (["--sparsity", "1"], "`sparsity` (=1.0)"),
        (["--python", "/no/python"], "`python` (=/no/python) is no file"),
    ],
)
def test_wrong_options_end_with_two_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    path = zoo(tmp_path / "mine.json", "m=nn.Linear(4,4)")
    code, out, err = run(capsys, str(path), "--out", str(tmp_path / "out"), *options)
    assert (code, out) == (2, "")
    assert words in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_wrong_list_ends_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{")
    code, _, err = run(capsys, str(path))
    assert code == 2
    assert "is not valid JSON" in err


def test_the_help_warns_that_the_list_is_code(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "only run files that you trust" in " ".join(out.replace("│", " ").split())
