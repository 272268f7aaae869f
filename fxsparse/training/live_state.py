"""The states of a handle's weights: what is as large as a weight is made when somebody reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar, overload

import torch
from torch import Tensor

from fxsparse.nn import MaskedWeight
from fxsparse.training.gradients import Gradient
from fxsparse.training.packed_gradient import PackedGradient
from fxsparse.training.state import WeightState

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Later:
    """The value of an attribute, made when it is read.

    Attributes:
        make: Makes it.
        kept: Whether the state keeps what was made; else it is made again each time.
        like: A tensor of its device, and its shape, where these are asked for.
    """

    make: Callable[[], Any]
    kept: bool = False
    like: tuple[torch.Size, torch.device] | None = None


class LiveState(WeightState):
    """A `WeightState` any of whose attributes may be given as a `Later`."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)

    def __getattribute__(self, name: str) -> Any:
        """The attribute, made where it is a `Later`."""
        value = super().__getattribute__(name)
        if not isinstance(value, Later):
            return value
        made: dict[str, Any] = vars(self).setdefault("_made", {})
        if name in made:
            return made[name]
        found = value.make()
        if value.kept:
            made[name] = found
        return found

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight, which is not made for it."""
        like = self._like
        return super().shape if like is None else like[0]

    @property
    def device(self) -> torch.device:
        """Device of the weight, which is not made for it."""
        like = self._like
        return super().device if like is None else like[1]

    @property
    def has_gradient(self) -> bool:
        """Whether there is a G, which is not made for it."""
        return vars(self)["gradient"] is not None

    def replaced(self, **changes: Any) -> Self:
        """A new state with other values of these attributes; what is made later still is."""
        own = {field.name: vars(self)[field.name] for field in dataclasses.fields(self)}
        return type(self)(**{**own, **changes})

    @property
    def _like(self) -> tuple[torch.Size, torch.device] | None:
        weight = vars(self)["weight"]
        return weight.like if isinstance(weight, Later) else None


def live_state(weight: MaskedWeight, gradient: Gradient | None, **others: Any) -> LiveState:
    """The state of a weight now; what alive-only storage keeps no dense tensor of is made when it is read.

    Args:
        weight: The weight.
        gradient: Its G.
        others: The other attributes.
    """
    spec, packed = weight.spec, weight.packed
    like = weight.shape, weight.weight.device
    return LiveState(
        **others,
        name=weight.name,
        weight=Later(lambda: _values(weight), like=like) if packed else _values(weight),
        mask=Later(lambda: weight.mask) if packed else weight.mask,
        pattern=spec.pattern,
        layout=spec.layout,
        row_order=weight.row_order,
        gradient=Later(gradient.dense, kept=True) if isinstance(gradient, PackedGradient) else gradient,
        step_gradient=None if weight.weight.grad is None else Later(lambda: step_gradient(weight)),
    )


def step_gradient(weight: MaskedWeight) -> Tensor | None:
    """What the optimizer was given, for every position."""
    gradient = weight.weight.grad
    return None if gradient is None else weight.dense(gradient)


def _values(weight: MaskedWeight) -> Tensor:
    return weight.dense(weight.weight.detach())


class States(Sequence[WeightState]):
    """One state after the other, each made anew when it is asked for, so that nothing it made outlives its turn.

    Args:
        names: The weights in the model's order.
        make: The state of a weight.
    """

    def __init__(self, names: Sequence[str], make: Callable[[str], WeightState]) -> None:
        self._names, self._make = tuple(names), make

    def __len__(self) -> int:
        return len(self._names)

    def of(self, name: str) -> WeightState:
        """The state of a weight."""
        return self._make(name)

    @overload
    def __getitem__(self, index: int) -> WeightState: ...
    @overload
    def __getitem__(self, index: slice) -> States: ...
    def __getitem__(self, index: int | slice) -> WeightState | States:
        """The state at a place, or those of some places."""
        if isinstance(index, slice):
            return States(self._names[index], self._make)
        return self._make(self._names[index])


class Made(Mapping[str, Value], Generic[Value]):
    """Values by name, each made when it is asked for.

    Args:
        names: The names.
        make: The value of a name among them.
    """

    def __init__(self, names: Sequence[str], make: Callable[[str], Value]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Value:
        """The value of a name."""
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
