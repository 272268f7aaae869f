"""The curvature at a model's outputs: what stands between J and J^T, whatever J is."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fxsparse.curvature.losses import OutputLoss
from fxsparse.curvature.operator_data import Batch
from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity.random import generator


class Curvature(enum.Enum):
    """Which matrix; M is the number of samples, or of valid tokens."""

    GGN = "ggn"
    """(1/M) sum J^T H J, H the loss's Hessian at the outputs."""
    FISHER = "fisher"
    """The true Fisher (1/M) sum E_y[grad log p grad log p^T]: the GGN, of losses that have a likelihood."""
    FISHER_MC = "fisher_mc"
    """The same with the expectation over drawn labels; the draws are kept, so that the operator is one matrix."""
    EMPIRICAL = "empirical"
    """(1/M) sum g g^T over units, g the gradient of the unit's loss at the data's label."""
    HESSIAN = "hessian"
    """(1/M) sum of the Hessians of the units' losses; may be indefinite."""

    @classmethod
    def of(cls, kind: object) -> Curvature:
        """The kind itself, or the one of that value; `FisherType` members are understood.

        Raises:
            ConfigError: there is none of that name.
        """
        value = getattr(kind, "value", kind)
        known = {"true": "fisher", "exact": "fisher", "mc": "fisher_mc"}
        try:
            return cls(known.get(value, value) if isinstance(value, str) else value)
        except ValueError:
            names = ", ".join(each.value for each in cls)
            raise ConfigError(f"`kind` (={kind!r}) must be one of {names}") from None


