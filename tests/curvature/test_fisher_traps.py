"""What silently goes wrong in collectors: each test fails on one such mistake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import CASES, Fn
from fisher_oracle import fisher
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from fxsparse.curvature import (
    CurvatureOperator,
    CurvatureSource,
    FisherCollector,
    Heads,
    UnsupportedLoss,
    WoodFisher,
    woodfisher_scores,
)
from fxsparse.errors import ConfigError, DataError
from fxsparse.graph.scopes import rng_fingerprint

F64 = torch.float64


class Fails(Exception):
    """Raised inside a model or a loss."""


class Calls:
    """Counts, out of reach of what gives back a module's attributes."""

    number = 0


class Worn(nn.Module):
    """Everything that a collection could leave behind: mixed flags, a frozen weight, dropout, running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.b, self.calls, self.fail_at = nn.Linear(5, 3), Calls(), 0

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(2)  # a model may draw in evaluation mode, too
        h = self.drop(self.norm(torch.tanh(self.a(x))))
        self.calls.number += 1
        if self.calls.number == self.fail_at:
            raise Fails
        return self.b(h)


def worn() -> Worn:
    torch.manual_seed(0)
    model = Worn().double().train()
    model.norm.eval()
    model.a.weight.requires_grad_(False)
    model.b.weight.grad = torch.ones_like(model.b.weight)
    return model


def everything(model: nn.Module) -> list[Any]:
    return [
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [(id(p.grad), None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
        [(id(p), p.tolist(), p.dtype, type(p)) for p in model.parameters()],
        [(id(b), b.tolist()) for b in model.buffers()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        rng_fingerprint(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.overrides._get_current_function_mode_stack(),  # type: ignore[no-untyped-call]  # untyped in torch
    ]


@pytest.mark.parametrize("kind", ["empirical", "true", "mc", "sketch"])
@pytest.mark.parametrize("gradients", [True, False])
def test_the_state_is_given_back_after_success(kind: str, gradients: bool) -> None:
    model = worn()
    x, y = torch.randn(4, 6, dtype=F64), torch.tensor([0, 1, 2, 0])
    before = everything(model)
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
        collector = FisherCollector(model, kind=kind)
        collector.update((x, y))
        assert torch.is_grad_enabled() is gradients and torch.is_autocast_enabled("cpu")
    assert everything(model) == before
    assert "default|a.weight|channel" not in collector.get()  # frozen, and stays so


@pytest.mark.parametrize("call", range(1, 5))
def test_the_state_is_given_back_after_an_exception_in_the_model(call: int) -> None:
    model = worn()
    batch = torch.randn(4, 6, dtype=F64), torch.tensor([0, 1, 2, 0])
    before = everything(model)
    collector = FisherCollector(model)
    model.fail_at = call
    failed = False
    for _ in range(2):
        try:
            collector.update(batch)
        except Fails:
            failed = True
            assert everything(model) == before
    assert failed and everything(model) == before
    fresh = FisherCollector(worn())
    fresh.update(batch)
    if call <= 3:  # nothing of the batch that failed is kept
        assert all(torch.equal(value, fresh.get()[key]) for key, value in collector.get().items())


def test_the_state_is_given_back_after_an_exception_in_the_loss() -> None:
    model = worn()
    x = torch.randn(4, 6, dtype=F64)
    before = everything(model)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        raise Fails

    with pytest.raises(Fails):
        FisherCollector(model, loss).update((x, torch.zeros(4)))
    with pytest.raises(DataError):
        FisherCollector(model).update((x, torch.full((4,), 7)))
    assert everything(model) == before


@pytest.mark.parametrize("kind", ["empirical", "true"])
@pytest.mark.parametrize("name", ["conv", "tied language model", "lstm", "norms", "weight times mask", "vision tokens"])
@pytest.mark.filterwarnings("ignore:.*axes of unknown meaning")
def test_float32_is_near_the_double_precision_reference(name: str, kind: str) -> None:
    (case,) = [case for case in CASES if case.name == name]
    model, inputs, y = case.build()
    reference = fisher(model, inputs, y, F.cross_entropy, kind)
    collector = FisherCollector(model.float(), kind=kind, groups="element")
    collector.update((tuple(x.float() if x.is_floating_point() else x for x in inputs), y))
    for parameter, value in reference.items():
        found = collector.get()[f"default|{parameter}|element"].double()
        assert float((found - value).abs().max()) <= 1e-5 * float(value.max()) + 1e-12, parameter


def test_low_precision_parameters_are_summed_wide() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).bfloat16()
    x, y = torch.randn(512, 6, dtype=torch.bfloat16), torch.randint(0, 3, (512,))
    collector = FisherCollector(model)
    collector.update((x, y))
    exact = FisherCollector(model.double())
    exact.update((x.double(), y))
    for key, value in exact.get().items():
        assert collector.get()[key].dtype in (torch.float32, F64)
        assert torch.allclose(collector.get()[key].double(), value, rtol=0.03), key  # summed in bfloat16: far off


def test_what_overwrites_an_input_is_refused() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        y = self.b(h)
        with torch.no_grad():
            h.add_(1.0)
        return y

    model = Fn(forward, a=nn.Linear(6, 5), b=nn.Linear(5, 3)).double()
    with pytest.raises(DataError, match="in place"):
        FisherCollector(model).update((torch.randn(4, 6, dtype=F64), torch.tensor([0, 1, 2, 0])))


class Fused(nn.Module):
    """A fused projection [in, out], as GPT-2 stores it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.bias = nn.Parameter(torch.randn(6, 16) * 0.5), nn.Parameter(torch.zeros(16))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        y = torch.addmm(self.bias, x.reshape(n * t, 6), self.qkv).view(n, t, 16)
        q, k, v = (each.reshape(n, t, -1, 2).transpose(1, 2) for each in y.split((8, 4, 4), -1))
        y = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
        return self.out(y.transpose(1, 2).reshape(n, t, 8).mean(1))


def test_a_fused_projection_that_is_stored_transposed_is_grouped_by_its_outputs() -> None:
    torch.manual_seed(0)
    model = Fused().double()
    x, y = torch.randn(5, 4, 6, dtype=F64), torch.arange(5) % 3
    reference = fisher(model, (x,), y, F.cross_entropy, "empirical")["qkv"]
    layout = Heads(4, 2, fused=("qkv",), stored_transposed=True)
    collector = FisherCollector(model, heads=[layout])
    collector.update((x, y))
    columns = reference.sum(0)
    for kind, first, last in (("q", 0, 8), ("k", 8, 12), ("v", 12, 16)):
        found = collector.get()[f"default|qkv|head:{kind}"]
        assert torch.allclose(found, columns[first:last].view(-1, 2).sum(1), rtol=1e-10)
    total = sum(float(value.sum()) for key, value in collector.get().items() if "|qkv|" in key)
    assert total == pytest.approx(float(reference.sum()), rel=1e-12)  # an average of the three would lose two thirds


def gaussian(z: Tensor, y: Tensor) -> Tensor:
    """-log N(y | z_0, exp z_1), a sum over samples."""
    return (0.5 * (z[:, 1] + (z[:, 0] - y).square() * torch.exp(-z[:, 1]))).sum()


def test_a_predicted_variance_has_a_ggn_and_no_true_fisher() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3, dtype=F64), torch.randn(5, dtype=F64)
    params = {name: p.detach() for name, p in model.named_parameters()}
    z = model(x).detach()
    jacobian = jacrev(lambda own: functional_call(model, own, (x,)))(params)
    j = torch.cat([jacobian[name].reshape(5, 2, -1) for name in params], 2)
    h = torch.stack([jacrev(jacrev(lambda one, n=n: gaussian(one[None], y[n : n + 1])))(z[n]) for n in range(5)])
    expected = torch.einsum("nci,ncd,ndj->ij", j, h, j) / 5
    found = CurvatureOperator(model, None, gaussian, (x, y)).dense()
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)
    diagonal = CurvatureOperator(model, None, gaussian, (x, y)).diag()
    assert torch.allclose(diagonal, expected.diagonal(), rtol=1e-10, atol=1e-14)
    for kind in ("fisher", "fisher_mc"):
        with pytest.raises(UnsupportedLoss):
            CurvatureOperator(model, None, gaussian, (x, y), kind).dense()
    for kind in ("true", "mc", "sketch", "ggn"):
        with pytest.raises(UnsupportedLoss):
            FisherCollector(model, gaussian, kind).update((x, y))
    FisherCollector(model, gaussian).update((x, y))


@pytest.mark.parametrize("kind", ["true", "sketch"])
def test_without_labels_the_mask_alone_says_what_counts(kind: str) -> None:
    torch.manual_seed(0)

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 6), nn.Linear(6, 4)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embedding(input_ids)))

    model = Tagger().double()
    ids = torch.randint(0, 9, (3, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    collector = FisherCollector(model, nn.CrossEntropyLoss(), kind, unit="token", samples=1)
    collector.update({"input_ids": ids, "attention_mask": mask})
    assert collector.metadata("default|head.weight|channel").units == 10
    if kind == "true":
        a = torch.tanh(model.embedding(ids)).detach()
        p = model.head(a).softmax(-1).detach()
        each = p * (1 - p) * a.square().sum(-1, keepdim=True)
        assert torch.allclose(collector.get()["default|head.weight|channel"], (each * mask[..., None]).sum((0, 1)) / 10)


def test_averaged_gradients_are_another_matrix_and_said_so() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    x, y = torch.randn(7, 4, dtype=F64), torch.arange(7) % 3
    source = CurvatureSource(model, "cross_entropy", [(x, y)])
    each = []
    for n in range(7):
        (g,) = torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), model.weight)
        each.append(g)
    single = torch.stack(each)
    averaged = torch.stack([single[:3].mean(0), single[3:6].mean(0), single[6]])
    for rows, size in ((single, 1), (averaged, 3)):
        saliency = WoodFisher(source, 0.1, 5, size)
        expected = woodfisher_scores(model.weight.detach(), rows, 0.1, 5)
        assert torch.allclose(saliency.score(model.weight), expected, rtol=1e-9)
        assert f"fisher_batch={size}" in repr(saliency)
    with pytest.raises(ConfigError, match="`fisher_batch`"):
        WoodFisher(source, fisher_batch=0)


def test_shuffled_and_repeated_batches_of_recurrent_and_normalised_models() -> None:
    """Sums over samples know neither order nor multiplicity; a batch mean would."""
    makers: list[Callable[[], nn.Module]] = [
        case.make for case in CASES if case.name in ("lstm", "batch norm", "norms")
    ]
    inputs = [case.inputs for case in CASES if case.name in ("lstm", "batch norm", "norms")]
    for make, draw in zip(makers, inputs, strict=True):
        torch.manual_seed(0)
        model = make().double()
        (x,) = draw()
        y = torch.arange(len(x)) % 3
        order = torch.randperm(len(x))
        results = []
        for a, b in ((x, y), (x[order], y[order]), (torch.cat([x, x]), torch.cat([y, y]))):
            collector = FisherCollector(model)
            collector.update((a, b))
            results.append(collector.get())
        for other in results[1:]:
            for key, value in results[0].items():
                assert torch.allclose(value, other[key], rtol=1e-11, atol=1e-24), key
