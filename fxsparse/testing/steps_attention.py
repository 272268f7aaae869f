"""Steps of generated models: attention, as modules and by hand."""

from __future__ import annotations

from fxsparse.testing.scope import Scope, Value


def attention(scope: Scope, x: Value) -> Value:
    """Attention over axis 1, the features being the last axis."""
    width = x.shape[1]
    heads = scope.choices.pick([n for n in (1, 2, 4) if width % n == 0])
    forms = ["module", "weights", "queries", "fused", "letters", "kernels"]
    forms += ["grouped"] if heads > 1 else []
    forms += ["encoder"] if width > 2 else []
    form = scope.choices.pick(forms)
    name = scope.read(x)
    if form in ("module", "weights"):
        return _module(scope, x, heads, form == "weights")
    if form == "encoder":
        first = scope.choices.pick(("False", "True"))
        options = f"{width}, {heads}, dim_feedforward={width + 1}, dropout=0.1, batch_first=True, norm_first={first}"
        layer = scope.layer("encoder", f"nn.TransformerEncoderLayer({options})")
        return scope.assign(f"{layer}({name})", x.shape)
    if form == "kernels":
        q, k = (scope.parameter("kernel", heads, width, 2) for _ in range(2))
        scores = scope.variable()
        scope.write(
            f'{scores} = torch.einsum("bnd,hde->bhne", {name}, {q})',
            f'{scores} = ({scores} @ torch.einsum("bnd,hde->bhne", {name}, {k}).transpose(-1, -2)).softmax(-1)',
        )
        return scope.assign(f"{scores}.mean(1) @ {name}", x.shape)
    return _by_hand(scope, x, heads, form)


def _module(scope: Scope, x: Value, heads: int, weights: bool) -> Value:
    width, name = x.shape[1], scope.read(x)
    others = scope.others(x, lambda other: len(other.shape) == 2)
    memory = scope.choices.pick(others) if others and scope.choices.flag() else x
    options = f"{width}, {heads}, batch_first=True" + (", bias=False" if scope.choices.flag(3) else "")
    if memory.shape[1] != width:
        options += f", kdim={memory.shape[1]}, vdim={memory.shape[1]}"
    layer = scope.layer("attention", f"nn.MultiheadAttention({options})")
    key = scope.read(memory)
    if not weights:
        return scope.assign(f"{layer}({name}, {key}, {key}, need_weights=False)[0]", x.shape)
    mixed, scores = scope.variable(), scope.variable()
    scope.write(f"{mixed}, {scores} = {layer}({name}, {key}, {key})")
    return scope.assign(f"{mixed} + {scores}.mean(-1, keepdim=True)", x.shape)


def _by_hand(scope: Scope, x: Value, heads: int, form: str) -> Value:
    """Linear queries, keys and values; fewer key heads in the grouped form."""
    length, width = x.shape
    size, kept, name = width // heads, 1 if form == "grouped" else heads, scope.read(x)
    q, k, v = (scope.attribute(letter) for letter in "qkv")
    if form == "fused":
        fused = scope.linear(width, 3 * width)
        scope.write(f"{q}, {k}, {v} = {fused}({name}).chunk(3, dim=-1)")
    else:
        for letter, outputs in ((q, width), (k, kept * size), (v, kept * size)):
            scope.write(f"{letter} = {scope.linear(width, outputs, bias=letter == q)}({name})")
    for letter, count in ((q, heads), (k, kept), (v, kept)):
        scope.write(f"{letter} = {letter}.view({letter}.shape[0], {length}, {count}, {size}).transpose(1, 2)")
    if kept != heads:
        repeated = scope.choices.pick((f"repeat_interleave({heads}, dim=1)", f"expand(-1, {heads}, -1, -1)"))
        scope.write(f"{k}, {v} = {k}.{repeated}, {v}.{repeated}")
    if form == "letters":
        scores = f'torch.einsum("bhne,bhme->bhnm", {q}, {k})'
        mixed = f"({scores} * {size**-0.5!r}).softmax(-1) @ {v}"
    else:
        mixed = f"F.scaled_dot_product_attention({q}, {k}, {v})"
    scope.write(f"{q} = {mixed}", f"{q} = {q}.transpose(1, 2).reshape({name}.shape[0], {length}, {width})")
    return scope.assign(f"{scope.linear(width, width)}({q})", x.shape, fresh=True)
