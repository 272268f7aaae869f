"""No test may leave the process other than it found it: what leaks from one fails in another, far away."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests import device

settings.register_profile("same", derandomize=True)  # a commit passes or fails; another draw is not its doing
settings.register_profile("fresh")  # what `make test-all` looks for new failures with
settings.load_profile("same")


def state() -> dict[str, object]:
    return {
        "attention's fast path": torch.backends.mha.get_fastpath_enabled(),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    before = state()
    yield
    after = state()
    torch.backends.mha.set_fastpath_enabled(bool(before["attention's fast path"]))
    torch.set_grad_enabled(bool(before["grad mode"]))
    assert after == before


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests put their tensors: cpu, cuda, elsewhere (simulated)")


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--device")
    if name != "cpu":
        device.usable(name)
        config.pluginmanager.register(device.Plugin(name), "device")
