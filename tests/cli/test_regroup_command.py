"""`fxsparse regroup` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest

from fxsparse.cli import main
from fxsparse.data import digits
from fxsparse.lottery import load_ticket, save_ticket
from fxsparse.models import mlp
from fxsparse.planning import transform
from fxsparse.training import OneShot, prune
from fxsparse.training.loop import Task, fit, start


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.fixture(scope="module")
def ticket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = digits()
    example = (splits.train.inputs[:2],)
    arguments = {"hidden": [64, 48]}
    task = Task(lambda: transform(mlp(**arguments), example, include="hidden.1.weight"), splits.train, epochs=4)
    state = start(task, 0)
    fit(state, task)
    prune(state.model, OneShot(0.5))
    path = tmp_path_factory.mktemp("tickets") / "found.ticket"
    save_ticket(
        state.model,
        path,
        weights=state.model.state_dict(),
        lineage={"method": "one-shot", "data_fingerprint": splits.fingerprint},
        factory="fxsparse.models:mlp",
        arguments=arguments,
        input_signature=example,
    )
    return path


def test_one_command_to_a_ticket_and_a_file(ticket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to, onnx = tmp_path / "shared.ticket", tmp_path / "shared.onnx"
    code, out, err = run(capsys, "regroup", ticket, "--to", to, "--pattern", "shared:16", "--epochs", 2, "--onnx", onnx)
    assert code == 0, err
    for word in (
        "unstructured",
        "magnitude",
        "compensated",
        "fine-tuned",
        "SharedSupport(16)",
        "test accuracy",
        str(to),
    ):
        assert word in out
    assert "epoch 2" in err
    made = load_ticket(to)
    assert made.lineage["parent"] == load_ticket(ticket).ticket_id and made.lineage["finetune"]["epochs"] == 2
    onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])


def test_without_data_and_training(ticket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "plain.ticket"
    code, out, err = run(
        capsys, "regroup", ticket, "--to", to, "--pattern", "shared-support:16", "--samples", 0, "--epochs", 0
    )
    assert code == 0, err
    assert "compensated" not in out and "fine-tuned" not in out and load_ticket(to).lineage["finetune"] is None


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--pattern", "shared"), 2, "`pattern` (=shared)"),
        (("--pattern", "shared:64"), 2, "rows are fewer than a group of 64"),
        (("--pattern", "shared:16", "--split-seed", 7), 2, "`--split-seed`"),
        (("--pattern", "shared:16", "--data", "/nowhere"), 3, "/nowhere"),
        (("--pattern", "shared:16", "--samples", 9), 3, "`samples` (=9)"),
    ],
)
def test_bad_requests_are_one_line(
    options: tuple[object, ...],
    code: int,
    words: str,
    ticket: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found, _, err = run(capsys, "regroup", ticket, "--to", tmp_path / "no.ticket", *options)
    assert found == code and words in err.splitlines()[-1]
    assert not (tmp_path / "no.ticket").exists()


def test_other_data_must_be_meant(ticket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to, quick = tmp_path / "other.ticket", ("--pattern", "shared:16", "--samples", 0, "--epochs", 0)
    code, _, err = run(capsys, "regroup", ticket, "--to", to, *quick, "--split-seed", 7, "--any-data")
    assert code == 0, err
    code, _, err = run(capsys, "regroup", tmp_path / "none", "--to", to)
    assert code == 3 and "none" in err
