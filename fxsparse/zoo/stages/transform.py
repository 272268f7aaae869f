"""Masks that are all alive change nothing; and what gets a mask, by which route, and what not and why."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

import fxsparse
from fxsparse.graph import graphs_of, record
from fxsparse.graph.scopes import rng_fingerprint
from fxsparse.zoo.measure import (
    Trained,
    forward,
    named_difference,
    outputs_difference,
    preserved_buffers,
    train_run,
)
from fxsparse.zoo.subject import RUNS, Sheet, Subject, first_line

GRADIENT = 1e-3
"""Relative difference up to which gradients count as equal where they are not bit for bit."""

_LONGEST = 12


def transform(subject: Subject, sheet: Sheet) -> None:
    """Transform at sparsity 0 and compare outputs, gradients and buffers with the original's; list the coverage."""
    model, inputs = subject.build().eval(), subject.inputs()
    before = {name: tensor.detach().clone() for name, tensor in _state(model).items()}
    _warm_up()
    _time_parts(subject, sheet)
    seeds = rng_fingerprint()
    began, wall = time.process_time(), time.monotonic()
    dense = fxsparse.transform(model, inputs)
    seconds = time.process_time() - began
    sheet.numbers["transform_s"], sheet.numbers["transform_wall_s"] = (
        round(seconds, 4),
        round(time.monotonic() - wall, 4),
    )
    parts = sheet.numbers["record_s"] + sheet.numbers["trace_s"]
    sheet.numbers["ratio"] = round(seconds / parts, 3) if parts else 0.0
    sheet.check(rng_fingerprint() == seeds, "transform moved a random generator")
    _check_untouched(model, before, sheet)
    _note_coverage(model, fxsparse.plan(model, inputs), dense, sheet)
    dense.eval()
    gap = outputs_difference(subject.expected, forward(dense, inputs))
    sheet.within("eval_difference", gap, subject.tolerance(), "outputs at sparsity 0 in eval mode")
    if gap and gap <= subject.tolerance():
        sheet.remarks.append(f"not bit for bit in eval mode: {gap:.2g}")
    _compare_training(subject, dense, sheet)
    subject.dense = dense


def _warm_up() -> None:
    """Let what happens once a process (imports, first uses of torch) happen outside the times."""
    tiny = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    fx.symbolic_trace(tiny)
    fxsparse.transform(tiny, (torch.zeros(1, 2),))


def _time_parts(subject: Subject, sheet: Sheet) -> None:
    """CPU seconds of one recorder run and of one symbolic trace.

    Each has a model of its own: the forward pass of a model that keeps values on itself leaves the tracer's stand-ins
    there, and no later call survives them.
    """
    model, inputs = subject.build().eval(), subject.inputs()
    began = time.process_time()
    record(model, *inputs)
    sheet.numbers["record_s"] = round(time.process_time() - began, 4)
    model = subject.build().eval()
    began = time.process_time()
    try:
        fx.symbolic_trace(model)
    except Exception as error:  # most models cannot be traced so, for reasons of every kind
        sheet.numbers["symbolic_trace"] = first_line(error)
    sheet.numbers["trace_s"] = round(time.process_time() - began, 4)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _check_untouched(model: nn.Module, before: dict[str, Tensor], sheet: Sheet) -> None:
    after = _state(model)
    changed = [name for name, value in before.items() if name not in after or not _same(value, after[name])]
    sheet.check(not changed, f"transform changed the original's {_list(changed)}")
    sheet.check(after.keys() <= before.keys(), f"transform added {_list(after.keys() - before.keys())} to the original")
    sheet.check(not any(module.training for module in model.modules()), "transform switched the original's mode")
    graded = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    sheet.check(not graded, f"transform left gradients on the original's {_list(graded)}")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a != a)).all())


