"""Batches as curvature reads them: inputs, targets, and pieces of whole samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxsparse.curvature.fisher_batch import FisherBatch, moved
from fxsparse.errors import ConfigError, DataError
from fxsparse.graph.inputs import split_inputs, tensors_of

Output = Callable[[Any], Tensor]
"""The tensor of logits or predictions [N, ...] among what the model returns."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples.

    Attributes:
        read: The inputs, what the loss gets beside the outputs, and which of them have the samples along axis 0.
        start: Number of samples of the data before the first one.
        shifted: Whether outputs at a position predict the next one; the targets have been moved, masks have not.
        part: Whether samples of the batch that was given are missing.
    """

    read: FisherBatch
    start: int = 0
    shifted: bool = False
    part: bool = False

    @property
    def samples(self) -> int:
        """Their number N."""
        return self.read.samples

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments."""
        return self.read.args, self.read.kwargs

    @property
    def targets(self) -> Any:
        """What the loss gets beside the outputs; None where there are no labels."""
        return self.read.targets

    def sharing(self, numbers: frozenset[int]) -> Batch:
        """The same where these tensors of the inputs belong to every sample, whatever their length."""
        return replace(self, read=self.read.sharing(numbers)) if numbers else self

    def pieces(self, size: int | None) -> Iterator[Batch]:
        """Consecutive pieces of at most `size` samples."""
        size = self.samples if size is None else size
        for first in range(0, self.samples, max(size, 1)):
            yield self.cut(first, min(first + size, self.samples))

    def cut(self, first: int, last: int) -> Batch:
        """The samples from `first` up to `last`."""
        if not first and last == self.samples:
            return self
        return replace(self, read=self.read.select(list(range(first, last))), start=self.start + first, part=True)

    def some(self, most: int) -> Batch:
        """At most so many samples, from all over the batch."""
        if most >= self.samples:
            return self
        places = torch.linspace(0, self.samples - 1, most).long().tolist()
        return replace(self, read=self.read.select(places), part=True)

    def leaves(self) -> tuple[list[Any], list[int | None], Any]:
        """The leaves of the inputs, the sample axis of each (0 or None), and how they are put together again."""
        leaves, form = pytree.tree_flatten(self.inputs)
        return leaves, self.read.sample_axes(), form


class Data:
    """Batches that can be read again and again, on the model's device.

    Args:
        batches: An iterable of `(inputs, targets)` pairs, of mappings whose entry `labels` is the target (of the next
            position, where it is [N, T]), or of inputs alone; or one such pair. A list of two tensors that are not of
            one dtype and number of axes is a pair, too. An iterator is kept. Inputs are one tensor, a tuple of
            positional ones, `(args, kwargs)` or a mapping of keywords.
        device: Where tensors are moved.
        ignored: The label that does not count, for the last position of shifted labels.

    Raises:
        ConfigError: it holds no batch, or one without tensors.
        DataError: a batch has more than inputs and targets; while it is read.
    """

    def __init__(self, batches: Any, device: torch.device, ignored: int = -100) -> None:
        pair = isinstance(batches, tuple) and len(batches) == 2 and isinstance(batches[1], Tensor)
        if isinstance(batches, tuple) and len(batches) > 2 and all(isinstance(each, Tensor) for each in batches):
            raise DataError(_entries("data", batches))
        if isinstance(batches, list) and len(batches) == 2 and all(isinstance(each, Tensor) for each in batches):
            kinds = {(each.dtype, each.ndim) for each in batches}
            pair, batches = (True, tuple(batches)) if len(kinds) > 1 else (False, batches)  # as loaders give them
        if isinstance(batches, Tensor | Mapping) or (pair and isinstance(batches[0], Tensor | tuple | Mapping)):
            batches = [batches]
        if not isinstance(batches, Iterable):
            raise ConfigError(f"`data` (={type(batches).__name__}) must be batches: an iterable of (inputs, targets)")
        self.batches: Iterable[Any] = tuple(batches) if isinstance(batches, Iterator) else batches
        self.device, self.ignored = device, ignored
        self._shared: dict[Any, frozenset[int]] = {}  # by the form of the inputs

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        for given in self.batches:
            batch = self._read(given, start)
            start += batch.samples
            if batch.samples:
                yield batch
        if not start:
            raise ConfigError("`data` (=no samples) must hold at least one batch")

    def __len__(self) -> int:
        return len(self.batches) if isinstance(self.batches, Sized) else sum(1 for _ in self)

    def _read(self, given: Any, start: int) -> Batch:
        if isinstance(given, Mapping) and "labels" in given:
            inputs: Any = {name: value for name, value in given.items() if name != "labels"}
            targets: Any = given["labels"]
        elif isinstance(given, tuple | list):
            if not 1 <= len(given) <= 2:
                raise DataError(_entries("batch", given))
            inputs, targets = given[0], given[1] if len(given) > 1 else None
        else:
            inputs, targets = given, None
        inputs, leaves = moved(_call(inputs), self._moved)
        targets, _ = moved(targets, self._moved)
        lengths = [leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
        if not lengths:
            raise ConfigError(f"a batch's inputs (={type(given).__name__}) hold no tensor with samples along axis 0")
        if isinstance(targets, Tensor) and targets.ndim and targets.shape[0] in lengths:
            lengths = [targets.shape[0]]
        shifted = isinstance(given, Mapping) and isinstance(targets, Tensor) and targets.ndim == 2
        if shifted and not targets.is_floating_point():
            last = torch.full_like(targets[:, :1], self.ignored)
            targets = torch.cat([targets[:, 1:], last], 1)
        else:
            shifted = False
        args, kwargs = inputs
        read = FisherBatch(args, kwargs, targets, None, lengths[0], False)
        return Batch(self._with_known(read), start, shifted)

    def _with_known(self, read: FisherBatch) -> FisherBatch:
        """The batch, whose inputs that belonged to every sample of other batches do so here too."""
        found = read.shared()
        if self._shared:
            found |= self._shared.get(read.form(), frozenset())
        if found:
            self._shared[read.form()] = found
        return read.sharing(found)

    def _moved(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; one of inference mode, which autograd does not take, as a copy."""
        moved = tensor.to(self.device)
        if not moved.is_inference():
            return moved
        with torch.inference_mode(False):
            return moved.clone()


def _call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), {str(name): value for name, value in inputs.items()}
    return split_inputs(tuple(inputs)) if isinstance(inputs, tuple | list) else ((inputs,), {})


def _entries(name: str, given: Sized) -> str:
    return (
        f"`{name}` (={len(given)} entries) must be (inputs, targets): give several inputs as ((x1, x2), y), several "
        "targets as (x, (y1, y2)), several batches as a list"
    )


def one_output(returned: Any) -> Tensor:
    """The logits among what a model returns: the tensor itself, the entry `logits`, or the only floating one.

    Raises:
        ConfigError: there are several floating-point tensors and none is called logits.
    """
    if isinstance(returned, Tensor):
        return returned
    named = returned.get("logits") if isinstance(returned, Mapping) else getattr(returned, "logits", None)
    if isinstance(named, Tensor):
        return named
    found = [tensor for tensor in tensors_of(returned) if tensor.is_floating_point()]
    if len(found) != 1:
        raise ConfigError(
            f"the model returns {type(returned).__name__} with {len(found)} floating-point tensors; give `output`, a "
            "function that takes the logits out of it"
        )
    return found[0]
