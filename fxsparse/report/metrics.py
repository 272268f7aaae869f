"""The file `metrics.json` of a run: one schema, written and read by the same classes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fxsparse.errors import DataError

SCHEMA: Literal["fxsparse.metrics/1"] = "fxsparse.metrics/1"

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Size = Annotated[float, Field(ge=0)]


class Record(BaseModel):
    """Base of all records: unknown fields, wrong types, NaN and infinities are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LayerSparsity(Record):
    """One weight of one round, summed over nothing: `sparsity` is the mean over seeds."""

    sparsity: Share
    total: Count


class SeedRound(Record):
    """One seed in one round; accuracies are fractions."""

    seed: int
    val_accuracy: Share
    val_loss: Size | None = None
    ticket_id: str | None = None


class Round(Record):
    """One round of iterative magnitude pruning, all seeds together."""

    round: Count
    global_sparsity: Share
    active_params: Count
    total_prunable_params: Count
    per_layer_sparsity: dict[str, LayerSparsity]
    seeds: Annotated[list[SeedRound], Field(min_length=1)]


class SeedResult(Record):
    """A finished network of one seed, with what its export measured."""

    seed: int
    val_accuracy: Share
    test_accuracy: Share
    steps: Count
    ticket: str | None = None
    onnx: str | None = None
    onnx_bytes: Count | None = None
    latency_ms: Size | None = None
    dense_latency_ms: Size | None = None
    worst_difference: Size | None = None


class Result(Record):
    """One row of the final table: a method on a network.

    `alive` counts of `parameters` what no mask holds at zero, biases and normalisation included; `sparsity` is that of
    the prunable weights alone. Multiply-accumulates are those of one sample, effective ones averaged over the seeds.
    """

    method: str
    sparsity: Share
    alive: Count
    parameters: Count
    macs_dense: Count
    macs_effective: Count
    seeds: Annotated[list[SeedResult], Field(min_length=1)]
    notes: list[str] = []


class Network(Record):
    """All that was measured on one network."""

    name: str
    title: str
    rounds: list[Round]
    results: Annotated[list[Result], Field(min_length=1)]


class SpeedStage(Record):
    """One step on the way to shared supports; validation accuracies as fractions, one a seed."""

    name: str
    val_accuracy: Annotated[list[Share], Field(min_length=1)]


class SpeedFile(Record):
    """One exported file: its test accuracy in onnxruntime, and its median milliseconds by batch size."""

    name: str
    onnx: str
    bytes: Count
    test_accuracy: Share
    latency_ms: dict[int, Size]


class SpeedLayer(Record):
    """What became of one weight in the file, and why; `gain` is the expected time of the dense layer over its own."""

    name: str
    shape: list[int]
    density: Share
    form: str
    gain: Size | None
    reason: str


class Speed(Record):
    """A network whose ticket of shared supports is timed against its dense twin, float and 8-bit.

    The first of `files` is the one that all are compared with. Test accuracies are those of PyTorch, one a seed.
    """

    title: str
    group: Count
    sparsity: Share
    seeds: list[int]
    stages: list[SpeedStage]
    dense_test: Annotated[list[Share], Field(min_length=1)]
    ticket_test: Annotated[list[Share], Field(min_length=1)]
    files: Annotated[list[SpeedFile], Field(min_length=1)]
    layers: list[SpeedLayer]
    notes: list[str] = []


class Metrics(Record):
    """A whole run.

    Attributes:
        title: headline of the page.
        data: name of the data set, sizes and fingerprint, as text pairs.
        settings: what was run, as text pairs.
        environment: versions and machine, as text pairs.
        seconds: wall time in seconds of the call that wrote this; work found done is not in it.
        networks: the results.
        speed: the network that is shown for its speed, if one was.
    """

    schema_: Literal["fxsparse.metrics/1"] = Field(SCHEMA, alias="schema")
    title: str
    data: dict[str, str]
    settings: dict[str, str]
    environment: dict[str, str]
    seconds: Size
    networks: Annotated[list[Network], Field(min_length=1)]
    speed: Speed | None = None


def write_metrics(metrics: Metrics, path: str | os.PathLike[str]) -> None:
    """Write `metrics` as JSON, atomically: a temporary file beside the target, then a rename."""
    text = json.dumps(metrics.model_dump(by_alias=True), indent=2, allow_nan=False)
    write_atomically(Path(path), text + "\n")


def read_metrics(path: str | os.PathLike[str]) -> Metrics:
    """Read and check a `metrics.json`.

    Raises:
        DataError: the file is missing, is no JSON, or breaks the schema; the message names the field's path.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"`{path}` cannot be read as metrics: {error}") from error
    try:
        return Metrics.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"`{path}` is not a metrics file of schema {SCHEMA}: {field}: {first['msg']}") from error


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees the old file or the new one, never a part; nothing is left on failure."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
