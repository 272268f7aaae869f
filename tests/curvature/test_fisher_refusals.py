"""What a collector, and what scores read, refuse by name instead of leaving it out or failing far away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse.curvature import EWC, OBD, CurvatureOperator, CurvatureSource, FisherCollector, instrument_fisher
from fxsparse.curvature.dense_storage import check_stored_dense
from fxsparse.errors import ConfigError, DataError

F64 = torch.float64


def batch(n: int = 6, width: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, width, generator=generator, dtype=F64), torch.randint(0, 3, (n,), generator=generator)


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).double()


class Spectral(nn.Module):
    """Multiplies by a complex parameter in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(9, dtype=torch.complex128))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=16))


def test_complex_parameters_are_never_left_out() -> None:
    model = Spectral().double()
    for parameters in (None, ["filter"], ["filter", "head.weight"]):
        with pytest.raises(ConfigError, match=r"`filter` \(=torch\.complex128\) is complex.*`parameters`"):
            FisherCollector(model, parameters=parameters)
    rest = FisherCollector(model, parameters=["head.weight", "head.bias"])
    rest.update(batch())
    assert len(rest.get()) == 2
    model.filter.requires_grad_(False)  # nothing is asked of what is frozen
    frozen = FisherCollector(model)
    frozen.update(batch())
    assert frozen.get().keys() == rest.get().keys()
    model.codes = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    with pytest.raises(ConfigError, match=r"`codes` \(=torch\.int64\) is of integers"):
        FisherCollector(model, parameters=["codes"])


def alive_only() -> tuple[nn.Module, Any]:
    model = fxsparse.transform(dense(), (batch()[0],), sparsity=0.5, pattern=fxsparse.SharedSupport(4))
    handle = fxsparse.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), fxsparse.RigL(sparsity=0.5), 20)
    fxsparse.accelerate(model, mode=fxsparse.FastMode.SPARSE)
    fxsparse.store_alive(handle)
    return model, handle


MEND = r"`0\.weight` is stored alive only \(=\(4, 4, 8\) for \(16, 16\)\); call restore_dense\(handle\) first"


@pytest.mark.parametrize("support", ["mask", "dense"])
def test_weights_that_are_stored_alive_only_are_refused(support: str) -> None:
    model, handle = alive_only()
    with pytest.raises(ConfigError, match=MEND):
        FisherCollector(model, support=support)
    with pytest.raises(ConfigError, match=MEND):
        check_stored_dense(model)
    biases = FisherCollector(model, support=support, parameters=["0.bias", "2.bias"])
    biases.update(batch())  # nothing of such a weight is asked
    fxsparse.restore_dense(handle)
    collector = FisherCollector(model, support=support)
    collector.update(batch())
    assert all(torch.allclose(value, collector.get()[key], rtol=1e-10) for key, value in biases.get().items())
    before = {key: value.clone() for key, value in collector.get().items()}
    fxsparse.store_alive(handle)  # in the midst of a collection
    with pytest.raises(ConfigError, match=MEND):
        collector.update(batch())
    assert all(torch.equal(value, collector.get()[key]) for key, value in before.items())
    fxsparse.restore_dense(handle)
    collector.update(batch())
    assert all(torch.allclose(value, collector.get()[key], rtol=1e-12) for key, value in before.items())


def test_operator_taps_and_saliencies_name_the_same_mend() -> None:
    model, _ = alive_only()
    for mask in ("on", "off", "dense"):
        with pytest.raises(ConfigError, match=r"restore_dense\(handle\) first"):
            CurvatureOperator(model, None, "cross_entropy", [batch()], mask=mask)
    with pytest.raises(ConfigError, match=r"restore_dense\(handle\) first"):
        instrument_fisher(model, (batch()[0],))
    source = CurvatureSource(model, "cross_entropy", [batch()])
    with pytest.raises(ConfigError, match=MEND):
        OBD(source).score(torch.randn(16, 16, dtype=F64))
    name = source.name_of(dict(model.named_parameters())["0.bias"])
    assert name == "0.bias"


