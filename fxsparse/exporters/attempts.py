"""The ways to export a model, from the best file to the last resort; the first file that equals the model counts."""

from __future__ import annotations

import enum
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxsparse.errors import ExportError
from fxsparse.exporters import external, placement
from fxsparse.exporters.causes import is_structural, mend_of, reason_of
from fxsparse.exporters.encodings import store_once
from fxsparse.exporters.external import LIMIT
from fxsparse.exporters.inputs import Inputs
from fxsparse.exporters.legacy import trace_program
from fxsparse.exporters.prepare import Subject
from fxsparse.exporters.program import check_reached, export_program, quiet, tidy
from fxsparse.exporters.reference import Reference, Verification, one_sided, reference
from fxsparse.exporters.runtime import open_session
from fxsparse.exporters.targets import Exporter
from fxsparse.exporters.verify import Parity, verify

_LEGACY_DRAWS = 8


@dataclass(frozen=True, eq=False)
class Exported:
    """A file that was written and, unless that was not wanted, verified.

    Attributes:
        exporter: how the graph was taken.
        switches: what was set on the copy.
        inputs: the inputs with the batch axis that the file has.
        opset: operator set of the file.
        bytes: its size, and that of its weights where they lie in a file of their own.
        dense_bytes: its size without metadata.
        places: where the masked weights lie.
        parity: the differences from PyTorch; None where it was not verified.
        notes: what was decided on the way.
        file: the file.
        data: the file of its weights, where it has one.
    """

    exporter: Exporter
    switches: tuple[str, ...]
    inputs: Inputs
    opset: int
    bytes: int
    dense_bytes: int
    places: list[placement.Placement]
    parity: Parity | None
    notes: tuple[str, ...]
    file: Path
    data: Path | None = None


class Free(enum.Enum):
    """Which of the free axes of the inputs a file keeps."""

    ALL = "all"
    BATCH = "batch"
    NONE = "none"


@dataclass(frozen=True)
class Settings:
    """What holds for every way.

    Attributes:
        opset: operator set, None for torch's default.
        options: what to verify on; None for no verification, which excludes the legacy exporter.
        annotate: adds the metadata to a message, given the places of the weights and the inputs.
        external: whether the weights lie in a file of their own; None where they have to.
        least: the fewest free axes that a file may have.
    """

    opset: int | None
    options: Verification | None
    annotate: Callable[[Any, list[placement.Placement], Inputs], None]
    external: bool | None = None
    least: Free = Free.NONE


@dataclass(frozen=True)
class _Way:
    exporter: Exporter
    plain: bool
    free: Free


@dataclass(frozen=True)
class _Written:
    """A file: that of its weights, its operator set, its bytes without and with metadata, and what was found."""

    data: Path | None
    opset: int
    sizes: tuple[int, int]
    places: list[placement.Placement]
    unused: set[str]
    notes: tuple[str, ...]


