"""Handwritten digits, 8x8 pixels: the embedded copy of scikit-learn, no download."""

from __future__ import annotations

import torch

from fxsparse.data.splits import Split, Splits, fingerprint, stratified_split
from fxsparse.errors import ConfigError

FRACTIONS = ("0.6", "0.2", "0.2")


def digits(seed: int = 0) -> Splits:
    """The 1,797 handwritten digits, stratified into train, validation and test (60 / 20 / 20 per class).

    Inputs are float32 of shape (sample, 1, 8, 8), standardised by the mean and deviation of all training pixels
    (one number each, since many border pixels never vary). Labels are int64 in 0..9.

    Args:
        seed: chooses the members of the parts; the counts stay the same.

    Raises:
        ConfigError: scikit-learn is not installed.

    Source: E. Alpaydin & C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository (1998).

    >>> splits = digits()
    >>> len(splits.train), len(splits.validation), len(splits.test)
    (1078, 362, 357)
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "the data set `digits` comes with scikit-learn, which is not installed: pip install 'fxsparse[demo]'"
        ) from error
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).to(torch.float64).reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(labels).to(torch.int64)
    rows = stratified_split(targets, FRACTIONS, seed)
    mean, deviation = float(pixels[rows[0]].mean()), float(pixels[rows[0]].std(correction=0))
    inputs = ((pixels - mean) / deviation).to(torch.float32)
    train, validation, test = (Split(inputs[part], targets[part]) for part in rows)
    return Splits(train, validation, test, 10, mean, deviation, fingerprint((train, validation, test)))
