"""Symbolic tracing that refuses whatever it cannot represent for all inputs and both modes."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize

from fxsparse.graph.captured import CapturedModule, SignatureCodeGen
from fxsparse.graph.culprits import readers_between
from fxsparse.graph.guards import NOTHING, Untraceable, noticing_modes, refusing_contexts, unchanged
from fxsparse.graph.proxies import AttributeProxy, ValueProxy
from fxsparse.graph.scopes import mode_of, preserved_rng, rng_fingerprint
from fxsparse.graph.trace_errors import why_untraceable

INHERITED = (
    "train",
    "eval",
    "_apply",
    "state_dict",
    "load_state_dict",
    "_load_from_state_dict",
    "_save_to_state_dict",
    "get_extra_state",
    "set_extra_state",
    "named_parameters",
    "parameters",
    "named_buffers",
    "named_modules",
    "named_children",
    "requires_grad_",
    "zero_grad",
)
"""Overrides that stay in force where a captured module inherits from the class."""
_COPYING = ("__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")
_OVERRIDES = (*INHERITED, "__call__", "__getattr__", "__setattr__", *_COPYING)
_GRAPH_NAMES = frozenset(dir(CapturedModule)) - frozenset(dir(nn.Module)) | {"_graph", "_origin", "_code", "meta"}


@dataclass(frozen=True)
class Trace:
    """A graph that stands for its module in train and in eval mode, for any input.

    `assumptions` are type tests on traced values: right only if the inputs' types are those of the example.
    """

    graph: fx.Graph
    assumptions: tuple[str, ...]


def is_leaf(module: nn.Module) -> bool:
    """Whether `module` stays one node of the graph around it.

    Leaves are torch's own modules, sparse modules, every kind of batch norm and dropout (their subclasses read the
    mode), modules with hooks or parametrizations (tracing through would lose them), scripted and captured modules.
    """
    if isinstance(module, _NormBase | _DropoutNd | CapturedModule | torch.jit.ScriptModule):
        return True
    if any(kind.__module__.startswith("fxsparse.nn") for kind in type(module).__mro__):
        return True
    if has_hooks(module) or parametrize.is_parametrized(module) or is_compiled(module):
        return True
    return is_torch_layer(module)


def is_layer(module: nn.Module) -> bool:
    """Whether `module` is a layer of the user's: it holds parameters and no modules.

    Layers stay one node of the graph around them, so that hooks put on them later still run; inside they may be graphs.
    """
    return not module._modules and any(parameter is not None for parameter in module._parameters.values())


def is_torch_layer(module: nn.Module) -> bool:
    """Whether the class of `module` comes with torch; containers that only call their children do not count."""
    origin = type(module).__module__
    return origin.startswith(("torch.nn.", "torch.ao.nn.")) and type(module) not in _CONTAINERS


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs hooks."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_compiled(module: nn.Module) -> bool:
    """Whether `module` is the wrapper made by ``torch.compile``, or runs compiled code in its call."""
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def trace(module: nn.Module, absent: Collection[str] = ()) -> Trace:
    """Trace `module` if one graph is right for every input, in train and in eval mode.

    `module` is run on symbolic values; its attributes and all global state are restored afterwards.

    Args:
        module: the module.
        absent: arguments of its forward without a default that are None in calls that must be right too.

    Raises:
        Untraceable: with the reason and the mend.
    """
    check_root(module)
    read: set[str] = set()
    readers: list[nn.Module] = []
    with mode_of(module, False), noticing_modes(read, readers.append):
        evaluation = _trace_once(module)
    if "training" in read or _hides_its_mode(module):
        with mode_of(module, True), noticing_modes(set(), readers.append):
            training = _trace_once(module)
        if _canonical(evaluation.graph, {}) != _canonical(training.graph, {}):
            raise Untraceable(
                "its graph differs between train and eval mode (it reads `self.training`)",
                "use modules such as nn.Dropout instead of `F.dropout(training=self.training)`",
                readers_between(module, evaluation.graph, training.graph, readers),
            )
    if "gradients" in read:
        with mode_of(module, False), torch.set_grad_enabled(not torch.is_grad_enabled()):
            other = _trace_once(module)
        if _canonical(other.graph, {}) != _canonical(evaluation.graph, {}):
            raise Untraceable("its graph differs with and without gradients (it reads torch.is_grad_enabled)", NOTHING)
    _check_optional_arguments(module, evaluation.graph, absent)
    for node in evaluation.graph.nodes:
        node.type = None
    evaluation.graph.set_codegen(SignatureCodeGen(inspect.signature(inspect.unwrap(type(module).forward))))
    return evaluation


def trace_key(module: nn.Module, known: dict[Hashable, int] | None = None) -> Hashable:
    """Equal for two modules exactly when their traces are: the same code over the same names, shapes and attributes.

    Attributes that are no numbers, strings or tuples of them count by identity.

    Args:
        module: the module.
        known: what earlier calls made; keys are comparable where they were made with the same one, while the modules
            live and stay as they are.
    """
    known = {} if known is None else known
    present = ("module", id(module))
    if present in known:
        return known[present]
    attributes = tuple(
        (name, type(value), value if _is_plain(value) else id(value))
        for name, value in module.__dict__.items()
        if name not in _TABLES and not (name in _HOOKS and not value)
    )
    tensors = tuple(
        (name, None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.requires_grad))
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
    )
    children = tuple((name, child and trace_key(child, known)) for name, child in module._modules.items())
    known[present] = known.setdefault((type(module), attributes, tensors, children), len(known))
    return known[present]


_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training")
_HOOKS = frozenset(name for name, value in nn.Module().__dict__.items() if isinstance(value, dict)) - {*_TABLES}


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, complex, str)


def _hides_its_mode(module: nn.Module) -> bool:
    """Whether reads of `training` somewhere inside would go unnoticed."""
    kinds = {type(child) for child in module.modules()}
    return any("training" in base.__dict__ for kind in kinds for base in kind.__mro__ if base is not nn.Module)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.assumptions: list[str] = []
        self.names: dict[int, str] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ValueProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or is_layer(m)

    def create_arg(self, a: Any) -> Any:
        kind: type = type(a)
        if kind is ValueProxy or kind is AttributeProxy:
            return a.node
        if kind in _CONSTANTS:
            return a
        if kind is tuple:
            return tuple([self.create_arg(item) for item in a])
        if kind is list:
            return [self.create_arg(item) for item in a]
        if kind is slice:
            return slice(self.create_arg(a.start), self.create_arg(a.stop), self.create_arg(a.step))
        if kind is nn.Parameter:
            return self._read_parameter(a)
        return self._create_rare_arg(a)

    def _read_parameter(self, parameter: nn.Parameter) -> Any:
        name = self.names.get(id(parameter))
        if name is None:
            self.names = {id(found): name for name, found in self.root.named_parameters()}
            name = self.names.get(id(parameter))
        if name is None:
            return super().create_arg(parameter)
        return self.create_node("get_attr", name, (), {})

    def _create_rare_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and type(a) not in (dict, immutable_dict):
            kind = type(a).__name__
            raise Untraceable(f"it makes a mapping of type {kind}, which a graph would turn into a dict", NOTHING)
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            if not any(a is buffer for buffer in self.root.buffers()):
                raise Untraceable(
                    f"it makes a tensor of shape {tuple(a.shape)} that would be frozen into the graph",
                    "register it as a buffer, or derive it from an input",
                )
        return super().create_arg(a)


_CONSTANTS = frozenset(
    {bool, int, float, complex, str, type(None), EllipsisType, torch.dtype, torch.device, torch.layout}
)


def check_root(module: nn.Module, kept: Collection[str] = ()) -> None:
    """Refuse a module whose class or instance a GraphModule could not stand for.

    Args:
        module: the module.
        kept: what its class may override.

    Raises:
        Untraceable: with the reason and the mend.
    """
    kind = type(module)
    if "forward" in module.__dict__:
        raise Untraceable("`forward` was replaced on the instance", "override it in a subclass")
    overridden = next((name for name in _overridden(kind) if name not in kept), None)
    if overridden is not None:
        raise Untraceable(f"its class overrides `{overridden}`, which a graph would lose", NOTHING)
    if parametrize.is_parametrized(module):
        raise Untraceable("it is parametrized", "remove the parametrizations before, then add them again")
    if is_compiled(module) or isinstance(module, torch.jit.ScriptModule):
        raise Untraceable("it is compiled or scripted", "pass the original module and compile afterwards")
    owned = [*module.__dict__, *module._parameters, *module._buffers, *module._modules]
    clash = sorted(_GRAPH_NAMES.intersection(owned)) if not isinstance(module, fx.GraphModule) else []
    if clash:
        raise Untraceable(f"its attribute `{clash[0]}` is a name that fx.GraphModule needs", "rename the attribute")


def _overridden(kind: type[nn.Module]) -> tuple[str, ...]:
    """Methods of nn.Module that a class replaces; how torch's own layers are copied is nothing that a graph loses."""
    owners = {name: _owner(kind, name) for name in _OVERRIDES}
    return tuple(
        name
        for name, owner in owners.items()
        if owner not in (None, nn.Module, object)
        and not (name in _COPYING and str(owner.__module__).startswith("torch.nn.modules."))
    )


