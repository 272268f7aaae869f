"""Ordinary steps never make the host wait for a device; shown without one."""

import os
import subprocess
import sys
from pathlib import Path


def test_ordinary_steps_ask_no_tensor_for_its_values() -> None:
    command = [sys.executable, str(Path(__file__).with_name("fake_device.py"))]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 11 and all(line.endswith(": never waits") for line in lines), done.stdout
