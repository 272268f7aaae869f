"""The operator graph: a model at the level of aten operators, each with its module's path and shapes.

It is what the compiler reasons on; what it learns is said in terms of (parameter name, dimension, indices), so that it
applies to the model in whatever form it runs.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxsparse.errors import CaptureError, ConfigError
from fxsparse.graph.clone import isolated_clone
from fxsparse.graph.inputs import fresh_inputs, split_inputs, tensors_of
from fxsparse.graph.operators_record import GraphValue, OperatorRecorder
from fxsparse.graph.scopes import mode_of, preserved_rng

ROUTES = ("export", "recorder")
"""The two ways to an operator graph, the preferred one first."""


@dataclass(frozen=True, eq=False)
class OperatorGraph:
    """A model at the aten level.

    The graph's nodes are placeholders (inputs), ``get_attr`` (parameters, buffers, constants), ``call_function`` of
    aten operators and ``operator.getitem``, and the output. Each node's ``meta`` holds ``shape`` (a tuple of ints; it
    is missing where the value is no tensor), ``dtype``, and ``path`` (of the innermost module that ran it).

    Attributes:
        graph: the nodes.
        route: "export" (torch.export) or "recorder" (one eager run, seen from below).
        generic: whether the graph holds for other batch sizes; else it is specialised to the example inputs.
        training: the mode it was taken in.
        sources: names of ``get_attr`` nodes -> the first name of the parameter or buffer.
        constants: names of the other ``get_attr`` nodes -> their tensor.
        refusals: why a preferred route, or generality, was not to be had.
        reads: names of the nodes whose values flowed into Python (``item``, ``if x.sum() > 0``): another input may take
            another way through the model.
        unread: parameters that the run did not read.
        module_nodes: for the recorder: (path of a captured graph, node's name) -> what each of its runs returned, with
            tensors replaced by their nodes here.
    """

    graph: fx.Graph
    route: str
    generic: bool
    training: bool
    sources: Mapping[str, str]
    constants: Mapping[str, torch.Tensor] = field(repr=False, default_factory=dict)
    refusals: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    module_nodes: Mapping[tuple[str, str], list[GraphValue]] = field(repr=False, default_factory=dict)

    def source(self, node: fx.Node) -> str | None:
        """The parameter or buffer that `node` reads, or None."""
        return self.sources.get(node.name)

    @staticmethod
    def shape(node: fx.Node) -> tuple[int, ...] | None:
        """The shape of the tensor that `node` makes; None where it makes none, or several."""
        shape: tuple[int, ...] | None = node.meta.get("shape")
        return shape

    @staticmethod
    def path(node: fx.Node) -> str:
        """The path of the innermost module that ran `node`, "" for the model itself."""
        return str(node.meta.get("path", ""))

    def __len__(self) -> int:
        return len(self.graph.nodes)

    def __str__(self) -> str:
        kind = "generic" if self.generic else "specialised to the example inputs"
        lines = [f"operator graph by {self.route}, {kind}, {len(self)} nodes"]
        lines += [f"  {reason}" for reason in self.refusals]
        lines += [str(node.format_node()) for node in self.graph.nodes]
        return "\n".join(lines)


def operator_graph(
    model: nn.Module, example_inputs: Any, training: bool = False, *, routes: Collection[str] = ROUTES
) -> OperatorGraph:
    """The operator graph of `model`; neither the model, the inputs nor any global state changes.

    Args:
        model: any module.
        example_inputs: a tuple of positional inputs, or ``(args, kwargs)``.
        training: take the graph of train mode.
        routes: which of `ROUTES` may be used; they are tried in that order.

    Raises:
        CaptureError: when no route takes the model; the message has every route's reason.
        ConfigError: when `example_inputs` is neither form, or `routes` names no route.
    """
    args, kwargs = split_inputs(example_inputs)
    if not isinstance(model, nn.Module):
        raise CaptureError(f"`model` (={type(model).__name__}) must be a torch.nn.Module")
    wrong = [route for route in routes if route not in ROUTES]
    if wrong or not routes:
        raise ConfigError(f"`routes` (={list(routes)}) must name some of {', '.join(ROUTES)}")
    makers: dict[str, Callable[..., OperatorGraph | None]] = {"export": _exported, "recorder": _recorded}
    refusals: list[str] = []
    for route in ROUTES:
        if route in routes:
            made = makers[route](model, args, kwargs, training, refusals)
            if made is not None:
                return made
    raise CaptureError(f"the model has no operator graph: {'; '.join(refusals)}")


@contextmanager
def _running(model: nn.Module, training: bool) -> Iterator[nn.Module]:
    """A copy of the model on which nothing that a run does can matter, in the given mode."""
    clone = isolated_clone(model, copied=[name for name, _ in model.named_parameters(remove_duplicate=False)])
    fast = torch.backends.mha.get_fastpath_enabled()
    with preserved_rng(), mode_of(clone, training):
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # its fused kernel hides the operators of attention
            yield clone
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def _recorded(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool, refusals: list[str]
) -> OperatorGraph | None:
    failure = ""
    for scope in (torch.inference_mode, torch.no_grad):  # inference mode shows whole operators (linear, einsum)
        with _running(model, training) as clone:
            recorder = OperatorRecorder(clone)
            try:
                with scope(), recorder.watching():
                    inputs = fresh_inputs(args, kwargs)
                    recorder.add_inputs(inputs)
                    with recorder:
                        output = clone(*inputs[0], **inputs[1])
                    recorder.finish(output)
            except Exception as error:
                failure = failure or f"recorder: the model raises {type(error).__name__} ({_first_line(error)})"
                continue
        return OperatorGraph(
            graph=recorder.graph,
            route="recorder",
            generic=False,
            training=training,
            sources=recorder.sources,
            constants=recorder.constants,
            refusals=tuple(refusals),
            reads=tuple(recorder.reads),
            unread=recorder.unread(),
            module_nodes=recorder.module_nodes,
        )
    refusals.append(failure)
    return None


def _exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool, refusals: list[str]
) -> OperatorGraph | None:
    """torch.export, with a dynamic batch where it allows one."""
    for dynamic in (True, False):
        try:
            with _running(model, training) as clone, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = _export(clone, *fresh_inputs(args, kwargs), dynamic)
                names = _first_names(clone)
        except Exception as error:
            what = "export with a dynamic batch" if dynamic else "export"
            refusals.append(f"{what}: {type(error).__name__} ({_first_line(error)})")
            continue
        generic = any(
            isinstance(size, torch.SymInt)
            for node in program.graph.find_nodes(op="placeholder")
            for size in getattr(node.meta.get("val"), "shape", ())
        )
        return _from_program(program, names, generic, training, refusals)
    return None


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool
) -> torch.export.ExportedProgram:
    shapes = None
    if dynamic:
        sizes = [t.shape[0] for t in tensors_of((args, kwargs)) if t.ndim > 0]
        if not sizes or sizes[0] < 2:  # torch specialises sizes 0 and 1
            raise ConfigError("the first axis of the example inputs is no batch of at least 2")
        batch = sizes[0]

        def spec(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return None
            return {0: torch.export.Dim.AUTO} if value.ndim and value.shape[0] == batch else None

        shapes = pytree.tree_map(spec, (args, kwargs))
    program = torch.export.export(model, args, kwargs or None, dynamic_shapes=_by_argument(model, shapes), strict=False)
    if any(_writes(node) for node in program.graph.nodes):
        program = program.run_decompositions({})  # functional, with nothing taken apart
    return program


def _by_argument(model: nn.Module, shapes: Any) -> Any:
    """Dynamic shapes as torch.export wants them: one entry per bound argument, positional ones first."""
    if shapes is None:
        return None
    args, kwargs = shapes
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return dict(bound.arguments.items()) if not _variadic(model) else None


def _variadic(model: nn.Module) -> bool:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.kind in kinds for p in inspect.signature(model.forward).parameters.values())


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> its first name."""
    first: dict[int, str] = {}
    result: dict[str, str] = {}
    for members in (model.named_parameters, model.named_buffers):
        for name, tensor in members(remove_duplicate=False):
            result[name] = first.setdefault(id(tensor), name)
    return result


def _from_program(
    program: torch.export.ExportedProgram, names: Mapping[str, str], generic: bool, training: bool, refusals: list[str]
) -> OperatorGraph:
    """The program's graph with parameters, buffers and constants as ``get_attr`` nodes."""
    signature = program.graph_signature
    targets: dict[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = dict(signature.inputs_to_lifted_tensor_constants)
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    sources: dict[str, str] = {}
    constants: dict[str, torch.Tensor] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and (node.name in targets or node.name in lifted):
            target = targets.get(node.name) or lifted[node.name]
            copy = graph.create_node("get_attr", names.get(target, target), name=node.name)
            if target in names:
                sources[copy.name] = names[target]
            elif target in program.constants:
                constants[copy.name] = program.constants[target]
        else:
            copy = graph.node_copy(node, lambda n: made[n])
        made[node] = copy
        copy.meta = _plain_meta(node)
    read = set(sources.values())
    unread = tuple(dict.fromkeys(n for f in names.values() if (n := f) in program.state_dict and f not in read))
    return OperatorGraph(graph, "export", generic, training, sources, constants, tuple(refusals), unread=unread)


def _plain_meta(node: fx.Node) -> dict[str, Any]:
    value = node.meta.get("val")
    stack = list(node.meta.get("nn_module_stack", {}).values())
    meta: dict[str, Any] = {"path": _path_of(stack)}
    if isinstance(value, torch.Tensor):
        meta |= {"shape": tuple(_hint(size) for size in value.shape), "dtype": value.dtype}
    return meta


def _path_of(stack: list[Any]) -> str:
    path = stack[-1][0] if stack else ""
    return ".".join(part.split("@")[0] for part in str(path).split(".")) if path else ""


def _hint(size: Any) -> int:
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else -1
    return int(size)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else "no message"
