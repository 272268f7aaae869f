"""Taps of modules that are run again, inside of compiled code.

Tracers of compilers see one operator, `fxsparse::squares_again`, in the backward pass. It takes tensors, and a text
that says how they were handed to the module; at run time it runs the module again as it would be without a compiler.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fxsparse.errors import ConfigError
from fxsparse.sparsity.random import accelerator_states

_TENSOR = "tensor"
_numbers = itertools.count()
_runners: weakref.WeakValueDictionary[int, Runner] = weakref.WeakValueDictionary()


class Runner(Protocol):
    """What the operator calls."""

    def squares_of(
        self,
        arguments: Any,
        training: Sequence[bool],
        outputs: list[Tensor],
        deltas: list[Tensor],
        states: list[Tensor],
    ) -> list[Tensor]:
        """The squares that belong to each statistic.

        Args:
            arguments: args and kwargs of the call.
            training: flags of all modules at the call.
            outputs: floating-point outputs of the call.
            deltas: their gradients.
            states: of the random generators before the call; empty in evaluation mode.
        """
        ...


def registered(runner: Runner) -> int:
    """A number by which the operator finds a runner, for as long as that lives."""
    number = next(_numbers)
    _runners[number] = runner
    return number


def spelled(value: Any, tensors: list[Tensor]) -> str:
    """Arguments as a text, in which numbers stand for tensors; those are appended, each one once.

    Raises:
        ConfigError: an argument is no tensor, plain value, tuple, list or dict.
    """
    if isinstance(value, Tensor):
        for place, known in enumerate(tensors):
            if known is value:
                return f"{{{_TENSOR!r}: {place}}}"
        tensors.append(value)
        return f"{{{_TENSOR!r}: {len(tensors) - 1}}}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join([spelled(each, tensors) for each in value]) + "]"
    if isinstance(value, dict):
        return "{None: {" + ", ".join([f"{key!r}: {spelled(each, tensors)}" for key, each in value.items()]) + "}}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    raise ConfigError(
        f"an argument (={type(value).__name__}) of a module that is run again cannot be handed to compiled code: leave "
        "the module out with `parameters`, or do not compile it"
    )


def read_back(text: str, tensors: Sequence[Tensor]) -> Any:
    """What was spelled; sequences are tuples."""

    def built(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(built(each) for each in value)
        if isinstance(value, dict):
            if _TENSOR in value:
                return tensors[value[_TENSOR]]
            return {key: built(each) for key, each in value[None].items()}
        return value

    return built(ast.literal_eval(text))


@torch.library.custom_op("fxsparse::generator_states", mutates_args=())
def generator_states(x: Tensor) -> list[Tensor]:
    """A copy of x, and the states of torch's global random generators.

    What is drawn later must read the copy: compilers put an operator where its results are needed.
    """
    return [x.clone(), torch.get_rng_state(), *(state.clone() for state in accelerator_states())]


@generator_states.register_fake
def _(x: Tensor) -> list[Tensor]:
    with _disable_current_modes():  # the lengths of the states themselves are wanted
        lengths = [len(state) for state in (torch.get_rng_state(), *accelerator_states())]
    return [torch.empty_like(x), *(torch.empty(length, dtype=torch.uint8, device="cpu") for length in lengths)]


generator_states.register_autograd(lambda ctx, deltas: deltas[0])


@torch.library.custom_op("fxsparse::squares_again", mutates_args=())
def squares_again(
    number: int,
    text: str,
    training: str,
    inputs: list[Tensor],
    outputs: list[Tensor],
    deltas: list[Tensor],
    states: list[Tensor],
    statistics: list[Tensor],
) -> list[Tensor]:
    """Run a module again and give what belongs to each statistic."""
    flags = [flag == "1" for flag in training]
    with _differentiable():
        found = _runners[number].squares_of(read_back(text, inputs), flags, outputs, deltas, states)
    return [value.contiguous() for value in found]


@squares_again.register_fake
def _(
    number: int,
    text: str,
    training: str,
    inputs: list[Tensor],
    outputs: list[Tensor],
    deltas: list[Tensor],
    states: list[Tensor],
    statistics: list[Tensor],
) -> list[Tensor]:
    return [torch.empty_like(statistic) for statistic in statistics]


@contextlib.contextmanager
def _differentiable() -> Iterator[None]:
    """Operators are recorded by autograd again, which is off inside of a registered operator."""
    keys = torch._C.DispatchKey
    off = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.ADInplaceOrView):
        if off.has(key):
            off = off.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), off):
        yield


class AgainCompiled(torch.autograd.Function):
    """The outputs as they are, and the squares of what read the inputs."""

    @staticmethod
    def forward(
        ctx: Any, number: int, text: str, training: str, counts: tuple[int, int, int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """`tensors` are outputs, inputs, states of generators and statistics, with `counts` of the first three."""
        ctx.save_for_backward(*tensors)
        ctx.number, ctx.text, ctx.training, ctx.counts = number, text, training, counts
        return tuple(y.view_as(y) for y in tensors[: counts[0]])

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Any, ...]:
        """The gradients of the outputs, and squares for the statistics."""
        y, x, g = ctx.counts
        tensors = list(ctx.saved_tensors)
        found = squares_again(
            ctx.number,
            ctx.text,
            ctx.training,
            tensors[y : y + x],
            tensors[:y],
            list(deltas),
            tensors[y + x : y + x + g],
            tensors[y + x + g :],
        )
        return None, None, None, None, *deltas, *[None] * (x + g), *found