def _note_coverage(model: nn.Module, plan: Any, dense: nn.Module, sheet: Sheet) -> None:
    """Which weights have a mask; a weight of two or more axes without a mask and without a reason is a silent skip."""
    masks = fxsparse.masks(dense)
    planned = {weight.name: weight for weight in plan.weights}
    matrices = {n: p for n, p in model.named_parameters() if p.ndim >= 2 and (p.is_floating_point() or p.is_complex())}
    numbers = sheet.numbers
    numbers["masked"] = len(masks)
    numbers["masked_elements"] = sum(mask.numel() for mask in masks.values())
    numbers["weight_elements"] = sum(parameter.numel() for parameter in matrices.values())
    numbers["routes"] = dict(Counter(w.route.value for w in plan.weights if w.route is not None))
    refused, left = {}, Counter[str]()
    silent = [name for name, weight in planned.items() if weight.route is not None and name not in masks]
    for name, parameter in matrices.items():
        if name in masks:
            continue
        reason = planned[name].reason if name in planned else ""
        if not reason:
            silent.append(name)
        elif is_refusal(planned[name]):
            refused[name] = reason
        else:
            left[reason] += parameter.numel()
    numbers["refused"] = dict(list(refused.items())[:_LONGEST])
    numbers["refused_count"] = len(refused)
    numbers["left_out"] = dict(left.most_common(_LONGEST))
    numbers["silent"] = sorted(silent)[:_LONGEST]
    numbers["silent_count"] = len(silent)
    sheet.check(not silent, f"no mask and no reason: {_list(silent)}")
    sheet.check(bool(masks), "nothing is masked")
    graphs = list(graphs_of(dense))
    numbers["root_graph"], numbers["graphs"] = "" in graphs, len(graphs)
    numbers["python"] = [str(refusal)[:200] for refusal in plan.refusals[:_LONGEST]]
    numbers["python_count"] = len(plan.refusals)


def is_refusal(weight: Any) -> bool:
    """Whether a weight of a plan cannot be masked, as opposed to one that is left out unless it is named."""
    told = getattr(weight, "refused", None)
    return bool(told) if told is not None else weight.route is None and "`include`" not in weight.reason


def _compare_training(subject: Subject, dense: nn.Module, sheet: Sheet) -> None:
    """The same seed in train mode: outputs, gradients of every parameter, buffers afterwards."""
    expected = subject.trained
    if isinstance(expected, Exception):
        sheet.remarks.append(f"the original does not train: {first_line(expected)}")
        return
    with preserved_buffers(dense):
        found = train_run(dense.train(), subject.train_inputs())
    dense.eval()
    gaps = _training_gaps(expected, found)
    if max(gap for gap, _ in gaps.values()) > 0.0:
        own = _own_noise(subject, expected)
    else:
        own = dict.fromkeys(gaps, 0.0)
    for name, (gap, where) in gaps.items():
        bound = max(GRADIENT if name == "gradient" else subject.tolerance(), 4 * own[name])
        sheet.within(f"train_{name}_difference", gap, bound, f"{name}s in train mode{where and f' (`{where}`)'}")
        if own[name]:
            sheet.remarks.append(f"{name}s of the original differ from themselves by {own[name]:.2g} in train mode")


def _own_noise(subject: Subject, expected: Trained) -> dict[str, float]:
    """How far the original is from itself, where something differs."""
    own: dict[str, float] = {}
    for _ in range(1 if subject.deterministic else RUNS):
        again = train_run(subject.build().train(), subject.train_inputs())
        for name, (gap, _) in _training_gaps(expected, again).items():
            own[name] = max(gap, own.get(name, 0.0))
    return own


def _training_gaps(expected: Trained, found: Trained) -> dict[str, tuple[float, str]]:
    buffers = {name: buffer for name, buffer in found.buffers.items() if name in expected.buffers}
    return {
        "output": (outputs_difference(expected.outputs, found.outputs), ""),
        "gradient": named_difference(expected.gradients, found.gradients),
        "buffer": named_difference(expected.buffers, buffers),
    }


def _list(names: Any) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    return ", ".join(f"`{name}`" for name in shown[:3]) + more
