"""The whole model as one graph that is right for inputs like the example's, for models that no generic graph can hold.

Every call of one eager run is written down, in eval and in train mode. What may differ from run to run is treated so:

- Inputs of other shapes, dtypes, structure or Python values raise: `check_inputs` is the head of the graph.
- Values that Python code reads out of tensors (``if x.sum() > 0``, ``x.tolist()``) raise when they change
  (`check_read`). When they change already on permuted or negated example inputs, or from another random state, there is
  no graph.
- Constants that differ between the modes are chosen by the training flags that the model read; graphs that differ
  otherwise are refused.
- Random functions of torch stay calls; random numbers drawn in Python are refused.

Not seen, and so frozen: Python code that depends on anything else, as the clock, files, global variables, attributes
that are changed after the capture, the device, or whether gradients are enabled.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxsparse.errors import CaptureError
from fxsparse.graph.captured import CapturedModule, SignatureCodeGen, graphs_of
from fxsparse.graph.clone import isolated_clone
from fxsparse.graph.compare import Reference
from fxsparse.graph.guards import NOTHING, Untraceable
from fxsparse.graph.inputs import fresh_inputs, tensors_of
from fxsparse.graph.scopes import SEED, mode_of, seeded
from fxsparse.graph.specialize_calls import by_mode, check_inputs, one_mode
from fxsparse.graph.specialize_record import record_calls
from fxsparse.graph.tracer import INHERITED, check_root

_OTHER_SEEDS = (SEED + 1, SEED + 2, SEED + 3)


def specialized(model: nn.Module, module: nn.Module, reference: Reference) -> CapturedModule:
    """One graph for the inputs of `reference`, in train and in eval mode, shown to compute what the model computes.

    Args:
        model: the model; it stays as it is.
        module: its structural clone, whose containers the result takes over.
        reference: the model's behaviour on the example inputs.

    Raises:
        Untraceable: when there is no such graph, with the reason.
    """
    check_root(module, kept=INHERITED)
    args, kwargs = reference.args, reference.kwargs
    evaluation, graph = record_calls(model, args, kwargs, False)
    training, other = record_calls(model, args, kwargs, True)
    _merge(graph, other, dict.fromkeys((*evaluation.flags, *training.flags)))
    graph.set_codegen(SignatureCodeGen(inspect.signature(inspect.unwrap(type(module).forward))))
    try:
        made = CapturedModule(module, graph, inherits=True)
    except Exception as error:  # what was passed to torch functions need not be expressible as code
        raise Untraceable(f"its graph cannot be written as code ({error})", NOTHING) from error
    _check(made, reference)
    if evaluation.reads or training.reads:
        _check_reads(made, args, kwargs)
    return made


def specialisation(module: nn.Module) -> str | None:
    """To what the graphs of `module` are specialised, as one sentence; None when they are generic."""
    for captured in graphs_of(module).values():
        for node in captured.graph.find_nodes(op="call_function", target=check_inputs):
            pairs = zip(node.args[1], node.args[2], strict=True)
            said = ", ".join(f"{name} {what}" for name, what in pairs if what not in ("None", "()", "{}"))
            return f"the graph is specialised to the example inputs: shapes {said}, control flow as it ran on them"
    return None


def _merge(graph: fx.Graph, other: fx.Graph, flags: Iterable[str]) -> None:
    """Let the eval graph choose between its constants and those of the train graph.

    Raises:
        Untraceable: when they differ in more than constants.
    """
    ours, theirs = list(graph.nodes), list(other.nodes)
    twins = dict(zip(theirs, ours, strict=False))
    differ = "its graphs in train and eval mode differ in more than constants"
    mend = "use modules such as nn.Dropout instead of branches on `self.training`"
    if [(n.op, n.target) for n in ours] != [(n.op, n.target) for n in theirs]:
        first = next((a for a, b in zip(ours, theirs, strict=False) if (a.op, a.target) != (b.op, b.target)), ours[-1])
        raise Untraceable(f"{differ} (from `{first.name}` on)", mend)
    training: list[fx.Node] = []

    def chosen(ours: Any, theirs: Any) -> Any:
        if isinstance(ours, fx.Node) or isinstance(theirs, fx.Node):
            if not isinstance(theirs, fx.Node) or twins[theirs] is not ours:
                raise Untraceable(differ, mend)
            return ours
        if isinstance(ours, tuple | list) and isinstance(theirs, tuple | list) and len(ours) == len(theirs):
            items = [chosen(a, b) for a, b in zip(ours, theirs, strict=True)]
            return items if isinstance(ours, list) else tuple(items)
        if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
            return {key: chosen(ours[key], theirs[key]) for key in ours}
        if type(ours) is type(theirs) and repr(ours) == repr(theirs):
            return ours
        if _holds_nodes(ours) or _holds_nodes(theirs):
            raise Untraceable(differ, mend)
        if not training:
            training.append(_flag(graph, flags))
        with graph.inserting_after(training[0]):
            return graph.call_function(by_mode, (training[0], theirs, ours))

    for a, b in zip(ours, theirs, strict=True):
        if a.op != "placeholder":
            a.args, a.kwargs = chosen(a.args, b.args), chosen(a.kwargs, b.kwargs)


def _holds_nodes(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return bool(found)


def _flag(graph: fx.Graph, paths: Iterable[str]) -> fx.Node:
    """The training flag of the modules at `paths`, read at the head of the graph, behind the guard of the inputs."""
    (head,) = graph.find_nodes(op="call_function", target=check_inputs)
    read = list(paths)
    if not read:
        raise Untraceable("its graphs in train and eval mode differ, and it reads no training flag", NOTHING)
    with graph.inserting_before(head.next):
        targets = {path or "the model": f"{path}.training".lstrip(".") for path in read}
        nodes = {name: graph.create_node("get_attr", target) for name, target in targets.items()}
        return graph.call_function(one_mode, (nodes,))


def _check(made: CapturedModule, reference: Reference) -> None:
    """The same as the model, bit for bit, in both modes, also with other values in the inputs."""
    examples = [(reference.args, reference.kwargs)]
    examples += [_perturbed(reference.args, reference.kwargs, negate) for negate in (False, True)]
    examples.append(_requiring_gradients(*examples[1]))
    difference = reference.difference(made, exact=True)
    for number, (args, kwargs) in enumerate(examples):
        if difference is None:
            here = Reference(reference.model, args, kwargs, training=False)
            here._with_gradients = {0: True, 1: True}
            difference = here.difference(made, exact=True)
            if not here.repeats:
                raise Untraceable("the model does not repeat itself from the same seed", NOTHING)
        if difference is not None:
            where = "other values of the same shapes" if number else "the example inputs"
            raise Untraceable(f"its specialised graph behaves differently on {where}: {difference}", NOTHING)


def _perturbed(args: tuple[Any, ...], kwargs: dict[str, Any], negate: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with the elements of every tensor permuted, and floating-point ones negated."""
    generator = torch.Generator().manual_seed(SEED + negate)

    def changed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.is_meta or value.layout is not torch.strided:
            return value
        order = torch.randperm(value.numel(), generator=generator).to(value.device)
        result = value.detach().reshape(-1)[order].reshape(value.shape)
        if negate and (value.is_floating_point() or value.is_complex()):
            result = -result
        return result.requires_grad_(value.requires_grad)

    new_args, new_kwargs = pytree.tree_map(changed, (args, kwargs))
    return new_args, new_kwargs


def _requiring_gradients(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    new_args, new_kwargs = fresh_inputs(args, kwargs)
    for tensor in tensors_of((new_args, new_kwargs)):
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.requires_grad_()
    return new_args, new_kwargs


def _check_reads(made: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What Python code reads must not depend on random draws."""
    for seed in _OTHER_SEEDS:
        for training in (False, True):
            clone = isolated_clone(made, copied=[name for name, _ in made.named_parameters()])
            inputs = fresh_inputs(args, kwargs)
            with mode_of(clone, training), seeded(seed), torch.no_grad():
                try:
                    clone(*inputs[0], **inputs[1])
                except CaptureError as error:
                    raise Untraceable(f"its way depends on random draws: {error}", NOTHING) from error
