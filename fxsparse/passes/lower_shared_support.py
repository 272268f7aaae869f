"""Layers whose groups of rows share a support become gathers and small dense products, fast in stock runtimes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from fxsparse.passes.lower_export import Free
from fxsparse.passes.lower_forms import Form as Form
from fxsparse.passes.lower_forms import Layer as Layer
from fxsparse.passes.lower_forms import LayerRecord as LayerRecord
from fxsparse.passes.lower_forms import LoweringResult as LoweringResult
from fxsparse.passes.lower_forms import Policy as Policy
from fxsparse.passes.lower_plan import choices
from fxsparse.passes.lower_search import Search
from fxsparse.passes.lower_subject import Subject


def legal_forms(model: nn.Module, example_inputs: Any) -> Mapping[str, tuple[Form, ...]]:
    """Name of each weight that a linear layer or convolution reads -> the forms that it can take, DENSE first.

    Args:
        model: A model with masks, or one whose dead weights are zeros; it stays as it was.
        example_inputs: A tuple of positional inputs, or ``(args, kwargs)``.

    Raises:
        ConfigError: arguments of the wrong form.
        CaptureError: the model cannot be run.
    """
    subject = Subject.of(model, example_inputs, None)
    return {weight.layer.name: weight.layer.forms for weight in subject.weights}


def lower_shared_support(
    model: nn.Module,
    example_inputs: Any,
    *,
    choose: Mapping[str, Form] | Policy | None = None,
    free: Free | None = None,
    bias_inside: bool = True,
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
        bias_inside: Whether the bias of a convolution without offsets may become a column of its weight, which meets a
            channel of ones: faster as float where there are far more outputs than inputs, bad for 8-bit weights.

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
    subject = replace(Subject.of(model, example_inputs, free), inside=bias_inside)
    forms = choices(subject.weights, choose)
    return Search(subject, forms, choose).run()
