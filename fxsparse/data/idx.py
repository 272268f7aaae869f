"""Images and labels from IDX files (MNIST, Fashion-MNIST), raw or gzipped, with checked headers."""

from __future__ import annotations

import gzip
import math
import zlib
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fxsparse.data.splits import Split, Splits, fingerprint, stratified_split
from fxsparse.errors import DataError

FILES = {
    ("train", "images"): "train-images-idx3-ubyte",
    ("train", "labels"): "train-labels-idx1-ubyte",
    ("test", "images"): "t10k-images-idx3-ubyte",
    ("test", "labels"): "t10k-labels-idx1-ubyte",
}
_KINDS = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_LARGEST = 2**33  # bytes; a header that claims more is damaged


def read_idx(path: str | Path) -> Tensor:
    """The array of one IDX file, gzipped where the file starts as gzip does.

    The format: two zero bytes, a type, the number of dimensions, each dimension as a big-endian int32, the values.

    Raises:
        DataError: the file cannot be read, is no IDX file, or is shorter or longer than its header says.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"`path` (={path}) cannot be read: {error}") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _KINDS:
        raise DataError(f"`path` (={path}) is no IDX file: it starts with {raw[:4].hex() or 'nothing'}")
    kind, rank = np.dtype(_KINDS[raw[2]]), raw[3]
    start = 4 + 4 * rank
    if len(raw) < start:
        raise DataError(f"`path` (={path}) ends inside its header of {rank} dimensions")
    shape = tuple(int(size) for size in np.frombuffer(raw, ">i4", rank, 4))
    if any(size < 0 for size in shape) or math.prod(shape) * kind.itemsize > _LARGEST:
        raise DataError(f"`path` (={path}) has impossible dimensions (={shape}); fetch it again")
    expected = start + math.prod(shape) * kind.itemsize
    if len(raw) != expected:
        raise DataError(f"`path` (={path}) has {len(raw)} bytes, its header of shape {shape} says {expected}")
    values = np.frombuffer(raw, kind, offset=start).reshape(shape)
    return torch.from_numpy(values.astype(kind.newbyteorder("=")))


def idx_folder(folder: str | Path, validation: str = "0.1", seed: int = 0) -> Splits:
    """The data set of four IDX files in a folder, as MNIST and Fashion-MNIST come (Debian: dataset-fashion-mnist).

    Inputs are float32 of shape (sample, 1, height, width), standardised by the mean and deviation of all training
    pixels; labels are int64. The validation part is taken from the training files, stratified.

    Args:
        folder: Holds `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte` and
            `t10k-labels-idx1-ubyte`, each raw or with `.gz` (a dot instead of the second dash is accepted).
        validation: Share of the training files that becomes the validation part, a decimal text in (0, 1).
        seed: Chooses its members.

    Raises:
        DataError: a file is missing, damaged, or does not fit the others.
    """
    parts = {key: read_idx(_found(Path(folder), name)) for key, name in FILES.items()}
    for part in ("train", "test"):
        images, labels = parts[part, "images"], parts[part, "labels"]
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(images):
            raise DataError(
                f"`folder` (={folder}): {part} images of shape {tuple(images.shape)} and labels of shape "
                f"{tuple(labels.shape)} do not belong together; (n, height, width) and (n,) with n >= 1 do"
            )
        if labels.is_floating_point() or int(labels.min()) < 0:
            raise DataError(f"`folder` (={folder}): {part} labels must be whole numbers from 0 on")
    if parts["train", "images"].shape[1:] != parts["test", "images"].shape[1:]:
        raise DataError(f"`folder` (={folder}): train and test images have different sizes")
    labels = parts["train", "labels"].long()
    rows = stratified_split(labels, (str(1 - Decimal(validation)), validation), seed)
    pixels = parts["train", "images"].to(torch.float64)
    mean, deviation = float(pixels[rows[0]].mean()), float(pixels[rows[0]].std(correction=0))
    if not deviation > 0:
        raise DataError(f"`folder` (={folder}): all training pixels are {mean}; there is nothing to learn from")
    inputs = ((pixels - mean) / deviation).float()[:, None]
    test = ((parts["test", "images"].to(torch.float64) - mean) / deviation).float()[:, None]
    train, held = (Split(inputs[part], labels[part]) for part in rows)
    tested = Split(test, parts["test", "labels"].long())
    classes = int(max(labels.max(), tested.labels.max())) + 1
    return Splits(train, held, tested, classes, mean, deviation, fingerprint((train, held, tested)))


def _found(folder: Path, name: str) -> Path:
    dotted = name.replace("-idx", ".idx")
    for candidate in (name, f"{name}.gz", dotted, f"{dotted}.gz"):
        if (folder / candidate).is_file():
            return folder / candidate
    raise DataError(f"`folder` (={folder}) lacks {name} (or {name}.gz); Debian: apt install dataset-fashion-mnist")
