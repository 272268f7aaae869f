"""A model as an exported graph that can be rewritten, and the axes of its inputs that stay free."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from fxsparse.errors import CaptureError, ConfigError
from fxsparse.graph import CapturedModule, edit, fresh_inputs, preserved_rng
from fxsparse.graph.inputs import tensors_of
from fxsparse.graph.scopes import mode_of

_LOGGERS = ("torch.export", "torch.fx", "torch._dynamo")

Free = Sequence[Mapping[int, str]]
"""For each tensor among the inputs, in flattened order: its free axes, each with a name."""


def exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], free: Free | None) -> CapturedModule:
    """The model in eval mode as a functional graph of aten operators with the sizes of all values.

    Args:
        model: The model, whose tensors the graph shares.
        args: Positional inputs.
        kwargs: Keyword inputs.
        free: The axes that stay free where the model allows it; None for the first axis of the inputs, if they agree.

    Raises:
        CaptureError: torch.export does not take the model.
        ConfigError: `free` does not fit the inputs.
    """
    reasons = []
    for attempt_free in (free, ()) if free is None else (free,):
        try:
            with _quiet(model):
                return _export(model, *_with_free(args, kwargs, attempt_free))
        except ConfigError:
            raise
        except Exception as error:  # torch.export raises whatever it meets
            text = str(error).strip()
            reasons.append(f"{type(error).__name__} ({text.splitlines()[0][:200] if text else 'no message'})")
    raise CaptureError(f"torch.export does not take the model: {reasons[-1]}")


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    said = io.StringIO()  # torch.export prints the graph that it could not make
    with preserved_rng(), mode_of(model, False), warnings.catch_warnings(), torch.no_grad(), redirect_stderr(said):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            torch.backends.mha.set_fastpath_enabled(False)  # its fused kernel hides the operators of attention
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _with_free(
    args: tuple[Any, ...], kwargs: dict[str, Any], free: Free | None
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """The inputs, larger where a free axis has size 1 (torch takes those for constants), and their dynamic shapes."""
    args, kwargs = fresh_inputs(args, kwargs)
    tensors = tensors_of((args, kwargs))
    if free is None:
        sizes = {tensor.shape[0] for tensor in tensors if tensor.ndim}
        batch = len(sizes) == 1 and min(sizes) > 0
        free = [{0: "batch"} if batch and tensor.ndim else {} for tensor in tensors]
    if free and len(free) != len(tensors):
        raise ConfigError(f"`free` has {len(free)} entries, the inputs have {len(tensors)} tensors: give one for each")
    for axes, tensor in zip(free, tensors, strict=False):
        wrong = [axis for axis in axes if not 0 <= axis < tensor.ndim]
        if wrong:
            raise ConfigError(f"`free` names axis {wrong[0]} of a tensor of shape {tuple(tensor.shape)}")
    axes_of = dict(zip((id(tensor) for tensor in tensors), free, strict=False))
    larger = {id(tensor): _larger(tensor, axes_of.get(id(tensor), {})) for tensor in tensors}

    def swap(leaf: Any) -> Any:
        return larger.get(id(leaf), leaf)

    def shape(leaf: Any) -> Any:
        axes = axes_of.get(id(leaf), {}) if isinstance(leaf, Tensor) else {}
        return {axis: torch.export.Dim.AUTO for axis in axes} or None

    shapes = pytree.tree_map(shape, (args, kwargs)) if any(free) else None
    grown: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(swap, (args, kwargs))
    return grown[0], grown[1], shapes


def _larger(tensor: Tensor, axes: Mapping[int, str]) -> Tensor:
    for axis in axes:
        if tensor.shape[axis] == 1:
            tensor = torch.cat([tensor, tensor], axis)
    return tensor


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> CapturedModule:
    dynamic = None
    if shapes is not None:
        signature = inspect.signature(model.forward)
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if any(parameter.kind in kinds for parameter in signature.parameters.values()):
            raise CaptureError("the model takes any arguments, so that no axis can be named free")
        dynamic = dict(signature.bind(*shapes[0], **shapes[1]).arguments)
    program = torch.export.export(model, args, kwargs or None, dynamic_shapes=dynamic, strict=False)
    if any(_writes(node) for node in program.graph.nodes):
        program = program.run_decompositions({})  # functional, with nothing taken apart
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    _share_tied(module, model)
    codegen = module.graph._codegen
    assert isinstance(codegen, _PyTreeCodeGen)
    module.graph.set_codegen(_SharedCodeGen(codegen.pytree_info))
    return holding(module, module.graph)


def _share_tied(module: fx.GraphModule, model: nn.Module) -> None:
    """Let all reads of one tensor be one node, under the first name that the model has for it."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    rank = {name: i for i, name in enumerate(names)}
    reads: dict[Any, list[fx.Node]] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        tensor = edit.resolve(module, str(node.target))
        if isinstance(tensor, Tensor) and tensor.numel():
            reads.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), []).append(node)
    for nodes in reads.values():
        first = min(nodes, key=lambda node: rank.get(str(node.target), len(rank)))
        nodes[0].target = first.target
        for node in nodes[1:]:
            edit.replace_uses(node, nodes[0])
            edit.erase(node)


class _SharedCodeGen(_PyTreeCodeGen):
    """One for all copies of a graph: the structure of inputs and outputs never changes."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _SharedCodeGen:
        return self


def holding(module: fx.GraphModule, graph: fx.Graph) -> CapturedModule:
    """A module that runs a graph and holds only what that reads; without the hook that checks the inputs' sizes."""
    kept = fx.GraphModule(module, graph)
    return CapturedModule(kept, kept.graph, nn.Module)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
