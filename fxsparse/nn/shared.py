"""The fast path of a layer whose weight has a shared support, beside the dense product with the masked weight."""

from __future__ import annotations

import enum
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fxsparse.errors import ConfigError
from fxsparse.nn.select import functions_are_seen
from fxsparse.nn.shared_conv import convolved
from fxsparse.nn.shared_gradient import MASK, WEIGHT, sink_of, wanted, watcher_of
from fxsparse.nn.shared_index import drop_index, eligible, held_index, holds_index, write_index_
from fxsparse.nn.shared_kernels import Kernel, constant_in_graphs
from fxsparse.nn.shared_product import (
    Index,
    ReusedGradient,
    Rows,
    Watcher,
    alive_values,
    product,
    read_alive,
    spread_values,
)
from fxsparse.nn.shared_triton import runs as fused_runs
from fxsparse.nn.slot import SHARED, slots_of

ROW_ORDER = "weight_row_order"


class FastMode(enum.Enum):
    """How the products of layers with shared support are computed."""

    AUTO = "auto"
    """Whichever is faster, measured once per shape and device; the choice may change the last bits of a result."""
    SPARSE = "sparse"
    """By gathers and small dense products, wherever a weight is sparse."""
    TRITON = "triton"
    """By fused Triton kernels where they run (linear layers on CUDA), as SPARSE elsewhere."""
    DENSE = "dense"
    """By dense products with the masked weight."""


class Mover(Protocol):
    """Who keeps something beside a parameter in alive-only storage, and must follow its positions."""

    def moved(self, parameter: Tensor, held: torch.Size, move: Callable[[Tensor], Tensor], loading: bool) -> None:
        """The alive entries moved.

        Args:
            parameter: The parameter, changed already.
            held: Its shape before.
            move: Turns values at the old positions into values at the new ones.
            loading: Whether a checkpoint is being loaded.
        """


class Choice(NamedTuple):
    """What was measured for one situation.

    Attributes:
        ratio: Time of the dense product over that of the fastest sparse one; None where no dense one was measured.
        kernel: The fastest sparse product.
    """

    ratio: float | None
    kernel: Kernel


