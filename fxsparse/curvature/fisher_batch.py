"""Batches as the collector reads them: the call, the targets, and which units count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxsparse.curvature.losses import OutputLoss
from fxsparse.errors import DataError
from fxsparse.graph.inputs import fresh_inputs, split_inputs, tensors_of


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
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any
    mask: Tensor | None
    samples: int
    shift: bool

    def select(self, rows: list[int]) -> FisherBatch:
        """The samples at these places."""

        def chosen(value: Any) -> Any:
            return value[rows] if self._belongs(value) else value

        args, kwargs, targets, mask = pytree.tree_map(chosen, (self.args, self.kwargs, self.targets, self.mask))
        return FisherBatch(args, kwargs, targets, mask, len(rows), self.shift)

    def pieces(self, size: int) -> Iterator[FisherBatch]:
        """Consecutive pieces of at most `size` samples."""
        if size >= self.samples:
            yield self
            return
        for first in range(0, self.samples, size):
            yield self.select(list(range(first, min(first + size, self.samples))))

    def fresh(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies of the inputs, into which a model may write, without gradients."""
        args, kwargs = fresh_inputs(self.args, self.kwargs)
        for tensor in tensors_of((args, kwargs)):
            tensor.requires_grad_(False)
        return args, kwargs

    def sample_axes(self, tree: Any) -> Any:
        """Which leaves have an axis of samples: 0 or None, in the structure of the tree."""
        return pytree.tree_map(lambda leaf: 0 if self._belongs(leaf) else None, tree)

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
        if self.mask is not None:
            mask = self.mask.to(device=z.device) != 0
            if self.shift and isinstance(targets, Tensor):
                mask = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
            if mask.shape != valid.shape:
                raise DataError(
                    f"the attention mask (={tuple(mask.shape)}) must have the shape of the units, {tuple(valid.shape)}"
                )
            valid = valid & mask
        return targets, valid

    def _belongs(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self.samples


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
    args, kwargs, targets = pytree.tree_map(
        lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, (args, kwargs, targets)
    )
    lengths = [tensor.shape[0] for tensor in tensors_of((args, kwargs)) if tensor.ndim]
    if isinstance(targets, Tensor) and targets.ndim and targets.shape[0] in lengths:
        lengths = [targets.shape[0]]
    if not lengths:
        raise DataError(f"`batch` (={type(batch).__name__}) holds no tensor with samples along axis 0")
    return FisherBatch(args, kwargs, targets, kwargs.get(mask_name), lengths[0], shift)


def _call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), {str(name): value for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return split_inputs(tuple(inputs))
    return (inputs,), {}
