"""Parameters, bytes and multiply-accumulates of a model, dense and effective, from one recorded run.

Multiply-accumulates (MACs) count the products of weights; FLOPs are 2 MACs. Biases, norms, activations and pooling
count 0. Effective MACs of a masked weight are its alive elements times its output positions: what the mathematics
needs, not what a dense kernel saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fxsparse.errors import CaptureError, ConfigError
from fxsparse.graph.clone import isolated_clone
from fxsparse.graph.inputs import split_inputs
from fxsparse.graph.recorder import Recording, Use, record
from fxsparse.graph.taps import without_taps

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Row:
    """One use of one weight: the parameter's name, the operation, MACs, elements and alive elements."""

    name: str
    kind: str
    macs_dense: int
    macs_effective: int
    params: int
    alive: int

    @property
    def density(self) -> float:
        """Alive fraction of the weight."""
        return self.alive / self.params if self.params else 1.0


@dataclass(frozen=True)
class Bytes:
    """Storage of all parameters: dense; bit-packed masks with the alive values; compressed sparse rows."""

    dense: int
    packed: int
    csr: int


@dataclass(frozen=True)
class Accounting:
    """What a model costs at the given input.

    Attributes:
        rows: one per use of a weight in a product, in order of execution.
        macs_dense: their sum.
        macs_effective: their sum with masks.
        bias_flops: one addition per output element of every convolution and linear layer with a bias; in no other sum.
        macs_activations: products of two activations (attention scores), which no mask makes cheaper; in no other sum.
        parameters: elements of all parameters, tied ones once.
        trainable: of those that require gradients.
        prunable: of the weights in `rows`, each once.
        alive: of the parameters that no mask kills.
        biases: of the biases of convolutions and linear layers.
        norm: of the parameters of norms.
        buffers: of all buffers except masks.
        bytes: storage of the parameters.
        uncounted: uses and operations whose MACs are not known.
    """

    rows: tuple[Row, ...]
    macs_dense: int
    macs_effective: int
    bias_flops: int
    macs_activations: int
    parameters: int
    trainable: int
    prunable: int
    alive: int
    biases: int
    norm: int
    buffers: int
    bytes: Bytes
    uncounted: tuple[str, ...]

    def flops(self, *, effective: bool = False, include_bias_flops: bool = False) -> int:
        """FLOPs = 2 MACs, with the additions of biases where asked for."""
        macs = self.macs_effective if effective else self.macs_dense
        return 2 * macs + (self.bias_flops if include_bias_flops else 0)

    def __str__(self) -> str:
        lines = [f"{'weight':<40} {'kind':<20} {'params':>12} {'alive':>12} {'MACs dense':>16} {'effective':>16}"]
        lines += [
            f"{r.name:<40} {r.kind:<20} {r.params:>12,} {r.alive:>12,} {r.macs_dense:>16,} {r.macs_effective:>16,}"
            for r in self.rows
        ]
        lines.append(
            f"{'total':<40} {'':<20} {self.parameters:>12,} {self.alive:>12,} "
            f"{self.macs_dense:>16,} {self.macs_effective:>16,}"
        )
        lines += [f"not counted: {what}" for what in self.uncounted]
        lines.append("a dense kernel does not run faster for zeros")
        return "\n".join(lines)


