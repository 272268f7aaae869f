"""An ONNX file of any origin -> a smaller and faster one that computes the same."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxsparse.errors import ConfigError, ExportError
from fxsparse.exporters.file_report import FileLatency, FileReport
from fxsparse.exporters.runtime import open_session

if TYPE_CHECKING:
    from fxsparse.exporters.file_compare import Comparison
    from fxsparse.exporters.file_inputs import Feed
    from fxsparse.exporters.file_io import OnnxFile
    from fxsparse.exporters.file_work import Options, Work


def optimize_file(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    channels: bool = True,
    lower: bool = True,
    measure: bool = False,
    verify: bool = True,
    latency: bool = True,
    batches: Sequence[int] = (1, 16),
    threads: int = 1,
    sizes: Mapping[str, int] | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> FileReport:
    """Compact and lower an ONNX file that any tool wrote; the source stays as it is.

    1. Constants are computed ahead, where that does not enlarge the file.
    2. Channels that are constant (their weights are all zero) or that nobody reads are removed.
    3. Weights whose zeros are shared by groups of rows become a Gather and a batched MatMul or grouped Conv, where an
       estimate (`measure`: onnxruntime itself) says that this is faster.
    4. Equal initializers are stored once.

    Only the main graph changes. Nested graphs, functions, operators of other domains and operators without a rule stay,
    and the report names them. Step 2 takes inputs to be finite.

    Args:
        path: the source.
        out: the file to write; a file that is there is replaced, at the end and at once. Above 2 GB, and where the
            source has data files, the tensors lie in a data file beside it.
        channels: whether to do step 2.
        lower: whether to do step 3.
        measure: time every layer in onnxruntime instead of estimating.
        verify: compare with the source in onnxruntime on random inputs, and float64 copies of both, where these run,
            to 1e-12.
        latency: time source and result; a result that is slower than without step 3 is written without it.
        batches: batch sizes that count for step 3 and the times.
        threads: threads of onnxruntime.
        sizes: sizes of free axes by name.
        tolerance: relative difference allowed in the file's own precision; None derives it from the source's error
            against float64, or takes 1e-4 where that is not known.
        seed: of the random inputs.

    Returns:
        What was done and measured; print it.

    Raises:
        ExportError: the source cannot be read or run, the result differs, or the place cannot be written. Nothing is
            left behind, and what was at `out` stays.
        ConfigError: arguments that cannot be honoured; `out` is the source.
    """
    from fxsparse.exporters.file_compare import check_tolerance
    from fxsparse.exporters.file_io import check_out, read_file
    from fxsparse.exporters.file_work import Options

    if not batches or min(batches) < 1 or threads < 1:
        raise ConfigError(f"`batches` (={tuple(batches)}) and `threads` (={threads}) must be 1 or more")
    check_tolerance(tolerance)
    options = Options(
        channels, lower, measure, verify, latency, tuple(batches), threads, dict(sizes or {}), tolerance, seed
    )
    source, target = read_file(path), Path(out)
    check_out(source, target)
    return _optimize(source, target, options)


def _optimize(source: OnnxFile, out: Path, options: Options) -> FileReport:
    from fxsparse.exporters.external import LIMIT
    from fxsparse.exporters.file_compare import feeds_of, outputs_of
    from fxsparse.exporters.file_inputs import fillings, fitting, read_signature
    from fxsparse.exporters.file_io import place, tensor_bytes
    from fxsparse.exporters.file_proof import verified
    from fxsparse.exporters.file_wire import forget
    from fxsparse.exporters.file_work import annotate, fastest, variants_of

    signature = read_signature(source.model, options.sizes)
    runs = options.verify or options.latency or options.measure
    first = signature.fixed_batch or options.batches[0]
    drawn: list[Feed] = []
    if runs:
        session = _opened(source)
        filling = fitting(session, signature, first, options.seed)
        drawn = feeds_of(session, signature, seed=options.seed) if options.verify else []
        expected = outputs_of(session, drawn)
        del session  # of large files no two copies are held at once, but to time them
    else:
        filling, expected = next(fillings(signature)), []
    sized = [signature.fixed_batch] if signature.fixed_batch is not None else list(options.batches)
    feeds = [signature.draw(size, options.seed, filling) for size in sized]

    variants = variants_of(source.model, feeds, options)
    work = variants[-1]
    times: tuple[FileLatency, ...] = ()
    if options.latency:
        work, times = fastest(source, variants, feeds, sized, options)
    variants.clear()
    annotate(work, source)
    found: list[Comparison] = []

    def check(temporary: Path) -> None:
        forget(source.model)
        forget(work.model)
        if options.verify:
            found.append(verified(source.model, expected, temporary, work, drawn, options))

    external = bool(source.data) or tensor_bytes(work.model) > LIMIT
    place(work.model, out, check, external=external)
    return _report(source, out, work, found, times)


def _report(
    source: OnnxFile, out: Path, work: Work, found: Sequence[Comparison], times: tuple[FileLatency, ...]
) -> FileReport:
    from fxsparse.exporters.file_io import read_file
    from fxsparse.exporters.file_rules import without_rule

    removal = work.removal
    return FileReport(
        source=source.path,
        path=out,
        source_bytes=source.bytes,
        bytes=read_file(out).bytes,
        source_nodes=len(source.model.graph),
        nodes=len(work.model.graph),
        folded=work.folded,
        shared=work.shared,
        channels=removal.channels if removal is not None else 0,
        resized=removal.weights if removal is not None else {},
        layers=tuple(work.layers),
        stops=tuple(dict.fromkeys(map(str, removal.stops))) if removal is not None else (),
        left=without_rule(work.model.graph),
        verification=found[0] if found else None,
        latency=times,
        notes=tuple(work.notes),
    )


def _opened(source: OnnxFile) -> Any:
    try:
        return open_session(source.path)
    except ExportError as error:
        from fxsparse.exporters.file_graph import ONNX

        foreign = sorted({f"{n.domain}.{n.op_type}" for n in source.model.graph if n.domain not in ONNX})
        named = f"; its operators of other domains are {', '.join(foreign)}" if foreign else ""
        raise ExportError(
            f"{error}{named}. Without a run nothing can be verified or timed: leave both out to go on unverified"
        ) from error
