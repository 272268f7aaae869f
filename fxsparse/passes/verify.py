"""Equality of two models, shown on example inputs: in float64, in eval and in train mode, gradients too."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxsparse.errors import CaptureError, PassError
from fxsparse.graph import fresh_inputs, isolated_clone, specialisation, split_inputs
from fxsparse.graph.inputs import opened, tensors_of
from fxsparse.graph.scopes import mode_of, seeded
from fxsparse.nn import alive_gains
from fxsparse.nn import masks as masks_of
from fxsparse.nn.recurrence import differentiable_recurrence
from fxsparse.passes.equivalence import DIFFERENT, EXACT, Close, Equivalence

_SEED = 20250
_ROUNDING = 2.0**13  # units in the last place, of the largest entry, by which gradients under EXACT may differ


class Verify(enum.Enum):
    """How a transform shows on the example inputs that it kept the function of a model, while all masks are True."""

    QUICK = "quick"
    """In the model's own dtype: outputs, buffers and written inputs are bit-identical, and where a backward pass costs
    little the gradients agree. In train mode, or in eval mode for a model that is given so and of which the structure
    proves that train mode shows nothing else; models of little work in both modes unless that is proved. In doubt
    `FULL` decides."""
    FULL = "full"
    """`verify_equal`: float64, eval and train mode, outputs, buffers and all gradients."""


@dataclass(frozen=True)
class Verification:
    """What was compared, and what was found.

    Attributes:
        compared: The modes compared: "eval", "train".
        dtype: The floating dtype of the comparison.
        worst_output: Largest absolute difference of an output or buffer.
        worst_gradient: Largest absolute difference of a parameter's gradient, at entries alive in both models.
        notes: What could not be compared, and why.
    """

    compared: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    worst_output: float = 0.0
    worst_gradient: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass
class _Observation:
    """Everything that one run shows, or the exception that it raised."""

    outputs: Any = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    error: Exception | None = None


def verify_equal(
    before: nn.Module, after: nn.Module, example_inputs: Any, equivalence: Equivalence = EXACT
) -> Verification:
    """Run both models on the same inputs from the same random state and compare all that they show.

    Compared are outputs, buffers after the run, and gradients of a random projection of the outputs, in eval and in
    train mode, in float64 where the model can run so; on the meta device only shapes and dtypes. Neither model nor any
    global state changes.

    Args:
        before: The model to compare with.
        after: The model to compare.
        example_inputs: Positional inputs, or (args, kwargs).
        equivalence: How close the numbers must be; `DIFFERENT` compares nothing.

    Returns:
        What was compared. A mode in which `before` itself fails, or does not repeat itself, is left out with a note.

    Raises:
        PassError: a difference beyond `equivalence`, or an error that only `after` raises.
    """
    if isinstance(equivalence, DIFFERENT):
        return Verification(notes=(f"not compared: {equivalence.reason}",))
    args, kwargs = split_inputs(example_inputs)
    same_dtype_only = specialisation(after) is not None and _refuses(after, args, kwargs)
    dtype = torch.float64 if not same_dtype_only and _runs(before, args, kwargs) else None
    report = Verification(dtype=dtype)
    for training in (False, True):
        report = _verify_mode(before, after, (args, kwargs), training, dtype, equivalence, report)
    return report


def _runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return _observe(model, args, kwargs, False, torch.float64).error is None


def _refuses(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the guards of a specialised graph do not let float64 inputs in."""
    return isinstance(_observe(model, args, kwargs, False, torch.float64).error, CaptureError)


def _verify_mode(
    before: nn.Module,
    after: nn.Module,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    training: bool,
    dtype: torch.dtype | None,
    equivalence: Equivalence,
    report: Verification,
) -> Verification:
    mode = "train" if training else "eval"
    expected = _observe(before, *inputs, training, dtype)
    if expected.error is not None:
        note = f"{mode} mode: the model itself raises {type(expected.error).__name__} ({expected.error})"
        return _with(report, notes=(*report.notes, note))
    found = _observe(after, *inputs, training, dtype)
    if found.error is not None:
        raise PassError(f"{mode} mode: raises {_said(found.error)} where the model before did not") from found.error
    alive = _alive(before, after)
    try:
        outputs = _compare_outputs(expected, found, equivalence)
        gradients = _compare_gradients(expected, found, equivalence, alive)
    except PassError as error:
        again = _observe(before, *inputs, training, dtype)
        try:
            _compare_outputs(expected, again, equivalence)
            _compare_gradients(expected, again, equivalence, alive)
        except PassError:
            note = f"{mode} mode: the model does not repeat itself from the same seed, so nothing can be compared"
            return _with(report, notes=(*report.notes, note))
        raise PassError(f"{mode} mode: {error}") from None
    return _with(
        report,
        compared=(*report.compared, mode),
        worst_output=max(report.worst_output, outputs),
        worst_gradient=max(report.worst_gradient, gradients),
    )


def _with(report: Verification, **changes: Any) -> Verification:
    return Verification(**{**report.__dict__, **changes})


def _said(error: Exception) -> str:
    return f"{type(error).__name__} ({str(error).strip().splitlines()[0] if str(error).strip() else 'no message'})"


