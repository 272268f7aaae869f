"""A model as text: its graphs readable line by line, and the difference of two."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch
from torch import fx, nn

from fxsparse.graph.captured import graphs_of
from fxsparse.graph.clone import isolated_clone
from fxsparse.graph.edit import resolve
from fxsparse.graph.inputs import fresh_inputs, split_inputs
from fxsparse.graph.provenance import read
from fxsparse.graph.scopes import preserved_rng

Shapes = dict[str, dict[str, tuple[int, ...]]]


def render(module: nn.Module, example_inputs: Any = None) -> str:
    """Write every graph of `module`, one line a node: name, shape, what it calls or reads, density, provenance.

    Args:
        module: a captured model, or any module that holds captured parts; the rest is named as Python.
        example_inputs: with them, the shapes of all values are known; parameters and buffers show theirs anyway.
    """
    shapes = _shapes(module, example_inputs) if example_inputs is not None else {}
    graphs: dict[str, fx.GraphModule] = dict(graphs_of(module))
    if isinstance(module, fx.GraphModule):
        graphs.setdefault("", module)
    sections = [] if "" in graphs else [f"(root): Python, {type(module).__name__}"]
    for path, captured in sorted(graphs.items()):
        lines = [f"({path or 'root'}): graph of {type(captured).__name__}"]
        lines += [f"  {_line(captured, node, shapes.get(path, {}))}" for node in captured.graph.nodes]
        sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n"


def diff(before: nn.Module, after: nn.Module) -> str:
    """The lines in which the renderings of two models differ, as a unified diff; empty when they are the same."""
    lines = difflib.unified_diff(
        render(before).splitlines(), render(after).splitlines(), "before", "after", lineterm=""
    )
    return "\n".join(lines)


def _line(module: fx.GraphModule, node: fx.Node, shapes: dict[str, tuple[int, ...]]) -> str:
    shape = shapes.get(node.name)
    value = resolve(module, str(node.target)) if node.op in ("get_attr", "call_module") else None
    if isinstance(value, torch.Tensor):
        shape = tuple(value.shape)
    text = f"%{node.name}{'' if shape is None else ' : ' + str(list(shape))} = {_what(node, value)}"
    notes = [note for note in (_density(value), str(read(node) or "")) if note]
    return text + (f"  # {'; '.join(notes)}" if notes else "")


def _what(node: fx.Node, value: Any) -> str:
    arguments = ", ".join([*map(_argument, node.args), *(f"{k}={_argument(v)}" for k, v in node.kwargs.items())])
    if node.op == "placeholder":
        return f"input {node.target}" + (f" = {arguments}" if node.args else "")
    if node.op == "get_attr":
        return f"self.{node.target}"
    if node.op == "output":
        return f"return {arguments}"
    if node.op == "call_module":
        return f"self.{node.target}({arguments})  <{type(value).__name__}>"
    if node.op == "call_method":
        return f".{node.target}({arguments})"
    return f"{_function_name(node.target)}({arguments})"


def _function_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = getattr(target, "__name__", repr(target))
    origin = str(getattr(target, "__module__", "") or "torch")
    return f"{origin.lstrip('_').replace('torch._C._nn', 'torch.nn.functional')}.{name}"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, tuple | list):
        inner = ", ".join(map(_argument, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_argument(item)}" for key, item in value.items()) + "}"
    if isinstance(value, slice):
        return ":".join("" if part is None else _argument(part) for part in (value.start, value.stop, value.step))
    return repr(value)


def _density(value: Any) -> str:
    """The density of a mask, or of the masks beside the parameters of a layer."""
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool and value.numel() and not value.is_meta:
        return f"density {float(value.float().mean()):.4f}"
    if isinstance(value, nn.Module):
        found = [
            f"{name} density {float(buffer.float().mean()):.4f}"
            for name, buffer in value.named_buffers(recurse=False)
            if name.endswith("_mask") and buffer.dtype == torch.bool and buffer.numel() and not buffer.is_meta
        ]
        return ", ".join(found)
    return ""


class _ShapeReader(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.shapes[n.name] = tuple(result.shape)
        return result


def _shapes(module: nn.Module, example_inputs: Any) -> Shapes:
    """Run a copy of `module` and read the shape of every value in its graphs."""
    args, kwargs = fresh_inputs(*split_inputs(example_inputs))
    clone = isolated_clone(module)
    found: Shapes = {}
    for path, captured in graphs_of(clone).items():
        _read_shapes(captured, found.setdefault(path, {}))
    with preserved_rng(), torch.no_grad():
        clone(*args, **kwargs)
    return found


def _read_shapes(captured: fx.GraphModule, found: dict[str, tuple[int, ...]]) -> None:
    def interpret(*args: Any, **kwargs: Any) -> Any:
        bound = _bind(captured, args, kwargs)
        reader = _ShapeReader(captured)
        result = reader.run(*bound)
        found.update(reader.shapes)
        return result

    captured.__dict__["forward"] = interpret  # on a throw-away copy


def _bind(captured: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The values of the placeholders in their order, star arguments packed as the graph expects them."""
    bound = inspect.signature(type(captured).forward).bind(captured, *args, **kwargs)
    bound.apply_defaults()
    values: list[Any] = []
    for node in captured.graph.find_nodes(op="placeholder"):
        values.append(bound.arguments[str(node.target).lstrip("*")])
    return values
