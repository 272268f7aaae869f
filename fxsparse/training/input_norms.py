"""Norms of the inputs that weights multiply, read where every layer is a matrix product or a convolution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxsparse.errors import ConfigError
from fxsparse.nn import MaskedWeight

_Power = Callable[[Tensor], Tensor]
_OPERANDS = {  # product -> positions of its left and right factor
    **{f"aten::{name}": (0, 1) for name in ("mm", "bmm", "mv", "linear")},
    **{f"aten::{name}": (1, 2) for name in ("addmm", "baddbmm", "addmv", "_addmm_activation")},
}
_COPIES = {"aten::clone": 0, "aten::_to_copy": 0, "aten::where": 1, "aten::masked_fill": 0}


class InputNorms(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch
    """Collects, for every element of every weight, the sum of the squares of the inputs that it multiplies.

    Run forward passes inside `with InputNorms(weights) as found:`, in any number of batches, then read `found.norms()`.
    Weights are followed through masks, views and copies to matrix products and convolutions below autograd, so layers,
    functional uses, attention projections and grouped, strided, dilated, padded or transposed convolutions are all seen
    alike: a convolution's element meets the input at every position of its patch, zeros of the padding included.

    Args:
        weights: The weights to watch, by name.
        moments: Whether to collect what `means` and `variances` need, too.
    """

    def __init__(self, weights: Mapping[str, MaskedWeight], *, moments: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self._weights = dict(weights)
        self._powers: tuple[_Power, ...] = (torch.square, torch.clone, torch.ones_like) if moments else (torch.square,)
        self.reset()

    def reset(self) -> None:
        """Forget what was seen."""
        self._sums: dict[str, list[Tensor]] = {}
        self._others: dict[str, str] = {}
        self._origins: dict[int, list[_Origin]] = {}

    def state_dict(self) -> dict[str, list[Tensor]]:
        """What was collected so far, to go on with after `load_state_dict`."""
        return {name: [total.clone() for total in sums] for name, sums in self._sums.items()}

    def load_state_dict(self, state_dict: Mapping[str, Sequence[Tensor]]) -> None:
        """Set what was collected."""
        self._sums = {
            name: [total.to(self._weights[name].weight.device, copy=True) for total in sums]
            for name, sums in state_dict.items()
        }

    def norms(self) -> dict[str, Float[Tensor, "*shape"]]:
        """The square root of each sum, float64, of each weight's shape.

        Raises:
            ConfigError: a weight's inputs are not known; the message names it and the operation that hides them.
        """
        return {name: sums[0].sqrt() for name, sums in self._known().items()}

    def means(self) -> dict[str, Float[Tensor, "*shape"]]:
        """The mean of the inputs that each element multiplies, over samples and positions; needs `moments`."""
        return {name: sums[1] / sums[2].clamp(min=1) for name, sums in self._known().items()}

    def variances(self) -> dict[str, Float[Tensor, "*shape"]]:
        """Their variance (of the population); needs `moments`."""
        return {
            name: (sums[0] / sums[2].clamp(min=1) - (sums[1] / sums[2].clamp(min=1)).square()).clamp(min=0)
            for name, sums in self._known().items()
        }

    def _known(self) -> dict[str, list[Tensor]]:
        for name in self._weights:
            if name in self._others or name not in self._sums:
                why = (
                    f"it is used by {self._others[name]}"
                    if name in self._others
                    else "no forward pass multiplied by it"
                )
                raise ConfigError(
                    f"the inputs of `{name}` are not known: {why}, not by a matrix product or convolution that can be "
                    "followed; exclude it from the masks, or use a saliency without inputs"
                )
        return {
            name: [total.reshape(masked.weight.shape) for total in self._sums[name]]
            for name, masked in self._weights.items()
        }

    def __enter__(self) -> InputNorms:
        self._fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer hides its products
        for name, masked in self._weights.items():
            self._follow(_Origin(name, masked.weight.detach()))
        super().__enter__()  # type: ignore[no-untyped-call]  # torch
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.backends.mha.set_fastpath_enabled(self._fast)
        self._origins = {}
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]  # torch

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation; note what the weights among its arguments are multiplied by."""
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
        tensors += [
            item for value in args if isinstance(value, list | tuple) for item in value if isinstance(item, Tensor)
        ]
        if any(self._of(tensor) for tensor in tensors):
            self._note(func._schema, args, tensors, result)
        return result

    def _note(self, schema: Any, args: tuple[Any, ...], tensors: Sequence[Tensor], result: Any) -> None:
        if schema.name in _OPERANDS:
            left, right = (args[i] for i in _OPERANDS[schema.name])
            if schema.name == "aten::linear":
                right = right.mT
            self._product(left, right)
        elif schema.name == "aten::convolution":
            self._convolution(args, result)
        elif schema.name in _COPIES and (origin := self._of(args[_COPIES[schema.name]])):
            source = args[_COPIES[schema.name]]
            self._follow(_Origin(origin.name, result, origin.elements(source).broadcast_to(result.shape)))
        elif not schema.returns or any(returned.alias_info is None for returned in schema.returns):  # no view
            for tensor in tensors:
                if (origin := self._of(tensor)) is not None:
                    self._others.setdefault(origin.name, schema.name.removeprefix("aten::"))

    def _product(self, left: Tensor, right: Tensor) -> None:
        """[..., m, k] times [..., k, n], or times [k]: each factor that is a weight meets the other."""
        if (origin := self._of(right)) is not None and right.ndim > 1:
            self._add(origin, right, [power(_wide(left)).sum(-2)[..., :, None] for power in self._powers])
        if (origin := self._of(left)) is not None:
            met = [power(_wide(right)) for power in self._powers]
            self._add(origin, left, [(each.sum(-1) if right.ndim > 1 else each)[..., None, :] for each in met])

    def _convolution(self, args: tuple[Any, ...], result: Tensor) -> None:
        inputs, weight, _, stride, padding, dilation, transposed, _, groups = args
        origin = self._of(weight)
        if origin is None:
            return
        kernel = weight.shape[2:]
        found = []
        for power in self._powers:
            summed = power(_wide(inputs)).sum(0)[:, None]  # [channels, 1, *positions]
            ones = summed.new_ones(1, 1, *result.shape[2:])
            # the sum over a patch is itself a convolution, by the outputs' positions, stride and dilation swapped
            over, by = (ones, summed) if transposed else (summed, ones)
            moved = torch.convolution(over, by, None, dilation, padding, stride, False, [0] * len(stride), 1)
            met = moved.reshape(-1, *moved.shape[2:])[(slice(None), *(slice(size) for size in kernel))]
            if transposed:
                found.append(met[:, None])
            else:
                found.append(met.reshape(groups, -1, *kernel).repeat_interleave(weight.shape[0] // groups, 0))
        self._add(origin, weight, found)

    def _add(self, origin: _Origin, used: Tensor, met: Sequence[Tensor]) -> None:
        """Add sums of powers of the inputs, which broadcast to the used view of the weight."""
        weight = self._weights[origin.name].weight
        elements = origin.elements(used).to(weight.device)
        if origin.name not in self._sums:
            zeros = torch.zeros(weight.numel(), dtype=torch.float64, device=weight.device)
            self._sums[origin.name] = [zeros.clone() for _ in met]
        for total, each in zip(self._sums[origin.name], met, strict=True):
            total.index_add_(0, elements.flatten(), each.to(weight.device).broadcast_to(elements.shape).flatten())

    def _follow(self, origin: _Origin) -> None:
        self._origins.setdefault(origin.tensor.untyped_storage()._cdata, []).append(origin)

    def _of(self, tensor: Any) -> _Origin | None:
        """The weight that this tensor is a view or copy of."""
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            return None
        found = self._origins.get(tensor.untyped_storage()._cdata, ())
        return next((origin for origin in found if len(found) == 1 or origin.holds(tensor)), None)


@dataclass(frozen=True, eq=False)
class _Origin:
    """A tensor that holds elements of a weight, itself or copied; the reference keeps its storage from being reused.

    Attributes:
        name: The weight.
        tensor: The tensor.
        indices: Flat index in the weight of each of its elements; None = they are the weight's own.
    """

    name: str
    tensor: Tensor
    indices: Int64[Tensor, "*shape"] | None = None

    def elements(self, view: Tensor) -> Int64[Tensor, "*view"]:
        """Flat index in the weight of each element of a view of the tensor's storage; -1 where it holds none."""
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size()
        own = self.indices
        if own is None:
            own = torch.arange(self.tensor.numel(), device=self.tensor.device).reshape(self.tensor.shape)
        stored = torch.full((size,), -1, device=self.tensor.device)
        stored.as_strided(self.tensor.size(), self.tensor.stride(), self.tensor.storage_offset()).copy_(own)
        return stored.as_strided(view.size(), view.stride(), view.storage_offset())

    def holds(self, view: Tensor) -> bool:
        return bool((self.elements(view) >= 0).all())


def _wide(tensor: Tensor) -> Float[Tensor, "*shape"]:
    return tensor.detach().double()
