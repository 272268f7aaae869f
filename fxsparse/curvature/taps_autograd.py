"""Per-sample gradients of a few samples by autograd alone, with which taps are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.curvature.fisher_batch import FisherBatch
from fxsparse.curvature.fisher_types import CoupledSamples
from fxsparse.curvature.sharing import other_readings
from fxsparse.curvature.taps_call import call_with
from fxsparse.curvature.taps_examined import sketch_on_arrival, sketches_like
from fxsparse.errors import DataError
from fxsparse.graph.tree import parameters_of

EXAMINED = 3
"""How many samples are examined."""
_FAILS = (RuntimeError, ValueError, IndexError, TypeError, DataError)

Output = Callable[[Any], Tensor]
Values = Mapping[int, Tensor]
"""By identity of a parameter, what stands in for it."""


@dataclass(frozen=True, eq=False)
class Autograd:
    """A model as autograd sees it.

    Attributes:
        model: the model.
        parameters: by first name, those that are wanted.
        output: takes the outputs z out of what the model returns.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    output: Output

    def first(self, batch: FisherBatch) -> tuple[FisherBatch, dict[str, Tensor], Tensor, frozenset[int]]:
        """A few samples, their gradients, and the cotangents of these; numbers of inputs that belong to every sample.

        Where the model does not take the samples apart, inputs that happen to have as many rows as there are samples
        may be those of every sample: positions, a mask of positions.

        Raises:
            CoupledSamples: the outputs of one sample depend on the others.
            DataError: outputs do not have the samples along axis 0, or the model cannot run on single samples.
        """
        try:
            taken = self._taken(batch)
            if batch.ambiguous():
                self._check_order(taken[0])
            return *taken, frozenset()
        except _FAILS as error:
            inputs = batch.ambiguous()
            for choice in other_readings(batch):
                try:
                    taken = self._taken(batch.sharing(choice))
                    self._check_order(taken[0])
                except _FAILS:
                    continue
                return *taken, choice
            if not inputs:
                raise
            names = ", ".join(f"`{name}`" for name in inputs.values())
            kind = type(error) if isinstance(error, DataError) else DataError
            raise kind(
                f"{error}; if not all of {names}, which have as many rows as there are samples (={batch.samples}), "
                "hold one sample in each row, give a batch of another size first"
            ) from error

    def _taken(self, batch: FisherBatch) -> tuple[FisherBatch, dict[str, Tensor], Tensor]:
        few = batch.select(list(range(min(EXAMINED, batch.samples))) if batch.samples > 1 else [0, 0])
        references, plain, cotangent = self.references(few)
        self._check_uncoupled(few, plain)
        return few, references, cotangent

    def references(self, few: FisherBatch, values: Values | None = None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Per-sample gradients by autograd alone, sketched, of random cotangents; the outputs and the cotangents."""
        values = values or {}
        leaves = {name: values.get(id(p), p).detach().requires_grad_(True) for name, p in self.parameters.items()}
        references = {name: sketches_like(leaf, few.samples) for name, leaf in leaves.items()}
        others = {name: values[id(p)] for name, p in parameters_of(self.model) if id(p) in values}
        args, kwargs = few.fresh()
        z = self.output(call_with(self.model, {**others, **leaves}, args, kwargs))
        if not z.ndim or z.shape[0] != few.samples:
            raise DataError(
                f"the outputs (={tuple(z.shape)}) must have the samples along axis 0: give `output`, a function that "
                "takes them out of what the model returns"
            )
        generator = torch.Generator().manual_seed(0)
        cotangent = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)
        for n in range(few.samples):
            handles = [sketch_on_arrival(leaf, references[name][n]) for name, leaf in leaves.items()]
            try:
                if z.requires_grad:
                    torch.autograd.backward(z[n], cotangent[n], retain_graph=True, inputs=list(leaves.values()))
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                raise DataError(
                    "the model overwrites a tensor in place that its gradients need, so that it cannot be trained "
                    f"either: write the operation out of place ({error})"
                ) from error
            finally:
                for handle in handles:
                    handle.remove()
        return references, z.detach(), cotangent

    @torch.no_grad()
    def _check_order(self, few: FisherBatch) -> None:
        """The outputs of the samples must go with them when they change places."""
        order = list(reversed(range(few.samples)))
        z, turned = (
            self.output(self.model(*args, **kwargs)) for args, kwargs in (few.fresh(), few.select(order).fresh())
        )
        bound = 100 * torch.finfo(z.dtype).eps ** 0.75 * float(z.abs().max()) if z.numel() else 0.0
        if not bool(((turned.flip(0) - z).abs() <= bound).all()):
            raise CoupledSamples("the outputs of a sample change with its place in the batch")

    @torch.no_grad()
    def _check_uncoupled(self, few: FisherBatch, z: Tensor) -> None:
        """The outputs of the first sample must not change with the others."""
        again = few.select([0] * few.samples) if few.samples > 1 else few
        args, kwargs = again.fresh()
        alone = self.output(self.model(*args, **kwargs))[:1]
        scale = float(z[:1].abs().max()) if z.numel() else 0.0
        difference = float((alone - z[:1]).abs().max()) if z.numel() else 0.0
        if difference > 100 * torch.finfo(z.dtype).eps ** 0.75 * max(scale, 1e-30):
            raise CoupledSamples(
                f"the outputs of a sample change by {difference:.3g} when the other samples of its batch change, so "
                "that it has no gradient of its own: remove what mixes samples (batch statistics, randomness)"
            )
