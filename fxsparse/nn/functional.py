"""The masked weight, and the collector of the gradients that the mask hides."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic
from torch.utils.weak import WeakTensorKeyDictionary

from fxsparse.nn.select import selected

_full: ContextVar[bool] = ContextVar("full", default=False)
_collecting: tuple[weakref.ref[DenseGradients], ...] = ()  # weak: who drops a collector need not stop it


def masked_weight(weight: Shaped[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], sink: Tensor | None = None) -> Tensor:
    """The weight with its dead entries read as exact zeros: where(mask, weight, 0).

    The result equals `weight` bit for bit where the mask is True, whatever stands at dead entries (NaN included), and
    the gradient that reaches `weight` is where(mask, G, 0) for the dense gradient G of the result. Without gradients
    the result is marked like `weight`, because torch chooses kernels by `requires_grad` even there. Tracers and
    `TorchFunctionMode`s see one call of this function, not its body.

    Args:
        weight: The weight, any shape and floating or complex dtype.
        mask: Bool, the shape of `weight`, True = alive.
        sink: The mask tensor under which active `DenseGradients` file G; `mask` itself where it is not given.

    Returns:
        A tensor of the shape, dtype and strides of `weight`.
    """
    if has_torch_function_variadic(weight, mask):
        extra = () if sink is None else (sink,)
        masked: Tensor = handle_torch_function(masked_weight, (weight, mask), weight, mask, *extra)
        return masked
    if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
        return _in_compiled_code(weight, mask, None if sink is mask else sink)
    if not torch.compiler.is_compiling() and _full.get():
        return weight
    if not torch.is_grad_enabled() and weight.requires_grad and not _leaves_flags():
        return _marked(weight, mask)
    result = selected(weight, mask)
    if _collecting and not torch.compiler.is_compiling():
        _watch(result, mask if sink is None else sink)
    return result


@contextlib.contextmanager
def full_masks() -> Iterator[None]:
    """Inside, `masked_weight` returns the weight itself: for callers whose masks are all True."""
    before = _full.set(True)
    try:
        yield
    finally:
        _full.reset(before)


def _marked(weight: Tensor, mask: Tensor) -> Tensor:
    """The masked weight without gradients, of the kind that torch takes for a parameter."""
    if torch.is_inference_mode_enabled() and not weight.is_inference():
        with torch.inference_mode(False), torch.no_grad():
            return selected(weight, mask).requires_grad_(True)
    return selected(weight, mask).requires_grad_(True)


def _leaves_flags() -> bool:
    """Whether results keep the flag that torch gives them: while they are traced or transformed, and under autocast.

    There is nothing to choose by it there: autocast casts weights, which drops the flag without gradients, and would
    keep the cast of every tensor that has it.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_any_autocast_enabled()
    )


def _in_compiled_code(weight: Tensor, mask: Tensor, sink: Tensor | None) -> Tensor:
    """The same in one graph that fits any set of collectors: its backward pass asks for them each time it runs."""
    if torch.is_grad_enabled() and weight.requires_grad:
        result: Tensor = _compiled(weight, mask, sink)
        return result
    return torch.where(mask, weight, 0.0)


@torch.library.custom_op("fxsparse::masked_weight", mutates_args=())
def _compiled(weight: Tensor, mask: Tensor, sink: Tensor | None = None) -> Tensor:
    """where(mask, weight, 0), whose gradient passes `hide_gradient`. Compilers leave both calls as they are."""
    return torch.where(mask, weight, 0.0)


@torch.library.custom_op("fxsparse::hide_gradient", mutates_args=())
def _hide_gradient(gradient: Tensor, mask: Tensor, sink: Tensor | None = None) -> Tensor:
    """where(mask, gradient, 0); active collectors get the dense gradient."""
    for collector in collecting():
        collector.add_by_storage(mask if sink is None else sink, gradient)
    return torch.where(mask, gradient, 0.0)


