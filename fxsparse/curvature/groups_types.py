"""Which groups a parameter has: by the type of the module that holds it, never by its name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxsparse.curvature.arguments import check_kinds, check_names
from fxsparse.curvature.groups import Grouping, assigned, blocks, element, slices
from fxsparse.errors import ConfigError
from fxsparse.sparsity.counts import check_count

BUCKET_ABOVE = 50_000
BUCKET = 1000

GroupRule = Callable[[str, Tensor, nn.Module], "Grouping | Tensor | str | None"]
"""(name, parameter, its module) -> a grouping, an int64 index over leading axes, "element", or None for "auto"."""


@dataclass(frozen=True)
class Heads:
    """The attention heads of projections: which parameters they are, and how their rows or columns are laid out.

    Attributes:
        heads: number of query heads.
        kv_heads: number of key and value heads; `heads` where it is not given.
        queries: names of matrices whose rows are query heads.
        keys: names of matrices whose rows are key or value heads.
        outputs: names of matrices whose columns are query heads.
        fused: names of matrices whose rows are queries, keys and values together.
        interleaved: whether the rows of a fused matrix are sorted by key head, each with its queries, key and value,
            instead of all queries, all keys, all values.
        stored_transposed: whether the matrices are stored as (in, out).

    Raises:
        ConfigError: a number of heads below 1, `heads` that is no multiple of `kv_heads`, a string instead of names, or
            an argument of another type.
    """

    heads: int
    kv_heads: int | None = None
    queries: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    interleaved: bool = False
    stored_transposed: bool = False

    def __post_init__(self) -> None:
        for name in ("queries", "keys", "outputs", "fused"):
            object.__setattr__(self, name, check_names(getattr(self, name), name))
        check_count(self.heads, "heads", 1)
        if self.kv_heads is not None:
            check_count(self.kv_heads, "kv_heads", 1)
        check_kinds(bool, interleaved=self.interleaved, stored_transposed=self.stored_transposed)
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ConfigError(f"`heads` (={self.heads}) must be a multiple of `kv_heads` (={self.kv_heads})")

    def groupings(self, name: str, shape: tuple[int, ...]) -> tuple[Grouping, ...] | None:
        """The groupings of that parameter, or None where it is not one of these.

        Raises:
            ConfigError: its size is no multiple of the number of heads, or it has no columns.
        """
        own = self.kv_heads or self.heads
        if name in self.outputs and len(shape) < 2:
            raise ConfigError(f"`{name}` {shape} of `outputs` has no columns, which are heads there: leave it out")
        if not shape and name in (*self.queries, *self.keys, *self.fused):
            raise ConfigError(f"`{name}` {shape} of the declared heads is a single number: leave it out")
        out = 1 if self.stored_transposed and len(shape) > 1 else 0
        if name in self.queries:
            return (blocks("head", shape, out, _head_dim(name, shape[out], self.heads)),)
        if name in self.keys:
            return (blocks("head", shape, out, _head_dim(name, shape[out], own)),)
        if name in self.outputs:
            return (blocks("head", shape, 1 - out, _head_dim(name, shape[1 - out], self.heads)),)
        if name in self.fused:
            return self._fused(name, shape, out, own)
        return None

    def _fused(self, name: str, shape: tuple[int, ...], axis: int, own: int) -> tuple[Grouping, ...]:
        size = _head_dim(name, shape[axis], self.heads + 2 * own)
        if not self.interleaved:
            ends = [self.heads * size, (self.heads + own) * size, (self.heads + 2 * own) * size]
            starts = [0, *ends[:2]]
            kinds = zip(("q", "k", "v"), starts, ends, strict=True)
            return tuple(blocks(f"head:{kind}", shape, axis, size, first, last) for kind, first, last in kinds)
        shared = self.heads // own
        head = torch.arange(shape[axis]) // size
        place, group = head % (shared + 2), head // (shared + 2)
        none = torch.full_like(head, -1)
        indices = (
            ("q", torch.where(place < shared, group * shared + place, none), self.heads),
            ("k", torch.where(place == shared, group, none), own),
            ("v", torch.where(place == shared + 1, group, none), own),
        )
        return tuple(Grouping(f"head:{kind}", shape, axis, index, count) for kind, index, count in indices)


def _head_dim(name: str, size: int, heads: int) -> int:
    if size % heads:
        raise ConfigError(f"`{name}` has {size} rows or columns, no multiple of `heads` (={heads}): correct the layout")
    return size // heads


@dataclass(frozen=True)
class Reading:
    """How an operator reads a parameter, for those whose module says nothing.

    Attributes:
        axis: the axis of its output channels; "leading" for a transposed convolution.
        conv_groups: of a transposed convolution.
        tokens: whether it is a table of rows that are looked up.
        padding: the row of a table that no gradient reaches.
    """

    axis: int | str = 0
    conv_groups: int = 1
    tokens: bool = False
    padding: int | None = None


def groupings_of(
    model: nn.Module,
    names: Collection[str],
    groups: str | GroupRule = "auto",
    heads: Iterable[Heads] = (),
    readings: Mapping[str, Reading] | None = None,
) -> dict[str, tuple[Grouping, ...]]:
    """The groupings of parameters.

    Args:
        model: holds them.
        names: which ones, by first name.
        groups: "auto" by the type of the module, "element", or a rule.
        heads: declared attention layouts, which come before "auto".
        readings: how operators read the parameters, for modules of unknown types, and to tell whether a table's padding
            row is read elsewhere; a parameter that is read in several ways is left out.

    Raises:
        ConfigError: a declared layout does not fit or names no parameter.
    """
    check_groups(groups)
    declared = tuple(heads)
    known = dict(model.named_parameters(remove_duplicate=False))
    for each in declared:
        for name in (*each.queries, *each.keys, *each.outputs, *each.fused):
            if name not in known:
                raise ConfigError(f"`{name}` of the declared heads is no parameter of the model")
    places = _places(model)
    return {name: _of(name, places[id(known[name])], known[name], groups, declared, readings) for name in names}


def check_groups(groups: str | GroupRule) -> None:
    """Raise ConfigError unless `groups` is a known word or a function."""
    if not callable(groups) and groups not in ("auto", "element"):
        raise ConfigError(f"`groups` (={groups!r}) must be 'auto', 'element' or a function of name, parameter, module")


def aliases_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names of each parameter by the first one."""
    return {places[0].name: tuple(place.name for place in places) for places in _places(model).values()}


