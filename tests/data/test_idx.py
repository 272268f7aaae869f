"""IDX files: what is written comes back; what is damaged is refused by name."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.data import idx_folder, read_idx
from fxsparse.data.idx import FILES
from fxsparse.errors import DataError

KINDS = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def encoded(values: np.ndarray, kind: int = 0x08) -> bytes:
    header = bytes([0, 0, kind, values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape)
    return header + values.astype(KINDS[kind]).tobytes()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(KINDS)),
    st.lists(st.integers(0, 4), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 99),
)
def test_round_trip(tmp_path_factory, kind, shape, zipped, seed):
    values = np.random.default_rng(seed).integers(0, 100, shape)
    raw = encoded(values, kind)
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(raw, mtime=0) if zipped else raw)
    found = read_idx(path)
    assert tuple(found.shape) == tuple(shape) and np.array_equal(found.numpy(), values.astype(found.numpy().dtype))


GOOD = encoded(np.arange(12).reshape(3, 4))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "no IDX file: it starts with nothing"),
        (b"PNG\x00....", "no IDX file"),
        (b"\0\0\x07\x01\0\0\0\0", "no IDX file"),
        (GOOD[:7], "ends inside its header of 2"),
        (GOOD[:-1], "has 23 bytes, its header of shape \\(3, 4\\) says 24"),
        (GOOD + b"\0", "has 25 bytes"),
        (b"\0\0\x08\x01\xff\xff\xff\xff", "impossible dimensions"),
        (b"\0\0\x08\x03" + b"\x7f\xff\xff\xff" * 3, "impossible dimensions"),
        (gzip.compress(GOOD, mtime=0)[:-9], "cannot be read"),
        (b"\x1f\x8bnonsense", "cannot be read"),
    ],
)
def test_damaged_files_are_refused(tmp_path, raw, message):
    (tmp_path / "file").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        read_idx(tmp_path / "file")


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / "none")


def folder(path: Path, ending: str = ".gz", **changes: np.ndarray) -> Path:
    rng = np.random.default_rng(0)
    made = {
        "train-images": rng.integers(0, 256, (60, 8, 8)),
        "train-labels": np.arange(60) % 3,
        "t10k-images": rng.integers(0, 256, (12, 8, 8)),
        "t10k-labels": np.arange(12) % 3,
    }
    made.update({name.replace("_", "-"): values for name, values in changes.items()})
    for name in FILES.values():
        raw = encoded(made[name.rsplit("-idx", 1)[0]])
        (path / f"{name}{ending}").write_bytes(gzip.compress(raw, mtime=0) if ending == ".gz" else raw)
    return path


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_folder(tmp_path, ending):
    splits = idx_folder(folder(tmp_path, ending), "0.2")
    assert (len(splits.train), len(splits.validation), len(splits.test), splits.classes) == (48, 12, 12, 3)
    assert splits.train.inputs.shape == (48, 1, 8, 8) and splits.train.inputs.dtype == torch.float32
    assert splits.train.labels.dtype == torch.int64 and splits.train.labels.bincount().tolist() == [16, 16, 16]
    assert abs(float(splits.train.inputs.mean())) < 1e-5 and abs(float(splits.train.inputs.std()) - 1) < 1e-3
    assert idx_folder(tmp_path, "0.2").fingerprint == splits.fingerprint
    assert idx_folder(tmp_path, "0.2", seed=1).fingerprint != splits.fingerprint


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(DataError, match="lacks train-images-idx3-ubyte .*dataset-fashion-mnist"):
        idx_folder(tmp_path)
    with pytest.raises(DataError, match="train images of shape .* do not belong together"):
        idx_folder(folder(tmp_path, train_labels=np.zeros(59)))
    with pytest.raises(DataError, match="different sizes"):
        idx_folder(folder(tmp_path, t10k_images=np.zeros((12, 9, 8))))
    with pytest.raises(DataError, match="all training pixels are 0"):
        idx_folder(folder(tmp_path, train_images=np.zeros((60, 8, 8))))
