"""Functional uses of a weight read it through a mask node."""

from __future__ import annotations

from torch import fx, nn

from fxsparse.errors import PassError
from fxsparse.graph import edit
from fxsparse.nn import Guard, Route, mask_name, masked_weight
from fxsparse.passes.places import split_name
from fxsparse.passes.snapshot import graphs_of
from fxsparse.passes.spec_pass import SpecPass


class InsertMasks(SpecPass):
    """Puts `masked_weight(weight, weight_mask)` behind the reads of a parameter, in every graph.

    1. The parameter gets a mask, beside it in the module that holds it; the mask is all True.
    2. Each `get_attr` of the parameter, under any of its names: a read of the mask and the mask node are born behind
       it, and all readers of the weight read the masked one.
    3. A read that feeds a mask node already stays.

    Args:
        specs: Parameter name -> its mask's spec, of `Route.MASK_NODE`.
    """

    def requires(self, module: nn.Module) -> None:
        """Each target is a parameter without a mask, and each spec belongs to this route."""
        self.check_unmasked(module, Route.MASK_NODE, Guard.FORWARD)

    def call(self, module: nn.Module) -> bool:
        """Install and insert, in the order of the targets."""
        reads = _reads(module) if self.specs else {}
        for name, spec, owner, attribute in self.install(module):  # case 1
            count = sum(self._insert(found, read, name) for found, read in reads.get((id(owner), attribute), ()))
            if count == 0:
                raise PassError(f"`{name}` is read by no graph; mask it at the parameter")
            self.record(name, f"{count} mask node{'s' if count > 1 else ''}, {spec.pattern}")
        return bool(self.specs)

    def _insert(self, module: fx.GraphModule, read: fx.Node, name: str) -> int:
        if any(user.target is masked_weight and user.args[0] is read for user in read.users):  # case 3
            return 0
        mask = edit.insert_get_attr(
            module, mask_name(str(read.target)), pass_name=self.name, what="reads the mask", source=name, after=read
        )
        masked = edit.insert_call(
            module.graph,
            masked_weight,
            (read, mask),
            pass_name=self.name,
            what="masks the weight",
            source=name,
            after=mask,
        )
        edit.replace_uses(read, masked)  # case 2
        return 1


def _reads(module: nn.Module) -> dict[tuple[int, str], list[tuple[fx.GraphModule, fx.Node]]]:
    """For each attribute of each module (by identity): every node that reads it, with its graph."""
    places: dict[tuple[int, str], list[tuple[fx.GraphModule, fx.Node]]] = {}
    for found in graphs_of(module).values():
        children = dict(found.named_modules(remove_duplicate=False))
        for node in found.graph.nodes:
            if node.op == "get_attr":
                path, attribute = split_name(str(node.target))
                if path in children:
                    places.setdefault((id(children[path]), attribute), []).append((found, node))
    return places
