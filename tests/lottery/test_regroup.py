"""Regrouping: stages that are what they say, supports that fit, tickets that hold them, models left whole."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxsparse.curvature.compensate import Compensation
from fxsparse.data import digits
from fxsparse.errors import ConfigError, DataError, TicketError
from fxsparse.lottery import load_ticket, save_ticket
from fxsparse.lottery.regroup import Projection, regroup
from fxsparse.lottery.regroup_ticket import regroup_ticket
from fxsparse.models import mlp
from fxsparse.nn import masked_weights, masks
from fxsparse.planning import transform
from fxsparse.sparsity import Channel, SharedSupport
from fxsparse.sparsity.grouping import support_order
from fxsparse.training import OneShot, attach, prune
from fxsparse.training.handle import handles as attached_handles
from fxsparse.training.loop import Task, evaluate, fit, start

HIDDEN = (48, 32)


@pytest.fixture(scope="module")
def task() -> Task:
    splits = digits()
    example = (splits.train.inputs[:2],)
    return Task(
        build=lambda: transform(mlp(64, HIDDEN), example, exclude="hidden.0.weight"),
        train=splits.train,
        validation=splits.validation,
        epochs=2,
    )


@pytest.fixture(scope="module")
def trained(task: Task) -> nn.Module:
    state = start(task, 0)
    fit(state, task, 6 * task.steps_per_epoch)
    prune(state.model, OneShot(0.6))
    fit(state, task, 8 * task.steps_per_epoch)
    for masked in masked_weights(state.model).values():  # the plain loop trains dead weights, too
        masked.apply_()
    return state.model


def batches(task: Task) -> list[Tensor]:
    return [task.train.inputs[:500], task.train.inputs[500:]]


def test_the_stages_are_what_they_say(task: Task, trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    told: list[str] = []
    report = regroup(
        model,
        SharedSupport(8),
        batches(task),
        finetune=task,
        progress=lambda name, row: told.append(name if row is None else f"{name} {row.epoch}"),
    )
    assert [stage.name for stage in report.stages] == ["unstructured", "magnitude", "compensated", "fine-tuned"]
    assert told == ["unstructured", "magnitude", "compensated", "fine-tuned", "fine-tuned 1", "fine-tuned 2"]
    assert report.accuracy("unstructured") == evaluate(trained, task.validation).accuracy
    assert report.accuracy("fine-tuned") == evaluate(model, task.validation).accuracy
    assert report.accuracy("magnitude") < report.accuracy("compensated") <= 1
    assert report.projection is Projection.COMPENSATED and report.compensation is not None
    assert [layer.name for layer in report.compensation.layers] == ["hidden.1.weight", "output.weight"]
    for name, masked in masked_weights(model).items():
        SharedSupport(8).check(masks(model)[name], masked.spec.layout, masked.row_order)
        assert masked.spec.pattern == SharedSupport(8)
        assert bool((masked.weight[~masked.mask] == 0).all())
        before = float(masks(trained)[name].double().mean())
        assert abs(float(masks(model)[name].double().mean()) - before) <= 1 / masked.weight.shape[1]
    with pytest.raises(ConfigError, match="`name` \\(=best\\)"):
        report.accuracy("best")
    assert "compensated" in str(report) and "hidden.1.weight  32x48" in str(report)


def test_without_calibration_magnitudes_decide(task: Task, trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    report = regroup(model, SharedSupport(8), evaluate=lambda each: evaluate(each, task.validation).accuracy)
    assert [stage.name for stage in report.stages] == ["unstructured", "magnitude"]
    assert report.projection is Projection.MAGNITUDE and report.compensation is None
    assert report.accuracy("magnitude") == evaluate(model, task.validation).accuracy
    for layer in report.layers:
        name = layer.name
        old, new = trained.get_parameter(name).detach(), model.get_parameter(name).detach()
        assert torch.equal(new, old * masks(model)[name])
        kept = float((new.double() ** 2).sum() / (old.double() ** 2).sum())
        assert layer.kept == pytest.approx(kept, rel=1e-6) and 0 < layer.kept < 1
    plain = copy.deepcopy(trained)
    unpermuted = regroup(plain, SharedSupport(8), permute=False)
    assert sum(layer.kept for layer in report.layers) > sum(layer.kept for layer in unpermuted.layers)
    assert all(masked.row_order is None for masked in masked_weights(plain).values())
    assert unpermuted.accuracy("magnitude") != unpermuted.accuracy("magnitude")  # NaN: nothing was measured with


def test_what_gains_nothing_stays(task: Task, trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    before = masks(model)["output.weight"].clone()
    report = regroup(model, SharedSupport(16), batches(task))
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["hidden.1.weight"] == "" and "its 10 rows are fewer than a group of 16" in reasons["output.weight"]
    assert torch.equal(masks(model)["output.weight"], before)
    assert torch.equal(model.get_parameter("output.weight"), trained.get_parameter("output.weight"))
    model = copy.deepcopy(trained)
    report = regroup(model, SharedSupport(8), batches(task), names=["output.weight"])
    assert {layer.name: bool(layer.reason) for layer in report.layers} == {
        "hidden.1.weight": True,
        "output.weight": False,
    }
    with pytest.raises(ConfigError, match="`output.weight` stays as it is"):
        regroup(copy.deepcopy(trained), SharedSupport(16), names=["output.weight"])
    with pytest.raises(ConfigError, match="`nope`"):
        regroup(copy.deepcopy(trained), names=["nope"])
    dense = transform(mlp(64, HIDDEN), (task.train.inputs[:2],))
    with pytest.raises(ConfigError, match="stays dense"):
        regroup(dense)
    with pytest.raises(ConfigError, match="no masks"):
        regroup(mlp(64, HIDDEN))


def test_other_patterns(task: Task, trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    report = regroup(model, Channel(1), batches(task), names=["hidden.1.weight"])
    Channel(1).check(masks(model)["hidden.1.weight"])
    assert report.pattern == "Channel(axis=1)"


@pytest.mark.parametrize("where", ["calibration", "training"])
def test_a_failure_leaves_the_model_as_it_was(
    task: Task, trained: nn.Module, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles = []

    def attached(*args, **kwargs):
        handles.append(attach(*args, **kwargs))
        return handles[-1]

    monkeypatch.setattr(sys.modules["fxsparse.lottery.regroup"], "attach", attached)
    model = copy.deepcopy(trained)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bad = batches(task)
    healing = task
    if where == "calibration":
        bad[1] = bad[1] * torch.nan
    else:
        healing = Task(**{**vars(task), "loss": lambda outputs, labels: outputs.sum() * torch.inf})
    with pytest.raises(DataError):
        regroup(model, SharedSupport(8), bad, finetune=healing)
    after = model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert all(str(masked.spec.pattern) == "Unstructured()" for masked in masked_weights(model).values())
    assert all(masked.row_order is None for masked in masked_weights(model).values())
    regroup(model, SharedSupport(8), batches(task), finetune=task)
    assert len(handles) == 1 + (where == "training")
    assert not any(handle in attached_handles() for handle in handles)


def test_a_ticket_with_its_lineage(task: Task, trained: nn.Module, tmp_path: Path) -> None:
    inputs = (task.train.inputs[:2],)
    initial = {name: torch.zeros_like(tensor) for name, tensor in trained.state_dict().items()}
    parent = save_ticket(
        trained,
        tmp_path / "parent.ticket",
        weights=initial,
        lineage={"method": "one-shot", "round": 3, "data_fingerprint": "ab"},
        factory="fxsparse.models:mlp",
        arguments={"in_features": 64, "hidden": list(HIDDEN)},
        input_signature=inputs,
    )
    made, report = regroup_ticket(parent, tmp_path / "new.ticket", task, SharedSupport(8), samples=600)
    made = load_ticket(made.path)
    assert made.lineage["parent"] == parent.ticket_id and made.lineage["method"] == "regroup"
    assert made.lineage["pattern"] == "SharedSupport(8)" and made.lineage["parent_method"] == "one-shot"
    assert made.lineage["round"] == 3 and made.lineage["data_fingerprint"] == "ab"
    assert made.lineage["finetune"] == {"epochs": 2, "batch_size": 64} and made.lineage["calibration_samples"] == 600
    assert made.metrics["stages"] == {stage.name: stage.accuracy for stage in report.stages}
    for name, tensor in parent.weights.items():
        assert torch.equal(made.weights[name], tensor), "the weights to retrain from are the parent's"
    finished = made.apply(made.build(), final=True)
    assert evaluate(finished, task.validation).accuracy == report.accuracy("fine-tuned")
    for mask in made.masks.values():
        order = support_order(mask, 8)
        assert order is not None
        SharedSupport(8).check(mask, row_order=order)
    again, _ = regroup_ticket(parent, tmp_path / "again.ticket", task, SharedSupport(8), samples=600)
    assert again.ticket_id == made.ticket_id, "the same on every run"
    plain, short = regroup_ticket(parent, tmp_path / "plain.ticket", task, SharedSupport(8), samples=0, finetune=False)
    assert [stage.name for stage in short.stages] == ["unstructured", "magnitude"]
    assert plain.lineage["finetune"] is None and plain.lineage["projection"] == "magnitude"
    with pytest.raises(TicketError, match="exists"):
        regroup_ticket(parent, tmp_path / "new.ticket", task, SharedSupport(8), samples=600, finetune=False)
    untrained = save_ticket(trained, tmp_path / "untrained.ticket", factory="fxsparse.models:mlp")
    with pytest.raises(TicketError):
        regroup_ticket(untrained, tmp_path / "other.ticket", task, SharedSupport(8))
    assert not (tmp_path / "other.ticket").exists()


def test_settings_of_the_solve_are_taken(task: Task, trained: nn.Module) -> None:
    found = []
    for damping in (0.01, 10.0):
        model = copy.deepcopy(trained)
        report = regroup(model, SharedSupport(8), batches(task), how=Compensation(damping=damping))
        assert report.compensation is not None
        found.append(report.compensation.layers[0].after)
    assert found[0] < found[1]
