"""Steps of generated models: other shapes of a value, and several values into one."""

from __future__ import annotations

from fxsparse.testing.scope import Scope, Shape, Value


def reshape(scope: Scope, x: Value) -> Value:
    """Flatten, unflatten, permute, flip, pad."""
    shape = x.shape
    forms: list[tuple[str, Shape]] = [("{}.flip(-1)", shape), ("{}.roll(1, 1)", shape)]
    if len(shape) > 1:
        flat = (x.elements,)
        forms = [("{}.flatten(1)", flat), ("{0}.reshape({0}.shape[0], -1)", flat), ("M:nn.Flatten()", flat), *forms]
        forms.append((f"{{}}.contiguous().view(-1, {x.elements})", flat))
    forms += _unflattened(shape) + _permuted(shape)
    if scope.fits(*shape[:-1], shape[-1] + 1):
        forms.append(("F.pad({}, (1, 0))", (*shape[:-1], shape[-1] + 1)))
    form, made = scope.choices.pick(forms)
    if form.startswith("M:"):
        form = f"{scope.layer('shape', form[2:])}({{}})"
    return scope.assign(form.format(scope.read(x)), made)


def _unflattened(shape: Shape) -> list[tuple[str, Shape]]:
    forms: list[tuple[str, Shape]] = []
    first, rest = shape[0], shape[1:]
    for part in (2, 3, 4):
        if first % part == 0 and first > part and len(shape) < 3:
            made = (part, first // part, *rest)
            sizes = ", ".join(map(str, made))
            forms.append((f"{{}}.unflatten(1, ({part}, {first // part}))", made))
            forms.append((f"{{0}}.reshape({{0}}.size(0), {sizes})", made))
    if len(shape) == 1:
        forms.append(("{}.unsqueeze(1)", (1, first)))
    if len(shape) > 1 and first == 1:
        forms.append(("{}.squeeze(1)", rest))
    return forms


def _permuted(shape: Shape) -> list[tuple[str, Shape]]:
    if len(shape) == 2:
        return [("{}.transpose(1, 2)", shape[::-1]), ("{}.mT", shape[::-1])]
    if len(shape) == 3:
        a, b, c = shape
        return [("{}.permute(0, 2, 3, 1)", (b, c, a)), ("torch.transpose({}, 1, 2)", (b, a, c))]
    return []


def cut(scope: Scope, x: Value) -> Value:
    """A slice, or the parts of a split joined in another way; needs two features."""
    axis = scope.choices.integer(1, len(x.shape))
    side = x.shape[axis - 1]
    if side < 2:
        axis, side = next((i + 1, n) for i, n in enumerate(x.shape) if n > 1)
    at = scope.choices.integer(1, side - 1)
    before = ":, " * axis

    def shaped(size: int) -> Shape:
        return (*x.shape[: axis - 1], size, *x.shape[axis:])

    forms = [
        (f"{{}}[{before}:{at}]", shaped(at)),
        (f"{{}}[{before}{at}:]", shaped(side - at)),
        (f"{{}}[{before}::2]", shaped((side + 1) // 2)),
        (f"{{}}.narrow({axis}, {at}, {side - at})", shaped(side - at)),
        (f"{{}}.tensor_split(2, {axis})[0]", shaped((side + 1) // 2)),
    ]
    if len(x.shape) > 1:
        forms.append((f"{{}}[{before}0]", (*x.shape[: axis - 1], *x.shape[axis:])))
        forms.append((f"{{}}.unbind({axis})[-1]", (*x.shape[: axis - 1], *x.shape[axis:])))
    if scope.choices.flag():
        return _parts(scope, x, axis, at)
    form, shape = scope.choices.pick(forms)
    return scope.assign(form.format(scope.read(x)), shape)


def _parts(scope: Scope, x: Value, axis: int, at: int) -> Value:
    """Split in two; join swapped, gate, or keep both."""
    side = x.shape[axis - 1]
    even = side % 2 == 0 and scope.choices.flag()
    first, second = scope.variable(), scope.variable()
    sizes = (side // 2, side // 2) if even else (at, side - at)
    call = f"chunk(2, {axis})" if even else f"split([{at}, {side - at}], dim={axis})"
    scope.write(f"{first}, {second} = {scope.read(x)}.{call}")
    shapes = [(*x.shape[: axis - 1], size, *x.shape[axis:]) for size in sizes]
    how = scope.choices.pick(("swap", "keep", "gate") if even else ("swap", "keep"))
    if how == "swap":
        return scope.assign(f"torch.cat([{second}, {first}], {axis})", x.shape, fresh=True)
    if how == "gate":
        return scope.assign(f"{first} * {second}.sigmoid()", shapes[0], fresh=True)
    scope.values += [Value(second, shapes[1]), Value(first, shapes[0])]
    return scope.values[-1]


def merge(scope: Scope, x: Value) -> Value:
    """This value and an earlier one: added, multiplied, joined, stacked."""
    same = scope.others(x, lambda other: other.shape == x.shape)
    joined = [(other, axis) for other in scope.others(x, lambda _: True) for axis in _axes(x.shape, other.shape)]
    joined = [(o, a) for o, a in joined if scope.fits(x.elements + o.elements)]
    if same and not (joined and scope.choices.flag()):
        a, b = scope.read(x), scope.read(scope.choices.pick(same))
        forms = ["{} + {}", "{} - 0.5 * {}", "{} * {}.sigmoid()", "torch.add({}, {}, alpha=2)", "torch.maximum({}, {})"]
        forms += ["torch.stack([{}, {}], 1).mean(1)", "torch.lerp({}, {}, 0.3)"]
        form = scope.choices.pick(forms)
        return scope.assign(form.format(a, b), x.shape, fresh=form == "{} + {}")
    if joined:
        other, axis = scope.choices.pick(joined)
        shape = (*x.shape[: axis - 1], x.shape[axis - 1] + other.shape[axis - 1], *x.shape[axis:])
        return scope.assign(f"torch.cat([{scope.read(x)}, {scope.read(other)}], {axis})", shape, fresh=True)
    return _branches(scope, x)


def _axes(a: Shape, b: Shape) -> list[int]:
    """Axes along which values of these shapes can be joined, counted with the batch."""
    if len(a) != len(b):
        return []
    different = [i for i, (n, m) in enumerate(zip(a, b, strict=True)) if n != m]
    return [i + 1 for i in range(len(a)) if not different or different == [i]]


def _branches(scope: Scope, x: Value) -> Value:
    """Two layers on one value, joined; or a residual around one."""
    inputs = x.shape[-1]
    name = scope.read(x)
    if not scope.choices.flag():
        return scope.assign(f"{name} + {scope.linear(inputs, inputs)}({name})", x.shape, fresh=True)
    widths = (scope.width(), scope.width())
    parts = ", ".join(f"{scope.linear(inputs, width)}({name})" for width in widths)
    return scope.assign(f"torch.cat(({parts}), -1)", (*x.shape[:-1], sum(widths)), fresh=True)
