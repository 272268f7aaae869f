"""How finished statistics are kept: as they are, on the CPU, or as half-precision roots with a scale of each tensor."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.errors import ConfigError, DataError


class Storage(enum.Enum):
    """The formats.

    Attributes:
        FP32: float32 where the statistics arose.
        CPU_FP32: float32 on the CPU.
        CPU_FP16: q = sqrt(F / s) in float16 with s = max F in float32; reads s q^2. Relative error at most 2^-10 for
            F/s >= 2^-28 and 2^-7 for F/s >= 2^-34; zeros stay zeros.
    """

    FP32 = "fp32"
    CPU_FP32 = "cpu_fp32"
    CPU_FP16 = "cpu_fp16"

    @classmethod
    def of(cls, value: Storage | str) -> Storage:
        """The format of that name.

        Raises:
            ConfigError: there is none.
        """
        try:
            return cls(value)
        except ValueError as error:
            known = ", ".join(repr(each.value) for each in cls)
            raise ConfigError(
                f"`storage` (={value!r}) must be one of {known}; plain fp16 would turn values to 0"
            ) from error


@dataclass(frozen=True, eq=False)
class Stored:
    """One tensor in a format.

    Attributes:
        values: float32 values, or float16 roots.
        scale: float32 scalar for roots, None for values.
    """

    values: Tensor
    scale: Tensor | None = None

    def to(self, device: torch.device) -> Stored:
        """The same on a device."""
        return Stored(self.values.to(device), None if self.scale is None else self.scale.to(device))

    def read(self) -> Tensor:
        """The float32 values."""
        if self.scale is None:
            return self.values
        return self.scale * self.values.to(torch.float32).square()


def store(values: Tensor, storage: Storage) -> Stored:
    """Put values into a format.

    Raises:
        DataError: a value is negative or not finite.
    """
    if values.numel() and (not bool(torch.isfinite(values).all()) or float(values.min()) < 0):
        raise DataError("a Fisher value is negative or not finite; look for NaN in the inputs or the weights")
    if storage is Storage.FP32:
        return Stored(values.to(torch.float32))
    on_cpu = values.to("cpu")
    if storage is Storage.CPU_FP32:
        return Stored(on_cpu.to(torch.float32))
    scale = on_cpu.max().to(torch.float32) if on_cpu.numel() else torch.zeros(())
    if not float(scale) > 0:
        return Stored(torch.zeros(on_cpu.shape, dtype=torch.float16), scale)
    roots = (on_cpu.double() / scale.double()).sqrt()
    return Stored(roots.to(torch.float16), scale)
