"""The base of passes that are told which masks to make."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import nn

from fxsparse.errors import ConfigError
from fxsparse.nn import Guard, MaskSpec, Route, install_mask, mask_name, mask_spec
from fxsparse.passes.infra import Pass
from fxsparse.passes.places import owner_of
from fxsparse.passes.structure import check_same_names


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

    def check_unmasked(self, module: nn.Module, route: Route, guard: Guard) -> None:
        """Raise ConfigError unless each target is a parameter without a mask and its spec says `route` and `guard`."""
        for name, spec in self.specs.items():
            owner, attribute = owner_of(module, name)
            if spec.route is not route or spec.guard is not guard:
                raise ConfigError(f"`route` of `{name}` (={spec.route}, {spec.guard}) must be {route} with {guard}")
            if mask_spec(owner, attribute) is not None:
                raise ConfigError(f"`{name}` has a mask already; change it with set_masks")

    def install(self, module: nn.Module) -> Iterator[tuple[str, MaskSpec, nn.Module, str]]:
        """Give each target its mask, in their order: name, spec, and the module and attribute that hold it.

        A target that has one by now, of one module under several names, is recorded and left out.
        """
        for name, spec in self.specs.items():
            owner, attribute = owner_of(module, name)
            if mask_spec(owner, attribute) is not None:
                self.record(name, "masked under another name of its module")
                continue
            install_mask(owner, attribute, spec)
            yield name, spec, owner, attribute

    def ensures(self, before: nn.Module, after: nn.Module) -> None:
        """Same parameters under the same names; of the buffers, only masks are new."""
        check_same_names(before, after, [mask_name(name) for name in self.specs])
