"""Whether a model behaves like a reference on given inputs.

What is compared, from the same random state: outputs, inputs after the run (a model may write into them), buffers, and
in train mode on which parameters the outputs depend. Of models of little work both modes are compared, and the
gradients; of others train mode alone, where dropout is active and norms are updated. Where the structure proves that
one mode shows nothing that the other does not (see `fxsparse.graph.alike`), one is compared: that of the recorded run,
or, for the gradients of a model of little work, train mode.
"""

from __future__ import annotations

import contextlib
import io
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxsparse.graph.alike import alike
from fxsparse.graph.captured import graphs_of
from fxsparse.graph.clone import isolated_clone
from fxsparse.graph.inputs import fresh_inputs, opened, tensors_of
from fxsparse.graph.recorder import Recording, recorded_run
from fxsparse.graph.scopes import SEED, seeded
from fxsparse.graph.tree import parameters_of
from fxsparse.graph.writes import NoticingWrites, ParameterWrites

_TOLERATED_EPS = 64  # reductions may be ordered differently where kernels are not deterministic
_LITTLE_WORK = 2**24  # multiply-accumulates and parameters up to which a backward pass costs next to nothing


@dataclass(frozen=True)
class Run:
    """One run: its outputs, gradients and the buffers afterwards, by name.

    Attributes:
        error: what the model raised; "" when it did not.
        raised_in: the paths of the graphs that were running then, the innermost first.
    """

    structure: str
    values: dict[str, torch.Tensor]
    error: str = ""
    raised_in: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """The first difference that was found.

    Attributes:
        what: it, in words.
        training: the mode in which it shows.
        rounding: whether both show the same up to the order of sums.
        suspects: where the compared model raises, the paths of the graphs that were running, the innermost first.
    """

    what: str
    training: bool
    rounding: bool = False
    suspects: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.what} in {'train' if self.training else 'eval'} mode"


