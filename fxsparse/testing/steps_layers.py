"""Steps of generated models: layers of torch, and subclasses of them."""

from __future__ import annotations

from fxsparse.testing.ingredients import Ingredient
from fxsparse.testing.scope import Scope, Shape, Value

BATCH_NORM_ACT = """
class BatchNormAct2d(nn.BatchNorm2d):
    def forward(self, x):
        return torch.relu(super().forward(x))
"""
SCALED_LINEAR = """
class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)
"""
PLAIN_CONV = """
class Conv2dSame(nn.Conv2d):
    def forward(self, x):
        pad = self.kernel_size[0] // 2
        return F.conv2d(F.pad(x, (pad, pad, pad, pad)), self.weight, self.bias, self.stride)
"""
STANDARDISED_CONV = """
class StandardisedConv2d(nn.Conv2d):
    def forward(self, x):
        flat = self.weight.flatten(1)
        weight = self.weight - flat.mean(1).view(-1, 1, 1, 1)
        return F.conv2d(x, weight / (flat.std(1).view(-1, 1, 1, 1) + 1e-3), self.bias, padding=self.padding)
"""
CONV1D = """
class Conv1D(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x):
        flat = torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight)
        return flat.view(x.size()[:-1] + (self.outputs,))
"""


def linear(scope: Scope, x: Value) -> Value:
    """A linear layer on the last axis."""
    width = scope.width()
    layer = scope.linear(x.shape[-1], width, bias=not scope.choices.flag())
    return scope.assign(f"{layer}({scope.read(x)})", (*x.shape[:-1], width), fresh=True)


def activation(scope: Scope, x: Value) -> Value:
    """An activation, as a module, a function or a method."""
    module = scope.choices.pick(("ReLU", "Tanh", "GELU", "Sigmoid", "SiLU", "LeakyReLU", "Identity"))
    forms = [
        "F.relu({})",
        "torch.tanh({})",
        "{}.sigmoid()",
        "F.gelu({})",
        "F.softplus({})",
        "F.leaky_relu({}, 0.1)",
        "torch.sin({})",
        "{} * 0.5 + 1.0",
        "-{}",
        "F.softmax({}, -1)",
    ]
    if scope.choices.flag():
        return scope.assign(scope.choices.pick(forms).format(scope.read(x)), x.shape)
    layer = scope.layer("act", f"nn.{module}()")
    return scope.assign(f"{layer}({scope.read(x)})", x.shape)


def subclassed(scope: Scope, x: Value) -> Value:
    """A layer of a class of the user's own."""
    width, inputs = scope.width(), x.shape[-1]
    kinds = ["ScaledLinear", "Conv1D"]
    if len(x.shape) == 3 and scope.allows(Ingredient.CONV):
        kinds += ["Conv2dSame", "StandardisedConv2d"]
    kind = scope.choices.pick(kinds)
    if kind == "Conv2dSame" or kind == "StandardisedConv2d":
        code = PLAIN_CONV if kind == "Conv2dSame" else STANDARDISED_CONV
        padding = "" if kind == "Conv2dSame" else ", padding=1"
        layer = scope.layer("conv", f"{scope.source.template(kind, code)}({x.shape[0]}, {width}, 3{padding})")
        return scope.assign(f"{layer}({scope.read(x)})", (width, *x.shape[1:]), fresh=True)
    name = scope.source.template(kind, SCALED_LINEAR if kind == "ScaledLinear" else CONV1D)
    layer = scope.layer("linear", f"{name}({inputs}, {width})")
    return scope.assign(f"{layer}({scope.read(x)})", (*x.shape[:-1], width))


def conv(scope: Scope, x: Value) -> Value:
    """A convolution over one or two axes."""
    axes, inputs = len(x.shape) - 1, x.shape[0]
    transposed = scope.choices.flag(4)
    groups = scope.choices.pick([n for n in (1, 2, 3, inputs) if inputs % n == 0])
    depthwise = groups == inputs and groups > 1
    width = inputs * scope.choices.pick((1, 2)) if depthwise else scope.width(groups)
    kernel = scope.choices.pick((3, 1, 2))
    stride = scope.choices.pick((1, 2))
    kind = f"Conv{'Transpose' if transposed else ''}{axes}d"
    options = "" if groups == 1 else f", groups={groups}"
    options += ", bias=False" if scope.choices.flag(3) else ""
    if transposed:
        padding = min(scope.choices.integer(0, 1), kernel - 1)
        extra = scope.choices.integer(0, stride - 1)
        sides = [(side - 1) * stride - 2 * padding + kernel + extra for side in x.shape[1:]]
        options += f", padding={padding}, output_padding={extra}"
    else:
        options, sides = _forward_options(scope, x.shape, kernel, stride, options)
    if not scope.fits(width, *sides):
        return linear(scope, x)
    if stride != 1:
        options = f", stride={stride}{options}"
    layer = scope.layer("conv", f"nn.{kind}({inputs}, {width}, {kernel}{options})")
    return scope.assign(f"{layer}({scope.read(x)})", (width, *sides), fresh=True)


