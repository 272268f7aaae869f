"""Weights that are computed from a parameter are masked behind the computation."""

from __future__ import annotations

from torch import fx, nn

from fxsparse.errors import PassError
from fxsparse.graph import edit, weight_uses
from fxsparse.graph.derivations import KEEPS_ZEROS, PRODUCTS, mask_place
from fxsparse.graph.match import op_name
from fxsparse.nn import Guard, Route, mask_effective, mask_name, masked_weight
from fxsparse.passes.snapshot import graphs_of
from fxsparse.passes.spec_pass import SpecPass


class MaskEffective(SpecPass):
    """Masks a parameter and the weight that is made from it.

    1. The parameter gets a mask and a guard of its gradient, so that it is zero at dead entries.
    2. A graph reads it: in each chain of parameter-only nodes that leads to a product and does not keep zeros, a mask
       node is born behind the node whose entries stand where the parameter's do (`mask_place`), and all readers of that
       node read the masked one.
    3. A parametrization, a weight norm, or a forward in Python: `mask_effective`.

    Args:
        specs: Parameter name -> its mask's spec, of `Route.EFFECTIVE`.
    """

    def requires(self, module: nn.Module) -> None:
        """Each target is a parameter without a mask, and each spec belongs to this route."""
        self.check_unmasked(module, Route.EFFECTIVE, Guard.GRADIENT)

    def call(self, module: nn.Module) -> bool:
        """Install, insert or hook, in the order of the targets."""
        chains = _chains(module) if self.specs else {}
        for name, spec, owner, attribute in self.install(module):  # case 1
            ends = chains.get(id(owner._parameters[attribute]))
            for end, (found, read) in (ends or {}).items():  # case 2
                self._insert(found, end, read, name)
            if ends:
                nodes = f"{len(ends)} mask node{'s' if len(ends) > 1 else ''}"
                self.record(name, f"{nodes} behind its computation, {spec.pattern}")
            elif ends is not None:
                self.record(name, f"its zeros are zeros of what is computed from it, {spec.pattern}")
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


def _chains(module: nn.Module) -> dict[int, dict[fx.Node, tuple[fx.GraphModule, fx.Node]]]:
    """For each parameter (by identity) that a graph computes weights from: where masks go, with the graph and the read.

    A chain that keeps zeros needs no mask, and one through a product is no weight of the parameter.
    """
    found: dict[int, dict[fx.Node, tuple[fx.GraphModule, fx.Node]]] = {}
    for graph in graphs_of(module).values():
        for use in weight_uses(graph):
            names = [op_name(view) for view in use.views]
            if not names or PRODUCTS & set(names):
                continue
            parameter = graph.get_parameter(use.parameter)
            ends = found.setdefault(id(parameter), {})
            place = mask_place(names, parameter.shape)
            if place is not None:
                ends[use.views[place]] = (graph, use.read)
            elif not KEEPS_ZEROS.issuperset(names):
                raise PassError(f"`{use.parameter}` is moved by {', '.join(names)}, so no mask fits behind; exclude it")
    return found
