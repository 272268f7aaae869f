"""Whether a transformed model computes what the model computed, while all masks are True."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxsparse.errors import PassError
from fxsparse.graph import split_inputs
from fxsparse.graph.compare import Difference, Reference, observe
from fxsparse.nn import Guard, mask_spec, masked_weights, remove_mask
from fxsparse.nn.functional import full_masks
from fxsparse.passes import Verify, verify_equal


@dataclass
class Equality:
    """The comparison of rewritten models with the model that they were made from.

    Attributes:
        model: The model; it stays as it is.
        example_inputs: Positional inputs, or (args, kwargs); None compares nothing.
        verify: How to compare.
        reference: What the model shows, where it is known already.
    """

    model: nn.Module
    example_inputs: Any
    verify: Verify = Verify.QUICK
    reference: Reference | None = None

    def check(self, result: nn.Module) -> None:
        """Raise PassError when `result` behaves differently; warn when nothing could be compared."""
        if self.example_inputs is None:
            return
        if self.verify is Verify.FULL:
            self._check_fully(result)
            return
        reference = self._reference()
        fresh = not masked_weights(self.model)  # then all masks were made here, and are True
        with full_masks() if fresh else contextlib.nullcontext():
            difference = reference.difference(result, exact=True)
        if not reference.repeats:
            warnings.warn(_uncomparable(reference.notes[0]), stacklevel=5)
        elif difference is not None:
            self._decide(difference, result)

    def _reference(self) -> Reference:
        if self.reference is None:
            _, self.reference = observe(self.model, *split_inputs(self.example_inputs))
        return self.reference

    def _decide(self, difference: Difference, result: nn.Module) -> None:
        """A difference in the order of sums alone is none if it is gone in float64."""
        if not difference.rounding:
            raise PassError(str(difference))
        self._check_fully(result)

    def _check_fully(self, result: nn.Module) -> None:
        found = verify_equal(self.model, result, self.example_inputs)
        if not found.compared:
            warnings.warn(_uncomparable(found.notes[0]), stacklevel=6)


def _uncomparable(note: str) -> str:
    return f"transform: the result could not be compared with the model: {note}"


def release_masks(model: nn.Module) -> None:
    """Take the guards of a model that is used up off its parameters."""
    for weight in masked_weights(model).values():
        for module, attribute in weight.owners:
            spec = mask_spec(module, attribute)
            if spec is not None and spec.guard is Guard.GRADIENT:
                remove_mask(module, attribute)
