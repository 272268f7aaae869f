"""Scores from data: gradients, curvature products and input norms of a model that is left as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float64
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxsparse.errors import ConfigError
from fxsparse.nn import MaskedWeight
from fxsparse.nn.recurrence import differentiable_recurrence
from fxsparse.sparsity.saliency import Saliency
from fxsparse.training.batches import call, samples_of
from fxsparse.training.distributed import process_group, summed, unwrap
from fxsparse.training.flow import Flow
from fxsparse.training.input_norms import InputNorms
from fxsparse.training.scopes import training_mode
from fxsparse.training.state import WeightState

_NO_BATCHES = "`batches` (=none) must hold at least one batch of calibration data"
Loss = Callable[[Any, Any], Tensor]
Gradients = dict[str, Float64[Tensor, "*shape"]]


class Calibration:
    """A model, batches and a loss, to be used inside `with`; parameters, gradients, buffers and random state stay.

    Args:
        model: The model, with masks; DDP and compiled wrappers are seen through.
        weights: Its masked weights.
        batches: Each one `(inputs, targets)`, or inputs alone where no loss is needed. Inputs are a tensor, a tuple of
            positional or a mapping of keyword arguments. Read once per pass; an iterator is kept in memory.
        loss: (outputs, targets) -> mean loss over the samples of the batch.
        train: Train mode, instead of eval mode.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, MaskedWeight],
        batches: Iterable[Any] = (),
        loss: Loss | None = None,
        *,
        train: bool = False,
    ) -> None:
        self.model, self.wrapped, self.weights, self.loss, self.train = unwrap(model), model, weights, loss, train
        self.batches: Iterable[Any] = tuple(batches) if iter(batches) is batches else batches
        self._scope = contextlib.ExitStack()

    def __enter__(self) -> Calibration:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng())
            stack.enter_context(training_mode(self.model, self.train))
            stack.enter_context(differentiable_recurrence(self.model))
            stack.enter_context(_kept_buffers(self.model))
            stack.enter_context(_trainable([masked.weight for masked in self.weights.values()]))
            self._scope = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._scope.close()

    def gradients(self, temperature: float = 1.0) -> Gradients:
        """The mean gradient over all samples of all ranks of every weight, dead entries 0; outputs over `temperature`.

        Raises:
            ConfigError: no loss, no batches on any rank, or batches without targets.
        """
        sums, samples = self._zeros(), 0
        for outputs, targets, count in self._passed():
            for name, gradient in self._derived(self._loss(outputs, targets, temperature)).items():
                sums[name] += count * gradient.double()
            samples += count
        return self._mean(sums, samples)

    def curvature_product(self, direction: Gradients, temperature: float = 1.0) -> Gradients:
        """H v over all samples: H the Hessian of the mean loss with respect to all weights together.

        Raises:
            ConfigError: as `gradients`.
        """
        sums, samples = self._zeros(), 0
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            for outputs, targets, count in self._passed():
                slope = self._derived(self._loss(outputs, targets, temperature), again=True)
                along = torch.stack([(slope[name] * direction[name].to(slope[name])).sum() for name in slope]).sum()
                if along.requires_grad:
                    for name, product in self._derived(along).items():
                        sums[name] += count * product.double()
                samples += count
        return self._mean(sums, samples)

    def input_norms(self) -> Gradients:
        """The norm of the input that each element multiplies, over all samples and positions.

        Raises:
            ConfigError: no batches, or a weight whose inputs are not known.
        """
        collector, samples = InputNorms(self.weights), 0
        with torch.no_grad():
            for _, _, count in self._passed(collector):
                samples += count
        self._samples(samples)
        norms = collector.norms() if samples else self._zeros()
        if self._group is None:
            return norms
        sums = {name: each[0] for name, each in collector.state_dict().items()} if samples else norms
        total = summed({name: sums[name].flatten() for name in norms}, self._group)
        return {name: total[name].reshape(norms[name].shape).sqrt() for name in norms}

    def given(self, states: Sequence[WeightState], saliency: Saliency) -> list[WeightState]:
        """The states with what a saliency reads: mean gradients, input norms.

        Raises:
            ConfigError: as `gradients` and `input_norms`, where the saliency needs them.
        """
        gradients = self.gradients() if saliency.needs_gradient else {}
        inputs = self.input_norms() if saliency.needs_inputs else {}
        return [
            dataclasses.replace(each, gradient=gradients.get(each.name), inputs=inputs.get(each.name))
            for each in states
        ]

    @functools.cached_property
    def flow(self) -> Flow:
        """The network of absolute parameters, for inputs of ones in the form of the first batch.

        Raises:
            ConfigError: no batches on some rank, or inputs that cannot be ones.
        """
        first = next(self._inputs(), None)
        if self._sum(int(first is None)) or first is None:
            raise ConfigError(f"{_NO_BATCHES} on every rank: its form is read")
        return Flow(self.model, first[0])

    def _inputs(self) -> Iterator[tuple[Any, Any]]:
        for batch in self.batches:
            pair = isinstance(batch, tuple | list)
            yield (batch[0], batch[1] if len(batch) > 1 else None) if pair else (batch, None)

    def _passed(self, within: InputNorms | None = None) -> Iterator[tuple[Any, Any, int]]:
        for inputs, targets in self._inputs():
            with within if within is not None else contextlib.nullcontext(), _grad_unless(within is not None):
                outputs = call(self.model, inputs)
            yield outputs, targets, samples_of(inputs)

    def _loss(self, outputs: Any, targets: Any, temperature: float) -> Tensor:
        if self.loss is None:
            raise ConfigError("`loss` (=None) must be given: (outputs, targets) -> mean loss of the batch")
        if temperature != 1.0:
            if not isinstance(outputs, Tensor):
                raise ConfigError(
                    f"`temperature` (={temperature}) divides logits, but the model returns {type(outputs).__name__}; "
                    "divide them in `loss` and set it to 1"
                )
            outputs = outputs / temperature
        return self.loss(outputs, targets)

    def _derived(self, value: Tensor, again: bool = False) -> dict[str, Tensor]:
        weights = [masked.weight for masked in self.weights.values()]
        found = torch.autograd.grad(value, weights, create_graph=again, allow_unused=True, materialize_grads=True)
        masks = [masked.mask for masked in self.weights.values()]
        return {name: torch.where(m, g, 0.0) for name, m, g in zip(self.weights, masks, found, strict=True)}

    def _zeros(self) -> Gradients:
        return {name: torch.zeros_like(w.weight, dtype=torch.float64) for name, w in self.weights.items()}

    @functools.cached_property
    def _group(self) -> dist.ProcessGroup | None:
        return process_group(self.wrapped)

    def _mean(self, sums: Gradients, samples: int) -> Gradients:
        """The mean over the samples of all ranks, of which each may have another number."""
        every = self._samples(samples)
        return {name: total / every for name, total in summed(sums, self._group).items()}

    def _samples(self, own: int) -> int:
        """The number of samples on all ranks."""
        every = self._sum(own)
        if not every:
            raise ConfigError(_NO_BATCHES)
        return every

    def _sum(self, own: int) -> int:
        device = next(iter(self.weights.values())).weight.device
        return int(summed({"": torch.tensor(own, device=device)}, self._group)[""])


@contextlib.contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in model.buffers()] if model.training else []
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextlib.contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


def _grad_unless(collecting: bool) -> torch.set_grad_enabled:
    return torch.set_grad_enabled(not collecting)
