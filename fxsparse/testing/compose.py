"""Putting steps together: submodules, the model, its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fxsparse.testing import steps_attention as attentions
from fxsparse.testing import steps_layers as layers
from fxsparse.testing import steps_python as pythons
from fxsparse.testing import steps_shapes as shapes
from fxsparse.testing import steps_weights as weights
from fxsparse.testing.choices import Choices
from fxsparse.testing.ingredients import Ingredient
from fxsparse.testing.scope import Scope, Shape, Sizes, Source, Value


@dataclass(frozen=True)
class Step:
    """One thing that a forward pass can do next.

    Attributes:
        ingredient: What must be allowed for it; None when it always is.
        run: Writes it, and returns the value that it makes.
        fits: Whether it can take this value.
    """

    ingredient: Ingredient | None
    run: Callable[[Scope, Value], Value]
    fits: Callable[[Value], bool] = lambda value: True


def _axes(*counts: int) -> Callable[[Value], bool]:
    return lambda value: len(value.shape) in counts


def block(scope: Scope, x: Value) -> Value:
    """A submodule of a class of its own, or a container of modules."""
    form = scope.choices.pick(("class", "sequential", "list", "dict", "parameters", "twice", "two"))
    if form == "parameters":
        return _parameter_list(scope, x)
    if form in ("class", "twice", "two"):
        made, shape, inner = _submodule(scope, x.shape)
        layer = scope.layer("block", made)
        scope.weights += [(f"{layer}.{name.removeprefix('self.')}", size) for name, size in inner]
        name = scope.read(x)
        if form == "twice" and shape == x.shape and scope.allows(Ingredient.SHARING):
            return scope.assign(f"{layer}({layer}({name}))", shape)
        if form == "two":  # the same class again: other weights
            return scope.assign(f"{layer}({name}) + {scope.layer('block', made)}({name})", shape, fresh=True)
        return scope.assign(f"{layer}({name})", shape)
    return _container(scope, x, form)


def _submodule(scope: Scope, shape: Shape) -> tuple[str, Shape, list[tuple[str, Shape]]]:
    """The constructor of a new class, the shape that it makes, and its weights."""
    inner = Scope(scope.source, shape, scope.depth - 1)
    result = grow(inner, max(scope.source.sizes.steps // 2, 1))
    if not inner.weights:
        result = layers.linear(inner, result)
    name = scope.source.fresh_name("Block")
    scope.source.classes.append(inner.code(name, "x", result.name))
    return f"{name}()", result.shape, inner.weights


def _container(scope: Scope, x: Value, form: str) -> Value:
    """Linear layers or submodules in a Sequential, a ModuleList or a ModuleDict."""
    made, shape = [], x.shape
    for _ in range(scope.choices.integer(1, 3)):
        if scope.depth > 1 and scope.choices.flag(4):
            constructor, shape, _ = _submodule(scope, shape)
        else:
            width = scope.width()
            constructor, shape = f"nn.Linear({shape[-1]}, {width})", (*shape[:-1], width)
        made.append(constructor)
        if form == "sequential" and scope.choices.flag():
            made.append("nn.ReLU()")
    name = scope.read(x)
    if form == "sequential":
        sequence = scope.layer("sequence", f"nn.Sequential({', '.join(made)})")
        return scope.assign(f"{sequence}({name})", shape)
    result = scope.variable()
    scope.write(f"{result} = {name}")
    if form == "list":
        items = scope.layer("layers", f"nn.ModuleList([{', '.join(made)}])")
        scope.write(f"for layer in {items}:", f"    {result} = torch.tanh(layer({result}))")
    else:
        keys = [f"k{i}" for i in range(len(made))]
        pairs = ", ".join(f'"{key}": {constructor}' for key, constructor in zip(keys, made, strict=True))
        items = scope.layer("layers", f"nn.ModuleDict({{{pairs}}})")
        scope.write(f"for key in {tuple(keys)!r}:", f"    {result} = {items}[key]({result}).relu()")
    return scope.assign(f"{result} * 1.0", shape)


def _parameter_list(scope: Scope, x: Value) -> Value:
    inputs, name = x.shape[-1], scope.read(x)
    holder = scope.choices.pick(("List", "Dict"))
    made = f"nn.Parameter(torch.empty({inputs}, {inputs}))"
    if holder == "List":
        items = scope.layer("kernels", f"nn.ParameterList([{made}, {made}])")
        return scope.assign(f"{name} @ {items}[0] + F.linear({name}, {items}[1])", x.shape, fresh=True)
    items = scope.layer("kernels", f'nn.ParameterDict({{"a": {made}}})')
    return scope.assign(f'{name} @ {items}["a"]', x.shape, fresh=True)


STEPS: tuple[Step, ...] = (
    Step(None, layers.linear),
    Step(None, layers.activation),
    Step(Ingredient.CONV, layers.conv, _axes(2, 3)),
    Step(Ingredient.NORM, layers.norm),
    Step(Ingredient.MERGE, shapes.merge),
    Step(Ingredient.SHAPE, shapes.reshape),
    Step(Ingredient.SHAPE, shapes.cut, lambda value: value.elements > 1),
    Step(Ingredient.POOL, layers.pool, _axes(2, 3)),
    Step(Ingredient.DROPOUT, layers.dropout),
    Step(Ingredient.FUNCTIONAL, weights.functional),
    Step(Ingredient.FUNCTIONAL, weights.derived),
    Step(Ingredient.BLOCK, block),
    Step(Ingredient.ATTENTION, attentions.attention, _axes(2)),
    Step(Ingredient.SHARING, weights.shared),
    Step(Ingredient.TYING, weights.tied),
    Step(Ingredient.OUTSIDE, weights.outside),
    Step(Ingredient.SUBCLASS, layers.subclassed),
    Step(Ingredient.EMBEDDING, layers.position, _axes(2)),
    Step(Ingredient.RECURRENT, layers.recurrent, _axes(2)),
    Step(Ingredient.INPLACE, pythons.inplace),
    Step(Ingredient.STATE, pythons.state),
    Step(Ingredient.PYTHON, pythons.python),
    Step(Ingredient.PARAMETRIZED, weights.parametrized),
)
"""All steps, the simplest first."""


def grow(scope: Scope, most: int) -> Value:
    """Write steps one after another, most of them on the newest value; return the last value."""
    x = scope.values[-1]
    for _ in range(most):
        if not scope.choices.pick((False, *[True] * most)):
            break
        x = scope.values[-1]
        if len(scope.values) > 1 and scope.choices.flag(6):
            x = scope.choices.pick(scope.values[-2::-1])
        x = _step(scope, x, [step for step in STEPS if _possible(scope, step, x)])
    return x


def _possible(scope: Scope, step: Step, x: Value) -> bool:
    if step.run is block and scope.depth < 1:
        return False
    return (step.ingredient is None or scope.allows(step.ingredient)) and step.fits(x)


def _step(scope: Scope, x: Value, steps: Sequence[Step]) -> Value:
    step = scope.choices.pick(steps)
    made = step.run(scope, x)
    if step.ingredient is not None:
        scope.source.used.add(step.ingredient)
    return made


def compose(
    choices: Choices,
    allowed: frozenset[Ingredient],
    sizes: Sizes,
    axes: int | None = None,
    required: Ingredient | None = None,
) -> tuple[str, frozenset[Ingredient]]:
    """Write a whole model.

    Args:
        choices: Who decides.
        allowed: What it may be made of.
        sizes: How large it may be.
        axes: Axes of the input without the batch: 1 for features, 2 for sequences, 3 for images; any by default.
        required: An ingredient that must be there.

    Returns:
        The source and the ingredients in it.
    """
    source = Source(choices, allowed, sizes)
    scope = Scope(source, None, sizes.depth)
    arguments, example = _inputs(scope, axes)
    if required is not None:
        _require(scope, required)
    x = grow(scope, sizes.steps)
    head = _head(scope, x)
    for loose in [v for v in scope.values if not v.used and v is not head]:
        _tie_up(scope, head, loose)
    result = _outputs(scope, head)
    code = scope.code("Model", arguments, result)
    inputs = f"def example_inputs(batch, dtype, generator):\n    return {example}"
    return "\n\n\n".join([*source.classes, code, inputs]), frozenset(source.used)


def _require(scope: Scope, ingredient: Ingredient) -> None:
    """One step of this ingredient at least, if any of its steps can take the input."""
    x = scope.values[-1]
    steps = [step for step in STEPS if step.ingredient is ingredient and _possible(scope, step, x)]
    if steps:
        _step(scope, x, steps)


def _inputs(scope: Scope, axes: int | None) -> tuple[str, str]:
    """Arguments of `forward`, and the expression of the example inputs."""
    choices = scope.choices
    axes = axes or choices.pick((1, 2, 3) if scope.allows(Ingredient.CONV) else (1, 2))
    shape = tuple(choices.pick(((4, 2, 3, 6), (3, 2, 4, 5), (4, 5, 3, 6))[i]) for i in range(axes))
    if axes == 2:
        shape = (shape[0], choices.pick((4, 6, 8, 3)))
    drawn = f"torch.randn(batch, {', '.join(map(str, shape))}, dtype=dtype, generator=generator)"
    form = "plain"
    if scope.allows(Ingredient.CALLS):
        form = choices.pick(("plain", "two", "keyword", "optional", "dict", "list", "tokens"))
        scope.source.used |= {Ingredient.CALLS} if form != "plain" else set()
    if form == "tokens":
        length, count, width = choices.integer(2, 4), choices.integer(4, 7), scope.width()
        table = scope.layer("embedding", f"nn.Embedding({count}, {width})")
        scope.assign(f"{table}(tokens)", (length, width))
        return "tokens", f"(torch.randint({count}, (batch, {length}), generator=generator),)"
    if form in ("dict", "list"):
        key = "'x'" if form == "dict" else "0"
        scope.assign(f"batch[{key}]", shape)
        extra = f"'other': {drawn}" if form == "dict" else drawn
        return "batch", f"({{'x': {drawn}, {extra}}},)" if form == "dict" else f"([{drawn}, {extra}],)"
    scope.values.append(Value("x", shape))
    if form == "two":
        scope.values.insert(0, Value("y", shape))
        return "x, y", f"({drawn}, {drawn})"
    if form == "keyword":
        scope.assign("x * scale", shape, fresh=True)
        return "x, *, scale=1.0", f"(({drawn},), {{'scale': 0.5}})"
    if form == "optional":
        scope.assign("x if shift is None else x + shift", shape)
        given = choices.pick((f"({drawn},)", f"(({drawn},), {{'shift': {drawn}}})"))
        return "x, shift=None", given
    return "x", f"({drawn},)"


def _head(scope: Scope, x: Value) -> Value:
    """A last linear layer, so that every model has a weight."""
    if len(x.shape) > 1 and scope.choices.flag():
        axes = ", ".join(map(str, range(1, len(x.shape))))
        x = scope.assign(f"{scope.read(x)}.mean(({axes},))", x.shape[-1:])
    width = scope.choices.integer(1, 4)
    name = "self.head"
    scope.init.append(f"{name} = nn.Linear({x.shape[-1]}, {width})")
    return scope.assign(f"{name}({scope.read(x)})", (*x.shape[:-1], width))


def _tie_up(scope: Scope, head: Value, loose: Value) -> None:
    """Let a value that nothing reads count for the output of its sample."""
    if loose.name in ("x", "y", head.name):
        return
    ones = ", 1" * len(head.shape)
    scope.write(f"{head.name} = {head.name} + {scope.read(loose)}.flatten(1).mean(1).view(-1{ones})")


def _outputs(scope: Scope, head: Value) -> str:
    """What `forward` returns."""
    if not scope.allows(Ingredient.CALLS):
        return head.name
    others = [value.name for value in scope.values if value is not head and value.name not in ("x", "y")]
    other = scope.choices.pick(others[::-1]) if others else head.name
    form = scope.choices.pick(("{0}", "{0}, {1}", "[{0}, {1}]", "{{'scores': {0}, 'last': ({1}, {0})}}", "({0}, 3)"))
    return form.format(head.name, other)
