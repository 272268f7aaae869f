"""How the resurrection parameters theta are trained."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.optim import Optimizer

from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_count, check_fraction, fraction_count
from fxsparse.sparsity.top_k import top_k

State = dict[str, Any]


@dataclass(frozen=True)
class ThetaRule(abc.ABC):
    """One step on theta. One rounding per operation: a value does not depend on its place in the tensor.

    Attributes:
        lr: Learning rate eta >= 0; None = the optimizer's for this weight, with its schedule. 0 leaves theta as drawn.
        scale: Factor on the optimizer's learning rate where `lr` is None.

    Raises:
        ConfigError: a setting out of range.
    """

    lr: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_at_least_0(self, "scale")
        if self.lr is not None:
            _check_at_least_0(self, "lr")

    def rate(self, options: Mapping[str, Any]) -> float:
        """The learning rate under the optimizer's settings for the weight."""
        return float(options["lr"]) * self.scale if self.lr is None else self.lr

    @abc.abstractmethod
    def step(
        self,
        theta: Float[Tensor, "*shape"],
        gradient: Float[Tensor, "*shape"],
        trainable: Bool[Tensor, "*shape"],
        state: State,
        rate: float,
    ) -> Float[Tensor, "*shape"]:
        """The next theta, read where `trainable` is True; any storage: the whole weight, or theta alone.

        Args:
            theta: Values before the step.
            gradient: T * G.
            trainable: T.
            state: Tensors and numbers of this phase, empty at first; updated.
            rate: eta.
        """


@dataclass(frozen=True)
class ThetaSGD(ThetaRule):
    """theta - eta g."""

    def step(self, theta: Tensor, gradient: Tensor, trainable: Tensor, state: State, rate: float) -> Tensor:
        """Plain gradient descent."""
        return theta - gradient * rate


@dataclass(frozen=True)
class ThetaMomentum(ThetaRule):
    """m <- beta m + (1 - beta) g, theta - eta m.

    Attributes:
        beta: In [0, 1).
    """

    beta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_beta(self, "beta")

    def step(self, theta: Tensor, gradient: Tensor, trainable: Tensor, state: State, rate: float) -> Tensor:
        """Gradient descent along an average."""
        state["m"] = _average(state.get("m"), gradient, self.beta)
        average: Tensor = state["m"]
        return theta - average * rate


