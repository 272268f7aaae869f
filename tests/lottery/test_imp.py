"""The engine: counts, nesting, rewinding, lineage, going on, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fxsparse.errors import ConfigError, DataError, TicketError
from fxsparse.lottery import (
    IMP,
    CountRule,
    DataOrder,
    FinalRound,
    Progress,
    Rewind,
    RewindOptimizer,
    Round,
    Scope,
    Step,
    find_tickets,
    load_ticket,
    prune_global,
    prune_layerwise,
)
from fxsparse.nn import masks
from fxsparse.sparsity import MaskSet
from fxsparse.training.loop import evaluate, fit, start
from tests.lottery.nets import SIZES, Tiny, tiny_task

FAST = IMP(rate="0.5", target="0.8")


def _digest(rounds: tuple[Round, ...]) -> list[object]:
    return [(found.index, found.alive, found.ticket_id, dict(found.metrics), found.history) for found in rounds]


def test_counts_masks_and_lineage(tmp_path: Path) -> None:
    rounds = find_tickets(tiny_task(), FAST, tmp_path, 3)
    golden = CountRule("0.5", "0.8").counts(SIZES).totals
    assert [found.alive for found in rounds] == list(golden) == [156, 78, 39, 32]
    tickets = [load_ticket(found.ticket) for found in rounds]
    for before, after in zip(tickets, tickets[1:], strict=False):
        assert MaskSet(after.masks).is_nested_in(MaskSet(before.masks))
        assert before.final is not None and after.final is not None
        weights = {name: before.final[name] for name in SIZES}
        wanted = prune_global(weights, before.masks, MaskSet(after.masks).alive)
        assert MaskSet(wanted) == MaskSet(after.masks)
        assert after.lineage["parent"] == before.ticket_id
        for name in SIZES:
            assert not after.final[name][~after.masks[name]].any()
            assert torch.equal(after.weights[name], tickets[0].weights[name])  # dense, unmasked
    assert [ticket.lineage["round"] for ticket in tickets] == [0, 1, 2, 3]
    assert tickets[0].lineage["parent"] is None
    assert tickets[1].lineage["rates"]["prune_rate_per_round"] == "0.5"
    assert tickets[1].manifest["weights"]["kind"] == "init"
    # MaskSet(M_q) in M_r: Jaccard = a_q / a_r exactly
    assert MaskSet(tickets[3].masks) & MaskSet(tickets[1].masks) == MaskSet(tickets[3].masks)


def test_round_0_is_the_dense_run(tmp_path: Path) -> None:
    task = tiny_task()
    rounds = find_tickets(task, FAST, tmp_path, 3)
    state = start(task, 3)
    initial = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    fit(state, task)
    ticket = load_ticket(rounds[0].ticket)
    assert ticket.final is not None and ticket.alive == ticket.numel == 156
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(ticket.final[name], tensor)
        assert torch.equal(ticket.weights[name], initial[name])


def test_a_round_retrained_from_its_file_alone(tmp_path: Path) -> None:
    task = tiny_task(scheduler=None)
    rounds = find_tickets(task, FAST, tmp_path, 3)
    ticket = load_ticket(rounds[2].ticket)
    state = start(task, 3)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.fill_(7.0)
    ticket.apply(state.model)
    fit(state, task)
    assert ticket.final is not None
    for name, tensor in ticket.final.items():
        assert torch.equal(state.model.state_dict()[name], tensor), name


def test_metrics_are_those_of_the_final_weights(tmp_path: Path) -> None:
    task = tiny_task()
    for found in find_tickets(task, FAST, tmp_path, 1):
        model = load_ticket(found.ticket).apply(Tiny(), final=True)
        assert task.validation is not None
        seen = evaluate(model, task.validation, task)
        assert found.metrics["validation_accuracy"] == seen.accuracy
        assert found.metrics["validation_loss"] == seen.loss
        best = min(found.history, key=lambda row: row["validation_loss"])
        assert found.metrics["best_step"] == best["step"]
        assert len(found.history) == 3 and found.history[-1]["step"] == 12
        assert load_ticket(found.ticket).metrics["validation_loss"] == seen.loss


VARIANTS: dict[str, dict[str, Any]] = {
    "step": {"rewind": Rewind.STEP, "rewind_step": Step(0, 5)},
    "step_fresh": {
        "rewind": Rewind.STEP,
        "rewind_step": Step(1),
        "rewind_optimizer": RewindOptimizer.FRESH,
        "data_order": DataOrder.FRESH,
    },
    "lr": {"rewind": Rewind.LR, "rewind_step": Step(1, 1)},
    "none": {"rewind": Rewind.NONE, "finetune_steps": 6},
    "layerwise": {"scope": Scope.LAYERWISE, "rate_factors": {"out": "0.5"}},
    "one_shot": {"num_rounds": 1, "final_round": FinalRound.STRETCH},
    "layers": {"layers": ("fc",)},
    "checkpoints": {"checkpoint_every": Step(0, 5), "rewind": Rewind.STEP, "rewind_step": Step(0, 3)},
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_stopped_after_any_round_and_called_again(name: str, tmp_path: Path) -> None:
    settings = IMP(rate="0.5", target="0.8", **VARIANTS[name])
    task = tiny_task()
    whole = find_tickets(task, settings, tmp_path / "whole", 2)
    assert all(found.trained for found in whole)
    again = find_tickets(task, settings, tmp_path / "whole", 2)
    assert not any(found.trained for found in again)
    assert _digest(again) == _digest(whole)
    for stop in range(len(whole)):
        part = tmp_path / f"stop_{stop}"
        shutil.copytree(tmp_path / "whole", part)
        for index in range(stop, len(whole)):
            shutil.rmtree(part / f"round_{index:03d}")
        found = find_tickets(task, settings, part, 2)
        assert [one.trained for one in found] == [one.index >= stop for one in found]
        assert _digest(found) == _digest(whole)
    assert not list((tmp_path / "whole").glob("progress_*")) and not list((tmp_path / "whole").glob(".tmp-*"))


def test_late_rewinding_restores_step_k(tmp_path: Path) -> None:
    task = tiny_task()
    rounds = find_tickets(task, IMP(rate="0.5", target="0.8", **VARIANTS["step"]), tmp_path, 2)
    state = start(task, 2)
    fit(state, task, 5)
    ticket = load_ticket(rounds[-1].ticket)
    assert ticket.manifest["weights"]["kind"] == "rewind" and ticket.manifest["weights"]["k"] == 5
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(ticket.weights[name], tensor)
    assert rounds[0].history[-1]["step"] == 12 and rounds[1].history[0]["step"] == 8


def test_learning_rate_rewinding_keeps_the_weights(tmp_path: Path) -> None:
    task = tiny_task(optimizer=lambda p: torch.optim.SGD(p, lr=1e-12))  # nothing moves: weights stay where they were
    settings = IMP(rate="0.5", target="0.8", **VARIANTS["lr"])
    rounds = find_tickets(task, settings, tmp_path, 2)
    first, last = load_ticket(rounds[0].ticket), load_ticket(rounds[-1].ticket)
    assert first.final is not None and last.final is not None
    kept = torch.where(last.masks["fc.weight"], first.final["fc.weight"], 0.0)
    torch.testing.assert_close(last.final["fc.weight"], kept, rtol=0, atol=1e-9)
    counter = "bn.num_batches_tracked"  # buffers are kept too: 12 batches, then 7 more in each round
    assert int(first.final[counter]) == 12 and int(last.final[counter]) == 12 + 3 * 7


def test_fine_tuning_runs_at_the_final_learning_rate(tmp_path: Path) -> None:
    task = tiny_task(scheduler=lambda o, total: torch.optim.lr_scheduler.StepLR(o, 8, 0.1))
    rounds = find_tickets(task, IMP(rate="0.5", target="0.8", **VARIANTS["none"]), tmp_path, 2)
    assert rounds[0].metrics["learning_rates"] == [pytest.approx(0.005)]
    for found in rounds[1:]:
        assert found.metrics["learning_rates"] == rounds[0].metrics["learning_rates"]
        assert found.history[0]["step"] == 16 and len(found.history) == 1  # 12 + 6 steps, one epoch ends inside


def test_replayed_and_fresh_order_differ(tmp_path: Path) -> None:
    runs = [
        find_tickets(tiny_task(), IMP(rate="0.5", target="0.8", data_order=order), tmp_path / order.value, 0)
        for order in DataOrder
    ]
    assert runs[0][0].history == runs[1][0].history
    assert runs[0][1].history != runs[1][1].history


def test_layerwise_counts_reach_the_masks(tmp_path: Path) -> None:
    settings = IMP(rate="0.5", target="0.8", **VARIANTS["layerwise"])
    rounds = find_tickets(tiny_task(), settings, tmp_path, 0)
    counts = CountRule("0.5", "0.8", factors={"out.weight": "0.5"}).counts(SIZES, layerwise=True)
    tickets = [load_ticket(found.ticket) for found in rounds]
    assert [tuple(int(ticket.masks[name].sum()) for name in SIZES) for ticket in tickets] == list(counts.alive)
    assert tickets[0].final is not None
    wanted = prune_layerwise(
        {name: tickets[0].final[name] for name in SIZES},
        tickets[0].masks,
        dict(zip(SIZES, counts.alive[1], strict=True)),
    )
    assert MaskSet(wanted) == MaskSet(tickets[1].masks)


def test_narrowed_layers_count_alone(tmp_path: Path) -> None:
    rounds = find_tickets(tiny_task(), IMP(rate="0.5", target="0.8", layers=("fc",)), tmp_path, 0)
    assert rounds[0].total == 126 and rounds[-1].alive == 26
    assert set(load_ticket(rounds[-1].ticket).masks) == {"fc.weight"}


def test_a_transformed_model_gives_the_same_ticket(tmp_path: Path) -> None:
    from fxsparse.planning import transform

    def build() -> torch.nn.Module:
        return transform(Tiny(), (torch.zeros(2, 6),), inplace=True)

    plain = find_tickets(tiny_task(), FAST, tmp_path / "plain", 5)
    sparse = find_tickets(tiny_task(build=build), FAST, tmp_path / "sparse", 5)
    for one, other in zip(plain, sparse, strict=True):
        left, right = load_ticket(one.ticket), load_ticket(other.ticket)
        assert left.manifest["model"]["graph_hash"] == right.manifest["model"]["graph_hash"]
        assert MaskSet(left.masks) == MaskSet(right.masks)
        assert left.final is not None and right.final is not None
        for name, tensor in left.final.items():
            torch.testing.assert_close(tensor, right.final[name], rtol=1e-5, atol=1e-6)
    model = load_ticket(plain[-1].ticket).apply(build(), final=True)
    assert int(masks(model)["fc.weight"].sum()) == int(load_ticket(plain[-1].ticket).masks["fc.weight"].sum())


def test_progress_is_told(tmp_path: Path) -> None:
    events: list[Progress] = []
    rounds = find_tickets(tiny_task(), FAST, tmp_path, 0, progress=events.append)
    assert [(event.round, event.step) for event in events] == [(r, s) for r in range(4) for s in (0, 4, 8, 12)]
    assert [event.alive for event in events if event.row is None] == [found.alive for found in rounds]
    assert all(event.rounds == 3 and event.until == 12 and event.total == 156 for event in events)


def test_the_callers_random_state_is_untouched(tmp_path: Path) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    find_tickets(tiny_task(), FAST, tmp_path, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_setting_does_not_mix_into_a_directory(tmp_path: Path) -> None:
    find_tickets(tiny_task(), FAST, tmp_path, 0)
    with pytest.raises(ConfigError, match="imp.rates.prune_rate_per_round"):
        find_tickets(tiny_task(), IMP(rate="0.4", target="0.8"), tmp_path, 0)
    with pytest.raises(ConfigError, match="seed"):
        find_tickets(tiny_task(), FAST, tmp_path, 1)
    with pytest.raises(ConfigError, match="batch_size"):
        find_tickets(tiny_task(batch_size=10), FAST, tmp_path, 0)
    with pytest.raises(ConfigError, match="data_fingerprint"):
        find_tickets(tiny_task(train=tiny_task().validation), FAST, tmp_path, 0)
    with pytest.raises(ConfigError, match="groups"):
        find_tickets(tiny_task(optimizer=lambda p: torch.optim.SGD(p, lr=0.9)), FAST, tmp_path, 0)


@pytest.mark.parametrize("file", ["metrics.json", "history.jsonl", "round.ticket/tensors.safetensors", "COMMIT.json"])
def test_a_damaged_round_does_not_exist(file: str, tmp_path: Path) -> None:
    whole = find_tickets(tiny_task(), FAST, tmp_path, 0)
    damaged = tmp_path / "round_003" / file
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(RuntimeWarning, match="round_003 is damaged"):
        again = find_tickets(tiny_task(), FAST, tmp_path, 0)
    assert [found.trained for found in again] == [False, False, False, True]
    assert _digest(again) == _digest(whole)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`num_rounds` \(=2\).*needs 3 rounds"):
        find_tickets(tiny_task(), IMP(rate="0.5", target="0.8", num_rounds=2), tmp_path, 0)
    with pytest.raises(ConfigError, match=r"`rewind_step` \(=3ep\)"):
        find_tickets(tiny_task(), IMP(rewind=Rewind.STEP, rewind_step=Step(3)), tmp_path, 0)
    with pytest.raises(ConfigError, match="rewind: step"):
        IMP(rewind_step=Step(1))
    with pytest.raises(ConfigError, match="finetune_steps"):
        IMP(finetune_steps=5)
    with pytest.raises(ConfigError, match="checkpoint_every"):
        IMP(checkpoint_every=Step())
    with pytest.raises(ConfigError, match="no prunable weight"):
        find_tickets(tiny_task(build=lambda: torch.nn.LayerNorm(6)), IMP(), tmp_path, 0)
    diverging = tiny_task(optimizer=lambda p: torch.optim.SGD(p, lr=1e20))
    with pytest.raises(DataError, match="not finite"):
        find_tickets(diverging, FAST, tmp_path / "diverged", 0)
    assert not list((tmp_path / "diverged").glob("round_*"))
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(TicketError, match="cannot be written"):
        find_tickets(tiny_task(), FAST, file / "below", 0)


def test_history_file_has_no_wall_clock(tmp_path: Path) -> None:
    find_tickets(tiny_task(), FAST, tmp_path, 0)
    rows = [json.loads(line) for line in (tmp_path / "round_001" / "history.jsonl").read_text().splitlines()]
    keys = {"epoch", "step", "train_loss", "learning_rate"}
    assert set(rows[0]) == keys | {"validation_loss", "validation_accuracy", "validation_count"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    task = tiny_task(build=lambda: Tiny().cuda())
    with pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG"):
        find_tickets(task, FAST, tmp_path / "refused", 0)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    runs = [find_tickets(task, FAST, tmp_path / name, 0) for name in "ab"]
    assert _digest(runs[0]) == _digest(runs[1]) and runs[0][-1].alive == 32
