"""Which inputs have the samples along axis 0, where several are as long as the batch; asked before samples are cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxsparse.curvature.fisher_types import CoupledSamples
from fxsparse.curvature.operator_data import Batch
from fxsparse.curvature.operator_forward import ModelFunction
from fxsparse.curvature.sharing import other_readings
from fxsparse.errors import DataError, FxSparseError

_FEW = 3  # samples that are looked at
_FAILS = (RuntimeError, ValueError, IndexError, TypeError, DataError)


class Sharing:
    """Tells inputs of single samples from those that belong to every sample: a position table, a bias, a mask [T, T].

    Of these, each sample has the outputs that it has in company also alone. What was found holds for all batches of the
    same form.

    Args:
        function: The model.
    """

    def __init__(self, function: ModelFunction) -> None:
        self.function = function
        self._found: dict[Any, frozenset[int]] = {}

    def settled(self, batch: Batch) -> Batch:
        """The batch, of which samples can be cut.

        Raises:
            CoupledSamples: the outputs of one sample depend on the others.
            DataError: several inputs are as long as the batch, and the model does not run on some of its samples,
                however they are read.
        """
        if batch.samples < 2:
            return batch
        names = batch.read.ambiguous()
        key = batch.read.form(), frozenset(names)
        if key not in self._found:
            self._found[key] = self._choice(batch, names)
        return batch.sharing(self._found[key])

    def _choice(self, batch: Batch, names: dict[int, str]) -> frozenset[int]:
        """The first reading in which samples are independent: alone, or in pairs, where the model takes none alone."""
        found: list[Exception] = []
        for size in (1, 2):
            for choice in (frozenset[int](), *other_readings(batch.read)):
                try:
                    self._check(batch.sharing(choice), size)
                    return choice
                except _FAILS as error:
                    found.append(error)
                except FxSparseError:
                    raise
            if isinstance(found[0], CoupledSamples):
                break
        first = found[0]
        if not names:
            if isinstance(first, CoupledSamples):
                raise first
            return frozenset()  # the model takes batches of another size alone
        kind = CoupledSamples if isinstance(first, CoupledSamples) else DataError
        shapes = [tuple(leaf.shape) for k, leaf in enumerate(batch.leaves()[0]) if k in names]
        shown = ", ".join(f"`{name}` {shape}" for name, shape in zip(names.values(), shapes, strict=True))
        raise kind(
            f"{shown} have as many rows as there are samples (={batch.samples}), and in no reading of them, as rows of "
            "samples or as what all samples share, has a sample alone the outputs that it has in company: take batches "
            f"of another size, or remove what mixes samples ({type(first).__name__}: {first})"
        ) from first

    def _check(self, batch: Batch, size: int) -> None:
        """Some samples together must have the outputs that `size` of them have alone.

        Raises:
            CoupledSamples: they have others.
            DataError: the outputs do not have the samples along axis 0.
        """
        few = batch.some(_FEW)
        z = self._outputs(few)
        eps = torch.finfo(z.dtype).eps
        scale = float(z.abs().nan_to_num(0.0, 0.0, 0.0).max()) if z.numel() else 0.0
        bound = (100 * eps**0.75 if eps < 1e-4 else 8 * eps) * scale
        for n in range(few.samples - size + 1):
            alone = self._outputs(few.cut(n, n + size))
            if not torch.allclose(alone, z[n : n + size], rtol=0.0, atol=bound, equal_nan=True):
                raise CoupledSamples(
                    "the outputs of a sample change with the other samples of its batch, so that it has no gradient of "
                    "its own: remove what mixes samples (batch statistics, randomness)"
                )

    def _outputs(self, batch: Batch) -> Tensor:
        z = self.function.outputs(batch)
        if not z.ndim or z.shape[0] != batch.samples:
            raise DataError(f"the outputs (={tuple(z.shape)}) must have the {batch.samples} samples along axis 0")
        return z
