"""Rows J_n^T u of single samples: `vmap` over samples, and one sample after the other where that does not do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from fxsparse.curvature.fisher_types import CoupledSamples
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

    def of(
        self, batch: Batch, cotangents: Shaped[Tensor, "k n ..."], names: Sequence[str], together: bool = True
    ) -> dict[str, Shaped[Tensor, "k n ..."]]:
        """J_n^T u_kn of each sample n alone, for some of the parameters; `together` allows `vmap`.

        Raises:
            CoupledSamples: those of the samples do not add up to the reverse pass of the batch.
            DataError: the model cannot run on one sample.
        """
        if self._able and together and batch.samples > 1:
            try:
                rows = self._vmapped(batch, cotangents, names)
                if self._agree(batch, cotangents, rows):
                    return rows
            except FxSparseError:
                raise
            except (RuntimeError, NotImplementedError, ValueError):
                pass
            rows = self._apart(batch, cotangents, names)
            self._able = False
        else:
            rows = self._apart(batch, cotangents, names)
        if batch.samples > 1 and not self._agree(batch, cotangents, rows):
            raise CoupledSamples(
                "the gradients of single samples do not add up to that of their batch, whose outputs depend on each "
                "other: remove what mixes samples (batch statistics, branches on values of the batch, randomness)"
            )
        return rows

    def _agree(self, batch: Batch, cotangents: Tensor, rows: Tensors) -> bool:
        """Whether the rows of all samples, with random signs of the columns, add up to one reverse pass of the batch.

        Each time: torch's batching rule of PReLU, for one, was wrong where the signs of samples differed.
        """
        leaves = self.function.leaves()
        source = torch.Generator().manual_seed(len(cotangents))
        signs = torch.randint(2, (len(cotangents),), generator=source).mul_(2).sub_(1).to(cotangents)
        with torch.enable_grad():
            z = self.function.forward(leaves, batch.inputs)
        whole = pulled([z], leaves, [torch.tensordot(signs, cotangents, 1)])
        if not all(bool(each.isfinite().all()) for each in whole.values()):
            return True  # nothing can be told
        sizes = {name: float(row.abs().sum((0, 1)).max()) if row.numel() else 0.0 for name, row in rows.items()}
        narrowest = self.function.narrowest
        eps = torch.finfo(narrowest).eps
        rounding = 64 * eps * max(sizes.values())
        gaps = {name: torch.tensordot(signs, row.sum(1), 1) - whole[name] for name, row in rows.items()}
        return all(
            not gap.numel() or float(gap.abs().max()) <= max(slack(narrowest), 16 * eps) * sizes[name] + rounding
            for name, gap in gaps.items()
        )

    def _vmapped(self, batch: Batch, cotangents: Tensor, names: Sequence[str]) -> Tensors:
        leaves, axes, form = batch.leaves()
        point = self.function.point
        chosen = {name: point.pop(name) for name in names}

        def of_sample(parts: list[Any], u: Tensor) -> Tensors:
            whole = [p[None] if axis == 0 else p for p, axis in zip(parts, axes, strict=True)]
            inputs = pytree.tree_unflatten(whole, form)
            _, pull = vjp(lambda q: self.function.forward({**point, **q}, inputs)[0], chosen)
            rows = [pull(each)[0] for each in u]  # vmap inside of vmap gives some operators the first sample for all
            return {name: torch.stack([row[name] for row in rows]) for name in names}

        rows: Tensors = vmap(of_sample, in_dims=(axes, 1), out_dims=1)(leaves, cotangents)
        return rows

    def _apart(self, batch: Batch, cotangents: Tensor, names: Sequence[str]) -> Tensors:
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for n in range(batch.samples):
            point = self.function.leaves()
            with torch.enable_grad():
                z = self._alone(point, batch, n, cotangents.shape[2:])
            chosen = {name: point[name] for name in names}
            each = [pulled([z], chosen, [u[n : n + 1]], keep=True) for u in cotangents]
            for name in names:
                found[name].append(torch.stack([one[name] for one in each]))
        return {name: torch.stack(rows, 1) for name, rows in found.items()}

    def _alone(self, point: Tensors, batch: Batch, n: int, shape: torch.Size) -> Tensor:
        """The outputs [1, *shape] of one sample; a model may drop the axis of a single one.

        Raises:
            DataError: it cannot run on one.
        """
        try:
            return self.function.forward(point, batch.cut(n, n + 1).inputs).reshape(1, *shape)
        except FxSparseError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise DataError(
                f"the model cannot run on one sample of this batch (={batch.samples} samples), whose rows are wanted: "
                f"give it a batch axis of any length ({type(error).__name__}: {error})"
            ) from error


def slack(dtype: torch.dtype) -> float:
    """Relative difference of two ways to the same sum that rounding explains."""
    return 1e-9 if dtype is torch.float64 else 1e-3


class Narrowest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its __init_subclass__ so
    """Notes the coarsest floating-point numbers that a run makes.

    Attributes:
        dtype: theirs.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.dtype = dtype

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor) and each.is_floating_point():
                self.dtype = max(self.dtype, each.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        return result
