"""The proof that a rewritten ONNX model computes what its source computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from fxsparse.errors import ExportError
from fxsparse.exporters.file_compare import (
    Comparison,
    Difference,
    allowed_for,
    blind,
    check_equal,
    differences,
    outputs_of,
    relative_to,
    widest,
)
from fxsparse.exporters.file_double import CannotRun, double, runner_of
from fxsparse.exporters.file_graph import Array
from fxsparse.exporters.file_inputs import Feed
from fxsparse.exporters.file_supports import Key
from fxsparse.exporters.file_work import Options, Work, applied, compacted_copy
from fxsparse.exporters.runtime import open_session


def verified(
    model: ir.Model,
    outputs: Sequence[Sequence[Array]],
    made: Path,
    work: Work,
    drawn: Sequence[Feed],
    options: Options,
) -> Comparison:
    """The comparison with the source.

    Args:
        model: the source.
        outputs: what a session of it gives.
        made: the file that was written.
        work: what was done.
        drawn: inputs of the outputs.
        options: seed and tolerance.

    Raises:
        ExportError: they differ by more than is allowed.
    """
    unseen = blind(outputs)
    single, constant = differences(outputs, open_session(made), drawn)
    exact: Difference | None = None
    own: float | None = None
    reason = ""
    try:
        exact, own = _in_double(model, outputs, work, drawn, options)
    except _Unavailable as error:
        reason = str(error)
    allowed = allowed_for(own, options.tolerance)
    check_equal(single, allowed, exact)
    sizes = [len(next(iter(feed.values()))) if feed and next(iter(feed.values())).ndim else 1 for feed in drawn]
    return Comparison(sum(sizes), tuple(dict.fromkeys(sizes)), single, allowed, exact, reason, constant, unseen)


class _Unavailable(Exception):
    """A float64 copy cannot be made or run."""


def _in_double(
    model: ir.Model, outputs: Sequence[Sequence[Array]], work: Work, feeds: Sequence[Feed], options: Options
) -> tuple[Difference, float]:
    """The same steps on a float64 copy: their worst difference, and the source's own error in its precision."""
    wide = [widest(feed) for feed in feeds]
    try:
        before = double(model)
        with runner_of(before) as a:
            expected = outputs_of(a, wide)
            own = max(relative_to(exact, single) for exact, single in zip(expected, outputs, strict=True))
            after = compacted_copy(before, replace(options, channels=work.channels), work.multiple)
            return _compared(after, work.keys, expected, wide), own
    except ExportError as error:
        if "verification failed" in str(error):
            raise
        raise _Unavailable(str(error)) from error


def _compared(
    after: Work, keys: Mapping[str, Key], expected: Sequence[Sequence[Array]], feeds: Sequence[Feed]
) -> Difference:
    """The worst difference of the rewritten float64 model.

    onnxruntime has no convolutions of float64 numbers; where nothing else runs those of lowered layers either, the same
    groups are computed by batched products.
    """
    made = applied(after, keys) if keys else after
    try:
        with runner_of(made.model) as runner:
            return differences(expected, runner, feeds)[0]
    except CannotRun:
        plain = {name: (*key[:3], False, key[4]) for name, key in keys.items()}
        if plain == dict(keys):
            raise
    return _compared(after, plain, expected, feeds)
