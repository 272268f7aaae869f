"""Derivatives of a model's outputs: J v, J^T u, per-sample rows, and Hessian products.

1. Forward mode: one direction inside an autograd graph, so that the model runs once; several by `torch.func` and vmap,
   and so the Hessian.
2. Where an operator has no forward-mode rule: J v by two reverse passes of plain autograd.
3. The same without mkldnn, whose recurrent kernels are differentiable once only.

The way that worked first is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from fxsparse.curvature import operator_forward_mode as forward_mode
from fxsparse.curvature.kept_state import KeptParameters
from fxsparse.curvature.operator_blame import place_of
from fxsparse.curvature.operator_data import Batch, Output
from fxsparse.curvature.operator_forward import LOOSE, ModelFunction, Tensors, pulled
from fxsparse.curvature.operator_forward_mode import Bend
from fxsparse.curvature.operator_rows import Narrowest, SampleRows, slack
from fxsparse.curvature.operator_rules import RightRules
from fxsparse.curvature.operator_scope import curvature_scope
from fxsparse.curvature.operator_sharing import Sharing
from fxsparse.curvature.operator_space import ParameterSpace
from fxsparse.errors import CaptureError, DataError, FxSparseError
from fxsparse.graph.scopes import seeded

R = TypeVar("R")
_NOT_DIFFERENTIABLE = "the backward pass of a torch.autograd.Function is not differentiable itself; make it so"
_FEW = 8  # samples on which derivatives are compared

grad: Any = torch.func.grad  # what they return depends on their arguments, which types cannot say
jvp: Any = torch.func.jvp
vjp: Any = torch.func.vjp
vmap: Any = torch.func.vmap


class Engine(ModelFunction):
    """Derivatives with respect to the parameters of a space, as they are; for use inside its `scope`.

    Args:
        model: The model.
        space: The parameters.
        output: Takes the logits out of what the model returns.
    """

    def __init__(self, model: nn.Module, space: ParameterSpace, output: Output | None = None) -> None:
        super().__init__(model, space, output)
        self._way = 0
        self._adjoint_checked = self._plain_checked = self._symmetric = False
        self._vmap_columns, self._columns_checked = True, False
        self._rows = SampleRows(self)
        self.settled = Sharing(self).settled
        self._kept = KeptParameters(model)
        self._measured = False

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """`curvature_scope`, after which parameters that the model writes into (`max_norm`) are as before, too."""
        with self._kept.kept(), curvature_scope(self.model):
            yield

    def product(self, batch: Batch, tangents: Tensors, bend: Bend) -> Tensors:
        """J^T bend(z, J v) for each v, a batch axis first."""
        self._check_adjoint(batch)

        def one(v: Tensors) -> Tensors:
            return forward_mode.product(self, batch, v, bend)

        return self._tried(
            batch,
            lambda: self._columns(one, lambda: self._product_func(batch, tangents, bend), tangents),
            lambda: self._product_plain(batch, tangents, bend),
        )

    def push(self, batch: Batch, tangents: Tensors) -> tuple[Tensor, Shaped[Tensor, "k ..."]]:
        """The outputs z, and J v for each v."""
        self._check_adjoint(batch)
        return self._tried(
            batch, lambda: self._push_forward(batch, tangents), lambda: self._push_plain(batch, tangents)
        )

    def second(self, batch: Batch, tangents: Tensors, total: Callable[[Tensor], Tensor]) -> Tensors:
        """The Hessian of total(z) times each v."""
        self._check_adjoint(batch)

        def one(v: Tensors) -> Tensors:
            slope = grad(lambda q: total(self._rightly(q, batch)))
            whole = {name: each.clone() for name, each in v.items()}  # views would be copied, slowly
            with torch.no_grad():
                found: Tensors = jvp(slope, (self.point,), (whole,))[1]
            return found

        def several() -> Tensors:
            found: Tensors = vmap(one)(tangents)
            return found

        def plain() -> Tensors:
            point = self.leaves()
            value = total(self._rightly(point, batch))
            slope = torch.autograd.grad(value, list(point.values()), create_graph=True, **LOOSE)
            return self._each(tangents, lambda v: pulled(slope, point, [v[n] for n in point], keep=True))

        found = self._tried(batch, lambda: self._columns(one, several, tangents), plain)
        apart, size = self._asymmetry(batch)
        if not apart > max(slack(self.narrowest), 64 * torch.finfo(self.narrowest).eps) * size:
            return found
        if self._way:
            raise CaptureError(
                f"the model's Hessian is not symmetric, by {apart:.3g} of {size:.3g}: {_NOT_DIFFERENTIABLE}, or leave "
                "the parameters in front of it out with `params`"
            )
        self._way, self._symmetric = 1, False
        return self.second(batch, tangents, total)

    def gradient(self, batch: Batch, cotangent: Callable[[Tensor], Tensor]) -> Tensors:
        """J^T cotangent(z), summed over the samples."""
        point = self.leaves()
        with torch.enable_grad():
            z = self.forward(point, batch.inputs)
        return pulled([z], point, [cotangent(z.detach())])

    def rows(
        self, batch: Batch, cotangents: Shaped[Tensor, "k n ..."], names: Sequence[str]
    ) -> dict[str, Shaped[Tensor, "k n ..."]]:
        """J_n^T u_kn of each sample n alone, for some of the parameters."""
        self._measure(batch)
        return self._rows.of(batch, cotangents, names, together=self._way == 0)

    def _check_adjoint(self, batch: Batch) -> None:
        """Compare u^T (J v) with (J^T u)^T v once: some operators' forward rules are not those of their reverse pass.

        A detached branch is one: its gradient is dropped, its tangent is not. Plain autograd takes over.
        """
        if self._way or self._adjoint_checked:
            return
        self._adjoint_checked = True
        few, v = self._test(batch)
        with contextlib.suppress(RuntimeError, NotImplementedError, ValueError):
            z, along = forward_mode.push(self, few, v)
            u = _drawn(z, -1)
            back = self.gradient(few, lambda _: u)
            same = forward_mode.product(self, few, v, lambda *_: u)
            gap = max(float((back[n] - same[n]).abs().max()) for n in v if v[n].numel())
            largest = max(float(back[n].abs().max()) for n in v if v[n].numel())
            apart, size = _adjoint_gap(v, along, u, back)
            if apart > slack(self.narrowest) * size or gap > slack(self.narrowest) * largest:
                self._way = 1

    def _check_plain(self, batch: Batch) -> None:
        """The same of plain autograd, once: a backward pass that is written by hand may not be differentiable itself.

        Raises:
            CaptureError: J v is not that of J^T u.
        """
        if self._plain_checked:
            return
        self._plain_checked = True
        few, v = self._test(batch)
        apart, size = 0.0, 1.0
        with contextlib.suppress(RuntimeError, NotImplementedError, ValueError):  # inputs that cannot be cut
            with seeded(0):
                z, along = self._push_plain(few, {name: each[None] for name, each in v.items()})
            u = _drawn(z, -1)
            with seeded(0):
                back = self.gradient(few, lambda _: u)
            apart, size = _adjoint_gap(v, along[0], u, back)
        if apart > max(slack(self.narrowest), 64 * torch.finfo(self.narrowest).eps) * size:
            raise CaptureError(
                f"the model's derivative along a direction and its reverse pass differ by {apart:.3g} of {size:.3g}: "
                f"{_NOT_DIFFERENTIABLE}, give it a `jvp`, or leave the parameters in front of it out with `params`"
            )

    def _asymmetry(self, batch: Batch) -> tuple[float, float]:
        """The difference of v^T H w and w^T H v, H the Hessian of a sum of outputs, and its size; once, else zeros."""
        if self._symmetric:
            return 0.0, 1.0
        self._symmetric = True
        few, v = self._test(batch)
        w = {name: _drawn(value, number + len(v)) for number, (name, value) in enumerate(v.items())}
        u = _drawn(self.outputs(few), -1)
        sums, size = [], 0.0
        with contextlib.suppress(RuntimeError, NotImplementedError, ValueError):  # inputs that cannot be cut
            for one, other in ((v, w), (w, v)):
                found = self.second(few, {name: each[None] for name, each in one.items()}, lambda z: (u * z).sum())
                terms = [(found[name][0] * other[name]).double() for name in other]
                sums.append(float(sum(each.sum() for each in terms)))
                size += float(sum(each.abs().sum() for each in terms))
        return (abs(sums[0] - sums[1]) if len(sums) == 2 else 0.0), size

    def _measure(self, batch: Batch) -> None:
        """Find the coarsest numbers of a forward pass, once: norms of double models may count in single."""
        if not self._measured:
            self._measured = True
            with (
                contextlib.suppress(RuntimeError, ValueError, TypeError, IndexError),
                seeded(0),
                torch.no_grad(),
                Narrowest(self.narrowest) as seen,
            ):
                self.forward(self.point, batch.inputs)  # what it cannot run is told by the run that was asked for
                self.narrowest = seen.dtype

    def _test(self, batch: Batch) -> tuple[Batch, Tensors]:
        with contextlib.suppress(DataError):
            batch = self.settled(batch).some(_FEW)
        self._measure(batch)
        return batch, {name: _drawn(value, number) for number, (name, value) in enumerate(self.point.items())}

    def _columns(self, one: Callable[[Tensors], Tensors], several: Callable[[], Tensors], tangents: Tensors) -> Tensors:
        """One column by forward mode; several at once, or each alone where an operator does not allow that.

        The first time, the columns' products with random signs must add up to the product with their sum.
        """
        if _count(tangents) > 1 and self._vmap_columns:
            try:
                with torch.no_grad():
                    found = several()
                if self._columns_checked or self._agree(one, found, tangents):
                    self._columns_checked = True
                    return found
            except FxSparseError:
                raise
            except (RuntimeError, NotImplementedError, ValueError):
                pass
            self._vmap_columns = False
        return self._each(tangents, one)

    def _agree(self, one: Callable[[Tensors], Tensors], found: Tensors, tangents: Tensors) -> bool:
        source = torch.Generator().manual_seed(_count(tangents))
        signs = torch.randint(2, (_count(tangents),), generator=source).mul_(2).sub_(1)

        def summed(columns: Tensors) -> Tensors:
            return {name: torch.tensordot(signs.to(each), each, 1) for name, each in columns.items()}

        expected, sums = one(summed(tangents)), summed(found)
        size = max(float(each.abs().sum(0).max()) for each in found.values() if each.numel())
        gaps = [float((sums[n] - expected[n].reshape(sums[n].shape)).abs().max()) for n in sums if sums[n].numel()]
        return all(gap <= slack(self.narrowest) * size for gap in gaps)

    def _product_func(self, batch: Batch, tangents: Tensors, bend: Bend) -> Tensors:
        def tangent_map(q: Tensors) -> tuple[Tensor, Tensor]:
            push = vmap(lambda v: jvp(lambda r: self._rightly(r, batch), (q,), (v,)), out_dims=(None, 0))
            pushed: tuple[Tensor, Tensor] = push(tangents)
            return pushed

        z, pull, along = vjp(tangent_map, self.point, has_aux=True)
        products: Tensors = vmap(lambda u: pull(u)[0])(torch.stack([bend(z, each) for each in along]))
        return products

    def _rightly(self, parameters: Tensors, batch: Batch) -> Tensor:
        with RightRules():
            return self.forward(parameters, batch.inputs)

    def _product_plain(self, batch: Batch, tangents: Tensors, bend: Bend) -> Tensors:
        point = self.leaves()
        z, along = self._along(batch, tangents, point)
        found = [pulled([z], point, [bend(z.detach(), each)], keep=True) for each in along]
        return {name: torch.stack([each[name] for each in found]) for name in point}

    def _push_forward(self, batch: Batch, tangents: Tensors) -> tuple[Tensor, Tensor]:
        found = [forward_mode.push(self, batch, each) for each in _apart(tangents)]
        return found[0][0], torch.stack([along for _, along in found])

    def _push_plain(self, batch: Batch, tangents: Tensors) -> tuple[Tensor, Tensor]:
        z, along = self._along(batch, tangents, self.leaves())
        return z.detach(), torch.stack(along)

    def _along(self, batch: Batch, tangents: Tensors, point: Tensors) -> tuple[Tensor, list[Tensor]]:
        """The outputs with their graph, and each J v by differentiating J^T u with respect to u."""
        with torch.enable_grad():
            z = self.forward(point, batch.inputs)
            u = torch.zeros_like(z, requires_grad=True)
            back = torch.autograd.grad(z, list(point.values()), u, create_graph=True, **LOOSE)
        return z, [pulled(back, {"u": u}, [v[n] for n in point], keep=True)["u"] for v in _apart(tangents)]

    def _each(self, tangents: Tensors, rule: Callable[[Tensors], Tensors]) -> Tensors:
        found = [rule(v) for v in _apart(tangents)]
        if len(found) == 1:
            return {name: each.reshape(1, *self.space.shapes[name]) for name, each in found[0].items()}
        return {name: torch.stack([each[name].reshape(self.space.shapes[name]) for each in found]) for name in tangents}

    def _tried(self, batch: Batch, forward: Callable[[], R], plain: Callable[[], R]) -> R:
        ways = (forward, plain, plain)
        failures: list[Exception] = []
        for way in range(self._way, 3):
            try:
                with _mkldnn(way < 2), torch.enable_grad():
                    found = ways[way]()
                    if way:
                        self._check_plain(batch)
            except FxSparseError:
                raise
            except (RuntimeError, NotImplementedError, ValueError) as error:
                failures.append(error)
                continue
            self._way = way
            return found
        last = failures[-1]
        place = place_of(self.model, last, lambda: self.outputs(batch))
        raise CaptureError(
            f"the model cannot be differentiated{place}: {type(last).__name__} ({_first_line(last)})"
        ) from failures[0]


@contextlib.contextmanager
def _mkldnn(wanted: bool) -> Iterator[None]:
    if wanted:
        yield
        return
    switch: Any = torch.backends.mkldnn
    before = switch.enabled
    try:
        switch.enabled = False
        yield
    finally:
        switch.enabled = before


def _count(tangents: Tensors) -> int:
    return len(next(iter(tangents.values())))


def _apart(tangents: Tensors) -> list[Tensors]:
    return [{name: tangent[k] for name, tangent in tangents.items()} for k in range(_count(tangents))]


def _drawn(like: Tensor, number: int) -> Tensor:
    source = torch.Generator().manual_seed(number + 2)
    return torch.randn(like.shape, generator=source, dtype=torch.float64).to(like)


def _adjoint_gap(v: Tensors, along: Tensor, u: Tensor, back: Tensors) -> tuple[float, float]:
    """The difference of u^T (J v) and (J^T u)^T v, and the size of what is summed there."""
    one = (along * u).double()
    terms = [(back[name] * v[name]).double() for name in v]
    apart = abs(float(one.sum()) - float(sum(each.sum() for each in terms)))
    size = float(one.abs().sum()) + float(sum(each.abs().sum() for each in terms))
    return apart, max(size, torch.finfo(u.dtype).tiny)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
