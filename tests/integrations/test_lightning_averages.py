"""Lightning's averaging callbacks beside the sparse one: the averaged model has the masks of now."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fxsparse.nn import masked_weights, masks
from fxsparse.sparsity import SharedSupport
from fxsparse.training import GMP, RESU, SET, Method, RigL, attach

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning")

from lightning.pytorch.callbacks import (  # noqa: E402
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)

from fxsparse.integrations.lightning import SparseTraining  # noqa: E402
from tests.integrations.test_lightning import STEPS, Module, data, pytestmark, trainer  # noqa: E402

pytestmark = [*pytestmark, pytest.mark.filterwarnings("ignore:.*You're using the WeightAveraging")]
METHODS: dict[str, Method] = {
    "rigl": RigL(0.8, every=3, alpha=0.5, pattern=SharedSupport(4)),
    "set": SET(0.8, every=3),
    "gmp": GMP(0.8, every=4),
    "resu": RESU(sparsity=0.8, cycles=1),
}
DECAY = 0.75
AVERAGES: dict[str, Any] = {
    "ema": lambda: EMAWeightAveraging(decay=DECAY),
    "mean": WeightAveraging,
    "mean of weights": lambda: WeightAveraging(use_buffers=False),
}


class Validated(Module):
    """The averages take the model's place while it is validated."""

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        for weight in masked_weights(self).values():
            assert not weight.dense(weight.weight.detach())[~weight.mask].any()


def fit(folder: Path, callback: Any, other: Any, first: bool, module: nn.Module, **options: Any) -> None:
    run = trainer(folder, callback)
    run.callbacks.insert(0 if first else 1, other)  # before or after; the one that saves stays last
    assert run.callbacks.index(other) == (0 if first else 1)
    run.fit(module, DataLoader(data(), batch_size=16), DataLoader(data(), batch_size=32), **options)


def by_hand(method: Method, average: str) -> tuple[Module, dict[str, torch.Tensor]]:
    """The loop, and what an average of dense tensors makes of it: zero where the mask of now is dead."""
    model = Module()
    optimizer = model.configure_optimizers()
    attach(model, optimizer, method, STEPS)
    mean: dict[str, torch.Tensor] = {}
    batches = [batch for _ in range(STEPS) for batch in DataLoader(data(), batch_size=16)]
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batches[step]
        nn.functional.cross_entropy(model.net(x), y).backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            now, share = parameter.detach().double(), 1 - DECAY if average == "ema" else 1 / (step + 1)
            mean[name] = (
                now.clone() if step == 0 else mean[name] * masks(model).get(name, 1) * (1 - share) + now * share
            )
    return model, mean


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["rigl", "set", "gmp"])
def test_the_average_of_a_fit_has_the_present_masks(name: str, first: bool, average: str, tmp_path: Path) -> None:
    if name != "rigl" and average != "ema":
        return
    module, callback = Validated(), SparseTraining(METHODS[name], STEPS)
    fit(tmp_path, callback, AVERAGES[average](), first, module)
    model, mean = by_hand(METHODS[name], average)
    for key, weight in masked_weights(module).items():
        assert torch.equal(weight.mask, masks(model)[key]), key
        weight.spec.pattern.check(weight.mask, weight.spec.layout, weight.row_order)
        assert not weight.weight.detach()[~weight.mask].any()
    for key, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), mean[key], rtol=0, atol=1e-6)
    assert callback.handle is not None and callback.state_dict()["masks"] == callback.handle.state_dict()["masks"]


@pytest.mark.parametrize("first", [True, False])
def test_stochastic_weight_averaging_leaves_dead_weights_zero(first: bool, tmp_path: Path) -> None:
    module, callback = Module(), SparseTraining(METHODS["rigl"], STEPS)
    run = trainer(tmp_path, callback, max_epochs=4, max_steps=-1)
    run.callbacks.insert(0 if first else 1, StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1))
    run.fit(module, DataLoader(data(), batch_size=16))
    assert callback.handle is not None and callback.handle.updates > 3
    for weight in masked_weights(module).values():
        assert not weight.weight.detach()[~weight.mask].any()
        weight.spec.pattern.check(weight.mask, weight.spec.layout, weight.row_order)


def test_dead_weights_are_zero_whoever_writes_last(tmp_path: Path) -> None:
    class Careless(lightning.pytorch.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            for parameter in pl_module.parameters():
                parameter.data += 1

    module = Validated()
    fit(tmp_path, SparseTraining(METHODS["set"], STEPS), Careless(), False, module)
    for weight in masked_weights(module).values():
        assert not weight.weight.detach()[~weight.mask].any()


@pytest.mark.filterwarnings("ignore:theta hardly moved")
@pytest.mark.parametrize(("name", "first"), [("rigl", True), ("rigl", False), ("resu", True), ("resu", False)])
def test_resumed_with_an_average(name: str, first: bool, tmp_path: Path) -> None:
    whole = Validated()
    fit(tmp_path, SparseTraining(METHODS[name], STEPS), EMAWeightAveraging(decay=DECAY), first, whole)
    saved = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    assert len(saved) == 4
    for path in saved[:3]:
        module = Validated()
        other = SparseTraining(METHODS[name], STEPS)
        fit(tmp_path / "again", other, EMAWeightAveraging(decay=DECAY), first, module, ckpt_path=path)
        for (key, value), expected in zip(module.state_dict().items(), whole.state_dict().values(), strict=True):
            assert torch.equal(value, expected), (path.name, key)
