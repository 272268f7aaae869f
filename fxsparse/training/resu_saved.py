"""What RESU's handle saves beside every handle's state, and the check of what it is given back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxsparse.nn import MaskedWeight
from fxsparse.training.resu_theta import State
from fxsparse.training.resu_tournament import ResuRecord
from fxsparse.training.saved_state import check_names, damaged, named, opened, rows, sequence, tensors

PARTS = frozenset({"phase", "cycle", "theta", "scales", "revived", "resurrections", "averages", "inputs"})
"""The keys of RESU's state that other states do not have."""


@dataclass(frozen=True)
class ResuState:
    """The parts of `ResuHandle.state_dict` that only RESU has, checked against the model.

    Attributes:
        theta: What theta's rule keeps of each weight.
        scales: Scale of theta's start, by weight, in a phase.
        revived: What the last COMMIT resurrected.
        resurrections: What every COMMIT did.
        averages: Weights of averaged copies, held in a phase.
        seen: Whether inputs were collected.
        sums: Their sums, by weight.
    """

    theta: Mapping[str, State]
    scales: Mapping[str, float]
    revived: Mapping[str, Tensor]
    resurrections: tuple[ResuRecord, ...]
    averages: tuple[Mapping[str, Tensor], ...]
    seen: bool
    sums: Mapping[str, list[Tensor]]

    @staticmethod
    def read(state: Mapping[str, Any], weights: Mapping[str, MaskedWeight]) -> ResuState:
        """Check a state that has every key.

        Raises:
            ConfigError: a part does not fit the weights.
        """
        records = rows(ResuRecord, state["resurrections"], "resurrections")
        check_names("resurrections", {record.name: record for record in records}, weights)
        averages = sequence(opened(state["averages"]), "averages")
        for each in averages:
            if tensors("averages", each, weights).keys() != weights.keys():
                raise damaged("averages", "lacks weights of a copy")
        seen, sums = _inputs(opened(state["inputs"]), weights)
        return ResuState(
            _theta(opened(state["theta"]), weights),
            _scales(opened(state["scales"]), weights),
            tensors("revived", opened(state["revived"]), weights, torch.bool),
            records,
            tuple(averages),
            seen,
            sums,
        )


def _theta(given: object, weights: Mapping[str, MaskedWeight]) -> dict[str, State]:
    found = named(given, "theta", weights)
    for name, each in found.items():
        if not isinstance(each, Mapping) or not all(isinstance(kept, Tensor | int | float) for kept in each.values()):
            raise damaged(f"theta[{name}]", f"(={each!r}) must be a dict of tensors and numbers")
    return found


def _scales(given: object, weights: Mapping[str, MaskedWeight]) -> dict[str, float]:
    found = named(given, "scales", weights)
    for name, scale in found.items():
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise damaged(f"scales[{name}]", f"(={scale!r}) must be a number")
    return found


def _inputs(given: object, weights: Mapping[str, MaskedWeight]) -> tuple[bool, dict[str, list[Tensor]]]:
    if not isinstance(given, Mapping) or not isinstance(given.get("seen"), bool):
        raise damaged("inputs", f"(={given!r}) must say whether inputs were seen, and their sums")
    found = named(given.get("sums", {}), "inputs", weights)
    for name, each in found.items():
        size = weights[name].shape.numel()
        if not all(isinstance(kept, Tensor) and kept.numel() == size for kept in sequence(each, f"inputs[{name}]")):
            raise damaged(f"inputs[{name}]", f"must be sums for the {size} elements of the weight")
    return given["seen"], found
