"""Symbolic values of a trace."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType
from typing import Any

import torch
from torch import fx


class UnpackedProxy(fx.Proxy):
    """A proxy that is unpacked as torch's is, with a look at each piece of code once."""

    def __iter__(self) -> Iterator[fx.Proxy]:
        """Where the code unpacks the value, as many items as it names; else what the tracer says."""
        frame = sys._getframe(1)
        count = _unpackings(frame.f_code).get(frame.f_lasti)
        if count is None:
            return self.tracer.iter(self)
        value: Any = self
        return (value[place] for place in range(count))


class AttributeProxy(UnpackedProxy, fx.proxy.Attribute):
    """An attribute of a symbolic value: of its shape, or a method that may be called."""


class ValueProxy(UnpackedProxy):
    """A proxy that notices `isinstance` tests made outside torch: they would see the proxy's type, not the value's."""

    @property  # type: ignore[misc]  # the protocol of isinstance()
    def __class__(self) -> type:
        frame = sys._getframe(1)
        caller = str(frame.f_globals.get("__name__", ""))
        if not caller.startswith(("torch.", "fxsparse.graph")) or frame.f_code is torch.is_tensor.__code__:
            tracer = object.__getattribute__(self, "tracer")
            tracer.assumptions.append(f"a type test on `{self.node.name}` in {caller}.{frame.f_code.co_name}")
        return type(self)

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        return AttributeProxy(self, k)


@lru_cache(maxsize=256)
def _unpackings(code: CodeType) -> dict[int, int]:
    """Where `code` unpacks a value, and into how many."""
    return {step.offset: step.argval for step in dis.get_instructions(code) if step.opname == "UNPACK_SEQUENCE"}
