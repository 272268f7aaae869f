"""Weights that are computed from a parameter are masked behind the computation."""

from __future__ import annotations

from torch import fx, nn

from fxsparse.errors import ConfigError
from fxsparse.graph import edit, weight_uses
from fxsparse.nn import Route, install_mask, mask_effective, mask_name, mask_spec, masked_weight
from fxsparse.passes.places import owner_of
from fxsparse.passes.snapshot import graphs_of
from fxsparse.passes.spec_pass import SpecPass
from fxsparse.passes.structure import check_same_names


class MaskEffective(SpecPass):
    """Masks a parameter and the weight that is made from it.

    1. The parameter gets a mask and a guard of its gradient, so that it is zero at dead entries.
    2. A graph reads it: a mask node is born behind the last node of each chain of parameter-only nodes that leads to a
       product, and all readers of that node read the masked one.
    3. A parametrization, a weight norm, or a forward in Python: `mask_effective`.

    Args:
        specs: Parameter name -> its mask's spec, of `Route.EFFECTIVE`.
    """

    def requires(self, module: nn.Module) -> None:
        """Each target is a parameter without a mask, and each spec belongs to this route."""
        for name, spec in self.specs.items():
            owner, attribute = owner_of(module, name)
            if spec.route is not Route.EFFECTIVE:
                raise ConfigError(f"`route` of `{name}` (={spec.route}) must be Route.EFFECTIVE")
            if mask_spec(owner, attribute) is not None:
                raise ConfigError(f"`{name}` has a mask already")

    def call(self, module: nn.Module) -> bool:
        """Install, insert or hook, in the order of the targets."""
        chains = _chains(module) if self.specs else {}
        for name, spec in self.specs.items():
            owner, attribute = owner_of(module, name)
            if mask_spec(owner, attribute) is not None:  # one module under several names
                self.record(name, "masked under another name of its module")
                continue
            install_mask(owner, attribute, spec)  # case 1
            ends = chains.get(id(owner._parameters[attribute]), {})
            for end, (found, read) in ends.items():  # case 2
                self._insert(found, end, read, name)
            count = len(ends)
            if count:
                self.record(name, f"{count} mask node{'s' if count > 1 else ''} behind its computation, {spec.pattern}")
            else:  # case 3
                mask_effective(owner, attribute)
                self.record(name, f"masked behind the computation of {type(owner).__name__}, {spec.pattern}")
        return bool(self.specs)

    def _insert(self, module: fx.GraphModule, end: fx.Node, read: fx.Node, name: str) -> None:
        mask = edit.insert_get_attr(
            module,
            mask_name(str(read.target)),
            pass_name=self.name,
            what="reads the mask",
            source=name,
            after=end,
        )
        masked = edit.insert_call(
            module.graph,
            masked_weight,
            (end, mask),
            pass_name=self.name,
            what="masks the effective weight",
            source=name,
            after=mask,
        )
        edit.replace_uses(end, masked)

    def ensures(self, before: nn.Module, after: nn.Module) -> None:
        """Same parameters under the same names; of the buffers, only masks are new."""
        check_same_names(before, after, [mask_name(name) for name in self.specs])


def _chains(module: nn.Module) -> dict[int, dict[fx.Node, tuple[fx.GraphModule, fx.Node]]]:
    """For each parameter (by identity): the last nodes of its chains to products, each with its graph and the read."""
    found: dict[int, dict[fx.Node, tuple[fx.GraphModule, fx.Node]]] = {}
    for graph in graphs_of(module).values():
        for use in weight_uses(graph):
            if use.views:
                ends = found.setdefault(id(graph.get_parameter(use.parameter)), {})
                ends[use.views[-1]] = (graph, use.read)
    return found
