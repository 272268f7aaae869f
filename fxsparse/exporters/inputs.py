"""Example inputs as a flat list of tensors: names, the batch axis, and random inputs of the same kind."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxsparse.errors import ConfigError, ExportError
from fxsparse.graph import split_inputs

BATCH = "batch"
"""The name of the batch axis in a file."""

_HOLE = object()


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors inside ``(args, kwargs)``, and the way back.

    Attributes:
        tensors: the tensors of the example in the order of the flattened ``(args, kwargs)``.
        names: one valid, unique ONNX name for each tensor, from the parameter names of `forward`.
        constants: ``name (=value)`` of every input that is no tensor; ONNX bakes these into the graph.
        batched: positions in `tensors` whose axis 0 is the batch; empty when the batch size is fixed.
        reason: why the batch size is fixed; empty when it is not.
        complexes: positions in `tensors` that are complex for the model, and pairs of numbers on a last axis here.
        free: name of every other free axis -> where it is, (position in `tensors`, axis), of one size everywhere.
    """

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    constants: tuple[str, ...]
    batched: frozenset[int]
    reason: str
    complexes: frozenset[int]
    _leaves: tuple[Any, ...]  # _HOLE where a tensor goes
    _spec: pytree.TreeSpec
    free: Mapping[str, frozenset[tuple[int, int]]] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Batch size of the example; 1 where no input has a batch axis."""
        return int(self.tensors[min(self.batched)].shape[0]) if self.batched else 1

    def build(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put `tensors` in the places of the example's: ``(args, kwargs)``."""
        given = iter(torch.view_as_complex(t) if i in self.complexes else t for i, t in enumerate(tensors))
        leaves = [next(given) if leaf is _HOLE else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return args, kwargs

    def resized(self, size: int) -> list[Tensor]:
        """The example at another batch size: its rows, repeated or cut."""
        return [_rows(t, size) if i in self.batched else t.clone() for i, t in enumerate(self.tensors)]

    def draw(self, size: int, generator: torch.Generator, width: float = 1.0, shift: float = 0.0) -> list[Tensor]:
        """Random inputs of the example's kind at batch size `size`.

        Floating inputs are normal with the example's mean and deviation times `width`, moved by `shift` such
        deviations; uniform over the example's range where it has one sign, so that logarithms and roots stay defined.
        Integers and booleans are drawn from the example's own values, so that they stay valid indices.
        """
        return [_like(t, generator, width, shift) for t in self.resized(size)]

    def vary(self, size: int, generator: torch.Generator) -> list[Tensor]:
        """Inputs close to the example at batch size `size`: its rows in random order, its floats moved by 5 %.

        Integers and booleans stay in their rows, so that whatever relations they have within a row hold on.
        """
        order = torch.randperm(size, generator=generator)
        moved = [t[order] if i in self.batched else t for i, t in enumerate(self.resized(size))]
        return [_nudged(t, 0.05, generator) for t in moved]

    def rounded(self, tensors: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
        """`tensors`, their floats moved by about one unit in the last place."""
        return [_nudged(t, torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0, generator) for t in tensors]

    def fixed(self, reason: str) -> Inputs:
        """The same inputs without a batch axis, or any other free one."""
        return replace(self, batched=frozenset(), reason=reason, free={})

    def lengths(self) -> dict[str, int]:
        """The sizes of the free axes beside the batch, by name."""
        return {name: self.tensors[i].shape[axis] for name, at in self.free.items() for i, axis in list(at)[:1]}

    def at(self, lengths: Mapping[str, int]) -> Inputs:
        """The same example with other sizes of free axes: its entries there, repeated or cut."""
        tensors = list(self.tensors)
        for name, size in lengths.items():
            for i, axis in self.free[name]:
                tensors[i] = _along(tensors[i], axis, size)
        return replace(self, tensors=tuple(tensors))

    def axes(self) -> dict[int, dict[int, str]]:
        """Position in `tensors` -> its free axes, by name; the batch is "batch"."""
        found: dict[int, dict[int, str]] = {i: {0: BATCH} for i in sorted(self.batched)}
        for name, at in self.free.items():
            for i, axis in sorted(at):
                found.setdefault(i, {})[axis] = name
        return found

    def read(self, item: Any) -> list[Tensor]:
        """The tensors of other inputs of the same kind, on the CPU; a bare tensor stands for a tuple of one.

        Raises:
            ConfigError: when the form, a dtype or a shape (but for the free axes) is another; the message begins with
                what was found.
        """
        args, kwargs = split_inputs((item,) if isinstance(item, Tensor) else item)
        known = self.build(self.tensors)[1]
        ordered = {name: kwargs[name] for name in known if name in kwargs} | kwargs
        leaves, spec = pytree.tree_flatten((args, ordered))
        if spec != self._spec:
            raise ConfigError(f"it holds {len(leaves)} values in another structure than the example inputs")
        given = [leaf for leaf, own in zip(leaves, self._leaves, strict=True) if own is _HOLE]
        if not all(isinstance(leaf, Tensor) for leaf in given):
            raise ConfigError(f"it holds {', '.join(type(leaf).__name__ for leaf in given)} where tensors are needed")
        tensors = [leaf.detach().cpu() for leaf in given]
        return [
            _checked(torch.view_as_real(t.resolve_conj()) if t.is_complex() else t, own, name, axes)
            for t, own, name, axes in zip(tensors, self.tensors, self.names, self._free_axes(), strict=True)
        ]

    def _free_axes(self) -> list[set[int]]:
        axes = self.axes()
        return [set(axes.get(i, ())) for i in range(len(self.tensors))]


def read_inputs(model: nn.Module, example_inputs: Any) -> Inputs:
    """Flatten `example_inputs`, on the CPU, and find the batch axis by running `model` on one more row.

    The inputs have no other free axis; see `fxsparse.exporters.axes.with_axes`.

    Args:
        model: the model in eval mode on the CPU; it is run without gradients.
        example_inputs: a tuple of positional inputs, or ``(args, kwargs)``.

    Raises:
        ConfigError: when `example_inputs` is of another form.
        ExportError: when the model fails on the example itself, or there is no tensor among the inputs.
    """
    args, kwargs = split_inputs(example_inputs)
    flat, spec = pytree.tree_flatten((args, kwargs))
    leaves = tuple(leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf for leaf in flat)
    names = _unique(_names(model, args, kwargs, len(leaves)))
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    complexes = frozenset(i for i, leaf in enumerate(given) if leaf.is_complex())
    tensors = tuple(torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf for leaf in given)
    if not tensors:
        raise ExportError("`example_inputs` holds no tensor: give the tensors that `forward` takes, `(x,)` for one")
    inputs = Inputs(
        tensors=tensors,
        names=tuple(n for n, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Tensor)),
        constants=tuple(
            f"`{name}` (={str(leaf)[:80]})"
            for name, leaf in zip(names, leaves, strict=True)
            if not isinstance(leaf, Tensor | None)
        ),
        batched=frozenset(),
        reason="",
        complexes=complexes,
        _leaves=tuple(_HOLE if isinstance(leaf, Tensor) else leaf for leaf in leaves),
        _spec=spec,
    )
    failure = failure_of(model, inputs, tensors)
    if failure:
        raise ExportError(f"the model fails on `example_inputs` ({failure}): give inputs that `forward` takes")
    return _with_batch(model, inputs)


def _with_batch(model: nn.Module, inputs: Inputs) -> Inputs:
    sized = [i for i, t in enumerate(inputs.tensors) if t.ndim]
    if not sized:
        return inputs.fixed("no input has an axis")
    size = inputs.tensors[sized[0]].shape[0]
    if size == 0:
        raise ConfigError("`example_inputs` has a batch of size 0: give at least one sample")
    failure = ""
    for choice in ([i for i in sized if inputs.tensors[i].shape[0] == size], sized[:1]):
        tried = replace(inputs, batched=frozenset(choice))
        failure = failure_of(model, tried, tried.resized(size + 1))
        if not failure:
            return tried
    return inputs.fixed(f"the model fails at batch size {size + 1}: {failure}")


def failure_of(model: nn.Module, inputs: Inputs, tensors: Sequence[Tensor]) -> str:
    """Why `model` fails on `tensors`, in one line; empty where it runs."""
    args, kwargs = inputs.build([tensor.clone() for tensor in tensors])
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:  # whatever the user's forward raises is the reason
        return first_line(error)
    return ""


def first_line(error: BaseException) -> str:
    """The type and the first line of an error that has one, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _positional_names(model: nn.Module, args: tuple[Any, ...]) -> list[str]:
    parameters = list(inspect.signature(model.forward).parameters.values())
    names = []
    for i in range(len(args)):
        variadic = next((p for p in parameters[: i + 1] if p.kind is p.VAR_POSITIONAL), None)
        if variadic is not None:
            names.append(f"{variadic.name}_{i - parameters.index(variadic)}")
        else:
            names.append(parameters[i].name if i < len(parameters) else f"input_{i}")
    return names


def _names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> list[str]:
    try:
        paths = [path for path, _ in pytree.tree_flatten_with_path((args, kwargs))[0]]
    except ValueError:  # a registered class that cannot name its parts
        return [f"input_{i}" for i in range(count)]
    positional = _positional_names(model, args)
    return [_name(path, positional) for path in paths]


def _name(path: tuple[Any, ...], positional: list[str]) -> str:
    keys = [str(getattr(k, "idx", getattr(k, "key", getattr(k, "name", k)))) for k in path]
    first = positional[int(keys[1])] if keys[0] == "0" else keys[1]
    return re.sub(r"\W", "_", "_".join([first, *keys[2:]]))


def _unique(names: Sequence[str]) -> list[str]:
    taken: list[str] = []
    for name in names:
        count, fresh = 1, name
        while fresh in taken:
            fresh, count = f"{name}_{count}", count + 1
        taken.append(fresh)
    return taken


def _rows(tensor: Tensor, size: int) -> Tensor:
    return tensor[torch.arange(size) % tensor.shape[0]].contiguous()


def _along(tensor: Tensor, axis: int, size: int) -> Tensor:
    return tensor.index_select(axis, torch.arange(size) % tensor.shape[axis]).contiguous()


def _checked(tensor: Tensor, own: Tensor, name: str, free: set[int]) -> Tensor:
    if tensor.dtype != own.dtype:
        raise ConfigError(f"input `{name}` is {tensor.dtype} in place of {own.dtype}")
    wanted = ", ".join("any" if axis in free else str(size) for axis, size in enumerate(own.shape))
    fits = tensor.ndim == own.ndim and all(
        a == b or (axis in free and a > 0) for axis, (a, b) in enumerate(zip(tensor.shape, own.shape, strict=True))
    )
    if not fits:
        raise ConfigError(f"input `{name}` has shape {tuple(tensor.shape)} in place of ({wanted})")
    return tensor


def _nudged(tensor: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Every float plus or minus up to `share` of itself; what is neither float nor finite stays."""
    if not tensor.is_floating_point():
        return tensor
    noise = 2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 1
    return (tensor.double() * (1 + share * noise)).to(tensor.dtype)


def _like(example: Tensor, generator: torch.Generator, width: float, shift: float) -> Tensor:
    if not example.is_floating_point():
        flat = example.flatten()
        if not flat.numel() or example.is_complex():
            return example
        return flat[torch.randint(flat.numel(), example.shape, generator=generator)]
    values = example.double()
    finite = values[values.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
    if low == high == 0.0:
        drawn = torch.randn(example.shape, generator=generator, dtype=torch.float64) * width + shift * width
    elif low < 0.0 < high:
        noise = torch.randn(example.shape, generator=generator, dtype=torch.float64)
        drawn = finite.mean() + finite.std(correction=0) * width * (noise + shift)
    else:
        low, high = (low, high) if low < high else (min(0.0, 2 * low), max(0.0, 2 * low))
        drawn = low + (high - low) * torch.rand(example.shape, generator=generator, dtype=torch.float64)
    return drawn.to(example.dtype)
