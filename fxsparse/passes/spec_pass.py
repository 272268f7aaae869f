"""The base of passes that are told which masks to make."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fxsparse.nn import MaskSpec
from fxsparse.passes.infra import Pass


class SpecPass(Pass):
    """A pass whose targets are parameters, each with the spec of the mask that it is to have.

    Args:
        specs: Parameter name -> its mask's spec.
    """

    def __init__(self, specs: Mapping[str, MaskSpec]) -> None:
        self.specs = dict(specs)

    @property
    def targets(self) -> Collection[str]:
        """The parameters' names."""
        return tuple(self.specs)
