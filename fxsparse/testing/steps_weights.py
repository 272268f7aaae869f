"""Steps of generated models: weights that are used by functions, shared, tied, and read by others."""

from __future__ import annotations

from fxsparse.testing.ingredients import Ingredient
from fxsparse.testing.scope import Scope, Value


def functional(scope: Scope, x: Value) -> Value:
    """A product with a parameter."""
    inputs, axes, width = x.shape[-1], len(x.shape), scope.width()
    forms = ["linear", "biased", "matmul", "einsum", "tensordot"]
    forms += ["mm", "addmm", "bilinear"] if axes == 1 else ["experts", "grouped"] if axes == 2 else []
    if axes > 1 and scope.allows(Ingredient.CONV):
        forms += ["conv", "transposed"]
    form = scope.choices.pick(forms)
    if form in ("conv", "transposed"):
        return _functional_conv(scope, x, width, form == "transposed")
    if form in ("experts", "grouped"):
        return _experts(scope, x, width, form == "grouped")
    name = scope.read(x)
    if form == "bilinear":
        layer = scope.layer("bilinear", f"nn.Bilinear({inputs}, {inputs}, {width})")
        return scope.assign(f"{layer}({name}, {name})", (width,))
    flat = form in ("linear", "biased", "einsum")
    kernel = scope.parameter("kernel", *((width, inputs) if flat else (inputs, width)))
    letters = "bcd"[:axes]
    shift = scope.parameter("shift", width) if form in ("biased", "addmm") else ""
    expression = {
        "linear": f"F.linear({name}, {kernel})",
        "biased": f"F.linear({name}, {kernel}, bias={shift})",
        "matmul": f"{name} @ {kernel}",
        "einsum": f'torch.einsum("{letters}i,oi->{letters}o", {name}, {kernel})',
        "tensordot": f"torch.tensordot({name}, {kernel}, dims=([-1], [0]))",
        "mm": f"torch.mm({name}, {kernel})",
        "addmm": f"torch.addmm({shift}, {name}, {kernel})",
    }[form]
    return scope.assign(expression, (*x.shape[:-1], width), fresh=True)


