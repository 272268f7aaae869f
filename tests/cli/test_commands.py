"""The commands as a user meets them: output, exit codes, one-line errors."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

import fxsparse
from fxsparse.cli import app as app_module
from fxsparse.cli import main
from fxsparse.models import lenet_300_100
from fxsparse.planning import transform

UNTRACEABLE = """
import torch
from torch import nn

class Branchy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.bare = nn.Parameter(torch.ones(4, 4))
        self.table = nn.Embedding(5, 4)

    def forward(self, x):
        x = self.inside(x)
        if x.sum() > 0:
            x = x + 1
        return x @ self.bare

def branchy():
    return Branchy(), (torch.ones(2, 4),)

def nan():
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    return model

def empty():
    return nn.ReLU()
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.fixture
def zoo(tmp_path: Path) -> str:
    path = tmp_path / "zoo.py"
    path.write_text(UNTRACEABLE)
    return str(path)


@pytest.fixture
def ticket(tmp_path: Path) -> Path:
    model = transform(lenet_300_100(), (torch.zeros(2, 64),), sparsity=0.8)
    path = tmp_path / "lenet.ticket"
    fxsparse.save_ticket(
        model,
        path,
        final=True,
        factory="fxsparse.models:lenet_300_100",
        input_signature=(torch.zeros(2, 64),),
    )
    return path


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("demo", "imp", "transform-report", "show", "export"):
        assert command in out
        assert run(capsys, command, "--help")[0] == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, f"{fxsparse.__version__}\n")


@pytest.mark.parametrize("arguments", [[], ["shwo"], ["show"], ["show", "a:b", "--nope"], ["demo", "--seeds", "0"]])
def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run(capsys, *arguments)[0] == 2


def test_report_of_every_weight(capsys: pytest.CaptureFixture[str], zoo: str) -> None:
    code, out, _ = run(capsys, "transform-report", f"{zoo}:branchy", "--sparsity", "0.5")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "module" in lines["inside.0.weight"] and " 8 " in lines["inside.0.weight"]
    assert "parameter" in lines["bare"]  # a branch on values keeps the root in Python
    assert " - " in lines["table.weight"]
    assert "2 of 3 weights masked; 16 of 32 elements alive" in out
    assert "stays Python" in out


