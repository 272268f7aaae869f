"""Reading Fisher diagonals: tensors of the parameters' shapes, by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from fxsparse.errors import ConfigError, DataError

Tensors = Mapping[str, Shaped[Tensor, "*shape"]]


def matched(fisher: Tensors, others: Tensors, what: str) -> list[tuple[str, Float[Tensor, "*shape"], Tensor]]:
    """(name, F, other), both float64, for each entry of `others`.

    Raises:
        ConfigError: no mappings of tensors, or a Fisher is missing or of another shape (a group Fisher has to be
            expanded first).
        DataError: a Fisher is negative or not finite, or one of the others is not finite.
    """
    check_tensors(fisher, "fisher")
    check_tensors(others, what)
    found = []
    for name, other in others.items():
        if name not in fisher:
            close = ", ".join(list(fisher)[:3]) or "nothing"
            raise ConfigError(
                f"`fisher` has no entry for `{name}` of `{what}`; it has {close}: collect it, or leave it out"
            )
        own = fisher[name]
        if own.shape != other.shape:
            raise ConfigError(
                f"`fisher` of `{name}` (={tuple(own.shape)}) must have the shape of `{what}`, {tuple(other.shape)}; "
                "expand group values to their elements first, each the group's sum over its size"
            )
        wide = other.detach().double().to(own.device)
        bad = int((~wide.isfinite()).sum())
        if bad:
            raise DataError(f"`{what}` has {bad} values at `{name}` that are not finite")
        found.append((name, checked(name, own), wide))
    return found


def check_tensors(given: object, what: str) -> None:
    """Raise ConfigError unless it is a mapping of names to real tensors."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"`{what}` (={type(given).__name__}) must be a mapping of names to tensors")
    for name, each in given.items():
        if not isinstance(each, Tensor):
            raise ConfigError(f"`{what}` has a {type(each).__name__} at {name!r}, which must be a tensor")
        if each.is_complex():
            raise ConfigError(f"`{what}` of {name!r} (={each.dtype}) must be real")


def checked(name: str, fisher: Tensor) -> Float[Tensor, "*shape"]:
    """A Fisher diagonal in float64; raises DataError where it is negative or not finite."""
    wide = fisher.detach().double()
    bad = int((~(wide >= 0) | wide.isinf()).sum())
    if bad:
        raise DataError(f"`fisher` of `{name}` has {bad} values that are negative or not finite; collect it anew")
    return wide


def pooled(tensors: Tensors) -> Float[Tensor, " n"]:
    """All values in one float64 vector, checked to be finite and not negative."""
    if not tensors:
        raise ConfigError("`fisher` (=empty) must have at least one entry")
    check_tensors(tensors, "fisher")
    return torch.cat([checked(name, each).reshape(-1).cpu() for name, each in tensors.items()])