@dataclass
class Reference:
    """The behaviour of a model on example inputs, to compare others with.

    Its runs: the first, which was the recorder's, in the model's own mode; the second in the other one, when it is
    first needed. Runs in train mode are with gradients, in eval mode without, unless the model fails so.

    Attributes:
        model: the model; it is never touched.
        args, kwargs: the example inputs.
        training: the mode of the first run.
        thorough: whether both runs are compared and the gradients too; else only one.
        calls: how often each module was called in the first run; None when that is not known.
        repeats: False once a repetition from the same random state has shown something else.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: bool
    thorough: bool = True
    calls: Mapping[str, int] | None = field(default=None, repr=False)
    repeats: bool = True
    _clone: nn.Module | None = field(default=None, repr=False)
    _runs: dict[int, Run] = field(default_factory=dict, repr=False)
    _repeated: dict[int, Run] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._with_gradients = {0: self.training, 1: not self.training}
        self._buffers = tuple(name for name, _ in self.model.named_buffers())

    def difference(self, model: nn.Module, *, exact: bool = False) -> Difference | None:
        """The first difference between `model` and the reference, or None; the reference is repeated in doubt.

        A run in which the reference itself raises is not compared (see `notes`).

        Args:
            model: the model to compare; it stays as it is.
            exact: whether outputs and buffers must be bit-identical; else sums may be ordered differently.
        """
        clone = isolated_clone(model, to_run=True)
        numbers = self._numbers(model)
        for number in numbers:
            expected = self._run(number)
            if expected.error:
                continue
            found = self._perform(clone, number)
            if _difference(expected, found, exact) is not None:
                difference = self._settled(model, number, exact, numbers)
                if difference is not None:
                    return difference
        return None

    def _numbers(self, model: nn.Module) -> tuple[int, ...]:
        """Which runs are compared with those of `model`, in order."""
        one_will_do = not self._training(0) and self.calls is not None and alike(self.model, model, self.calls)
        if self.thorough and not one_will_do:
            return 0, 1
        if not self.thorough and one_will_do:
            return (0,)
        other = 1 if self._training(1) else 0
        return (0,) if self._run(other).error else (other,)

    @property
    def notes(self) -> tuple[str, ...]:
        """Why there is something that cannot be compared, in words; empty when everything can."""
        if not self.repeats:
            return ("the model does not repeat itself from the same seed, so nothing can be compared",)
        failed = [(number, run.error) for number, run in self._runs.items() if run.error]
        return tuple(f"{self._mode(number)} mode: the model itself raises {error}" for number, error in failed)

    def _training(self, number: int) -> bool:
        return self.training is (number == 0)

    def _mode(self, number: int) -> str:
        return "train" if self._training(number) else "eval"

    def _run(self, number: int) -> Run:
        if number not in self._runs:
            kept = self._clone if 0 in self._runs else None
            clone = isolated_clone(self.model, to_run=True) if kept is None else kept
            found = self._perform(clone, number)
            if found.error:
                self._with_gradients[number] ^= True
                found = self._perform(isolated_clone(self.model, to_run=True), number)
            self._runs[number] = found
        return self._runs[number]

    def _perform(self, clone: nn.Module, number: int, gradients: bool | None = None) -> Run:
        if clone.training is not self._training(number):
            clone.train(self._training(number))
        gradients = self._with_gradients[number] if gradients is None else gradients
        inputs = fresh_inputs(self.args, self.kwargs)
        writes = ParameterWrites(clone)
        try:
            with seeded(SEED), torch.set_grad_enabled(gradients), _quiet(), NoticingWrites(writes):
                output = opened(clone(*inputs[0], **inputs[1]))
            with seeded(SEED):
                return _shown(clone, inputs, output, self._buffers, self.thorough if gradients else None)
        except Exception as error:  # the model's own failure is part of its behaviour
            return _failed(error, _running(clone, error))
        finally:
            writes.undo()

    def _settled(self, model: nn.Module, number: int, exact: bool, numbers: tuple[int, ...]) -> Difference | None:
        """The difference that remains when both run anew, with gradients.

        The recorder's hooks may have changed the path that the reference took, and without gradients torch chooses
        kernels by whether a weight is a parameter or computed from one.
        """
        if number not in self._repeated:
            self._repeated[number] = self._again(self.model, number, numbers)
        fresh, found = self._repeated[number], self._again(model, number, numbers)
        what = _difference(fresh, found, exact)
        if what is None:
            return None
        if _difference(fresh, self._again(self.model, number, numbers), exact) is not None:
            self.repeats = False
        rounding = _difference(fresh, found, False) is None
        return Difference(what, self._training(number), rounding, found.raised_in)

    def _again(self, model: nn.Module, number: int, numbers: tuple[int, ...]) -> Run:
        clone = isolated_clone(model, to_run=True)
        return [self._perform(clone, each, gradients=True) for each in numbers if each <= number][-1]


def observe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Recording, Reference]:
    """Record one run of `model`, which is the first of its reference as well.

    Raises:
        CaptureError: as `record`.
    """
    run = recorded_run(model, args, kwargs)
    work = sum(use.macs or 0 for use in run.recording.uses) + sum(p.macs for p in run.recording.activation_products)
    work += sum(parameter.numel() for parameter in model.parameters())
    reference = Reference(model, args, kwargs, run.training, work <= _LITTLE_WORK, run.recording.calls)
    reference._with_gradients[0] = run.gradients
    if run.failure is not None:
        reference._runs[1] = _failed(run.failure)
    if not run.recording.written:  # else its gradients would be those of the values that were put back
        reference._clone = run.clone
        compared = reference.thorough if run.gradients else None
        with contextlib.suppress(Exception), seeded(SEED):  # a backward pass that fails is run anew, and then told
            reference._runs[0] = _shown(run.clone, run.inputs, run.output, reference._buffers, compared)
    return run.recording, reference


@contextlib.contextmanager
def _quiet() -> Any:
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _running(model: nn.Module, error: BaseException) -> tuple[str, ...]:
    """Paths of the graphs of `model` that were running when `error` was raised, the innermost first."""
    paths = {id(module): path for path, module in graphs_of(model).items()}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "forward"]
    found = (paths.get(id(frame.f_locals.get("self"))) for frame in reversed(frames))
    return tuple(dict.fromkeys(path for path in found if path is not None))


def _failed(error: Exception, raised_in: tuple[str, ...] = ()) -> Run:
    return Run("", {}, f"{type(error).__name__} ({_first_line(error)})", raised_in)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:160]


def _shown(clone: nn.Module, inputs: Any, output: Any, buffers: Iterable[str], exact_gradients: bool | None) -> Run:
    leaves, spec = pytree.tree_flatten(output)
    shown = [type(leaf).__name__ if not isinstance(leaf, int | float | str | bool) else repr(leaf) for leaf in leaves]
    values: dict[str, torch.Tensor] = {}
    if exact_gradients:
        values = _gradients(clone, inputs, output)
    elif exact_gradients is not None:
        shown += _reached(clone, output)
    values |= {f"output {i}": _held(leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    values |= {f"input {i}": tensor.detach() for i, tensor in enumerate(tensors_of(inputs))}
    values |= {f"buffer `{name}`": _held(clone.get_buffer(name)) for name in buffers}
    return Run(f"{spec} {shown}", values)


def _held(tensor: torch.Tensor) -> torch.Tensor:
    """The value as it is now: outputs may be views of parameters, and buffers go on changing."""
    return tensor.detach().clone()


def _reached(model: nn.Module, output: Any) -> list[str]:
    """Names of the parameters on which the outputs depend, as autograd sees it."""
    names = {id(parameter): name for name, parameter in parameters_of(model)}
    ahead = [tensor.grad_fn for tensor in tensors_of(output) if tensor.grad_fn is not None]
    found = {names[id(tensor)] for tensor in tensors_of(output) if id(tensor) in names}
    seen = set(ahead)
    while ahead:
        node = ahead.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in names:
            found.add(names[id(variable)])
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                ahead.append(after)
    return sorted(found)


def _gradients(model: nn.Module, inputs: Any, output: Any) -> dict[str, torch.Tensor]:
    """Gradients of a fixed random combination of all floating-point outputs, of every parameter and input."""
    outputs = [t for t in tensors_of(output) if (t.is_floating_point() or t.is_complex()) and t.requires_grad]
    wanted: dict[str, torch.Tensor] = {}
    wanted |= {f"gradient of `{name}`": p for name, p in parameters_of(model) if p.requires_grad}
    wanted |= {f"gradient of input {i}": t for i, t in enumerate(tensors_of(inputs)) if t.requires_grad}
    if not outputs or not wanted:
        return {}
    generator = torch.Generator().manual_seed(SEED)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outputs]
    grads = torch.autograd.grad(outputs, list(wanted.values()), cotangents, allow_unused=True)
    return {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}


def _difference(expected: Run, found: Run, exact: bool) -> str | None:
    if found.error or expected.error:
        return None if found.error == expected.error else f"it raises {found.error or 'nothing'}"
    if expected.structure != found.structure:
        return "the structure of the output differs"
    unlike = expected.values.keys() ^ found.values.keys()
    if unlike:
        return f"{min(unlike)} exists only once"
    for name, value in expected.values.items():
        if not _equal(value, found.values[name], exact and not name.startswith("gradient")):
            return f"{name} differs"
    return None


def _equal(a: torch.Tensor, b: torch.Tensor, exact: bool) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout or a.device != b.device:
        return False
    if a.is_meta or a.numel() == 0:
        return True
    a, b = a.to_dense(), b.to_dense()  # gradients of nn.Embedding(sparse=True)
    if torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    if exact:
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    scale = float(torch.nan_to_num(a).abs().max())
    return torch.allclose(a, b, rtol=0.0, atol=_TOLERATED_EPS * torch.finfo(a.dtype).eps * scale, equal_nan=True)
