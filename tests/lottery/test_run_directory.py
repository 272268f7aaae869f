"""Atomic directories, locks, run directories: killed writers, full disks, other configurations."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fxsparse.errors import ConfigError, TicketError
from fxsparse.lottery import RunDirectory, save_ticket
from fxsparse.lottery.lock import LOCK, lock
from fxsparse.lottery.run_directory import committed, differing, is_committed, set_aside, sweep, write_file

CONFIG = {"imp": {"target_sparsity": "0.9"}, "train": {"epochs": 2}}
DEFAULTS = {"imp": {"target_sparsity": "0.9"}, "train": {"epochs": 1}}


def test_committed_directories_are_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with committed(target) as temporary:
        assert temporary.parent == target.parent and temporary.name == f".tmp-target-{os.getpid()}"
        (temporary / "a.txt").write_text("a")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b.txt").write_text("b")
        assert not target.exists()
    assert is_committed(target)
    rows = json.loads((target / "COMMIT.json").read_text())["files"]
    assert [row["name"] for row in rows] == ["a.txt", "sub/b.txt"]
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("damage", ["change", "remove", "uncommit", "truncate", "garbage"])
def test_what_the_commit_does_not_vouch_for_does_not_exist(damage: str, tmp_path: Path) -> None:
    target = tmp_path / "t"
    with committed(target) as temporary:
        (temporary / "a.txt").write_text("aaaa")
    if damage == "change":
        (target / "a.txt").write_text("aaab")
    elif damage == "remove":
        (target / "a.txt").unlink()
    elif damage == "uncommit":
        (target / "COMMIT.json").unlink()
    elif damage == "truncate":
        (target / "a.txt").write_text("aaa")
    else:
        (target / "COMMIT.json").write_text('{"files": [1]}')
    assert not is_committed(target)
    with pytest.warns(RuntimeWarning, match="damaged or not committed"):
        set_aside(target)
    assert not list(tmp_path.iterdir())


def test_a_failure_inside_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), committed(tmp_path / "t") as temporary:
        (temporary / "a").write_text("a")
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_one_rename_makes_it_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    rename, fsync = os.rename, os.fsync

    def spy_rename(source: Path, target: Path) -> None:
        order.append("rename")
        assert (source / "COMMIT.json").is_file() and not target.exists()
        rename(source, target)

    def spy_fsync(handle: int) -> None:
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "rename", spy_rename)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    with committed(tmp_path / "t") as temporary:
        (temporary / "a.txt").write_text("a")
    assert order == ["a.txt", "COMMIT.json", temporary.name, "rename", tmp_path.name]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    with pytest.raises(TicketError, match="exists already"), committed(tmp_path / "t"):
        raise AssertionError("not reached")
    os.symlink("nowhere", tmp_path / "link")
    with pytest.raises(TicketError, match="exists already"), committed(tmp_path / "link"):
        raise AssertionError("not reached")


@contextmanager
def _file_size_limit(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 64, 2000])
def test_full_disk(size: int, tmp_path: Path) -> None:
    from tests.lottery.test_ticket import _model

    model = _model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with _file_size_limit(size), pytest.raises(TicketError, match="cannot be written: File too large"):
        save_ticket(model, tmp_path / "t.ticket")
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    write_file(tmp_path / "f.json", "old")
    with _file_size_limit(2), pytest.raises(TicketError, match="cannot be written"):
        write_file(tmp_path / "f.json", "newer")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("f.json", "old")]


def test_full_disk_in_a_run_loses_no_round(tmp_path: Path) -> None:
    from fxsparse.lottery import find_tickets
    from tests.lottery.nets import tiny_task
    from tests.lottery.test_imp import FAST, _digest

    whole = find_tickets(tiny_task(), FAST, tmp_path / "whole", 0)
    run = tmp_path / "run"
    seen = []

    def fill(event: object) -> None:
        seen.append(event)
        if len(seen) == 6:  # in round 1
            limit = _file_size_limit(100)
            limit.__enter__()
            limits.append(limit)

    limits: list[object] = []
    try:
        with pytest.raises(TicketError, match="cannot be written"):
            find_tickets(tiny_task(), FAST, run, 0, progress=fill)
    finally:
        for limit in limits:
            limit.__exit__(None, None, None)  # type: ignore[attr-defined]  # a context manager
    assert is_committed(run / "round_000") and not (run / "round_001").exists()
    again = find_tickets(tiny_task(), FAST, run, 0)
    assert [found.trained for found in again] == [False, True, True, True]
    assert _digest(again) == _digest(whole)


@pytest.mark.parametrize("place", ["/proc/1/fxsparse", "/proc/fxsparse", "/dev/null/below"])
def test_read_only_places(place: str) -> None:
    from tests.lottery.test_ticket import _model

    with pytest.raises(TicketError, match="cannot be written"):
        save_ticket(_model(), place)
    with pytest.raises(TicketError, match="cannot be written"), RunDirectory.open(Path(place), "x", CONFIG, "d"):
        raise AssertionError("not reached")
    with pytest.raises(TicketError, match="cannot be written"):
        write_file(Path(place), "text")


def test_sweeping(tmp_path: Path) -> None:
    (tmp_path / ".tmp-round_001-77" / "deep").mkdir(parents=True)
    (tmp_path / ".tmp-file").write_text("x")
    (tmp_path / "round_000").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    os.symlink(outside, tmp_path / ".tmp-link")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "round_000"]
    assert (outside / "kept").exists()


HOLDER = "import sys, time; from pathlib import Path; from fxsparse.lottery.lock import lock\n"
HOLDER += "with lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(600)"


def test_one_writer_and_takeover_after_a_kill(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        record = json.loads((tmp_path / LOCK).read_text())
        assert record["pid"] == other.pid and record["host"] == socket.gethostname()
        assert abs(record["started"] - time.time()) < 600
        with pytest.raises(ConfigError, match=rf"in use by another writer.*{other.pid}"), lock(tmp_path):
            raise AssertionError("not reached")
        assert json.loads((tmp_path / LOCK).read_text()) == record
    finally:
        other.kill()
        other.wait()
        assert other.stdout is not None
        other.stdout.close()
    with pytest.warns(RuntimeWarning, match="taken over"), lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    with lock(tmp_path), pytest.raises(ConfigError, match="in use"), lock(tmp_path):
        raise AssertionError("not reached")
    with pytest.raises(KeyError), lock(tmp_path):
        raise KeyError
    with lock(tmp_path):  # let go in every case, without a warning
        pass


def test_a_lock_of_another_host_is_respected(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": 0}))
    with pytest.raises(ConfigError, match="another host.*delete"), lock(tmp_path):
        raise AssertionError("not reached")
    (tmp_path / LOCK).write_text("garbage")
    with pytest.warns(RuntimeWarning, match="taken over"), lock(tmp_path):
        pass


def test_the_name_is_the_hash(tmp_path: Path) -> None:
    from fxsparse.lottery import config_hash

    with RunDirectory.open(tmp_path, "demo", CONFIG, "data", defaults=DEFAULTS) as run:
        digest = config_hash({"train": {"epochs": 2}})
        assert run.config_hash == digest and run.path == tmp_path / f"demo-{digest[:12]}"
        assert run.seed(3) == run.path / "seed_3"
        (run.path / ".tmp-left").write_text("")
    with RunDirectory.open(tmp_path, "demo", CONFIG, "data", defaults=DEFAULTS) as again:
        assert again.path == run.path and not (run.path / ".tmp-left").exists()
    other = {**CONFIG, "train": {"epochs": 3}}
    with RunDirectory.open(tmp_path, "demo", other, "data", defaults=DEFAULTS) as run3:
        assert run3.path != run.path


def test_other_configuration_or_data_are_refused(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, "demo", CONFIG, "data") as run:
        pass
    other = {"imp": {"target_sparsity": "0.8"}, "train": {"epochs": 2, "lr": 0.5}}
    with (
        pytest.raises(ConfigError, match=r"differing fields: imp.target_sparsity, train.lr"),
        RunDirectory.open(tmp_path, "demo", other, "data", resume=run.path),
    ):
        raise AssertionError("not reached")
    with pytest.raises(ConfigError, match="other data"), RunDirectory.open(tmp_path, "demo", CONFIG, "other"):
        raise AssertionError("not reached")
    with (
        pytest.raises(ConfigError, match="not a run directory"),
        RunDirectory.open(tmp_path, "demo", CONFIG, "data", resume=tmp_path / "nothing"),
    ):
        raise AssertionError("not reached")
    with RunDirectory.open(tmp_path, "demo", CONFIG, "data", resume=run.path) as same:
        assert same.path == run.path
    (run.path / "data.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"), RunDirectory.open(tmp_path, "demo", CONFIG, "data"):
        raise AssertionError("not reached")


def test_differing_fields() -> None:
    assert differing({"a": {"b": 1, "c": 2}}, {"a": {"b": 1.0, "c": 3}, "d": None}) == ["a.c"]
    assert differing({"a": {"b": 1}}, {"a": 1}) == ["a"]
    assert differing([1], [1]) == []


def test_full_disk_at_the_first_state(tmp_path: Path) -> None:
    """The state at step k is larger than all files before it, so it is the first that does not fit."""
    from fxsparse.lottery import find_tickets
    from tests.lottery.nets import tiny_task
    from tests.lottery.test_imp import FAST

    with _file_size_limit(1500), pytest.raises(TicketError, match="init.*cannot be written: File too large"):
        find_tickets(tiny_task(), FAST, tmp_path, 0)
    assert not (tmp_path / "init").exists() and not list(tmp_path.glob(".tmp-*"))
