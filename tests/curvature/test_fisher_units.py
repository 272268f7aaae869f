"""Units, normalisers and what must not change the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import CASES, Fn
from torch import Tensor, nn

from fxsparse.curvature import BCEWithLogits, CoupledSamples, CurvatureOperator, FisherCollector, UncoveredParameter
from fxsparse.errors import ConfigError, DataError

F64 = torch.float64
KINDS = ("empirical", "true")


def network(dtype: torch.dtype = F64) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(20, 4))
    return model.to(dtype)


def data(n: int = 12, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 5, generator=generator, dtype=dtype), torch.randint(0, 4, (n,), generator=generator)


def gathered(
    batches: list[Any], kind: str = "empirical", model: nn.Module | None = None, **options: Any
) -> FisherCollector:
    collector = FisherCollector(network() if model is None else model, "cross_entropy", kind, **options)
    for batch in batches:
        collector.update(batch)
    return collector


def same(first: dict[str, Tensor], second: dict[str, Tensor], rtol: float = 1e-12) -> None:
    assert list(first) == list(second)
    for key, value in first.items():
        assert torch.allclose(value.double(), second[key].double(), rtol=rtol, atol=rtol * float(value.max())), key


@pytest.mark.parametrize("dtype, rtol", [(F64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", ["auto", "element"])
def test_duplicates_splits_chunks_and_order_change_nothing(
    kind: str, groups: str, dtype: torch.dtype, rtol: float
) -> None:
    x, y = data(dtype=dtype)
    model = network(dtype)
    whole = gathered([(x, y)], kind, model, groups=groups)
    for batches in (
        [(x.repeat(3, 1, 1), y.repeat(3))],
        [(x[:1], y[:1]), (x[1:8], y[1:8]), (x[8:], y[8:])],
        [(x.flip(0), y.flip(0))],
    ):
        same(whole.get(), gathered(batches, kind, model, groups=groups).get(), rtol)
    same(whole.get(), gathered([(x, y)], kind, model, groups=groups, chunk=5).get(), rtol)
    split = gathered([(x[:1], y[:1]), (x[1:], y[1:])], kind, model, groups=groups)
    same(whole.variance(), split.variance(), rtol * 10)
    same(whole.standard_error(), split.standard_error(), rtol * 10)


def test_variance_and_standard_error_are_those_of_the_per_sample_squares() -> None:
    x, y = data()
    model = network()
    alone = [gathered([(x[n : n + 1], y[n : n + 1])], model=model).get() for n in range(len(x))]
    collector = gathered([(x[:5], y[:5]), (x[5:], y[5:])], model=model)
    for key, value in collector.variance().items():
        u = torch.stack([each[key] for each in alone])
        assert torch.allclose(collector.get()[key], u.mean(0), rtol=1e-12)
        assert torch.allclose(value, u.var(0), rtol=1e-10)
        assert torch.allclose(collector.standard_error()[key], (u.var(0) / len(x)).sqrt(), rtol=1e-10)


def test_a_loss_of_c_times_the_loss_has_the_squares_of_c_times_c() -> None:
    x, y = data()
    plain = gathered([(x, y)])
    scaled = FisherCollector(network(), lambda z, t: 8.0 * F.cross_entropy(z, t))
    scaled.update((x, y))
    same({key: 64 * value for key, value in plain.get().items()}, scaled.get())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_reduction_over_samples_plays_no_part(reduction: str) -> None:
    x, y = data()
    same(gathered([(x, y)]).get(), _with(nn.CrossEntropyLoss(reduction=reduction), x, y))
    same(gathered([(x, y)]).get(), _with(lambda z, t: F.cross_entropy(z, t, reduction=reduction), x, y))


def _with(loss: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    collector = FisherCollector(network(), loss)
    collector.update((x, y))
    return collector.get()


def test_gradient_scaling_of_a_training_loop_is_not_seen() -> None:
    x, y = data()
    model = network()
    expected = gathered([(x, y)], model=model).get()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (F.cross_entropy(model(x), y) * 65536.0).backward()
        same(expected, gathered([(x, y)], model=model).get())


class Language(nn.Module):
    """Causal attention over tokens, so that padding on the right reaches nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.attention = nn.Embedding(11, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embedding(input_ids)
        t = x.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool).triu(1)
        x = self.norm(x + self.attention(x, x, x, attn_mask=causal, need_weights=False)[0])
        return {"logits": self.head(x)}


def language() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Language().double()
    ids = torch.randint(0, 11, (4, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    labels = ids.clone()
    labels[0, 2] = -100
    return model, {"input_ids": ids, "attention_mask": mask, "labels": labels}


def valid_units(batch: dict[str, Tensor]) -> list[tuple[int, int]]:
    """(sequence, position) whose next position is seen and labelled."""
    n, t = batch["labels"].shape
    return [
        (i, p)
        for i in range(n)
        for p in range(t - 1)
        if batch["attention_mask"][i, p + 1] and batch["labels"][i, p + 1] != -100
    ]


def token_reference(model: nn.Module, batch: dict[str, Tensor], kind: str) -> tuple[dict[str, Tensor], int]:
    units = valid_units(batch)
    params = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    for i, p in units:
        z = model(batch["input_ids"][i : i + 1])["logits"][0, p]
        probs = z.softmax(-1).detach()
        if kind == "empirical":
            target = int(batch["labels"][i, p + 1])
            rows = [(1.0, probs - F.one_hot(torch.tensor(target), 11))]
        else:
            rows = [(float(probs[c]), probs - F.one_hot(torch.tensor(c), 11)) for c in range(11)]
        for weight, s in rows:
            for (name, _), g in zip(
                params.items(), torch.autograd.grad(z, list(params.values()), s.to(z), retain_graph=True), strict=True
            ):
                total[name] += weight * g.square()
    return {name: value.detach() / len(units) for name, value in total.items()}, len(units)


@pytest.mark.parametrize("kind", KINDS)
def test_token_units_count_shifted_labels_under_the_mask(kind: str) -> None:
    model, batch = language()
    reference, units = token_reference(model, batch, kind)
    collector = FisherCollector(model, "cross_entropy", kind, unit="token", groups="element")
    collector.update(batch)
    for name, value in reference.items():
        found = collector.get()[f"default|{name}|element"]
        assert torch.allclose(found, value, rtol=1e-10, atol=1e-10 * float(value.max()) + 1e-30), name
    assert collector.metadata("default|head.weight|element").units == units == len(valid_units(batch))


@pytest.mark.parametrize("kind", [*KINDS, "mc", "sketch"])
def test_padding_changes_nothing(kind: str) -> None:
    model, batch = language()
    padded = {
        "input_ids": F.pad(batch["input_ids"], (0, 3), value=7),
        "attention_mask": F.pad(batch["attention_mask"], (0, 3)),
        "labels": F.pad(batch["labels"], (0, 3), value=-100),
    }
    results = []
    for each in (batch, padded):
        collector = FisherCollector(model, "cross_entropy", kind, unit="token")
        collector.update(each)
        results.append(collector)
    units = [collector.metadata("default|head.weight|channel").units for collector in results]
    assert units[0] == units[1]
    if kind in KINDS:  # draws have the outputs' shape
        same(results[0].get(), results[1].get(), 1e-11)


def test_sequence_gradients_are_squared_as_a_whole_per_sample() -> None:
    model, batch = language()
    sample = FisherCollector(model, "cross_entropy", "empirical", unit="sample", groups="element")
    sample.update(batch)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(4):
        z = model(batch["input_ids"][i : i + 1])["logits"][0]
        losses = [F.cross_entropy(z[p], batch["labels"][i, p + 1]) for k, p in valid_units(batch) if k == i]
        for (name, _), g in zip(
            model.named_parameters(), torch.autograd.grad(sum(losses), list(model.parameters())), strict=True
        ):
            expected[name] += g.square() / 4
    for name, value in expected.items():
        found = sample.get()[f"default|{name}|element"]
        assert torch.allclose(found, value, rtol=1e-10, atol=1e-10 * float(value.max()) + 1e-30), name


def test_random_signs_replace_a_pass_for_each_position() -> None:
    model, batch = language()
    exact = FisherCollector(model, "cross_entropy", "true", unit="token")
    exact.update(batch)
    signs = FisherCollector(model, "cross_entropy", "true", unit="token", token_method="signs", samples=60)
    signs.update(batch)
    for key, value in exact.get().items():
        assert abs(float(signs.get()[key].sum() / value.sum()) - 1) < 0.35, key


def test_layer_by_layer_squares_are_exact_without_mixing_and_must_be_asked_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 7)).double()
    x = torch.randint(0, 7, (4, 3))
    batch = (x, torch.randint(0, 7, (4, 3)))
    for groups in ("auto", "element"):
        exact = FisherCollector(model, nn.CrossEntropyLoss(), unit="token", groups=groups)
        quick = FisherCollector(model, nn.CrossEntropyLoss(), unit="token", groups=groups, token_method="expand")
        exact.update(batch)
        quick.update(batch)
        same(exact.get(), quick.get(), 1e-10)
    case = next(case for case in CASES if case.name == "tied language model")
    tied, inputs, _ = case.build()
    collector = FisherCollector(tied, "cross_entropy", unit="token", token_method="expand")
    with pytest.raises(UncoveredParameter, match="embedding.weight.*read several times"):
        collector.update((inputs, torch.randint(0, 3, (5,))))
    with pytest.raises(ConfigError, match="token_method"):
        FisherCollector(model, token_method="expand")


