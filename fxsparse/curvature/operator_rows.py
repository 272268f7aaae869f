"""Rows J_n^T u of single samples: `vmap` over samples, and one sample after the other where that does not do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils import _pytree as pytree

from fxsparse.curvature.operator_data import Batch
from fxsparse.curvature.operator_forward import ModelFunction, Tensors, pulled
from fxsparse.errors import DataError, FxSparseError

vjp: Any = torch.func.vjp  # what they return depends on their arguments, which types cannot say
vmap: Any = torch.func.vmap


class SampleRows:
    """Per-sample rows of a function; a way that did not agree with the reverse pass of a batch is not taken again."""

    def __init__(self, function: ModelFunction) -> None:
        self.function = function
        self._able = True
        self._checked: set[str] = set()

    def of(
        self, batch: Batch, cotangents: Shaped[Tensor, "k n ..."], names: Sequence[str], together: bool = True
    ) -> dict[str, Shaped[Tensor, "k n ..."]]:
        """J_n^T u_kn of each sample n alone, for some of the parameters; `together` allows `vmap`."""
        if self._able and together:
            try:
                rows = self._vmapped(batch, cotangents, names)
                if self._agree(batch, cotangents, rows):
                    return rows
                self._able = False
            except FxSparseError:
                raise
            except (RuntimeError, NotImplementedError, ValueError):
                rows = self._apart(batch, cotangents, names)
                self._able = False
                return rows
        return self._apart(batch, cotangents, names)

    def _agree(self, batch: Batch, cotangents: Tensor, rows: Tensors) -> bool:
        """Whether the rows of all samples add up to one reverse pass of the batch; looked at once."""
        key = ",".join(rows)
        if key in self._checked:
            return True
        self._checked.add(key)
        leaves = self.function.leaves()
        with torch.enable_grad():
            z = self.function.forward(leaves, batch.inputs)
        whole = pulled([z], leaves, [cotangents[0]])
        for name, row in rows.items():
            gap = float((row[0].sum(0) - whole[name]).abs().max()) if row.numel() else 0.0
            if gap > slack(row.dtype) * float(row[0].abs().sum(0).max() if row.numel() else 0.0):
                return False
        return True

    def _vmapped(self, batch: Batch, cotangents: Tensor, names: Sequence[str]) -> Tensors:
        leaves, axes, form = batch.leaves()
        point = self.function.point
        chosen = {name: point.pop(name) for name in names}

        def of_sample(parts: list[Any], u: Tensor) -> Tensors:
            whole = [p[None] if axis == 0 else p for p, axis in zip(parts, axes, strict=True)]
            inputs, _ = pytree.tree_unflatten(whole, form)
            _, pull = vjp(lambda q: self.function.forward({**point, **q}, inputs)[0], chosen)
            rows: Tensors = vmap(lambda each: pull(each)[0])(u)
            return rows

        rows: Tensors = vmap(of_sample, in_dims=(axes, 1), out_dims=1)(leaves, cotangents)
        return rows

    def _apart(self, batch: Batch, cotangents: Tensor, names: Sequence[str]) -> Tensors:
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for n in range(batch.samples):
            point = self.function.leaves()
            with torch.enable_grad():
                z = self._alone(point, batch, n)
            chosen = {name: point[name] for name in names}
            each = [pulled([z], chosen, [u[n : n + 1]], keep=True) for u in cotangents]
            for name in names:
                found[name].append(torch.stack([one[name] for one in each]))
        return {name: torch.stack(rows, 1) for name, rows in found.items()}

    def _alone(self, point: Tensors, batch: Batch, n: int) -> Tensor:
        """The model on one sample.

        Raises:
            DataError: it cannot run on one, as where an input of all samples happens to be as long as the batch.
        """
        try:
            return self.function.forward(point, batch.cut(n, n + 1).inputs)
        except FxSparseError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            cut = [str(tuple(each.shape)) for each in pytree.tree_leaves(batch.inputs) if batch.belongs(each)]
            raise DataError(
                f"the model cannot run on one sample of this batch (={batch.samples} samples): its inputs of shapes "
                f"{', '.join(cut)} were cut along axis 0. One that all samples share has the length of the batch by "
                f"chance: take batches of another size. ({type(error).__name__}: {error})"
            ) from error


def slack(dtype: torch.dtype) -> float:
    """Relative difference of two ways to the same sum that rounding explains."""
    return 1e-9 if dtype is torch.float64 else 1e-3
