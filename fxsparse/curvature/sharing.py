"""How a batch can be read whose inputs may have, by chance, as many rows as there are samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from fxsparse.curvature.fisher_batch import FisherBatch

_INPUTS = 5  # of which at most all but one are tried


def other_readings(batch: FisherBatch) -> Iterator[frozenset[int]]:
    """Numbers of inputs that may belong to every sample, though they are as long as the batch; the likeliest first.

    Few are likelier than many, and the first such input is the likeliest to hold the samples. Not all of them belong to
    every sample.
    """
    inputs = batch.ambiguous()
    sizes = range(1, min(len(inputs), _INPUTS))
    choices = [choice for size in sizes for choice in itertools.combinations(inputs, size)]
    yield from map(frozenset, sorted(choices, key=lambda numbers: min(inputs) in numbers))
