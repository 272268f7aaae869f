"""`fxsparse verify`, `bench` and `optimize` as a user meets them: output, exit codes, one-line errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import fxsparse
from fxsparse.cli import main
from fxsparse.cli.file_options import parse_sizes, parse_whole_numbers
from fxsparse.errors import ConfigError
from fxsparse.models import lenet_300_100
from fxsparse.planning import transform

X = (torch.zeros(2, 64),)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a.onnx and a.ticket."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = transform(lenet_300_100(), X, sparsity=0.8)
    options = {"final": True, "factory": "fxsparse.models:lenet_300_100", "input_signature": X}
    ticket = fxsparse.save_ticket(model, folder / "a.ticket", **options)
    fxsparse.export_onnx(model, folder / "a.onnx", X, latency=False, compact=False, lineage=ticket.origin)
    return folder


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    listed = run(capsys, "--help")[1]
    for command in ("verify", "bench", "optimize"):
        assert command in listed and run(capsys, command, "--help")[0] == 0


def test_verify_passes_and_fails_with_its_exit_code(
    capsys: pytest.CaptureFixture[str], files: Path, tmp_path: Path
) -> None:
    code, out, err = run(capsys, "verify", files / "a.onnx", "--against", files / "a.ticket")
    assert code == 0 and "passed" in out.splitlines()[0] and "FAILED" not in out and err == ""
    model = onnx.load(files / "a.onnx")
    tensor = next(t for t in model.graph.initializer if list(t.dims) == [300, 64])
    array = numpy_helper.to_array(tensor).copy()
    array[array == 0] = 0.5
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, tmp_path / "lie.onnx")
    code, out, _ = run(capsys, "verify", tmp_path / "lie.onnx", "--against", files / "a.ticket")
    assert code == 4 and "zeros      FAILED" in out and "parity     FAILED" in out
    code, out, _ = run(capsys, "verify", tmp_path / "lie.onnx", "--against", files / "a.onnx")
    assert code == 4 and "FAILED" in out
    factory = "fxsparse.models:lenet_300_100"
    assert run(capsys, "verify", files / "a.onnx", "--against", files / "a.ticket", "--model", factory)[0] == 0


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], files: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"nonsense")
    for arguments, code in (
        (("verify", bad, "--against", files / "a.ticket"), 4),
        (("verify", files / "a.onnx", "--against", tmp_path / "no.ticket"), 3),
        (("verify", files / "a.onnx"), 2),
        (("bench", bad), 4),
        (("bench", files / "a.onnx", "--batch", "1,x"), 2),
        (("bench", files / "a.onnx", "--size", "batch"), 2),
        (("optimize", bad, "-o", tmp_path / "out.onnx"), 4),
        (("optimize", files / "a.onnx", "-o", files / "a.onnx"), 2),
        (("optimize", files / "a.onnx", "-o", tmp_path / "no" / "out.onnx", "--no-latency"), 4),
    ):
        found, out, err = run(capsys, *arguments)
        assert (found, out) == (code, "") and "Traceback" not in err, arguments
        if code != 2 or "Usage" not in err:
            assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == [bad]


def test_bench_prints_a_table_or_json(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    path = files / "a.onnx"
    arguments = ("bench", path, path, "--batch", "1,4", "--threads", "1,2", "--seconds", "0.01")
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and out.count("1.00x") >= 4
    for heading in ("p50 ms", "p95 ms", "samples/s", "ratio", "load ms"):
        assert heading in out
    code, out, _ = run(capsys, *arguments, "--json")
    rows = json.loads(out)["rows"]
    assert [(row["threads"], row["batch"]) for row in rows[::2]] == [(1, 1), (1, 4), (2, 1), (2, 4)]


def test_optimize_writes_a_verified_file(capsys: pytest.CaptureFixture[str], files: Path, tmp_path: Path) -> None:
    out_file = tmp_path / "small.onnx"
    code, out, err = run(capsys, "optimize", files / "a.onnx", "-o", out_file, "--no-latency", "--batch", "1")
    assert code == 0 and err == "" and out_file.is_file()
    for word in ("source", "written", "channels", "lowered", "verified", "no speed-up expected"):
        assert word in out
    assert run(capsys, "verify", out_file, "--against", files / "a.ticket")[0] == 0
    arguments = ("--no-channels", "--no-lower", "--no-verify", "--no-latency")
    assert "verified    no" in run(capsys, "optimize", files / "a.onnx", "-o", out_file, *arguments)[1]


def test_words_of_sizes_and_numbers() -> None:
    assert parse_whole_numbers("1, 16,128", "batch") == (1, 16, 128)
    assert parse_sizes(["a=3", "b=c=4"]) == {"a": 3, "b=c": 4}
    for wrong in ("", "1,,2", "1.5"):
        with pytest.raises(ConfigError, match="whole numbers"):
            parse_whole_numbers(wrong, "batch")
    for wrong in ("a", "a=", "=3", "a=-1", "a=x"):
        with pytest.raises(ConfigError, match="NAME=N"):
            parse_sizes([wrong])
    assert np.prod(parse_whole_numbers("2,3", "batch")) == 6
