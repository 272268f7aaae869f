"""The Hugging Face callback and Accelerate, in the real packages: as a plain loop, resumed, in mixed precision."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxsparse
from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import masks
from fxsparse.sparsity import MaskSet
from fxsparse.training import GMP, RESU, SET, RigL, attach

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the packages say of themselves at import
    transformers = pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")

from fxsparse.integrations.transformers import SparseTraining  # noqa: E402

METHODS = {
    "rigl": RigL(sparsity=0.8, every=3),
    "set": SET(sparsity=0.8, every=3),
    "gmp": GMP(sparsity=0.8),
    "resu": RESU(sparsity=0.8, cycles=1),
}
STEPS = 24


def bert(dropout: float = 0.1) -> nn.Module:
    return copy.deepcopy(transformed(dropout))


@functools.cache
def transformed(dropout: float) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        num_labels=3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = transformers.BertForSequenceClassification(config)
    ids = torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(0))
    return fxsparse.transform(dense, ((), {"input_ids": ids, "labels": torch.zeros(2, dtype=torch.long)}))


def rows() -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 40, (64, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": each, "labels": each[0] % 3} for each in ids]


def trainer(folder: Path, callback: Any, model: nn.Module | None = None, **options: Any) -> Any:
    options = {"max_steps": STEPS, "save_steps": 5, "per_device_train_batch_size": 8, **options}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, seed=3, learning_rate=1e-3, **options
    )
    model = bert() if model is None else model
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=[callback])


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, value), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("name", METHODS)
def test_trained_and_resumed(name: str, tmp_path: Path) -> None:
    callback = SparseTraining(METHODS[name])
    whole = trainer(tmp_path, callback)
    whole.train()
    handle = callback.handle
    assert handle is not None and not handle.attached and handle.step == STEPS and handle.total_steps == STEPS
    assert handle.updates >= 1
    for parameter, mask in masks(whole.model).items():
        assert bool(((whole.model.get_parameter(parameter) == 0) >= ~mask).all())
    folders = sorted(tmp_path.glob("checkpoint-*"))
    assert len(folders) == 5
    for folder in folders[1:4:2]:
        again = SparseTraining(METHODS[name])
        run = trainer(tmp_path, again)
        run.train(resume_from_checkpoint=str(folder))
        assert again.handle is not None and str(again.handle.report()) == str(handle.report())
        assert_equal(run.model, whole.model)


def test_it_trains_as_a_plain_loop_does(tmp_path: Path) -> None:
    callback = SparseTraining(METHODS["rigl"])
    options = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "optim": "sgd", "save_strategy": "no"}
    run = trainer(tmp_path, callback, bert(0.0).double(), **options)
    seen: list[dict[str, Tensor]] = []
    keep = run.model.register_forward_pre_hook(lambda _, __, given: seen.append(dict(given)), with_kwargs=True)
    run.train()
    keep.remove()
    assert len(seen) == STEPS and callback.handle is not None
    model = bert(0.0).double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    plain = attach(model, optimizer, METHODS["rigl"], STEPS)
    for batch in seen:
        optimizer.zero_grad()
        model(**{name: batch[name] for name in ("input_ids", "labels")}).loss.backward()
        optimizer.step()
    assert str(callback.handle.report()) == str(plain.report())
    assert MaskSet(masks(run.model)).digest() == MaskSet(masks(model)).digest()
    for name, weight in run.model.named_parameters():
        torch.testing.assert_close(weight, model.get_parameter(name), rtol=1e-10, atol=1e-12)


def test_bfloat16_accumulation_and_clipping(tmp_path: Path) -> None:
    callback = SparseTraining(METHODS["rigl"])
    run = trainer(tmp_path, callback, bf16=True, gradient_accumulation_steps=2, max_grad_norm=0.1)
    run.train()
    assert callback.handle is not None and callback.handle.step == STEPS and callback.handle.updates >= 1


def test_another_folder_and_a_missing_state(tmp_path: Path) -> None:
    trainer(tmp_path / "one", SparseTraining(METHODS["set"])).train()
    (tmp_path / "one" / "checkpoint-10").rename(tmp_path / "kept")
    told = SparseTraining(METHODS["set"], resume_from=tmp_path / "kept")
    trainer(tmp_path / "two", told).train(resume_from_checkpoint=str(tmp_path / "kept"))
    assert told.handle is not None and told.handle.step == STEPS
    with pytest.raises(
        DataError, match=r"checkpoint-10` has no folder `fxsparse` of the method SET; give `resume_from`"
    ):
        trainer(tmp_path / "three", SparseTraining(METHODS["set"])).train(resume_from_checkpoint=str(tmp_path / "kept"))
    with pytest.raises(ConfigError, match="not of this handle"):
        other = SparseTraining(METHODS["rigl"], resume_from=tmp_path / "kept")
        trainer(tmp_path / "four", other).train(resume_from_checkpoint=str(tmp_path / "kept"))


def test_what_cannot_be_attached(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`method` \(='rigl'\) must be a fxsparse method"):
        SparseTraining("rigl")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has no masks; call fxsparse.transform on it first"):
        dense = transformers.BertForSequenceClassification(bert().config)
        trainer(tmp_path, SparseTraining(METHODS["rigl"]), dense).train()


@pytest.mark.parametrize("prepared_first", [True, False])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(prepared_first: bool, precision: str) -> None:
    def trained(engine: Any) -> tuple[str, str]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            dense = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 8))
        model: Any = fxsparse.transform(dense, (torch.zeros(2, 12),))
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
        x = torch.randn(96, 12, generator=torch.Generator().manual_seed(1))
        loader: Any = DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=16)
        handle = None if prepared_first else attach(model, optimizer, METHODS["rigl"], STEPS)
        if engine is not None:
            model, optimizer, loader = engine.prepare(model, optimizer, loader)
        handle = handle or attach(model, optimizer, METHODS["rigl"], STEPS)
        for _ in range(STEPS // 6):
            for inputs, targets in loader:
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=engine is None and precision == "bf16"):
                    loss = nn.functional.cross_entropy(model(inputs).float(), targets)
                loss.backward() if engine is None else engine.backward(loss)
                optimizer.step()
        assert handle.step == STEPS and handle.updates >= 1
        return MaskSet(masks(handle.model)).digest(), str(handle.report())

    accelerate.state.AcceleratorState._reset_state(True)
    try:
        assert trained(accelerate.Accelerator(cpu=True, mixed_precision=precision)) == trained(None)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