class Search:
    """One search for a file.

    Args:
        subject: the model.
        file: where to write.
        settings: what holds for every way.
        references: runs of the model that another search has made of the same inputs.
    """

    def __init__(
        self, subject: Subject, file: Path, settings: Settings, references: dict[Any, Reference] | None = None
    ) -> None:
        self.subject = subject
        self.file = file
        self.settings = settings
        self.opset = settings.opset
        self.options = settings.options
        self._failures: dict[_Way, str] = {}
        self._references = {} if references is None else references
        self._plain: tuple[nn.Module, tuple[str, ...], bool] | None = None

    def run(self) -> Exported:
        """Try the ways in their order.

        Raises:
            ExportError: none of them gave a file that computes what the model computes.
        """
        if self.options is not None:
            self._reference(_Way(Exporter.EXPORT, False, Free.ALL))
        for way in self._ways():
            try:
                return self._try(way)
            except ExportError as error:
                self._failures[way] = str(error)
        raise ExportError(self._refusal())

    def _ways(self) -> Iterator[_Way]:
        """torch.export before the trace, more free axes before fewer, the model as it is before its switches."""
        levels = self._levels()
        for exporter in Exporter if self.options is not None else (Exporter.EXPORT,):
            for level in levels:
                if level is not levels[0] and exporter is Exporter.EXPORT and self._hopeless():
                    continue
                yield _Way(exporter, False, level)
                if self._switched()[1]:
                    yield _Way(exporter, True, level)

    def _levels(self) -> list[Free]:
        inputs = self.subject.inputs
        levels = [Free.ALL]
        if inputs.free and inputs.batched:
            levels.append(Free.BATCH)
        if inputs.free or inputs.batched:
            levels.append(Free.NONE)
        order = list(Free)
        return [level for level in levels if order.index(level) <= order.index(self.settings.least)] or levels[:1]

    def _hopeless(self) -> bool:
        """Whether torch.export failed for reasons that a fixed batch does not change."""
        return all(is_structural(reason) for reason in self._failures.values())

    def _switched(self) -> tuple[nn.Module, tuple[str, ...], bool]:
        if self._plain is None:
            self._plain = self.subject.plain()
        return self._plain

    def _inputs(self, way: _Way) -> Inputs:
        inputs = self.subject.inputs
        if way.free is Free.ALL:
            return inputs
        if way.free is Free.BATCH:
            return replace(inputs, free={})
        return inputs.fixed(next(iter(self._failures.values())))

    def _reference(self, way: _Way) -> Reference:
        key = way.free, way.exporter
        if key not in self._references:
            assert self.options is not None
            draws = max(self.options.draws, _LEGACY_DRAWS) if way.exporter is Exporter.TRACE else self.options.draws
            options = Verification(self.options.batch_sizes, draws, self.options.seed, self.options.tolerance)
            gc.collect()  # whatever copied or recorded the model holds itself by cycles
            self._references[key] = reference(self.subject.masked, self._inputs(way), options)
            gc.collect()
        return self._references[key]

    def _try(self, way: _Way) -> Exported:
        inputs = self._inputs(way)
        model, switched, explicit = self._switched() if way.plain else (self.subject.folded, (), False)
        written = self._made(way, model, inputs, explicit)
        notes = list(written.notes)
        gc.collect()
        session = open_session(self.file)
        parity = None
        if self.options is not None:
            parity = verify(session, self._reference(way), self.options.tolerance)
            if way.exporter is Exporter.TRACE:
                _check_trace(parity, inputs)
            notes += parity.notes
            if way.exporter is Exporter.TRACE:
                notes += _one_sided(self.subject.masked, self._reference(way))
        if way.free is Free.BATCH:
            left = ", ".join(f"`{name}`" for name in self.subject.inputs.free)
            notes.append(f"axis {left} is fixed: {next(iter(self._failures.values()))}")
        notes += _unlocated(self.subject, written.places, written.unused)
        switches = self.subject.switches + switched
        return Exported(
            exporter=way.exporter,
            switches=switches,
            inputs=inputs,
            opset=written.opset,
            bytes=written.sizes[1],
            dense_bytes=written.sizes[0],
            places=written.places,
            parity=parity,
            notes=tuple(notes),
            file=self.file,
            data=written.data,
        )

    def _made(self, way: _Way, model: nn.Module, inputs: Inputs, explicit: bool) -> _Written:
        """Export the model and write the file."""
        program = self._program(way, model, inputs, explicit)
        try:
            unused = _check_entered(program, self.subject, model, way.exporter)
            notes: tuple[str, ...] = ()
            try:
                with quiet():
                    program.optimize()
            except Exception as error:  # whatever onnxscript meets; it leaves the graph half done
                said = f"onnxscript's optimiser stopped ({reason_of(error, model)})"
                notes = (f"the graph has more nodes than it needs: {said}",)
                _empty(program.model)
                program = self._program(way, model, inputs, explicit)
            store_once(program.model)
            arrays = {name: value.const_value.numpy() for name, value in program.model.graph.initializers.items()}
            folded = dict(model.named_parameters(remove_duplicate=False))
            places = placement.locate(self.subject.weights, folded, arrays)
            del arrays
            data, opset, sizes = self._write(program, places, inputs)
            return _Written(data, opset, sizes, places, unused, notes)
        finally:
            _empty(program.model)

    def _write(
        self, program: Any, places: list[placement.Placement], inputs: Inputs
    ) -> tuple[Path | None, int, tuple[int, int]]:
        """Write the file; the file of its weights, its operator set, its bytes without and with metadata."""
        data = None
        if self.settings.external or (self.settings.external is None and external.bytes_of(program.model) > LIMIT):
            data = external.move_out(program.model, self.file.parent, self.file.name)
        model = program.model
        from fxsparse.exporters.file_wire import hollow, write_model  # it stands on onnx

        proto = hollow(model) if data is None else program.model_proto
        outside = data.stat().st_size if data is not None else 0
        tidy(proto, inputs)
        values = {} if data is not None else {name: v.const_value for name, v in model.graph.initializers.items()}
        placement.check_file(proto, places, self.subject.weights, self.file.parent, values)
        opset, bare = _opset_of(proto), proto.ByteSize()
        self.settings.annotate(proto, places, inputs)
        noted = proto.ByteSize() - bare
        with self.file.open("wb") as file:
            if data is None:
                write_model(model, proto, file)
            else:
                file.write(proto.SerializeToString(deterministic=True))
            written = file.tell()
        return data, opset, (written - noted + outside, written + outside)

    def _program(self, way: _Way, model: nn.Module, inputs: Inputs, explicit: bool) -> Any:
        export = export_program if way.exporter is Exporter.EXPORT else trace_program
        try:
            program = export(model, inputs, self.subject.outputs, self.opset, explicit)
        except ExportError as error:
            raise ExportError(f"torch cannot export this model to ONNX ({error}): {mend_of(str(error))}") from error
        check_reached(program.model.opset_imports.get(""), self.opset)
        return program

    def _refusal(self) -> str:
        first = next(iter(self._failures.values()))
        legacy = [reason for way, reason in self._failures.items() if way.exporter is Exporter.TRACE]
        if not legacy:
            return first
        said = legacy[0].removeprefix("torch cannot export this model to ONNX ")
        return f"{first}. The legacy exporter does not help: {said[:300]}"


