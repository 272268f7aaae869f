"""Samples without a unit that counts: they enter neither F nor M nor what is said of their spread."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fisher_oracle import fisher
from torch import Tensor, nn

from fxsparse.curvature import CurvatureOperator, FisherCollector, instrument_fisher
from fxsparse.errors import DataError

F64 = torch.float64
LABELS = torch.tensor([0, 1, -100, 2, -100])
KEPT = LABELS != -100


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def inputs() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=F64)


def collected(batch: tuple[Tensor, Tensor], kind: str = "empirical", **options: Any) -> FisherCollector:
    collector = FisherCollector(network(), kind=kind, **options)
    collector.update(batch)
    return collector


@pytest.mark.parametrize("options", [{}, {"chunk": 2}, {"chunk": 1}, {"variance": False}, {"accumulate": "ema"}])
@pytest.mark.parametrize("groups", ["element", "auto"])
@pytest.mark.parametrize("kind", ["empirical", "true", "ggn"])
def test_the_fisher_is_that_of_the_samples_with_labels(kind: str, groups: str, options: dict[str, Any]) -> None:
    x = inputs()
    found = collected((x, LABELS), kind, groups=groups, **options)
    kept = collected((x[KEPT], LABELS[KEPT]), kind, groups=groups, **options)
    oracle = fisher(network(), (x[KEPT],), LABELS[KEPT], F.cross_entropy, "empirical" if kind[0] == "e" else "true")
    for key, value in found.get().items():
        name = key.split("|")[1]
        exact = oracle[name] if key.endswith("element") else oracle[name].sum(1)
        assert torch.allclose(value, exact, rtol=1e-12), key
        assert torch.allclose(value, kept.get()[key], rtol=1e-12)
        assert found.metadata(key).units == 3 and found.effective_size() == kept.effective_size()


def test_variances_and_standard_errors_are_those_of_the_samples_with_labels() -> None:
    x, model = inputs(), network()
    found = collected((x, LABELS))
    squares: dict[str, list[Tensor]] = {}
    for n in KEPT.nonzero()[:, 0].tolist():
        for name, value in fisher(model, (x[n : n + 1],), LABELS[n : n + 1], F.cross_entropy, "empirical").items():
            squares.setdefault(name, []).append(value.sum(1) if name.endswith("weight") else value)
    for key, value in found.variance().items():
        u = torch.stack(squares[key.split("|")[1]])
        assert torch.allclose(value, u.var(0), rtol=1e-10), key
        assert torch.allclose(found.standard_error()[key], (u.var(0) / 3).sqrt(), rtol=1e-10), key


def test_collector_operator_and_taps_count_alike() -> None:
    x, model = inputs(), network()
    total = sum(float(value.sum()) for value in collected((x, LABELS)).get().values())
    operator = CurvatureOperator(model, None, "cross_entropy", [(x, LABELS)], kind="empirical")
    assert operator.trace().value == pytest.approx(total, rel=1e-12)
    tapped = instrument_fisher(model, (x,))
    F.cross_entropy(tapped.module(x), LABELS).backward()
    taps = sum(float(value.sum()) for value in tapped.fisher(samples=3).values())
    assert taps == pytest.approx(total, rel=1e-12)


def test_a_batch_without_labels_is_skipped() -> None:
    collector = FisherCollector(network())
    collector.update((inputs(), torch.full((5,), -100)))
    assert collector.skipped() == 1
    for read in (collector.get, collector.parameters, collector.variance, collector.standard_error):
        with pytest.raises(DataError, match="'default'.*no unit that counts"):
            read()
    with pytest.raises(DataError, match="no unit that counts"):
        collector.consolidate()
    with pytest.raises(DataError, match="no unit that counts"):
        collector.oneshot((inputs(), torch.full((5,), -100)))
    collector.update((inputs(), LABELS))
    alone = collected((inputs(), LABELS))
    assert all(torch.equal(value, alone.get()[key]) for key, value in collector.get().items())


class Tagger(nn.Module):
    """Labels for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        return self.head(torch.tanh(self.mix(h) + h.mean(1, keepdim=True)))


@pytest.mark.parametrize("unit", ["sample", "token"])
@pytest.mark.parametrize("kind", ["empirical", "true"])
def test_sequences_without_a_label_change_nothing(unit: str, kind: str) -> None:
    torch.manual_seed(0)
    model = Tagger().double()
    ids, labels = torch.randint(0, 7, (5, 4)), torch.randint(0, 3, (5, 4))
    labels[1] = -100
    labels[4] = -100
    labels[0, 2] = -100
    kept = torch.tensor([0, 2, 3])
    whole, part = (FisherCollector(model, nn.CrossEntropyLoss(), kind, unit) for _ in "ab")
    whole.update((ids, labels))
    part.update((ids[kept], labels[kept]))
    assert whole.effective_size() == part.effective_size() == dict.fromkeys(whole.get(), 3.0)
    for read in ("get", "variance", "standard_error"):
        for key, value in getattr(part, read)().items():
            assert torch.allclose(getattr(whole, read)()[key], value, rtol=1e-10, atol=1e-18), (read, key)


class Masked(Tagger):
    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(ids)


@pytest.mark.parametrize("unit", ["sample", "token"])
def test_what_is_masked_counts_as_little_as_what_is_ignored(unit: str) -> None:
    torch.manual_seed(0)
    model = Masked().double()
    ids = torch.randint(0, 7, (4, 5))
    mask = torch.ones_like(ids)
    mask[1] = 0
    mask[2, 3:] = 0
    kept = torch.tensor([0, 2, 3])
    labels = ids % 3
    whole, part = (FisherCollector(model, nn.CrossEntropyLoss(), unit=unit) for _ in "ab")
    whole.update({"ids": ids, "attention_mask": mask, "labels": labels})
    part.update({"ids": ids[kept], "attention_mask": mask[kept], "labels": labels[kept]})
    for read in ("get", "standard_error", "effective_size"):
        for key, value in getattr(part, read)().items():
            assert torch.allclose(
                torch.as_tensor(getattr(whole, read)()[key]), torch.as_tensor(value), rtol=1e-10, atol=1e-18
            )
