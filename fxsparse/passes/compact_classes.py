"""Facts about the classes of a model's channels that stay the same while it is solved which of them go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fxsparse.graph.channels import Channels
from fxsparse.graph.channels_atoms import FIXED, Labels, Relation
from fxsparse.passes.compact_sinks import Bools

Place = tuple[str, int]
"""A parameter or buffer, and one of its dimensions."""


def free_classes(channels: Channels, only: Mapping[Place, Sequence[int]] | None) -> Bools:
    """The classes that may go: those that are not fixed, of the dimensions' indices the given ones, and factors."""
    free = ~channels.fixed
    free[FIXED] = False
    if only is None:
        return free
    chosen = np.zeros(free.size, dtype=bool)
    for relation in channels.relations:
        for factor in relation.factors:
            if factor is not None:
                chosen[channels.classes[factor]] = True  # they go where all their entries do
    for dims in channels.sources.values():
        for labels in dims:
            if labels is not None:
                chosen[channels.classes[labels]] = False
    for (name, dim), indices in only.items():
        labels = channels.sources[name][dim]
        if labels is not None:
            chosen[channels.classes[labels[np.array(indices, dtype=np.int64)]]] = True
    result: Bools = free & chosen
    return result


def even_tables(channels: Channels, classes: Labels) -> set[Relation]:
    """Products of two factors of which the inner one occurs nowhere else, so that its runs need not be alike.

    The outputs of a grouped convolution are such: each group may keep its own, if all keep as many.
    """
    uses = np.zeros(channels.flow.atoms.count, dtype=np.int64)
    seen: dict[int, Labels] = {}
    for held in (*channels.flow.dims.values(), *channels.sources.values()):
        for dims in held if isinstance(held, list) else [held]:
            seen.update((id(labels), labels) for labels in dims or () if labels is not None)
    for labels in (*seen.values(), *(mixing.labels for mixing in channels.flow.mixings)):
        uses[classes[labels]] += 2
    uses[channels.fixed] += 2
    for relation in channels.relations:
        for factor in relation.factors:
            if factor is not None:
                uses[classes[factor]] += 1
    return {
        relation
        for relation in channels.relations
        if relation.flat.ndim == 2
        and relation.factors[1] is not None
        and (uses[classes[relation.factors[1]]] == 1).all()
    }


def distinct_lists(channels: Channels, classes: Labels) -> list[Labels]:
    """The classes of every different dimension of a value; of each, one channel must stay."""
    seen: dict[int, Labels] = {}
    for held in channels.flow.dims.values():
        for dims in held if isinstance(held, list) else [held]:
            for labels in dims or ():
                if labels is not None:
                    seen[id(labels)] = labels
    lists = [classes[labels] for labels in seen.values() if labels.size]
    return [labels for labels in lists if not channels.fixed[labels].any()]
