"""Batches as the collector reads them: the call, the targets, and which units count."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxsparse.curvature.losses import OutputLoss
from fxsparse.errors import DataError
from fxsparse.graph.inputs import split_inputs


@dataclass(frozen=True, eq=False)
class FisherBatch:
    """Some samples along axis 0 of the tensors that have their number as length; other tensors belong to every sample.

    Attributes:
        args: positional inputs of the model.
        kwargs: keyword inputs of the model.
        targets: what the loss gets beside the outputs; None where there are no labels.
        mask: [N, T], which positions count; None where all do.
        samples: their number N.
        shift: whether the outputs at a position predict the next one, so that targets and mask move by one.
        own: of each leaf of (args, kwargs, targets, mask), whether it has the samples along axis 0; by its length where
            it is not given.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any
    mask: Tensor | None
    samples: int
    shift: bool
    own: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if not self.own:
            leaves = [*self._inputs[0], *pytree.tree_leaves((self.targets, self.mask))]
            object.__setattr__(self, "own", tuple(map(self._fits, leaves)))

    @cached_property
    def _inputs(self) -> tuple[list[Any], Any]:
        return pytree.tree_flatten((self.args, self.kwargs))

    def _fits(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self.samples

    def select(self, rows: list[int]) -> FisherBatch:
        """The samples at these places."""
        leaves, form = pytree.tree_flatten((self.args, self.kwargs, self.targets, self.mask))
        chosen = [leaf[rows] if own else leaf for leaf, own in zip(leaves, self.own, strict=True)]
        args, kwargs, targets, mask = pytree.tree_unflatten(chosen, form)
        return FisherBatch(args, kwargs, targets, mask, len(rows), self.shift, self.own)

    def shared(self) -> frozenset[int]:
        """Numbers of the inputs' tensors that belong to every sample."""
        leaves = self._inputs[0]
        return frozenset(
            k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim and not self.own[k]
        )

    def sharing(self, numbers: Collection[int]) -> FisherBatch:
        """The same where these tensors of the inputs belong to every sample, whatever their length."""
        if not any(own and k in numbers for k, own in enumerate(self.own)):
            return self
        return replace(self, own=tuple(own and k not in numbers for k, own in enumerate(self.own)))

    def ambiguous(self) -> dict[int, str]:
        """Numbers and names of the inputs that have as many rows as there are samples, where there are several."""
        leaves, _ = pytree.tree_flatten_with_path((self.args, self.kwargs))
        found = {}
        for k, (path, _) in enumerate(leaves):
            if self.own[k]:
                place = pytree.keystr(path)
                found[k] = f"args{place[3:]}" if place.startswith("[0]") else f"kwargs{place[3:]}"
        return found if len(found) > 1 else {}

    def form(self) -> Any:
        """What batches of the same call have in common."""
        return self._inputs[1]

    def pieces(self, size: int) -> Iterator[FisherBatch]:
        """Consecutive pieces of at most `size` samples."""
        if size >= self.samples:
            yield self
            return
        for first in range(0, self.samples, size):
            yield self.select(list(range(first, min(first + size, self.samples))))

    def fresh(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies of the inputs, into which a model may write, without gradients."""
        return self.copied()[:2]

    def copied(self) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
        """The same, and the tensors among them in their order."""
        leaves, form = self._inputs
        copies = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(copies, form)
        return args, kwargs, [leaf for leaf in copies if isinstance(leaf, Tensor)]

    def sample_axes(self) -> list[int | None]:
        """Of each leaf of (args, kwargs), its axis of samples: 0 or None."""
        return [0 if own else None for own in self.own[: len(self._inputs[0])]]

    def aligned(self, loss: OutputLoss, z: Tensor) -> tuple[Any, Tensor]:
        """The targets like z and the units that count, bool [N, positions...]: shifted, masked, not ignored.

        Raises:
            DataError: the mask does not fit the outputs.
        """
        targets = self.targets
        if self.shift and isinstance(targets, Tensor):
            last = torch.full_like(targets[:, :1], getattr(loss, "ignore_index", -100))
            targets = torch.cat([targets[:, 1:], last], dim=1)
        valid = loss.valid(z, targets if isinstance(targets, Tensor) else None)
        if self.shift and isinstance(targets, Tensor):
            valid = valid.clone()
            valid[:, -1] = False
        if self.mask is not None and valid.ndim > 1:  # outputs of whole samples have no positions to be left out
            mask = self.mask.to(device=z.device) != 0
            if self.shift and isinstance(targets, Tensor):
                mask = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
            if mask.shape != valid.shape:
                raise DataError(
                    f"the attention mask (={tuple(mask.shape)}) must have the shape of the units, {tuple(valid.shape)}"
                )
            valid = valid & mask
        return targets, valid


def read_batch(batch: Any, device: torch.device, mask_name: str = "attention_mask") -> FisherBatch:
    """Read a batch.

    Args:
        batch: ``(inputs, targets)``, where inputs are one tensor, a tuple of positional ones, ``(args, kwargs)`` or a
            mapping of keywords; a mapping of keywords, whose entry ``labels`` holds targets that are shifted by one
            where they are [N, T]; or inputs alone.
        device: where tensors are moved.
        mask_name: the keyword whose tensor [N, T] tells which positions count.

    Raises:
        DataError: it holds no tensor, or more than inputs and targets.
    """
    if isinstance(batch, FisherBatch):
        return batch
    targets: Any = None
    inputs, shift = batch, False
    if isinstance(batch, Mapping):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        targets = batch.get("labels")
        shift = isinstance(targets, Tensor) and targets.ndim == 2 and not targets.is_floating_point()
    elif isinstance(batch, (tuple, list)):
        if not batch:
            raise DataError("`batch` (=()) must hold inputs")
        if len(batch) > 2:
            raise DataError(
                f"`batch` (={len(batch)} entries) must be (inputs, targets): give several inputs as ((x1, x2), y), "
                "several targets as (x, (y1, y2))"
            )
        inputs, targets = batch[0], batch[1] if len(batch) == 2 else None
    args, kwargs = _call(inputs)
    (args, kwargs), leaves = moved((args, kwargs), lambda tensor: tensor.to(device))
    targets, _ = moved(targets, lambda tensor: tensor.to(device))
    lengths = [leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
    if isinstance(targets, Tensor) and targets.ndim and targets.shape[0] in lengths:
        lengths = [targets.shape[0]]
    if not lengths:
        raise DataError(f"`batch` (={type(batch).__name__}) holds no tensor with samples along axis 0")
    return FisherBatch(args, kwargs, targets, kwargs.get(mask_name), lengths[0], shift)


def moved(tree: Any, move: Callable[[Tensor], Tensor]) -> tuple[Any, list[Any]]:
    """A structure whose tensors were moved, and its leaves; itself where none is another one then."""
    leaves, form = pytree.tree_flatten(tree)
    there = [move(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    same = all(one is other for one, other in zip(there, leaves, strict=True))
    return tree if same else pytree.tree_unflatten(there, form), there


def _call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), {str(name): value for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return split_inputs(tuple(inputs))
    return (inputs,), {}
