"""A handle goes through torch.distributed.checkpoint, whatever it had to keep, and on with another number of ranks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from fxsparse.errors import ConfigError
from fxsparse.training.snapshot import Snapshot
from tests.training.ranks import assert_alike, launch
from tests.training.sharded_saved import METHODS, STEPS, STOP, Run, resumed, saved

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore:theta hardly moved", "ignore:nothing to resurrect"
)


def test_checkpoints_go_on_with_one_two_and_three_ranks(tmp_path: Path) -> None:
    single = saved(tmp_path, 0, 1)
    assert len({each["masks"] for each in single.values()}) == len(METHODS)
    for name, found in resumed(tmp_path, 0, 1, 1, (True, False)).items():
        assert found == single[name.split(",")[0]], name  # bit for bit
    for ranks in (2, 3):
        for each in launch("tests.training.sharded_saved", tmp_path, ranks):
            for name, found in each["saved"].items():
                assert_alike([found], [single[name]], f"{ranks}: {name}")
            for name, found in each["resumed"].items():
                assert_alike([found], [single[name.split(",")[0]]], f"{ranks - 1} -> {ranks}: {name}")


@pytest.mark.parametrize("name", METHODS)
def test_the_keys_of_a_state_do_not_depend_on_progress(name: str) -> None:
    def keys(run: Run) -> set[str]:
        return set(flatten_state_dict(run.handle.state_dict())[0])

    run = Run(name, 0, 1).attach()
    before = keys(run)
    for stop in range(1, STEPS + 1):
        assert keys(run.go(stop)) == before, stop


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stop", [0, 1, STOP])
def test_a_handle_at_another_step_is_filled_whole(name: str, stop: int, tmp_path: Path) -> None:
    run = Run(name, 0, 1).attach().go(stop)
    dcp.save({"model": run.model.state_dict(), "handle": run.handle}, checkpoint_id=tmp_path / "a")
    for other in (Run(name, 0, 1).attach(), Run(name, 0, 1).attach().go(STOP + 3)):
        state = {"model": other.model.state_dict(), "handle": other.handle}
        dcp.load(state, checkpoint_id=tmp_path / "a")
        other.model.load_state_dict(state["model"])
        one, two = Snapshot.of(run.handle.state_dict()), Snapshot.of(other.handle.state_dict())
        assert one.values == two.values and one.tensors.keys() == two.tensors.keys()
        assert all(torch.equal(one.tensors[key], two.tensors[key]) for key in one.tensors)


def test_a_state_of_the_earlier_format_goes_on(tmp_path: Path) -> None:
    """Its parts stood open; a checkpoint dropped those that were empty."""
    run, other = Run("rigl", 0, 1).attach().go(STOP), Run("rigl", 0, 1).attach()
    state = run.handle.state_dict()
    old = {key: part[0] if isinstance(part, tuple) else part for key, part in state.items()} | {"version": 2}
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    other.handle.load_state_dict({key: part for key, part in old.items() if key != "memory"})
    other.step = STOP
    assert other.go(STEPS).described() == run.go(STEPS).described()
    snfs = Run("snfs", 0, 1).attach().go(STOP).handle
    lost = {key: part for key, part in snfs.state_dict().items() if key != "memory"}
    with pytest.raises(ConfigError, match="`memory` of the state lacks the averaged gradients that SNFS keeps"):
        snfs.load_state_dict(lost)
