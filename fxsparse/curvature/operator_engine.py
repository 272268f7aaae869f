"""Derivatives of a model's outputs: J v, J^T u, per-sample rows, and Hessian products.

1. torch.func: one vjp inside one jvp, so that both share the primal pass.
2. Where an operator has no forward-mode rule, or a function is not written for torch.func: J v by two reverse passes of
   plain autograd. 3. The same without mkldnn, whose recurrent kernels are differentiable once only.

The way that worked first is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fxsparse.curvature.operator_data import Batch, Output, one_output
from fxsparse.curvature.operator_rules import CheapRules
from fxsparse.curvature.operator_space import ParameterSpace
from fxsparse.errors import CaptureError, FxSparseError
from fxsparse.nn import masked_weights

Tensors = dict[str, Tensor]
Bend = Callable[[Tensor, Tensor], Tensor]
"""(outputs z [N, ...], tangent J v like z) -> H J v like z."""
R = TypeVar("R")

grad: Any = torch.func.grad  # what they return depends on their arguments, which types cannot say
jvp: Any = torch.func.jvp
vjp: Any = torch.func.vjp
vmap: Any = torch.func.vmap


class Engine:
    """Derivatives with respect to the parameters of a space, as they are; for use inside `curvature_scope`.

    Args:
        model: The model.
        space: The parameters.
        output: Takes the logits out of what the model returns.
    """

    def __init__(self, model: nn.Module, space: ParameterSpace, output: Output | None = None) -> None:
        self.model, self.space, self.output = model, space, output or one_output
        self._way = 0
        self._checked: set[str] = set()
        self._vmap_rows = self._vmap_columns = True
        self._parameters = dict(model.named_parameters())
        self._masks = {}
        masked = masked_weights(model)
        for name, weight in masked.items():
            if any(f"{alias}_mask" in space.opened for alias in weight.names):
                self._masks[name] = weight.mask
        held = {id(buffer) for weight in masked.values() for buffer in weight.buffers}
        self._buffers = {n: b for n, b in places_of(model, "_buffers") if id(b) not in held}
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._places = {place: names[id(parameter)] for place, parameter in places_of(model, "_parameters")}

    @property
    def point(self) -> Tensors:
        """The chosen parameters, detached; dead entries of opened masks are read as zeros."""
        return {name: self._value(name) for name in self.space.shapes}

    def parameter(self, name: str) -> nn.Parameter:
        """The model's own parameter of this first name."""
        return self._parameters[name]

    def forward(self, parameters: Mapping[str, Tensor], inputs: Any) -> Tensor:
        """The outputs z [N, ...] at some values of the chosen parameters."""
        args, kwargs = positional(inputs)
        values = {n: parameters[n] if n in parameters else self._value(n) for n in self._parameters}
        state = {place: values[name] for place, name in self._places.items()}
        buffers = {place: buffer.clone() for place, buffer in self._buffers.items()}  # a model may write to them
        state = {**state, **buffers, **self.space.opened}
        return self.output(functional_call(self.model, state, args, kwargs, tie_weights=False))

    def outputs(self, batch: Batch) -> Tensor:
        """The outputs of a batch, without gradients."""
        with torch.no_grad():
            return self.forward(self.point, batch.inputs).detach()

    def product(self, batch: Batch, tangents: Tensors, bend: Bend) -> Tensors:
        """J^T bend(z, J v) for each v, a batch axis first."""
        self._check_adjoint(batch)
        return self._tried(
            lambda: self._product_func(batch, tangents, bend), lambda: self._product_plain(batch, tangents, bend)
        )

    def push(self, batch: Batch, tangents: Tensors) -> tuple[Tensor, Shaped[Tensor, "k ..."]]:
        """The outputs z, and J v for each v."""
        self._check_adjoint(batch)
        return self._tried(lambda: self._push_func(batch, tangents), lambda: self._push_plain(batch, tangents))

    def second(self, batch: Batch, tangents: Tensors, total: Callable[[Tensor], Tensor]) -> Tensors:
        """The Hessian of total(z) times each v."""
        self._check_adjoint(batch)

        def func() -> Tensors:
            slope = grad(lambda q: total(self.forward(q, batch.inputs)))
            return self._over_columns(lambda v: jvp(slope, (self.point,), (v,))[1], tangents)

        def plain() -> Tensors:
            point = self._leaves()
            value = total(self.forward(point, batch.inputs))
            slope = torch.autograd.grad(value, list(point.values()), create_graph=True, **_LOOSE)
            return self._each(tangents, lambda v: self._pull(slope, point, [v[n] for n in point]))

        return self._tried(func, plain)

    def gradient(self, batch: Batch, cotangent: Callable[[Tensor], Tensor]) -> Tensors:
        """J^T cotangent(z), summed over the samples."""
        point = self._leaves()
        with torch.enable_grad():
            z = self.forward(point, batch.inputs)
        return self._pull([z], point, [cotangent(z.detach())])

    def rows(
        self, batch: Batch, cotangents: Shaped[Tensor, "k n ..."], names: Sequence[str]
    ) -> dict[str, Shaped[Tensor, "k n ..."]]:
        """J_n^T u_kn of each sample n alone, for some of the parameters."""
        if self._vmap_rows and self._way == 0:
            try:
                rows = self._rows_func(batch, cotangents, names)
                if self._rows_agree(batch, cotangents, rows):
                    return rows
                self._vmap_rows = False
            except FxSparseError:
                raise
            except (RuntimeError, NotImplementedError, ValueError):
                rows = self._rows_plain(batch, cotangents, names)
                self._vmap_rows = False
                return rows
        return self._rows_plain(batch, cotangents, names)

    def _check_adjoint(self, batch: Batch) -> None:
        """Compare u^T (J v) with (J^T u)^T v once: some operators' forward rules are not those of their reverse pass.

        The padding row of an embedding is one: its gradient is dropped, its tangent is not. Plain autograd takes over.
        """
        if self._way or "adjoint" in self._checked:
            return
        self._checked.add("adjoint")
        few = batch.cut(0, min(batch.samples, 2))
        v = {name: _drawn(value, number) for number, (name, value) in enumerate(self.point.items())}
        with contextlib.suppress(RuntimeError, NotImplementedError, ValueError):
            z, along = self._push_func(few, {name: each[None] for name, each in v.items()})
            u = _drawn(z, -1)
            pulled = self.gradient(few, lambda _: u)
            same = self._product_func(few, {name: each[None] for name, each in v.items()}, lambda *_: u)
            gap = max(float((pulled[n] - same[n][0]).abs().max()) for n in v if v[n].numel())
            largest = max(float(pulled[n].abs().max()) for n in v if v[n].numel())
            terms = torch.stack([(pulled[name] * v[name]).sum().double() for name in v])
            one, other = float((along[0] * u).sum()), float(terms.sum())
            size = float((along[0] * u).abs().sum()) + float(sum((pulled[n] * v[n]).abs().sum() for n in v))
            apart = abs(one - other) > _slack(z.dtype) * max(size, torch.finfo(z.dtype).tiny)
            if apart or gap > _slack(z.dtype) * largest:
                self._way = 1

    def _rows_agree(self, batch: Batch, cotangents: Tensor, rows: Tensors) -> bool:
        """Whether the rows of all samples add up to one reverse pass of the batch; looked at once."""
        key = ",".join(rows)
        if key in self._checked:
            return True
        self._checked.add(key)
        whole = self.gradient(batch, lambda _: cotangents[0])
        for name, row in rows.items():
            gap = float((row[0].sum(0) - whole[name]).abs().max()) if row.numel() else 0.0
            if gap > _slack(row.dtype) * float(row[0].abs().sum(0).max() if row.numel() else 0.0):
                return False
        return True

    def _rows_func(self, batch: Batch, cotangents: Tensor, names: Sequence[str]) -> Tensors:
        leaves, axes, form = batch.leaves()
        point = self.point
        chosen = {name: point.pop(name) for name in names}

        def of_sample(parts: list[Any], u: Tensor) -> Tensors:
            whole = [p[None] if axis == 0 else p for p, axis in zip(parts, axes, strict=True)]
            inputs, _ = pytree.tree_unflatten(whole, form)
            _, pull = vjp(lambda q: self.forward({**point, **q}, inputs)[0], chosen)
            rows: Tensors = vmap(lambda each: pull(each)[0])(u)
            return rows

        rows: Tensors = vmap(of_sample, in_dims=(axes, 1), out_dims=1)(leaves, cotangents)
        return rows

    def _rows_plain(self, batch: Batch, cotangents: Tensor, names: Sequence[str]) -> Tensors:
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for n in range(batch.samples):
            point = self._leaves()
            with torch.enable_grad():
                z = self.forward(point, batch.cut(n, n + 1).inputs)
            chosen = {name: point[name] for name in names}
            each = [self._pull([z], chosen, [u[n : n + 1]]) for u in cotangents]
            for name in names:
                found[name].append(torch.stack([one[name] for one in each]))
        return {name: torch.stack(rows, 1) for name, rows in found.items()}

    def _product_func(self, batch: Batch, tangents: Tensors, bend: Bend) -> Tensors:
        if len(next(iter(tangents.values()))) == 1:
            only = {name: tangent[0].clone() for name, tangent in tangents.items()}  # views would be copied, slowly
            pulls: list[Any] = []

            def primal(q: Tensors) -> Tensor:
                z, pull = vjp(lambda r: self.forward(r, batch.inputs), q)
                pulls.append(pull)
                found: Tensor = z
                return found

            # The reverse pass waits until the tangents are gone: inside, they would be differentiated too.
            with CheapRules():
                z, along = jvp(primal, (self.point,), (only,))
            (found,) = pulls[0](bend(z, along))
            return {name: each[None] for name, each in found.items()}
        if not self._vmap_columns:
            return self._each(tangents, lambda v: self._product_func(batch, {n: t[None] for n, t in v.items()}, bend))

        def tangent_map(q: Tensors) -> tuple[Tensor, Tensor]:
            push = vmap(lambda v: jvp(lambda r: self.forward(r, batch.inputs), (q,), (v,)), out_dims=(None, 0))
            pushed: tuple[Tensor, Tensor] = push(tangents)
            return pushed

        z, pull, along = vjp(tangent_map, self.point, has_aux=True)
        products: Tensors = vmap(lambda u: pull(u)[0])(torch.stack([bend(z, each) for each in along]))
        return products

    def _product_plain(self, batch: Batch, tangents: Tensors, bend: Bend) -> Tensors:
        point = self._leaves()
        z, along = self._along(batch, tangents, point)
        found = [self._pull([z], point, [bend(z.detach(), each)]) for each in along]
        return {name: torch.stack([each[name] for each in found]) for name in point}

    def _push_func(self, batch: Batch, tangents: Tensors) -> tuple[Tensor, Tensor]:
        point = self.point
        if len(next(iter(tangents.values()))) == 1:
            only = {name: tangent[0].clone() for name, tangent in tangents.items()}  # views would be copied, slowly
            with CheapRules():
                z, along = jvp(lambda r: self.forward(r, batch.inputs), (point,), (only,))
            return z, along[None]
        pushed: tuple[Tensor, Tensor] = vmap(
            lambda v: jvp(lambda r: self.forward(r, batch.inputs), (point,), (v,)), out_dims=(None, 0)
        )(tangents)
        return pushed

    def _push_plain(self, batch: Batch, tangents: Tensors) -> tuple[Tensor, Tensor]:
        z, along = self._along(batch, tangents, self._leaves())
        return z.detach(), torch.stack(along)

    def _along(self, batch: Batch, tangents: Tensors, point: Tensors) -> tuple[Tensor, list[Tensor]]:
        """The outputs with their graph, and each J v by differentiating J^T u with respect to u."""
        with torch.enable_grad():
            z = self.forward(point, batch.inputs)
            u = torch.zeros_like(z, requires_grad=True)
            pulled = torch.autograd.grad(z, list(point.values()), u, create_graph=True, **_LOOSE)
        columns = range(len(next(iter(tangents.values()))))
        return z, [
            torch.autograd.grad(pulled, u, [tangents[n][k] for n in point], retain_graph=True, **_LOOSE)[0]
            for k in columns
        ]

    def _over_columns(self, rule: Callable[[Tensors], Tensors], tangents: Tensors) -> Tensors:
        if len(next(iter(tangents.values()))) == 1 or not self._vmap_columns:
            return self._each(tangents, rule)
        found: Tensors = vmap(rule)(tangents)
        return found

    def _each(self, tangents: Tensors, rule: Callable[[Tensors], Tensors]) -> Tensors:
        columns = range(len(next(iter(tangents.values()))))
        found = [rule({name: tangent[k] for name, tangent in tangents.items()}) for k in columns]
        return {name: torch.stack([each[name].reshape(self.space.shapes[name]) for each in found]) for name in tangents}

    def _pull(self, of: Sequence[Tensor], point: Tensors, given: Sequence[Tensor]) -> Tensors:
        pairs = [(value, each) for value, each in zip(of, given, strict=True) if value.requires_grad]
        if not pairs:
            return {name: torch.zeros_like(parameter) for name, parameter in point.items()}
        values, directions = zip(*pairs, strict=True)
        found = torch.autograd.grad(values, list(point.values()), directions, retain_graph=True, **_LOOSE)
        return dict(zip(point, found, strict=True))

    def _leaves(self) -> Tensors:
        return {name: parameter.detach().requires_grad_() for name, parameter in self.point.items()}

    def _value(self, name: str) -> Tensor:
        value = self._parameters[name].detach()
        return torch.where(self._masks[name], value, 0.0) if name in self._masks else value

    def _tried(self, func: Callable[[], R], plain: Callable[[], R]) -> R:
        ways = (func, plain, plain)
        failures: list[Exception] = []
        for way in range(self._way, 3):
            try:
                with _mkldnn(way < 2), torch.set_grad_enabled(way > 0):
                    found = ways[way]()
            except FxSparseError:
                raise
            except (RuntimeError, NotImplementedError, ValueError) as error:
                failures.append(error)
                if way == 0 and self._vmap_columns:  # what has no batching rule may have the others
                    self._vmap_columns = False
                    with contextlib.suppress(RuntimeError, NotImplementedError, ValueError), torch.no_grad():
                        return func()
                continue
            self._way = way
            return found
        raise CaptureError(
            f"the model cannot be differentiated: {type(failures[-1]).__name__} ({_first_line(failures[-1])})"
        ) from failures[0]


_LOOSE: Any = {"allow_unused": True, "materialize_grads": True}


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


def _drawn(like: Tensor, number: int) -> Tensor:
    source = torch.Generator().manual_seed(number + 2)
    return torch.randn(like.shape, generator=source, dtype=torch.float64).to(like)


def _slack(dtype: torch.dtype) -> float:
    return 1e-9 if dtype is torch.float64 else 1e-3


def places_of(model: nn.Module, kind: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every place that holds a parameter or buffer, once, however often its module is held.

    torch's own tying of functional calls names such a place twice, and leaves replacements behind in it.
    """
    for path, module in model.named_modules():
        for attribute, tensor in getattr(module, kind).items():
            if tensor is not None:
                yield f"{path}.{attribute}" if path else attribute, tensor


def positional(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a batch's inputs."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
