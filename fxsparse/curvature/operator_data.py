"""Batches as curvature reads them: inputs, targets, and pieces of whole samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxsparse.errors import ConfigError, DataError
from fxsparse.graph.inputs import tensors_of
from fxsparse.training.batches import call as call

Output = Callable[[Any], Tensor]
"""The tensor of logits or predictions [N, ...] among what the model returns."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples.

    Attributes:
        inputs: A tensor, a tuple of positional or a mapping of keyword arguments.
        targets: What the loss gets beside the outputs; None where there are no labels.
        samples: Their number N: the length of the first tensor. Tensors of that length are cut along axis 0; others
            belong to every sample.
        start: Number of samples of the data before the first one.
        shifted: Whether outputs at a position predict the next one; the targets have been moved, masks have not.
    """

    inputs: Any
    targets: Any
    samples: int
    start: int = 0
    shifted: bool = False

    def pieces(self, size: int | None) -> Iterator[Batch]:
        """Consecutive pieces of at most `size` samples."""
        if size is None or size >= self.samples:
            yield self
            return
        for first in range(0, self.samples, size):
            yield self.cut(first, min(first + size, self.samples))

    def cut(self, first: int, last: int) -> Batch:
        """The samples from `first` up to `last`."""
        inputs, targets = self._mapped(lambda tensor: tensor[first:last])
        return Batch(inputs, targets, last - first, self.start + first, self.shifted)

    def some(self, most: int) -> Batch:
        """At most so many samples, from all over the batch."""
        places = torch.linspace(0, self.samples - 1, min(most, self.samples)).long().tolist()
        inputs, targets = self._mapped(lambda tensor: tensor[places])
        return Batch(inputs, targets, len(places), self.start, self.shifted)

    def leaves(self) -> tuple[list[Any], list[int | None], Any]:
        """The leaves of (inputs, targets), the sample axis of each (0 or None), and how they are put together again."""
        leaves, form = pytree.tree_flatten((self.inputs, self.targets))
        return leaves, [0 if self.belongs(leaf) else None for leaf in leaves], form

    def belongs(self, leaf: Any) -> bool:
        """Whether a leaf is taken to have the samples along its first axis."""
        return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == self.samples

    def _mapped(self, rule: Callable[[Tensor], Tensor]) -> Any:
        return pytree.tree_map(lambda leaf: rule(leaf) if self.belongs(leaf) else leaf, (self.inputs, self.targets))


class Data:
    """Batches that can be read again and again, on the model's device.

    Args:
        batches: An iterable of `(inputs, targets)` pairs, of mappings whose entry `labels` is the target (of the next
            position, where it is [N, T]), or of inputs alone; or one such pair of tensors. An iterator is kept.
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
        if isinstance(batches, Tensor | Mapping) or (pair and isinstance(batches[0], Tensor | tuple | Mapping)):
            batches = [batches]
        if not isinstance(batches, Iterable):
            raise ConfigError(f"`data` (={type(batches).__name__}) must be batches: an iterable of (inputs, targets)")
        self.batches: Iterable[Any] = tuple(batches) if isinstance(batches, Iterator) else batches
        self.device, self.ignored = device, ignored

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        for given in self.batches:
            batch = self._read(given, start)
            start += batch.samples
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
        inputs, targets = pytree.tree_map(
            lambda leaf: self._moved(leaf) if isinstance(leaf, Tensor) else leaf, (inputs, targets)
        )
        lengths = [tensor.shape[0] for tensor in tensors_of(inputs) if tensor.ndim]
        if not lengths:
            raise ConfigError(f"a batch's inputs (={type(inputs).__name__}) hold no tensor with samples along axis 0")
        shifted = isinstance(given, Mapping) and isinstance(targets, Tensor) and targets.ndim == 2
        if shifted and not targets.is_floating_point():
            last = torch.full_like(targets[:, :1], self.ignored)
            return Batch(inputs, torch.cat([targets[:, 1:], last], 1), lengths[0], start, True)
        return Batch(inputs, targets, lengths[0], start)

    def _moved(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; one of inference mode, which autograd does not take, as a copy."""
        moved = tensor.to(self.device)
        if not moved.is_inference():
            return moved
        with torch.inference_mode(False):
            return moved.clone()


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