def count(
    model: nn.Module,
    example_inputs: Any,
    masks: Mapping[str, Tensor] | None = None,
    strict: bool = False,
    samples: int = 1,
) -> Accounting:
    """Count `model` in eval mode at `example_inputs`; nothing is allocated for a model on the meta device.

    Args:
        model: any module; it stays as it is. Its Fisher taps do not count.
        example_inputs: a tuple of positional inputs, or ``(args, kwargs)``.
        masks: parameter name -> bool mask (True = alive); by default those installed in `model`.
        strict: raise where an operation cannot be counted.
        samples: samples in the example inputs; MACs are divided by it, so that they are per sample.

    Raises:
        CaptureError: when the model fails on the inputs, or with `strict`, naming what cannot be counted.
        ConfigError: when a mask fits no parameter, or `samples` does not divide the counts.
    """
    args, kwargs = split_inputs(example_inputs)
    model = without_taps(model)
    recording = record(isolated_clone(model).eval(), args, kwargs)
    masks = _installed_masks(model) if masks is None else masks
    _check_masks(model, masks)
    uncounted = _uncounted(model, recording)
    if strict and uncounted:
        raise CaptureError(f"cannot be counted: {', '.join(uncounted)}; leave `strict` off to list them instead")
    rows = tuple(_row(model, use, masks, samples) for use in recording.uses if use.macs)
    alive = {name: _alive(parameter, masks.get(name)) for name, parameter in model.named_parameters()}
    weights = {row.name for row in rows}
    bias_uses = [use for use in recording.uses if use.argument == "bias" and use.op.startswith(("conv", "linear"))]
    mask_ids = {id(mask) for mask in _installed_masks(model).values()}
    return Accounting(
        rows=rows,
        macs_dense=sum(row.macs_dense for row in rows),
        macs_effective=sum(row.macs_effective for row in rows),
        bias_flops=sum(_numel(use.output_shape) for use in bias_uses) // samples,
        macs_activations=sum(product.macs for product in recording.activation_products) // samples,
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        prunable=sum(model.get_parameter(name).numel() for name in weights),
        alive=sum(alive.values()),
        biases=sum(model.get_parameter(name).numel() for name in {use.parameter for use in bias_uses}),
        norm=sum(p.numel() for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)),
        buffers=sum(b.numel() for b in model.buffers() if id(b) not in mask_ids),
        bytes=_bytes(model, masks, alive),
        uncounted=uncounted,
    )


def _installed_masks(model: nn.Module) -> Mapping[str, Tensor]:
    from fxsparse.nn import masks  # the floor below; imported here so that counting needs no masks

    return masks(model)


def _check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            raise ConfigError(f"`masks` names `{name}`, which is no parameter of the model")
        if mask.shape != parameters[name].shape or mask.dtype != torch.bool:
            raise ConfigError(
                f"the mask of `{name}` (={tuple(mask.shape)}, {mask.dtype}) must be bool of shape "
                f"{tuple(parameters[name].shape)}"
            )


def _uncounted(model: nn.Module, recording: Recording) -> tuple[str, ...]:
    unknown = [
        f"`{use.parameter}` in {use.op} of `{use.module or 'the model'}`" for use in recording.uses if use.macs is None
    ]
    unknown += [f"scripted module `{path}`" for path in recording.opaque]
    return tuple(dict.fromkeys(unknown))


def _row(model: nn.Module, use: Use, masks: Mapping[str, Tensor], samples: int) -> Row:
    parameter = model.get_parameter(use.parameter)
    macs = use.macs or 0
    if macs % samples:
        raise ConfigError(f"`samples` (={samples}) must divide the MACs of `{use.parameter}` (={macs})")
    macs //= samples
    alive = _alive(parameter, masks.get(use.parameter))
    effective = macs * alive // max(parameter.numel(), 1)
    return Row(use.parameter, use.op, macs, effective, parameter.numel(), alive)


def _alive(parameter: Tensor, mask: Tensor | None) -> int:
    if mask is None or mask.is_meta:
        return parameter.numel()
    return int(mask.sum())


def _numel(shape: tuple[int, ...] | None) -> int:
    total = 1
    for size in shape or (0,):
        total *= size
    return total


def _bytes(model: nn.Module, masks: Mapping[str, Tensor], alive: Mapping[str, int]) -> Bytes:
    dense = packed = csr = 0
    for name, parameter in model.named_parameters():
        size, numel = parameter.element_size(), parameter.numel()
        dense += size * numel
        if name not in masks:
            packed, csr = packed + size * numel, csr + size * numel
            continue
        rows = parameter.shape[0] if parameter.ndim else 1
        packed += size * alive[name] + (numel + 7) // 8
        csr += (size + 4) * alive[name] + 4 * (rows + 1)  # values, int32 columns, int32 row starts
    return Bytes(dense, packed, csr)
