"""Curvature of a model's weights as they are now: what saliencies read at each mask update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fxsparse.curvature.arguments import check_callable, check_integer, check_kind, check_number, check_one_of, shown
from fxsparse.curvature.dense_storage import check_stored_dense
from fxsparse.curvature.importance import woodfisher_inverse
from fxsparse.curvature.losses import as_loss
from fxsparse.curvature.operator import CurvatureOperator
from fxsparse.curvature.operator_data import Output
from fxsparse.curvature.operator_output import Curvature
from fxsparse.curvature.operator_space import Support
from fxsparse.errors import ConfigError
from fxsparse.nn import masked_weights
from fxsparse.sparsity.counts import check_count
from fxsparse.training.distributed import unwrap

T = TypeVar("T")


class CurvatureSource:
    """A model with a loss and calibration batches; results are kept until the value of a parameter or buffer changes.

    A copy of all values tells that, beside the results.

    Args:
        model: The model that is trained, without wrappers: weights are told by their memory.
        loss: As for `CurvatureOperator`.
        data: Calibration batches, the same at every update and on every rank.
        kind: Of what the diagonal is taken.
        method: "exact", "sketch", "mc" or "hutchinson", see `CurvatureOperator.diag`.
        samples: Draws, for the methods that draw.
        chunk: Most samples at once.
        unit: "sample" or "token".
        seed: Seed of the draws.
        output: Takes the logits out of what the model returns.

    Raises:
        ConfigError: an unknown kind, method or unit, a number out of range, or an argument of another type.
        UnsupportedLoss: the loss is none.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        data: Any,
        *,
        kind: Curvature | str = Curvature.GGN,
        method: str = "exact",
        samples: int = 1,
        chunk: int | None = None,
        unit: str = "sample",
        seed: int = 0,
        output: Output | None = None,
    ) -> None:
        check_kind(model, "model", nn.Module)
        as_loss(loss)
        if not isinstance(data, Iterable):
            raise ConfigError(f"`data` (={shown(data)}) must be batches: an iterable of (inputs, targets)")
        check_one_of(method, "method", ("exact", "sketch", "mc", "hutchinson"))
        check_count(samples, "samples", 1)
        if chunk is not None:
            check_count(chunk, "chunk", 1)
        check_one_of(unit, "unit", ("sample", "token"))
        check_integer(seed, "seed")
        if output is not None:
            check_callable(output, "output")
        self.model, self.loss, self.kind, self.method = unwrap(model), loss, Curvature.of(kind), method
        self.data = tuple(data) if isinstance(data, Iterator) else data
        self.samples, self.chunk, self.unit, self.seed, self.output = samples, chunk, unit, seed, output
        self._kept: dict[Any, Any] = {}
        self._state: list[Tensor] = []  # values, for edits of `.data` change no version

    def name_of(self, weight: Tensor) -> str:
        """The name of the model's parameter that shares this tensor's memory.

        Raises:
            ConfigError: it is no tensor, there is none, or it may be one that is stored alive only.
        """
        check_kind(weight, "weight", Tensor)
        for name, parameter in self.model.named_parameters():
            same = parameter.data_ptr() == weight.data_ptr() and parameter.numel() > 0
            if same and parameter.shape == weight.shape and parameter.device == weight.device:
                return name
        check_stored_dense(self.model)  # what stands for such a weight elsewhere is a copy
        raise ConfigError(
            f"`weight` (={tuple(weight.shape)}) is no parameter of the source's model: give CurvatureSource the very "
            "model that is trained or pruned, not a copy"
        )

    def diagonal(self, weight: Tensor, *, dense: bool = False) -> Float[Tensor, "*shape"]:
        """The weight's part of the curvature's diagonal.

        Args:
            weight: A parameter of the model, or a view of all of it.
            dense: See dead weights through opened masks; else their curvature is what the model makes of it, mostly 0.
                In a resurrection phase masks are open already, and what stands at dead entries counts.
        """
        name = self.name_of(weight)
        opened = dense and name in self._closed
        return self._once(("diagonal", opened), lambda: self._diagonals(opened))[name]

    def inverse_diagonal(
        self, weight: Tensor, damping: float, block: int, fisher_batch: int = 1
    ) -> Float[Tensor, "*shape"]:
        """The diagonal of the inverse of the weight's blocks of l I + (1/N) sum g g^T (WoodFisher), float64.

        Args:
            weight: A parameter of the model, or a view of all of it.
            damping: l.
            block: Weights per block.
            fisher_batch: Samples whose gradients are averaged into one g.

        Raises:
            ConfigError: a number out of range, or a weight that is none of the model.
        """
        check_number(damping, "damping", 0, above=True)
        check_count(block, "block", 1)
        check_count(fisher_batch, "fisher_batch", 1)
        key = ("inverse", damping, block, fisher_batch)
        found = self._once(key, lambda: self._inverses(damping, block, fisher_batch))
        return found[self.name_of(weight)]

    def operator(self, mask: Support | None = None, params: Any = None) -> CurvatureOperator:
        """The operator of this source."""
        return CurvatureOperator(
            self.model,
            self._names if params is None else params,
            self.loss,
            self.data,
            self.kind,
            mask,
            self.chunk,
            unit=self.unit,
            seed=self.seed,
            output=self.output,
            check=False,
        )

    @property
    def _names(self) -> list[str]:
        """Masked weights where there are masks: nobody asks for the others."""
        return list(masked_weights(self.model)) or [
            n for n, p in self.model.named_parameters() if p.is_floating_point()
        ]

    @property
    def _closed(self) -> list[str]:
        """Masked weights that no resurrection phase has opened."""
        return [name for name, weight in masked_weights(self.model).items() if not weight.open]

    def _diagonals(self, opened: bool) -> Mapping[str, Tensor]:
        operator = self.operator(Support.DENSE, self._closed) if opened else self.operator()
        return operator.space.split(operator.diag(self.method, self.samples))

    def _inverses(self, damping: float, block: int, fisher_batch: int) -> Mapping[str, Tensor]:
        operator = self.operator()
        rows: dict[str, list[Tensor]] = {name: [] for name in operator.space.names}
        for piece in operator.sample_gradients():
            for name, gradient in piece.items():
                rows[name].append(gradient.flatten(1))
        found = {}
        for name, shape in operator.space.shapes.items():
            single = torch.cat(rows.pop(name))
            g = (
                single
                if fisher_batch == 1
                else torch.stack([each.mean(0) for each in torch.split(single, fisher_batch)])
            )
            inverse = woodfisher_inverse(g, damping, block)
            found[name] = inverse.diagonal(dim1=1, dim2=2).reshape(-1)[: shape.numel()].reshape(shape)
        return found

    def _once(self, key: Any, make: Callable[[], T]) -> T:
        tensors = [each.detach() for each in (*self.model.parameters(), *self.model.buffers())]
        if not _equal(tensors, self._state):
            self._kept.clear()
            self._state = [each.clone() for each in tensors]
        if key not in self._kept:
            self._kept[key] = make()
        found: T = self._kept[key]
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_state": []}

    def __repr__(self) -> str:
        return f"CurvatureSource({self.kind.value}, {self.method}, samples={self.samples}, seed={self.seed})"


def _equal(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(tensors) == len(others) and all(
        (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape) and torch.equal(a, b)
        for a, b in zip(tensors, others, strict=True)
    )
