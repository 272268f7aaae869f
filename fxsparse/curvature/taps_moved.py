"""What in a forward pass depends on the values of the inputs: where the samples lie, and which way Python code goes.

Every tensor that depends on the inputs carries a level. What picks, orders or scatters entries of one such tensor by
another one (unpadding, sorting, routing) has results of a higher level, which goes on to all that is computed from
them.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

_LEVEL = "_fxsparse_data"
MOVED = 2
"""The level of tensors in which values of the inputs tell where samples lie; 1 is that of all others."""


class Role(enum.Enum):
    """What a function makes of tensors that depend on the inputs.

    Attributes:
        READS: Python values, on which code may branch.
        MOVES: an order or a number of entries that the values tell.
        PICKS: entries of the first tensor at places that others tell.
        WRITES: the last tensor's entries, at places in the first one that those in between tell.
        REPEATS: entries as often as a tensor tells.
        WHERE: the places of True, or a choice entry by entry.
        CONTRACTS: sums of products; they mix samples where there is no batch axis.
    """

    READS = 0
    MOVES = 1
    PICKS = 2
    WRITES = 3
    REPEATS = 4
    WHERE = 5
    CONTRACTS = 6


_NAMES: dict[Role, str] = {
    Role.READS: "item tolist __bool__ __int__ __float__ __index__ __complex__ __contains__ numpy __array__ equal "
    "allclose is_nonzero",
    Role.MOVES: "nonzero argwhere masked_select unique unique_consecutive _unique2 sort msort argsort topk kthvalue "
    "nested_tensor _nested_tensor_from_mask _pack_padded_sequence _pad_packed_sequence",
    Role.PICKS: "__getitem__ index gather take take_along_dim index_select",
    Role.WRITES: "__setitem__ index_put index_put_ index_add index_add_ index_copy index_copy_ index_reduce "
    "index_reduce_ scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_ masked_scatter "
    "masked_scatter_ put put_",
    Role.REPEATS: "repeat_interleave",
    Role.WHERE: "where",
    Role.CONTRACTS: "matmul __matmul__ __rmatmul__ mm einsum tensordot",
}
ROLES: dict[str, Role] = {name: role for role, names in _NAMES.items() for name in names.split()}
"""By name of the function."""


def level_of(tensor: Tensor) -> int:
    """0 for constants; unmarked tensors with gradients come out of code that no mode sees, such as custom functions."""
    level: int = getattr(tensor, _LEVEL, 0)
    return level or (MOVED if tensor.requires_grad else 0)


def mark(tensor: Tensor, level: int) -> None:
    """Note that a tensor depends on the inputs."""
    if getattr(tensor, _LEVEL, 0) < level:
        setattr(tensor, _LEVEL, level)


def is_order(func: Callable[..., Any]) -> bool:
    """Whether a function draws an order anew at each call, which is as good as values of the inputs."""
    return getattr(func, "__name__", "") == "randperm"


def role_of(func: Callable[..., Any]) -> Role | None:
    """The role of a function; operators of other libraries may do anything."""
    if type(func) in _OPERATORS and _namespace(func) not in _KNOWN:
        return Role.MOVES
    return ROLES.get(getattr(func, "__name__", ""))


def _namespace(func: Any) -> str:
    packet = func.overloadpacket if isinstance(func, OpOverload) else func
    return str(packet._qualified_op_name).partition("::")[0]


_OPERATORS = (OpOverload, OpOverloadPacket)
_KNOWN = ("aten", "prims", "prim", "fxsparse")


def moves(role: Role, args: tuple[Any, ...], kwargs: dict[str, Any], level: Callable[[Tensor], int]) -> bool:
    """Whether a call lets values of the inputs tell where samples lie.

    Args:
        role: of the function.
        args: its arguments.
        kwargs: its keyword arguments.
        level: of each tensor; 0 for parameters and what is computed from them.
    """
    if role is Role.READS or role is Role.MOVES:
        return role is Role.MOVES
    tensors = list(tensors_in(args, kwargs))
    levels = [level(tensor) for tensor in tensors]
    if role is Role.CONTRACTS:
        return sum(map(bool, levels)) > 1 and not _have_batch_axis(args, tensors, levels)
    if role is Role.WHERE:
        return len(args) + len(kwargs) == 1
    if role is Role.REPEATS:
        return any(levels[1:]) or (len(levels) == 1 and len(args) + len(kwargs) == 1)
    if role is Role.WRITES:
        return bool(levels[-1]) and any(levels[1:-1])
    masks = (torch.bool, torch.uint8)
    pairs = zip(tensors[1:], levels[1:], strict=True)
    return any(own and (levels[0] or tensor.dtype in masks) for tensor, own in pairs)


def _have_batch_axis(args: tuple[Any, ...], tensors: list[Tensor], levels: list[int]) -> bool:
    """Whether the factors that depend on the inputs have an axis in common with each other and with the product."""
    factors = [k for k, level in enumerate(levels) if level]
    if args and isinstance(args[0], str):
        left, arrow, right = args[0].replace(" ", "").replace("...", ".").partition("->")
        terms = left.split(",")
        if not arrow or len(terms) != len(tensors):
            return False
        return bool(set(right).intersection(*(terms[k] for k in factors)))
    return all(tensors[k].ndim > 2 for k in factors)


class Path:
    """Which way Python code goes: the values that it reads out of tensors, in order.

    Args:
        known: `trails` of passes whose way is known; None where there were none.

    Attributes:
        trails: a number for each beginning of the way.
        strayed: whether it has left all known ways.
        numbers: whether anything but True or False was read.
    """

    def __init__(self, known: Container[int] | None) -> None:
        self.trails: list[int] = []
        self.strayed = self.numbers = False
        self._known = known

    def turn(self, value: Any) -> None:
        """Go on with a value."""
        self.numbers = self.numbers or not isinstance(value, bool)
        told = repr(value) if isinstance(value, (bool, int, float, complex, list)) else next(_NEW)
        self.trails.append(hash((self.trails[-1] if self.trails else 0, told)))
        self.strayed = self.strayed or (self._known is not None and self.trails[-1] not in self._known)


_NEW = itertools.count()


def tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors among arguments, in tuples, lists and dicts too."""
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(tuple(value), {})
        elif type(value) is dict:
            yield from tensors_in(tuple(value.values()), {})