def _masked_like(value: Tensor, mask: Tensor, sink: Tensor | None = None) -> Tensor:
    return torch.where(mask, value, 0.0)


def _keep_masks(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*(each for each in inputs[1:] if each is not None))


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return _hide_gradient(gradient, *ctx.saved_tensors), None, None


_compiled.register_fake(_masked_like)
_hide_gradient.register_fake(_masked_like)
_compiled.register_autograd(_backward, setup_context=_keep_masks)


def _watch(result: Tensor, sink: Tensor) -> None:
    # Inside a torch.func transform the gradient is a wrapper that must not outlive it; those callers hold G themselves.
    if not result.requires_grad or is_wrapped(result):
        return
    for collector in collecting():
        if collector.wants(sink):
            result.register_hook(_Accumulate(collector, sink))  # type: ignore[no-untyped-call]  # untyped in torch


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a `torch.func` transform, or `is_grads_batched`, holds this tensor: it must not outlive the call."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return bool(wrapped or torch._C._dispatch_keys(tensor).has("Batched"))


class _Accumulate:
    """Backward hook: adds the gradient to the sink, if the collector is still active."""

    def __init__(self, collector: DenseGradients, sink: Tensor) -> None:
        self.collector = collector
        self.sink = sink

    def __call__(self, gradient: Tensor) -> None:
        if self.collector.active and not is_wrapped(gradient):
            self.collector.add(self.sink, gradient)


@dataclass(frozen=True, eq=False)
class Product:
    """A dense gradient as the product that it is of a layer's input and the gradient of the layer's output.

    Attributes:
        input: The input.
        gradient: The gradient of the output.
        shape: Shape of the dense gradient.
        make: The product of the two.
    """

    input: Tensor
    gradient: Tensor
    shape: torch.Size
    make: Callable[[Tensor, Tensor], Tensor]

    @property
    def numel(self) -> int:
        """Elements of both factors."""
        return self.input.numel() + self.gradient.numel()

    def dense(self) -> Tensor:
        """The gradient, in a new tensor."""
        return self.make(self.input, self.gradient)

    def copied(self) -> Product:
        """The same of factors that nobody else can write."""
        return Product(self.input.detach().clone(), self.gradient.detach().clone(), self.shape, self.make)


SMALL = 0.5
"""Largest part of a dense gradient's size that the factors of a product may have to be kept in its place."""


