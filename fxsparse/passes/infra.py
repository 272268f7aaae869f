"""Passes and pipelines: a rewrite of a model whose contract is checked each time it runs."""

from __future__ import annotations

import abc
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fxsparse.errors import ConfigError, FxSparseError, PassError
from fxsparse.graph import edit, provenance, structural_clone
from fxsparse.graph.render import render
from fxsparse.passes.equivalence import DIFFERENT, EXACT, Equivalence
from fxsparse.passes.snapshot import Snapshot, graphs_of
from fxsparse.passes.verify import Verification, verify_equal


@dataclass(frozen=True)
class Record:
    """One thing that a pass did.

    Attributes:
        pass_name: The pass.
        target: The name of what was rewritten: a parameter, a module or a node.
        what: What was done, in a few words.
    """

    pass_name: str
    target: str
    what: str

    def __str__(self) -> str:
        return f"{self.pass_name}: {self.target}: {self.what}"


@dataclass(frozen=True)
class PassResult:
    """What a pass returns.

    Attributes:
        module: The rewritten model; parameters are those of the input.
        modified: Whether anything changed.
        records: What was done, in order.
        verification: What was compared on example inputs; None without them.
    """

    module: nn.Module
    modified: bool
    records: tuple[Record, ...] = ()
    verification: Verification | None = None


_records: ContextVar[list[Record] | None] = ContextVar("fxsparse_pass_records", default=None)


