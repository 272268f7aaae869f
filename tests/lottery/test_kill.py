"""SIGKILL at any instant, then the same call again: the same tickets, metrics and history as without the kill."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fxsparse.lottery import IMP, Rewind, Round, Step, find_tickets
from fxsparse.lottery.config import load_config
from fxsparse.lottery.experiment import run
from tests.lottery.nets import tiny_task

SETTINGS = IMP(rate="0.5", target="0.8", rewind=Rewind.STEP, rewind_step=Step(0, 5), checkpoint_every=Step(0, 3))


def _search(directory: Path) -> tuple[Round, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the lock of the killed process is taken over
        return find_tickets(tiny_task(), SETTINGS, directory, 1)


def _digest(rounds: tuple[Round, ...]) -> list[object]:
    return [(found.index, found.alive, found.ticket_id, dict(found.metrics), found.history) for found in rounds]


def _child(work: Callable[[], object]) -> int:
    """Run in a forked process; its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:  # the child must end here, whatever happens
        os._exit(1)
    os._exit(0)


def _killed(pid: int) -> bool:
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed instead of being killed or finishing"
    return False


def _kill_at_call(write: Callable[[], object], number: int, after: bool) -> int:
    """A writer whose `number`-th fsync, rename or replace kills the process, before or after it happened."""

    def work() -> None:
        count = 0

        def wrap(name: str) -> None:
            original = getattr(os, name)

            def wrapped(*arguments: object, **options: object) -> object:
                nonlocal count
                count += 1
                if count == number and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = original(*arguments, **options)
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            setattr(os, name, wrapped)

        for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
            wrap(name)
        write()

    return _child(work)


def test_killed_around_every_fsync_and_rename(tmp_path: Path) -> None:
    whole = _digest(_search(tmp_path / "whole"))
    stopped = 0
    for number in range(1, 10_000, 11):
        directory = tmp_path / f"kill_{number}"
        if not _killed(_kill_at_call(lambda path=directory: _search(path), number, after=bool(number % 2))):
            break
        stopped += 1
        assert _digest(_search(directory)) == whole
        assert not [path for path in directory.rglob(".tmp-*")]
        assert not list(directory.glob("progress_*"))
    assert stopped >= 8, stopped


def test_a_ticket_is_whole_or_not_there(tmp_path: Path) -> None:
    from fxsparse.lottery import load_ticket, save_ticket
    from tests.lottery.test_ticket import _model

    expected = save_ticket(_model(), tmp_path / "whole").ticket_id
    found = set()
    for number in range(1, 100):
        for after in (False, True):
            path = tmp_path / f"{number}_{after}" / "t.ticket"
            killed = _killed(_kill_at_call(lambda path=path: save_ticket(_model(), path), number, after))
            found.add(path.exists())
            if path.exists():
                assert load_ticket(path).ticket_id == expected
        if not killed:
            break
    assert found == {False, True} and number >= 6


def test_killed_at_random_instants_again_and_again(tmp_path: Path) -> None:
    started = time.monotonic()
    whole = _digest(_search(tmp_path / "whole"))
    length = time.monotonic() - started
    draw = random.Random(5)
    kills = 0
    for trial in range(3):
        directory = tmp_path / f"trial_{trial}"
        for _ in range(100):
            pid = _child(lambda directory=directory: _search(directory))
            time.sleep(draw.uniform(0.02, 0.6) * length)
            os.kill(pid, signal.SIGKILL)
            if not _killed(pid):
                break
            kills += 1
        assert _digest(_search(directory)) == whole
    assert kills >= 3


def test_the_command_goes_on_after_a_kill(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    config = {
        "run": {"name": "kill", "seed": 0},
        "train": {"epochs_per_round": 2},
        "imp": {"prune_rate_per_round": 0.5, "target_sparsity": 0.7, "num_rounds": None},
    }
    paths = {}
    for name in ("whole", "killed"):
        paths[name] = tmp_path / f"{name}.yaml"
        values = {**config, "imp": {**config["imp"], "results_dir": str(tmp_path / name)}}
        paths[name].write_text(yaml.safe_dump(values))
    code = "import sys, typer; from fxsparse.cli.imp import imp; app = typer.Typer(); app.command()(imp); app()"

    def command(name: str) -> list[str]:
        return [sys.executable, "-c", code, "--config", str(paths[name])]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = run(load_config(paths["whole"]))
    assert [found.trained for found in whole.rounds[0]] == [True] * 3
    process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("*/seed_0/round_000")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command("killed"), check=True, capture_output=True, text=True, env=environment)
    assert "of 3 rounds trained" in done.stdout and "3 of 3 rounds trained" not in done.stdout
    again = run(load_config(paths["killed"]))
    assert [found.trained for found in again.rounds[0]] == [False] * 3
    assert _digest(again.rounds[0]) == _digest(whole.rounds[0])
    summaries = [next((tmp_path / name).glob("*/sparsity_vs_accuracy.json")).read_text() for name in paths]
    assert summaries[0] == summaries[1]
