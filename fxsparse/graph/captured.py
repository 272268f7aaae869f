"""CapturedModule: a GraphModule that keeps everything of the module it was captured from."""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen, PythonCode

from fxsparse.graph.tree import modules_of

GRAPH_STATE = frozenset(
    {"_graph", "_code", "_lineno_map", "_prologue_start", "_in_spec", "_out_spec", "_tracer_cls", "_tracer_extras"}
)
_WRITTEN = ("_code", "_lineno_map", "_prologue_start")
_CONTAINER_METHODS = ("__getitem__", "__len__", "__iter__", "__contains__", "__dir__")


class SignatureCodeGen(CodeGen):
    """Generates ``forward`` with the signature of the captured module: argument kinds and order, not only names."""

    def __init__(self, signature: inspect.Signature) -> None:
        super().__init__()
        self.parameters = tuple((p.name, p.kind) for p in list(signature.parameters.values())[1:])

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **kwargs: Any) -> str:
        """The ``def`` line; `free_vars` are the placeholders as written, ``self`` first."""
        written = {_name_of(var): var for var in free_vars if var != "self"}
        parts = ["self"]
        keyword_only = False
        positional_only = [name for name, kind in self.parameters if kind is inspect.Parameter.POSITIONAL_ONLY]
        for name, kind in self.parameters:
            if kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
                parts.append("*")
                keyword_only = True
            keyword_only |= kind is inspect.Parameter.VAR_POSITIONAL
            parts.append(written.pop(name))
            if positional_only and name == positional_only[-1]:
                parts.append("/")
        return super().gen_fn_def([*parts, *written.values()], maybe_return_annotation, **kwargs)


def _name_of(var: str) -> str:
    match = re.match(r"\**(\w+)", var)
    assert match is not None, var
    return match.group(1)


