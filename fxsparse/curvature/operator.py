"""Curvature as a matrix-free symmetric operator over a model's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fxsparse.curvature.diagonal import gram_of_rows, sampled_diagonal, squared_rows
from fxsparse.curvature.diagonal_layers import LayerSquares
from fxsparse.curvature.losses import as_loss
from fxsparse.curvature.operator_checks import (
    check_count,
    check_frequencies,
    check_options,
    check_repeats,
    check_vector,
    check_whole,
)
from fxsparse.curvature.operator_data import Batch, Data, Output
from fxsparse.curvature.operator_engine import Engine
from fxsparse.curvature.operator_gradients import sample_gradients, summed_gradient
from fxsparse.curvature.operator_output import Curvature, OutputCurvature
from fxsparse.curvature.operator_products import batch_product, block_of_products, diagonal_of_products
from fxsparse.curvature.operator_protocol import numpy_dtype, to_numpy
from fxsparse.curvature.operator_scope import check_uncoupled
from fxsparse.curvature.operator_space import Selection, Support, parameter_space
from fxsparse.curvature.operator_spectrum import SpectralOperator
from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity import Mask
from fxsparse.sparsity.random import generator as keyed_generator
from fxsparse.training.distributed import unwrap

DENSE_LIMIT = 4096
"""Most columns of a block or of a whole matrix that is written out."""


class CurvatureOperator(SpectralOperator):
    """G = (1/M) sum over units of J^T B J, or the Hessian, over the flattened parameters: products, never the matrix.

    A linear operator of scipy's protocol (`shape`, `dtype`, `matvec`, `matmat`; `scipy.sparse.linalg.aslinearoperator`
    takes it) and of torch tensors (`mv`, `mm`, `@`). The model is evaluated in evaluation mode, as it is at the moment
    of the call, and nothing of it or of global state is changed. Memory is that of a forward and backward pass.

    Args:
        model: Any module; masks are respected.
        params: Names or parameters; None = all that require a gradient.
        loss: `CrossEntropy()`, `BCEWithLogits()`, `MSE()`, a torch loss or its name; how it reduces over samples
            does not matter.
        data: Batches `(inputs, targets)`, read once per product, or one such pair. Targets may be missing where the
            curvature does not depend on them.
        kind: See `Curvature`; its value as a string will do.
        mask: The coordinates that take part: a `Support` ("on", "off", "dense") for the model's own masks, bool tensors
            by parameter name, or one flat bool tensor. G_S = P_S G P_S: other coordinates of products are exact zeros.
        chunk: Most samples at once; None = whole batches.
        damping: Added to the diagonal of the support.
        unit: "sample" or "token": what M counts, and of what the empirical Fisher takes gradients.
        draws: Labels drawn for each unit ("fisher_mc").
        seed: Seed of all draws.
        output: Takes the logits out of what the model returns, where it is no tensor.
        check: Compute one product twice and refuse data or a model that do not repeat themselves.

    Raises:
        ConfigError: an option, a parameter or a mask that does not fit.
        UnsupportedLoss: the loss has no likelihood ("fisher", "fisher_mc") or no output Hessian.
        CoupledSamples: a norm takes its statistics from the batch.
        DataError: no valid unit, or the check failed.
        CaptureError: the model cannot be differentiated.

    >>> model = nn.Linear(2, 3).double()
    >>> batch = (torch.eye(2, dtype=torch.float64), torch.tensor([0, 2]))
    >>> ggn = CurvatureOperator(model, None, "cross_entropy", batch)
    >>> ggn.shape, bool(torch.allclose(ggn.dense(), ggn.dense().T))
    ((9, 9), True)
    """

    def __init__(
        self,
        model: nn.Module,
        params: Selection,
        loss: Any,
        data: Any,
        kind: Curvature | str = Curvature.GGN,
        mask: Support | str | Mapping[str, Tensor | Mask] | Tensor | None = None,
        chunk: int | None = None,
        damping: float = 0.0,
        *,
        unit: str = "sample",
        draws: int = 1,
        seed: int = 0,
        output: Output | None = None,
        check: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"`model` (={type(model).__name__}) must be a torch.nn.Module")
        check_options(chunk, damping, unit, draws)
        model = unwrap(model)
        check_whole(model)
        check_uncoupled(model)
        self.model, self.kind, self.chunk, self.damping, self.seed = model, Curvature.of(kind), chunk, damping, seed
        self.space = parameter_space(model, params, mask)
        check_frequencies(model, self.space)
        own = as_loss(loss, per_position=unit == "token")
        self.data = Data(data, self.space.device, getattr(own, "ignore_index", -100))
        self.curvature = OutputCurvature(self.kind, own, unit == "token", draws, seed)
        self.engine = Engine(model, self.space, output)
        self._units: int | None = None
        self._layers = LayerSquares.of(self.engine)
        if check:
            check_repeats(self._anew, self.space, seed)

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.space.size, self.space.size

    @property
    def dtype(self) -> np.dtype[Any]:
        """The parameters' dtype, numpy's, as scipy wants it; float32 for bfloat16, which numpy does not have."""
        return numpy_dtype(self.space.dtype)

    @property
    def units(self) -> int:
        """M: the samples, or valid tokens, of all batches."""
        if self._units is None:
            with self.engine.scope():
                counts = [self.curvature.units(self.engine.outputs(b), b) for b in self._pieces()]
            self._units = self._counted(sum(counts))
        return self._units

    def mv(self, v: Any) -> Any:
        """G v: a flat vector, torch or numpy, or tensors by parameter name; the result is of the same kind.

        Raises:
            ConfigError: a vector of another size or kind.
        """
        if isinstance(v, Mapping):
            return self.space.split(self.mv(self.space.flat(v)))
        check_vector(v)
        if isinstance(v, np.ndarray):
            found = to_numpy(self.mv(torch.from_numpy(v.reshape(-1)).to(self._like)))
            return found.astype(v.dtype if v.dtype.kind == "f" else self.dtype).reshape(v.shape)
        if v.ndim != 1:
            raise ConfigError(f"`v` (={tuple(v.shape)}) must have one axis; mm takes columns")
        return self.mm(v[:, None])[:, 0]

    def mm(self, columns: Any) -> Any:
        """G V for columns V [P, k], torch or numpy.

        Raises:
            ConfigError: columns of another size or kind.
        """
        check_vector(columns)
        if isinstance(columns, np.ndarray):
            return to_numpy(self.mm(torch.from_numpy(columns).to(self._like)))
        if columns.ndim != 2 or columns.shape[0] != self.space.size:
            raise ConfigError(
                f"`v` (={tuple(columns.shape)}) must have {self.space.size} rows, one for each coordinate"
            )
        kept = self.space.project(columns.detach().to(self._like))
        if not kept.shape[1]:
            return kept
        tangents = self.space.split(kept)
        sums: Tensor | None = None
        units, assumed = 0, self._units or 1
        with self.engine.scope():
            for batch in self._pieces():
                found, count = batch_product(self.engine, self.curvature, batch, tangents, assumed)
                units += count
                sums = found if sums is None else sums.add_(found)
        self._units = self._counted(units)
        assert sums is not None
        found = self.space.project(sums if units == assumed else sums.mul_(assumed / units))
        return found.add_(kept, alpha=self.damping) if self.damping else found

    def quadform(self, v: Any) -> float:
        """v^T G v = (1/M) sum (J v)^T B (J v): no backward pass, except for the Hessian.

        Raises:
            ConfigError: a vector of another size or kind.
        """
        if isinstance(v, Mapping):
            v = self.space.flat(v)
        check_vector(v)
        flat = torch.as_tensor(v).detach().reshape(-1)
        if len(flat) != self.space.size:
            raise ConfigError(f"`v` (={tuple(v.shape)}) must have {self.space.size} entries, one for each coordinate")
        flat = self.space.project(flat.to(self._like))
        damped = self.damping * float(flat.double().square().sum()) if self.damping else 0.0
        if self.kind is Curvature.HESSIAN:
            return float(flat.double() @ self.mv(flat).double())
        tangents = self.space.split(flat[:, None])
        total, units = 0.0, 0
        with self.engine.scope():
            for batch in self._pieces():
                z, along = self.engine.push(batch, tangents)
                units += self.curvature.units(z, batch)
                total += float((along[0].double() * self.curvature.bend(z, along[0], batch).double()).sum())
        return total / self._counted(units) + damped

    def diag(
        self,
        method: str = "exact",
        samples: int = 1,
        chunk: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, " P"]:
        """The diagonal of G (of G_S, zeros elsewhere), in single precision at least.

        Args:
            method: "exact"; "mc" (labels drawn from the model) or "sketch" (random signs on the square root of the
                output Hessian, of less variance on trained models), both unbiased for the GGN; "hutchinson" (r * G r).
            samples: Draws, for the methods that draw.
            chunk: Most samples whose rows are held at once; None = by memory.
            generator: Source of the draws (CPU); the operator's seed otherwise.

        Raises:
            ConfigError: the method does not apply to the kind.
        """
        drawn = method in ("mc", "sketch", "hutchinson")
        if method != "exact" and not drawn:
            raise ConfigError(f"`method` (={method!r}) must be exact, mc, sketch or hutchinson")
        check_count("samples", samples)
        if chunk is not None:
            check_count("chunk", chunk)
        source = generator or keyed_generator(self.seed, 0, 0, f"diagonal_{method}")
        if method == "hutchinson" or (self._by_products and method == "exact"):
            return diagonal_of_products(self.mm, self.space, samples if drawn else None, source)
        if drawn and self.kind not in (Curvature.GGN, Curvature.FISHER):
            raise ConfigError(
                f"`method` (={method!r}) draws for the GGN; kind {self.kind.value!r} has an exact diagonal"
            )
        units, layers = 0, self._layers
        with self.engine.scope():
            sums = torch.zeros(self.space.size, dtype=torch.float64, device=self.space.device)
            for batch in self._pieces(rows=True):
                if drawn:
                    found, count = sampled_diagonal(
                        self.engine, self.curvature, batch, method, samples, source, chunk, layers
                    )
                else:
                    found, count = squared_rows(self.engine, self.curvature, batch, chunk, layers)
                sums += self.space.flat(found).double()
                units += count
        self._units = self._counted(units)
        found_flat = (sums / self._units).to(torch.promote_types(self.space.dtype, torch.float32))
        return self.space.project(found_flat + self.damping)

    def block(self, names: Sequence[str]) -> Float[Tensor, "b b"]:
        """The dense block of G_S of these parameters, in the operator's order.

        Raises:
            ConfigError: no name, an unknown one, or more than 4096 columns.
        """
        if not names:
            raise ConfigError("`names` (=()) must name at least one parameter")
        places = [self.space.slice_of(name) for name in self.space.names if name in set(names)]
        for name in names:
            self.space.slice_of(name)  # raises for an unknown one
        index = torch.cat([torch.arange(s.start, s.stop, device=self.space.device) for s in places])
        return self._written(index, [name for name in self.space.names if name in set(names)])

    def dense(self) -> Float[Tensor, "P P"]:
        """The whole matrix P_S G P_S, for tests and small models.

        Raises:
            ConfigError: P exceeds 4096.
        """
        return self._written(torch.arange(self.space.size, device=self.space.device), self.space.names)

    def submatrix(self) -> Float[Tensor, "s s"]:
        """The dense rows and columns of the support alone.

        Raises:
            ConfigError: P exceeds 4096.
        """
        dense = self.dense()
        return dense if self.space.support is None else dense[self.space.support][:, self.space.support]

    def gradient(self) -> Float[Tensor, " P"]:
        """The mean gradient of the loss over the same units, zero outside the support."""
        with self.engine.scope():
            sums, units = summed_gradient(self.engine, self.curvature, self._pieces())
        return self.space.project((sums / self._counted(units)).to(self.space.dtype))

    def sample_gradients(self, chunk: int | None = None) -> Iterator[dict[str, Float[Tensor, "n ..."]]]:
        """The gradient g_n of every sample's own loss, never divided by N, by parameter, some samples at a time.

        Raises:
            ConfigError: `chunk` is no integer of at least 1.
            DataError: the model does not run on single samples, or the outputs of one depend on others.
        """
        return sample_gradients(self.engine, self.curvature, self.data, self.chunk, chunk)

    def __repr__(self) -> str:
        return f"CurvatureOperator({self.kind.value}, shape={self.shape}, support={self.space.active})"

    @property
    def _by_products(self) -> bool:
        """Whether B has no known square root, so that nothing is had but products."""
        return self.kind is Curvature.HESSIAN or (self.kind is Curvature.GGN and not self.curvature.loss.curved)

    @property
    def _like(self) -> Tensor:
        return torch.empty(0, dtype=self.space.dtype, device=self.space.device)

    def _anew(self, v: Tensor) -> tuple[Tensor, int]:
        """G v and M, as if nothing had been computed before."""
        self._units = None
        found = self.mv(v)
        self._units = None
        return found, self.units

    def _pieces(self, rows: bool = False) -> Iterator[Batch]:
        """The batches in parts of at most `chunk` samples; for use inside the scope. `rows`: samples will be cut."""
        for batch in self.data:
            cut = rows or self.chunk is not None and self.chunk < batch.samples
            yield from (self.engine.settled(batch) if cut else batch).pieces(self.chunk)

    def _counted(self, units: int) -> int:
        if units < 1:
            raise DataError("`data` (=no valid unit) must have at least one label that counts")
        return units

    def _written(self, index: Tensor, names: Sequence[str]) -> Tensor:
        if len(index) > DENSE_LIMIT:
            raise ConfigError(f"the block has {len(index)} columns, more than {DENSE_LIMIT}; use products, mv and mm")
        if self._by_products:
            return block_of_products(self.mm, self.space, index)
        keep = torch.ones_like(index, dtype=torch.bool) if self.space.support is None else self.space.support[index]
        with self.engine.scope():
            gram, units = gram_of_rows(self.engine, self.curvature, self._pieces(rows=True), names, keep)
        self._units = self._counted(units)
        damped = self.damping * torch.diag(keep.double())
        return (gram / self._units + damped).to(self.space.dtype)
