"""Dead weights stay dead through training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.graph.inputs import fresh_inputs
from fxsparse.graph.scopes import seeded
from fxsparse.nn import alive_gains
from fxsparse.sparsity import Uniform
from fxsparse.zoo.measure import Trained, flatten, forward, loss_of, outputs_difference, preserved_buffers, train_run
from fxsparse.zoo.subject import RUNS, NotApplicableError, Sheet, Subject, first_line

STEPS = 3
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
GRADIENT = 1e-3
"""Relative difference up to which gradients count as equal."""


def train(subject: Subject, sheet: Sheet) -> None:
    """Three steps of AdamW under static masks: at every moment the zeros of a masked weight are its dead entries."""
    if isinstance(subject.trained, Exception):
        raise NotApplicableError(f"the original does not train: {first_line(subject.trained)}")
    sparse = subject.sparse
    try:
        _train(subject, sparse, sheet)
    except BaseException:
        subject.forget_sparse()
        raise


def _train(subject: Subject, sparse: nn.Module, sheet: Sheet) -> None:
    masks = fxsparse.masks(sparse)
    _check_density(subject, sparse, sheet)
    never = _zeros_at_start(subject, masks)
    _check_zeros(sparse, never, "as transformed", sheet)
    _check_modes(subject, sparse, sheet)
    _compare_gradients(subject, sparse, sheet)
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    density = sum(int(mask.sum()) for mask in masks.values()) / max(1, sum(mask.numel() for mask in masks.values()))
    handle = fxsparse.attach(sparse, optimizer, fxsparse.Static(sparsity=1.0 - density, distribution=Uniform()))
    kept = {name: mask.clone() for name, mask in masks.items()}
    _check_zeros(sparse, never, "before the first step", sheet)
    losses = []
    sparse.train()
    for step in range(STEPS):
        args, kwargs = fresh_inputs(*subject.train_inputs())
        optimizer.zero_grad(set_to_none=True)
        with seeded(step):
            loss = loss_of(flatten(sparse(*args, **kwargs))[1])
            loss.backward()  # type: ignore[no-untyped-call]
        _check_zeros(sparse, never, f"before step {step + 1}", sheet)
        optimizer.step()
        _check_zeros(sparse, never, f"after step {step + 1}", sheet)
        losses.append(float(loss.detach()))
    handle.detach()
    optimizer.zero_grad(set_to_none=True)
    moved = [name for name, mask in fxsparse.masks(sparse).items() if not torch.equal(mask, kept[name])]
    sheet.check(not moved, f"static masks changed: {moved[:3]}")
    sheet.numbers["losses"] = losses
    sheet.check(
        all(map(math.isfinite, losses)) or not math.isfinite(subject.trained.loss),  # type: ignore[union-attr]
        f"the loss is not finite: {losses}",
    )
    _check_repeats(subject, sparse, sheet)


def _check_density(subject: Subject, sparse: nn.Module, sheet: Sheet) -> None:
    """Each mask keeps as many entries as planned, and the whole is as sparse as asked for."""
    masks = fxsparse.masks(sparse)
    off = []
    for weight in subject.plan().masked:
        alive = int(masks[weight.name].sum())
        if alive != weight.target.alive:
            off.append(f"`{weight.name}` keeps {alive}, planned {weight.target.alive}")
    total, alive = sum(mask.numel() for mask in masks.values()), sum(int(mask.sum()) for mask in masks.values())
    sheet.numbers["density"] = round(alive / max(1, total), 6)
    sheet.check(not off, f"{len(off)} masks have another density than planned: {'; '.join(off[:3])}", wrong=True)
    sheet.check(
        abs(alive - (1 - subject.sparsity) * total) <= len(masks),
        f"the masked weights have density {alive / max(1, total):.4f}, asked for {1 - subject.sparsity:.4f}",
        wrong=True,
    )


def _zeros_at_start(subject: Subject, masks: Iterable[str]) -> dict[str, Tensor]:
    """Alive entries that the original itself starts with at zero: the only alive ones that may be zero."""
    original = dict(subject.build().named_parameters())
    return {name: original[name].detach() == 0 for name in masks}


def _check_zeros(sparse: nn.Module, never: dict[str, Tensor], when: str, sheet: Sheet) -> None:
    for name, mask in fxsparse.masks(sparse).items():
        zero = sparse.get_parameter(name).detach() == 0
        alive_dead = int((~mask & ~zero).sum())
        dead_alive = int((mask & zero & ~never[name]).sum())
        if alive_dead or dead_alive:
            text = f"`{name}` has {alive_dead} dead entries that are not zero and {dead_alive} alive zeros {when}"
            sheet.check(False, text, wrong=True)
            return


def _check_modes(subject: Subject, sparse: nn.Module, sheet: Sheet) -> None:
    """`train()` and `eval()` switch the same modules as they do in the original."""
    original = subject.build()
    for training in (False, True):
        theirs = {name: module.training for name, module in original.train(training).named_modules()}
        ours = {name: module.training for name, module in sparse.train(training).named_modules()}
        off = sorted(name for name, flag in theirs.items() if ours.get(name, flag) != flag)
        sheet.check(not off, f"train({training}) leaves other modes than the original's: {off[:3]}", wrong=True)


def _compare_gradients(subject: Subject, sparse: nn.Module, sheet: Sheet) -> None:
    """Alive entries get the gradient of the folded model, and the same parameters get none."""
    folded = _folded_run(subject, sparse)
    with preserved_buffers(sparse):
        found = train_run(sparse.train(), subject.train_inputs())
    gaps = _Gaps.between(folded, found, _alive(sparse))
    own = _own_gaps(subject, sparse, folded) if gaps.above(subject) else _Gaps([], 0.0, "", 0.0)
    if own.gradient or own.output:
        sheet.remarks.append(
            f"the folded model differs from itself by {max(own.gradient, own.output):.2g} in train mode"
        )
    missing = sorted(set(gaps.missing) - set(own.missing))
    sheet.check(not missing, f"other parameters have no gradient than in the folded model: {missing[:3]}", wrong=True)
    bound = max(subject.tolerance(GRADIENT), 4 * own.gradient)
    what = f"gradients of alive entries{gaps.where and f' (`{gaps.where}`)'}"
    sheet.within("alive_gradient_difference", gaps.gradient, bound, what)
    bound = max(subject.tolerance(), 4 * own.output)
    sheet.within("train_output_difference", gaps.output, bound, "outputs in train mode and the folded model's")


@dataclass(frozen=True)
class _Gaps:
    """How far two training steps of one model are apart."""

    missing: list[str]
    gradient: float
    where: str
    output: float

    @classmethod
    def between(cls, expected: Trained, found: Trained, masks: Mapping[str, Tensor]) -> _Gaps:
        missing, worst, where = gradient_gaps(expected.gradients, found.gradients, masks)
        return cls(missing, worst, where, outputs_difference(expected.outputs, found.outputs))

    def above(self, subject: Subject) -> bool:
        fine = self.gradient <= subject.tolerance(GRADIENT) and self.output <= subject.tolerance()
        return bool(self.missing) or not fine


def _alive(sparse: nn.Module) -> dict[str, Tensor]:
    """The entries whose gradients are compared: not those of dead weights, nor magnitudes of wholly dead slices."""
    return {**fxsparse.masks(sparse), **alive_gains(sparse)}


def _folded_run(subject: Subject, sparse: nn.Module) -> Trained:
    return train_run(fxsparse.finalize(sparse).train(), subject.train_inputs())


def _own_gaps(subject: Subject, sparse: nn.Module, first: Trained) -> _Gaps:
    """How far the folded model is from itself: some draw from generators of their own, which no seed repeats."""
    alive = _alive(sparse)
    runs = [_Gaps.between(first, _folded_run(subject, sparse), alive) for _ in range(RUNS)]
    missing = [name for gaps in runs for name in gaps.missing]
    return _Gaps(missing, max(gaps.gradient for gaps in runs), "", max(gaps.output for gaps in runs))


def gradient_gaps(
    expected: Mapping[str, Tensor | None], found: Mapping[str, Tensor | None], masks: Mapping[str, Tensor]
) -> tuple[list[str], float, str]:
    """Names with a gradient on one side only; the largest relative difference of alive entries, and its name."""
    missing, worst, where = [], 0.0, ""
    dense = {name: gradient.to_dense() for name, gradient in expected.items() if gradient is not None}
    largest = max((float(gradient.abs().max()) for gradient in dense.values() if gradient.numel()), default=0.0)
    for name in expected:
        gradient = found.get(name)
        if (name in dense) != (gradient is not None):
            missing.append(name)
        if name not in dense or gradient is None or not gradient.numel():
            continue
        gap = (dense[name] - gradient.to_dense()).abs()
        if name in masks:
            gap = torch.where(masks[name], gap, 0.0)
        size = max(float(dense[name].abs().max()), 1e-3 * largest)
        relative = float(gap.max()) / size if size else 0.0
        if not relative <= worst:
            worst, where = relative, name
    return missing, worst, where


def _check_repeats(subject: Subject, sparse: nn.Module, sheet: Sheet) -> None:
    """Back in eval mode the trained model repeats itself, whatever the seed, where the original does."""
    sparse.eval()
    original = subject.build().eval()
    if outputs_difference(subject.expected, forward(original, subject.inputs(), seed=7)) != 0.0:
        sheet.remarks.append("random in eval mode")
        return
    first, second = forward(sparse, subject.inputs(), seed=3), forward(sparse, subject.inputs(), seed=4)
    gap = outputs_difference(first, second)
    sheet.within("repeat_difference", gap, 0.0, "outputs of the trained model in eval mode with two seeds")
