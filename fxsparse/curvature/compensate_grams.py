"""Second moments of the inputs that the rows of a weight multiply, read below autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import pad

from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import MaskedWeight
from fxsparse.training import InputNorms

_CHUNK = 2**24  # elements of unfolded patches held at a time


@dataclass(frozen=True, eq=False)
class Gram:
    """What a weight was multiplied by.

    Attributes:
        matrices: X X^T, [classes, positions, positions] float64: the sum over all input vectors of a class of rows. A
            class is a set of rows that meet the same inputs; a linear layer has one, a grouped convolution one a group.
        of_row: The class of every row of the weight, rows and positions as `Layout.to_rows` orders them.
        samples: Input vectors of each class.
    """

    matrices: Float64[Tensor, "classes positions positions"]
    of_row: Int64[Tensor, " rows"]
    samples: tuple[int, ...]


class InputGrams(InputNorms):  # type: ignore[no-untyped-call]  # torch
    """Collects X X^T of the inputs X of every weight.

    Run forward passes inside `with InputGrams(weights) as found:`, in any number of batches, then read `found.gram`.
    Weights are followed as `InputNorms` does; every use of a weight adds its inputs. Sums are float64.

    Args:
        weights: The weights to watch, by name.
        order_only: Note in which order weights are used, and nothing else.
    """

    def __init__(self, weights: Mapping[str, MaskedWeight], *, order_only: bool = False) -> None:
        self._order_only = order_only
        super().__init__(weights)

    def reset(self) -> None:
        """Forget what was seen."""
        super().reset()
        self._uses: dict[str, dict[tuple[int, ...], _Use]] = {}
        self._index: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def order(self) -> tuple[str, ...]:
        """The names of the weights, in the order of their first use."""
        return tuple(self._uses)

    def gram(self, name: str) -> Gram:
        """What a weight was multiplied by.

        Raises:
            ConfigError: its inputs are not known; the message names the weight and what hides them.
        """
        if name in self._others:
            raise ConfigError(
                f"the inputs of `{name}` are not known: it is used by {self._others[name]}, not only by matrix "
                "products and convolutions over all of its inputs; leave it out with `names`"
            )
        masked = self._weights[name]
        count = masked.spec.layout.matrix_shape(masked.weight.shape)[0]
        uses = list(self._uses.get(name, {}).values())
        met: list[tuple[int, ...]] = [() for _ in range(count)]
        for number, use in enumerate(uses):
            for row in use.rows:
                met[row] = (*met[row], number)
        if not all(met):
            raise ConfigError(
                f"the inputs of `{name}` are not known: no forward pass multiplied by its row {met.index(())}; give "
                "calibration batches that use it, or leave it out with `names`"
            )
        classes = {numbers: place for place, numbers in enumerate(dict.fromkeys(met))}
        matrices = torch.stack([torch.stack([uses[i].gram for i in numbers]).sum(0) for numbers in classes])
        of_row = torch.tensor([classes[numbers] for numbers in met], device=matrices.device)
        return Gram(matrices, of_row, tuple(sum(uses[i].samples for i in numbers) for numbers in classes))

    def _product(self, left: Tensor, right: Tensor) -> None:
        """[..., m, k] times [..., k, n], or times [k]: each factor that is a weight meets the other."""
        if (origin := self._of(right)) is not None and right.ndim > 1:
            elements = origin.elements(right)
            met = left.expand(*right.shape[:-2], *left.shape[-2:]) if right.ndim > 2 else left
            sizes = right.shape[-2:]
            for one, by in zip(
                elements.reshape(-1, *sizes), met.reshape(elements[..., 0, 0].numel(), -1, sizes[0]), strict=True
            ):
                self._meet(origin.name, one, by)
        if (origin := self._of(left)) is not None:
            elements, met = origin.elements(left).mT, right.mT if right.ndim > 1 else right[None]
            sizes = elements.shape[-2:]
            for one, by in zip(elements.reshape(-1, *sizes), met.reshape(-1, *met.shape[-2:]), strict=True):
                self._meet(origin.name, one, by)

    def _convolution(self, args: tuple[Any, ...], result: Tensor) -> None:
        inputs, weight, _, stride, padding, dilation, transposed, output_padding, groups = args
        if (origin := self._of(weight)) is None:
            return
        elements = origin.elements(weight)
        for group, part in enumerate(elements.chunk(groups)):
            channels = len(part) if transposed else part.shape[1]
            by_input = part if transposed else part.transpose(0, 1)  # [in / groups, out / groups, *kernel]
            right = by_input.movedim(1, -1).reshape(-1, by_input.shape[1])
            if self._order_only:
                self._meet(origin.name, right, inputs)
                continue
            own = inputs[:, group * channels : (group + 1) * channels]
            if transposed:
                own = _spread_out(own, weight.shape[2:], stride, padding, dilation, output_padding)
            else:
                own = pad(own.detach(), [size for each in reversed(padding) for size in (each, each)])
            steps = [1] * len(stride) if transposed else stride
            per_sample = max(1, result[:1, :1].numel() * len(right))
            for some in torch.split(own, max(1, _CHUNK // per_sample)):
                self._meet(origin.name, right, _patches(some, weight.shape[2:], steps, dilation, flip=transposed))

    def _meet(self, name: str, elements: Int64[Tensor, "k n"], inputs: Float[Tensor, "m k"]) -> None:
        """The elements [k, n] of a weight are multiplied by m input vectors."""
        if self._order_only:
            self._uses.setdefault(name, {})
            return
        rows, positions = self._places(name, elements)
        whole = torch.arange(int(self._places(name)[1].max()) + 1, device=positions.device)
        first = positions[:, :1]
        if not (
            bool((elements >= 0).all())
            and bool((rows == rows[:1]).all())
            and bool((positions == first).all())
            and torch.equal(first[:, 0].sort().values, whole)
        ):
            self._others.setdefault(name, "a product of parts or other arrangements of it")
            return
        met = inputs.detach().double()
        if bad := int((~met.isfinite()).sum()):
            raise DataError(
                f"the inputs of `{name}` hold NaN or Inf (={bad} values) on the calibration data; mend the data, or "
                "the weights before it"
            )
        ordered = met[:, first[:, 0].argsort().to(met.device)]
        key = tuple(rows[0].tolist())
        use = self._uses.setdefault(name, {}).setdefault(key, _Use(key, ordered.new_zeros(len(whole), len(whole))))
        use.gram.addmm_(ordered.T, ordered)
        use.samples += len(ordered)

    def _places(self, name: str, elements: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Row and position of every element of a weight, or of these."""
        if name not in self._index:
            masked = self._weights[name]
            size = masked.weight.numel()
            flat = torch.arange(size, device=masked.weight.device).reshape(masked.weight.shape)
            matrix = masked.spec.layout.to_rows(flat).flatten(1)
            place = torch.empty(size, dtype=torch.int64, device=flat.device)
            place[matrix.flatten()] = torch.arange(size, device=flat.device)
            self._index[name] = place // matrix.shape[1], place % matrix.shape[1]
        rows, positions = self._index[name]
        return (rows, positions) if elements is None else (rows[elements], positions[elements])


