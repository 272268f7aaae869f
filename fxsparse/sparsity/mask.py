"""Masks as values: set algebra, exact density, bits on disk."""

from __future__ import annotations

import abc
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from fxsparse.errors import ConfigError, DataError
from fxsparse.sparsity.digest import content_sha256, fields_sha256
from fxsparse.sparsity.pattern import check_bool


class _Sets(abc.ABC):
    """What single masks and mask sets share: counts, and the operators of sets in terms of `_combine`."""

    @property
    @abc.abstractmethod
    def numel(self) -> int:
        """Number of elements N."""

    @property
    @abc.abstractmethod
    def alive(self) -> int:
        """Number of alive elements A."""

    @abc.abstractmethod
    def _combine(self, other: Self, rule: Callable[[Any, Any], Any]) -> Self: ...

    @property
    def dead(self) -> int:
        """Number of dead elements N - A."""
        return self.numel - self.alive

    @property
    def density(self) -> float:
        """A / N; 1 where there are no elements."""
        return self.alive / self.numel if self.numel else 1.0

    @property
    def sparsity(self) -> float:
        """1 - A / N."""
        return 1.0 - self.density

    def __and__(self, other: Self) -> Self:
        return self._combine(other, operator.and_)

    def __or__(self, other: Self) -> Self:
        return self._combine(other, operator.or_)

    def __xor__(self, other: Self) -> Self:
        return self._combine(other, operator.xor)

    def __sub__(self, other: Self) -> Self:
        return self._combine(other, lambda one, another: one & ~another)

    def __le__(self, other: Self) -> bool:
        return (self - other).alive == 0

    def __lt__(self, other: Self) -> bool:
        return self <= other and self.alive < other.alive

    def __ge__(self, other: Self) -> bool:
        return other <= self

    def __gt__(self, other: Self) -> bool:
        return other < self


@dataclass(frozen=True, eq=False)
class Mask(_Sets):
    """A set of alive elements of one weight.

    Operators are those of sets: `&`, `|`, `^`, `-`, `~`, `<=` (subset), `<` (proper subset), `==`.

    Attributes:
        tensor: Bool tensor of the weight's shape, True = alive.
    """

    tensor: Bool[Tensor, "*shape"]

    def __post_init__(self) -> None:
        check_bool(self.tensor)

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return self.tensor.shape

    @property
    def numel(self) -> int:
        """Number of elements N."""
        return self.tensor.numel()

    @property
    def alive(self) -> int:
        """Number of alive elements A."""
        return int(self.tensor.count_nonzero())  # a sum makes integers of all entries first

    def __invert__(self) -> Mask:
        return Mask(~self.tensor)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self.shape == other.shape and torch.equal(self.tensor, other.tensor.to(self.tensor.device))

    __hash__ = None  # type: ignore[assignment]  # the tensor may change in place

    def pack(self) -> UInt8[Tensor, " bytes"]:
        """Bits in row-major order: element 8 i + j is bit j (least significant first) of byte i; padding is 0."""
        bits = np.packbits(self.tensor.detach().cpu().contiguous().reshape(-1).numpy(), bitorder="little")
        return torch.from_numpy(bits)

    @staticmethod
    def unpack(packed: UInt8[Tensor, " bytes"], shape: Sequence[int]) -> Mask:
        """Inverse of `pack`.

        Raises:
            DataError: the bytes do not fit the shape, or padding bits are set.
        """
        size = torch.Size(shape).numel()
        if packed.dtype != torch.uint8 or packed.shape != (-(-size // 8),):
            raise DataError(
                f"`packed` of `dtype` (={packed.dtype}) and `shape` (={tuple(packed.shape)}) must be {-(-size // 8)} "
                f"bytes of torch.uint8 for a mask of shape {tuple(shape)}; the data is truncated or of another weight"
            )
        bits = np.unpackbits(packed.detach().cpu().contiguous().numpy(), bitorder="little")
        if bits[size:].any():
            raise DataError(f"padding bits after element {size} of the packed mask are not zero; the data is corrupt")
        return Mask(torch.from_numpy(bits[:size].astype(np.bool_)).reshape(tuple(shape)))

    def sha256(self, name: str) -> str:
        """Hex SHA-256 of (name, "mask1", shape, packed bytes)."""
        return content_sha256(name, "mask1", self.shape, self.pack().numpy().tobytes())

    def _combine(self, other: Mask, rule: Callable[[Tensor, Tensor], Tensor]) -> Mask:
        if self.shape != other.shape:
            raise ConfigError(f"masks of `shape` (={tuple(self.shape)}) and (={tuple(other.shape)}) do not match")
        return Mask(rule(self.tensor, other.tensor.to(self.tensor.device)))

    def __repr__(self) -> str:
        return f"Mask(shape={tuple(self.shape)}, alive={self.alive}, density={self.density:.4g})"


class MaskSet(_Sets, Mapping[str, Mask]):
    """The masks of a model by weight name, with the operators of `Mask` applied name by name."""

    def __init__(self, masks: Mapping[str, Mask | Tensor]) -> None:
        self._masks = {name: mask if isinstance(mask, Mask) else Mask(mask) for name, mask in masks.items()}

    def __getitem__(self, name: str) -> Mask:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    @property
    def numel(self) -> int:
        """Elements of all weights."""
        return sum(mask.numel for mask in self.values())

    @property
    def alive(self) -> int:
        """Alive elements of all weights."""
        return sum(mask.alive for mask in self.values())

    def __invert__(self) -> MaskSet:
        return MaskSet({name: ~mask for name, mask in self.items()})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskSet):
            return NotImplemented
        return self._masks == other._masks

    __hash__ = None  # type: ignore[assignment]  # the tensors may change in place

    def is_nested_in(self, other: MaskSet) -> bool:
        """Whether every mask is a subset of the other set's mask of the same name.

        Raises:
            ConfigError: the two sets have different names or shapes.
        """
        return self <= other

    def tensors(self) -> dict[str, Tensor]:
        """The bool tensors by name."""
        return {name: mask.tensor for name, mask in self.items()}

    def digest(self) -> str:
        """Hex SHA-256 of all names, shapes and bits; independent of the order of the names."""
        return fields_sha256(*(self[name].sha256(name).encode() for name in sorted(self)))

    def _check_names(self, other: MaskSet) -> None:
        missing = sorted(set(self) ^ set(other))
        if missing:
            raise ConfigError(f"mask sets must have the same names; only one of them has `{missing[0]}`")

    def _combine(self, other: MaskSet, rule: Callable[[Mask, Mask], Mask]) -> MaskSet:
        self._check_names(other)
        return MaskSet({name: rule(mask, other[name]) for name, mask in self.items()})

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} masks, alive={self.alive} of {self.numel}, density={self.density:.4g})"
