"""A model on its way to be lowered: folded, exported, its weights known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from fxsparse.errors import CaptureError, ConfigError, PassError
from fxsparse.graph import isolated_clone, split_inputs
from fxsparse.nn import SparseModule, masked_weights
from fxsparse.passes.fold_masks import FoldMasks
from fxsparse.passes.lower_export import Free, exported
from fxsparse.passes.lower_forms import Form
from fxsparse.passes.lower_modules import replaced, weights_of_modules
from fxsparse.passes.lower_plan import KnownMask, Weight, known_masks, weights_of
from fxsparse.passes.lower_rewrite import Rewriter
from fxsparse.passes.lower_sites import Constants


@dataclass(frozen=True, eq=False)
class Subject:
    """The model in its forms.

    Attributes:
        folded: A copy without masks, in eval form.
        args: Positional inputs.
        kwargs: Keyword inputs.
        free: The axes of the inputs that stay free.
        masks: The masks that the model had.
        module: The exported module, which shares its tensors with `folded`; None where it cannot be exported.
        constants: The values of that module that depend on parameters only.
        weights: What products read.
        notes: What was found on the way.
        inside: Whether a bias may become a column of its weight.
    """

    folded: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    free: Free | None
    masks: Mapping[str, KnownMask]
    module: fx.GraphModule | None
    constants: Constants | None
    weights: Sequence[Weight]
    notes: tuple[str, ...] = ()
    inside: bool = True

    @staticmethod
    def of(model: nn.Module, example_inputs: Any, free: Free | None) -> Subject:
        """Prepare a model, which stays as it is.

        Raises:
            ConfigError: arguments of the wrong form.
            CaptureError: the model cannot be run.
        """
        if not isinstance(model, nn.Module):
            raise ConfigError(f"`model` (={type(model).__name__}) must be a torch.nn.Module")
        args, kwargs = split_inputs(example_inputs)
        folded, masks = folded_copy(model), known_masks(model)
        return Subject._exported(folded, args, kwargs, free, masks)

    @staticmethod
    def _exported(
        folded: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        free: Free | None,
        masks: Mapping[str, KnownMask],
    ) -> Subject:
        try:
            module = exported(folded, args, kwargs, free)
        except CaptureError as error:
            weights = weights_of_modules(folded, args, kwargs, masks)
            return Subject(folded, args, kwargs, free, masks, None, None, weights, (f"layer by layer: {error}",))
        constants = Constants(module)
        return Subject(folded, args, kwargs, free, masks, module, constants, weights_of(module, masks, constants))

    def lower(self, forms: Mapping[str, Form]) -> nn.Module:
        """Lower the named weights, once.

        Raises:
            PassError: a layer whose input cannot be brought into the order that it needs.
        """
        if self.module is None or self.constants is None:
            return replaced(self.folded, list(forms), self.masks)
        chosen = [weight for weight in self.weights if weight.layer.name in forms]
        lowered = [each for weight in chosen for each in weight.lowered(forms[weight.layer.name])]
        rewriter = Rewriter(self.module, lowered, self.constants, self.inside)
        module = rewriter.run().eval()
        if rewriter.refused:
            raise PassError(f"the input of {rewriter.refused[0]} cannot be brought into the order that it needs")
        return module

    def again(self) -> Subject:
        """The same, not yet rewritten."""
        found = Subject._exported(self.folded, self.args, self.kwargs, self.free, self.masks)
        return replace(found, inside=self.inside)


def folded_copy(model: nn.Module) -> nn.Module:
    """A copy without masks, in eval mode, that shares no tensor with the model."""
    clone = isolated_clone(model, copied=[name for name, _ in model.named_parameters(remove_duplicate=False)])
    if isinstance(clone, SparseModule):  # the root itself cannot be replaced by a pass
        return clone.to_dense().eval()
    return (FoldMasks()(clone).module if masked_weights(clone) else clone).eval()
