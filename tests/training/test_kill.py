"""A training process that is killed in the middle of a cycle goes on bit for bit in another process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from fxsparse.nn import Linear
from fxsparse.training import RigL, attach


def train(folder: Path, kill_at: int = -1) -> list[int]:
    """Train with a checkpoint after every step, from the one that is there: the first step, and the updates."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(Linear(12, 20), nn.Tanh(), Linear(20, 4)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = attach(model, optimizer, RigL(0.8, every=4), total_steps=20)
    parts, path = (model, optimizer, handle), folder / "state.pt"
    if path.exists():
        for part, state in zip(parts, torch.load(path, weights_only=True), strict=True):
            part.load_state_dict(state)
    start = handle.step
    for step in range(start, 20):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 12, generator=generator).double(), torch.randint(0, 4, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        torch.save([part.state_dict() for part in parts], folder / "part.pt")
        (folder / "part.pt").replace(path)
    return [start, handle.updates]


def test_a_killed_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    command = [sys.executable, __file__, str(killed), "10"]  # between the updates at 8 and 12
    single = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, capture_output=True, text=True, timeout=120, env=single)
    assert child.returncode == -signal.SIGKILL, child.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train(straight) == [0, 3] and train(killed) == [10, 3]
    finally:
        torch.set_num_threads(threads)
    one, other = (torch.load(folder / "state.pt", weights_only=True) for folder in (straight, killed))
    for name, value in one[0].items():
        assert torch.equal(value, other[0][name]), name
    for key, state in one[1]["state"].items():
        assert all(torch.equal(value, other[1]["state"][key][name]) for name, value in state.items())
    assert one[2]["records"] == other[2]["records"] and one[2]["masks"] == other[2]["masks"]


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
