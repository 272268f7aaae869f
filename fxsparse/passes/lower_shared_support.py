"""Layers whose groups of rows share a support become gathers and small dense products, fast in stock runtimes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsparse.errors import CaptureError, ConfigError, PassError
from fxsparse.graph import isolated_clone, split_inputs
from fxsparse.nn import SparseModule, masked_weights
from fxsparse.passes.compact_verify import difference, outputs, owned_copy
from fxsparse.passes.fold_masks import FoldMasks
from fxsparse.passes.lower_export import Free, exported
from fxsparse.passes.lower_forms import Form as Form
from fxsparse.passes.lower_forms import Layer as Layer
from fxsparse.passes.lower_forms import LayerRecord as LayerRecord
from fxsparse.passes.lower_forms import LoweringResult as LoweringResult
from fxsparse.passes.lower_forms import Policy as Policy
from fxsparse.passes.lower_modules import replaced, weights_of_modules
from fxsparse.passes.lower_plan import KnownMask, Weight, choices, known_masks, record, unread, weights_of
from fxsparse.passes.lower_rewrite import Rewriter
from fxsparse.passes.lower_sites import Constants

TOLERANCE = 1e-12
"""How much an output in float64 may differ, relative to the largest value of that output."""
_NATIVE = 2.0**12  # units in the last place, where a model cannot run in float64


def legal_forms(model: nn.Module, example_inputs: Any) -> Mapping[str, tuple[Form, ...]]:
    """Name of each weight that a linear layer or convolution reads -> the forms that it can take, DENSE first.

    Args:
        model: A model with masks, or one whose dead weights are zeros; it stays as it was.
        example_inputs: A tuple of positional inputs, or ``(args, kwargs)``.

    Raises:
        ConfigError: arguments of the wrong form.
        CaptureError: the model cannot be run.
    """
    subject = _Subject.of(model, example_inputs, None)
    return {weight.layer.name: weight.layer.forms for weight in subject.weights}


def lower_shared_support(
    model: nn.Module,
    example_inputs: Any,
    *,
    choose: Mapping[str, Form] | Policy | None = None,
    free: Free | None = None,
) -> LoweringResult:
    """Lower the layers of a sparse model whose groups of rows are alive on the same positions.

    Which rows belong together is read off the masks, or off the zeros of the weights. The result computes what the
    model computes in eval mode: shown on the example inputs, in float64, to 1e-12 of the output's scale. It is a graph
    (torch.export) in which the axes lie where the lowered layers want them, so that chains need no transposes; a model
    that cannot be exported has its layers replaced one by one.

    Args:
        model: A model with masks, or one whose dead weights are zeros (`finalize`); it stays as it was.
        example_inputs: A tuple of positional inputs, or ``(args, kwargs)``.
        choose: Name of a weight -> its form (others by the default rule), a policy for all, or None for the default
            rule, which goes by measured rates of one thread.
        free: For each tensor among the inputs, in flattened order, the axes that stay free, each with a name. None for
            the first axis, where all inputs agree in it; it is fixed where the model allows no other size.

    Returns:
        The lowered model and a record for each weight.

    Raises:
        ConfigError: arguments of the wrong form, an unknown name or an illegal form in `choose`.
        CaptureError: the model cannot be run.
        PassError: a mask is in a state that cannot be folded, or the model does not repeat itself.

    >>> import torch
    >>> from torch import nn
    >>> import fxsparse
    >>> model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).double()
    >>> x = torch.randn(4, 256, dtype=torch.float64)
    >>> sparse = fxsparse.transform(model, (x,), sparsity=0.9, pattern=fxsparse.SharedSupport(64))
    >>> lowered = lower_shared_support(sparse, (x,), choose=lambda layer: layer.forms[-1])
    >>> print(lowered.records[0].what)
    gather + batched product, 4 groups of 64 rows on 26 positions
    >>> torch.testing.assert_close(lowered.model(x), sparse(x), rtol=1e-12, atol=1e-12)
    """
    subject = _Subject.of(model, example_inputs, free)
    forms = choices(subject.weights, choose)
    return _Search(subject, forms, choose).run()


@dataclass(frozen=True, eq=False)
class _Subject:
    """A model on its way: folded, exported, its weights known."""

    folded: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    free: Free | None
    masks: Mapping[str, KnownMask]
    module: fx.GraphModule | None
    constants: Constants | None
    weights: Sequence[Weight]
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(model: nn.Module, example_inputs: Any, free: Free | None) -> _Subject:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"`model` (={type(model).__name__}) must be a torch.nn.Module")
        args, kwargs = split_inputs(example_inputs)
        folded, masks = folded_copy(model), known_masks(model)
        return _Subject._exported(folded, args, kwargs, free, masks)

    @staticmethod
    def _exported(
        folded: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        free: Free | None,
        masks: Mapping[str, KnownMask],
    ) -> _Subject:
        try:
            module = exported(folded, args, kwargs, free)
        except CaptureError as error:
            weights = weights_of_modules(folded, args, kwargs, masks)
            return _Subject(folded, args, kwargs, free, masks, None, None, weights, (f"layer by layer: {error}",))
        constants = Constants(module)
        return _Subject(folded, args, kwargs, free, masks, module, constants, weights_of(module, masks, constants))

    def lower(self, forms: Mapping[str, Form]) -> nn.Module:
        """Lower the named weights, once.

        Raises:
            PassError: a layer whose input cannot be brought into the order that it needs.
        """
        if self.module is None or self.constants is None:
            return replaced(self.folded, list(forms), self.masks)
        chosen = [weight for weight in self.weights if weight.layer.name in forms]
        lowered = [each for weight in chosen for each in weight.lowered(forms[weight.layer.name])]
        rewriter = Rewriter(self.module, lowered, self.constants)
        module = rewriter.run().eval()
        if rewriter.refused:
            raise PassError(f"the input of {rewriter.refused[0]} cannot be brought into the order that it needs")
        return module

    def again(self) -> _Subject:
        """The same, not yet rewritten."""
        return _Subject._exported(self.folded, self.args, self.kwargs, self.free, self.masks)


def folded_copy(model: nn.Module) -> nn.Module:
    """A copy without masks, in eval mode, that shares no tensor with the model."""
    clone = isolated_clone(model, copied=[name for name, _ in model.named_parameters(remove_duplicate=False)])
    if isinstance(clone, SparseModule):  # the root itself cannot be replaced by a pass
        return clone.to_dense().eval()
    return (FoldMasks()(clone).module if masked_weights(clone) else clone).eval()


class _Search:
    """Lowers what was chosen; what fails or makes the outputs differ is searched out by halves and stays dense."""

    def __init__(
        self, subject: _Subject, forms: Mapping[str, Form], choose: Mapping[str, Form] | Policy | None
    ) -> None:
        self.subject: _Subject | None = subject
        self.first = subject
        self.forms = forms
        self.choose = choose
        self.refused: dict[str, str] = {}
        self.notes: list[str] = [*subject.notes]
        self.best: tuple[nn.Module, _Subject, float] | None = None

    def run(self) -> LoweringResult:
        """The result with all that could be lowered."""
        wanted = [name for name, form in self.forms.items() if form is not Form.DENSE]
        accepted: list[str] = []
        if wanted:
            self.dtype, self.expected = self._expected()
            self._grow(wanted, accepted)
        if self.best is None:
            return LoweringResult(self.first.folded, self._records(self.first, ()), tuple(self.notes))
        module, subject, worst = self.best
        kind = "float64" if self.dtype is not None else "the model's own precision"
        self.notes.insert(0, f"equal in {kind}, worst difference {worst:.2g} of the output's scale")
        return LoweringResult(module, self._records(subject, accepted), tuple(self.notes), worst)

    def _grow(self, candidates: list[str], accepted: list[str]) -> None:
        """Add those of the candidates that can be lowered with those accepted."""
        error = self._attempt([*accepted, *candidates])
        if error is None:
            accepted.extend(candidates)
        elif len(candidates) == 1:
            self.refused[candidates[0]] = error
        else:
            middle = len(candidates) // 2
            self._grow(candidates[:middle], accepted)
            self._grow(candidates[middle:], accepted)

    def _attempt(self, names: Sequence[str]) -> str | None:
        """Lower the named weights and keep the result; say why where that does not work."""
        subject, self.subject = self.subject or self.first.again(), None
        try:
            module = subject.lower({name: self.forms[name] for name in names})
            worst = difference(self.expected, self._outputs(module))
        except Exception as error:  # whatever fails in a rewritten graph is a reason to leave a layer dense
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
        if worst > self._allowed():
            return f"the outputs differ by {worst:.3g} of their scale"
        self.best = module, subject, worst
        return None

    def _expected(self) -> tuple[torch.dtype | None, list[Tensor]]:
        """What the model computes, in float64 where it and its exported form can."""
        found: list[Tensor] = []
        for dtype in (torch.float64, None):
            try:
                found = self._outputs(self.first.folded, dtype)
                worst = difference(found, self._outputs(self.first.module or self.first.folded, dtype))
            except Exception as error:  # a model may fix its dtype, and export may have fixed it
                if dtype is None:
                    raise CaptureError(f"the exported model does not run: {type(error).__name__}: {error}") from error
                self.notes.append("the model, or its exported form, cannot run in float64")
                continue
            self.dtype = dtype
            if worst <= self._allowed():
                return dtype, found
            if dtype is None:
                raise PassError(f"the exported model differs from the model by {worst:.3g} of the output's scale")
        raise AssertionError("unreachable")

    def _outputs(self, module: nn.Module, dtype: torch.dtype | None | str = "") -> list[Tensor]:
        wanted = self.dtype if isinstance(dtype, str) else dtype
        wide = owned_copy(module, wanted)
        return outputs(wide, self.first.args, self.first.kwargs, False, wanted)

    def _allowed(self) -> float:
        if self.dtype is not None:
            return TOLERANCE
        parameters = [p.dtype for p in self.first.folded.parameters() if p.is_floating_point()]
        return _NATIVE * max((torch.finfo(dtype).eps for dtype in parameters), default=torch.finfo(torch.float32).eps)

    def _records(self, subject: _Subject, accepted: Sequence[str]) -> tuple[LayerRecord, ...]:
        found = []
        for weight in subject.weights:
            name = weight.layer.name
            chosen = callable(self.choose) or (isinstance(self.choose, Mapping) and name in self.choose)
            line = record(weight, self.forms[name] if name in accepted else Form.DENSE, chosen)
            if name in self.refused:
                line = dataclasses.replace(line, reason=f"left as it is: {self.refused[name]}")
            found.append(line)
        return (*found, *unread(subject.masks, subject.weights))
