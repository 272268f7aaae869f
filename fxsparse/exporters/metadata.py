"""What an exported file says about itself: masks, densities and provenance, as JSON in `metadata_props`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fxsparse import __version__
from fxsparse.errors import ExportError
from fxsparse.exporters.placement import Placement
from fxsparse.graph import graphs_of, provenance
from fxsparse.nn import MaskedWeight
from fxsparse.sparsity import Mask, MaskSet

SCHEMA = "fxsparse.onnx/1"
_PREFIX = "fxsparse."


@dataclass(frozen=True)
class Layer:
    """One masked weight.

    Attributes:
        name: name of the parameter.
        shape: its shape.
        alive: number of alive entries.
        numel: number of entries.
        pattern: its pattern, as written in Python.
        route: where the mask took effect in training.
        initializers: initializers of the file that store it whole, each with the order of its axes there.
        parts: where none holds it whole, initializers that hold its rows, among others, or what compaction left of it.
    """

    name: str
    shape: tuple[int, ...]
    alive: int
    numel: int
    pattern: str
    route: str
    initializers: Mapping[str, tuple[int, ...]]
    parts: tuple[str, ...] = ()

    @property
    def density(self) -> float:
        """Alive fraction, in [0, 1]."""
        return self.alive / self.numel if self.numel else 1.0


def layers_of(
    weights: Mapping[str, MaskedWeight],
    placements: Sequence[Placement],
    stored: Mapping[str, MaskedWeight] | None = None,
) -> tuple[Layer, ...]:
    """One row for each masked weight, in the order of the model.

    Args:
        weights: The masked weights of the model.
        placements: Where they lie.
        stored: The weights as they were exported, None for `weights`; of what was cut shorter, the file holds a part.
    """
    found = weights if stored is None else stored
    cut = {name for name, weight in weights.items() if name in found and found[name].mask.shape != weight.mask.shape}
    return tuple(
        Layer(
            name=name,
            shape=tuple(weight.weight.shape),
            alive=int(weight.mask.sum()),
            numel=weight.mask.numel(),
            pattern=str(weight.spec.pattern),
            route=weight.spec.route.value,
            initializers={
                p.initializer: p.axes for p in placements if p.weight == name and not p.part and name not in cut
            },
            parts=tuple(p.initializer for p in placements if p.weight == name and (p.part or name in cut)),
        )
        for name, weight in weights.items()
    )


def digest_of(weights: Mapping[str, MaskedWeight]) -> str:
    """SHA-256 over names, shapes and bits of all masks, as in a ticket."""
    return MaskSet({name: Mask(weight.mask) for name, weight in weights.items()}).digest()


def describe(
    model: nn.Module,
    layers: Sequence[Layer],
    digest: str,
    batch: str,
    lineage: Mapping[str, Any],
    target: str = "stock",
    axes: Mapping[str, Mapping[int, str]] | None = None,
    variant: str = "",
    extra: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, str]:
    """The entries of `metadata_props`: plain text, equal for equal models and versions.

    Args:
        model: the model before its masks were folded; the records on its graph nodes are kept.
        layers: its masked weights.
        digest: `digest_of` its masks.
        batch: "dynamic", or the fixed size.
        lineage: where the model comes from, plain JSON values; may be empty.
        target: the runtime that the file is made for.
        axes: input name -> its free axes.
        variant: what was done to the model before the export, in words.
        extra: layer's name -> more entries of its row.
    """
    more = extra or {}
    records = [
        {"graph": path, "node": node.name, "pass": record.pass_name, "what": record.what, "source": record.source}
        for path, graph_module in graphs_of(model).items()
        for node in graph_module.graph.nodes
        if (record := provenance.read(node)) is not None
    ]
    alive, numel = sum(layer.alive for layer in layers), sum(layer.numel for layer in layers)
    entries = {
        "schema": SCHEMA,
        "version": __version__,
        "torch": torch.__version__,
        "batch": batch,
        "target": target,
        "variant": variant,
        "axes": _json(
            {name: {str(axis): free for axis, free in found.items()} for name, found in (axes or {}).items()}
        ),
        "layers": _json(
            [asdict(layer) | {"density": layer.density} | dict(more.get(layer.name, {})) for layer in layers]
        ),
        "density": _json(alive / numel if numel else 1.0),
        "mask_digest": digest,
        "provenance": _json(records),
        "lineage": _json(dict(lineage)),
    }
    return {_PREFIX + key: value for key, value in entries.items()}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What fxsparse wrote into an ONNX file.

    Returns:
        ``schema``, ``version``, ``torch``, ``batch``, ``target``, ``variant``, ``mask_digest`` (text), ``density``
        (float), ``axes`` (input name -> axis, as text -> name of its free size), ``layers`` (a dict for each masked
        weight: name, shape, alive, numel, density, pattern, route, initializers, parts, form, two_four),
        ``provenance`` (a dict for each graph node that a pass made: graph, node, pass, what, source) and ``lineage``
        (a dict, as given).

    Raises:
        ExportError: when the file cannot be read, or was not written by fxsparse.
    """
    import onnx

    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except Exception as error:  # the parser's own error shares no base class with OSError
        message = f"`path` (={path}) cannot be read as ONNX ({type(error).__name__}): export it again"
        raise ExportError(message) from error
    found = metadata_of(model)
    if found is None:
        raise ExportError(f"`path` (={path}) has no metadata of schema {SCHEMA}: it was not written by this fxsparse")
    return found


def metadata_of(model: Any) -> dict[str, Any] | None:
    """What `read_metadata` gives, of a loaded `onnx.ModelProto`; None where it was not written by this fxsparse."""
    props = {entry.key: entry.value for entry in model.metadata_props}
    found = {key.removeprefix(_PREFIX): value for key, value in props.items() if key.startswith(_PREFIX)}
    if found.get("schema") != SCHEMA:
        return None
    parsed = ("layers", "density", "provenance", "lineage", "axes")
    return found | {key: json.loads(found[key]) for key in parsed if key in found}


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
