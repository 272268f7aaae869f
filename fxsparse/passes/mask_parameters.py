"""Weights used inside code that cannot be rewritten are masked at the parameter."""

from __future__ import annotations

from torch import nn

from fxsparse.errors import ConfigError
from fxsparse.nn import Guard, Route, install_mask, mask_spec, set_guard
from fxsparse.passes.places import owner_of
from fxsparse.passes.spec_pass import SpecPass


class MaskParameters(SpecPass):
    """Guards parameters: dead entries are zero, and their gradient is masked after each backward pass.

    1. A parameter without a mask gets one, beside it in the module that holds it.
    2. A parameter whose module was swapped or whose graph uses are masked, but which is read elsewhere too: its guard
       changes, its route stays.

    Args:
        specs: Parameter name -> its mask's spec, of `Guard.GRADIENT`.
    """

    def requires(self, module: nn.Module) -> None:
        """Each target is a parameter, and each spec guards the gradient."""
        for name, spec in self.specs.items():
            owner_of(module, name)
            if spec.guard is not Guard.GRADIENT:
                raise ConfigError(f"`guard` of `{name}` (={spec.guard}) must be Guard.GRADIENT")

    def call(self, module: nn.Module) -> bool:
        """Install and guard, in the order of the targets."""
        modified = False
        for name, spec in self.specs.items():
            owner, attribute = owner_of(module, name)
            present = mask_spec(owner, attribute)
            if present is None:  # case 1
                if spec.route is not Route.PARAMETER:
                    raise ConfigError(
                        f"`route` of `{name}` (={spec.route}) must be Route.PARAMETER: it has no mask yet"
                    )
                install_mask(owner, attribute, spec)
                self.record(name, f"masked at the parameter, {spec.pattern}")
                modified = True
            elif present.guard is not Guard.GRADIENT:  # case 2
                set_guard(owner, attribute, Guard.GRADIENT)
                self.record(name, "read outside its module too: its gradient is masked")
                modified = True
            else:
                self.record(name, "guarded already: one module under several names")
        return modified
