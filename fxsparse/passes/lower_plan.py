"""Which layers a model has, what they could become, and what they shall."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from fxsparse.errors import ConfigError
from fxsparse.graph import edit
from fxsparse.nn import masked_weights
from fxsparse.passes.lower_cost import CostRule
from fxsparse.passes.lower_emit import Lowered
from fxsparse.passes.lower_forms import Form, Layer, LayerRecord, Policy
from fxsparse.passes.lower_sites import Constants, Site, find_sites, widened
from fxsparse.passes.lower_support import Support, find_support
from fxsparse.passes.lower_values import sizes_of

_ALIGNED = 16  # channels for which runtimes have blocked convolutions
_STRETCH = 1.4  # how much larger a group may get to have them
_RANKS = (1, 5)  # axes that the input of a lowered linear layer may have
_NONE = "no speed-up expected: "


@dataclass(frozen=True, eq=False)
class KnownMask:
    """A mask of a parameter.

    Attributes:
        mask: Bool, the shape of the parameter.
        row_order: The order in which its rows share supports, where one is known.
    """

    mask: Tensor
    row_order: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight, with all its uses.

    Attributes:
        layer: What is known about it.
        sites: Its uses.
        supports: The groups of each of the tensors that the sites read, by the node that makes it; () if DENSE is all.
        trainable: Whether it is trained.
        tensors: Names of the tensors of the lowered form, by the node that makes the weight; filled when written.
        said: Its groups in words, where `supports` does not tell.
    """

    layer: Layer
    sites: tuple[Site, ...]
    supports: Mapping[fx.Node, Support]
    trainable: bool
    tensors: dict[fx.Node, dict[str, str]] = field(default_factory=dict)
    said: str = ""

    @property
    def groups(self) -> str:
        """Its groups in words."""
        return self.said or "; ".join(dict.fromkeys(str(support) for support in self.supports.values()))

    def lowered(self, form: Form) -> list[Lowered]:
        """Its sites in a form, not DENSE."""
        return [
            Lowered(
                site,
                form,
                self.supports[site.weight_node],
                self.trainable,
                self.tensors.setdefault(site.weight_node, {}),
            )
            for site in self.sites
            if site.weight_node in self.supports
        ]


def weights_of(module: fx.GraphModule, masks: Mapping[str, KnownMask], constants: Constants) -> list[Weight]:
    """The weights of an exported module that products read, in its order."""
    by_name: dict[str, list[Site]] = {}
    for site in find_sites(module, constants):
        by_name.setdefault(site.name, []).append(site)
    masked = _MaskValues(module, masks)
    return [_weight(module, name, sites, masks.get(name), masked) for name, sites in by_name.items()]


class _MaskValues(Constants):
    """What becomes of masks on the way from the parameters to the products."""

    def __init__(self, module: fx.GraphModule, masks: Mapping[str, KnownMask]) -> None:
        super().__init__(module)
        self.masks = masks

    def _evaluate(self, node: fx.Node) -> Tensor | None:
        if node.op == "get_attr":
            known = self.masks.get(str(node.target))
            return None if known is None else known.mask
        return super()._evaluate(node)

    def follows(self, node: fx.Node) -> bool:
        """Only what moves entries keeps a mask one."""
        return str(node.target).split(".")[1] in _MOVES


_MOVES = frozenset(
    "t transpose permute view reshape slice select squeeze unsqueeze alias clone split split_with_sizes chunk unbind "
    "unflatten flatten".split()
)


def _weight(
    module: fx.GraphModule, name: str, sites: list[Site], known: KnownMask | None, masked: _MaskValues
) -> Weight:
    parameter = edit.resolve(module, name)
    assert isinstance(parameter, Tensor)
    supports: dict[fx.Node, Support] = {}
    for site in sites:
        if site.weight_node not in supports:
            order = known.row_order if known is not None else None
            found = support_of(site.weight, site.groups, masked(site.weight_node), order)
            if found is not None:
                supports[site.weight_node] = found
    uses = [
        Use(site.kind, tuple(size.hint for size in sizes_of(site.input) or ()), site.columns, site.groups, site.weight)
        for site in sites
    ]
    found_all = [supports.get(site.weight_node) for site in sites]
    return Weight(layer_of(name, parameter, uses, found_all), tuple(sites), supports, parameter.requires_grad)


def support_of(weight: Tensor, groups: int, mask: Tensor | None, row_order: Tensor | None) -> Support | None:
    """The groups of a weight (rows, positions of a group, *kernel); None where there are none.

    Args:
        weight: The weight.
        groups: Groups of its convolution.
        mask: Where it is alive, if that is known; else where it is not zero.
        row_order: The order of its rows in which groups are likely.
    """
    rows, inputs = weight.shape[:2]
    if weight.is_meta or weight.is_complex():
        return None
    candidates = [weight.detach() != 0]
    if mask is not None and mask.shape != weight.shape and mask.ndim == 2:
        mask = mask.t()
    if mask is not None and mask.shape == weight.shape:
        candidates.insert(0, mask)
    order = row_order if row_order is not None and len(row_order) == rows else None
    for alive in candidates:
        flat = alive.flatten(2).any(2) if alive.ndim > 2 else alive
        found = find_support(widened(flat, groups), order, rows * inputs)
        if found is not None:
            return _aligned(weight, found)
    return None


def _aligned(weight: Tensor, support: Support) -> Support:
    """With k padded for a convolution that profits."""
    if math.prod(weight.shape[2:]) == 1:
        return support
    wide = support.aligned(_ALIGNED)
    whole = all(batch.group % _ALIGNED == 0 for batch in support.batches)
    return wide if whole and wide.macs <= _STRETCH * support.macs else support