class CapturedModule(fx.GraphModule):
    """A graph that executes in place of a module and keeps its whole state.

    Parameters, buffers (with their persistence), submodules, plain attributes, hooks, the training flag and the
    signature of ``forward`` are those of the module it was captured from, under the same names and in the same order;
    methods, properties and class attributes of the original class stay reachable. ``copy.deepcopy`` honours its memo
    (parameters mapped to themselves stay shared), and pickling keeps node names and provenance.

    Args:
        root: the module to take over; its containers (parameters, submodules, hooks, ...) are shared with it.
        graph: its forward pass, in terms of `root`'s names.
        origin: the class that `root` was before any capture; by default its type.
        inherits: whether the class of the result inherits from `origin`, so that what it overrides of nn.Module
            (``train``, ``state_dict``) stays in force.
        like: another captured module, whose graph `graph` is a copy of: its compiled code serves for both.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        origin: type[nn.Module] | None = None,
        *,
        inherits: bool = False,
        like: CapturedModule | None = None,
    ) -> None:
        origin = origin or (root._origin if isinstance(root, CapturedModule) else type(root))
        nn.Module.__init__(self)  # not GraphModule's own: it would compile a graph that nobody runs
        self.__dict__.update({key: copy.copy(value) for key, value in _graph_defaults().items()})
        meta = dict(getattr(root, "meta", {})) if isinstance(root, fx.GraphModule) else {}
        self.__dict__.update({key: value for key, value in root.__dict__.items() if key not in GRAPH_STATE})
        self.__dict__["meta"] = meta
        if inherits:
            self.__dict__["_inherits"] = True
        _install(self, graph, origin, like)

    @property
    def origin(self) -> type[nn.Module]:
        """The class of the module that this graph was captured from."""
        origin: type[nn.Module] = self.__dict__["_origin"]
        return origin

    def recompile(self, *, deep: bool = True) -> PythonCode:
        """Generate ``forward`` from the graph; a call that fails raises and, unlike torch's own, prints nothing.

        Args:
            deep: whether the graphs that are its direct submodules are generated anew too, as torch does.
        """
        self.__dict__["_deep"] = deep
        try:
            written = super().recompile()
        finally:
            del self.__dict__["_deep"]
        if "__call__" in type(self).__dict__:
            del type(self).__call__
        return written

    def _recompile_submodules(self) -> list[tuple[str, PythonCode]]:
        return super()._recompile_submodules() if self.__dict__.get("_deep", True) else []

    def _get_name(self) -> str:
        return f"Captured[{self.__dict__['_origin'].__name__}]"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            origin = self.__dict__.get("_origin")
            if origin is None or name.startswith("__"):
                raise
            found = inspect.getattr_static(origin, name, None)
            if found is None:
                raise
            return found.__get__(self, type(self)) if hasattr(type(found), "__get__") else found

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        result = _blank(type(self))
        memo[id(self)] = result
        state = {key: value for key, value in self.__dict__.items() if key not in GRAPH_STATE}
        result.__dict__.update(copy.deepcopy(state, memo))
        return _install(result, copy.deepcopy(self.graph), self.origin)

    def __copy__(self) -> CapturedModule:
        result = _blank(type(self))
        result.__dict__.update({key: value for key, value in self.__dict__.items() if key not in GRAPH_STATE})
        return _install(result, copy.deepcopy(self.graph), self.origin)

    def __reduce__(self) -> tuple[Any, ...]:
        state = {key: value for key, value in self.__dict__.items() if key not in GRAPH_STATE}
        return _unpickle, (state, pack_graph(self.graph), self.graph._codegen, self.origin)


@lru_cache(maxsize=1)
def _graph_defaults() -> dict[str, Any]:
    """What a GraphModule keeps in its ``__dict__`` beside the graph and what every module keeps."""
    known = GRAPH_STATE | nn.Module().__dict__.keys()
    return {key: value for key, value in fx.GraphModule(nn.Module(), fx.Graph()).__dict__.items() if key not in known}


def _blank(kind: type[fx.GraphModule]) -> CapturedModule:
    result = kind.__new__(kind)
    assert isinstance(result, CapturedModule)
    return result


def _install(
    module: CapturedModule, graph: fx.Graph, origin: type[nn.Module], like: CapturedModule | None = None
) -> CapturedModule:
    kind = type(module)  # every GraphModule instance has a class of its own
    kind.__name__ = origin.__name__
    if module.__dict__.get("_inherits") and origin not in kind.__mro__:
        kind.__bases__ = (*kind.__bases__, origin)
    for name in _CONTAINER_METHODS:
        method = inspect.getattr_static(origin, name, None)
        if method is not None and method is not inspect.getattr_static(nn.Module, name, None):
            setattr(kind, name, method)
    module.__dict__.update(_origin=origin, _tracer_cls=None, _tracer_extras={})
    module._graph = graph
    graph.owning_module = module
    if like is None:
        module.recompile(deep=False)
    else:
        module.__dict__.update({key: like.__dict__[key] for key in _WRITTEN})
        kind.forward = type(like).forward  # as recompiling does
    return module


def _unpickle(
    state: dict[str, Any], packed: list[PackedNode], codegen: CodeGen, origin: type[nn.Module]
) -> CapturedModule:
    result = _blank(CapturedModule)
    result.__dict__.update(state)
    graph = unpack_graph(packed)
    graph.set_codegen(codegen)
    return _install(result, graph, origin)


class _Reference(NamedTuple):
    name: str


class _Function(NamedTuple):
    module: str
    name: str


class PackedNode(NamedTuple):
    """One node as plain data: picklable, nodes in arguments written as references by name."""

    name: str
    op: str
    target: Any
    args: Any
    kwargs: Any
    custom: Any


def pack_graph(graph: fx.Graph) -> list[PackedNode]:
    """The nodes of `graph` as plain data; of the metadata only ``meta["custom"]`` is kept."""

    def packed(value: Any) -> Any:
        return _mapped(value, lambda leaf: _Reference(leaf.name) if isinstance(leaf, fx.Node) else leaf)

    return [
        PackedNode(
            n.name,
            n.op,
            _packed_target(n.target),
            packed(n.args),
            packed(dict(n.kwargs)),
            dict(n.meta.get("custom", {})),
        )
        for n in graph.nodes
    ]


def _packed_target(target: Any) -> Any:
    """A function that pickle does not find by its qualified name, as ``F.max_pool2d``, by module and name."""
    if "<locals>" not in getattr(target, "__qualname__", ""):
        return target
    home, name = target.__module__, target.__name__
    return _Function(home, name) if getattr(sys.modules.get(home), name, None) is target else target


def _unpacked_target(target: Any) -> Any:
    return getattr(importlib.import_module(target.module), target.name) if isinstance(target, _Function) else target


def _mapped(value: Any, rule: Callable[[Any], Any]) -> Any:
    """The nested arguments of a node with `rule` applied to every leaf."""
    if isinstance(value, slice):
        return slice(*(_mapped(part, rule) for part in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {key: _mapped(item, rule) for key, item in value.items()}
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size | _Reference):
        items = [_mapped(item, rule) for item in value]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return rule(value)


def unpack_graph(nodes: list[PackedNode]) -> fx.Graph:
    """Rebuild the graph that `pack_graph` wrote, with the same node names."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def unpacked(value: Any) -> Any:
        return _mapped(value, lambda leaf: made[leaf.name] if isinstance(leaf, _Reference) else leaf)

    for packed in nodes:
        target = _unpacked_target(packed.target)
        node = graph.create_node(packed.op, target, unpacked(packed.args), unpacked(packed.kwargs), name=packed.name)
        if packed.custom:
            node.meta["custom"] = packed.custom
        made[packed.name] = node
    return graph


def graphs_of(module: nn.Module) -> dict[str, CapturedModule]:
    """Every captured graph in `module` by its path, the root (path "") first."""
    return {path: child for path, child in modules_of(module) if isinstance(child, CapturedModule)}
