"""What is known of one model: a result for each stage, as plain JSON."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

EAGER = "eager"
STAGES = ("transform", "train", "reload", "half", "batch", "compile", "onnx", "compact")
"""The stages that can be chosen, in their order; `eager` comes before them, always."""


class Status(enum.Enum):
    """How a stage ended."""

    PASS = "pass"
    FAIL = "fail"
    NOT_APPLICABLE = "not applicable"
    """The original does not do it either, or this version does not offer it."""


@dataclass(frozen=True)
class StageResult:
    """One stage of one model.

    Attributes:
        stage: its name, `eager` or one of `STAGES`.
        status: how it ended.
        reason: why it failed or did not apply; "" for a pass without remarks.
        seconds: wall time in seconds.
        wrong: whether a number came out wrong, as opposed to an error that was raised.
        numbers: what was measured, by name.
        detail: the end of a traceback or of the process's output.
    """

    stage: str
    status: Status
    reason: str = ""
    seconds: float = 0.0
    wrong: bool = False
    numbers: Mapping[str, Any] = field(default_factory=dict)
    detail: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "stage": self.stage,
            "status": self.status.value,
            "reason": self.reason,
            "seconds": round(self.seconds, 3),
            "wrong": self.wrong,
            "numbers": dict(self.numbers),
            "detail": self.detail,
        }

    @staticmethod
    def from_plain(value: Mapping[str, Any]) -> StageResult:
        """The result that `plain` wrote; KeyError, TypeError or ValueError for anything else."""
        return StageResult(
            value["stage"],
            Status(value["status"]),
            value["reason"],
            float(value["seconds"]),
            bool(value["wrong"]),
            dict(value["numbers"]),
            value["detail"],
        )


@dataclass(frozen=True)
class EntryResult:
    """One model.

    Attributes:
        name: name of the entry.
        lib: library that it comes from.
        family: kind of model.
        key: digests of everything that decides whether the result still holds.
        seconds: wall time of its processes together.
        stages: the stages in the order in which they ran.
    """

    name: str
    lib: str
    family: str
    key: Mapping[str, str]
    seconds: float
    stages: tuple[StageResult, ...]

    def stage(self, name: str) -> StageResult | None:
        """The result of a stage; None when it was not run."""
        return next((result for result in self.stages if result.stage == name), None)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the stages that failed."""
        return tuple(result.stage for result in self.stages if result.status is Status.FAIL)

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.name,
            "lib": self.lib,
            "family": self.family,
            "key": dict(self.key),
            "seconds": round(self.seconds, 3),
            "stages": [result.plain() for result in self.stages],
        }

    @staticmethod
    def from_plain(value: Mapping[str, Any]) -> EntryResult:
        """The result that `plain` wrote; KeyError, TypeError or ValueError for anything else."""
        return EntryResult(
            value["name"],
            value["lib"],
            value["family"],
            dict(value["key"]),
            float(value["seconds"]),
            tuple(StageResult.from_plain(each) for each in value["stages"]),
        )