def test_a_copy_of_the_model_is_told_from_such_storage() -> None:
    source = CurvatureSource(dense(), "cross_entropy", [batch()])
    with pytest.raises(ConfigError, match="not a copy"):
        source.name_of(torch.randn(16, 16, dtype=F64))


def test_training_with_saliencies_of_curvature_says_so() -> None:
    model = fxsparse.transform(dense(), (batch()[0],), sparsity=0.5, pattern=fxsparse.SharedSupport(4))
    source = CurvatureSource(model, "cross_entropy", [batch()])
    method = fxsparse.curvature.with_saliencies(fxsparse.RigL(sparsity=0.5, every=1), drop=OBD(source))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = fxsparse.attach(model, optimizer, method, total_steps=20)
    fxsparse.accelerate(model, mode=fxsparse.FastMode.SPARSE)
    fxsparse.store_alive(handle)
    x, y = batch()
    with pytest.raises(ConfigError, match=MEND):
        for _ in range(3):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


@pytest.mark.parametrize("model", ["model", None, 3, lambda x: x])
def test_what_is_no_module(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"`model` \(=.*\) must be a torch\.nn\.Module"):
        FisherCollector(model)


def test_what_is_no_generator() -> None:
    with pytest.raises(ConfigError, match="`generator`"):
        FisherCollector(dense(), kind="mc", generator=3)  # type: ignore[arg-type]


def test_inputs_that_the_model_cannot_take() -> None:
    """On the first batch, where the model is examined, and later; the collector goes on as if nothing had been."""
    collector, fresh = FisherCollector(dense()), FisherCollector(dense())
    for _ in range(2):
        with pytest.raises(DataError, match=r"cannot run on this batch \(=\(6, 9\)\).*RuntimeError: mat1 and mat2"):
            collector.update(batch(width=9))
        collector.update(batch())
    assert collector.tasks() == ("default",) and collector.skipped() == 0
    fresh.update(batch())
    fresh.update(batch())
    assert all(torch.equal(value, fresh.get()[key]) for key, value in collector.get().items())


def test_a_sample_without_an_axis_of_samples() -> None:
    x, y = batch()
    collector = FisherCollector(dense())
    with pytest.raises(DataError, match=r"cannot run on one sample of this batch \(=\(16,\)\).*axis 0"):
        collector.update((x[0], y[0]))
    assert collector.tasks() == ()


def test_errors_that_are_not_the_batch_s_come_through() -> None:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        raise LookupError("the caller's own")

    with pytest.raises(LookupError, match="the caller's own"):
        FisherCollector(dense(), loss).update(batch())

    class Full(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):  # smaller batches mend that
        FisherCollector(Full()).update(batch())


@pytest.mark.parametrize(
    "options", [{"top": 2.5}, {"top": True}, {"top": "3"}, {"top": 3, "patience": 1.5}, {"top": 3, "patience": True},
                {"top": 3, "overlap": 2}, {"top": 3, "overlap": float("nan")}, {"top": 3, "overlap": "all"}],
)  # fmt: skip
def test_numbers_of_collect_are_checked_before_a_batch_is_taken(options: dict[str, Any]) -> None:
    collector, left = FisherCollector(dense()), iter([batch(), batch()])
    with pytest.raises(ConfigError, match="`(top|patience|overlap)`"):
        collector.collect(left, **options)
    assert collector.tasks() == () and len(list(left)) == 2


@pytest.mark.filterwarnings("ignore:.*collected by per-sample gradients")
def test_statistics_of_taps_are_no_parameters() -> None:
    model = dense()
    tapped = instrument_fisher(model, (batch()[0],))
    collector, plain = FisherCollector(tapped.module), FisherCollector(model)
    for each in (collector, plain):
        each.update(batch())
    assert collector.get().keys() == plain.get().keys()
    assert all(torch.allclose(value, plain.get()[key], rtol=1e-12) for key, value in collector.get().items())
    assert all(statistic.grad is None for statistic in tapped.statistics.values())
    EWC().consolidate("a", plain.parameters(), tapped.module)
