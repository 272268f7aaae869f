"""Writes the aten operators of one eager run into an fx.Graph."""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from fxsparse.graph.captured import CapturedModule, graphs_of

GraphValue = Any
"""The value of a module-graph node: a nested structure in which tensors are nodes of the operator graph."""

_READERS = frozenset({"aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::is_nonzero", "aten::nonzero"})


class OperatorRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its __init_subclass__ so
    """Records every operator that runs while it is active, into `graph`.

    In-place operators make a new node that later readers see. A write into one of several tensors that share memory
    marks the nodes of all of them with ``meta["aliased_write"]``.

    Args:
        model: the model that will run, a copy to which hooks may be added.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.model = model
        self.graph = fx.Graph()
        self.sources: dict[str, str] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.reads: list[str] = []
        self.module_nodes: dict[tuple[str, str], list[GraphValue]] = {}
        self.stack: list[str] = [""]
        self.place: tuple[str, str] | None = None
        self._nodes: MutableMapping[torch.Tensor, fx.Node] = WeakTensorKeyDictionary()
        self._sharing: dict[int, list[tuple[TensorWeakRef, fx.Node]]] = {}  # a storage -> its tensors and their nodes
        self._names: dict[int, str] = {}
        for members in (model.named_buffers, model.named_parameters):
            for name, tensor in reversed(list(members(remove_duplicate=False))):
                self._names[id(tensor)] = name

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note the running module, and which node of a captured graph is running."""
        handles: list[Any] = []
        try:
            for path, module in self.model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                handles.append(module.register_forward_pre_hook(self._enter(path), prepend=True))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
            for path, module in graphs_of(self.model).items():
                _interpret(self, path, module)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            self.stack.append(path)

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()

    def add_inputs(self, inputs: Any) -> None:
        """Give every tensor of the inputs a placeholder."""
        for index, tensor in enumerate(t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)):
            if tensor not in self._nodes:
                self._file(tensor, self.graph.placeholder(f"input_{index}"))

    def finish(self, output: Any) -> None:
        """Write the output node."""
        self.graph.output(pytree.tree_map(self.node_of, output, is_leaf=_is_leaf))

    def unread(self) -> tuple[str, ...]:
        """Parameters that no operator read."""
        read = set(self.sources.values())
        return tuple(name for name, _ in self.model.named_parameters() if name not in read)

    def node_of(self, value: Any) -> Any:
        """The node of a tensor; anything else as it is."""
        if not isinstance(value, torch.Tensor):
            return value if _is_plain(value) else None
        found = self._nodes.get(value)
        return self._attribute(value) if found is None else found

    def _attribute(self, tensor: torch.Tensor) -> fx.Node:
        name = self._names.get(id(tensor))
        known = name is not None
        target = name if name is not None else f"_constant_{len(self.constants)}"
        node = self.graph.create_node("get_attr", target)
        if known:
            self.sources[node.name] = target
        else:
            self.constants[node.name] = tensor
        self._file(tensor, node)
        return node

    def _file(self, tensor: torch.Tensor, node: fx.Node) -> None:
        self._nodes[tensor] = node
        node.meta.update(shape=tuple(tensor.shape), dtype=tensor.dtype, path=self.stack[-1], place=self.place)
        key = _storage(tensor)
        if key is not None:
            self._sharing.setdefault(key, []).append((TensorWeakRef(tensor), node))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default and args[0] in self._nodes:
            result = func(*args, **kwargs)
            self._nodes[result] = self._nodes[args[0]]
            return result
        packed = pytree.tree_map(self.node_of, (args, kwargs), is_leaf=_is_leaf)
        result = func(*args, **kwargs)
        self._record(func, args, packed, result)
        return result

    def _record(self, func: Any, args: tuple[Any, ...], packed: Any, result: Any) -> None:
        node = self.graph.create_node("call_function", func, *packed)
        node.meta.update(path=self.stack[-1], place=self.place)
        if func._schema.name in _READERS:
            self.reads.append(node.name)
        if isinstance(result, torch.Tensor):
            if func._schema.is_mutable:
                self._note_write(args, node)
            self._file(result, node)
        elif isinstance(result, tuple | list):
            for index, item in enumerate(result):
                if isinstance(item, torch.Tensor):
                    part = self.graph.create_node("call_function", operator.getitem, (node, index))
                    self._file(item, part)

    def _alive(self, key: int) -> list[tuple[torch.Tensor, fx.Node]]:
        """The living tensors of a storage; a dead one's address may have been used again."""
        found = [(ref(), ref, node) for ref, node in self._sharing.get(key, ())]
        self._sharing[key] = [(ref, node) for tensor, ref, node in found if tensor is not None]
        return [(tensor, node) for tensor, _, node in found if tensor is not None]

    def _note_write(self, args: tuple[Any, ...], node: fx.Node) -> None:
        written = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if written is None:
            return
        key = _storage(written)
        others = [n for t, n in self._alive(key) if t is not written] if key is not None else []
        for other in others:
            other.meta["aliased_write"] = True
        if others:
            node.meta["aliased_write"] = True


def _interpret(recorder: OperatorRecorder, path: str, module: CapturedModule) -> None:
    """Let a captured graph run node by node, so that each node's value is known."""
    signature = inspect.signature(module.forward)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values()):
        return

    def forward(self: CapturedModule, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        values: list[Any] = []
        for name, parameter in signature.parameters.items():
            variadic = parameter.kind is inspect.Parameter.VAR_POSITIONAL
            values.extend(bound.arguments[name] if variadic else (bound.arguments[name],))
        return _Interpreter(recorder, path, self).run(*values, enable_io_processing=False)

    module.__dict__["forward"] = types.MethodType(forward, module)


class _Interpreter(fx.Interpreter):
    def __init__(self, recorder: OperatorRecorder, path: str, module: CapturedModule) -> None:
        super().__init__(module)
        self.recorder, self.path = recorder, path
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        outer, self.recorder.place = self.recorder.place, (self.path, n.name)
        try:
            result = super().run_node(n)
        finally:
            self.recorder.place = outer
        if n.op != "output":
            value = pytree.tree_map(self.recorder.node_of, result, is_leaf=_is_leaf)
            self.recorder.module_nodes.setdefault((self.path, n.name), []).append(value)
        return result


def _is_leaf(value: Any) -> bool:
    return isinstance(value, torch.Size)


def _is_plain(value: Any) -> bool:
    plain = (int, float, bool, str, complex, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
    return value is None or isinstance(value, plain)


def _storage(tensor: torch.Tensor) -> int | None:
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse and other layouts without a storage
        return None
    return int(storage._cdata)
