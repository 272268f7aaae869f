"""Linear and convolution modules become sparse modules."""

from __future__ import annotations

from torch import nn

from fxsparse.errors import ConfigError
from fxsparse.graph import provenance
from fxsparse.nn import SPARSE_TYPES, Route, mask_name
from fxsparse.passes.places import owner_of, replace_modules, split_name
from fxsparse.passes.snapshot import graphs_of
from fxsparse.passes.spec_pass import SpecPass
from fxsparse.passes.structure import check_same_names


class SwapModules(SpecPass):
    """Replaces modules of exactly a torch Linear, Conv or ConvTranspose class by their sparse counterparts.

    1. A module: the sparse one takes over its parameters, buffers, hooks, mode and attributes; its mask is all True.
    2. A module that stands at several places: one sparse module at all of them.
    3. The graph nodes that call it stay; they are stamped.

    Args:
        specs: Name of the module's parameter ("path.weight") -> its mask's spec, of `Route.MODULE`.
    """

    def requires(self, module: nn.Module) -> None:
        """Each target is the `weight` of a module below the root, of exactly a class that has a sparse counterpart."""
        for name, spec in self.specs.items():
            owner, attribute = owner_of(module, name)
            if spec.route is not Route.MODULE:
                raise ConfigError(f"`route` of `{name}` (={spec.route}) must be Route.MODULE")
            if owner is module:
                raise ConfigError(f"`{name}` belongs to the root, which cannot be replaced; mask it at the parameter")
            if type(owner) not in SPARSE_TYPES or attribute != "weight":
                known = ", ".join(kind.__name__ for kind in SPARSE_TYPES)
                raise ConfigError(f"`{name}` belongs to a {type(owner).__name__}, which is not exactly one of {known}")

    def call(self, module: nn.Module) -> bool:
        """Swap, in the order of the targets."""
        swapped: dict[nn.Module, nn.Module] = {}
        first: dict[nn.Module, str] = {}
        for name, spec in self.specs.items():
            dense, _ = owner_of(module, name)
            if dense in swapped:  # case 2
                self.record(name, f"one module with `{first[dense]}`")
                continue
            sparse = SPARSE_TYPES[type(dense)].from_dense(dense, spec)
            swapped[dense], first[dense] = sparse, name
            self.record(name, f"{type(dense).__name__} -> sparse {type(sparse).__name__}, {spec.pattern}")
        replace_modules(module, swapped)  # case 1
        self._stamp_calls(module, {swapped[dense]: split_name(name)[0] for dense, name in first.items()})
        return bool(swapped)

    def _stamp_calls(self, module: nn.Module, sources: dict[nn.Module, str]) -> None:
        for found in graphs_of(module).values():
            children = dict(found.named_modules(remove_duplicate=False))
            for node in found.graph.find_nodes(op="call_module"):  # case 3
                child = children.get(str(node.target))
                if child in sources:
                    provenance.stamp(node, self.name, "swapped", sources[child])

    def ensures(self, before: nn.Module, after: nn.Module) -> None:
        """Same parameters under the same names; of the buffers, only masks are new."""
        check_same_names(before, after, [mask_name(name) for name in self.specs])