@dataclass(frozen=True)
class ThetaAdamW(ThetaRule):
    """theta <- (1 - eta lambda) theta, then theta - eta m^ / (sqrt(v^) + epsilon) (arXiv 1711.05101).

    Attributes:
        betas: Of the averages of g and g^2, in [0, 1).
        epsilon: Positive.
        weight_decay: lambda; 0 lets the tournament rank what was learnt, not what decayed.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least_0(self, "weight_decay")
        if not all(0 <= beta < 1 for beta in self.betas) or not self.epsilon > 0:
            raise ConfigError(f"`betas` (={self.betas}) must be in [0, 1) and `epsilon` (={self.epsilon}) positive")

    def step(self, theta: Tensor, gradient: Tensor, trainable: Tensor, state: State, rate: float) -> Tensor:
        """Adam with decoupled decay."""
        state["steps"] = state.get("steps", 0) + 1
        first, second = self.betas
        state["m"] = _average(state.get("m"), gradient, first)
        state["v"] = _average(state.get("v"), gradient * gradient, second)
        m: Tensor = state["m"] / (1 - first ** state["steps"])
        v: Tensor = state["v"] / (1 - second ** state["steps"])
        return theta * (1 - rate * self.weight_decay) - m / (v.sqrt() + self.epsilon) * rate


@dataclass(frozen=True)
class Selective(ThetaRule):
    """SGD on the few positions that pull hard and in one direction: theta - eta C g there, nothing elsewhere.

    With averages m of g and v of |g|, the consistency is C = |m| / (v + 1e-8). Of the dead positions, P_mag are the
    top-max(1, n(`magnitude`, p)) of |g| and P_con those with C > `threshold`; the step moves the
    top-max(1, n(`subset`, p)) of |g| in both, which may be none. Up to step `warm_up` of a phase C is noise: P_con is
    everything and C is 1.

    Attributes:
        beta: Of the averages.
        magnitude: Fraction of P_mag.
        subset: Fraction that moves.
        threshold: Least consistency.
        warm_up: Steps without a test of consistency.
        lr: As everywhere; the original's value.
    """

    lr: float | None = 1e-4
    beta: float = 0.9
    magnitude: float = 0.5
    subset: float = 0.2
    threshold: float = 0.5
    warm_up: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_beta(self, "beta")
        for name in ("magnitude", "subset", "threshold"):
            check_fraction(getattr(self, name), name)
        check_count(self.warm_up, "warm_up", 0)

    def step(self, theta: Tensor, gradient: Tensor, trainable: Tensor, state: State, rate: float) -> Tensor:
        """Move the chosen positions."""
        state["steps"] = state.get("steps", 0) + 1
        size = gradient.abs()
        state["m"] = _average(state.get("m"), gradient, self.beta)
        state["v"] = _average(state.get("v"), size, self.beta)
        consistency = state["m"].abs() / (state["v"] + 1e-8)
        if state["steps"] <= self.warm_up:
            consistency = torch.ones_like(consistency)
        chosen = self.chosen(size, consistency, trainable, warm=state["steps"] <= self.warm_up)
        return torch.where(chosen, theta - gradient * consistency * rate, theta)

    def chosen(self, size: Tensor, consistency: Tensor, trainable: Tensor, warm: bool) -> Bool[Tensor, "*shape"]:
        """S: the positions that move."""
        count = int(trainable.sum())
        if not count:
            return trainable
        large = top_k(size, max(1, fraction_count(self.magnitude, count)), trainable)
        both = large if warm else large & (consistency > self.threshold)
        return top_k(size, min(max(1, fraction_count(self.subset, count)), int(both.sum())), both)


@dataclass(frozen=True)
class ThetaOptimizer(ThetaRule):
    """Any torch.optim class on theta; its own weight decay is 0, `weight_decay` is applied to theta alone.

    Attributes:
        kind: The class, such as torch.optim.RMSprop.
        options: Its keyword arguments but `lr` and `weight_decay`, as (name, value) pairs.
        weight_decay: lambda of theta <- (1 - eta lambda) theta before the step.
    """

    kind: type[Optimizer] = torch.optim.Adam
    options: tuple[tuple[str, Any], ...] = ()
    weight_decay: float = 0.0
    _forced: ClassVar[frozenset[str]] = frozenset({"lr", "weight_decay", "params"})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least_0(self, "weight_decay")
        names = {name for name, _ in self.options}
        if not isinstance(self.kind, type) or not issubclass(self.kind, Optimizer):
            raise ConfigError(f"`kind` (={self.kind!r}) must be a torch.optim class such as torch.optim.RMSprop")
        if issubclass(self.kind, torch.optim.LBFGS):
            raise ConfigError("`kind` (=LBFGS) needs a closure; theta has the gradient of the step alone")
        if names & self._forced:
            raise ConfigError(f"`options` (={sorted(names)}) must leave out lr and weight_decay: they are fields")

    def step(self, theta: Tensor, gradient: Tensor, trainable: Tensor, state: State, rate: float) -> Tensor:
        """One step of the optimizer on a copy of theta."""
        copy = torch.nn.Parameter(theta * (1 - rate * self.weight_decay))
        optimizer = self.kind([copy], lr=rate, **dict(self.options))  # type: ignore[call-arg]  # every class has lr
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        optimizer.state[copy].update(state)
        copy.grad = gradient
        with torch.enable_grad():
            optimizer.step()
        state.update(optimizer.state[copy])
        return copy.detach()


def _average(before: Tensor | None, value: Tensor, beta: float) -> Tensor:
    fresh = value * (1 - beta)
    return fresh if before is None else before * beta + fresh


def _check_at_least_0(rule: ThetaRule, name: str) -> None:
    if not getattr(rule, name) >= 0:
        raise ConfigError(f"`{name}` (={getattr(rule, name)}) of {type(rule).__name__} must be at least 0")


def _check_beta(rule: ThetaRule, name: str) -> None:
    if not 0 <= getattr(rule, name) < 1:
        raise ConfigError(f"`{name}` (={getattr(rule, name)}) of {type(rule).__name__} must be in [0, 1)")
