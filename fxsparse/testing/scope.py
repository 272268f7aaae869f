"""A class of a generated model while it is being written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fxsparse.testing.choices import Choices
from fxsparse.testing.ingredients import Ingredient

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """How large generated models are.

    Attributes:
        steps: Most steps of the model itself; of a submodule about half.
        width: Largest number of features or channels that a layer makes.
        elements: Most elements of one sample of any value.
        depth: How deep submodules are nested.
    """

    steps: int = 6
    width: int = 8
    elements: int = 256
    depth: int = 2


@dataclass(eq=False)
class Value:
    """A variable of `forward`.

    Attributes:
        name: Its name in the source.
        shape: Its shape without the batch axis, which is axis 0.
        fresh: Nothing else needs its content, so it may be written to.
        used: Something reads it.
    """

    name: str
    shape: Shape
    fresh: bool = False
    used: bool = False

    @property
    def elements(self) -> int:
        """Elements of one sample."""
        return math.prod(self.shape)


@dataclass(eq=False)
class Source:
    """The whole file: classes in order, and what holds for all of them."""

    choices: Choices
    allowed: frozenset[Ingredient]
    sizes: Sizes
    classes: list[str] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)
    used: set[Ingredient] = field(default_factory=set)

    def fresh_name(self, stem: str) -> str:
        """A class name that is not taken."""
        self.names[stem] = self.names.get(stem, 0) + 1
        return f"{stem}{self.names[stem]}"

    def template(self, name: str, code: str) -> str:
        """Add a helper class or function once; return its name."""
        if name not in self.templates:
            self.templates[name] = code.strip()
            self.classes.append(code.strip())
        return name


class Scope:
    """One module class: lines of `__init__` and `forward`, and the values so far.

    Args:
        source: The file.
        shape: Shape of the argument `x`, without the batch axis.
        depth: How deep modules may still be nested in this one.
    """

    def __init__(self, source: Source, shape: Shape | None, depth: int) -> None:
        self.source = source
        self.choices = source.choices
        self.depth = depth
        self.init: list[str] = []
        self.body: list[str] = []
        self.values: list[Value] = [] if shape is None else [Value("x", shape)]
        self.weights: list[tuple[str, Shape]] = []
        self._counts: dict[str, int] = {}

    def allows(self, ingredient: Ingredient) -> bool:
        """Whether the ingredient may be used."""
        return ingredient in self.source.allowed

    def attribute(self, stem: str) -> str:
        """A name for an attribute."""
        self._counts[stem] = self._counts.get(stem, 0) + 1
        return f"{stem}{self._counts[stem]}"

    def layer(self, stem: str, constructor: str) -> str:
        """Write `self.stemN = constructor`; return "self.stemN"."""
        name = f"self.{self.attribute(stem)}"
        self.init.append(f"{name} = {constructor}")
        return name

    def linear(self, inputs: int, outputs: int, bias: bool = True) -> str:
        """A linear layer, known to those who read weights of others."""
        end = "" if bias else ", bias=False"
        name = self.layer("linear", f"nn.Linear({inputs}, {outputs}{end})")
        self.weights.append((f"{name}.weight", (outputs, inputs)))
        return name

    def parameter(self, stem: str, *shape: int) -> str:
        """A parameter; weights of two axes are known to those who read weights of others."""
        name = self.layer(stem, f"nn.Parameter(torch.empty({', '.join(map(str, shape))}))")
        if len(shape) == 2:
            self.weights.append((name, shape))
        return name

    def write(self, *lines: str) -> None:
        """Append lines to `forward`."""
        self.body.extend(lines)

    def variable(self) -> str:
        """A new variable's name."""
        return self.attribute("x")

    def assign(self, expression: str, shape: Iterable[int], fresh: bool = False) -> Value:
        """Write `xN = expression`; a fresh value is one that its maker does not need any more."""
        value = Value(self.variable(), tuple(shape), fresh)
        self.body.append(f"{value.name} = {expression}")
        self.values.append(value)
        return value

    def overwrite(self, value: Value, fresh: bool = False) -> Value:
        """The value after an operation in place: the old one is gone."""
        self.values.remove(value)
        self.values.append(Value(value.name, value.shape, fresh))
        return self.values[-1]

    def read(self, value: Value) -> str:
        """The name of a value that is read by something that may need it later."""
        value.used, value.fresh = True, False
        return value.name

    def width(self, multiple: int = 1) -> int:
        """A number of features, a multiple of `multiple`."""
        most = max(self.source.sizes.width // multiple, 1)
        return multiple * self.choices.pick([n for n in (4, 2, 3, 6, 8, 1, 5, 7) if n <= most] or [1])

    def fits(self, *shape: int) -> bool:
        """Whether a value of this shape is small enough, and not empty."""
        return min(shape, default=1) >= 1 and math.prod(shape) <= self.source.sizes.elements

    def others(self, value: Value, accept: Callable[[Value], bool]) -> Sequence[Value]:
        """Earlier values that are accepted, the newest first."""
        return [other for other in reversed(self.values) if other is not value and accept(other)]

    def code(self, name: str, arguments: str, result: str) -> str:
        """The class."""
        init = ["super().__init__()", *self.init]
        body = [*self.body, f"return {result}"]
        lines = [f"class {name}(nn.Module):", "    def __init__(self):", *(f"        {line}" for line in init), ""]
        return "\n".join([*lines, f"    def forward(self, {arguments}):", *(f"        {line}" for line in body)])
