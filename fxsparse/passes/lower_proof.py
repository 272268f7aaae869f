"""What a lowered model is compared with, and how far that comparison reaches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.errors import CaptureError, PassError
from fxsparse.passes.compact_verify import difference, outputs, owned_copy, release, run_copy
from fxsparse.passes.compact_widen import worth_streaming

TOLERANCE = 1e-12
"""How much an output in float64 may differ, relative to the largest value of that output."""
_NATIVE = 2.0**12  # units in the last place, where a model cannot run in float64


class Proof:
    """The outputs of a model on its example inputs, in float64 where it and its exported form can run so.

    All inputs and all entries of all outputs are compared, whatever their size; what no comparison can tell is noted.

    Args:
        model: The model in eval form, without masks.
        form: Its exported form, which must compute the same; None where there is none.
        args: Positional inputs.
        kwargs: Keyword inputs.

    Attributes:
        dtype: float64, or None for the model's own precision.
        notes: What was found.

    Raises:
        CaptureError: the exported form does not run.
        PassError: it differs from the model, or the model does not repeat itself.
    """

    def __init__(self, model: nn.Module, form: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.notes: list[str] = []
        self.dtype: torch.dtype | None = torch.float64
        parameters = [p.dtype for p in model.parameters() if p.is_floating_point()]
        eps = max((torch.finfo(dtype).eps for dtype in parameters), default=torch.finfo(torch.float32).eps)
        self._native = _NATIVE * eps
        try:
            self.expected = self._outputs(model)
            worst = difference(self.expected, self._outputs(form or model))
            why = f"its exported form differs from it by {worst:.2g} in float64"
        except Exception:  # a model may fix its dtype, and export may have fixed it
            worst, why = math.inf, "it, or its exported form, cannot run in float64"
        if worst > self.allowed:
            self.notes.append(f"the model was compared in its own precision: {why}")
            self._in_its_own_precision(model, form or model)
        self.notes += _reach(self.expected)

    def _in_its_own_precision(self, model: nn.Module, form: nn.Module) -> None:
        self.dtype = None
        try:
            self.expected = self._outputs(model)
            worst = difference(self.expected, self._outputs(form))
        except Exception as error:
            raise CaptureError(f"the exported model does not run: {type(error).__name__}: {error}") from error
        if worst > self.allowed:
            raise PassError(f"the exported model differs from the model by {worst:.3g} of the output's scale")

    @property
    def allowed(self) -> float:
        """The largest difference that rounding explains, relative to the output's scale."""
        return self._native if self.dtype is None else TOLERANCE

    @property
    def told(self) -> bool:
        """Whether the outputs hold anything by which two models could be told apart."""
        return any(not _real(found) or bool(found.isfinite().any()) for found in self.expected if found.numel())

    def worst(self, module: nn.Module) -> float:
        """The largest difference of a lowered form, relative to the output's scale.

        Raises:
            PassError: its outputs have other shapes, or NaN where the model has none.
        """
        return difference(self.expected, self._outputs(module))

    def said(self, worst: float) -> str:
        """A worst difference in words."""
        kind = "float64" if self.dtype is not None else "the model's own precision"
        within = "" if self.dtype is not None else f" (allowed: {self.allowed:.2g})"
        return f"equal in {kind}, worst difference {worst:.2g} of the output's scale{within}"

    def _outputs(self, module: nn.Module) -> list[Tensor]:
        if self.dtype is not None and worth_streaming(module):
            wide = run_copy(module, self.dtype)
        else:
            wide = owned_copy(module, self.dtype)
        try:
            return outputs(wide, self.args, self.kwargs, False, self.dtype)
        finally:
            release(wide)


def _real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _reach(expected: list[Tensor]) -> list[str]:
    """What a comparison of these outputs cannot tell."""
    if not any(found.numel() for found in expected):
        return ["the model returns no tensor: there is nothing to compare"]
    notes = []
    for index, found in enumerate(expected):
        if not _real(found):
            notes.append(f"output {index} is {found.dtype}: only its equality was compared, not what it was made from")
            continue
        finite = int(found.isfinite().sum())
        if finite < found.numel():
            notes.append(f"output {index} is not finite in {found.numel() - finite} of {found.numel()} entries")
        if finite and not bool(found[found.isfinite()].any()):
            notes.append(f"output {index} is zero everywhere: its comparison tells little")
    return notes