def _empty(model: Any) -> None:
    """Let the weights of an `onnx_ir.Model` go: onnxscript's rules hold the last graph that they have seen."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            value.const_value = None


def _opset_of(proto: Any) -> int:
    return int(next(entry.version for entry in proto.opset_import if entry.domain == ""))


def _check_trace(parity: Parity, inputs: Inputs) -> None:
    if inputs.batched and len(parity.batch_sizes) < 2:
        raise ExportError(f"the trace could be verified at batch size {parity.batch_sizes[0]} only")
    if not parity.varied:
        raise ExportError(
            "verification failed: all outputs of the model are empty or constant, which shows nothing of a trace: "
            "give example inputs on which they are not"
        )


def _check_entered(program: Any, subject: Subject, model: nn.Module, exporter: Exporter) -> set[str]:
    """The weights that the graph does not use; all others must have entered it bit for bit."""
    initializers = program.model.graph.initializers
    unused = set()
    for name, weight in subject.weights.items():
        stored = next((initializers[alias] for alias in weight.names if alias in initializers), None)
        if stored is None or not stored.uses():
            if exporter is Exporter.EXPORT:
                unused.add(name)
        elif not torch.equal(torch.from_numpy(stored.const_value.numpy().copy()), model.get_parameter(name).detach()):
            raise ExportError(f"`{name}`: torch's exporter changed the values of this weight; report it with the model")
    return unused


def _one_sided(model: nn.Module, runs: Reference) -> list[str]:
    count = one_sided(model, runs)
    said = f"{count} decisions of Python on values came out alike for all verified inputs"
    return [f"{said}: the trace holds that side only"] if count else []


def _unlocated(subject: Subject, places: list[placement.Placement], unused: set[str]) -> list[str]:
    found = {place.weight for place in places}
    return [
        f"`{name}` is not used for these inputs, so the file does not hold it"
        if name in unused
        else f"`{name}` was not found as an initializer: constant folding merged it with other constants"
        for name in subject.weights
        if name not in found
    ]
