"""A model before its export: a private copy with masks, a folded one, its inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from fxsparse.errors import ConfigError, ExportError, FxSparseError
from fxsparse.exporters import switches
from fxsparse.exporters.axes import Axes, with_axes
from fxsparse.exporters.inputs import Inputs, read_inputs
from fxsparse.exporters.outputs import Outputs, flatten_outputs, output_names, output_notes
from fxsparse.exporters.targets import Dynamic
from fxsparse.graph import isolated_clone
from fxsparse.graph.taps import without_taps
from fxsparse.nn import MaskedWeight, check_mask_edit, masked_weights
from fxsparse.planning import finalize


@dataclass(frozen=True, eq=False)
class Subject:
    """A model on its way into a file.

    Attributes:
        masked: a private copy with its masks, in eval mode on the CPU: what the file must compute.
        folded: the same without masks, or a smaller model that computes the same: what is exported.
        weights: the masked weights of `folded` (before it was folded), by name.
        inputs: the example.
        outputs: names of the outputs, each with its number of axes.
        switches: what was set on both copies.
        notes: what the file leaves out, in words.
    """

    masked: nn.Module
    folded: nn.Module
    weights: Mapping[str, MaskedWeight]
    inputs: Inputs
    outputs: Mapping[str, int]
    switches: tuple[str, ...]
    notes: tuple[str, ...]

    def plain(self) -> tuple[nn.Module, tuple[str, ...], bool]:
        """A copy with the plain form of every fused operation, what was set, and whether attention is written out."""
        copy = isolated_clone(self.folded).eval()
        done = switches.plain_forms(copy)
        fused = _uses_fused_attention(copy, self.inputs)
        return copy, done + ((switches.EXPLICIT_ATTENTION,) if fused else ()), fused


def fold(masked: nn.Module) -> nn.Module:
    """A copy in eval mode without masks; it shares the parameters, dead entries are zeros.

    Raises:
        ExportError: when the masks cannot be folded.
    """
    try:
        copy = isolated_clone(masked)
        return (finalize(copy, inplace=True) if masked_weights(masked) else copy).eval()
    except FxSparseError as error:
        raise ExportError(f"the masks cannot be folded: {error}") from error


def prepare(model: nn.Module, example_inputs: Any, dynamic: Axes = Dynamic.BATCH) -> Subject:
    """Copy `model`, fold its masks, run it once; `dynamic` says which axes of its inputs are free.

    Raises:
        ExportError: what keeps the model from being exported whatever the exporter.
        ConfigError: arguments of the wrong form.
    """
    _check_exportable(model)
    model = without_taps(model)
    masked = isolated_clone(model, copied=[name for name, _ in model.named_parameters()]).cpu().eval()
    inputs = read_inputs(masked, example_inputs)
    for tensor in (*masked.parameters(), *inputs.tensors):
        if tensor.dtype is torch.bfloat16:
            raise ExportError("the model or its inputs are bfloat16, which onnxruntime lacks: cast both to float32")
    outputs = _run(masked, inputs)
    uncached = switches.without_cache(masked) if outputs.opaque else ()
    if uncached:
        outputs = _run(masked, inputs)
    weights = masked_weights(masked)
    folded = fold(masked)
    inputs = with_axes(masked, inputs, dynamic)
    names = output_names(outputs, [*inputs.names, *folded.state_dict(keep_vars=True)])
    return Subject(
        masked=masked,
        folded=folded,
        weights=weights,
        inputs=inputs,
        outputs=dict(zip(names, (tensor.ndim for tensor in outputs.tensors.values()), strict=True)),
        switches=uncached,
        notes=tuple(output_notes(outputs)),
    )


def _check_exportable(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` (={type(model).__name__}) must be a torch.nn.Module")
    for path, module in model.named_modules():
        try:
            check_mask_edit(module)
        except ConfigError as error:
            raise ExportError(f"`{path or 'the model'}` cannot be exported: {error}") from error
    for name, parameter in model.named_parameters():
        if not bool(parameter.detach().isfinite().all()):
            raise ExportError(f"parameter `{name}` holds NaN or infinity: export an earlier state of the training")


def _run(model: nn.Module, inputs: Inputs) -> Outputs:
    args, kwargs = inputs.build([tensor.clone() for tensor in inputs.tensors])
    with torch.no_grad():
        return flatten_outputs(model(*args, **kwargs))


class _Watch(TorchFunctionMode):
    """Notices calls of scaled dot-product attention."""

    seen: bool = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one torch function."""
        self.seen = self.seen or func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def _uses_fused_attention(model: nn.Module, inputs: Inputs) -> bool:
    watch = _Watch()
    with watch:
        _run(model, inputs)
    return watch.seen
