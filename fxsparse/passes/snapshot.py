"""What a model is made of, in a form that two moments can be compared by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxsparse.graph.tree import modules_of
from fxsparse.nn import MaskSpec, mask_spec


@dataclass(frozen=True)
class Snapshot:
    """Structure and values of a model at one moment.

    Attributes:
        tree: Module path -> (identity, class, training flag).
        graphs: Path of each GraphModule -> its graph in writing.
        tensors: Name of each parameter and buffer -> (identity, kind, shape, dtype, checksum of its bits).
        specs: Name of each masked parameter -> what its mask is.
        attributes: Name of each public plain attribute -> its value; only numbers, strings and tuples of them count.
    """

    tree: dict[str, tuple[int, type, bool]]
    graphs: dict[str, str]
    tensors: dict[str, tuple[object, ...]]
    specs: dict[str, MaskSpec]
    attributes: dict[str, str]

    @staticmethod
    def of(model: nn.Module) -> Snapshot:
        """Take the snapshot; the model stays as it is."""
        modules = dict(model.named_modules(remove_duplicate=False))
        specs = {}
        for path, module in modules.items():
            for attribute, _ in module.named_parameters(recurse=False, remove_duplicate=False):
                spec = mask_spec(module, attribute)
                if spec is not None:
                    specs[join(path, attribute)] = spec
        return Snapshot(
            {path: (id(module), type(module), module.training) for path, module in modules.items()},
            {path: _written(module.graph) for path, module in modules.items() if isinstance(module, fx.GraphModule)},
            _tensors(model),
            specs,
            {
                join(path, name): repr(value)
                for path, module in modules.items()
                for name, value in module.__dict__.items()
                if not name.startswith("_") and name != "training" and _is_plain(value)
            },
        )

    def difference(self, later: Snapshot) -> str | None:
        """The first thing in which `later` differs, in words; None when nothing does."""
        for what in ("tree", "graphs", "tensors", "specs", "attributes"):
            old, new = getattr(self, what), getattr(later, what)
            if list(old) != list(new):
                changed = sorted(set(old) ^ set(new)) or ["their order"]
                return f"the names of its {what} ({', '.join(changed[:3])})"
            for name in old:
                if old[name] != new[name]:
                    return f"`{name or 'the root'}` of its {what}"
        return None


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | complex | str)


def join(path: str, name: str) -> str:
    """The full name of something in the module at `path`; the root's path is empty."""
    return f"{path}.{name}" if path else name


def graphs_of(module: nn.Module) -> dict[str, fx.GraphModule]:
    """Every GraphModule of a model by its path, the root's being empty; one that has several paths under the first."""
    return {path: found for path, found in modules_of(module) if isinstance(found, fx.GraphModule)}


def _written(graph: fx.Graph) -> str:
    return "\n".join(node.format_node() or node.op for node in graph.nodes)


def _tensors(model: nn.Module) -> dict[str, tuple[object, ...]]:
    sums: dict[int, int] = {}

    def described(kind: str, tensor: Tensor) -> tuple[object, ...]:
        if id(tensor) not in sums:
            sums[id(tensor)] = _checksum(tensor)
        return (id(tensor), kind, tuple(tensor.shape), tensor.dtype, tensor.requires_grad, sums[id(tensor)])

    found = {name: described("parameter", p) for name, p in model.named_parameters(remove_duplicate=False)}
    return found | {name: described("buffer", b) for name, b in model.named_buffers(remove_duplicate=False)}


@torch.no_grad()
def _checksum(tensor: Tensor) -> int:
    """Sum modulo 2^64 of the tensor's words, weighted by place in a short cycle; 0 for tensors without values."""
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.numel() == 0 or type(tensor.data) is not Tensor:
        return 0
    raw = tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
    wide = raw[: raw.numel() // 8 * 8].view(torch.int64) if raw.storage_offset() % 8 == 0 else raw.to(torch.int64)
    rest = raw[raw.numel() // 8 * 8 :].to(torch.int64)
    total = rest.sum()
    for start in range(5):
        total = total + (2 * start + 1) * wide[start::5].sum()
    return int(total)
