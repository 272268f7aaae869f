"""The steps on a model in memory: compacted, lowered, and the fastest of what may be written."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import onnx_ir as ir

from fxsparse import __version__
from fxsparse.errors import ExportError
from fxsparse.exporters.file_channels import Removal, remove_channels
from fxsparse.exporters.file_choose import LayerReport, choose
from fxsparse.exporters.file_clean import fold, share
from fxsparse.exporters.file_graph import opset, remove_unused
from fxsparse.exporters.file_inputs import Feed
from fxsparse.exporters.file_io import OnnxFile, session_of
from fxsparse.exporters.file_lower import Lowering
from fxsparse.exporters.file_report import FileLatency
from fxsparse.exporters.file_shapes import infer
from fxsparse.exporters.file_sizes import join_transpositions, settle_sizes
from fxsparse.exporters.file_supports import Key, layer_of, supports_of
from fxsparse.exporters.inputs import first_line
from fxsparse.exporters.runtime import interleaved, open_session

_LARGE = 2**28  # bytes of tensors from which on no more than two sessions are open at once
_SECONDS = 0.4  # for the whole files at one batch size
_BLOCK = 16  # channels that onnxruntime's convolutions take together
_NOISE = 1.15  # what a file that keeps dead channels has to gain
_OPSET = 11  # the first in which Gather, Split and Clip have the form that is written
PROPERTY = "fxsparse.optimized"


@dataclass(frozen=True)
class Options:
    """The arguments of `optimize_file`."""

    channels: bool
    lower: bool
    measure: bool
    verify: bool
    latency: bool
    batches: tuple[int, ...]
    threads: int
    sizes: Mapping[str, int]
    tolerance: float | None
    seed: int


@dataclass(eq=False)
class Work:
    """A model on its way, and what was done to it."""

    model: ir.Model
    folded: int = 0
    shared: int = 0
    removal: Removal | None = None
    layers: list[LayerReport] = field(default_factory=list)
    keys: dict[str, Key] = field(default_factory=dict)
    channels: bool = True
    multiple: int = 1
    us: float = 0.0
    notes: list[str] = field(default_factory=list)


def compacted_copy(model: ir.Model, options: Options, multiple: int = 1) -> Work:
    """A copy with folded constants and, where `channels` says so, without the channels that are not needed.

    Args:
        model: stays as it is.
        options: whether to remove channels.
        multiple: of this convolutions keep their channels, where they had such a number.
    """
    work = Work(model.clone(), channels=options.channels, multiple=multiple)
    infer(work.model)
    settled = settle_sizes(work.model)
    remove_unused(work.model.graph)
    work.folded, failure = fold(work.model)
    if settled or work.folded:
        infer(work.model)
    join_transpositions(work.model)
    if failure:
        work.notes.append(failure)
    remove_unused(work.model.graph)
    overridable = sum(value.is_initializer() for value in work.model.graph.inputs)
    if overridable:
        work.notes.append(f"{overridable} initializers are inputs as well: a caller may replace them, so they stay")
    if options.channels:
        work.removal = remove_channels(work.model, multiple)
    work.shared = share(work.model.graph)
    return work


def variants_of(model: ir.Model, feeds: Sequence[Feed], options: Options) -> list[Work]:
    """What may be written, the one that is expected to be fastest last.

    Removing channels may break groups of rows that share their zeros, so lowering is also tried without it; and blocks
    of channels that convolutions work in, so where all are timed there is one with whole blocks and one with all.
    """
    compacted = compacted_copy(model, options)
    rounded = _rounded(model, compacted, options)
    if not options.lower:
        return [compacted, *rounded]
    if opset(model) < _OPSET:
        for work in (compacted, *rounded):
            work.notes.append(
                f"operator set {opset(model)} is too old to lower products: export with {_OPSET} or newer"
            )
        return [compacted, *rounded]
    made = [_chosen(compacted, feeds, options)]
    if compacted.removal is not None and compacted.removal.channels:
        made.append(_chosen(compacted_copy(model, replace(options, channels=False)), feeds, options))
    best = min((work for work in made if work.keys or work is compacted), key=lambda work: work.us, default=compacted)
    others = [work for work in made if work.keys and work is not best]
    return [*([compacted] if best is not compacted else []), *rounded, *others, best]


def _rounded(model: ir.Model, compacted: Work, options: Options) -> list[Work]:
    """With some dead channels, and with all, where convolutions would lose the blocks that onnxruntime works in."""
    if compacted.removal is None or not options.latency or not compacted.removal.ragged:
        return []
    return [compacted_copy(model, options, _BLOCK), compacted_copy(model, replace(options, channels=False))]


def _chosen(compacted: Work, feeds: Sequence[Feed], options: Options) -> Work:
    """The same with shared supports lowered, where that is expected or measured to be faster."""
    choice = choose(compacted.model, feeds, measure=options.measure, threads=options.threads)
    compacted.layers, compacted.us = choice.reports, choice.us
    keys = {node.outputs[0].name or "": support.key for node, (_, support) in choice.lowered.items()}
    return applied(compacted, keys) if keys else compacted


def applied(compacted: Work, keys: Mapping[str, Key]) -> Work:
    """The same with some products lowered, by the names of their results and the keys of their supports."""
    model = compacted.model.clone()
    choices = {}
    for node in model.graph:
        wanted = keys.get(node.outputs[0].name or "") if node.outputs else None
        layer = layer_of(node) if wanted is not None else None
        if layer is None or wanted is None:
            continue
        support = next((each for each in supports_of(layer) if each.key[:3] == wanted[:3]), None)
        if support is not None:
            choices[node] = layer, replace(support, as_conv=wanted[3], inside=wanted[4])
    Lowering(model, choices).run()
    remove_unused(model.graph)
    return replace(
        compacted,
        model=model,
        keys=dict(keys),
        shared=compacted.shared + share(model.graph),
        notes=list(compacted.notes),
    )


def fastest(
    source: OnnxFile, variants: Sequence[Work], feeds: Sequence[Feed], sized: Sequence[int], options: Options
) -> tuple[Work, tuple[FileLatency, ...]]:
    """The fastest of the variants as a whole, and its times."""
    tables = _times(source, variants, feeds, options.threads)
    means = [statistics.geometric_mean([table[i + 1] for table, _ in tables]) for i in range(len(variants))]
    plain = [not work.keys and (work.multiple > 1 or work.channels != options.channels) for work in variants]
    best = min(range(len(variants)), key=lambda i: means[i] * (_NOISE if plain[i] else 1.0))
    work = variants[best]
    if not work.keys and any(variant.keys for variant in variants):
        work.layers = [_undone(layer) for layer in work.layers]
        work.notes.append("the lowered file was slower as a whole, so products stay dense")
    if options.channels and not work.channels:
        work.notes.append("without removed channels the file was faster, so they stay")
    if work.multiple > 1:
        work.notes.append(f"dead channels stay where convolutions are faster with a multiple of {work.multiple}")
    rows = [
        FileLatency(size, table[0], table[1], table[best + 1], options.threads, runs)
        for size, (table, runs) in zip(sized, tables, strict=True)
    ]
    return work, tuple(rows)


def _times(
    source: OnnxFile, variants: Sequence[Work], feeds: Sequence[Feed], threads: int
) -> list[tuple[list[float], int]]:
    """For each feed the median milliseconds of the source and of every variant, and the number of calls.

    All run in turn, call by call; of large files only two at a time, whose times are those of the source times ratios.
    """
    large = source.tensor_bytes > _LARGE
    groups = [[variant] for variant in variants] if large else [list(variants)]
    found: list[list[tuple[list[float], int]]] = []
    for group in groups:
        with ExitStack() as stack:
            sessions: list[Any] = [stack.enter_context(session_of(work.model, threads)) for work in group]
            sessions.insert(0, open_session(source.path, threads))
            column = []
            for feed in feeds:
                calls = {str(i): partial(_run, session, feed) for i, session in enumerate(sessions)}
                times = interleaved(calls, _SECONDS)
                medians = [1e3 * statistics.median(times[str(i)]) for i in range(len(sessions))]
                column.append((medians, len(times["0"])))
            found.append(column)
            sessions.clear()
    tables = []
    for row in zip(*found, strict=True):
        first, runs = row[0]
        others = [first[0] * each / times[0] for times, _ in row for each in times[1:]]
        tables.append(([first[0], *others], runs))
    return tables


def _run(session: Any, feed: Feed) -> None:
    try:
        session.run(None, feed)
    except Exception as error:  # onnxruntime's errors share no base class
        shapes = ", ".join(f"{name} {value.shape}" for name, value in feed.items())
        raise ExportError(f"onnxruntime stops on inputs {shapes} ({first_line(error)}): give sizes") from error


def _undone(layer: LayerReport) -> LayerReport:
    if layer.group is None:
        return layer
    return replace(layer, form="dense", group=None, k=None, reason="the whole file was slower")


def annotate(work: Work, source: OnnxFile) -> None:
    """Write into the model what was done to it."""
    said = {
        "version": __version__,
        "source": source.path.name,
        "folded": work.folded,
        "shared": work.shared,
        "channels": work.removal.channels if work.removal is not None else 0,
        "lowered": [layer.weight for layer in work.layers if layer.group is not None],
    }
    work.model.metadata_props[PROPERTY] = json.dumps(said, sort_keys=True, separators=(",", ":"))