def _observe(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool, dtype: torch.dtype | None
) -> _Observation:
    with seeded(_SEED):
        clone = isolated_clone(model, copied=[name for name, _ in model.named_parameters(remove_duplicate=False)])
        try:
            if dtype is not None:
                clone = clone._apply(partial(_widened, dtype=dtype))  # type: ignore[no-untyped-call]  # torch leaves it so
                args, kwargs = _cast((args, kwargs), dtype)
            args, kwargs = fresh_inputs(args, kwargs)
            with mode_of(clone, training), torch.enable_grad(), differentiable_recurrence(clone):
                outputs = opened(clone(*args, **kwargs))
                _backward(outputs)
        except Exception as error:  # whatever the user's forward raises is what there is to observe
            return _Observation(error=error)
    gradients = {name: p.grad for name, p in clone.named_parameters() if p.grad is not None}
    buffers = {name: buffer for name, buffer in clone.named_buffers() if buffer.dtype != torch.bool}
    return _Observation(pytree.tree_map(_detached, outputs), gradients, buffers)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda value: _widened(value, dtype) if isinstance(value, Tensor) else value, inputs)


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _backward(outputs: Any) -> None:
    """Backward of a fixed random projection of all differentiable outputs."""
    generator = torch.Generator().manual_seed(_SEED)
    total: Tensor | None = None
    for output in tensors_of(outputs):
        if not output.requires_grad or not (output.is_floating_point() or output.is_complex()):
            continue
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device)
        part = (torch.view_as_real(output).sum(-1) if output.is_complex() else output) * weights.to(output.real.dtype)
        total = part.sum() if total is None else total + part.sum()
    if total is not None:
        total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _alive(before: nn.Module, after: nn.Module) -> Mapping[str, Tensor]:
    """The entries whose gradients are compared: those that are alive in both models, and g of slices that are."""
    alive: dict[str, Tensor] = {}
    for model in (before, after):
        for name, mask in {**masks_of(model), **alive_gains(model)}.items():
            alive[name] = mask & alive[name] if name in alive else mask
    return alive


def _compare_outputs(expected: _Observation, found: _Observation, equivalence: Equivalence) -> float:
    old, old_tree = pytree.tree_flatten(expected.outputs)
    new, new_tree = pytree.tree_flatten(found.outputs)
    if old_tree != new_tree:
        raise PassError(f"the outputs are built differently: {new_tree} instead of {old_tree}")
    worst = 0.0
    for index, (a, b) in enumerate(zip(old, new, strict=True)):
        if isinstance(a, Tensor):
            worst = max(worst, _compare(f"output {index}", a, b, _allowed(equivalence)))
        elif not isinstance(b, type(a)) or (isinstance(a, bool | int | float | str) and a != b):
            raise PassError(f"output {index} is {b!r} instead of {a!r}")
    for name in expected.buffers.keys() & found.buffers.keys():
        worst = max(
            worst, _compare(f"buffer `{name}`", expected.buffers[name], found.buffers[name], _allowed(equivalence))
        )
    return worst


def _compare_gradients(
    expected: _Observation, found: _Observation, equivalence: Equivalence, alive: Mapping[str, Tensor]
) -> float:
    missing = expected.gradients.keys() - found.gradients.keys()
    extra = found.gradients.keys() - expected.gradients.keys()
    if missing or extra:
        raise PassError(f"parameters lost their gradient: {sorted(missing)}; gained one: {sorted(extra)}")
    worst = 0.0
    for name, old in expected.gradients.items():
        new = found.gradients[name]
        if name in alive and alive[name].shape == old.shape == new.shape:
            old, new = (torch.where(alive[name], gradient.to_dense(), 0.0) for gradient in (old, new))
        worst = max(worst, _compare(f"gradient of `{name}`", old, new, _allowed_gradient(equivalence)))
    return worst


def _allowed(equivalence: Equivalence) -> Callable[[Tensor], Tensor | float]:
    """The permitted absolute difference as a function of the expected values."""
    if isinstance(equivalence, Close):
        return lambda old: equivalence.atol + equivalence.rtol * old.abs()
    return lambda old: 0.0


def _allowed_gradient(equivalence: Equivalence) -> Callable[[Tensor], Tensor | float]:
    if isinstance(equivalence, Close):
        return lambda old: equivalence.atol + equivalence.rtol * old.abs().amax()
    return lambda old: _ROUNDING * torch.finfo(old.dtype).eps * old.abs().amax()


def _compare(what: str, old: Tensor, new: Tensor, allowed: Callable[[Tensor], Tensor | float]) -> float:
    if not isinstance(new, Tensor) or old.shape != new.shape or old.dtype != new.dtype:
        shown = f"{tuple(new.shape)} {new.dtype}" if isinstance(new, Tensor) else repr(new)
        raise PassError(f"{what} is {shown} instead of {tuple(old.shape)} {old.dtype}")
    if old.device != new.device:
        raise PassError(f"{what} is on {new.device} instead of {old.device}")
    if old.is_meta:  # no values: shape and dtype are all that there is
        return 0.0
    old, new = old.to_dense(), new.to_dense()
    same = (old == new) | (old.isnan() & new.isnan()) if old.is_floating_point() or old.is_complex() else old == new
    if bool(same.all()):
        return 0.0
    if not old.is_floating_point() and not old.is_complex():
        raise PassError(f"{what} differs in {int((~same).sum())} of {old.numel()} entries")
    difference = torch.where(same, 0.0, (old - new).abs())
    worst = float(difference.max())
    if not bool((difference <= allowed(old)).all()):  # NaN and infinity fail as well
        raise PassError(f"{what} differs by up to {worst:.3g} (largest value {float(old.abs().max()):.3g})")
    return worst