class Pass(abc.ABC):
    """One rewrite. Subclasses say what they promise and edit a clone; calling the pass checks that it kept the promise.

    The module may be a GraphModule or any module that holds some (`graphs_of`). The order of a call is: `requires`,
    clone, `call`, dead code, lint, recompile, checks, `ensures`. The checks: the input is unchanged; the returned flag
    is honest; every node born carries its provenance; every requested target was recorded exactly once; a cleanup pass
    finds nothing to do on its own result; and on example inputs the declared equivalence holds in float64, in eval and
    in train mode, gradients too.

    >>> import torch
    >>> from torch import nn
    >>> from fxsparse.graph import capture, edit
    >>> class DoubleNegation(Pass):
    ...     '''Removes neg(neg(x)).'''
    ...
    ...     idempotent = True
    ...
    ...     def call(self, module):
    ...         modified = False
    ...         for graph_module in graphs_of(module).values():
    ...             for node in graph_module.graph.find_nodes(op="call_function", target=torch.neg):
    ...                 inner = node.args[0]
    ...                 if inner.op == "call_function" and inner.target is torch.neg:
    ...                     edit.replace_uses(node, inner.args[0])
    ...                     self.record(node.name, "removed with the negation before it")
    ...                     modified = True
    ...         return modified
    >>> class Twice(nn.Module):
    ...     def forward(self, x):
    ...         return torch.neg(torch.neg(x)) + 1
    >>> result = DoubleNegation()(capture(Twice()).module, (torch.randn(2),))
    >>> result.modified, [node.name for node in result.module.graph.nodes]
    (True, ['x', 'add', 'output'])
    """

    equivalence: Equivalence = EXACT
    """How the function may change."""
    idempotent: bool = False
    """Whether the pass is a cleanup: a second run on its result must find nothing to do."""

    @property
    def name(self) -> str:
        """The class name in words: SwapModules is swap_modules."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def targets(self) -> Collection[str]:
        """What the pass was asked to rewrite; each must be recorded exactly once. None are requested by default."""
        return ()

    def requires(self, module: nn.Module) -> None:
        """Raise when the module is not fit for this pass."""
        return

    @abc.abstractmethod
    def call(self, module: nn.Module) -> bool:
        """Edit the module, a clone that shares only tensors with the input; return whether anything changed."""

    def ensures(self, before: nn.Module, after: nn.Module) -> None:
        """Raise when the result is not what this pass promises."""
        return

    def record(self, target: str, what: str) -> None:
        """Write down, from within `call`, what was done to a target."""
        records = _records.get()
        if records is None:
            raise PassError(f"{self.name}: `record` belongs into `call`; run the pass by calling it")
        records.append(Record(self.name, target, what))

    def __call__(self, module: nn.Module, example_inputs: Any = None) -> PassResult:
        """Run the pass on a clone of the module and check its contract.

        Args:
            module: The model; it stays as it is.
            example_inputs: Positional inputs, or (args, kwargs), on which the equivalence is shown.

        Raises:
            PassError: the module is not fit for the pass, or the contract was broken; the message starts with the
                pass's name.
        """
        with self._named():
            self.requires(module)
            untouched = Snapshot.of(module)
            clone = structural_clone(module)
            claimed, modified, records = self._run(clone)
            self._check_untouched(module, untouched)
            if claimed != modified:
                raise PassError(
                    f"`call` returned {claimed}, but the module {'changed' if modified else 'did not change'}"
                )
            self._check_targets(records)
            self._check_idempotent(clone)
            found = None if example_inputs is None else verify_equal(module, clone, example_inputs, self.equivalence)
            if found is not None and not found.compared and not isinstance(self.equivalence, DIFFERENT):
                warnings.warn(f"{self.name}: the result could not be compared: {found.notes[0]}", stacklevel=2)
            self.ensures(module, clone)
        return PassResult(clone, modified, records, found)

    def rewrite(self, module: nn.Module) -> tuple[Record, ...]:
        """Run the pass on the module itself, which the caller owns and compares with what it was.

        Requirements, dead code, lint, provenance and targets are checked; what needs a copy or a look at every value
        is left to the caller.

        Raises:
            PassError: as a call; the module must not be used then.
        """
        with self._named():
            self.requires(module)
            _, records = self._edit(module)
            self._check_targets(records)
        return records

    def _run(self, clone: nn.Module) -> tuple[bool, bool, tuple[Record, ...]]:
        """Edit the clone; return what `call` claims, whether anything changed, and the records."""
        before = Snapshot.of(clone)
        claimed, records = self._edit(clone)
        return claimed, before.difference(Snapshot.of(clone)) is not None, records

    def _edit(self, clone: nn.Module) -> tuple[bool, tuple[Record, ...]]:
        graphs = graphs_of(clone)
        present = frozenset(node for found in graphs.values() for node in found.graph.nodes)
        dead = frozenset(node for node in present if not node.users)
        written = {path: _lines(found.graph) for path, found in graphs.items()}
        records: list[Record] = []
        token = _records.set(records)
        try:
            claimed = bool(self.call(clone))
        finally:
            _records.reset(token)
        for path, found in graphs_of(clone).items():
            _tidy(path, found, present, dead)
            if not _same(written.get(path, []), _lines(found.graph)):
                found.recompile()
        return claimed, tuple(records)

    def _check_untouched(self, module: nn.Module, before: Snapshot) -> None:
        difference = before.difference(Snapshot.of(module))
        if difference is not None:
            raise PassError(
                f"the input was changed: {difference}; edit only the module given to `call`, replace its tensors"
            )

    def _check_targets(self, records: Sequence[Record]) -> None:
        found = Counter(record.target for record in records)
        unmatched = [target for target in self.targets if found[target] == 0]
        if unmatched:
            raise PassError(
                f"nothing was found to rewrite for {_listed(unmatched)}; check the names with `masks` or the plan"
            )
        repeated = [target for target in self.targets if found[target] > 1]
        if repeated:
            raise PassError(f"{_listed(repeated)} matched more than once; name each place on its own")

    def _check_idempotent(self, clone: nn.Module) -> None:
        if self.idempotent:
            _, again, records = self._run(structural_clone(clone))
            if again:
                raise PassError(f"a second run still changes the module ({_listed([r.target for r in records])})")

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except PassError as error:
            prefix = f"{self.name}: "
            raise PassError(f"{prefix}{str(error).removeprefix(prefix)}") from error.__cause__
        except FxSparseError as error:
            raise PassError(f"{self.name}: {error}") from error
        except Exception as error:
            raise PassError(f"{self.name}: {type(error).__name__}: {error}") from error


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _tidy(path: str, module: fx.GraphModule, present: frozenset[fx.Node], dead: frozenset[fx.Node]) -> None:
    """Dead code and lint; nodes born since `present` must be stamped, those `dead` already are left alone."""
    for node in reversed(list(module.graph.nodes)):
        if not node.users and node not in dead and not edit.is_impure(node):
            edit.erase(node)
    where = f"graph `{path}`" if path else "the graph"
    for node in module.graph.nodes:
        if node not in present and provenance.read(node) is None:
            raise PassError(
                f"node `{node.name}` of {where} was born without provenance; make nodes with `fxsparse.graph.edit`"
            )
    edit.lint(module)


def _lines(graph: fx.Graph) -> list[tuple[object, ...]]:
    """All of a graph that its code depends on."""
    nodes = ((n, n.name, n.op, n.target, n.args, n.kwargs, n.type) for n in graph.nodes)
    return [(graph, graph._codegen), *nodes]


def _same(before: list[tuple[object, ...]], after: list[tuple[object, ...]]) -> bool:
    if len(before) != len(after):
        return False
    return all(a is b for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))


@dataclass(frozen=True)
class Stage:
    """A moment of a pipeline that can be printed.

    Attributes:
        name: "captured" for the input, then the names of the passes.
        module: The model at that moment.
        records: What the pass did.
    """

    name: str
    module: nn.Module
    records: tuple[Record, ...] = ()

    def __str__(self) -> str:
        head = [f"== {self.name} ==", *(f"  {record.target}: {record.what}" for record in self.records)]
        return "\n".join([*head, render(self.module)])


@dataclass(frozen=True)
class PipelineResult(PassResult):
    """What a pipeline returns: a PassResult with its stages.

    Attributes:
        stages: The input and the model after each pass.
    """

    stages: tuple[Stage, ...] = field(default=(), repr=False)

    def stage(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            ConfigError: there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(f"`stage` (={name!r}) does not exist; choose one of {', '.join(s.name for s in self.stages)}")


class Pipeline:
    """Passes one after another.

    Args:
        passes: The passes, in order.
        stop_after: Name of the last pass to run; all run by default.

    Raises:
        ConfigError: something that is no pass, or no pass has the name `stop_after`.
    """

    def __init__(self, passes: Sequence[Pass], stop_after: str | None = None) -> None:
        self.passes = tuple(passes)
        for each in self.passes:
            if not isinstance(each, Pass):
                raise ConfigError(f"`passes` holds {each!r}, which is no Pass; give instances such as FoldMasks()")
        names = [each.name for each in self.passes]
        if stop_after is not None:
            if stop_after not in names:
                raise ConfigError(f"`stop_after` (={stop_after!r}) must be one of {', '.join(names) or 'no passes'}")
            self.passes = self.passes[: names.index(stop_after) + 1]

    def __call__(self, module: nn.Module, example_inputs: Any = None) -> PipelineResult:
        """Run the passes; the input stays as it is.

        Args:
            module: The model.
            example_inputs: Where given, each pass shows its equivalence on them.

        Raises:
            PassError: of the pass whose contract was broken.
        """
        stages, modified = [Stage("captured", module)], False
        found: Verification | None = None
        for each in self.passes:
            result = each(stages[-1].module, example_inputs)
            stages.append(Stage(each.name, result.module, result.records))
            modified |= result.modified
            found = result.verification or found
        records = tuple(record for stage in stages for record in stage.records)
        return PipelineResult(stages[-1].module, modified, records, found, tuple(stages))
