"""The model under test: built anew whenever it is needed, with the numbers that everything is compared with."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fxsparse.zoo.measure import Inputs, Outputs, Trained, forward, outputs_difference, train_run

EXACT = 1e-5
"""Relative difference up to which two runs in float32 count as equal; it is stated wherever it is not zero."""


RUNS = 5
"""Further runs of a model that does not repeat itself."""


class NotApplicableError(Exception):
    """The original does not do what the stage asks for, or this version does not offer it."""


@dataclass
class Subject:
    """One model of a list.

    Attributes:
        entry: name, ctor, inputs, train_inputs.
        batch: batch size of the inputs.
        sparsity: dead fraction of the sparse models.
        scratch: folder for files, gone afterwards.
    """

    entry: Mapping[str, Any]
    batch: int
    sparsity: float
    scratch: str
    deterministic: bool = True
    _sparse: nn.Module | None = None
    _plan: Any = None
    _plan_error: Exception | None = None
    dense: nn.Module | None = None
    timings: dict[str, float] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """A new original, as the entry makes it, in the mode in which it leaves it."""
        names: dict[str, Any] = {"__name__": "zoo_entry"}
        _seed(0)
        exec(self.entry["ctor"], names)  # the list of models is code, and says so
        model = names.get("m")
        if not isinstance(model, nn.Module):
            raise TypeError(f"`ctor` left `m` (={type(model).__name__}), which is no torch.nn.Module")
        return model

    def inputs(self, batch: int | None = None) -> Inputs:
        """New example inputs for eval mode."""
        return self._inputs(self.entry["inputs"], batch)

    def train_inputs(self, batch: int | None = None) -> Inputs:
        """New example inputs for train mode."""
        return self._inputs(self.entry.get("train_inputs") or self.entry["inputs"], batch)

    def _inputs(self, source: str, batch: int | None) -> Inputs:
        names: dict[str, Any] = {"torch": torch, "B": self.batch if batch is None else batch}
        _seed(1)
        exec(source, names)
        return tuple(names["args"]), dict(names["kwargs"])

    @cached_property
    def expected(self) -> Outputs:
        """Outputs of the original in eval mode."""
        return forward(self.build().eval(), self.inputs())

    @cached_property
    def trained(self) -> Trained | Exception:
        """One forward and backward pass of the original in train mode, or the error that it raises."""
        try:
            return train_run(self.build().train(), self.train_inputs())
        except Exception as error:
            return error

    def plan(self) -> Any:
        """The plan at the subject's sparsity; made once, an error is raised again."""
        if self._plan_error is not None:
            raise self._plan_error
        if self._plan is None:
            import fxsparse

            began = time.process_time()
            try:
                self._plan = fxsparse.plan(self.build().eval(), self.inputs(), sparsity=self.sparsity)
            except Exception as error:
                self._plan_error = error
                raise
            self.timings["plan"] = time.process_time() - began
        return self._plan

    def new_sparse(self) -> nn.Module:
        """A new sparse model of the original's weights."""
        model: nn.Module = self.plan().apply()
        return model

    @property
    def sparse(self) -> nn.Module:
        """The sparse model that the stages share; the train stage leaves it trained."""
        if self._sparse is None:
            self._sparse = self.new_sparse()
        return self._sparse

    def folded(self) -> nn.Module:
        """The original with the folded weights of the shared sparse model, in eval mode.

        Where masks stay, because no values of the original's parameters can express them, it is the folded model.
        """
        import fxsparse

        folded: nn.Module = fxsparse.finalize(self.sparse)
        if fxsparse.masks(folded):
            return folded.eval()
        original = self.build().eval()
        original.load_state_dict(folded.state_dict())
        return original

    def forget_sparse(self) -> None:
        """Let the next stage have a new sparse model: this one may be in any state."""
        self._sparse = None

    def tolerance(self, bound: float = EXACT) -> float:
        """`bound`, widened where the original differs from itself."""
        return bound if self.deterministic else max(bound, 4 * self.noise)

    @cached_property
    def noise(self) -> float:
        """Largest relative difference of runs of the original in eval mode, same seed; 0 where two are equal."""
        first = outputs_difference(self.expected, forward(self.build().eval(), self.inputs()))
        if first in (0.0, float("inf")):
            return first
        more = [outputs_difference(self.expected, forward(self.build().eval(), self.inputs())) for _ in range(RUNS)]
        return max(first, *more)


@dataclass
class Sheet:
    """What a stage writes down: numbers, and what is wrong."""

    numbers: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    wrong: bool = False

    def check(self, fine: bool, problem: str, wrong: bool = False) -> bool:
        """Write a problem down unless `fine`; `wrong` says that a number came out wrong."""
        if not fine:
            self.problems.append(problem)
            self.wrong = self.wrong or wrong
        return fine

    def within(self, name: str, value: float, bound: float, what: str) -> bool:
        """Note a relative difference; one above `bound` (or NaN) is a wrong number."""
        self.numbers[name] = value
        return self.check(value <= bound, f"{what} differ by {value:.2g} (bound {bound:.2g})", wrong=True)


StageFunction = Callable[[Subject, Sheet], None]


def first_line(error: BaseException) -> str:
    """The type and the first line of an error, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