def test_report_takes_patterns_distributions_and_selections(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "transform-report", "fxsparse.models:lenet_300_100", "--sparsity", "0.5", "--pattern", "2:4",
        "--exclude", "output.weight",
    )  # fmt: skip
    assert code == 0
    assert "2 of 3 weights masked; 24600 of 49200 elements alive" in out
    code, out, _ = run(capsys, "transform-report", "fxsparse.models:lenet_300_100", "--include", "fc1.weight")
    assert "1 of 3 weights masked; 1920 of 19200" in out
    erk = run(capsys, "transform-report", "fxsparse.models:lenet_300_100", "--distribution", "erk")[1]
    uniform = run(capsys, "transform-report", "fxsparse.models:lenet_300_100")[1]
    assert "5020 of 50200" in erk and "5020 of 50200" in uniform and erk != uniform


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["transform-report", "ZOO:branchy", "--sparsity", "1.5"], 2, "`sparsity` (=1.5)"),
        (["transform-report", "ZOO:branchy", "--pattern", "oblique"], 2, "`pattern` (=oblique)"),
        (["transform-report", "ZOO:branchy", "--include", "insde.0.weight"], 2, "inside.0.weight"),
        (["transform-report", "ZOO:empty"], 2, "nothing to mask"),
        (["transform-report", "ZOO:nan"], 3, "NaN"),
        (["transform-report", "ZOO:absent"], 2, "the module offers"),
        (["transform-report", "nonsense"], 2, "package.module:factory"),
        (["show", "ZOO:branchy", "--after", "bananas"], 2, "insert_masks, mask_effective, mask_parameters, fold_masks"),
        (["export", "TMP/absent.ticket", "--onnx", "TMP/x.onnx"], 3, "absent.ticket"),
        (["imp", "--config", "TMP/absent.yaml"], 2, "absent.yaml"),
    ],
)
def test_errors_are_one_line_with_their_code(
    capsys: pytest.CaptureFixture[str], zoo: str, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    filled = [text.replace("ZOO", zoo).replace("TMP", str(tmp_path)) for text in arguments]
    found, out, err = run(capsys, *filled)
    assert found == code
    assert out == ""
    assert err.startswith("fxsparse: error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert message in err
    assert not (tmp_path / "x.onnx").exists()


def test_show_stages(capsys: pytest.CaptureFixture[str], zoo: str) -> None:
    name = "fxsparse.models:lenet_300_100"
    captured = run(capsys, "show", name)[1]
    assert captured == run(capsys, "show", name, "--after", "captured")[1]
    assert captured.startswith("== captured ==") and "fc1" in captured and "weight_mask" not in captured
    swapped = run(capsys, "show", name, "--after", "swap_modules")[1]
    assert "weight_mask density 1.0000" in swapped and "swap_modules: swapped (from fc1)" in swapped
    folded = run(capsys, "show", name, "--after", "fold_masks")[1]
    assert "weight_mask" not in folded and "mask folded" in folded
    guarded = run(capsys, "show", f"{zoo}:branchy", "--after", "mask_parameters")[1]
    assert "`the model` stays Python: control flow" in guarded
    assert "`the model` stays Python: control flow" in run(capsys, "show", f"{zoo}:branchy")[1]
    assert "bare" in guarded


def test_export_of_a_ticket(capsys: pytest.CaptureFixture[str], ticket: Path, tmp_path: Path) -> None:
    target = tmp_path / "lenet.onnx"
    code, out, _ = run(capsys, "export", str(ticket), "--onnx", str(target))
    assert code == 0 and "verified" in out and "10,450 of 50,610 alive" in out
    found = fxsparse.load_ticket(ticket)
    x = torch.randn(7, 64)
    model = found.apply(lenet_300_100(), final=True)
    expected = model(x).detach()
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-5, atol=1e-5)


def test_export_refuses_foreign_factories_unless_told(
    capsys: pytest.CaptureFixture[str], zoo: str, tmp_path: Path
) -> None:
    model = transform(nn.Sequential(nn.Linear(4, 4)), (torch.zeros(2, 4),), sparsity=0.5)
    path = tmp_path / "foreign.ticket"
    fxsparse.save_ticket(model, path, final=True, factory="os:getcwd", input_signature=(torch.zeros(2, 4),))
    code, _, err = run(capsys, "export", str(path), "--onnx", str(tmp_path / "x.onnx"))
    assert code == 3 and "os:getcwd" in err
    (tmp_path / "mine.py").write_text("from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(4, 4))\n")
    told = ("--model", f"{tmp_path}/mine.py:make")
    assert run(capsys, "export", str(path), "--onnx", str(tmp_path / "x.onnx"), *told)[0] == 0
    assert (tmp_path / "x.onnx").is_file()


def test_export_to_a_place_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], ticket: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "export", str(ticket), "--onnx", str(tmp_path / "file" / "x.onnx"))
    assert code == 4 and err.count("\n") == 1


def test_a_corrupt_ticket_is_exit_code_3(capsys: pytest.CaptureFixture[str], ticket: Path, tmp_path: Path) -> None:
    tensors = ticket / "tensors.safetensors"
    raw = bytearray(tensors.read_bytes())
    raw[-3] ^= 1
    tensors.write_bytes(bytes(raw))
    code, _, err = run(capsys, "export", str(ticket), "--onnx", str(tmp_path / "x.onnx"))
    assert code == 3 and "tensors.safetensors" in err and "sha256" in err.lower()
    assert not (tmp_path / "x.onnx").exists()


def test_warnings_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(args: object) -> None:
        warnings.warn("a\n  lock was taken over", RuntimeWarning, stacklevel=1)

    monkeypatch.setattr(app_module, "app", warn)
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        main([])
        assert capsys.readouterr().err == "fxsparse: warning: a lock was taken over\n"
    assert warnings.showwarning is before


def test_unexpected_errors_name_the_way_to_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(app_module, "app", fail)
    code, _, err = run(capsys)
    assert code == 1
    assert err == "fxsparse: error: ZeroDivisionError: division by zero (set FXSPARSE_TRACEBACK=1 for the traceback)\n"
    monkeypatch.setenv("FXSPARSE_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main([])


def test_the_installed_command_shows_no_traceback(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "fxsparse"), "show", "no.such:thing"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ), check=False)
    assert found.returncode == 2
    assert found.stderr.startswith("fxsparse: error: `no.such`") and found.stderr.count("\n") == 1