@dataclass(frozen=True, eq=False)
class Use:
    """One product with a weight.

    Attributes:
        kind: "linear" or "conv".
        shape: The shape of the input on the example inputs.
        columns: Columns of the product.
        groups: Groups of the convolution.
        weight: What is multiplied by: the parameter, or what is computed from it.
    """

    kind: str
    shape: tuple[int, ...]
    columns: int
    groups: int
    weight: Tensor


def layer_of(name: str, parameter: Tensor, uses: Sequence[Use], supports: Sequence[Support | None]) -> Layer:
    """What is known about a weight, given the groups at each of its uses."""
    alive = int((parameter.detach() != 0).sum()) if not parameter.is_meta else parameter.numel()
    found = list({id(support): support for support in supports if support is not None}.values())
    groups = sum(batch.groups for support in found for batch in support.batches)
    reason = _reason(parameter, alive, uses, supports)
    return Layer(
        name=name,
        kind=uses[0].kind,
        shape=tuple(parameter.shape),
        inputs=tuple(use.shape for use in uses),
        columns=sum(use.columns for use in uses),
        density=alive / max(1, parameter.numel()),
        forms=(Form.DENSE, *(() if reason else _forms(uses))),
        reason=reason,
        kernel=math.prod(uses[0].weight.shape[2:]),
        groups=groups,
        group=max((batch.group for support in found for batch in support.batches), default=0),
        k=sum(support.gathered for support in found) / groups if groups else 0.0,
        batches=sum(len(support.batches) for support in found),
        macs=sum(support.macs for support in found),
    )


def _forms(uses: Sequence[Use]) -> tuple[Form, ...]:
    products = uses[0].kind == "linear" and min(len(use.shape) for use in uses) >= 2
    return (Form.GATHER_CONV, Form.GATHER_MATMUL) if products else (Form.GATHER_CONV,)


def _reason(parameter: Tensor, alive: int, uses: Sequence[Use], supports: Sequence[Support | None]) -> str:
    if alive == parameter.numel():
        return f"{_NONE}nothing in it is dead"
    if any(support is None for support in supports):
        if any(use.groups > 1 and use.weight.shape[1] == 1 for use in uses):
            return f"{_NONE}it is depthwise, a channel reads only one other"
        return f"{_NONE}no groups of its rows share a support that is small enough"
    ranks = [len(use.shape) for use in uses]
    if uses[0].kind == "linear" and not all(_RANKS[0] <= rank <= _RANKS[1] for rank in ranks):
        return f"{_NONE}its input has {max(ranks)} axes, a convolution takes at most {_RANKS[1]}"
    return ""


def choices(weights: Sequence[Weight], choose: Mapping[str, Form] | Policy | None) -> dict[str, Form]:
    """The form of each weight.

    Raises:
        ConfigError: a name that is no weight, or a form that is not legal there.
    """
    layers = {weight.layer.name: weight.layer for weight in weights}
    rule = CostRule()
    if isinstance(choose, Mapping):
        unknown = [name for name in choose if name not in layers]
        if unknown:
            close = difflib.get_close_matches(str(unknown[0]), layers) or list(layers)[:3]
            raise ConfigError(f"`choose` names `{unknown[0]}`, which no product reads; close names: {', '.join(close)}")
        result = {name: choose[name] if name in choose else rule(layer) for name, layer in layers.items()}
    elif choose is None or callable(choose):
        result = {name: (choose or rule)(layer) for name, layer in layers.items()}
    else:
        raise ConfigError(f"`choose` (={choose!r}) must be a mapping of names to forms, a policy or None")
    for name, form in result.items():
        if not isinstance(form, Form) or form not in layers[name].forms:
            legal = ", ".join(str(each) for each in layers[name].forms)
            why = f" ({layers[name].reason})" if layers[name].reason else ""
            raise ConfigError(f"`{name}` cannot take the form {form!r}: legal are {legal}{why}")
    return result


def record(weight: Weight, form: Form, chosen: bool) -> LayerRecord:
    """What is said about one weight.

    Args:
        weight: The weight.
        form: Its form.
        chosen: Whether the caller chose it.
    """
    layer, rule = weight.layer, CostRule()
    names = tuple(name for tensors in weight.tensors.values() for name in tensors.values())
    if form is not Form.DENSE:
        dense, lowered = rule.dense(layer), rule.lowered(layer)
        reason = f"about {lowered:.0f} us instead of {dense:.0f} us on one thread"
        return LayerRecord(layer.name, form, layer, f"{form.value}, {weight.groups}", reason, dense / lowered, names)
    reason = layer.reason
    if not reason:
        best = max(rule.gain(layer, each) for each in layer.forms[1:])
        reason = f"{_NONE}{'chosen so, ' if chosen else ''}the lowered form would be {best:.2f} times as fast"
    return LayerRecord(layer.name, Form.DENSE, layer, "stays dense", reason)


def unread(masks: Mapping[str, KnownMask], weights: Sequence[Weight]) -> list[LayerRecord]:
    """A record for each masked weight that no product reads."""
    found = {weight.layer.name for weight in weights}
    reason = f"{_NONE}it is not the weight of a linear layer or convolution"
    return [
        LayerRecord(name, Form.DENSE, _bare(name, known.mask), "stays dense", reason)
        for name, known in masks.items()
        if name not in found
    ]


def _bare(name: str, mask: Tensor) -> Layer:
    density = float(mask.sum()) / max(1, mask.numel()) if not mask.is_meta else math.nan
    return Layer(name, "other", tuple(mask.shape), (), 0, density)


def known_masks(model: nn.Module) -> dict[str, KnownMask]:
    """The masks of a model by their parameter's name."""
    return {
        name: KnownMask(weight.mask.detach().clone(), weight.row_order)
        for name, weight in masked_weights(model).items()
        if not weight.mask.is_meta
    }
