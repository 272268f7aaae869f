"""A comparison that is killed leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml


def ends(group: int, seconds: float) -> bool:
    """Whether every process of a group is gone in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_a_killed_run_takes_its_processes_with_it(tmp_path: Path) -> None:
    config = {
        "run": {"name": "t", "seeds": [0, 1], "workers": 2, "results_dir": str(tmp_path)},
        "train": {"steps": 200_000},
        "methods": {"short": {"method": "Static"}},
        "dense": False,
        "sparsities": [0.8],
    }
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "fxsparse.cli", "compare", "--config", str(file)]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path
    )
    try:
        end = time.monotonic() + 60
        while len(members(process.pid)) < 4 and time.monotonic() < end:  # the run, a tracker of resources, two workers
            time.sleep(0.1)
        assert len(members(process.pid)) >= 4 and process.poll() is None
        time.sleep(3)  # they train, or are about to
        process.kill()
        process.wait(30)
        assert ends(process.pid, 30)
    finally:
        if not ends(process.pid, 0.2):
            os.killpg(process.pid, signal.SIGKILL)


def members(group: int) -> list[int]:
    """The processes of a group."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(place.parent.name))
    return found
