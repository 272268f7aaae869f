"""Capture: any model -> graphs where a graph is right for every input, Python elsewhere.

1. One eager run under the recorder tells every use of every parameter (where example inputs are given).
2. What symbolic tracing takes generically (the same graph in train and in eval mode, nothing frozen from a sample, no
   custom autograd function, no lost context) becomes a `CapturedModule`: the whole model, else its largest submodules.
3. They are compared with the model on the example inputs, in train and in eval mode; what differs goes back to Python,
   with the reason.
4. On request (`specialize`), a model that is not traced as a whole becomes one graph for inputs like the example's.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fxsparse.errors import CaptureError, ConfigError
from fxsparse.graph.captured import CapturedModule, graphs_of
from fxsparse.graph.clone import isolated_clone, structural_clone
from fxsparse.graph.compare import Difference, Reference, observe
from fxsparse.graph.guards import NOTHING, Untraceable, raising_modules
from fxsparse.graph.inputs import split_inputs
from fxsparse.graph.recorder import Recording
from fxsparse.graph.specialize import specialisation, specialized
from fxsparse.graph.taps import without_taps
from fxsparse.graph.tracer import Trace, has_hooks, is_layer, is_leaf, is_torch_layer, trace, trace_key
from fxsparse.graph.tracing import tracing
from fxsparse.graph.tree import modules_of, parameters_of

_Key = tuple[Hashable, frozenset[str]]
_UNREPEATABLE = "the model does not repeat itself from the same seed, so no graph can be compared with it"


@dataclass(frozen=True)
class Refusal:
    """Why the module at `path` ("" = the model) runs as Python, and what to do about it."""

    path: str
    reason: str
    mend: str

    def __str__(self) -> str:
        return f"`{self.path or 'the model'}` stays Python: {self.reason}; {self.mend}"


@dataclass(frozen=True)
class Capture:
    """The captured model.

    Attributes:
        module: a copy of the model, which shares its tensors unless they are copied; parts of it, or all, are
            `CapturedModule`.
        graphs: paths of the parts that run as graphs ("" = the model itself).
        refusals: the parts that do not, with reasons, in the order of the tree.
        recording: what the eager run told; None without example inputs.
        reference: the behaviour of the model on the example inputs, to compare rewrites with; None without them.
        compared: whether the module was compared with the model, or there is nothing to compare it on.
        specialised: to what the graph is specialised, in words; None for graphs that are right for every input.
    """

    module: nn.Module
    graphs: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    recording: Recording | None
    reference: Reference | None = field(default=None, repr=False)
    compared: bool = True
    specialised: str | None = None


def capture(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    compare: bool = True,
    specialize: bool = False,
    known: Capture | None = None,
    copied: bool = False,
) -> Capture:
    """Capture `model`; it stays as it was, and its tensors are shared with the result unless `copied`.

    Fisher taps are left out.

    Args:
        model: any module.
        example_inputs: a tuple of positional inputs, or ``(args, kwargs)``. Without them there is no recording, and a
            model that cannot be traced as a whole stays Python.
        compare: whether to compare the result with the model; False is for callers who compare what they make of the
            result, and capture anew when that differs.
        specialize: whether a model that is not traced as a whole may become one graph of the calls that ran on the
            example inputs, in eval and in train mode. Inputs of another shape, dtype, structure or Python value then
            raise CaptureError, and so do other values where Python code reads them out of a tensor. Other things that
            Python code may depend on (globals, attributes changed later, the device) are frozen. The graph is
            compared, bit for bit, on the example inputs and on others of the same shapes; where there is none the
            refusals say why, and the result is the one without `specialize`.
        known: an earlier capture of the same model, unchanged since, on the same inputs: the model is not run anew.
        copied: whether the result has copies of the parameters and buffers instead of sharing them.

    Raises:
        CaptureError: when `model` is no module, cannot be copied, or fails on the example inputs.
        ConfigError: when `example_inputs` is neither form, or missing with `specialize`.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"`model` (={type(model).__name__}) must be a torch.nn.Module")
    model = without_taps(model)
    if specialize and example_inputs is None:
        raise ConfigError("`specialize` (=True) needs `example_inputs`, to which the graph is specialised")
    if example_inputs is None:
        session = _Session(_working_copy(model, copied))
    else:
        args, kwargs = split_inputs(example_inputs)
        if known is not None and known.recording is not None and known.reference is not None:
            recording, reference = known.recording, known.reference
        else:
            recording, reference = observe(model, args, kwargs)
        session = _Session(_working_copy(model, copied), recording, reference, compare, specialize)
    session.run()
    graphs, refusals = tuple(graphs_of(session.module)), tuple(session.refusals)
    return Capture(
        session.module,
        graphs,
        refusals,
        session.recording,
        session.reference,
        session.compared,
        specialisation(session.module) if specialize else None,
    )


def _places_of(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is module]


