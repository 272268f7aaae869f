"""Per-sample gradients without taps: by `vmap(grad)` in chunks, or sample by sample where that has no batching rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from fxsparse.curvature.fisher_batch import FisherBatch
from fxsparse.curvature.fisher_types import UncoveredParameter
from fxsparse.curvature.taps_autograd import Output
from fxsparse.curvature.taps_call import call_with
from fxsparse.curvature.taps_examined import sketched

_BUDGET = 1 << 24
_FAILS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)


class PerSample:
    """Per-sample gradients of a few parameters.

    Args:
        model: the model; it is run through `functional_call`.
        parameters: by name.
        output: takes the outputs z out of what the model returns.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], output: Output) -> None:
        self.model, self.parameters, self.output = model, dict(parameters), output
        self.vectorised = True
        self.reason = ""
        self._examined = False

    def examine(self, few: FisherBatch, cotangent: Tensor, references: Mapping[str, Tensor]) -> None:
        """Find out which way is right, on a few samples whose gradients are known.

        Raises:
            UncoveredParameter: neither is.
        """
        if not self.parameters:
            return
        causes = []
        for vectorised in (True, False):
            self.vectorised = vectorised
            try:
                found = self._gradients(few, cotangent)
            except _FAILS as error:
                causes.append(f"{'vmap' if vectorised else 'one sample alone'}: {type(error).__name__}: {error}")
                continue
            wrong = [name for name, reference in references.items() if not _alike(_sketches(found[name]), reference)]
            if not wrong:
                self.reason = causes[0] if causes else ""
                self._examined = True
                return
            causes.append(f"{'vmap' if vectorised else 'one sample alone'} differs from autograd")
        names = ", ".join(f"`{name}`" for name in self.parameters)
        raise UncoveredParameter(
            f"no per-sample gradients of {names} ({'; '.join(causes)}): leave them out with `parameters`, or write the "
            "layer with torch's own operators"
        )

    def chunks(
        self, batch: FisherBatch, cotangents: list[Tensor]
    ) -> Iterator[tuple[int, int, list[dict[str, Tensor]]]]:
        """For consecutive samples first..last: for each cotangent (like z) the gradients [last - first, *shape]."""
        numel = sum(p.numel() for p in self.parameters.values())
        size = max(1, min(batch.samples, _BUDGET // max(numel * len(cotangents), 1)))
        for first in range(0, batch.samples, size):
            last = min(first + size, batch.samples)
            piece = batch.select(list(range(first, last))) if last - first < batch.samples else batch
            yield first, last, [self._gradients(piece, c[first:last]) for c in cotangents]

    def _gradients(self, batch: FisherBatch, cotangent: Tensor) -> dict[str, Tensor]:
        leaves = {name: parameter.detach() for name, parameter in self.parameters.items()}
        if self.vectorised:
            try:
                return self._by_vmap(leaves, batch, cotangent)
            except _FAILS as error:
                if not self._examined:
                    raise
                self.vectorised, self.reason = False, str(error)  # values of the inputs tell what can be batched
        return self._by_loop(leaves, batch, cotangent)

    def _by_vmap(self, leaves: dict[str, Tensor], batch: FisherBatch, cotangent: Tensor) -> dict[str, Tensor]:
        inputs = batch.fresh()
        flat, form = pytree.tree_flatten(inputs)
        flat_axes = batch.sample_axes()

        def scalar(own: dict[str, Tensor], values: list[Any], c: Tensor) -> Tensor:
            alone = [v.unsqueeze(0) if axis == 0 else v for v, axis in zip(values, flat_axes, strict=True)]
            args, kwargs = pytree.tree_unflatten(alone, form)
            return (self.output(call_with(self.model, own, args, kwargs))[0] * c).sum()

        found: dict[str, Tensor] = vmap(grad(scalar), in_dims=(None, flat_axes, 0))(leaves, flat, cotangent)
        return {name: each.detach() for name, each in found.items()}

    def _by_loop(self, leaves: dict[str, Tensor], batch: FisherBatch, cotangent: Tensor) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {name: [] for name in leaves}
        own = {name: leaf.requires_grad_(True) for name, leaf in leaves.items()}
        for n in range(batch.samples):
            args, kwargs = batch.select([n]).fresh()
            z = self.output(call_with(self.model, own, args, kwargs))
            gradients: tuple[Tensor | None, ...] = (None,) * len(own)
            if z.requires_grad:
                gradients = torch.autograd.grad(z, list(own.values()), cotangent[n : n + 1], allow_unused=True)
            for name, gradient in zip(own, gradients, strict=True):
                found[name].append(torch.zeros_like(leaves[name]).detach() if gradient is None else _dense(gradient))
        return {name: torch.stack(each) for name, each in found.items()}


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def _sketches(g: Tensor) -> Tensor:
    return torch.stack([sketched(each) for each in g])


def _alike(mine: Tensor, reference: Tensor) -> bool:
    eps = torch.finfo(reference.dtype).eps
    difference = float((mine - reference).double().norm())
    return bool(difference <= eps**0.6 * (float(reference.double().norm()) + eps**0.25))
