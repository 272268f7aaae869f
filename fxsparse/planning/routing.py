"""For every parameter of a model: how it is used, whether it is sparsified by default, and by which route."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from fxsparse.graph import Capture
from fxsparse.graph.tree import parameters_of
from fxsparse.nn import SPARSE_TYPES, Guard, Route
from fxsparse.passes import graphs_of
from fxsparse.passes.places import owner_of, places_of, split_name
from fxsparse.passes.snapshot import join
from fxsparse.planning.derived import Role, derivation
from fxsparse.planning.reasons import ASK, Found, as_used, by_default, layout_of_weight, refusal
from fxsparse.planning.usage import Usage, usages_of
from fxsparse.sparsity import Layout

REPLACED = "`forward` replaces this parameter by a new one; create it in `__init__`, or run the model once before"
WRITTEN = "the forward pass writes into it, also at dead entries, which only readers through the mask see as zeros"


@dataclass(frozen=True, eq=False)
class Weight:
    """One parameter, seen by the planner.

    Attributes:
        name: Its first name.
        names: All its names.
        parameter: The parameter.
        layout: Its output and input axes; None when its uses do not tell them.
        default: Whether it is sparsified unless asked otherwise.
        reason: Why, or why not.
        refusal: Why it cannot be masked at all, and the mend; None when it can.
        routes: Each of its names -> route and guard of a mask there.
        uses: Where it is used, as "op in module".
        fallback: Whether it is sparsified where a model has no weight that is sparsified by default.
    """

    name: str
    names: tuple[str, ...]
    parameter: nn.Parameter
    layout: Layout | None
    default: bool
    reason: str
    refusal: str | None
    routes: Mapping[str, tuple[Route, Guard]]
    uses: tuple[str, ...] = ()
    fallback: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.parameter.shape)

    @property
    def why_masked(self) -> str:
        """`reason` without the advice to ask for it."""
        return self.reason.removesuffix(f"; {ASK}")


def describe_weights(model: nn.Module, captured: Capture) -> list[Weight]:
    """Describe every parameter, in the order of `named_parameters`.

    Args:
        model: The model as the user gave it.
        captured: Its capture.
    """
    graphs = _Graphs(captured.module)
    usages = usages_of(model, captured)
    recording = captured.recording
    found = []
    for name, names in places_of(model).items():
        weight = _describe(model, names, usages.get(name, ()), recording is not None, graphs)
        if weight.default and recording is not None and name in recording.unused:
            called = [path for path, _ in map(split_name, names) if recording.calls.get(path)]
            if called:
                reason = f"`{called[0]}` runs without reading it; {ASK}"
                weight = replace(weight, default=False, fallback=False, reason=reason)
        if recording is not None and name in recording.replaced:
            weight = replace(weight, default=False, fallback=False, refusal=weight.refusal or REPLACED)
        if recording is not None and name in recording.written:
            weight = replace(weight, reason=f"{weight.reason}; {WRITTEN}")
        found.append(weight)
    return found


class _Graphs:
    """Which code executes in a graph, and which parameters the graphs read."""

    def __init__(self, module: nn.Module) -> None:
        self.calls: dict[str, set[str]] = {}
        self.reads: dict[str, set[str]] = {}  # by first name
        self.read_names: set[str] = set()
        self.holders: dict[str, str | None] = {}
        first = {id(parameter): name for name, parameter in parameters_of(module)}
        for path, found in graphs_of(module).items():
            calls = found.graph.find_nodes(op="call_module")
            self.calls[path] = {join(path, str(node.target)) for node in calls}
            reads = found.graph.find_nodes(op="get_attr")
            parameters = dict(found.named_parameters(remove_duplicate=False)) if reads else {}
            for node in reads:
                if str(node.target) in parameters:
                    self.reads.setdefault(first[id(parameters[str(node.target)])], set()).add(path)
                    self.read_names.add(join(path, str(node.target)))

    def runs(self, module: str, name: str) -> bool:
        """Whether the code of the module at this path runs in a graph that reads the parameter of this first name."""
        path = self._holder(module)
        return path is not None and path in self.reads.get(name, ())

    def tell_all(self, owner: str) -> bool:
        """Whether the graphs tell every reader of the weight of the module at this path."""
        parent = owner.rpartition(".")[0]
        return "" in self.calls and self._holder(parent) is not None

    def _holder(self, module: str) -> str | None:
        """Path of the graph in which the code of the module at this path runs; None when it is Python."""
        if module not in self.holders:
            self.holders[module] = self._found_holder(module)
        return self.holders[module]

    def _found_holder(self, module: str) -> str | None:
        around = [module]
        while around[-1]:
            around.append(around[-1].rpartition(".")[0])
        path = next((path for path in around if path in self.calls), None)
        return None if path is None or self.calls[path].intersection(around) else path


def _describe(
    model: nn.Module, names: Sequence[str], usages: Sequence[Usage], recorded: bool, graphs: _Graphs
) -> Weight:
    owners = {name: owner_of(model, name) for name in names}
    module, attribute = owners[names[0]]
    parameter = module._parameters[attribute]
    assert parameter is not None
    layers = {name for name, (module, attribute) in owners.items() if _swappable(name, module, attribute)}
    in_graph = bool(usages) and all(graphs.runs(usage.module, names[0]) for usage in usages)
    derived = derivation(model, owners, parameter, usages, in_graph)
    found = Found(parameter, as_used(model, owners, derived), tuple(usages), recorded, derived)
    default, fallback, reason = by_default(found)
    routes, where = _routes(names, layers, usages, graphs)
    if derived.role is Role.EFFECTIVE:
        at_parameter = (Route.PARAMETER, Guard.GRADIENT)
        first = next((name for name in names if name in graphs.read_names), names[0]) if in_graph else names[0]
        routes = {name: (Route.EFFECTIVE, Guard.GRADIENT) if name == first else at_parameter for name in names}
        where = f"masked behind {derived.by}"
    return Weight(
        names[0],
        tuple(names),
        parameter,
        layout_of_weight(found),
        default,
        f"{reason}; {where}" if default else reason,
        refusal(found, owners),
        routes,
        tuple(dict.fromkeys(f"{usage.op} in {usage.module or 'the root'}" for usage in usages)),
        fallback,
    )


def _swappable(name: str, module: nn.Module, attribute: str) -> bool:
    """Whether the module can be replaced by its sparse counterpart without losing anything."""
    plain = "forward" not in module.__dict__ and getattr(module, "_compiled_call_impl", None) is None
    return type(module) in SPARSE_TYPES and attribute == "weight" and split_name(name)[0] != "" and plain


def _routes(
    names: Sequence[str], layers: set[str], usages: Sequence[Usage], graphs: _Graphs
) -> tuple[dict[str, tuple[Route, Guard]], str]:
    paths = {split_name(name)[0] for name in layers}
    outside = [usage for usage in usages if not (usage.module in paths and usage.plain)]
    at_parameter = (Route.PARAMETER, Guard.GRADIENT)
    if layers:
        guarded = bool(outside) or len(layers) < len(names) or names[0] in graphs.reads
        unseen = not usages and not all(graphs.tell_all(path) for path in paths)
        guard = Guard.GRADIENT if guarded or unseen else Guard.FORWARD
        where = "it is read outside its module too" if guarded else "its module reads it masked"
        if unseen:
            where = "who else reads it is not known"
        return {name: (Route.MODULE, guard) if name in layers else at_parameter for name in names}, where
    read = [name for name in names if name in graphs.read_names]
    if read and all(graphs.runs(usage.module, names[0]) for usage in usages):
        inserted = (Route.MASK_NODE, Guard.FORWARD)
        if len(read) == len(names):
            return dict.fromkeys(names, inserted), "the graph reads it masked"
        guarded_too = (Route.MASK_NODE, Guard.GRADIENT)
        return {name: guarded_too if name in read else at_parameter for name in names}, "the graph reads it masked"
    return dict.fromkeys(names, at_parameter), "used in code that is no graph"
