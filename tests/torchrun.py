"""A program on several ranks of one machine, as a user starts it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]


def torchrun(ranks: int, *program: str | Path) -> subprocess.CompletedProcess[str]:
    """`torchrun` on a script or ``-m module`` with its arguments, from the root of the checkout; one thread a rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, program)], env=env, cwd=ROOT, capture_output=True, text=True, timeout=240
    )


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """A gloo group of this process alone; the environment is as before afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = dict(os.environ)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(kept)