class SharedPath:
    """What a sparse module's `__dict__` keeps for its fast path; it is copied and pickled with the module.

    Attributes:
        mode: How the product is chosen.
        threshold: Sparsity from which the sparse product is taken without measuring, or None.
        movers: Who follows the positions of alive-only storage.
        packed: Whether the parameter holds the alive values alone, [groups, G, k] or [groups, G, k, kernel].
        shape: Shape of the dense weight.
        reason: Why this layer computes densely now; None where the sparse product can be taken.
    """

    def __init__(self, shape: torch.Size, mode: FastMode, threshold: float | None) -> None:
        self.mode, self.threshold, self.shape = mode, threshold, shape
        self.packed = False
        self.reason: str | None = "not prepared"
        self.rows = Rows(shape[0], 1, shape[0], True)
        self.sparsity, self.above = 0.0, False
        self.chosen: dict[tuple[Any, ...], Choice] = {}  # situation -> what was measured
        self.reused = ReusedGradient()
        self.movers: weakref.WeakSet[Mover] = weakref.WeakSet()
        self._seen: tuple[Tensor | None, int, Tensor | None, int] = (None, -1, None, -1)
        self._traced: Index | None = None

    def refresh(self, module: nn.Module) -> None:
        """Follow the mask and the row order of the module; does nothing where neither has been written."""
        if self.packed:
            return
        mask, order = module._buffers[MASK], module._buffers.get(ROW_ORDER)
        assert mask is not None
        slot = slots_of(module)[WEIGHT]
        seen = (mask, _version(mask), order, _version(order))
        if self._is_seen(mask, order) and (self.reason == "in a resurrection phase") == slot.open:
            return
        self.reused.forget()
        self._seen = seen
        self.reason = "in a resurrection phase" if slot.open else eligible(module, mask)
        if self.reason is None:
            try:
                self.place(module, mask, order)
            except ConfigError as error:
                self.reason = str(error)

    def place(self, module: nn.Module, mask: Tensor, order: Tensor | None) -> None:
        """Write the index of a mask into the module's buffers.

        Raises:
            ConfigError: the mask breaks its pattern.
        """
        self.rows, self.sparsity = write_index_(module, slots_of(module)[WEIGHT].spec, mask, order)
        self.decide()
        self.follow(module)

    def decide(self) -> None:
        """Note what `kernel` asks of the sparsity: graphs are compiled for the answer, not for the number."""
        self.above = self.sparsity >= (UNMEASURED if self.threshold is None else self.threshold)

    def follow(self, module: nn.Module) -> None:
        """Let compiled code read the index that is in the module's buffers now, whatever k is."""
        self._traced = held_index(module) if holds_index(module) else None
        dynamo = sys.modules.get("torch._dynamo")  # every optimizer imports it; without it nothing is compiled yet
        if self._traced is not None and dynamo is not None:
            for tensor, axis in ((self._traced.positions, 1), (self._traced.columns, 0), (self._traced.readers, 0)):
                dynamo.maybe_mark_dynamic(tensor, axis)

    def forget(self) -> None:
        """Hold neither the mask nor the memory of a dense gradient any more; `refresh` looks again."""
        self.reused.forget()
        self._seen = (None, -1, None, -1)

    def _is_seen(self, mask: Tensor, order: Tensor | None) -> bool:
        seen = self._seen
        return seen[0] is mask and seen[2] is order and (seen[1], seen[3]) == (_version(mask), _version(order))

    def forward(self, module: nn.Module, input: Tensor) -> Tensor | None:
        """The layer's output, or None where the dense product is to be taken."""
        if torch.compiler.is_compiling():
            if self.reason is not None or torch.compiler.is_exporting():
                return None
        else:
            self.refresh(module)
            if self.reason is not None or _recorded(input) or input.numel() == 0:
                return None
        kernel = self.kernel(module, input) if self.fits(input) else None
        return None if kernel is None else self.sparse(module, input, kernel)

    def fits(self, input: Tensor) -> bool:
        """Whether the layer takes an input of this shape; the dense product says what is wrong with others."""
        axes = len(self.shape) - 2
        if axes == 0:
            return input.ndim > 0 and input.shape[-1] == self.shape[1]
        return input.ndim in (axes + 1, axes + 2) and input.shape[-axes - 1] == self.shape[1]

    def kernel(self, module: nn.Module, input: Tensor) -> Kernel | None:
        """Which sparse product is taken for this input, None for the dense one; measures where nobody has yet."""
        if self.mode in (FastMode.SPARSE, FastMode.DENSE):
            return Kernel.GATHER if self.packed or self.mode is FastMode.SPARSE else None
        fused = not isinstance(module, _ConvNd) and fused_runs(input.device, dtype_of(input))
        if self.mode is FastMode.TRITON:
            return Kernel.TRITON if fused else Kernel.GATHER
        dense = not self.packed and self.threshold is None
        if not (self.packed or dense or self.above):
            return None
        if not (dense or fused):
            return Kernel.GATHER
        if torch.compiler.is_compiling() and not self.chosen:
            return None if dense and not self.above else Kernel.GATHER
        key = (*situation(self, input), dense)
        if key not in self.chosen:
            if torch.compiler.is_compiling() or _captured(input):
                return None if dense and not self.above else Kernel.GATHER
            from fxsparse.nn.shared_choice import measured  # it runs this very path

            kernels = (Kernel.GATHER, Kernel.TRITON) if fused else (Kernel.GATHER,)
            self.chosen[key] = measured(module, self, input, kernels, dense)
        ratio, kernel = self.chosen[key]
        return None if ratio is not None and ratio <= 1.0 else kernel

    def sparse(self, module: nn.Module, input: Tensor, kernel: Kernel) -> Tensor:
        """The layer's output by a sparse product."""
        weight, bias = module._parameters[WEIGHT], module._parameters.get("bias")
        assert weight is not None
        watched = not torch.compiler.is_compiling() and wanted(module)
        return self.run(module, input, weight, bias, kernel, watcher_of(module, self.shape) if watched else None)

    def run(
        self,
        module: nn.Module,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kernel: Kernel = Kernel.GATHER,
        watcher: Watcher | None = None,
    ) -> Tensor:
        """The sparse product with this weight, stored as the module's."""
        kind = input.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        index = self._index(module)
        watched_leaf = self.packed and watcher is not None  # autograd tells of nodes whether they run, not of leaves
        values = weight.view_as(weight) if watched_leaf else weight if self.packed else self._alive(weight, index)
        if low is not None and input.dtype in (torch.float32, torch.float16, torch.bfloat16):
            input, values = input.to(low), values.to(low)
            bias = None if bias is None else bias.to(low)
        sink = sink_of(module)
        if isinstance(module, _ConvNd):
            return convolved(module, input, values, bias, index, self.rows, sink, watcher)
        flat = input.reshape(-1, self.shape[1])
        made = product(flat, values, bias, index, self.rows, None, sink, kernel, watcher)
        return made.view(*input.shape[:-1], self.shape[0])

    def _index(self, module: nn.Module) -> Index:
        """The index; a compiler takes the shapes of buffers for constants, those of other tensors it does not."""
        if torch.compiler.is_compiling() and self._traced is not None:
            return self._traced
        return held_index(module)

    def _alive(self, weight: Tensor, index: Index) -> Tensor:
        if torch.compiler.is_compiling():
            return read_alive(weight, index.positions, index.rows, self.rows)
        return alive_values(weight, index, self.rows, self.reused)

    def spread(self, module: nn.Module, values: Tensor) -> Tensor:
        """The dense tensor of any alive values."""
        return spread_values(values, held_index(module), self.rows, self.shape)

    def dense_weight(self, module: nn.Module) -> Tensor:
        """The dense weight of packed storage, for autograd connected to the parameter."""
        weight = module._parameters[WEIGHT]
        assert weight is not None
        return self.spread(module, weight)

    def dense_mask(self, module: nn.Module) -> Tensor:
        """The mask of packed storage, made anew."""
        weight = module._parameters[WEIGHT]
        assert weight is not None
        return self.spread(module, torch.ones_like(weight, dtype=torch.bool, requires_grad=False))

    def pack(self, module: nn.Module, dense: Tensor) -> Tensor:
        """The alive values of any tensor shaped like the dense weight."""
        index = held_index(module)
        return read_alive(dense, index.positions, index.rows, self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_seen", "movers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.movers, self._seen = weakref.WeakSet(), (None, -1, None, -1)


UNMEASURED = 0.5
"""Sparsity from which a compiled graph takes the sparse product where no eager step has measured it."""


def situation(path: SharedPath, input: Tensor) -> tuple[Any, ...]:
    """What a measured choice holds for: shapes, type, device; sizes of batches in steps of two."""
    samples = input.numel() // max(input.shape[1] if input.ndim > 2 else input.shape[-1], 1)
    plain = input.is_contiguous()
    place = (str(input.device), dtype_of(input), plain, _threads())
    return (path.rows, round(path.sparsity, 1), samples.bit_length(), *place)


@constant_in_graphs
def _threads() -> int:
    return torch.get_num_threads()


def dtype_of(input: Tensor) -> torch.dtype:
    """The data type that a product of this input has."""
    kind = input.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype


def _captured(input: Tensor) -> bool:
    """Whether a CUDA graph records what runs: nothing can be timed in it."""
    return input.is_cuda and torch.cuda.is_current_stream_capturing()


def path_of(module: nn.Module) -> SharedPath | None:
    """The fast path of a module, or None."""
    found: SharedPath | None = module.__dict__.get(SHARED)
    return found


def open_path(module: nn.Module, mode: FastMode, threshold: float | None) -> SharedPath:
    """Give a sparse module a fast path, or change how the one it has chooses."""
    path = path_of(module)
    weight = module._parameters[WEIGHT]
    assert weight is not None
    if path is None:
        path = module.__dict__[SHARED] = SharedPath(weight.shape, mode, threshold)
    path.mode, path.threshold = mode, threshold
    path.refresh(module)
    path.decide()
    return path


def close_path(module: nn.Module) -> None:
    """Take the fast path off.

    Raises:
        ConfigError: the parameter holds the alive values alone.
    """
    path = path_of(module)
    if path is None:
        return
    if path.packed:
        raise ConfigError(f"`weight` of {type(module).__name__} is stored alive only; call restore_dense(handle) first")
    del module.__dict__[SHARED]
    drop_index(module)


def _version(tensor: Tensor | None) -> int:
    """How often a tensor was written; -1 where nobody counts."""
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def _recorded(input: Tensor) -> bool:
    """Whether something records, traces or transforms what runs: it must see the layer's own function."""
    return (
        type(input) is not Tensor
        or input.is_meta
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or functions_are_seen()
        or forward_ad._current_level >= 0
        or _get_current_dispatch_mode() is not None
    )
