"""For every parameter of a model: how it is used, whether it is sparsified by default, and by which route."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.utils import parametrize

from fxsparse.graph import Capture
from fxsparse.nn import SPARSE_TYPES, Guard, Route, layout_of, mask_name
from fxsparse.passes import graphs_of
from fxsparse.passes.places import owner_of, places_of, split_name
from fxsparse.passes.snapshot import join
from fxsparse.planning.usage import KEEPS_ZEROS, PRODUCTS, Usage, common_layout, usages_of
from fxsparse.sparsity import Layout

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_NOT_BY_DEFAULT: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("an embedding", (nn.Embedding, nn.EmbeddingBag)),
    ("a recurrent weight", (nn.RNNBase, nn.RNNCellBase)),
    ("a bilinear weight", (nn.Bilinear,)),
)
_ASK = "name it with `include` to mask it"


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

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.parameter.shape)


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
                reason = f"`{called[0]}` runs without reading it; {_ASK}"
                weight = replace(weight, default=False, reason=reason)
        found.append(weight)
    return found


class _Graphs:
    """Which code executes in a graph, and which parameters the graphs read."""

    def __init__(self, module: nn.Module) -> None:
        self.calls: dict[str, list[str]] = {}
        self.reads: dict[int, set[str]] = {}
        self.read_names: set[str] = set()
        for path, found in graphs_of(module).items():
            calls = [node.target for node in found.graph.nodes if node.op == "call_module"]
            self.calls[path] = [join(path, str(target)) for target in calls]
            parameters = dict(found.named_parameters(remove_duplicate=False))
            for node in found.graph.nodes:
                if node.op == "get_attr" and str(node.target) in parameters:
                    self.reads.setdefault(id(parameters[str(node.target)]), set()).add(path)
                    self.read_names.add(join(path, str(node.target)))

    def runs(self, module: str, parameter: nn.Parameter) -> bool:
        """Whether the code of the module at this path runs in a graph that reads the parameter."""
        path = self._holder(module)
        return path is not None and path in self.reads.get(id(parameter), ())

    def tell_all(self, owner: str) -> bool:
        """Whether the graphs tell every reader of the weight of the module at this path."""
        parent = owner.rpartition(".")[0]
        return "" in self.calls and self._holder(parent) is not None

    def _holder(self, module: str) -> str | None:
        """Path of the graph in which the code of the module at this path runs; None when it is Python."""
        holders = [path for path in self.calls if _below(module, path)]
        path = max(holders, key=len, default=None)
        if path is None or any(_below(module, call) for call in self.calls[path]):
            return None
        return path


def _below(path: str, ancestor: str) -> bool:
    return ancestor == "" or path == ancestor or path.startswith(f"{ancestor}.")


def _describe(
    model: nn.Module, names: Sequence[str], usages: Sequence[Usage], recorded: bool, graphs: _Graphs
) -> Weight:
    owners = {name: owner_of(model, name) for name in names}
    parameter = model.get_parameter(names[0])
    layers = {name for name, (module, attribute) in owners.items() if _swappable(name, module, attribute)}
    refusal = _refusal(parameter, owners, usages)
    default, reason = _default(parameter, owners, usages, recorded)
    routes, where = _routes(parameter, names, layers, usages, graphs)
    uses = tuple(dict.fromkeys(f"{usage.op} in {usage.module or 'the root'}" for usage in usages))
    return Weight(
        names[0],
        tuple(names),
        parameter,
        _layout(owners, usages),
        default,
        f"{reason}; {where}" if default else reason,
        refusal,
        routes,
        uses,
    )


def _swappable(name: str, module: nn.Module, attribute: str) -> bool:
    """Whether the module can be replaced by its sparse counterpart without losing anything."""
    plain = "forward" not in module.__dict__ and getattr(module, "_compiled_call_impl", None) is None
    return type(module) in SPARSE_TYPES and attribute == "weight" and split_name(name)[0] != "" and plain


def _routes(
    parameter: nn.Parameter, names: Sequence[str], layers: set[str], usages: Sequence[Usage], graphs: _Graphs
) -> tuple[dict[str, tuple[Route, Guard]], str]:
    paths = {split_name(name)[0] for name in layers}
    outside = [usage for usage in usages if not (usage.module in paths and usage.plain)]
    at_parameter = (Route.PARAMETER, Guard.GRADIENT)
    if layers:
        guarded = bool(outside) or len(layers) < len(names) or id(parameter) in graphs.reads
        unseen = not usages and not all(graphs.tell_all(path) for path in paths)
        guard = Guard.GRADIENT if guarded or unseen else Guard.FORWARD
        where = "it is read outside its module too" if guarded else "its module reads it masked"
        if unseen:
            where = "who else reads it is not known"
        return {name: (Route.MODULE, guard) if name in layers else at_parameter for name in names}, where
    read = [name for name in names if name in graphs.read_names]
    if read and all(graphs.runs(usage.module, parameter) for usage in usages):
        inserted = (Route.MASK_NODE, Guard.FORWARD)
        if len(read) == len(names):
            return dict.fromkeys(names, inserted), "the graph reads it masked"
        guarded_too = (Route.MASK_NODE, Guard.GRADIENT)
        return {name: guarded_too if name in read else at_parameter for name in names}, "the graph reads it masked"
    return dict.fromkeys(names, at_parameter), "used in code that is no graph"


def _refusal(
    parameter: nn.Parameter, owners: Mapping[str, tuple[nn.Module, str]], usages: Sequence[Usage]
) -> str | None:
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return f"its dtype is {parameter.dtype}; prune before quantising"
    for name, (module, attribute) in owners.items():
        if isinstance(module, torch.jit.ScriptModule):
            return f"its module `{split_name(name)[0]}` is scripted; give the module from before torch.jit.script"
        if ".parametrizations." in f".{name}" or isinstance(module, parametrize.ParametrizationList):
            return (
                "it is under a parametrization, which turns zeros into other values; remove the parametrization before"
            )
        if _old_norm(module, attribute):
            return "it is under weight_norm or spectral_norm; remove the norm before (torch.nn.utils.remove_*_norm)"
        if hasattr(module, mask_name(attribute)):
            return f"its module has an attribute `{mask_name(attribute)}` already; rename that attribute"
    for usage in usages:
        lossy = [op for op in usage.derived if op not in KEEPS_ZEROS]
        if lossy and usage.op in PRODUCTS:
            return f"`{lossy[0]}` makes other values of its zeros before `{usage.op}`; exclude it"
    return None


def _old_norm(module: nn.Module, attribute: str) -> bool:
    for hook in module._forward_pre_hooks.values():
        if type(hook).__name__ in ("WeightNorm", "SpectralNorm"):
            stem = getattr(hook, "name", "")
            if attribute in (f"{stem}_g", f"{stem}_v", f"{stem}_orig"):
                return True
    return False


def _default(
    parameter: nn.Parameter,
    owners: Mapping[str, tuple[nn.Module, str]],
    usages: Sequence[Usage],
    recorded: bool,
) -> tuple[bool, str]:
    """Whether the parameter is sparsified unless asked otherwise, and why."""
    if parameter.ndim < 2:
        return False, f"fewer than 2 axes; {_ASK}"
    modules = [(module, attribute) for module, attribute in owners.values()]
    products = [usage for usage in usages if usage.op in PRODUCTS and usage.weight]
    for module, attribute in modules:
        if isinstance(module, _LAYERS) and attribute == "weight" and (_torch_class(module) or products or not recorded):
            if not _torch_class(module) and not products:
                return False, f"{type(module).__name__} may compute something of its own; give `example_inputs`"
            if _depthwise(parameter, layout_of(module)):
                return False, f"a depthwise convolution; {_ASK}"
            return True, f"weight of {type(module).__name__}"
        if isinstance(module, nn.MultiheadAttention) and attribute in _ATTENTION:
            return True, "attention projection"
    for kind, types in _NOT_BY_DEFAULT:
        if any(isinstance(module, types) for module, _ in modules):
            return False, f"{kind}; {_ASK}"
    if products:
        layout = common_layout(products)
        if layout is not None and _depthwise(parameter, layout):
            return False, f"a depthwise convolution; {_ASK}"
        return True, f"weight of {products[0].op}"
    if not recorded and not usages:
        return False, f"its uses are not known; give `example_inputs`, or {_ASK}"
    kinds = ", ".join(dict.fromkeys(usage.op for usage in usages)) or "nothing in the example run"
    return False, f"used by {kinds}; {_ASK}"


def _torch_class(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _depthwise(parameter: nn.Parameter, layout: Layout) -> bool:
    """Whether every output channel of a grouped convolution reads a single input channel."""
    groups = layout.groups
    inputs = parameter.shape[layout.in_axis] // (groups if layout.in_axis < layout.out_axis else 1)
    return groups > 1 and inputs == 1


def _layout(owners: Mapping[str, tuple[nn.Module, str]], usages: Sequence[Usage]) -> Layout | None:
    for module, attribute in owners.values():
        if isinstance(module, _LAYERS) and attribute == "weight":
            return layout_of(module)
    for module, _ in owners.values():
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase | nn.RNNCellBase | nn.Embedding | nn.EmbeddingBag):
            return Layout.linear()
    return common_layout([usage for usage in usages if usage.op in PRODUCTS and usage.weight])