def _forward_options(scope: Scope, shape: Shape, kernel: int, stride: int, options: str) -> tuple[str, list[int]]:
    modes = ("zeros", "circular", "reflect", "replicate")
    mode = scope.choices.pick(modes) if kernel == 3 and min(shape[1:]) > 2 else "zeros"
    dilation = 2 if mode == "zeros" and kernel == 3 and scope.choices.flag(4) else 1
    reach = dilation * (kernel - 1)
    if stride == 1 and kernel != 2 and scope.choices.flag(4):
        return f', padding="same", dilation={dilation}, padding_mode="{mode}"{options}', list(shape[1:])
    padding = reach // 2 if mode != "zeros" or min(shape[1:]) <= reach else scope.choices.pick((reach // 2, 0))
    options += f", padding={padding}" if padding else ""
    options += f', padding_mode="{mode}"' if mode != "zeros" and padding else ""
    options += f", dilation={dilation}" if dilation > 1 else ""
    return options, [(side + 2 * padding - reach - 1) // stride + 1 for side in shape[1:]]


def norm(scope: Scope, x: Value) -> Value:
    """A normalisation."""
    axes, first, last = len(x.shape), x.shape[0], x.shape[-1]
    groups = scope.choices.pick([n for n in (1, 2, 3) if first % n == 0])
    batch = f"BatchNorm{max(axes - 1, 1)}d"
    kinds = [f"nn.{batch}({first})", f"nn.{batch}({first}, affine=False)", f"nn.{batch}({first}, momentum=None)"]
    if last > 2:  # normalising one or two values leaves no information
        kinds += [f"nn.LayerNorm({last})", f"nn.LayerNorm({last}, bias=False)", f"nn.RMSNorm({last})"]
    if x.elements // groups > 2:
        kinds.append(f"nn.GroupNorm({groups}, {first})")
    if axes == 3:
        kinds += [f"BatchNormAct2d({first})", f"nn.BatchNorm2d({first}, track_running_stats=False)"]
        if x.shape[1] * x.shape[2] > 2:
            kinds.append(f"nn.InstanceNorm2d({first}, affine=True)")
    if last > 2 and scope.choices.flag(5):
        gain, shift = scope.parameter("gain", last), scope.parameter("shift", last)
        return scope.assign(f"F.layer_norm({scope.read(x)}, ({last},), {gain}, {shift})", x.shape, fresh=True)
    kind = scope.choices.pick(kinds)
    if kind.startswith("BatchNormAct2d"):
        scope.source.template("BatchNormAct2d", BATCH_NORM_ACT)
    return scope.assign(f"{scope.layer('norm', kind)}({scope.read(x)})", x.shape, fresh="Act" not in kind)


def pool(scope: Scope, x: Value) -> Value:
    """Pooling over space, or its opposite."""
    first, *sides = x.shape
    axes = len(sides)
    mean = "(2, 3)" if axes == 2 else "2"
    forms: list[tuple[str, Shape]] = [
        (f"{{}}.mean({mean})", (first,)),
        (f"{{}}.amax({mean})", (first,)),
        (f"M:nn.AdaptiveAvgPool{axes}d(1)", (first, *[1] * axes)),
    ]
    if min(sides) >= 2:
        half = (first, *(side // 2 for side in sides))
        forms += [(f"M:nn.MaxPool{axes}d(2)", half), (f"M:nn.AvgPool{axes}d(2)", half)]
        forms.append((f"F.max_pool{axes}d({{}}, 2, stride=1)", (first, *(side - 1 for side in sides))))
    if axes == 2:
        forms += _shuffles(scope, x.shape)
    form, shape = scope.choices.pick(forms)
    if form.startswith("M:"):
        form = f"{scope.layer('pool', form[2:])}({{}})"
    return scope.assign(form.format(scope.read(x)), shape)


def _shuffles(scope: Scope, shape: Shape) -> list[tuple[str, Shape]]:
    first, high, wide = shape
    forms: list[tuple[str, Shape]] = []
    if scope.fits(first, 2 * high, 2 * wide):
        forms.append(("F.interpolate({}, scale_factor=2)", (first, 2 * high, 2 * wide)))
    if first % 4 == 0:
        forms.append(("F.pixel_shuffle({}, 2)", (first // 4, 2 * high, 2 * wide)))
    if first % 2 == 0:
        forms.append(("M:nn.ChannelShuffle(2)", shape))
    return forms


def dropout(scope: Scope, x: Value) -> Value:
    """Dropout as a module."""
    kinds = ["Dropout(0.3)", "AlphaDropout(0.2)"]
    kinds += {2: ["Dropout1d(0.3)"], 3: ["Dropout2d(0.3)"]}.get(len(x.shape), [])
    return scope.assign(f"{scope.layer('drop', f'nn.{scope.choices.pick(kinds)}')}({scope.read(x)})", x.shape)


def position(scope: Scope, x: Value) -> Value:
    """Embeddings of positions, added."""
    length, width = x.shape
    table = scope.layer("embedding", f"nn.Embedding({length}, {width})")
    name = scope.attribute("positions")
    scope.init.append(f'self.register_buffer("{name}", torch.arange({length}))')
    return scope.assign(f"{scope.read(x)} + {table}(self.{name})", x.shape, fresh=True)


def recurrent(scope: Scope, x: Value) -> Value:
    """A recurrent layer over axis 1, or a cell in a loop."""
    length, inputs = x.shape
    width = scope.width()
    kind = scope.choices.pick(("LSTM", "GRU", "RNN", "LSTM2", "GRUCell"))
    if kind == "GRUCell":
        cell = scope.layer("cell", f"nn.GRUCell({inputs}, {width})")
        state = scope.variable()
        scope.write(f"{state} = {scope.read(x)}.new_zeros({x.name}.shape[0], {width})", f"for step in range({length}):")
        scope.write(f"    {state} = {cell}({x.name}[:, step], {state})")
        return scope.assign(f"{state} * 1.0", (width,))
    twice = kind == "LSTM2"
    options = ", num_layers=2, bidirectional=True" if twice else ""
    layer = scope.layer("rnn", f"nn.{kind.rstrip('2')}({inputs}, {width}{options}, batch_first=True)")
    return scope.assign(f"{layer}({scope.read(x)})[0]", (length, width * (2 if twice else 1)))
