"""The only place where fx nodes are born or erased; every birth is stamped with its provenance."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn

from fxsparse.errors import PassError
from fxsparse.graph.provenance import stamp

_IN_PLACE_OPERATORS = frozenset({"setitem", "delitem"})


def insert_call(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    pass_name: str,
    what: str,
    source: str = "",
    before: fx.Node | None = None,
    after: fx.Node | None = None,
) -> fx.Node:
    """Insert ``target(*args, **kwargs)`` next to a node; give exactly one of `before` and `after`."""
    with _place(graph, before, after):
        node = graph.call_function(target, args, kwargs or {})
    stamp(node, pass_name, what, source)
    return node


def insert_get_attr(
    module: fx.GraphModule,
    target: str,
    *,
    pass_name: str,
    what: str,
    source: str = "",
    before: fx.Node | None = None,
    after: fx.Node | None = None,
) -> fx.Node:
    """Insert a read of the tensor `target` (dotted path in `module`).

    Raises:
        PassError: when `module` has no tensor of that name.
    """
    if not isinstance(resolve(module, target), torch.Tensor):
        raise PassError(f"{pass_name}: `target` (={target}) names no tensor of the module: register it before")
    with _place(module.graph, before, after), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # plain tensor attributes are legal here, torch warns about them
        node = module.graph.get_attr(target)
    stamp(node, pass_name, what, source)
    return node


def insert_module_call(
    module: fx.GraphModule,
    target: str,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    pass_name: str,
    what: str,
    source: str = "",
    before: fx.Node | None = None,
    after: fx.Node | None = None,
) -> fx.Node:
    """Insert a call of the submodule `target` (dotted path in `module`).

    Raises:
        PassError: when `module` has no submodule of that name.
    """
    if not isinstance(resolve(module, target), nn.Module):
        raise PassError(f"{pass_name}: `target` (={target}) names no submodule: add it before")
    with _place(module.graph, before, after):
        node = module.graph.call_module(target, args, kwargs or {})
    stamp(node, pass_name, what, source)
    return node


def _place(graph: fx.Graph, before: fx.Node | None, after: fx.Node | None) -> Any:
    if before is not None and after is None:
        return graph.inserting_before(before)
    if after is not None and before is None:
        return graph.inserting_after(after)
    raise ValueError("give exactly one of `before` and `after`")


def replace_uses(old: fx.Node, new: fx.Node, users: Iterable[fx.Node] | None = None) -> int:
    """Let the users of `old` read `new` instead, except `new` itself and whatever `new` is computed from.

    Args:
        old: the node whose value is replaced.
        new: the node that takes its place.
        users: only these users, or all.

    Returns:
        How many nodes were changed.
    """
    kept = _ancestors(new) | {new}
    chosen = set(old.users) if users is None else set(users)
    changed = [user for user in list(old.users) if user in chosen and user not in kept]
    for user in changed:
        user.replace_input_with(old, new)
    return len(changed)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        current = stack.pop()
        if current not in found:
            found.add(current)
            stack.extend(current.all_input_nodes)
    return found


def retarget(node: fx.Node, target: Callable[..., Any] | str, *, pass_name: str, what: str, source: str = "") -> None:
    """Let `node` call or read something else, with the same arguments."""
    node.target = target
    stamp(node, pass_name, what, source)


def erase(node: fx.Node) -> None:
    """Erase `node`.

    Raises:
        PassError: when it still has users.
    """
    if node.users:
        readers = ", ".join(user.name for user in node.users)
        raise PassError(f"node `{node.name}` is still used by {readers}: replace its uses before erasing it")
    node.graph.erase_node(node)


def is_impure(node: fx.Node) -> bool:
    """Whether `node` must stay although nobody reads it: it writes in place, draws random numbers or is a module call.

    torch's own dead-code elimination drops ``x.add_(1)`` and keeps no random draws; this one keeps both. A call of a
    module is kept because it may update buffers or run hooks.
    """
    if node.op in ("placeholder", "output", "call_module"):
        return True
    if node.op == "get_attr":
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__")):
        return True
    if name.startswith("i") and getattr(node.target, "__module__", "") in ("_operator", "operator"):
        return name in _INPLACE
    if "out" in node.kwargs or node.kwargs.get("inplace", False):
        return True
    return node.is_impure() or _is_random(name)


_INPLACE = frozenset(
    f"i{name}" for name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift concat".split()
)


def _is_random(name: str) -> bool:
    return "dropout" in name or name.startswith(("rand", "bernoulli", "multinomial", "normal", "rrelu"))


def eliminate_dead_code(graph: fx.Graph) -> list[str]:
    """Erase the nodes that nobody reads and that do nothing else; return their names."""
    dead: list[str] = []
    for node in reversed(list(graph.nodes)):
        if not node.users and not is_impure(node):
            dead.append(node.name)
            graph.erase_node(node)
    return dead


def lint(module: fx.GraphModule) -> None:
    """Check the graph of `module`: order and ownership of nodes, and that every target resolves.

    Raises:
        PassError: with the first violation; torch's own lint lets a dangling ``get_attr`` pass.
    """
    for node in module.graph.nodes:
        if node.op not in ("get_attr", "call_module"):
            continue
        found = resolve(module, str(node.target))
        if found is None or (node.op == "call_module" and not isinstance(found, nn.Module)):
            raise PassError(f"node `{node.name}` refers to `{node.target}`, which the module does not have")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # plain tensor attributes are legal here, torch warns about them
            module.graph.lint()
    except RuntimeError as error:
        raise PassError(f"the graph is not well formed: {error}") from error


def resolve(module: nn.Module, target: str) -> Any:
    """What the dotted path `target` names in `module`, or None."""
    value: Any = module
    for name in target.split("."):
        value = getattr(value, name, None)
        if value is None:
            return None
    return value