@dataclass(eq=False)
class _Use:
    """The inputs that some rows of a weight met."""

    rows: tuple[int, ...]
    gram: Float64[Tensor, "positions positions"]
    samples: int = 0


def _patches(
    inputs: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], *, flip: bool
) -> Float[Tensor, "outputs patch"]:
    """What each output position of a convolution over padded inputs reads: [samples * outputs, channels * kernel]."""
    axes = len(kernel)
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        inputs = inputs.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
    if flip:
        inputs = inputs.flip(tuple(range(2 + axes, 2 + 2 * axes)))
    moved = inputs.movedim(1, 1 + axes)  # samples, outputs..., channels, kernel...
    return moved.reshape(-1, moved[(0,) * (1 + axes)].numel())


def _spread_out(
    inputs: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
) -> Tensor:
    """The inputs of a transposed convolution, zeros between them, so that it is a plain one with a flipped kernel."""
    spread = inputs.detach()
    borders: list[int] = []
    for axis, (size, step, cut, gap, extra) in enumerate(
        zip(kernel, stride, padding, dilation, output_padding, strict=True)
    ):
        length = spread.shape[2 + axis]
        sizes = list(spread.shape)
        sizes[2 + axis] = (length - 1) * step + 1
        wider = spread.new_zeros(sizes)
        wider.movedim(2 + axis, 0)[::step] = spread.movedim(2 + axis, 0)
        spread = wider
        border = gap * (size - 1) - cut
        borders = [border, border + extra, *borders]
    return pad(spread, borders)