def _working_copy(model: nn.Module, copied: bool) -> nn.Module:
    if not copied:
        return structural_clone(model)
    return isolated_clone(model, copied=[name for name, _ in parameters_of(model)])


@dataclass
class _Session:
    module: nn.Module
    recording: Recording | None = None
    reference: Reference | None = None
    compare: bool = True
    specialize: bool = False
    refusals: list[Refusal] = field(default_factory=list)
    compared: bool = True
    traces: dict[_Key, Trace | Untraceable] = field(default_factory=dict)
    made: dict[_Key, CapturedModule] = field(default_factory=dict)
    hopeless: dict[int, Untraceable] = field(default_factory=dict)
    keys: dict[Hashable, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.paths: dict[int, str] = {}
        self.places: dict[int, list[tuple[nn.Module, str]]] = {}
        self.held = modules_of(self.module)
        for path, module in self.held:
            self.paths[id(module)] = path  # its first name
            for name, child in module._modules.items():
                self.places.setdefault(id(child), []).append((module, name))

    def run(self) -> None:
        """Turn `module` into graphs, the root first."""
        if isinstance(self.module, CapturedModule):
            return
        with contextlib.nullcontext() if self.compare or self.specialize else tracing():  # nothing runs in between
            self._run()

    def _run(self) -> None:
        found: dict[str, CapturedModule] | None = None
        with tracing():
            made = self._trace("", self.module)
            if made is None and self.reference is not None and not self.specialize:
                found = self._candidates(self.module, "")
        if made is not None and self._accept({"": made}):
            self._capture_leaves(made, "")
        elif self.reference is not None and self.reference.repeats:
            special = self._specialized() if self.specialize else None
            if special is None:
                self._descend(self.module, "", found)
            else:
                self._capture_leaves(special, "")

    def _specialized(self) -> CapturedModule | None:
        """The root as one graph that is specialised to the example inputs; its refusal as a generic one is void."""
        assert self.reference is not None
        try:
            made = specialized(self.reference.model, self.module, self.reference)
        except Untraceable as error:
            self.refusals.append(Refusal("", f"not specialised: {error.reason}", error.mend))
            return None
        self.module = made
        self.refusals.clear()
        return made

    def _trace(self, path: str, module: nn.Module) -> CapturedModule | None:
        try:
            absent = self._absent(path, module)
            key = trace_key(module, self.keys), absent
            traced, like = self._traced(module, key)
            if traced.assumptions and self.reference is None:
                raise Untraceable(f"it depends on {traced.assumptions[0]}", "give example inputs")
            made = CapturedModule(module, traced.graph, like=like)
            self.made.setdefault(key, made)
            return made
        except Untraceable as error:
            self.refusals.append(Refusal(path, error.reason, error.mend))
        except SyntaxError as error:  # a default value that cannot be written as code
            self.refusals.append(Refusal(path, f"its signature cannot be generated ({error})", "use plain defaults"))
        return None

    def _absent(self, path: str, module: nn.Module) -> frozenset[str]:
        """Names of the arguments that were None when the module ran on the example inputs."""
        keys = self.recording.absent.get(path, frozenset()) if self.recording is not None else frozenset()
        if not keys:
            return frozenset()
        names = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters)[1:]
        named = (names[key] if isinstance(key, int) and key < len(names) else key for key in keys)
        return frozenset(name for name in named if isinstance(name, str))

    def _traced(self, module: nn.Module, key: _Key) -> tuple[Trace, CapturedModule | None]:
        """`trace`, once for modules that are alike: of the others a copy, with the first one that was captured."""
        if id(module) in self.hopeless:
            self.traces.setdefault(key, self.hopeless[id(module)])
        if key not in self.traces:
            try:
                self.traces[key] = trace(module, absent=key[1]) if key[1] else trace(module)
            except Untraceable as error:
                self.traces[key] = told = Untraceable(error.reason, error.mend)  # without its traceback
                for around in error.within or raising_modules(error.__cause__)[:-1]:
                    self.hopeless.setdefault(id(around), told)
        found = self.traces[key]
        if isinstance(found, Untraceable):
            raise found
        like = self.made.get(key)
        return (found if like is None else Trace(copy.deepcopy(found.graph), found.assumptions)), like

    def _accept(self, candidates: dict[str, CapturedModule]) -> dict[str, CapturedModule]:
        """Put the candidates in place, without those that make the model behave differently; return what is in."""
        if not candidates or (self.reference is not None and not self.reference.repeats):
            return {}
        before = {path: self.module.get_submodule(path) for path in candidates}
        for path, candidate in candidates.items():
            self._put(path, candidate)
        found = self._difference()
        if found is None:
            return candidates
        for path, module in before.items():
            self._put(path, module)
        if len(candidates) == 1 or not self._repeats():
            said = f"its graph behaves differently: {found}" if self._repeats() else _UNREPEATABLE
            self.refusals += [Refusal(path, said, NOTHING) for path in candidates]
            return {}
        told = len(self.refusals)
        accepted: set[str] = set()
        for part in _parted(candidates, found):
            accepted.update(self._accept({path: candidates[path] for path in part}))
        order = {path: index for index, path in enumerate(candidates)}
        self.refusals[told:] = sorted(self.refusals[told:], key=lambda refusal: order[refusal.path])
        return {path: candidate for path, candidate in candidates.items() if path in accepted}

    def _difference(self) -> Difference | None:
        if self.reference is None:
            return None
        if not self.compare:
            self.compared = False
            return None
        return self.reference.difference(self.module)

    def _repeats(self) -> bool:
        return self.reference is None or self.reference.repeats

    def _put(self, path: str, module: nn.Module) -> None:
        if path == "":
            self.module = module
            return
        old = self.module.get_submodule(path)
        places = self.places.pop(id(old), None) or _places_of(self.module, old)
        for parent, name in places:
            parent._modules[name] = module
        self.places[id(module)] = places

    def _descend(self, parent: nn.Module, path: str, found: dict[str, CapturedModule] | None = None) -> None:
        """Capture the largest traceable submodules below `parent`, which stays Python; `found` are those known."""
        candidates = found
        if candidates is None:
            with tracing():
                candidates = self._candidates(parent, path)
        accepted = self._accept(candidates)
        if not self._repeats():
            return
        for child_path in candidates:
            if child_path in accepted:
                self._capture_leaves(accepted[child_path], child_path)
            else:
                self._descend(self.module.get_submodule(child_path), child_path)

    def _candidates(self, parent: nn.Module, path: str) -> dict[str, CapturedModule]:
        found: dict[str, CapturedModule] = {}
        for name, child in parent.named_children():
            child_path = f"{path}.{name}" if path else name
            if self.paths.get(id(child), child_path) != child_path:  # another name of a module that is met elsewhere
                continue
            if not _is_user_module(child) or isinstance(child, CapturedModule):
                continue
            made = self._trace_called(child_path, child)
            if made is None:
                found.update(self._candidates(child, child_path))
            else:
                found[child_path] = made
        return found

    def _trace_called(self, path: str, module: nn.Module) -> CapturedModule | None:
        if type(module).forward is nn.Module.forward:  # a container
            return None
        if self.recording is not None and not self.recording.calls.get(path):
            self.refusals.append(Refusal(path, "it did not run on the example inputs", "give inputs that reach it"))
            return None
        return self._trace(path, module)

    def _capture_leaves(self, captured: CapturedModule, path: str) -> None:
        """Modules of the user's that stay one node (layers, and what has hooks) may hold graphs themselves."""
        leaves = self._leaves(captured, path)
        with tracing() if leaves else contextlib.nullcontext():
            made = {leaf_path: self._trace_called(leaf_path, leaf) for leaf_path, leaf in leaves.items()}
        found = {leaf_path: graph for leaf_path, graph in made.items() if graph is not None}
        hooked = [leaf_path for leaf_path in made if leaf_path not in found and not is_layer(leaves[leaf_path])]
        accepted = self._accept(found)
        hooked += [target for target in found if target not in accepted]
        for target in hooked if self.reference is not None else ():
            self._descend(self.module.get_submodule(target), target)
        for target, graph in accepted.items():
            self._capture_leaves(graph, target)

    def _leaves(self, captured: CapturedModule, path: str) -> dict[str, nn.Module]:
        """The modules of the user's that are nodes of a graph, each once, by path."""
        leaves: dict[int, tuple[str, nn.Module]] = {}
        for target in dict.fromkeys(str(node.target) for node in captured.graph.find_nodes(op="call_module")):
            leaf_path = f"{path}.{target}" if path else target
            leaf = self.module.get_submodule(leaf_path)
            if not isinstance(leaf, CapturedModule) and _is_user_module(leaf) and (has_hooks(leaf) or is_layer(leaf)):
                leaves.setdefault(id(leaf), (leaf_path, leaf))
        return dict(leaves.values())


def _parted(candidates: dict[str, CapturedModule], found: Difference) -> tuple[list[str], list[str]]:
    """Two parts to try one after the other: where one candidate raised, it and its like apart; else halves."""
    names = list(candidates)
    raised = next((path for path in found.suspects if path in candidates), None)
    if raised is not None:
        alike = [path for path in names if candidates[path].origin is candidates[raised].origin]
        chosen = alike if len(alike) < len(names) else [raised]
        return chosen, [path for path in names if path not in chosen]
    return names[: len(names) // 2], names[len(names) // 2 :]


def _is_user_module(module: nn.Module) -> bool:
    """Whether `module` may hold a forward pass of the user's: no layer of torch's, nothing that must stay as it is."""
    return not is_torch_layer(module) and (not is_leaf(module) or has_hooks(module))