def test_a_batch_without_units_is_skipped_and_counted() -> None:
    model, batch = language()
    collector = FisherCollector(model, "cross_entropy", unit="token")
    collector.update(batch)
    before = collector.get()
    collector.update({**batch, "labels": torch.full_like(batch["labels"], -100)})
    same(before, collector.get(), 0.0)
    assert collector.skipped() == 1
    with pytest.raises(DataError, match="no unit that counts"):
        collector.oneshot({**batch, "labels": torch.full_like(batch["labels"], -100)})


def test_token_standard_error_is_that_of_a_ratio() -> None:
    model, batch = language()
    collector = FisherCollector(model, "cross_entropy", unit="token")
    collector.update({name: value[:2] for name, value in batch.items()})
    collector.update({name: value[2:] for name, value in batch.items()})
    u, m = [], []
    for i in range(4):
        single = FisherCollector(model, "cross_entropy", unit="token")
        single.update({name: value[i : i + 1] for name, value in batch.items()})
        m.append(single.metadata("default|head.weight|channel").units)
        u.append(single.get()["default|head.weight|channel"] * m[-1])
    values, masses = torch.stack(u), torch.tensor(m, dtype=F64)
    f = values.sum(0) / masses.sum()
    expected = (4 / 3 * (values - f * masses[:, None]).square().sum(0)).sqrt() / masses.sum()
    assert torch.allclose(collector.standard_error()["default|head.weight|channel"], expected, rtol=1e-10)


def test_samples_that_know_of_each_other_are_refused() -> None:
    x, y = data()
    centred = Fn(lambda s, x: s.head((x - x.mean(0)).flatten(1)), head=nn.Linear(15, 4)).double()
    with pytest.raises(CoupledSamples, match="change by .* when the other samples"):
        FisherCollector(centred).update((x, y))
    batch_norm = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(15, track_running_stats=False), nn.Linear(15, 4))
    with pytest.raises(CoupledSamples, match="`1`.*track_running_stats"):
        FisherCollector(batch_norm)
    tracked = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(15), nn.Linear(15, 4)).double()
    with pytest.raises(CoupledSamples, match="training mode"):
        FisherCollector(tracked, bn="raise")
    frozen = FisherCollector(tracked)
    frozen.update((x, y))
    assert tracked[1].training and int(tracked[1].num_batches_tracked) == 0


def test_bad_input_is_refused_with_the_mend() -> None:
    model = network()
    x, y = data()
    with pytest.raises(ConfigError, match="`kind`"):
        FisherCollector(model, kind="diagonal")
    for name, value in (
        ("unit", "word"),
        ("accumulate", "sum"),
        ("support", "all"),
        ("absent", "drop"),
        ("bn", "thaw"),
    ):
        with pytest.raises(ConfigError, match=f"`{name}`"):
            FisherCollector(model, **{name: value})
    for name, value in (("beta", 1.0), ("samples", 0), ("chunk", 0), ("groups", "rows"), ("storage", "fp16")):
        with pytest.raises(ConfigError, match=f"`{name}`"):
            FisherCollector(model, **{name: value})
    with pytest.raises(ConfigError, match="no parameter of the model"):
        FisherCollector(model, parameters=["weight"])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="no floating-point parameter"):
        FisherCollector(model)
    chosen = FisherCollector(model, parameters=["3.weight"])
    chosen.update((x, y))
    assert list(chosen.get()) == ["default|3.weight|channel"]
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(DataError, match="label 9 is no class"):
        chosen.update((x, torch.full_like(y, 9)))
    with pytest.raises(DataError, match="needs targets"):
        chosen.update(x)
    with pytest.raises(ConfigError, match="not known"):
        chosen.get("other")
    with pytest.raises(ConfigError, match="names nothing"):
        chosen.get(param="weight")


@pytest.mark.parametrize("loss", ["mse", "bce_mean"])
def test_a_mean_over_outputs_is_one_over_those_of_the_unit(loss: str) -> None:
    """With positions as units, a mean is taken over the outputs of a position: as if each were a sample of its own."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1 if loss == "bce_mean" else 2).double()
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    y = torch.rand(4, 5, model.out_features, dtype=torch.float64)
    own = "mse" if loss == "mse" else BCEWithLogits("mean")
    whole = FisherCollector(model, own, "true", unit="token", groups="element")
    apart = FisherCollector(model, own, "true", groups="element")
    whole.update((x, y))
    apart.update((x.flatten(0, 1), y.flatten(0, 1)))
    for key, value in apart.get().items():
        assert torch.allclose(whole.get()[key], value, rtol=1e-12)
    tokens = CurvatureOperator(model, None, own, (x, y), unit="token")
    samples = CurvatureOperator(model, None, own, (x.flatten(0, 1), y.flatten(0, 1)))
    assert torch.allclose(tokens.dense(), samples.dense(), rtol=1e-12)
    assert float(samples.dense().abs().max()) > 0
