"""A trained sparse model -> one verified ONNX file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fxsparse.errors import ConfigError
from fxsparse.exporters.agreement import read_calibration
from fxsparse.exporters.attempts import Free, Settings
from fxsparse.exporters.autotune import DEFAULT_BUDGET, Tuner
from fxsparse.exporters.axes import Axes, check_form
from fxsparse.exporters.candidates import Kitchen, Plan
from fxsparse.exporters.external import beside, staging
from fxsparse.exporters.files import replacing
from fxsparse.exporters.finish import Job, counted, finish, micro_quantizer
from fxsparse.exporters.prepare import prepare
from fxsparse.exporters.program import check_opset
from fxsparse.exporters.reference import Verification
from fxsparse.exporters.report import ExportReport
from fxsparse.exporters.targets import Dynamic, Int8, Optimize, Target
from fxsparse.graph import preserved_rng

_LARGE = 10**8  # MACs of one sample from which on every run counts


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    target: Target = Target.STOCK,
    verify: bool | Verification = True,
    opset: int | None = None,
    latency: bool = True,
    lineage: Mapping[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
    int8: Int8 | None = None,
    compact: bool | None = None,
    lower: bool | None = None,
    optimize: Optimize | None = None,
    budget: float | None = None,
    dynamic: Axes = Dynamic.BATCH,
    sparse_initializers: bool = False,
    external_data: bool | None = None,
) -> ExportReport:
    """Export a model compacted, lowered and folded, check it in onnxruntime, and only then put it at `path`.

    The model is exported as it is in eval mode on the CPU; it stays as it was, and so does all global state. Dead
    weights are zeros in the file, and its `metadata_props` hold densities, mask digest and provenance
    (`read_metadata`). Where a rewrite (compaction, lowering) cannot be exported or verified, the model is exported
    without it, and the report says so.

    Args:
        model: any module, with masks or without.
        path: the file to write; a file that is there is replaced, at the end and at once.
        example_inputs: a tuple of positional inputs, or ``(args, kwargs)``. Latencies are measured on them, and the
            autotuner tunes for them: give the batch size that counts.
        target: the runtime that the file is made for.
        verify: True to compare onnxruntime with PyTorch in float64 on random inputs, fewer for a model of more than a
            hundred million MACs; a `Verification` to say on which. Of an 8-bit target the float file is compared so,
            and the 8-bit one on the calibration data, within the bounds of `int8`.
        opset: ONNX operator set, 18 or newer; None for torch's default.
        latency: whether to time the file against its dense twin, for about half a second.
        lineage: where the model comes from, as plain JSON values, for the metadata; a ticket's id and lineage, say.
        calibration: for `Target.INT8` (needed) and `Target.INT8_DYNAMIC` (for the comparison): typical inputs, each
            item like `example_inputs`, with any batch size where the batch is dynamic; or bare tensors.
        int8: options of the 8-bit targets.
        compact: whether dead channels are cut out first (see `fxsparse.compact`); None where there are some and the
            target is not TensorRT.
        lower: whether layers of shared support become gathers and small products; None where there are some and the
            target is not TensorRT.
        optimize: what the autotuner makes small; None for no tuning. It measures every layer alone in each legal form
            in onnxruntime, then the whole files, and keeps the best.
        budget: seconds that the measurements of single layers may take together, 60 by default.
        dynamic: which axes of the inputs are free: a rule, or input name -> axis -> name of the free size. Named axes
            are free in the file or the export fails; the rules give way, and the report says so.
        sparse_initializers: whether float weights are stored by their alive entries where that is smaller. onnxruntime
            makes them dense when it loads the file; a call is not faster.
        external_data: whether the weights go to a file of their own beside `path`, ``<name>.<digest>.data``; None where
            one file cannot hold them (2 GiB).

    Returns:
        What was written and measured; print it.

    Raises:
        ExportError: anything that keeps a verified file from being written: torch or onnxruntime refuses, `opset` is
            too old, an output is no tensor, values differ, a resurrection phase is open, weights are not finite, an
            8-bit file is too far from the model, the place cannot be written. Nothing is left behind, and what was at
            `path` stays.
        ConfigError: arguments of the wrong form, or that exclude each other.
        DataError: calibration data that is empty, does not fit, or on which the model gives no finite number.
    """
    path = Path(path)
    _check_options(target, verify, int8, optimize, budget, dynamic)
    _check_together(target, calibration, int8, lower, optimize, budget, sparse_initializers)
    plain = _plain(lineage)
    check_opset(opset)
    options = int8 or Int8()
    with beside(path) as put, replacing(path) as temporary, staging(path) as folder, preserved_rng():
        subject = prepare(model, example_inputs, dynamic)
        macs = counted(subject)
        job = Job(path, target, subject, plain, macs, latency, sparse_initializers)
        batches = None
        if calibration is not None:
            batches = read_calibration(calibration, subject.inputs, options.batches)
        tuner = None
        if optimize is not None:
            twin = micro_quantizer(target, options, folder) if target.is_int8 else None
            tuner = Tuner(optimize, DEFAULT_BUDGET if budget is None else budget, twin)
        plan = Plan(
            target=target,
            settings=Settings(
                opset,
                _options(verify, macs[0]),
                job.annotate,
                external_data,
                Free.NONE if isinstance(dynamic, Dynamic) else Free.ALL,
            ),
            compact=_asked(compact, target),
            lower=_asked(lower, target),
            int8=options,
            batches=batches,
            tuner=tuner,
        )
        kitchen = Kitchen(subject, plan, folder, path.name)
        return finish(job, kitchen, kitchen.best(), temporary, put)


def _asked(wanted: bool | None, target: Target) -> bool | None:
    return False if wanted is None and target is Target.TENSORRT else wanted


def _check_options(
    target: Target, verify: object, int8: object, optimize: object, budget: object, dynamic: object
) -> None:
    if not isinstance(target, Target):
        raise ConfigError(f"`target` (={target!r}) must be one of {', '.join(map(str, Target))}")
    if not isinstance(verify, bool | Verification):
        raise ConfigError(f"`verify` (={verify!r}) must be True, False or a Verification")
    if int8 is not None and not isinstance(int8, Int8):
        raise ConfigError(f"`int8` (={int8!r}) must be an Int8")
    if optimize is not None and not isinstance(optimize, Optimize):
        raise ConfigError(f"`optimize` (={optimize!r}) must be one of {', '.join(map(str, Optimize))}, or None")
    if budget is not None and optimize is None:
        raise ConfigError(f"`budget` (={budget!r}) is for `optimize`: name what to optimise, or leave it out")
    if budget is not None:
        Tuner(Optimize.LATENCY, budget)  # type: ignore[arg-type]  # it checks the value
    check_form(dynamic)


def _check_together(
    target: Target,
    calibration: Iterable[Any] | None,
    int8: Int8 | None,
    lower: bool | None,
    optimize: Optimize | None,
    budget: float | None,
    sparse_initializers: bool,
) -> None:
    if target is Target.INT8 and calibration is None:
        raise ConfigError(f"`target` (={target}) needs `calibration`: give typical inputs, or use Target.INT8_DYNAMIC")
    if not target.is_int8 and (calibration is not None or int8 is not None):
        given = "calibration" if calibration is not None else "int8"
        raise ConfigError(f"`{given}` is for the 8-bit targets, `target` is {target}: leave it out, or use Target.INT8")
    if target is Target.TENSORRT and lower:
        raise ConfigError(f"`lower` (={lower}) excludes `target` (={target}), which needs 2:4 weights as they are")
    if sparse_initializers and target in (Target.TENSORRT, Target.INT8, Target.INT8_DYNAMIC):
        raise ConfigError(
            f"`sparse_initializers` (={sparse_initializers}) excludes `target` (={target}): use Target.STOCK"
        )


def _options(verify: bool | Verification, macs: int | None) -> Verification | None:
    if verify is True:
        return Verification(batch_sizes=(1, 3), draws=3) if macs is not None and macs > _LARGE else Verification()
    return verify or None


def _plain(lineage: Mapping[str, Any] | None) -> Mapping[str, Any]:
    try:
        json.dumps(lineage, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`lineage` (={lineage!r}) must be plain JSON values: {error}") from error
    return {} if lineage is None else lineage
