"""The library on a device that is not the CPU, without a GPU: see device_elsewhere.py and other_device.py."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse.curvature.fisher_scope import collecting_scope
from fxsparse.curvature.operator_scope import curvature_scope
from fxsparse.nn import shared
from fxsparse.nn.recurrence import differentiable_recurrence
from tests import device_elsewhere, other_device

SCRIPT = str(Path(__file__).with_name("other_device.py"))


@pytest.fixture(scope="module")
def lines() -> dict[str, str]:
    """What each case found, by name."""
    if reason := device_elsewhere.missing():
        pytest.skip(reason)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


@pytest.mark.parametrize("name", other_device.CASES)
def test_results_are_those_of_the_cpu(lines: dict[str, str], name: str) -> None:
    assert lines[name] == "same"


def test_a_device_that_is_not_here_is_refused() -> None:
    command = [sys.executable, "-m", "pytest", "--device", "nowhere", "-p", "no:cacheprovider", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--device nowhere: torch cannot use it here" in done.stderr


def test_what_tests_make_is_on_the_device_and_what_the_library_makes_is_where_it_says() -> None:
    if reason := device_elsewhere.missing():
        pytest.skip(reason)
    probe = str(Path(__file__).with_name("device_probe.py"))
    command = [sys.executable, "-m", "pytest", "--device", "elsewhere", "-p", "no:cacheprovider", "-q", probe]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


def test_a_default_device_leaves_the_sparse_products_on(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fxsparse.nn.Linear(32, 16, pattern=fxsparse.SharedSupport(8))
    fxsparse.set_masks(layer, {"weight": (torch.arange(32) % 4 == 0).expand(16, 32)})
    fxsparse.accelerate(layer, mode=fxsparse.FastMode.SPARSE)
    taken: list[shared.Kernel] = []
    original = shared.SharedPath.sparse
    spy = lambda self, *given: taken.append(given[-1]) or original(self, *given)  # noqa: E731
    monkeypatch.setattr(shared.SharedPath, "sparse", spy)
    with torch.device("cpu"):  # a mode that sees all functions, and only says where tensors are made
        layer(torch.ones(3, 32))
    assert len(taken) == 1
    with torch.overrides.BaseTorchFunctionMode():  # one that may record them
        layer(torch.ones(3, 32))
    assert len(taken) == 1


@pytest.mark.parametrize("scope", [differentiable_recurrence, curvature_scope, collecting_scope])
def test_recurrent_layers_are_differentiated_without_cudnn(scope: Callable[[nn.Module], Any]) -> None:
    before = torch.backends.cudnn.enabled
    with scope(nn.Linear(2, 2)):
        assert torch.backends.cudnn.enabled is before
    with pytest.raises(ZeroDivisionError), scope(nn.Sequential(nn.GRU(2, 2))):
        assert torch.backends.cudnn.enabled is False
        raise ZeroDivisionError
    assert torch.backends.cudnn.enabled is before


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.rnn(x)[0][:, -1])


def test_everything_that_differentiates_recurrent_layers_does_so_without_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    original = nn.LSTM.forward

    def watched(self: nn.LSTM, *given: Any) -> Any:
        made = original(self, *given)
        if made[0].requires_grad and not self.training:
            seen.append(torch.backends.cudnn.enabled)
        return made

    monkeypatch.setattr(nn.LSTM, "forward", watched)
    x, y = torch.randn(4, 5, 3).double(), torch.tensor([0, 1, 1, 0])
    model = Tagger().double()
    count = sum(parameter.numel() for parameter in model.parameters())
    sparse = fxsparse.transform(copy.deepcopy(model), (x,))
    for use in (
        lambda: fxsparse.passes.verify_equal(model, copy.deepcopy(model), (x,)),
        lambda: fxsparse.prune(sparse, fxsparse.GraSP(0.5), [(x, y)], nn.functional.cross_entropy),
        lambda: fxsparse.prune(sparse, fxsparse.SynFlow(0.5, rounds=2), [(x, y)]),
        lambda: fxsparse.CurvatureOperator(model, None, "cross_entropy", [(x, y)]).mv(torch.ones(count).double()),
    ):
        seen.clear()
        use()
        assert seen and not any(seen)