def _owner(kind: type, name: str) -> type | None:
    return next((base for base in kind.__mro__ if name in base.__dict__), None)


def _trace_once(module: nn.Module, concrete: dict[str, Any] | None = None) -> Trace:
    tracer = _Tracer()
    with preserved_rng(), unchanged(module):
        before = rng_fingerprint()
        try:
            with refusing_contexts():
                graph = tracer.trace(module, concrete_args=concrete)
        except Untraceable:
            raise
        except Exception as error:  # user code may fail in any way on a symbolic value
            raise Untraceable(*why_untraceable(error)) from error
        if rng_fingerprint() != before:
            raise Untraceable("it draws random numbers in Python code", "draw them with torch functions of an input")
    for node in graph.nodes:
        if node.op == "placeholder" and any(isinstance(default, fx.Node) for default in node.args):
            raise Untraceable(f"the default of argument `{node.target}` is a tensor", "pass it as a buffer")
    return Trace(graph, tuple(dict.fromkeys(tracer.assumptions)))


def _check_optional_arguments(module: nn.Module, graph: fx.Graph, absent: Collection[str]) -> None:
    """`x is None` cannot be seen on a proxy: the graph must not depend on whether an optional argument is given."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    optional = [node.target for node in placeholders if node.args == (None,) or node.target in absent]
    groups = [optional] if len(optional) < 2 else [optional, *([name] for name in optional)]
    for names in groups if optional else []:
        given = dict.fromkeys(map(str, names))
        try:
            with mode_of(module, False):
                other = _trace_once(module, dict(given))
        except Untraceable:
            other = None
        if other is None or _canonical(graph, given) != _canonical(other.graph, given):
            raise Untraceable(
                f"its graph depends on whether the optional argument `{names[0]}` is given",
                "give the two cases a module each, or leave it: its submodules become graphs",
            )


def _canonical(graph: fx.Graph, absent: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The nodes of `graph` as comparable data, independent of names; the arguments in `absent` count as None."""
    index: dict[fx.Node, Any] = {}
    lines: list[tuple[Any, ...]] = []
    for node in graph.nodes:
        if node.op == "placeholder" and any(node.target in (name, f"{name}_1") for name in absent):
            index[node] = None
            continue
        if node.op == "call_function" and node.target is fx._symbolic_trace._assert_is_none:
            continue
        lines.append((node.op, node.target, repr(_numbered(node.args, index)), repr(_numbered(node.kwargs, index))))
        index[node] = f"%{len(lines)}"
    return lines


def _numbered(value: Any, index: dict[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node):
        return index[value]
    if isinstance(value, slice):
        return slice(*(_numbered(item, index) for item in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {key: _numbered(item, index) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [type(value).__name__, *(_numbered(item, index) for item in value)]
    return value
