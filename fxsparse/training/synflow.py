"""SynFlow: iterative pruning at initialisation without data."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError
from fxsparse.nn import masked_weights
from fxsparse.sparsity.counts import check_count
from fxsparse.training.calibration import Calibration, call
from fxsparse.training.initial import start_from
from fxsparse.training.pruning import Masks, Pruning
from fxsparse.training.state import WeightState


@dataclass(frozen=True)
class SynFlow(Pruning):
    """Keeps the largest |w dR/dw|, R the sum of the outputs of the network of |parameters| for inputs of ones.

    Round e of n keeps the density rho^(e/n) among the survivors, so that no layer is cut off (Tanaka et al., arXiv
    2006.05467). Scores come from a float64 copy in eval mode with absolute parameters and running means; of the batches
    only the first one's shape is read.

    Attributes:
        rounds: n; patterns that exclude the densities between, such as `NByM`, need 1.
    """

    rounds: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.rounds, "rounds", 1)
        if self.train:
            raise ConfigError("`train` (=True) is not for SynFlow: one input of ones has no batch statistics")

    def densities(self) -> tuple[float, ...]:
        """rho^(e/n) for e = 1 ... n."""
        rho = 1 - self.sparsity
        return tuple(rho ** (e / self.rounds) for e in range(1, self.rounds + 1))

    def masks(self, calibration: Calibration, states: Sequence[WeightState]) -> Masks:
        """The last round's; rows are regrouped in it."""
        twin = _absolute(calibration.model)
        ones = _ones(calibration.example())
        found: Masks = {}
        for round_, density in enumerate(self.densities(), 1):
            last = round_ == self.rounds
            method = self if last else dataclasses.replace(self, regroup=None)
            found = method.best(states, self._flow(twin, ones), self.sparsity if last else 1 - density)
            states = [dataclasses.replace(state, mask=found[state.name][0]) for state in states]
            if not last:
                patterns = {state.name: state.pattern for state in states}
                start_from(masked_weights(twin), {name: mask for name, (mask, _) in found.items()}, patterns)
        return found

    def scores(self, calibration: Calibration, states: Sequence[WeightState]) -> Mapping[str, Tensor]:
        """|w dR/dw| of the first round, float64."""
        return self._flow(_absolute(calibration.model), _ones(calibration.example()))

    def _flow(self, twin: nn.Module, ones: Any) -> dict[str, Tensor]:
        weights = masked_weights(twin)
        with torch.enable_grad():
            outputs = torch.stack([each.sum() for each in _tensors(call(twin, ones))]).sum()
            found = torch.autograd.grad(
                outputs, [each.weight for each in weights.values()], allow_unused=True, materialize_grads=True
            )
        return {
            name: torch.where(masked.mask, (masked.weight.detach() * gradient).abs(), 0.0)
            for (name, masked), gradient in zip(weights.items(), found, strict=True)
        }


def _absolute(model: nn.Module) -> nn.Module:
    """A float64 copy with absolute parameters and running means."""
    twin = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                parameter.abs_().requires_grad_(True)
        for name, buffer in twin.named_buffers():
            if name.rpartition(".")[2] == "running_mean":
                buffer.abs_()
    return twin


def _ones(inputs: Any) -> Any:
    """One sample of ones, float64, in the form of the inputs."""
    if isinstance(inputs, Mapping):
        return {name: _ones(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(_ones(value) for value in inputs)
    if not isinstance(inputs, Tensor):
        return inputs
    if not inputs.is_floating_point():
        raise ConfigError(f"SynFlow feeds ones, which inputs of `dtype` (={inputs.dtype}) cannot mean; use SNIP")
    return torch.ones_like(inputs[:1], dtype=torch.float64)


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, Mapping | tuple | list):
        for each in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from _tensors(each)
