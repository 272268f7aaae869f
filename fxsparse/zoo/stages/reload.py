"""State dicts, deep copies, folding and hooks."""

from __future__ import annotations

import copy

import torch
from torch import nn

import fxsparse
from fxsparse.zoo.measure import Outputs, forward, outputs_difference
from fxsparse.zoo.subject import Sheet, Subject, first_line


def reload(subject: Subject, sheet: Sheet) -> None:
    """Every way in which people store, copy, fold and watch a model works as it does on the original."""
    sparse = subject.sparse.eval()
    inputs = subject.inputs()
    reference = forward(sparse, inputs)
    fresh = subject.new_sparse().eval()
    _load_original(subject, fresh, sheet)
    _load_sparse(subject, sparse, reference, fresh, sheet)
    _copy(subject, sparse, reference, sheet)
    _fold(subject, sparse, reference, sheet)
    _watch(subject, sparse, sheet)


def _load_original(subject: Subject, fresh: nn.Module, sheet: Sheet) -> None:
    """The original's state dict into a fresh sparse model: its masks stay, its outputs too."""
    before = forward(fresh, subject.inputs())
    state = copy.deepcopy(subject.build().state_dict())  # with its metadata: versions of layers
    try:
        fresh.load_state_dict(state, strict=True)
    except Exception as error:
        sheet.check(False, f"the original's state_dict does not load: {first_line(error)}")
        return
    gap = outputs_difference(before, forward(fresh, subject.inputs()))
    sheet.within("load_original_difference", gap, subject.tolerance(0.0), "outputs after loading the original's state")
    for name, mask in fxsparse.masks(fresh).items():
        weight = fresh.get_parameter(name).detach()
        if not sheet.check(
            not bool(weight[~mask].any()), f"loading the original revived dead weights of `{name}`", True
        ):
            return


def _load_sparse(subject: Subject, sparse: nn.Module, reference: Outputs, fresh: nn.Module, sheet: Sheet) -> None:
    """The sparse state dict, masks and all, into a sparse model with other masks."""
    target = subject.dense if subject.dense is not None else fresh
    subject.dense = None  # its state is gone after this
    state = copy.deepcopy(sparse.state_dict())
    try:
        target.load_state_dict(state, strict=True)
    except Exception as error:
        sheet.check(False, f"the sparse state_dict does not load: {first_line(error)}")
        return
    gap = outputs_difference(reference, forward(target.eval(), subject.inputs()))
    sheet.within("load_sparse_difference", gap, subject.tolerance(0.0), "outputs after loading the sparse state")
    loaded = fxsparse.masks(target)
    off = [n for n, mask in fxsparse.masks(sparse).items() if n not in loaded or not torch.equal(mask, loaded[n])]
    sheet.check(not off, f"masks were not loaded: {off[:3]}", wrong=True)


def _copy(subject: Subject, sparse: nn.Module, reference: Outputs, sheet: Sheet) -> None:
    """A deep copy computes the same and shares nothing."""
    if not _copies(subject):
        sheet.remarks.append("the original's deep copies do not run as it does: not tried")
        return
    try:
        twin = copy.deepcopy(sparse)
    except Exception as error:
        sheet.check(False, f"deepcopy fails: {first_line(error)}")
        return
    gap = outputs_difference(reference, forward(twin, subject.inputs()))
    sheet.within("deepcopy_difference", gap, subject.tolerance(0.0), "outputs of a deep copy")
    copied = fxsparse.masks(twin)
    sheet.check(copied.keys() == fxsparse.masks(sparse).keys(), "a deep copy has other masks", wrong=True)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    fxsparse.set_masks(twin, {name: torch.zeros_like(mask) for name, mask in copied.items()})
    gap = outputs_difference(reference, forward(sparse, subject.inputs()))
    sheet.within("independence_difference", gap, subject.tolerance(0.0), "outputs after changing a deep copy")


def _copies(subject: Subject) -> bool:
    try:
        twin = copy.deepcopy(subject.build().eval())
        return outputs_difference(subject.expected, forward(twin, subject.inputs())) <= subject.tolerance(0.0)
    except Exception:  # whatever a model's own copy raises, it is not the sparse model's fault
        return False


def _fold(subject: Subject, sparse: nn.Module, reference: Outputs, sheet: Sheet) -> None:
    """The folded model's state dict loads in the original class, whose outputs are those of the masked model."""
    folded = fxsparse.finalize(sparse).eval()
    gap = outputs_difference(reference, forward(folded, subject.inputs()))
    sheet.within("fold_difference", gap, subject.tolerance(), "outputs of the folded model")
    stay = list(fxsparse.masks(folded))
    sheet.numbers["unfolded"] = stay
    if stay:
        sheet.remarks.append(f"{len(stay)} masks stay when folding: the original class has no values for them")
        return
    original = subject.build().eval()
    try:
        original.load_state_dict(folded.state_dict(), strict=True)
    except Exception as error:
        sheet.check(False, f"the folded state_dict does not load in the original: {first_line(error)}")
        return
    gap = outputs_difference(reference, forward(original, subject.inputs()))
    sheet.within("original_difference", gap, subject.tolerance(), "outputs of the original with the folded state")


def _watch(subject: Subject, sparse: nn.Module, sheet: Sheet) -> None:
    """Hooks put on the finished model fire: on the model itself, and on the modules that own masked weights."""
    theirs = _fired(subject.build().eval(), subject, None)
    leaves = {name for name, children in theirs.items() if name and not children}
    ours = set(_fired(sparse, subject, leaves | {""}))
    owners = {name.rpartition(".")[0] for name in fxsparse.masks(sparse)} & leaves
    sheet.numbers["leaf_hooks"], sheet.numbers["leaf_modules"] = len(leaves & ours), len(leaves)
    sheet.check("" in ours, "a forward hook on the model does not fire")
    sheet.check(not owners or bool(owners & ours), f"no forward hook fires on a module with a masked weight: {owners}")
    missed = sorted(owners - ours)
    sheet.numbers["silent_hooks"] = missed
    if missed:
        sheet.remarks.append(f"hooks on {len(missed)} of {len(owners)} modules with masked weights do not fire")


def _fired(model: nn.Module, subject: Subject, names: set[str] | None) -> dict[str, int]:
    """Paths (of `names`, or all) whose forward hook fires, with the number of their children."""
    fired: dict[str, int] = {}
    handles = []
    for path, module in model.named_modules():
        if (names is None or path in names) and not isinstance(module, torch.jit.ScriptModule):
            count = sum(1 for _ in module.children())

            def hook(module: nn.Module, args: object, output: object, path: str = path, count: int = count) -> None:
                fired[path] = count

            handles.append(module.register_forward_hook(hook))
    try:
        forward(model, subject.inputs())
    finally:
        for handle in handles:
            handle.remove()
    return fired
