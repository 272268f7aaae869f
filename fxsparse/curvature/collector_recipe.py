"""What is collected, and the cotangents that are sent back for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.curvature.arguments import check_one_of
from fxsparse.curvature.fisher_types import FisherType
from fxsparse.curvature.losses import CallableLoss, OutputLoss
from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_count

TOKEN_METHODS = ("exact", "signs", "expand")


@dataclass(frozen=True)
class Recipe:
    """What is collected.

    Attributes:
        loss: the loss.
        kind: which Fisher.
        per_token: whether the unit is a position instead of a sample.
        token_method: how positions are told apart, where they must be: one backward pass each ("exact"), random signs
            ("signs", types with a Hessian only) or layer by layer ("expand").
        samples: draws of the sampled types.
        dense: whether dead entries of masked weights count.
        separate: whether the squares of each sample are kept apart.
        chunk: samples of one forward pass; None chooses by memory.
    """

    loss: OutputLoss
    kind: FisherType
    per_token: bool
    token_method: str
    samples: int
    dense: bool
    separate: bool
    chunk: int | None

    def of_next(self) -> Recipe:
        """The same for labels that were shifted by one position."""
        return replace(self, loss=self.loss.of_next())

    def check_loss(self, z: Tensor, y: Any) -> None:
        """Raise UnsupportedLoss where the loss has no curvature of this kind."""
        if self.kind in (FisherType.EXACT, FisherType.MC, FisherType.SKETCH):
            self.loss.check_natural(z, y)

    def cotangents(
        self, z: Tensor, y: Any, valid: Tensor, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, float]]:
        """What is sent back through the model, like z, each with the weight of its squares."""
        loss, targets = self.loss, y if isinstance(y, Tensor) else None
        axis = loss.axis(z, targets)
        counted = loss.spread(valid, z, targets).to(z.dtype)
        if self.kind is FisherType.EMPIRICAL:
            gradient = loss.gradient(z, y) * counted
            if self.per_token and self.token_method == "exact":
                yield from ((each, 1.0) for each in _by_position(gradient, axis))
            else:
                yield gradient, 1.0
        elif self.kind is FisherType.MC:
            for _ in range(self.samples):
                yield loss.draw_gradient(z, y, generator) * counted, 1.0 / self.samples
        elif self.kind is FisherType.SKETCH:
            for _ in range(self.samples):
                yield loss.root_product(z, y, _signs(z, generator)) * counted, 1.0 / self.samples
        elif self.token_method == "signs" and z.ndim > 2:
            for _ in range(self.samples):
                signs = _signs(counted, generator)
                for column in range(loss.columns(z, y)):
                    yield loss.root_column(z, y, column) * counted * signs, 1.0 / self.samples
        else:
            for column in range(loss.columns(z, y)):
                whole = loss.root_column(z, y, column) * counted
                yield from ((each, 1.0) for each in _by_position(whole, axis))


def _by_position(cotangent: Tensor, axis: int) -> Iterator[Tensor]:
    """The cotangent at each position alone; positions where it is zero for every sample are left out."""
    if cotangent.ndim <= 2:
        yield cotangent
        return
    moved = cotangent.movedim(axis, -1)
    flat = moved.reshape(moved.shape[0], -1, moved.shape[-1])
    for position in range(flat.shape[1]):
        if bool((flat[:, position] != 0).any()):
            alone = torch.zeros_like(flat)
            alone[:, position] = flat[:, position]
            yield alone.view(moved.shape).movedim(-1, axis)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
    return (2 * drawn - 1).to(like.dtype)


def described(loss: OutputLoss) -> str:
    """The loss in words that are the same in another process."""
    if isinstance(loss, CallableLoss):
        own = loss.function
        return repr(own) if isinstance(own, nn.Module) else str(getattr(own, "__name__", type(own).__name__))
    options = {name: getattr(loss, name) for name in getattr(loss, "__dataclass_fields__", {})}
    told = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in options.items()}
    return f"{type(loss).__name__}({', '.join(f'{name}={value!r}' for name, value in told.items())})"


def check_recipe(recipe: Recipe) -> None:
    """Raise ConfigError for options that exclude each other, or are out of range."""
    check_one_of(recipe.token_method, "token_method", TOKEN_METHODS)
    if recipe.token_method == "expand" and (recipe.kind is not FisherType.EMPIRICAL or not recipe.per_token):
        raise ConfigError("`token_method` (='expand') needs `kind` (='empirical') and `unit` (='token')")
    if recipe.token_method == "signs" and recipe.kind not in (FisherType.EXACT, FisherType.GGN):
        raise ConfigError("`token_method` (='signs') needs `kind` (='true') or 'ggn'")
    check_count(recipe.samples, "samples", 1)
    if recipe.chunk is not None:
        check_count(recipe.chunk, "chunk", 1)
