"""What `compact` does when something fails inside."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from fxsparse.errors import CaptureError
from fxsparse.graph.channels_rules import RULES
from fxsparse.graph.mishaps import mishap
from fxsparse.passes import compact_analysis
from fxsparse.passes import compact_channels as search
from fxsparse.passes.compact_solve import Solver
from fxsparse.planning import compaction
from fxsparse.planning.compaction import CompactionReport, compact, compaction_report
from tests.passes.compact_models import assert_equal, net


def told(model: nn.Module, x: Tensor) -> tuple[nn.Module, CompactionReport]:
    """Compact with warnings that do not raise, as users have them; there must be one, and equal outputs."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        small = compact(model, (x,))
    assert any("Please report this" in str(warning.message) for warning in found)
    assert {warning.category for warning in found} == {RuntimeWarning}
    assert_equal(small, model, x)
    assert [p.data_ptr() for p in small.parameters()] != [p.data_ptr() for p in model.parameters()]
    return small, compaction_report(small)


def broken(*_: object, **__: object) -> None:
    raise KeyError(30)


@pytest.mark.parametrize("where", ["analyse", "propagate", "Solver"])
def test_a_failed_analysis_leaves_everything_whole(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net()
    monkeypatch.setattr(compact_analysis, where, broken)
    small, report = told(model, x)
    assert [p.shape for p in small.parameters()] == [p.shape for p in model.parameters()] and not report.rows
    assert len(report.refused) == 1 and "everything left whole" in report.refused[0]
    assert "KeyError at test_compact_survives.py:" in report.refused[0] and "(30)" in report.refused[0]
    assert "refused: everything left whole" in str(report)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.warns(RuntimeWarning, match="analysis failed"):
        small = compact(model, (x,), optimizer=optimizer)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in small.parameters()}


def test_a_failed_shortening_leaves_that_dimension_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net()
    right = search.shorten

    def wrong(module: nn.Module, kept: dict, *rest: object) -> tuple[str, ...]:  # type: ignore[type-arg]
        if ("0.weight", 0) in kept:
            raise IndexError("out of range")
        return right(module, kept, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(search, "shorten", wrong)
    small, report = told(model, x)
    assert small[0].weight.shape == (6, 5) and small[2].weight.shape == (5, 6)
    assert len(report.refused) == 1 and "0.weight[0]" in report.refused[0] and "IndexError" in report.refused[0]


def test_a_failed_last_shortening_leaves_everything_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net()
    right, calls = search.shorten, []

    def wrong(*arguments: object) -> tuple[str, ...]:
        calls.append(1)
        return right(*arguments) if len(calls) == 1 else broken()  # type: ignore[arg-type,return-value]

    monkeypatch.setattr(search, "shorten", wrong)
    small, report = told(model, x)
    assert [p.shape for p in small.parameters()] == [p.shape for p in model.parameters()]
    assert not report.rows and "everything left whole" in report.refused[0]


def test_a_solver_that_fails_for_a_part_leaves_that_part_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net()
    right_solve, right_shorten = Solver.solve, search.shorten

    def solve(self: Solver, excluded: object = ()) -> object:
        return broken() if excluded and ("0.weight", 0) not in excluded else right_solve(self, excluded)  # type: ignore[arg-type,operator]

    def wrong(module: nn.Module, kept: dict, folds: dict, merges: tuple) -> tuple[str, ...]:  # type: ignore[type-arg]
        return right_shorten(module, kept, {} if ("0.weight", 0) in kept else folds, merges)

    monkeypatch.setattr(Solver, "solve", solve)
    monkeypatch.setattr(search, "shorten", wrong)
    small, report = told(model, x)
    assert small[0].weight.shape == (6, 5) and small[2].weight.shape == (5, 6)
    assert len(report.refused) == 1 and "0.weight[0]" in report.refused[0] and "KeyError" in report.refused[0]


def test_a_rule_that_fails_makes_a_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net()
    monkeypatch.setitem(RULES, "tanh", broken)
    small, report = told(model, x)
    assert small[0].weight.shape == (4, 5) and small[2].weight.shape == (7, 4)
    assert any(barrier.startswith("tanh") and "not understood" in barrier for barrier in report.barriers)


def test_a_failed_count_is_left_out_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net()
    monkeypatch.setattr(compaction, "count", broken)
    small, report = told(model, x)
    assert report.macs is None and small[0].weight.shape == (4, 5)


@pytest.mark.parametrize(("owner", "name"), [(compact_analysis, "analyse"), (search, "shorten"), (compaction, "count")])
def test_a_failure_is_raised_where_warnings_are_errors(
    owner: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = net()
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(RuntimeWarning, match="Please report this"):
        compact(model, (x,))


def test_a_mishap_says_what_failed_and_where() -> None:
    with pytest.warns(RuntimeWarning, match="the count failed: ValueError; what it was about is left as it is"):
        assert mishap("the count", ValueError()) == "the count failed: ValueError"


def test_a_model_that_runs_a_few_times_only_ends_in_a_typed_error() -> None:
    class Tired(nn.Module):
        def __init__(self, runs: list[int]) -> None:
            super().__init__()
            self.a, self.b, self.runs = nn.Linear(5, 6), nn.Linear(6, 2), runs

        def __deepcopy__(self, memo: dict) -> Tired:  # type: ignore[type-arg]  # copies count together
            twin = Tired(self.runs).to(self.a.weight.dtype)
            twin.load_state_dict(self.state_dict())
            return twin

        def forward(self, x: Tensor) -> Tensor:
            self.runs[0] -= 1
            if self.runs[0] < 0:
                raise ValueError("enough")
            return self.b(torch.relu(self.a(x)))

    ended = set()
    for runs in range(12):
        model, x = Tired([runs]), torch.randn(2, 5)
        with torch.no_grad():
            model.a.weight[0] = 0.0
        try:
            small = compact(model, (x,))
            ended.add(type(small))
        except CaptureError as error:
            ended.add(type(error))
            assert "enough" in str(error)
    assert CaptureError in ended and len(ended) == 2
