"""Capture: any model -> graphs where a graph is right for every input, Python elsewhere.

1. One eager run under the recorder tells every use of every parameter (where example inputs are given).
2. What symbolic tracing takes generically (the same graph in train and in eval mode, nothing frozen from a sample, no
   custom autograd function, no lost context) becomes a `CapturedModule`: the whole model, else its largest submodules.
3. Each is checked on the example inputs, outputs and gradients, in train and in eval mode; what differs goes back to
   Python, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fxsparse.errors import CaptureError
from fxsparse.graph.captured import CapturedModule, graphs_of
from fxsparse.graph.clone import structural_clone
from fxsparse.graph.compare import Runs, differences, reference_runs
from fxsparse.graph.guards import NOTHING, Untraceable
from fxsparse.graph.inputs import split_inputs
from fxsparse.graph.recorder import Recording, record
from fxsparse.graph.tracer import has_hooks, is_leaf, is_torch_layer, trace


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
        module: a copy of the model that shares its tensors; parts of it, or all, are `CapturedModule`.
        graphs: paths of the parts that run as graphs ("" = the model itself).
        refusals: the parts that do not, with reasons, in the order of the tree.
        recording: what the eager run told; None without example inputs.
    """

    module: nn.Module
    graphs: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    recording: Recording | None


def capture(model: nn.Module, example_inputs: Any = None) -> Capture:
    """Capture `model`; it stays as it was, and its tensors are shared with the result.

    Args:
        model: any module.
        example_inputs: a tuple of positional inputs, or ``(args, kwargs)``. Without them there is no recording, and a
            model that cannot be traced as a whole stays Python.

    Raises:
        CaptureError: when `model` is no module, cannot be copied, or fails on the example inputs.
        ConfigError: when `example_inputs` is neither form.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"`model` (={type(model).__name__}) must be a torch.nn.Module")
    if example_inputs is None:
        session = _Session(structural_clone(model))
    else:
        args, kwargs = split_inputs(example_inputs)
        recording = record(model, args, kwargs)
        runs = reference_runs(model, args, kwargs, recording.written)
        session = _Session(structural_clone(model), recording, runs)
    session.run()
    return Capture(session.module, tuple(graphs_of(session.module)), tuple(session.refusals), session.recording)


@dataclass
class _Session:
    module: nn.Module
    recording: Recording | None = None
    runs: Runs | None = None
    refusals: list[Refusal] = field(default_factory=list)

    def run(self) -> None:
        """Turn `module` into graphs, the root first."""
        if isinstance(self.module, CapturedModule):
            return
        made = self._trace("", self.module)
        if made is not None and self._accept({"": made}):
            self._capture_leaves(made, "")
        elif self.runs is not None:
            self._descend(self.module, "")

    def _trace(self, path: str, module: nn.Module) -> CapturedModule | None:
        try:
            traced = trace(module)
            if traced.assumptions and self.runs is None:
                raise Untraceable(f"it depends on {traced.assumptions[0]}", "give example inputs")
            return CapturedModule(module, traced.graph)
        except Untraceable as error:
            self.refusals.append(Refusal(path, error.reason, error.mend))
        except SyntaxError as error:  # a default value that cannot be written as code
            self.refusals.append(Refusal(path, f"its signature cannot be generated ({error})", "use plain defaults"))
        return None

    def _accept(self, candidates: dict[str, CapturedModule]) -> bool:
        """Put the candidates in place; take them all out again if the model then behaves differently."""
        before = {path: self.module.get_submodule(path) for path in candidates}
        for path, candidate in candidates.items():
            self._put(path, candidate)
        found = None if self.runs is None else differences(self.runs, self.module)
        if found is None:
            return True
        for path, module in before.items():
            self._put(path, module)
        if len(candidates) == 1:
            path = next(iter(candidates))
            self.refusals.append(Refusal(path, f"its graph behaves differently: {found}", NOTHING))
        return False

    def _put(self, path: str, module: nn.Module) -> None:
        if path == "":
            self.module = module
            return
        old = self.module.get_submodule(path)
        for parent in list(self.module.modules()):
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = module

    def _descend(self, parent: nn.Module, path: str) -> None:
        """Capture the largest traceable submodules below `parent`, which stays Python."""
        candidates = self._candidates(parent, path)
        accepted = candidates
        if candidates and not self._accept(candidates):
            alone = len(candidates) == 1
            accepted = {p: made for p, made in candidates.items() if not alone and self._accept({p: made})}
        for child_path in candidates:
            if child_path in accepted:
                self._capture_leaves(accepted[child_path], child_path)
            else:
                self._descend(self.module.get_submodule(child_path), child_path)

    def _candidates(self, parent: nn.Module, path: str) -> dict[str, CapturedModule]:
        found: dict[str, CapturedModule] = {}
        first = {id(module): name for name, module in self.module.named_modules()}
        for name, child in parent.named_children():
            child_path = f"{path}.{name}" if path else name
            if first[id(child)] != child_path:  # another name of a module that is met elsewhere
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
        """Modules of the user's that stay one node (they have hooks) may hold graphs themselves."""
        if self.runs is None:
            return
        for node in captured.graph.nodes:
            if node.op != "call_module":
                continue
            target = f"{path}.{node.target}" if path else str(node.target)
            leaf = self.module.get_submodule(target)
            if isinstance(leaf, CapturedModule) or not (has_hooks(leaf) and _is_user_module(leaf)):
                continue
            made = self._trace_called(target, leaf)
            if made is None or not self._accept({target: made}):
                self._descend(leaf, target)


def _is_user_module(module: nn.Module) -> bool:
    """Whether `module` may hold a forward pass of the user's: no layer of torch's, nothing that must stay as it is."""
    return not is_torch_layer(module) and (not is_leaf(module) or has_hooks(module))
