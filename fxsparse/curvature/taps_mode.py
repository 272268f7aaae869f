"""Taps: one forward pass under a function mode that puts a tap behind every operator that reads a parameter.

Operators see weights without gradients, so that a backward pass computes output gradients only; the taps receive them.
What is computed from parameters alone (``weight * mask``, a weight norm, a slice) is followed by autograd from private
aliases of the parameters, and per-sample gradients are carried back through it.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from fxsparse.curvature.taps_formulas import Formula
from fxsparse.curvature.taps_layout import Layout
from fxsparse.curvature.taps_moved import MOVED, Path, Role, is_order, level_of, mark, moves, role_of, tensors_in
from fxsparse.curvature.taps_site import Operand, Site, Source, mark_site
from fxsparse.graph.macs import op_name
from fxsparse.nn.functional import masked_weight

_SOURCE = "_fxsparse_source"


class _Anchor(torch.autograd.Function):
    """The identity, in place, that makes its output need a gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[None, Tensor]:
        return None, delta.new_zeros(())


Rule = Callable[["TapMode", str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
Receiver = Callable[[Site, Tensor], None]


class TapMode(TorchFunctionMode):
    """Run a model's forward pass inside of it, on inputs that went through `data`.

    Args:
        parameters: by name, those that are wanted.
        others: further parameters, which are read without gradients.
        rules: by operator name: makes the call, declares its sites, or returns NotImplemented.
        receive: gets each site with its output gradient, at each backward pass.
        layouts: where the samples lie at each site, by number; None while that is being found out.
        values: by identity, what stands in for a parameter.
        watched: sites whose `edges` are kept beside those of all that are moved; None to keep none.
        trails: those of earlier passes; None where there were none.

    Attributes:
        sites: in the order of calls.
        uncovered: parameters with a read that has no tap, and why.
        edges: where gradients arrive, by number of a site.
        outputs: of each site with an output, by number; None where they are not kept.
        path: which way Python code goes.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        others: Sequence[Tensor],
        rules: Mapping[str, Rule],
        receive: Receiver,
        layouts: Mapping[int, Layout | None] | None,
        values: Mapping[int, Tensor] | None = None,
        watched: Container[int] | None = None,
        trails: Container[int] | None = None,
    ) -> None:
        super().__init__()
        values = values or {}
        self.aliases = {
            name: values.get(id(parameter), parameter).detach().requires_grad_(True)
            for name, parameter in parameters.items()
        }
        self.known: dict[int, Source] = {
            id(parameter): Source(self.aliases[name], (name,), name) for name, parameter in parameters.items()
        }
        self.frozen = {id(parameter): values.get(id(parameter), parameter).detach() for parameter in others}
        self.rules, self.receive, self.layouts = rules, receive, layouts
        device = next(iter(parameters.values())).device
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.sites: list[Site] = []
        self.uncovered: dict[str, str] = {}
        self.edges: dict[int, GradientEdge] = {}
        self.outputs: dict[int, Tensor] | None = None
        self.path = Path(trails)
        self._watched, self._level = watched, 0

    @property
    def leaves(self) -> list[Tensor]:
        """What a backward pass must reach for all taps to receive their gradients."""
        return [self.anchor, *(site.leaf for site in self.sites if site.leaf is not None)]

    def data(self, tensor: Tensor) -> Tensor:
        """Mark a tensor as depending on the inputs."""
        mark(tensor, 1)
        return tensor

    def __torch_function__(
        self, func: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        held, level = False, 0
        for tensor in tensors_in(args, kwargs):
            own = self._level_of(tensor)
            if own < 0:
                held = True
            elif own > level:
                level = own
        role = role_of(func) if level else None
        if role is not None and moves(role, args, kwargs, lambda tensor: max(self._level_of(tensor), 0)):
            level = MOVED
        if self.frozen:
            args, kwargs = self._mapped(args, kwargs, lambda tensor: self.frozen.get(id(tensor), tensor))
        if held and not level:
            return self._derive(func, args, kwargs)
        result = self._use_at(level, func, args, kwargs) if held else func(*args, **kwargs)
        if not level:
            if is_order(func):
                mark(result, 1)
            return result
        if role is Role.READS:
            self.path.turn(result)
        if not held and _writes(func) and isinstance(args[0], Tensor):
            mark(args[0], level)
        for tensor in tensors_in((result,), {}):
            mark(tensor, level)
        return result

    def _level_of(self, tensor: Tensor) -> int:
        """-1 for parameters and what is computed from them."""
        if id(tensor) in self.known or hasattr(tensor, _SOURCE):
            return -1
        return 0 if id(tensor) in self.frozen else level_of(tensor)

    def _use_at(self, level: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before, self._level = self._level, level
        try:
            return self._use(func, args, kwargs)
        finally:
            self._level = before

    def source(self, value: Any) -> Source | None:
        """The source that a value is, if it is one."""
        if not isinstance(value, Tensor):
            return None
        return self.known.get(id(value)) or getattr(value, _SOURCE, None)

    def plain(self, value: Any) -> Any:
        """The value without the graph of its parameters."""
        source = self.source(value)
        return value if source is None else source.plain

    def tap(
        self, what: str, y: Tensor, operands: Sequence[tuple[Source | None, Formula]], saved: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """Declare a site at the output y of a call, and return y."""
        if not torch.is_grad_enabled():
            return y
        found = [Operand(source, formula) for source, formula in operands if source is not None]
        site = self._declare(what, found, y, saved=[(x, x._version) for x in saved])
        if not y.requires_grad:
            y = _Anchor.apply(y.data if y._is_view() else y, self.anchor)  # type: ignore[no-untyped-call]  # untyped
        hooked = y
        if y._is_view():  # its hooks would be lost when it is overwritten in place, those of its base are not
            base = y._base
            assert base is not None
            if base.numel() == y.numel() and base.is_contiguous() and y.is_contiguous():
                hooked = base
            else:
                hooked = y = y.clone()
        hooked.register_hook(  # type: ignore[no-untyped-call]  # untyped in torch
            lambda delta: self.receive(site, delta.reshape(site.shape))
        )
        if self._watched is not None and (site.moved or site.number in self._watched):
            self.edges[site.number] = get_gradient_edge(hooked)
        if self.outputs is not None:
            self.outputs[site.number] = y.detach()
        mark_site(y, site)
        return y

    def _declare(self, what: str, operands: list[Operand], y: Tensor, **more: Any) -> Site:
        moved = self._level >= MOVED or self.path.strayed
        site = Site(len(self.sites), what, operands, tuple(y.shape), moved=moved, read=self.path.numbers, **more)
        self.sites.append(site)
        return site

    def tap_leaf(self, what: str, copy: Tensor, source: Source, formula: Formula) -> Tensor:
        """Declare a site at the operand's own copy, a leaf, and return it."""
        copy = copy.detach().requires_grad_(True)
        self._declare(what, [Operand(source, formula)], copy, leaf=copy)
        return copy

    def layout_of_next(self) -> Layout | None:
        """Where the samples lie at the site that is declared next, if that is known."""
        return None if self.layouts is None else self.layouts.get(len(self.sites))

    def uncover(self, sources: list[Source], reason: str) -> None:
        """Note that a read of these sources has no tap."""
        for source in sources:
            for name in source.names:
                self.uncovered.setdefault(name, reason)

    def _derive(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function of parameters and constants."""
        sources = [source for tensor in tensors_in(args, kwargs) if (source := self.source(tensor)) is not None]
        args, kwargs = self._mapped(args, kwargs, self._traced)
        result = func(*args, **kwargs)
        names = tuple(dict.fromkeys(name for source in sources for name in source.names))
        masked = func is masked_weight and sources[0].mask is None and sources[0].direct is not None
        for tensor in tensors_in((result,), {}):
            if id(tensor) in self.known or not tensor.requires_grad or hasattr(tensor, _SOURCE):
                continue
            same = sources[0].direct if masked else None
            setattr(tensor, _SOURCE, Source(tensor, names, same, args[1] if masked else None))
        return result

    def _traced(self, tensor: Tensor) -> Tensor:
        source = self.known.get(id(tensor))
        return tensor if source is None else source.tensor

    def _use(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function of parameters and inputs."""
        name = op_name(func)
        rule = self.rules.get(name)
        if rule is not None:
            result = rule(self, name, func, args, kwargs)
            if result is not NotImplemented:
                return result
        inner = _without_dispatch(func)
        if inner is not None:
            with self:
                return inner(*args, **kwargs)
        if torch.is_grad_enabled():
            sources = [source for tensor in tensors_in(args, kwargs) if (source := self.source(tensor)) is not None]
            result = func(*self._mapped(args, kwargs, self.plain)[0], **self._mapped(args, kwargs, self.plain)[1])
            if any(tensor.is_floating_point() for tensor in tensors_in((result,), {})) and name not in _READS_NO_VALUE:
                self.uncover(sources, f"`{name}` reads it together with inputs")
            return result
        args, kwargs = self._mapped(args, kwargs, self.plain)
        return func(*args, **kwargs)

    def _mapped(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rule: Callable[[Tensor], Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _map(args, rule), {key: _map(value, rule) for key, value in kwargs.items()}


_READS_NO_VALUE = frozenset(("type_as", "expand_as", "view_as", "reshape_as", "to", "is_same_size"))


def _map(value: Any, rule: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return rule(value)
    if isinstance(value, (tuple, list)):
        mapped = [_map(each, rule) for each in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    return {key: _map(each, rule) for key, each in value.items()} if type(value) is dict else value


def _writes(func: Callable[..., Any]) -> bool:
    name = str(getattr(func, "__name__", ""))
    return name == "__setitem__" or name.endswith("_") and not name.endswith("__")


_NEVER = {
    "has_torch_function": lambda values: False,
    "has_torch_function_unary": lambda value: False,
    "has_torch_function_variadic": lambda *values: False,
}


def _without_dispatch(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """A copy of a Python function of torch whose body runs under a mode; the original would call the mode again."""
    if not isinstance(func, types.FunctionType):
        return None
    names = set(func.__code__.co_names) & set(_NEVER)
    if not names:
        return None
    copy = types.FunctionType(
        func.__code__, {**func.__globals__, **_NEVER}, func.__name__, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy
