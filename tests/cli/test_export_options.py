"""The options of `fxsparse export`: words at the command line, one line where they are wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import fxsparse
from fxsparse.cli.app import main
from fxsparse.cli.export import parse_dynamic, parse_int8, parse_target, read_samples
from fxsparse.errors import ConfigError, DataError
from fxsparse.exporters import Dynamic, Int8, Target, read_metadata
from fxsparse.models import lenet_300_100


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(exit_.value.code or 0), out, err


@pytest.fixture(scope="module")
def ticket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    example = (torch.zeros(2, 64),)
    model = fxsparse.transform(lenet_300_100(), example, sparsity=0.5, pattern=fxsparse.Channel(), exclude="output")
    path = tmp_path_factory.mktemp("tickets") / "lenet.ticket"
    fxsparse.save_ticket(model, path, final=True, factory="fxsparse.models:lenet_300_100", input_signature=example)
    return path


def test_int8_of_a_ticket(capsys: pytest.CaptureFixture[str], ticket: Path, tmp_path: Path) -> None:
    path, data = tmp_path / "m.onnx", tmp_path / "data.npy"
    np.save(data, np.random.default_rng(0).standard_normal((70, 64)).astype(np.float32))
    code, out, err = run(
        capsys,
        "export",
        str(ticket),
        "--onnx",
        str(path),
        "--target",
        "int8",
        "--calibration",
        str(data),
        "--exclude",
        "output",
    )
    assert (code, err) == (0, "")
    assert "int8 error" in out and "on 70 samples of the calibration data" in out and "2 of 3 products" in out
    assert "compacted" in out and "dense int8" in out
    assert read_metadata(path)["target"] == "int8"
    assert read_metadata(path)["lineage"]["ticket_id"] == fxsparse.load_ticket(ticket).ticket_id


def test_axes_and_compaction_of_a_ticket(capsys: pytest.CaptureFixture[str], ticket: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    code, out, _ = run(
        capsys, "export", str(ticket), "--onnx", str(path), "--no-compact", "--no-lower", "--dynamic", "fixed"
    )
    assert code == 0 and "fixed batch 2" in out and "as it is" in out
    assert [d.dim_value for d in onnx.load(path).graph.input[0].type.tensor_type.shape.dim] == [2, 64]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--target", "int7"], 2, "`target` (=int7) is none of stock, int8, int8-dynamic, tensorrt"),
        (["--target", "int8"], 2, "needs `calibration`"),
        (["--optimize", "speed"], 2, "`optimize` (=speed) is none of latency, size"),
        (["--budget", "3"], 2, "`budget` (=3.0) is for `optimize`"),
        (["--dynamic", "some"], 2, "`dynamic` (=some) is none of fixed, batch, sequence"),
        (["--dynamic", "x:one=batch"], 2, "is no list of NAME:AXIS=SIZE"),
        (["--dynamic", "y:0=batch"], 2, "names input `y`"),
        (["--target", "int8", "--calibration", "TMP/absent.npz"], 3, "absent.npz"),
        (["--target", "int8", "--calibration", "TMP/other.npz"], 3, "lacks input `x`; it holds z"),
        (["--target", "int8", "--calibration", "TMP/empty.npy"], 3, "`calibration` is empty"),
        (["--target", "int8", "--calibration", "TMP/good.npy", "--max-error", "1e-9"], 4, "`max_error` (=1e-09)"),
    ],
)
def test_wrong_options_are_one_line(
    capsys: pytest.CaptureFixture[str], ticket: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    np.savez(tmp_path / "other.npz", z=np.zeros((3, 64), dtype=np.float32))
    np.save(tmp_path / "empty.npy", np.zeros((0, 64), dtype=np.float32))
    np.save(tmp_path / "good.npy", np.random.default_rng(0).standard_normal((9, 64)).astype(np.float32))
    filled = [text.replace("TMP", str(tmp_path)) for text in arguments]
    found, out, err = run(capsys, "export", str(ticket), "--onnx", str(tmp_path / "x.onnx"), *filled)
    assert (found, out) == (code, "") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "x.onnx").exists()


def test_words() -> None:
    assert parse_target("INT8-dynamic") is Target.INT8_DYNAMIC and parse_dynamic("sequence") is Dynamic.SEQUENCE
    assert parse_dynamic("a:0=batch,b:-1=time,a:2=time") == {"a": {0: "batch", 2: "time"}, "b": {-1: "time"}}
    assert parse_int8(None, None) is None and parse_int8(0.5, ["a"]) == Int8(max_error=0.5, exclude=("a",))
    with pytest.raises(ConfigError):
        parse_int8(-1.0, None)


def test_samples_in_batches(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    rows = np.arange(21, dtype=np.float32).reshape(7, 3)
    np.savez(tmp_path / "d.npz", input=rows)
    items = list(read_samples(tmp_path / "d.npz", model, (torch.zeros(2, 3),), size=4))
    assert [len(args[0]) for args, _ in items] == [4, 3]
    assert np.array_equal(torch.cat([args[0] for args, _ in items]).numpy(), rows)


@pytest.mark.parametrize("harm", ["text", "empty", "cut off", "objects", "words", "missing", "a folder"])
def test_samples_that_are_no_arrays_of_numbers(tmp_path: Path, harm: str) -> None:
    path = tmp_path / ("d.npz" if harm in ("cut off", "objects", "words") else "d.npy")
    if harm == "text":
        path.write_text("no arrays")
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "cut off":
        np.savez(path, input=np.zeros((9, 3), np.float32))
        path.write_bytes(path.read_bytes()[:-30])
    elif harm in ("objects", "words"):
        np.savez(path, input=np.array([["a"] * 3] * 4, dtype=object if harm == "objects" else "U1"))
    elif harm == "a folder":
        path.mkdir()
    with pytest.raises(DataError, match=f"`calibration` .*{path.name}"):
        read_samples(path, nn.Linear(3, 2), (torch.zeros(2, 3),))
