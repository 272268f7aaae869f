"""Hypothesis strategies of models with example inputs, and models by seed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from fxsparse.errors import ConfigError
from fxsparse.testing.choices import Choices, DrawnChoices, SeededChoices
from fxsparse.testing.compose import compose
from fxsparse.testing.ingredients import PLAIN, Ingredient
from fxsparse.testing.program import Program
from fxsparse.testing.scope import Sizes

SIZES = Sizes()


@st.composite
def programs(
    draw: st.DrawFn,
    *,
    ingredients: Collection[Ingredient] = PLAIN,
    convolutional: bool | None = None,
    traceable: bool | None = None,
    required: Ingredient | None = None,
    sizes: Sizes = SIZES,
    dtype: torch.dtype = torch.float64,
) -> Program:
    """Draw the source of a small model, which makes models and inputs of any batch size; see `models`.

    Args:
        draw: Given by hypothesis.
        ingredients: What it may be made of.
        convolutional: Only images as input (True), only vectors (False), or those and sequences.
        traceable: Without `Ingredient.PYTHON` (True), with some of it (False), or either.
        required: One ingredient that must be there, where its steps can take the input.
        sizes: How large it may be.
        dtype: Floating dtype of weights and inputs.

    Raises:
        ConfigError: `required`, or what `traceable=False` needs, is not among `ingredients`.
    """
    return _program(DrawnChoices(draw), ingredients, convolutional, traceable, required, sizes, dtype)


def models(
    *,
    ingredients: Collection[Ingredient] = PLAIN,
    convolutional: bool | None = None,
    traceable: bool | None = None,
    required: Ingredient | None = None,
    sizes: Sizes = SIZES,
    dtype: torch.dtype = torch.float64,
) -> st.SearchStrategy[tuple[nn.Module, Any]]:
    """Draw a small model in train mode and example inputs for it, by default one tensor of batch 3 to 5.

    Models are random graphs of whatever `ingredients` allow; every one has a last linear layer. Failing examples shrink
    towards that layer alone, and print as a script that makes them again. Global random state is not touched.

    Args:
        ingredients: What they may be made of; `EVERYTHING` adds structured inputs and outputs and parametrizations,
            `TRACEABLE` leaves Python control flow out.
        convolutional: Only images as input (True), only vectors (False), or those and sequences.
        traceable: Without `Ingredient.PYTHON` (True), with some of it (False), or either.
        required: One ingredient that must be there, where its steps can take the input.
        sizes: How large they may be.
        dtype: Floating dtype of weights and inputs.

    Raises:
        ConfigError: when an example is drawn: `required`, or what `traceable=False` needs, is not among `ingredients`.

    A pass of your own, tested on generated models; calling it checks its contract:

    >>> from hypothesis import given, settings
    >>> from fxsparse.graph import capture, edit
    >>> from fxsparse.passes import Pass, graphs_of
    >>> from fxsparse.testing import TRACEABLE, models
    >>> class DropIdentities(Pass):
    ...     idempotent = True
    ...
    ...     def call(self, module):
    ...         modified = False
    ...         for graph_module in graphs_of(module).values():
    ...             for node in graph_module.graph.find_nodes(op="call_module"):
    ...                 if type(graph_module.get_submodule(node.target)) is torch.nn.Identity:
    ...                     edit.replace_uses(node, node.args[0])
    ...                     self.record(node.name, "removed")
    ...                     modified = True
    ...         return modified
    >>> @settings(max_examples=5, deadline=None, database=None)
    ... @given(models(ingredients=TRACEABLE))
    ... def test_drop_identities(drawn):
    ...     model, inputs = drawn
    ...     DropIdentities()(capture(model, inputs).module, inputs)
    >>> test_drop_identities()
    """
    drawn = programs(
        ingredients=ingredients,
        convolutional=convolutional,
        traceable=traceable,
        required=required,
        sizes=sizes,
        dtype=dtype,
    )
    return drawn.map(lambda program: (program.model(), program.inputs()))


def random_program(
    seed: int,
    *,
    ingredients: Collection[Ingredient] = PLAIN,
    convolutional: bool | None = None,
    traceable: bool | None = None,
    required: Ingredient | None = None,
    sizes: Sizes = SIZES,
    dtype: torch.dtype = torch.float64,
) -> Program:
    """The program of a seed, for long runs without hypothesis; the arguments are those of `programs`.

    >>> program = random_program(0)
    >>> model, inputs = program.model(), program.inputs()
    >>> bool(model(*inputs).isfinite().all())
    True
    """
    return _program(SeededChoices(seed), ingredients, convolutional, traceable, required, sizes, dtype)


def _program(
    choices: Choices,
    ingredients: Collection[Ingredient],
    convolutional: bool | None,
    traceable: bool | None,
    required: Ingredient | None,
    sizes: Sizes,
    dtype: torch.dtype,
) -> Program:
    allowed = frozenset(ingredients)
    if traceable is not None:
        allowed = allowed - {Ingredient.PYTHON} if traceable else allowed
        required = required if traceable else Ingredient.PYTHON
    if required is not None and required not in allowed:
        raise ConfigError(f"`required` (={required}) must be among `ingredients`")
    axes = {True: 3, False: 1, None: None}[convolutional]
    source, used = compose(choices, allowed, sizes, axes, required)
    batch = choices.pick((3, 4, 5))
    return Program(source, choices.integer(0, 2**16), batch, dtype, used)
