"""A program on several ranks of one machine, as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def torchrun(ranks: int, *program: str | Path) -> subprocess.CompletedProcess[str]:
    """`torchrun` on a script or ``-m module`` with its arguments, from the root of the checkout; one thread a rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, program)], env=env, cwd=ROOT, capture_output=True, text=True, timeout=240
    )
