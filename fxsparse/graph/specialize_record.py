"""Writes the torch functions and module calls of one eager run into an fx.Graph."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx, is_grad_enabled, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils import _pytree as pytree

from fxsparse.graph.clone import isolated_clone
from fxsparse.graph.guards import NOTHING, Untraceable, noticing_modes, patching, refusing_contexts, unchanged
from fxsparse.graph.inputs import fresh_inputs, tensors_of
from fxsparse.graph.scopes import SEED, mode_of, seeded
from fxsparse.graph.specialize_calls import PLAIN, FunctionCall, check_inputs, check_read, describe
from fxsparse.graph.specialize_functions import PROPERTIES, SHAPED_BY_VALUES, SIZES, VALUES, name_of
from fxsparse.graph.specialize_names import names_of, own_tensors, python_generators
from fxsparse.graph.specialize_output import is_native, rebuilding
from fxsparse.graph.tracer import is_leaf

_OPERATORS = {"__getitem__": operator.getitem, "__setitem__": operator.setitem}


class CallRecorder(TorchFunctionMode):
    """Records every call that runs while it is active, into `graph`.

    Layers and other leaves (`is_leaf`) stay module calls; everything else is written down as the torch functions that
    ran. A value that Python code reads out of a tensor gets a `check_read`.

    Args:
        model: the model that will run, a copy to which hooks may be added.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.graph = fx.Graph()
        self.reads = 0
        self.flags: dict[str, None] = {}
        self.paths = {id(module): path for path, module in model.named_modules()}
        self._nodes: dict[int, tuple[torch.Tensor, fx.Node]] = {}
        self._names = names_of(model)
        self._sized: set[fx.Node] = set()  # nodes whose shape depends on values
        self._bare: set[fx.Node] = set()  # nodes without a gradient function
        self._inside = 0
        self._waiting: list[tuple[Any, ...]] = []

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Graph:
        """Call the model's forward pass and return its graph.

        Raises:
            Untraceable: when the graph would not say all that the run did.
        """
        signature = inspect.signature(type(self.model).forward)
        bound = signature.bind(self.model, *args, **kwargs)
        bound.apply_defaults()
        self._add_inputs(dict(list(bound.arguments.items())[1:]), signature)
        handles = self._watch_leaves()
        before = python_generators()
        try:
            with ExitStack() as stack:
                stack.enter_context(unchanged(self.model))
                stack.enter_context(refusing_contexts(kept=(torch.autograd.Function, torch.no_grad, *_GRAD_SCOPES)))
                stack.enter_context(patching(torch.autograd.Function, "apply", self._recorded_apply()))
                stack.enter_context(noticing_modes(set(), self._note_mode))
                stack.enter_context(self)
                output = self.model.forward(*args, **kwargs)
            self._finish(output)
        finally:
            for handle in handles:
                handle.remove()
        if python_generators() != before:
            raise Untraceable("it draws random numbers in Python code", "draw them with torch functions")
        return self.graph

    def _note_mode(self, module: nn.Module) -> None:
        if not self._inside and id(module) in self.paths:
            self.flags[self.paths[id(module)]] = None

    # inputs

    def _add_inputs(self, arguments: dict[str, Any], signature: inspect.Signature) -> None:
        stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        made = {}
        for name, value in arguments.items():
            parameter = signature.parameters[name]
            default = () if parameter.default is inspect.Parameter.empty else (parameter.default,)
            made[name] = self.graph.create_node("placeholder", stars.get(parameter.kind, "") + name, default, name=name)
            for leaf in pytree.tree_leaves(value):
                if not (leaf is None or isinstance(leaf, (torch.Tensor, *PLAIN))):
                    kind = type(leaf).__name__
                    raise Untraceable(f"its input `{name}` holds a {kind}, which cannot be guarded", "pass tensors")
        guarded = {name: (made[name], describe(value)) for name, value in arguments.items()}
        guarded |= self._dtype()
        nodes, said = zip(*guarded.values(), strict=True) if guarded else ((), ())
        self.graph.call_function(check_inputs, (nodes, tuple(guarded), said))
        for name, value in arguments.items():
            for path, leaf in pytree.tree_flatten_with_path(value)[0]:
                if isinstance(leaf, torch.Tensor):
                    self._file(leaf, self._part(made[name], path))

    def _dtype(self) -> dict[str, tuple[fx.Node, str]]:
        """The dtype of the model, guarded like an input: that of its smallest parameter, no matrix if possible."""
        floating = [t for t in own_tensors(self.model) if t.is_floating_point()]
        if not floating:
            return {}
        tensor = min(floating, key=lambda t: (t.ndim >= 2, t.numel()))
        dtype = self.graph.call_function(getattr, (self._node_of(tensor), "dtype"))
        return {f"dtype of {self._names[id(tensor)]}": (dtype, describe(tensor.dtype))}

    def _part(self, node: fx.Node, path: tuple[Any, ...]) -> fx.Node:
        for key in path:
            if isinstance(key, pytree.GetAttrKey):
                node = self.graph.call_function(getattr, (node, key.name))
            else:
                index = key.idx if isinstance(key, pytree.SequenceKey) else key.key
                node = self.graph.call_function(operator.getitem, (node, index))
        return node

    # modules

    def _watch_leaves(self) -> list[Any]:
        leaves = [
            (path, module)
            for path, module in self.model.named_modules()
            if path and is_leaf(module) and not isinstance(module, torch.jit.ScriptModule)
        ]
        handles: list[Any] = []
        for path, module in leaves:
            handles.append(module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(path)))
        return handles

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._inside:
            self._waiting.append((self._packed(args), self._packed(kwargs)))
        self._inside += 1

    def _leave(self, path: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._inside -= 1
            if not self._inside:
                node = self.graph.create_node("call_module", path, *self._waiting.pop())
                self._file_all(output, node, detached=not is_grad_enabled())

        return leave

    def _recorded_apply(self) -> Any:
        original = torch.autograd.Function.__dict__["apply"].__func__

        def apply(kind: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return original(kind, *args, **kwargs)
            packed = self._packed(args), self._packed(kwargs)
            self._inside += 1
            try:
                result = original(kind, *args, **kwargs)
            finally:
                self._inside -= 1
            node = self.graph.create_node("call_function", FunctionCall(kind), *packed)
            self._file_all(result, node, detached=not is_grad_enabled())
            return result

        return classmethod(apply)

    # functions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        name = name_of(func)
        held = tensors_of((args, kwargs))
        before = [id(tensor) for tensor in held]
        packed = self._packed_call(func, name, args, kwargs) if held or name not in _SILENT else None
        result = func(*args, **kwargs)
        if tensors_of(result) or (result is None and held and name != "__set__"):
            assert packed is not None
            node = self.graph.create_node(*packed)
            if name in SHAPED_BY_VALUES or self._picks_by_values(name, args) or self._any_sized(before):
                self._sized.add(node)
            self._file_all(result, node)
            if not is_grad_enabled():
                self._bare.update(self._nodes[id(tensor)][1] for tensor in tensors_of(result))
        elif held:
            self._observe(name, packed, result, before)
        return result

    def _observe(self, name: str, packed: Any, result: Any, held: list[int]) -> None:
        """A call that gave Python something that is no tensor."""
        if name in VALUES or (name in SIZES and self._any_sized(held)):
            read = self.graph.create_node(*packed)
            self.graph.call_function(check_read, (read, repr(result), name.strip("_")))
            self.reads += 1
        elif name not in PROPERTIES:
            raise Untraceable(f"it calls `{name}` of a tensor, which a graph cannot follow", NOTHING)

    def _picks_by_values(self, name: str, args: tuple[Any, ...]) -> bool:
        return name == "__getitem__" and any(t.dtype in (torch.bool, torch.uint8) for t in tensors_of(args[1:]))

    def _any_sized(self, held: list[int]) -> bool:
        return any(key in self._nodes and self._nodes[key][1] in self._sized for key in held)

    def _packed_call(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        packed, named = self._packed(args), self._packed(kwargs)
        if not is_grad_enabled():
            packed, named = self._detached((args, kwargs), (packed, named))
        if getattr(func, "__name__", "") == "__get__":
            return "call_function", getattr, (packed[0], name), {}
        if name in _OPERATORS:
            return "call_function", _OPERATORS[name], packed, named
        if is_tensor_method_or_property(func) and args and isinstance(args[0], torch.Tensor):
            return "call_method", name, packed, named
        return "call_function", func, packed, named

    def _detached(self, values: Any, packed: Any) -> Any:
        """Nothing that runs without gradients passes any on, whatever requires them at the next call."""
        wanted = dict.fromkeys(self._node_of(t) for t in tensors_of(values) if t.is_floating_point() or t.is_complex())
        made = {node: self.graph.call_method("detach", (node,)) for node in wanted if node not in self._bare}
        self._bare.update(made.values())
        return fx.node.map_arg(packed, lambda node: made.get(node, node))

    # values

    def _packed(self, value: Any) -> Any:
        """An argument with nodes instead of tensors."""
        if isinstance(value, torch.Tensor):
            return self._node_of(value)
        if isinstance(value, torch.Size):
            return tuple(int(size) for size in value)
        if type(value) in (tuple, list):
            return type(value)(map(self._packed, value))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self._packed, value))
        if type(value) is dict:
            return {key: self._packed(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*map(self._packed, (value.start, value.stop, value.step)))
        if value is None or value is Ellipsis or isinstance(value, PLAIN):
            return value
        raise Untraceable(f"it passes a {type(value).__name__} to a torch function", NOTHING)

    def _node_of(self, tensor: torch.Tensor) -> fx.Node:
        found = self._nodes.get(id(tensor))
        if found is not None:
            return found[1]
        if id(tensor) not in self._names:
            raise Untraceable(
                f"it uses a tensor of shape {tuple(tensor.shape)} that no recorded function made",
                "register it as a buffer, or make it with torch functions",
            )
        node = self.graph.create_node("get_attr", self._names[id(tensor)])
        self._file(tensor, node)
        return node

    def _file(self, tensor: torch.Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = (tensor, node)

    def _file_all(self, value: Any, node: fx.Node, *, detached: bool = False) -> None:
        if isinstance(value, torch.Tensor):
            sized = node in self._sized
            if detached and (value.is_floating_point() or value.is_complex()):
                node = self.graph.call_method("detach", (node,))
            if sized:
                self._sized.add(node)
            self._file(value, node)
        elif isinstance(value, tuple | list | dict):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if tensors_of(item):
                    part = self.graph.call_function(operator.getitem, (node, key))
                    if node in self._sized:
                        self._sized.add(part)
                    self._file_all(item, part, detached=detached)
        elif tensors_of(value):
            raise Untraceable(
                f"a call inside returns a {type(value).__name__}, which a graph cannot take apart", NOTHING
            )

    def _finish(self, output: Any) -> None:
        self._inside += 1  # copying is no part of the model
        if is_native(output):
            self._refuse_parameters(tensors_of(output))
            self.graph.output(self._packed(output))
            return
        rebuild, tensors = rebuilding(output, [*(t for t, _ in self._nodes.values()), *own_tensors(self.model)])
        self._refuse_parameters(tensors)
        self.graph.output(self.graph.call_function(rebuild, tuple(map(self._node_of, tensors))))

    def _refuse_parameters(self, output: list[torch.Tensor]) -> None:
        for tensor in output:
            if isinstance(tensor, nn.Parameter):
                name = self._names.get(id(tensor), "?")
                raise Untraceable(f"it returns the parameter `{name}`, which a mask node would replace", NOTHING)


_GRAD_SCOPES = (torch.enable_grad, torch.set_grad_enabled)
_SILENT = frozenset({"_set_grad_enabled"})


def record_calls(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool
) -> tuple[CallRecorder, fx.Graph]:
    """The graph of one run of a copy of `model` in the given mode, with gradients.

    Raises:
        Untraceable: when the graph would not say all that the run did, or the model fails.
    """
    clone = isolated_clone(model, copied=[name for name, _ in model.named_parameters()])
    if model._forward_pre_hooks:
        raise Untraceable("it has forward pre-hooks, which may change its inputs", "remove them before")
    mode = "train" if training else "eval"
    with mode_of(clone, training), seeded(SEED), torch.enable_grad():
        recorder = CallRecorder(clone)
        new_args, new_kwargs = fresh_inputs(args, kwargs)
        try:
            return recorder, recorder.run(new_args, new_kwargs)
        except Untraceable:
            raise
        except Exception as error:  # whatever the user's forward raises
            said = (str(error).strip().splitlines() or [""])[0][:160]
            raise Untraceable(f"in {mode} mode its run raises {type(error).__name__} ({said})", NOTHING) from error