@dataclass(frozen=True, eq=False)
class OutputCurvature:
    """The matrix B of each sample at its outputs, block diagonal over samples.

    Attributes:
        kind: Which one.
        loss: The loss.
        tokens: Whether a unit is a position of the outputs; else a sample.
        draws: Labels drawn for each unit (FISHER_MC).
        seed: Seed of the draws; a sample's draws depend on its place in the data alone.
    """

    kind: Curvature
    loss: OutputLoss
    tokens: bool = False
    draws: int = 1
    seed: int = 0
    _loss_of_next: OutputLoss = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_loss_of_next", self.loss.of_next())

    def loss_of(self, batch: Batch) -> OutputLoss:
        """The loss, of next labels where the batch's labels have been moved."""
        return self._loss_of_next if batch.shifted else self.loss

    def valid(self, z: Tensor, batch: Batch) -> Bool[Tensor, "n ..."]:
        """Which units count: not ignored by the loss and, where the inputs have an `attention_mask`, inside it.

        Raises:
            DataError: outputs without further axes are not one of each sample; or those of a part of a batch do not
                have its samples along axis 0.
        """
        if z.ndim < 2 and z.shape != (batch.samples,) or batch.part and z.shape[0] != batch.samples:
            raise DataError(
                f"the outputs (={tuple(z.shape)}) must have the {batch.samples} samples along axis 0: give batches, "
                "not single samples, and the outputs, not their loss"
            )
        valid = self.loss_of(batch).valid(z, batch.targets)
        mask = batch.inputs[1].get("attention_mask")
        if not isinstance(mask, Tensor) or mask.shape != valid.shape:
            return valid
        if batch.shifted:
            mask = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
        return valid & mask.bool()

    def units(self, z: Tensor, batch: Batch) -> int:
        """M of a batch: its valid tokens, or its samples that have one."""
        valid = self.valid(z, batch)
        return (
            int(valid.sum()) if self.tokens else int(valid.flatten(1).any(1).sum() if valid.ndim > 1 else valid.sum())
        )

    def total(self, z: Tensor, batch: Batch) -> Tensor:
        """The sum of the losses of all valid units."""
        loss = self.loss_of(batch)
        valid = loss.valid(z, batch.targets)
        if bool((self.valid(z, batch) != valid).any()):
            raise DataError(
                "the attention mask leaves out positions that have a label: set their label to the loss's ignore_index"
            )
        return loss.value(z, batch.targets)

    def slope(self, z: Tensor, batch: Batch) -> Tensor:
        """The gradient of the losses of all valid units at z."""
        return self.loss_of(batch).gradient(z, batch.targets)

    def bend(self, z: Tensor, u: Tensor, batch: Batch) -> Tensor:
        """B u, like z.

        Raises:
            UnsupportedLoss: the loss has no likelihood, or no Hessian.
        """
        if self.kind in (Curvature.GGN, Curvature.FISHER):
            self._check(z, batch)
            return self._kept(self.loss_of(batch).hessian_product(z, batch.targets, u), z, batch)
        bent = torch.zeros_like(z)
        for slope in self.slopes(z, batch):
            along = self._per_unit((slope * u), z, batch)
            bent = bent + slope * along
        return bent

    def slopes(self, z: Tensor, batch: Batch) -> Iterator[Float[Tensor, "n ..."]]:
        """Gradients of unit losses whose outer products are the matrix: of the data's labels, or of drawn ones."""
        if self.kind is Curvature.EMPIRICAL:
            yield self._kept(self.slope(z, batch), z, batch)
            return
        for draw in range(self.draws):
            yield self._kept(self._drawn(z, batch, draw), z, batch) / math.sqrt(self.draws)

    def columns(self, z: Tensor, batch: Batch) -> Iterator[Float[Tensor, "n ..."]]:
        """Vectors a_k, like z, with B = sum_k a_k a_k^T in every sample; zero columns are left out.

        Raises:
            ConfigError: the Hessian of the parameters has none.
            UnsupportedLoss: the loss has no square root of its Hessian.
        """
        if self.kind is Curvature.HESSIAN:
            raise ConfigError("`kind` (=hessian) has no square root at the outputs; use kind='ggn'")
        if self.kind in (Curvature.EMPIRICAL, Curvature.FISHER_MC):
            for slope in self.slopes(z, batch):
                yield from self._positions(slope, z, batch) if self.tokens else (slope,)
            return
        self._check(z, batch)
        loss = self.loss_of(batch)
        for column in range(loss.columns(z, batch.targets)):
            root = self._kept(loss.root_column(z, batch.targets, column), z, batch)
            yield from self._positions(root, z, batch)

    def sketch(self, z: Tensor, batch: Batch, signs: Tensor) -> Float[Tensor, "n ..."]:
        """One vector a with E[a a^T] = B: the square root of B times random signs, one for each output."""
        self._check(z, batch)
        return self._kept(self.loss_of(batch).root_product(z, batch.targets, signs), z, batch)

    def sample(self, z: Tensor, batch: Batch, source: torch.Generator) -> Float[Tensor, "n ..."]:
        """One vector a with E[a a^T] = B: the gradient at labels drawn from the model."""
        return self._kept(self.loss_of(batch).draw_gradient(z, batch.targets, source), z, batch)

    def _check(self, z: Tensor, batch: Batch) -> None:
        if self.kind is Curvature.FISHER:
            self.loss_of(batch).check_natural(z, batch.targets)

    def _drawn(self, z: Tensor, batch: Batch, draw: int) -> Tensor:
        loss = self.loss_of(batch)
        loss.check_natural(z, batch.targets)
        found = []
        for n in range(batch.samples):
            one = batch.cut(n, n + 1)
            source = generator(self.seed, batch.start + n, draw, "curvature_draw")
            if z.device.type != "cpu":
                source = torch.Generator(z.device).manual_seed(source.initial_seed())
            found.append(loss.draw_gradient(z[n : n + 1], one.targets, source))
        return torch.cat(found)

    def _per_unit(self, product: Tensor, z: Tensor, batch: Batch) -> Tensor:
        """The sum over the outputs of each unit, to be multiplied with what is like z."""
        axis = self.loss_of(batch).axis(z, batch.targets)
        axes = (axis,) if self.tokens and z.ndim > 1 else tuple(range(1, z.ndim))
        return product.sum(axes, keepdim=True) if axes else product

    def _positions(self, a: Tensor, z: Tensor, batch: Batch) -> Iterator[Tensor]:
        """One vector for each position: H is block diagonal over them."""
        axis = self.loss_of(batch).axis(z, batch.targets)
        apart = a.movedim(axis, -1) if a.ndim > 1 else a[:, None]
        places = apart.shape[1:-1].numel()
        if places == 1:
            yield a
            return
        flat = apart.reshape(a.shape[0], places, -1)
        for place in range(places):
            if not bool(flat[:, place].any()):
                continue
            alone = torch.zeros_like(flat)
            alone[:, place] = flat[:, place]
            yield alone.reshape(apart.shape).movedim(-1, axis)

    def _kept(self, a: Tensor, z: Tensor, batch: Batch) -> Tensor:
        """Zeros at the units that do not count."""
        if "attention_mask" not in batch.inputs[1]:
            return a  # the loss itself has left them out
        return torch.where(self.loss_of(batch).spread(self.valid(z, batch), z, batch.targets), a, 0.0)
