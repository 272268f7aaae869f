"""The Lightning callback, in the real package: as a plain loop, resumed from its checkpoints, on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxsparse
from fxsparse.errors import ConfigError
from fxsparse.nn import masks
from fxsparse.sparsity import MaskSet
from fxsparse.training import GMP, RESU, SET, Method, RigL, attach

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the package says of itself at import
    lightning = pytest.importorskip("lightning")

from fxsparse.integrations.lightning import SparseTraining  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*litlogger"),
    pytest.mark.filterwarnings("ignore:.*[Cc]heckpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*max_epochs.* was not set"),
    pytest.mark.filterwarnings("ignore:.*no pre-optimization state was saved"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
METHODS = {
    "rigl": RigL(sparsity=0.8, every=3),
    "set": SET(sparsity=0.8, every=3),
    "gmp": GMP(sparsity=0.8),
    "resu": RESU(sparsity=0.8, cycles=1),
}
STEPS = 24


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 12, generator=generator)
    return TensorDataset(x, x[:, :4].argmax(1))


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 8))
    return fxsparse.transform(dense, (torch.zeros(2, 12),))


class Module(lightning.pytorch.LightningModule):
    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.net, self.automatic_optimization = net(), not manual

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def trainer(folder: Path, callback: Any, steps: int = STEPS, **options: Any) -> Any:
    saver = lightning.pytorch.callbacks.ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=6)
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "max_steps": steps, "max_epochs": -1, **options}
    return lightning.pytorch.Trainer(
        callbacks=[callback, saver], enable_progress_bar=False, enable_model_summary=False, **options
    )


def by_hand(method: Method, accumulate: int = 1) -> tuple[Module, Any]:
    model = Module()
    optimizer = model.configure_optimizers()
    handle = attach(model, optimizer, method, STEPS)
    batches = [batch for _ in range(STEPS * accumulate) for batch in DataLoader(data(), batch_size=16)]
    for step in range(STEPS):
        optimizer.zero_grad()
        for x, y in batches[step * accumulate : (step + 1) * accumulate]:
            (nn.functional.cross_entropy(model.net(x), y) / accumulate).backward()
        optimizer.step()
    return model, handle


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, value), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in METHODS), ("rigl", {"manual": True}), ("rigl", {"accumulate": 2})]
)
def test_as_a_plain_loop(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    accumulate = options.get("accumulate", 1)
    module, callback = Module(options.get("manual", False)), SparseTraining(METHODS[name], STEPS)
    trainer(tmp_path, callback, accumulate_grad_batches=accumulate).fit(module, DataLoader(data(), batch_size=16))
    model, handle = by_hand(METHODS[name], accumulate)
    assert callback.handle is not None and not callback.handle.attached and callback.handle.step == STEPS
    assert str(callback.handle.report()) == str(handle.report())
    handle.detach()
    assert_equal(module, model)


@pytest.mark.parametrize("name", METHODS)
def test_resumed_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    whole, callback = Module(), SparseTraining(METHODS[name], STEPS)
    trainer(tmp_path, callback).fit(whole, DataLoader(data(), batch_size=16))
    assert callback.handle is not None
    for path in sorted(tmp_path.glob("*.ckpt"))[:3:2]:
        module, again = Module(), SparseTraining(METHODS[name], STEPS)
        trainer(tmp_path / "again", again).fit(module, DataLoader(data(), batch_size=16), ckpt_path=path)
        assert again.handle is not None and str(again.handle.report()) == str(callback.handle.report())
        assert_equal(module.net, whole.net)
    assert len(list(tmp_path.glob("*.ckpt"))) == 4


def test_steps_are_the_trainers_and_two_fits_are_one(tmp_path: Path) -> None:
    module, callback = Module(), SparseTraining(METHODS["rigl"])
    trainer(tmp_path, callback).fit(module, DataLoader(data(), batch_size=16))
    assert callback.handle is not None and callback.handle.total_steps == STEPS
    assert abs(callback.state_dict()["step"] - STEPS) == 0
    cut, parts = Module(), SparseTraining(METHODS["set"], STEPS)
    trainer(tmp_path, parts, steps=STEPS // 2).fit(cut, DataLoader(data(), batch_size=16))
    digest = MaskSet(masks(cut)).digest()
    assert parts.handle is not None and parts.handle.step == STEPS // 2
    trainer(tmp_path, parts, steps=3).fit(cut, DataLoader(data(), batch_size=16))
    assert parts.handle.step == STEPS // 2 + 3 and MaskSet(masks(cut)).digest() != digest


def test_the_sparsity_is_logged(tmp_path: Path) -> None:
    module, callback = Module(), SparseTraining(METHODS["gmp"])
    run = trainer(tmp_path, callback)
    run.fit(module, DataLoader(data(), batch_size=16))
    alive = sum(int(mask.sum()) for mask in masks(module).values()) / sum(
        mask.numel() for mask in masks(module).values()
    )
    assert float(run.callback_metrics["sparsity"]) == pytest.approx(1 - alive) and alive < 0.25


def test_a_failed_fit_lets_go(tmp_path: Path) -> None:
    class Failing(Module):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            if index == 2:
                raise ValueError("a user's error")
            return super().training_step(batch, index)

    module, callback = Failing(), SparseTraining(METHODS["rigl"])
    with pytest.raises(ValueError, match="a user's error"):
        trainer(tmp_path, callback).fit(module, DataLoader(data(), batch_size=16))
    assert callback.handle is not None and not callback.handle.attached and callback.handle.step == 2


def test_what_cannot_be_attached(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`method` \(='rigl'\) must be a fxsparse method"):
        SparseTraining("rigl")  # type: ignore[arg-type]

    class Dense(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(12, 8)

    with pytest.raises(ConfigError, match="has no masks; call fxsparse.transform on it first"):
        trainer(tmp_path, SparseTraining(METHODS["rigl"])).fit(Dense(), DataLoader(data(), batch_size=16))

    class Two(Module):
        def configure_optimizers(self) -> Any:
            first, *rest = self.parameters()
            return torch.optim.SGD([first], lr=0.1), torch.optim.SGD(rest, lr=0.1)

    with pytest.raises(ConfigError, match="none of the 2 optimizers of `Two` holds all masked weights"):
        trainer(tmp_path, SparseTraining(METHODS["rigl"])).fit(Two(manual=True), DataLoader(data(), batch_size=16))


def test_two_ranks(tmp_path: Path) -> None:
    """The global batch of one process, in the Trainer's own DDP: the same masks."""
    script = tmp_path / "worker.py"
    script.write_text(
        f"""
import json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.integrations.test_lightning import *
if __name__ == "__main__":
    module, callback = Module(), SparseTraining(METHODS["rigl"])
    ranks = int(sys.argv[1])
    run = trainer(Path(sys.argv[2]) / f"r{{ranks}}", callback, devices=ranks, 
                  strategy="ddp" if ranks > 1 else "auto", precision="64-true", use_distributed_sampler=False)
    sampler = torch.utils.data.DistributedSampler(data(), ranks, int(os.environ.get("RANK", 0)), shuffle=False)
    run.fit(module, DataLoader(data(), batch_size=16 // ranks, sampler=sampler))
    found = [MaskSet(masks(module.net)).digest(), [float(p.detach().sum()) for p in module.parameters()]]
    (Path(sys.argv[2]) / f"{{ranks}}-{{run.global_rank}}.json").write_text(json.dumps(found))
"""
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for ranks in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launch, str(script), str(ranks), str(tmp_path)]
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
        assert run.returncode == 0, run.stderr
    one, *two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert two[0] == two[1] and two[0][0] == one[0]
    assert two[0][1] == pytest.approx(one[1], abs=1e-9)
