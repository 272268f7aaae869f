"""Structured pruning and compaction of torch's recurrent layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError
from fxsparse.graph import count
from fxsparse.planning.compaction import compact, compaction_report
from fxsparse.planning.prune_budgets import ChannelBudget, MacBudget
from fxsparse.planning.prune_channels import plan_channels
from tests.planning.prune_checks import filled, floats, pruned, same

IDS = torch.arange(15).reshape(3, 5)


class Recurrence(nn.Module):
    """Words -> a recurrent layer -> labels."""

    def __init__(self, kind: str, packed: bool = False, **options: Any) -> None:
        super().__init__()
        self.words, self.packed = nn.Embedding(20, 6), packed
        self.rnn = getattr(nn, kind)(6, 8, batch_first=True, **options)
        self.labels = nn.Linear(8 * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, ids: Tensor) -> Tensor:
        x: Any = self.words(ids)
        if self.packed:
            x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 2, 3]), batch_first=True, enforce_sorted=False)
        y, _ = self.rnn(x)
        if self.packed:
            y, _ = nn.utils.rnn.pad_packed_sequence(y, batch_first=True)
        return self.labels(y)


RECURRENT: dict[str, dict[str, Any]] = {
    "one": {},
    "deep both ways": {"num_layers": 2, "bidirectional": True},
    "unbiased": {"bias": False},
    "packed": {"packed": True},
    "packed deep": {"packed": True, "num_layers": 2},
}


@pytest.mark.parametrize("options", RECURRENT.values(), ids=RECURRENT)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_hidden_units_and_inputs_of_recurrent_layers_go(kind: str, options: dict[str, Any]) -> None:
    model = filled(Recurrence(kind, **options))
    plan = pruned(model, (IDS,))
    small = plan.apply()
    assert [group.kept for group in plan.groups if group.channels == 8] == [small.rnn.hidden_size]
    assert [group.kept for group in plan.groups if group.channels == 6] == [small.rnn.input_size]
    assert small.rnn.hidden_size < 8 and small.rnn.input_size == small.words.embedding_dim < 6
    assert [id(p) for p in small.rnn._flat_weights] == [id(p) for p in small.rnn.parameters()]


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_a_smaller_recurrent_layer_is_the_one_with_sliced_weights(kind: str, gates: int) -> None:
    """The oracle: torch's layer of that size, with the rows of the units that stay in every gate."""
    model = filled(Recurrence(kind))
    plan = plan_channels(model, (IDS,), budget=ChannelBudget(0.5), include="labels.weight")
    small = plan.apply().rnn
    gone = plan.removed["labels.weight", 1]
    kept = [unit for unit in range(8) if unit not in gone]
    rows = [gate * 8 + unit for gate in range(gates) for unit in kept]
    assert plan.removed["rnn.weight_ih_l0", 0] == tuple(sorted(set(range(8 * gates)) - set(rows)))
    assert torch.equal(small.weight_ih_l0, model.rnn.weight_ih_l0[rows])
    assert torch.equal(small.weight_hh_l0, model.rnn.weight_hh_l0[rows][:, kept])
    assert torch.equal(small.bias_hh_l0, model.rnn.bias_hh_l0[rows])


def test_macs_of_recurrent_layers_are_counted() -> None:
    model = filled(Recurrence("GRU", num_layers=2))
    plan = plan_channels(model, (IDS,), budget=MacBudget(0.5))
    assert plan.macs[0] == count(model, (IDS,)).macs_dense
    assert plan.macs[1] == count(plan.apply(), (IDS,)).macs_dense <= 0.5 * plan.macs[0]


def test_projected_units_stay_and_are_named() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.rnn, self.labels = nn.Embedding(20, 6), nn.LSTM(6, 8, proj_size=4), nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.labels(self.rnn(self.words(ids))[0])

    plan = pruned(filled(Projected()), (IDS,))
    assert [group.channels for group in plan.groups] == [6]
    assert any("is projected inside a recurrent layer" in str(each) for each in plan.excluded)


@pytest.mark.parametrize("gate", range(4))
def test_only_units_without_a_candidate_are_zero(gate: int) -> None:
    """Of an LSTM's gates i, f, g, o: without g the state stays 0; without another it does not."""
    model = filled(Recurrence("LSTM"))
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            getattr(model.rnn, name)[gate * 8 + 3] = 0.0
    small = compact(model, (IDS,))
    assert small.rnn.hidden_size == (7 if gate == 2 else 8)
    assert not compaction_report(small).refused
    assert same(model(IDS), small(IDS))


def test_a_constant_input_goes_into_the_bias_of_a_recurrent_layer() -> None:
    class Fed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rnn, self.last = nn.Linear(4, 6), nn.GRU(6, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.rnn(self.first(x).tanh())[0])

    model, x = filled(Fed()), floats(3, 2, 4)
    with torch.no_grad():
        model.first.weight[2] = 0.0
    small = compact(model, (x,))
    assert small.rnn.input_size == 5 and same(model(x), small(x))
    assert any("rnn.bias_ih_l0" in row.folded for row in compaction_report(small).rows)


CELLS = ["LSTMCell", "GRUCell", "RNNCell"]


class Stepped(nn.Module):
    """A cell that is stepped by Python."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell, self.last = getattr(nn, kind)(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in range(3):
            state = self.cell(x[:, step], state)
        return self.last(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind: str) -> None:
    plan = pruned(filled(Stepped(kind)), (floats(2, 3, 6),))
    assert plan.apply().cell.hidden_size == 4


class Stated(nn.Module):
    """The first state is made by Python that states its size, in a loop that no tracer follows."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.GRUCell(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 8)
        for step in range(x.size(1)):
            state = self.cell(x[:, step], state)
        return self.last(state)


def test_sizes_that_python_states_follow_only_in_a_specialised_graph() -> None:
    torch.manual_seed(0)
    model, x = Stated().eval(), torch.randn(2, 3, 6)
    with pytest.raises(ConfigError, match="nothing can be pruned"):
        plan_channels(model, (x,), budget=ChannelBudget(0.5))
    plan = plan_channels(model, (x,), budget=ChannelBudget(0.5), specialize=True)
    assert "inputs like the example's only" in str(plan)
    small = plan.apply()
    assert small.cell.hidden_size == 4
    torch.testing.assert_close(small(x), plan.masked()(x))
