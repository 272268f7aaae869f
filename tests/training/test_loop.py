"""The deterministic loop: order, capture and restore, no trace left in global state."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from fxsparse.errors import ConfigError, DataError
from fxsparse.training.loop import EpochRow, Samples, Task, TrainState, correct, epoch_order, evaluate, fit, start
from fxsparse.training.snapshot import Snapshot


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def _samples(count: int = 22) -> Samples:
    generator = torch.Generator().manual_seed(1)
    return Samples(torch.randn(count, 5, generator=generator), torch.randint(3, (count,), generator=generator))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}
SCHEDULERS = {
    "none": None,
    "cosine": lambda o, total: torch.optim.lr_scheduler.CosineAnnealingLR(o, total),
    "multistep": lambda o, total: torch.optim.lr_scheduler.MultiStepLR(o, [3, 3, 9]),
    "chained": lambda o, total: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.ConstantLR(o, 0.5, 2), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[4],
    ),
}


def _task(optimizer: str = "sgd", scheduler: str = "none", **options: object) -> Task:
    return Task(
        _net,
        _samples(),
        _samples(9),
        epochs=3,
        batch_size=5,
        optimizer=OPTIMIZERS[optimizer],
        scheduler=SCHEDULERS[scheduler],
        **options,  # type: ignore[arg-type]  # spelt by the tests
    )


def _run(task: Task, state: TrainState, until: int | None = None) -> list[EpochRow]:
    rows: list[EpochRow] = []
    fit(state, task, until, on_epoch=lambda _, row: rows.append(row))
    return rows


def _same(one: TrainState, other: TrainState) -> None:
    left, right = one.capture(), other.capture()
    assert left.values == right.values
    assert set(left.tensors) == set(right.tensors)
    for name, tensor in left.tensors.items():
        assert torch.equal(tensor, right.tensors[name]), name


@pytest.mark.parametrize(("optimizer", "scheduler"), list(itertools.product(OPTIMIZERS, SCHEDULERS)))
def test_capture_and_restore_continue_bit_for_bit(optimizer: str, scheduler: str, tmp_path: Path) -> None:
    task = _task(optimizer, scheduler)
    whole = start(task, 3)
    rows = _run(task, whole)
    for stop in (0, 1, 5, 7, 14):
        first = start(task, 3)
        before = _run(task, first, stop)
        directory = tmp_path / str(stop)
        directory.mkdir()
        first.capture().write(directory)
        second = start(task, 99)
        _run(task, second, 4)  # a training that stood elsewhere
        second.restore(Snapshot.read(directory))
        _same(first, second)
        after = _run(task, second)
        assert before + after == rows
        _same(whole, second)


def test_same_seed_same_run_other_seed_other_run() -> None:
    task = _task()
    states = [start(task, seed) for seed in (1, 1, 2)]
    histories = [_run(task, state) for state in states]
    assert histories[0] == histories[1] != histories[2]
    assert len(histories[0]) == 3 and histories[0][-1].step == task.total_steps == 15
    assert histories[0][-1].validation is not None and histories[0][-1].validation.count == 9


def test_stopping_and_going_on_is_the_same() -> None:
    task = _task("adam", "cosine")
    whole, parts = start(task, 0), start(task, 0)
    rows = _run(task, whole)
    assert sum((_run(task, parts, until) for until in (1, 2, 6, 11, 15)), []) == rows
    _same(whole, parts)


def test_global_state_is_left_alone() -> None:
    task = _task("adam")
    torch.manual_seed(7)
    before, deterministic = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    state = start(task, 0)
    state.model.eval()
    state.model[1].train()
    flags = [module.training for module in state.model.modules()]
    _run(task, state)
    evaluate(state.model, _samples(), task)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert [module.training for module in state.model.modules()] == flags

    def broken(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        torch.rand(3)
        raise KeyError

    with pytest.raises(KeyError):
        fit(start(task, 0), Task(_net, _samples(), loss=broken))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.are_deterministic_algorithms_enabled() == deterministic


def test_every_sample_once_an_epoch_and_the_order_is_keyed() -> None:
    seen: list[int] = []

    class Spy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.extend(x[:, 0].int().tolist())
            return super().forward(x)

    data = Samples(torch.arange(13.0)[:, None], torch.zeros(13, dtype=torch.int64))
    task = Task(lambda: Spy(1, 2), data, epochs=2, batch_size=4)
    assert task.steps_per_epoch == 4
    fit(start(task, 5), task)
    assert sorted(seen[:13]) == list(range(13)) == sorted(seen[13:])
    assert seen[:13] == epoch_order(13, 5, 0).tolist() and seen[13:] == epoch_order(13, 5, 1).tolist()
    assert seen[:13] != seen[13:]
    assert not torch.equal(epoch_order(13, 5, 0, order=1), epoch_order(13, 5, 0))


def test_evaluation_is_weighted_by_samples() -> None:
    model = _net()
    samples = _samples(17)
    whole = evaluate(model, samples)
    model.eval()
    with torch.no_grad():
        outputs = model(samples.inputs)
    assert math.isclose(whole.loss, float(nn.functional.cross_entropy(outputs, samples.labels)), rel_tol=1e-6)
    assert whole.accuracy == float((outputs.argmax(1) == samples.labels).double().mean())
    parts = evaluate(model, samples, batch_size=5)
    assert parts.accuracy == whole.accuracy and math.isclose(parts.loss, whole.loss, rel_tol=1e-6)


def test_metric_of_a_single_logit() -> None:
    assert correct(torch.tensor([[2.0], [-1.0]]), torch.tensor([1, 1])).tolist() == [True, False]


def test_a_frozen_base_in_eval_mode_stays_there() -> None:
    model = _net()
    model.train()
    model[1].eval()
    mean = model[1].running_mean.clone()
    task = _task()
    from fxsparse.training.loop import start_from

    fit(start_from(task, model, 0), task)
    assert torch.equal(model[1].running_mean, mean)


def test_float16_scaler_is_part_of_the_state() -> None:
    task = _task(autocast=torch.float16)
    state = start(task, 0)
    fit(state, task, 4)
    assert state.scaler is not None
    assert state.capture().values == copy.deepcopy(state.capture().values)
    other = start(task, 0)
    other.restore(state.capture())
    _same(state, other)
    fit(state, task)
    fit(other, task)
    _same(state, other)


def test_extras_travel_along() -> None:
    task = _task()
    state = start(task, 0)
    ema = nn.Linear(2, 2)
    state.extras["ema"] = ema
    snapshot, before = state.capture(), ema.weight.detach().clone()
    nn.init.zeros_(ema.weight)
    state.restore(snapshot)
    assert torch.equal(ema.weight, before)
    state.extras.clear()
    with pytest.raises(ConfigError, match="extras"):
        state.restore(snapshot)


def test_restoring_another_model_changes_nothing() -> None:
    task = _task()
    other = start(Task(lambda: nn.Linear(5, 3), _samples()), 0)
    state = start(task, 0)
    before = state.capture()
    with pytest.raises(ConfigError, match="another model"):
        state.restore(other.capture())
    after = state.capture()
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)


def test_bad_tasks() -> None:
    with pytest.raises(ConfigError, match=r"`epochs` \(=0\)"):
        Task(_net, _samples(), epochs=0)
    with pytest.raises(DataError, match="inputs"):
        Task(_net, Samples(torch.zeros(0, 5), torch.zeros(0)))
    with pytest.raises(ConfigError, match="nothing to train"):
        start(Task(nn.ReLU, _samples()), 0)
    diverging = Task(_net, _samples(), optimizer=lambda p: torch.optim.SGD(p, lr=1e30))
    with pytest.raises(DataError, match="not finite"):
        fit(start(diverging, 0), diverging)
    with pytest.raises(DataError, match="too few"):
        evaluate(_net(), Samples(torch.zeros(0, 5), torch.zeros(0)))


def test_snapshot_of_any_nesting(tmp_path: Path) -> None:
    import collections

    state = {
        "a": [1, 2.5, (True, None, "x"), float("inf"), -0.0],
        3: {"t": torch.arange(4, dtype=torch.bfloat16), (1, 2): torch.tensor(5)},
        "c": collections.Counter({4: 2}),
        "empty": {},
    }
    Snapshot.of(state).write(tmp_path)
    back = Snapshot.read(tmp_path).state()
    assert back["a"] == state["a"] and isinstance(back["a"][2], tuple)
    assert math.copysign(1, back["a"][4]) == -1
    assert isinstance(back["c"], collections.Counter) and back["c"] == state["c"] and back["empty"] == {}
    assert torch.equal(back[3]["t"], state[3]["t"]) and back[3]["t"].dtype is torch.bfloat16
    assert math.isnan(Snapshot.of([float("nan")]).state()[0])
    with pytest.raises(ConfigError, match=r"`a/0`.*function"):
        Snapshot.of({"a": [lambda: 0]})
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match="delete it"):
        Snapshot.read(tmp_path)


def test_a_snapshot_is_a_copy() -> None:
    tensor = torch.zeros(2)
    snapshot = Snapshot.of({"t": tensor})
    tensor.add_(1)
    snapshot.state()["t"].add_(5)
    assert snapshot.state()["t"].tolist() == [0, 0]
