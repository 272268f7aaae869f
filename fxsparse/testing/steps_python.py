"""Steps of generated models: writes in place, state, and Python that no tracer takes."""

from __future__ import annotations

from fxsparse.testing.ingredients import Ingredient
from fxsparse.testing.scope import Scope, Value

STRAIGHT = """
class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient
"""


def inplace(scope: Scope, x: Value) -> Value:
    """A write into a value that nobody needs any more; into a copy where there is none."""
    if not x.fresh:
        x = scope.assign(f"{scope.read(x)}.clone()", x.shape, fresh=True)
    name, first = x.name, x.shape[0]
    module = scope.choices.pick(("nn.ReLU(inplace=True)", "nn.LeakyReLU(0.1, inplace=True)"))
    lines = [
        "module",
        f"F.relu_({name})",
        f"{name} = F.relu({name}, inplace=True)",
        f"{name}.tanh_()",
        f"{name} += 1.0",
        f"{name}.mul_(0.5)",
        f"{name}.add_({name}.detach().mean())",
        f"torch.sigmoid_({name})",
    ]
    items = [f"{name}[:, 0] = 0.5", f"{name}[:, {first - 1}:] *= 2.0", f"{name}[:, 0] = {name}[:, {first - 1}] * 2.0"]
    others = scope.others(x, lambda other: other.shape == x.shape)
    if others:
        other = scope.choices.pick(others)
        lines.append(f"{name} += {other.name}")
        items.append(f"{name}[:, :1] = {other.name}[:, :1]")
    if scope.allows(Ingredient.PYTHON):
        lines += items
    line = scope.choices.pick(lines)
    if line == "module":
        line = f"{name} = {scope.layer('act', module)}({name})"
    scope.write(line)
    return scope.overwrite(x, fresh="= 0.5" in line or "+= " in line)


def state(scope: Scope, x: Value) -> Value:
    """A buffer that changes on each call, before it is used."""
    name = scope.read(x)
    if scope.choices.flag():
        buffer = scope.attribute("calls")
        kind = scope.choices.pick(("torch.zeros(())", "torch.zeros((), dtype=torch.long)"))
        scope.init.append(f'self.register_buffer("{buffer}", {kind})')
        scope.write(f"self.{buffer}.add_(1)")
        return scope.assign(f"{name} + 0.1 * self.{buffer}", x.shape)
    buffer = scope.attribute("average")
    end = ", persistent=False" if scope.choices.flag(4) else ""
    size = ", ".join(map(str, x.shape))
    scope.init.append(f'self.register_buffer("{buffer}", torch.zeros({size}){end})')
    scope.write(f"self.{buffer}.mul_(0.9).add_({name}.detach().mean(0), alpha=0.1)")
    return scope.assign(f"{name} - self.{buffer}", x.shape, fresh=True)


def python(scope: Scope, x: Value) -> Value:
    """Code that no tracer takes as one graph."""
    inputs, name, width = x.shape[-1], scope.read(x), scope.width()
    forms = ("branch", "scale", "rows", "training", "autograd", "no grad", "attribute", "dropout", "item", "raise")
    form = scope.choices.pick(forms)
    if form == "branch":
        layers = scope.linear(inputs, width), scope.linear(inputs, width)
        result = scope.variable()
        scope.write(f"if {name}.mean() > 0:", f"    {result} = {layers[0]}({name})", "else:")
        scope.write(f"    {result} = {layers[1]}({name})")
        return scope.assign(f"{result} * 1.0", (*x.shape[:-1], width))
    if form == "scale":
        kernel = scope.parameter("kernel", width, inputs)
        scale = f"(2.0 if bool({name}.sum() > 0) else 0.5)"
        return scope.assign(f"F.linear({name}, {kernel}) * {scale}", (*x.shape[:-1], width), fresh=True)
    if form == "rows":
        layer = scope.linear(inputs, width)
        return scope.assign(f"torch.stack([{layer}(row) for row in {name}])", (*x.shape[:-1], width), fresh=True)
    if form == "training":
        layer = scope.linear(inputs, inputs)
        return scope.assign(f"{layer}({name}) if self.training else {layer}({name}) + {name}", x.shape)
    if form == "autograd":
        straight = scope.source.template("Straight", STRAIGHT)
        return scope.assign(f"{straight}.apply({name})", x.shape)
    if form == "item":
        copy = scope.variable()
        scope.write(f"{copy} = {name}.clone()", f"{copy}[..., 0] = {name}[..., {inputs - 1}] * 2.0")
        return scope.assign(f"{copy} + 1.0", x.shape)
    if form == "no grad":
        layer = scope.linear(inputs, inputs)
        result = scope.variable()
        scope.write("with torch.no_grad():", f"    {result} = {layer}({name})")
        return scope.assign(f"{layer}({name}) - 0.5 * {result}", x.shape)
    if form == "attribute":
        scope.write(f"self.last_shape = tuple({name}.shape)")
    if form == "raise":
        scope.write(f"if not torch.isfinite({name}).all():", '    raise ValueError("not finite")')
    expression = f"F.dropout({name}, 0.3, self.training)" if form == "dropout" else f"{name} * 2.0"
    return scope.assign(expression, x.shape)
