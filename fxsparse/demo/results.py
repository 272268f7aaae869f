"""From trainings and exports to the metrics of the run; the test split is read here and nowhere else."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import torch

from fxsparse.data import Splits
from fxsparse.demo.exports import Exported, model_of
from fxsparse.demo.settings import DemoSettings, WideSettings, example_batch
from fxsparse.demo.train import DENSE, PRUNED, RIGL, Place, Trained
from fxsparse.demo.wide import WideTrained
from fxsparse.demo.wide_files import CALIBRATION, WideFiles
from fxsparse.lottery import Round, load_ticket
from fxsparse.report.metrics import (
    LayerSparsity,
    Metrics,
    Network,
    Result,
    SeedResult,
    SeedRound,
    Speed,
    SpeedFile,
    SpeedLayer,
    SpeedStage,
)
from fxsparse.report.metrics import Round as RoundRecord
from fxsparse.training.loop import evaluate

Finished = Sequence[tuple[Trained, Exported]]


def network_record(place: Place, rounds: Mapping[int, tuple[Round, ...]], finished: Finished) -> Network:
    """Everything measured on one network."""
    results = [
        _result(place, [pair for pair in finished if pair[0].method == method]) for method in (DENSE, PRUNED, RIGL)
    ]
    return Network(name=place.network.name, title=place.network.title, rounds=_rounds(rounds), results=results)


def _rounds(rounds: Mapping[int, tuple[Round, ...]]) -> list[RoundRecord]:
    records = []
    for entries in zip(*rounds.values(), strict=True):
        masks = [load_ticket(entry.ticket).masks for entry in entries]
        layers = {
            name: LayerSparsity(
                sparsity=fmean(1 - float(each[name].double().mean()) for each in masks), total=masks[0][name].numel()
            )
            for name in masks[0]
        }
        seeds = [
            SeedRound(
                seed=seed,
                val_accuracy=entry.metrics["validation_accuracy"],
                val_loss=entry.metrics["validation_loss"],
                ticket_id=entry.ticket_id,
            )
            for seed, entry in zip(rounds, entries, strict=True)
        ]
        first = entries[0]
        records.append(
            RoundRecord(
                round=first.index,
                global_sparsity=first.sparsity,
                active_params=first.alive,
                total_prunable_params=first.total,
                per_layer_sparsity=layers,
                seeds=seeds,
            )
        )
    return records


def _result(place: Place, pairs: Finished) -> Result:
    first, measured = pairs[0]
    return Result(
        method=first.method,
        sparsity=load_ticket(first.ticket).sparsity,
        alive=measured.alive,
        parameters=measured.parameters,
        macs_dense=measured.macs_dense,
        macs_effective=round(fmean(exported.macs_effective for _, exported in pairs)),
        seeds=[_seed(place, trained, exported) for trained, exported in pairs],
        notes=_notes(pairs),
    )


def _seed(place: Place, trained: Trained, exported: Exported) -> SeedResult:
    ticket = load_ticket(trained.ticket)
    stem = f"{place.network.name}-{trained.method.lower()}-seed{trained.seed}"
    return SeedResult(
        seed=trained.seed,
        val_accuracy=trained.val_accuracy,
        test_accuracy=evaluate(model_of(place, ticket), place.splits.test).accuracy,
        steps=trained.steps,
        ticket=trained.ticket.relative_to(place.directory).as_posix(),
        onnx=f"onnx/{stem}.onnx",
        onnx_bytes=exported.bytes,
        latency_ms=exported.latency_ms,
        dense_latency_ms=exported.dense_latency_ms,
        worst_difference=exported.worst_difference,
    )


def _notes(pairs: Finished) -> list[str]:
    """Why a row is not faster, where it is not for most seeds, and what its training cost."""
    slow = [exported for _, exported in pairs if exported.reasons]
    notes = []
    if 2 * len(slow) > len(pairs):
        notes.append("not faster: " + "; ".join(slow[0].reasons))
    trained = pairs[0][0]
    if trained.method != DENSE:
        notes.append(f"{trained.method} took {trained.steps:,} training steps a seed")
    return notes


def speed_record(place: Place, wide: WideSettings, trained: Sequence[WideTrained], files: WideFiles) -> Speed:
    """Everything measured on the wide network."""
    stages = [SpeedStage(name=name, val_accuracy=[each.stages[name] for each in trained]) for name in trained[0].stages]
    dense, sparse = (
        [evaluate(model_of(place, ticket), place.splits.test).accuracy for ticket in tickets]
        for tickets in ([each.dense for each in trained], [each.shared for each in trained])
    )
    return Speed(
        title=place.network.title,
        group=wide.group,
        sparsity=trained[0].shared.sparsity,
        seeds=[each.seed for each in trained],
        stages=stages,
        dense_test=dense,
        ticket_test=sparse,
        files=[
            SpeedFile(
                name=file.name,
                onnx=file.onnx,
                bytes=file.bytes,
                test_accuracy=file.test_accuracy,
                latency_ms={int(batch): value for batch, value in file.latency_ms.items()},
            )
            for file in files.files
        ],
        layers=[SpeedLayer(**layer) for layer in files.layers],
        notes=[
            f"files are those of seed {trained[0].seed}; first and last layer stay dense; int8: static, calibrated on "
            f"{CALIBRATION} training samples"
        ],
    )


def whole(
    settings: DemoSettings,
    splits: Splits,
    directory: Path,
    networks: list[Network],
    speed: Speed | None,
    seconds: float,
) -> Metrics:
    """The metrics of the run."""
    names = ("train", "validation", "test")
    parts = ", ".join(f"{name} {len(getattr(splits, name))}" for name in names)
    percent = f"{100 * float(settings.sparsity):g} %"
    return Metrics(
        schema="fxsparse.metrics/1",
        title=f"Lottery tickets at {percent} sparsity",
        data={"name": "handwritten digits (8x8)", "samples": parts, "fingerprint": splits.fingerprint},
        settings={
            "seeds": ", ".join(map(str, settings.seeds)),
            "training": f"Adam, {settings.learning_rate:g} to 0 by cosine, batch {settings.batch_size}",
            "IMP": f"{100 * float(settings.rate):g} % of the alive weights a round, global, rewound to initialisation; "
            f"{settings.epochs} epochs a round",
            "RigL": f"ERK, masks updated every {settings.rigl_every} steps; {settings.rigl_epochs} epochs at once",
            **_wide_settings(settings.wide),
            "latency": f"onnxruntime, CPU, 1 thread, batch {len(example_batch(splits)[0])}, medians, interleaved",
            "test split": "evaluated once, on the finished networks; nothing in the run depends on it",
            "directory": str(directory),
        },
        environment={
            **{name: version(name) for name in ("fxsparse", "torch", "onnxruntime", "onnx", "numpy")},
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "threads": str(torch.get_num_threads()),
        },
        seconds=seconds,
        networks=networks,
        speed=speed,
    )


def _wide_settings(wide: WideSettings | None) -> dict[str, str]:
    if wide is None:
        return {}
    percent = f"{100 * float(wide.sparsity):g} %"
    return {
        "wide network": f"{wide.epochs} epochs dense, {wide.prune_epochs} of GMP to {percent} without a pattern, "
        f"regrouped into SharedSupport({wide.group}) with OBS compensation, {wide.tune_epochs} of fine-tuning"
    }
