"""What is tapped: tensors that depend on parameters alone, and the calls that read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fxsparse.curvature.taps_formulas import Formula
from fxsparse.errors import DataError

_SITE = "_fxsparse_site"


@dataclass(eq=False)
class Source:
    """A tensor that depends on parameters and on no input.

    Attributes:
        tensor: the alias of a parameter, or what was computed from aliases, with its autograd graph.
        names: the parameters.
        direct: the parameter that it is, up to a mask; None for other expressions.
        mask: the bool mask between parameter and tensor, if any.
        plain: the same without a graph, which operators get.
    """

    tensor: Tensor
    names: tuple[str, ...]
    direct: str | None = None
    mask: Tensor | None = None
    plain: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.plain = self.tensor.detach()


@dataclass(eq=False)
class Operand:
    """One source read by one call."""

    source: Source
    formula: Formula


@dataclass(eq=False)
class Site:
    """One call that reads sources.

    Attributes:
        number: in the order of calls.
        what: the operator's name.
        operands: what it reads.
        shape: of the tensor whose gradient is received: the output, or the operand's own copy.
        saved: the tensors that the formulas need later, with their versions.
        leaf: the operand's own copy, whose gradient autograd returns.
        moved: whether values of the inputs, not their shapes alone, tell where the samples lie.
        read: whether Python code has read numbers out of tensors before.
    """

    number: int
    what: str
    operands: list[Operand]
    shape: tuple[int, ...]
    saved: list[tuple[Tensor, int]] = field(default_factory=list)
    leaf: Tensor | None = None
    moved: bool = False
    read: bool = False

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must not change between batches, or the samples may lie elsewhere."""
        return self.what, len(self.shape), tuple(operand.source.names for operand in self.operands)

    def check_saved(self) -> None:
        """Raise DataError where an input was overwritten since the call."""
        for tensor, version in self.saved:
            if tensor._version != version:
                names = ", ".join(f"`{name}`" for operand in self.operands for name in operand.source.names)
                raise DataError(
                    f"the input of `{self.what}` with {names} was modified in place after the call; such a model "
                    "cannot be trained either: write the operation out of place"
                )


def names_of(site: Site) -> set[str]:
    """The parameters that a site reads."""
    return {name for operand in site.operands for name in operand.source.names}


def site_of(tensor: Tensor) -> Site | None:
    """The site whose output this tensor is, unchanged."""
    site, version = getattr(tensor, _SITE, (None, 0))
    return site if tensor._version == version else None


def mark_site(y: Tensor, site: Site) -> None:
    """Note that a tensor is the output of a site."""
    setattr(y, _SITE, (site, y._version))
