"""Elastic weight consolidation: a quadratic penalty for leaving what earlier tasks need."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fxsparse.curvature.arguments import check_kind, check_kinds, check_names, check_number, shown
from fxsparse.curvature.collector_file import undamaged
from fxsparse.curvature.damage_tensors import Tensors, check_tensors, matched
from fxsparse.curvature.operator_space import own_parameters
from fxsparse.errors import ConfigError
from fxsparse.nn import masked_weights
from fxsparse.sparsity.counts import check_fraction


@dataclass(frozen=True, eq=False)
class _Anchor:
    fisher: Mapping[str, Tensor]
    point: Mapping[str, Tensor]


class EWC:
    """E = lambda/2 sum_t sum_i F_t,i (theta_i - theta*_t,i)^2 (Kirkpatrick et al., arXiv 1612.00796).

    Online (Schwarz et al., arXiv 1805.06370) it keeps one Fisher, F <- gamma F + F_t, and one anchor, the last one.
    F is a mean over units: the Laplace precision is N F, and lambda absorbs N.

    Args:
        strength: lambda, at least 0.
        online: One running Fisher instead of one for each task.
        decay: gamma of the online form, in [0, 1].
        alive_only: Only alive weights of masked parameters count.

    Raises:
        ConfigError: strength or decay out of range, or no number, or a flag that is none.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> ewc = EWC(2.0)
    >>> ewc.consolidate("a", {"weight": torch.tensor([[1.0, 3.0]])}, model)
    >>> with torch.no_grad():
    ...     _ = model.weight.add_(torch.tensor([[0.5, -1.0]]))
    >>> ewc.penalty(model).item()
    3.25
    """

    def __init__(
        self, strength: float = 1.0, *, online: bool = False, decay: float = 1.0, alive_only: bool = False
    ) -> None:
        check_number(strength, "strength", 0)
        check_fraction(decay, "decay")
        check_kinds(bool, online=online, alive_only=alive_only)
        self.strength, self.online, self.decay, self.alive_only = strength, online, decay, alive_only
        self._anchors: dict[str, _Anchor] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that have been consolidated and count; online the last one alone."""
        return tuple(self._anchors)

    def consolidate(self, task: str, fisher: Tensors, model: nn.Module, *, free: Collection[str] = ()) -> None:
        """Take a task's Fisher and copy the parameters as they are now: the only moment at which the anchor moves.

        Args:
            task: Its name; a task that is consolidated again replaces its earlier self.
            fisher: Its Fisher diagonal by parameter name, of all parameters that require gradients but the free ones.
            model: Where the parameters are.
            free: Names of parameters that nothing holds to this task.

        Raises:
            ConfigError: an empty name, a missing Fisher, or one of no parameter or of another shape, or an argument of
                another type. Nothing has changed then.
            DataError: a Fisher is negative or not finite.
        """
        if not isinstance(task, str) or not task:
            raise ConfigError(f"`task` (={shown(task)}) must be a name, a string that is not empty")
        check_tensors(fisher, "fisher")
        held, loose = _held(model, fisher), _held(model, check_names(free, "free"), "free")
        given = {id(parameter) for parameter in (*held.values(), *loose.values())}
        for name, parameter in own_parameters(model).items():
            if parameter.requires_grad and id(parameter) not in given:
                raise ConfigError(f"`fisher` has no entry for `{name}` of the model: collect it, or name it in `free`")
        pairs = matched(fisher, held, "model")
        mine = {name: f.to(held[name]).clone() for name, f, _ in pairs}
        point = {name: held[name].detach().clone() for name in mine}
        if self.online:
            for old in self._anchors.values():
                for name, before in old.fisher.items():
                    if name in mine:
                        _check_shape(name, before, held[name])
                        mine[name] = self.decay * before.to(mine[name]) + mine[name]
                    else:
                        mine[name], point[name] = self.decay * before, old.point[name]
            self._anchors = {}
        self._anchors[task] = _Anchor(mine, point)

    def penalty(self, model: nn.Module) -> Float[Tensor, ""]:
        """E at the model's parameters, differentiable; gradient lambda F (theta - theta*).

        Raises:
            ConfigError: no module, or one without a parameter of a consolidated task, or with one of another shape.
        """
        check_kind(model, "model", nn.Module)
        alive = {n: w.mask for n, w in masked_weights(model).items()} if self.alive_only else {}
        first = next(model.parameters(), torch.zeros(()))
        total = torch.zeros((), dtype=first.dtype, device=first.device)
        for anchor in self._anchors.values():
            for name, parameter in _held(model, anchor.fisher).items():
                _check_shape(name, anchor.point[name], parameter)
                terms = anchor.fisher[name].to(parameter) * (parameter - anchor.point[name].to(parameter)).square()
                if name in alive:
                    terms = torch.where(alive[name], terms, 0.0)
                total = total + terms.sum().to(total)
        return 0.5 * self.strength * total

    def clear(self, task: str | None = None) -> None:
        """Forget a task, or all.

        Raises:
            ConfigError: the task is not known.
        """
        if task is None:
            self._anchors = {}
        elif task not in self.tasks:
            raise ConfigError(f"`task` (={task!r}) was never consolidated; there are {', '.join(self.tasks) or 'none'}")
        else:
            del self._anchors[task]

    def state_dict(self) -> dict[str, Any]:
        """Everything but the options; loads with `weights_only=True`."""
        return {
            "version": 1,
            "anchors": {t: {"fisher": dict(a.fisher), "point": dict(a.point)} for t, a in self._anchors.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a saved one was.

        Raises:
            ConfigError: another version, or a damaged state; nothing has changed then.
            DataError: a Fisher is negative or not finite.
        """
        version = state_dict.get("version") if isinstance(state_dict, Mapping) else None
        if version != 1:
            raise ConfigError(f"`state_dict` (=version {version}) must be of version 1")
        with undamaged("`state_dict`"):
            self._anchors = {task: _restored(task, dict(held)) for task, held in state_dict["anchors"].items()}


def _restored(task: Any, held: dict[str, Any]) -> _Anchor:
    fisher, point = dict(held.pop("fisher")), dict(held.pop("point"))
    if not isinstance(task, str) or not task or held or fisher.keys() != point.keys():
        raise ValueError(f"task {task!r} must have a Fisher and a point of the same parameters, and nothing else")
    pairs = matched(fisher, point, "point")
    return _Anchor({name: fisher[name].clone() for name, _, _ in pairs}, {n: each.clone() for n, each in point.items()})


def _held(model: nn.Module, names: Iterable[str], what: str = "fisher") -> dict[str, nn.Parameter]:
    check_kind(model, "model", nn.Module)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in names if name not in parameters]
    if missing:
        raise ConfigError(f"`{what}` names `{missing[0]}`, which is no parameter of the model")
    return {name: parameters[name] for name in names}


def _check_shape(name: str, before: Tensor, parameter: Tensor) -> None:
    if before.shape != parameter.shape:
        raise ConfigError(
            f"`{name}` (={tuple(parameter.shape)}) of the model must have the shape that was consolidated, "
            f"{tuple(before.shape)}: give the same model, or `clear` the task"
        )