def _functional_conv(scope: Scope, x: Value, width: int, transposed: bool) -> Value:
    inputs, axes = x.shape[0], len(x.shape) - 1
    groups = scope.choices.pick([n for n in (1, 2) if inputs % n == 0])
    width *= groups if width * groups <= scope.source.sizes.width else 1
    groups = groups if width % groups == 0 else 1
    if not scope.fits(width, *x.shape[1:]):
        width, groups = 1, 1
    shape = (inputs, width // groups) if transposed else (width, inputs // groups)
    kernel = scope.parameter("kernel", *shape, *[3] * axes)
    name = f"conv{'_transpose' if transposed else ''}{axes}d"
    end = "" if groups == 1 else f", groups={groups}"
    return scope.assign(f"F.{name}({scope.read(x)}, {kernel}, padding=1{end})", (width, *x.shape[1:]), fresh=True)


def _experts(scope: Scope, x: Value, width: int, by_letters: bool) -> Value:
    """One weight matrix for each row."""
    count, inputs = x.shape
    experts = scope.parameter("experts", count, inputs, width)
    name = scope.read(x)
    if by_letters:
        return scope.assign(f'torch.einsum("bei,eio->beo", {name}, {experts})', (count, width))
    return scope.assign(f"torch.bmm({name}.transpose(0, 1), {experts}).transpose(0, 1)", (count, width))


def derived(scope: Scope, x: Value) -> Value:
    """A product with something made from parameters."""
    inputs, width = x.shape[-1], scope.width()
    forms = [
        "transposed",
        "rows",
        "columns",
        "cat",
        "view",
        "chunk",
        "scaled",
        "stacked",
        "low rank",
        "adapter",
        "cast",
    ]
    form, name = scope.choices.pick(forms), scope.read(x)
    made = (*x.shape[:-1], width)
    if form in ("low rank", "adapter"):
        a, b = scope.parameter("down", 2, inputs), scope.parameter("up", width, 2)
        base = f"{scope.parameter('kernel', width, inputs)} + " if form == "adapter" else ""
        return scope.assign(f"F.linear({name}, {base}{b} @ {a})", made, fresh=True)
    if form == "cat":
        parts = scope.parameter("kernel", width, inputs), scope.parameter("kernel", 2, inputs)
        return scope.assign(f"F.linear({name}, torch.cat([{parts[0]}, {parts[1]}]))", (*x.shape[:-1], width + 2), True)
    if form == "stacked":
        rows = ", ".join(scope.parameter("row", inputs) for _ in range(2))
        return scope.assign(f"F.linear({name}, torch.stack([{rows}]))", (*x.shape[:-1], 2), fresh=True)
    if form == "chunk":
        kernel = scope.parameter("kernel", 2 * width, inputs)
        first, second = scope.attribute("w"), scope.attribute("w")
        scope.write(f"{first}, {second} = {kernel}.chunk(2)")
        return scope.assign(f"F.linear({name}, {first}) * F.linear({name}, {second}).tanh()", made)
    shape, view = {
        "transposed": ((inputs, width), "{}.t()"),
        "rows": ((width + 2, inputs), f"{{}}[:{width}]"),
        "columns": ((width, inputs + 1), "{}[:, 1:]"),
        "view": ((width, 1, inputs), f"{{}}.view({width}, {inputs})"),
        "scaled": ((width, inputs), "{} * 0.5"),
        "cast": ((width, inputs), f"{{}}.to({name}.dtype).contiguous()"),
    }[form]
    kernel = scope.parameter("kernel", *shape)
    return scope.assign(f"F.linear({name}, {view.format(kernel)})", made, fresh=True)


def outside(scope: Scope, x: Value) -> Value:
    """A weight of another module, read here; a new layer where none is there."""
    if not scope.weights:
        scope.linear(x.shape[-1], scope.width())
        layer, (outputs, _) = scope.weights[-1]
        first = scope.assign(f"{layer.removesuffix('.weight')}({scope.read(x)})", (*x.shape[:-1], outputs), fresh=True)
        scope.write(f"{first.name} = torch.tanh({first.name})")
        first.fresh, x = False, first
    fitting = [(w, s) for w, s in reversed(scope.weights) if x.shape[-1] in s] or scope.weights[-1:]
    weight, (outputs, inputs) = scope.choices.pick(fitting)
    name, last = scope.read(x), x.shape[-1]
    if last == outputs:
        form = scope.choices.pick((f"F.linear({name}, {weight}.t())", f"{name} @ {weight}"))
        return scope.assign(form, (*x.shape[:-1], inputs), fresh=True)
    if last == inputs:
        return scope.assign(f"F.linear({name}, {weight})", (*x.shape[:-1], outputs), fresh=True)
    form = scope.choices.pick((f"{name} + {weight}.mean()", f"{name} * (1.0 + {weight}.pow(2).sum().sqrt())"))
    return scope.assign(form, x.shape)


def shared(scope: Scope, x: Value) -> Value:
    """A module that runs twice, under one name or two."""
    inputs, name = x.shape[-1], scope.read(x)
    layer = scope.linear(inputs, inputs)
    form = scope.choices.pick(("twice", "alias", "sequence", "branches"))
    if form == "sequence":
        sequence = scope.layer("sequence", f"nn.Sequential({layer}, nn.Tanh(), {layer})")
        return scope.assign(f"{sequence}({name})", x.shape, fresh=True)
    again = scope.layer("alias", layer) if form == "alias" else layer
    if form == "branches":
        return scope.assign(f"{layer}({name}) - {again}({name}.flip(-1))", x.shape, fresh=True)
    return scope.assign(f"{again}(torch.tanh({layer}({name})))", x.shape, fresh=True)


def tied(scope: Scope, x: Value) -> Value:
    """One parameter in two modules, or under two names of one."""
    inputs, name = x.shape[-1], scope.read(x)
    form = scope.choices.pick(("modules", "names", "module and name", "transposed", "embedding"))
    if form == "names":
        kernel = scope.parameter("kernel", inputs, inputs)
        alias = scope.layer("alias", kernel)
        return scope.assign(f"F.linear(torch.tanh({name} @ {kernel}), {alias})", x.shape, fresh=True)
    if form == "transposed":
        width = scope.width()
        layer = scope.linear(inputs, width)
        return scope.assign(f"F.linear(torch.tanh({layer}({name})), {layer}.weight.t())", x.shape, fresh=True)
    if form == "embedding" and scope.allows(Ingredient.EMBEDDING):
        width = scope.width()
        layer = scope.linear(inputs, width, bias=False)
        table = scope.layer("embedding", f"nn.Embedding({width}, {inputs})")
        scope.init.append(f"{table}.weight = {layer}.weight")
        index = scope.attribute("index")
        scope.init.append(f'self.register_buffer("{index}", torch.tensor({width - 1}))')
        return scope.assign(f"{layer}({name} + {table}(self.{index}))", (*x.shape[:-1], width), fresh=True)
    first = scope.linear(inputs, inputs)
    if form == "modules":
        second = scope.linear(inputs, inputs, bias=False)
        scope.init.append(f"{second}.weight = {first}.weight")
        return scope.assign(f"{second}(torch.relu({first}({name})))", x.shape, fresh=True)
    alias = scope.layer("alias", f"{first}.weight")
    return scope.assign(f"F.linear(torch.tanh({first}({name})), {alias})", x.shape, fresh=True)


def parametrized(scope: Scope, x: Value) -> Value:
    """A linear layer under one of torch's parametrizations."""
    width = scope.width()
    kind = scope.choices.pick(("weight_norm", "spectral_norm"))
    layer = scope.layer("normed", f"nn.utils.parametrizations.{kind}(nn.Linear({x.shape[-1]}, {width}))")
    return scope.assign(f"{layer}({scope.read(x)})", (*x.shape[:-1], width), fresh=True)