@dataclass(frozen=True, eq=False)
class _Place:
    name: str
    attribute: str
    owner: nn.Module
    parent: nn.Module | None


def _places(model: nn.Module) -> dict[int, list[_Place]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[int, list[_Place]] = {}
    for path, owner in modules.items():
        parent = modules[path.rpartition(".")[0]] if path else None
        for attribute, parameter in owner._parameters.items():
            if parameter is not None:
                name = f"{path}.{attribute}" if path else attribute
                found.setdefault(id(parameter), []).append(_Place(name, attribute, owner, parent))
    return found


def _of(
    name: str,
    places: list[_Place],
    parameter: Tensor,
    groups: str | GroupRule,
    heads: tuple[Heads, ...],
    readings: Mapping[str, Reading] | None,
) -> tuple[Grouping, ...]:
    shape = tuple(parameter.shape)
    if not isinstance(groups, str):
        chosen = groups(name, parameter, places[0].owner)
        if isinstance(chosen, Grouping):
            return (chosen,)
        if isinstance(chosen, Tensor):
            return (assigned("custom", shape, chosen),)
        if chosen is not None and chosen != "element":
            raise ConfigError(
                f"`groups` returned {chosen!r} for `{name}`: give a Grouping, an index, 'element' or None"
            )
        groups = "auto" if chosen is None else "element"
    if groups == "element":
        return (element(shape),)
    for each in heads:
        for place in places:
            declared = each.groupings(place.name, shape)
            if declared is not None:
                return declared
    if len(shape) <= 1:
        return (element(shape),)
    reading = None if readings is None else readings.get(name)
    row = _padding_row(places)
    if row is not None and (readings is None or (reading is not None and reading.padding == row)):
        return (_vocabulary(shape, row),)
    for place in places:
        typed = _by_type(place, shape)
        if typed is not None:
            return typed
    return (_by_reading(name, shape, places[0].owner, reading),)


def _padding_row(places: list[_Place]) -> int | None:
    """The padding row of all embeddings that hold a table; None where they differ, or others hold it too."""
    owners = [place.owner for place in places]
    rows = {each.padding_idx if isinstance(each, nn.Embedding | nn.EmbeddingBag) else None for each in owners}
    return rows.pop() if len(rows) == 1 else None


def _by_type(place: _Place, shape: tuple[int, ...]) -> tuple[Grouping, ...] | None:
    owner, attribute = place.owner, place.attribute
    if isinstance(owner, nn.MultiheadAttention):
        return _attention(attribute, shape, owner.num_heads)
    if isinstance(place.parent, nn.MultiheadAttention) and owner is place.parent.out_proj and attribute == "weight":
        return (blocks("head", shape, 1, shape[1] // place.parent.num_heads),)
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
        if attribute.startswith("weight_hr"):  # the projection of an LSTM's hidden state
            return (slices("channel", shape),)
        return (Grouping("unit", shape, 0, torch.arange(shape[0]) % owner.hidden_size, owner.hidden_size),)
    if attribute != "weight":
        return None
    if isinstance(owner, _ConvTransposeNd):
        return (_transposed(shape, owner.groups),)
    if isinstance(owner, (nn.Linear, _ConvNd)):
        return (slices("channel", shape),)
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return (_vocabulary(shape, None),)
    if isinstance(owner, (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return (element(shape),)
    return None


def _by_reading(name: str, shape: tuple[int, ...], owner: nn.Module, reading: Reading | None) -> Grouping:
    if reading is None:
        warnings.warn(
            f"`{name}` {shape} of a {type(owner).__name__} has axes of unknown meaning: every entry is a group of its "
            "own; give `groups` or `heads`",
            stacklevel=2,
        )
        return element(shape)
    if reading.tokens:
        return _vocabulary(shape, reading.padding)
    if reading.axis == "leading":
        return _transposed(shape, reading.conv_groups)
    assert isinstance(reading.axis, int)
    return slices("channel", shape, reading.axis)


def _transposed(shape: tuple[int, ...], conv_groups: int) -> Grouping:
    """Entry (in, j) of group q = in / (i/G) belongs to output channel q (o/G) + j."""
    fan_in, per_group = shape[:2]
    group = torch.arange(fan_in) // (fan_in // conv_groups)
    index = group[:, None] * per_group + torch.arange(per_group)
    return Grouping("channel", shape, "leading", index, conv_groups * per_group)


def _vocabulary(shape: tuple[int, ...], padding: int | None) -> Grouping:
    """Rows, or buckets of them; the padding row belongs to none."""
    large = shape[0] > BUCKET_ABOVE
    if padding is None and not large:
        return slices("token", shape)
    rows = torch.arange(shape[0])
    index = rows // BUCKET if large else rows.clone()
    if padding is not None:
        index[padding] = -1
    return Grouping(
        "vocab_bucket" if large else "token", shape, 0, index, int(rows[-1]) // BUCKET + 1 if large else shape[0]
    )


def _attention(attribute: str, shape: tuple[int, ...], heads: int) -> tuple[Grouping, ...]:
    if attribute == "in_proj_weight":
        third = shape[0] // 3
        return tuple(
            blocks(f"head:{kind}", shape, 0, third // heads, k * third, (k + 1) * third) for k, kind in enumerate("qkv")
        )
    if attribute in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        return (blocks("head", shape, 0, shape[0] // heads),)
    return (element(shape),)
