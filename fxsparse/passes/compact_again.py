"""A compaction that was shown to be exact, made anew for a model that has not changed since."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxsparse.graph import isolated_clone
from fxsparse.passes.compact_apply import shorten
from fxsparse.passes.compact_channels import Compacted, written
from fxsparse.passes.compact_shapes import rewrite
from fxsparse.passes.compact_verify import own_tensors

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def state_of(model: nn.Module, example_inputs: Any) -> str | None:
    """A digest of everything that a run of the model on these inputs depends on; None where that cannot be told.

    It reads the content of all parameters, buffers and inputs, the modules' types and attributes. Attributes that are
    neither numbers, text nor collections of them count by identity.
    """
    found = hashlib.blake2b(digest_size=32)
    try:
        for name, module in model.named_modules(remove_duplicate=False):
            found.update(f"{name} {id(type(module))} {_attributes(module)};".encode())
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ):
            found.update(name.encode())
            _add(found, tensor)
        leaves, spec = pytree.tree_flatten(example_inputs)
        found.update(str(spec).encode())
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                _add(found, leaf)
            else:
                found.update(_told(leaf).encode())
    except (RuntimeError, TypeError, NotImplementedError):  # tensors without bytes of their own
        return None
    return found.hexdigest()


def again(model: nn.Module, found: Compacted) -> Compacted:
    """The compaction of a model that has the same state as the one for which it was shown to be exact.

    Args:
        model: the model, with its dead channels zero; it stays as it is.
        found: what was shown; its module is not read.
    """
    assert found.channels is not None
    solution = found.solution
    module = isolated_clone(model, copied=written(solution))
    rewrite(module, found.channels, solution.removed)
    loosened = shorten(module, solution.kept, solution.folds, solution.merges)
    own_tensors(module, model)
    return dataclasses.replace(found, module=module, loosened=loosened)


def _attributes(module: nn.Module) -> str:
    return ",".join(f"{key}={_told(value)}" for key, value in module.__dict__.items() if key != "training")


def _told(value: Any) -> str:
    """A value by its content where it is plain, else by what it is."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{_told(key)}:{_told(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple | set | frozenset):
        return "[" + ",".join(map(_told, value)) + "]"
    return f"<{id(value)}>"


def _add(found: Any, tensor: Tensor) -> None:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    found.update(f"{tensor.dtype} {tuple(tensor.shape)} {tensor.device}".encode())
    found.update(flat.view(torch.uint8).numpy().data)