class DenseGradients:
    """Collects G = dL/dW_eff for every position of masked weights, the dead ones included.

    While it is active (between `start` and `stop`, or inside `with`), each forward through `masked_weight` leaves a
    hook on its result, and each backward adds what arrives there: several uses of one weight and several micro-batches
    add up. Weights whose gradient is masked at the parameter (`Guard.GRADIENT`) feed the same sinks. A forward that
    runs while no collector is active pays nothing. The values are those of the backward pass: scaled, where a
    `GradScaler` scales the loss, unclipped, and local to the process.

    Masks are told apart by identity: read with the mask tensor that the model holds. Only `backward()` is seen, not
    `torch.autograd.grad` on weights guarded at the parameter, nor `torch.func` transforms and batches of gradients
    (`is_grads_batched`). Compiled code has all its gradients made whenever one is asked for, so all of them are seen.

    Args:
        masks: The masks to collect for; all of them where it is not given.
        defer: Whether products may be kept as copies of their factors, where these are small.
    """

    def __init__(self, masks: Iterable[Tensor] | None = None, *, defer: bool = False) -> None:
        self._wanted: MutableMapping[Tensor, bool] | None = None
        if masks is not None:
            self._wanted = WeakTensorKeyDictionary({mask: True for mask in masks})
        self._sums: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
        self._later: MutableMapping[Tensor, list[Tensor | Product]] = WeakTensorKeyDictionary()  # what sums lack
        self._aliases: list[Tensor] = []  # masks that only compiled code has named so far
        self._defer, self._active = defer, False

    @property
    def active(self) -> bool:
        """Whether backward passes are being collected."""
        return self._active

    def start(self) -> None:
        """Begin to collect; the sums so far stay. Does nothing when already active."""
        global _collecting
        if not self._active:
            self._active = True
            _collecting = (*_collecting, weakref.ref(self, _forget))

    def stop(self) -> None:
        """Stop collecting; the sums stay readable. Does nothing when not active."""
        self._active = False
        _forget()

    def wants(self, mask: Tensor) -> bool:
        """Whether gradients under this mask are collected."""
        return self._wanted is None or mask in self._wanted

    @torch.no_grad()
    def add(self, mask: Tensor, gradient: Tensor) -> None:
        """Add a dense gradient, shaped like the mask, to the mask's sum."""
        gradient = gradient.detach()
        if mask in self._later:  # sums keep their order
            self._later[mask].append(gradient.clone())
            return
        previous = self._sums.get(mask)
        self._sums[mask] = gradient.clone() if previous is None else previous + gradient

    def defers(self, product: Product) -> bool:
        """Whether it keeps such a product as its factors."""
        return self._defer and product.numel <= SMALL * product.shape.numel()

    def add_product(self, mask: Tensor, product: Product) -> None:
        """Add a dense gradient, shaped like the mask, that is made when somebody reads it."""
        self._later.setdefault(mask, []).append(product.copied())

    def add_by_storage(self, sink: Tensor, gradient: Tensor) -> None:
        """Add a dense gradient under the mask of this memory: compiled code names masks by other objects."""
        known = next((mask for mask in (*(self._wanted or ()), *self._sums) if _same_memory(mask, sink)), None)
        if known is None and self._wanted is None:
            known = sink.detach()
            self._aliases.append(known)
        if known is not None:
            self.add(known, gradient)

    @torch.no_grad()
    def add_total(self, mask: Tensor, total: Tensor) -> None:
        """Take a parameter's accumulated gradient, whose dead entries hold only what the last backward pass added."""
        previous = self._sums.get(mask)
        dead_sum = total if previous is None else previous + total
        self._sums[mask] = torch.where(mask, total, dead_sum).detach()

    def read(self, mask: Tensor) -> Tensor | None:
        """The dense gradient collected under this very mask tensor, or None when none arrived."""
        alias = next((alias for alias in self._aliases if alias is not mask and _same_memory(alias, mask)), None)
        own, other = self._total(mask), None if alias is None else self._total(alias)
        return own if other is None else other if own is None else own + other

    def summands(self, mask: Tensor) -> tuple[Tensor | Product, ...]:
        """What `read` sums, in order, products as they are kept."""
        if any(alias is not mask and _same_memory(alias, mask) for alias in self._aliases):
            total = self.read(mask)
            return () if total is None else (total,)
        first = self._sums.get(mask)
        return (*(() if first is None else (first,)), *self._later.get(mask, ()))

    def _total(self, mask: Tensor) -> Tensor | None:
        total = self._sums.get(mask)
        for each in self._later.get(mask, ()):
            made = each.dense() if isinstance(each, Product) else each
            total = made if total is None else total + made
        return total

    def clear(self) -> None:
        """Forget the sums."""
        self._sums, self._later, self._aliases = WeakTensorKeyDictionary(), WeakTensorKeyDictionary(), []

    def __enter__(self) -> DenseGradients:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.device == other.device


def collecting() -> tuple[DenseGradients, ...]:
    """The collectors that are active now."""
    return tuple(collector for collector in (reference() for reference in _collecting) if collector is not None)


def _forget(dead: object = None) -> None:
    """Keep only the collectors that live and are active."""
    global _collecting
    kept = (reference for reference in _collecting if reference is not dead)
    _collecting = tuple(ref for ref in kept if (collector := ref()) is not None and collector.active)
