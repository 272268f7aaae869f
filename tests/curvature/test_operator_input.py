"""Data, models and vectors of unusual kinds: taken as they are meant, or refused by name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse.curvature import instrument_fisher
from fxsparse.curvature.fisher_types import CoupledSamples
from fxsparse.curvature.operator import CurvatureOperator
from fxsparse.curvature.operator_space import own_parameters
from fxsparse.errors import CaptureError, ConfigError, DataError
from tests.curvature import operator_oracle as oracle
from tests.torchrun import one_rank

RTOL = 1e-10


def near(found: Tensor, expected: Tensor, rtol: float = RTOL) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= rtol * max(float(expected.abs().max()), 1e-12)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, drawn(5, 3), torch.tensor([0, 1, 2, 0, 1])


class Scaled(nn.Module):
    """A parameter without axes, and one without entries."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 3), nn.Parameter(torch.tensor(0.3))
        self.nothing = nn.Parameter(torch.zeros(2, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale.exp() + self.nothing.sum()


@pytest.mark.parametrize("kind", ["ggn", "empirical"])
def test_parameters_without_axes_or_entries(kind: str) -> None:
    torch.manual_seed(0)
    model, x, y = Scaled().double(), drawn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    op = CurvatureOperator(model, None, "cross_entropy", (x, y), kind)
    expected = oracle.dense(model, (x,), y, oracle.cross_entropy, kind)
    v = drawn(13, 3, seed=1)
    near(op.dense(), expected)
    near(op.mm(v), expected @ v)
    near(op.mv(v[:, 0]), expected @ v[:, 0])
    near(op.diag(), expected.diagonal())
    place = op.space.slice_of("scale")
    near(op.block(["scale"]), expected[place, place])
    assert op.block(["nothing", "scale"]).shape == (1, 1)
    hessian = CurvatureOperator(model, None, "cross_entropy", (x, y), "hessian")
    expected = torch.stack(
        [oracle.hessian_product(model, (x,), y, oracle.cross_entropy, e) for e in torch.eye(13).double()]
    )
    near(hessian.dense(), expected, 1e-9)


@pytest.mark.parametrize("wrap", [list, tuple], ids=["list", "tuple"])
def test_batches_of_more_than_inputs_and_targets_are_refused(wrap: Callable[[Any], Any]) -> None:
    model, x, _ = network()
    y, weights = drawn(5, 3, seed=1), torch.rand(5)
    with pytest.raises(DataError, match=r"`batch` \(=3 entries\).*\(\(x1, x2\), y\)"):
        CurvatureOperator(model, None, "mse", [wrap((x, y, weights))])
    with pytest.raises(DataError, match=r"`batch` \(=0 entries\)"):
        CurvatureOperator(model, None, "mse", [wrap(())])
    alone = CurvatureOperator(model, None, "mse", [wrap((x,))])
    near(alone.diag(), CurvatureOperator(model, None, "mse", [wrap((x, y))]).diag())
    with pytest.raises(DataError, match=r"`data` \(=3 entries\)"):
        CurvatureOperator(model, None, "mse", (x, y, weights))


@pytest.mark.parametrize("kind", ["ggn", "empirical", "hessian"])
def test_tensors_of_inference_mode_are_copied(kind: str) -> None:
    model, x, y = network()
    v = drawn(31, 2, seed=1)
    expected = CurvatureOperator(model, None, "cross_entropy", (x, y), kind)
    with torch.inference_mode():
        batch, columns = (x.clone(), y.clone()), v.clone()
    for inside in (False, True):
        with torch.inference_mode(inside):
            op = CurvatureOperator(model, None, "cross_entropy", batch, kind)
            near(op.mv(columns[:, 0]), expected.mv(v[:, 0]), 1e-13)
            near(op.mm(columns), expected.mm(v), 1e-13)
            near(op.diag(), expected.diag(), 1e-13)
            near(op.gradient(), expected.gradient(), 1e-13)
            assert op.quadform(columns[:, 1]) == pytest.approx(expected.quadform(v[:, 1]), rel=1e-12)


def test_vectors_of_complex_numbers_are_refused() -> None:
    model, x, y = network()
    op = CurvatureOperator(model, None, "cross_entropy", (x, y))
    for v in (np.ones(31) * 1j, torch.ones(31) * 1j, np.array(["a"] * 31)):
        for call in (op.mv, op.quadform, lambda v: op.mm(v[:, None])):
            with pytest.raises(ConfigError, match="must hold real numbers"):
                call(v)
    with pytest.raises(ConfigError, match="real numbers"):
        op.mv({name: torch.ones(shape) * 1j for name, shape in op.space.shapes.items()})


@pytest.mark.parametrize("count", [2.5, "2", None, 0, -1])
def test_counts_are_integers(count: Any) -> None:
    model, x, y = network()
    op = CurvatureOperator(model, None, "cross_entropy", (x, y))
    shown = re.escape(f"(={count!r}) must be an integer of at least 1")
    for method in ("mc", "sketch", "hutchinson"):
        with pytest.raises(ConfigError, match=f"`samples` {shown}"):
            op.diag(method, samples=count)
    with pytest.raises(ConfigError, match=f"`draws` {shown}"):
        CurvatureOperator(model, None, "cross_entropy", (x, y), "fisher_mc", draws=count)
    if count is not None:
        with pytest.raises(ConfigError, match=f"`chunk` {shown}"):
            CurvatureOperator(model, None, "cross_entropy", (x, y), chunk=count)


class Tokens(nn.Module):
    """An embedding with options, read as a module or as a function."""

    def __init__(self, functional: bool = False, **options: Any) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 3, **options), nn.Linear(3, 4)
        self.functional, self.padding = functional, options.get("padding_idx")

    def forward(self, tokens: Tensor) -> Tensor:
        if self.functional:
            h = F.embedding(tokens, self.embedding.weight, self.padding)
        else:
            h = self.embedding(tokens)
        return self.head(torch.tanh(h).sum(1))


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 1], [2, 2, 5], [3, 0, 0], [0, 4, 0], [1, 1, 0]])
CLASSES = torch.tensor([0, 3, 1, 2, 0, 1])


@pytest.mark.parametrize("functional", [False, True], ids=["module", "function"])
@pytest.mark.parametrize("padding", [0, -6, 5])
def test_padding_that_the_first_samples_do_not_have(padding: int, functional: bool) -> None:
    """The gradient of a padding row is dropped, and its tangent must be, wherever padding stands in the data."""
    torch.manual_seed(0)
    model = Tokens(functional, padding_idx=padding).double()
    with torch.no_grad():
        model.embedding.weight[padding] = torch.tensor([0.3, -0.4, 0.5])
    data = [(TOKENS[:2], CLASSES[:2]), (TOKENS[2:], CLASSES[2:])]
    v = drawn(34, 3, seed=1)
    for kind in ("ggn", "empirical"):
        expected = oracle.dense(model, (TOKENS,), CLASSES, oracle.cross_entropy, kind)
        op = CurvatureOperator(model, None, "cross_entropy", data, kind)
        near(op.dense(), expected)
        near(op.mv(v[:, 0]), expected @ v[:, 0])
        near(op.mm(v), expected @ v)
        assert op.quadform(v[:, 1]) == pytest.approx(float(v[:, 1] @ expected @ v[:, 1]), rel=RTOL)
        assert op.engine._way == 0  # by forward mode
    hessian = CurvatureOperator(model, None, "cross_entropy", data, "hessian")
    expected = torch.stack(
        [oracle.hessian_product(model, (TOKENS,), CLASSES, oracle.cross_entropy, each) for each in v.T], 1
    )
    near(hessian.mm(v), expected, 1e-9)
    near(hessian.mv(v[:, 0]), expected[:, 0], 1e-9)


@pytest.mark.parametrize("kind", ["ggn", "empirical", "hessian"])
def test_embeddings_that_rescale_their_weight_are_given_back(kind: str) -> None:
    torch.manual_seed(0)
    model = Tokens(max_norm=0.8).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    op = CurvatureOperator(model, None, "cross_entropy", (TOKENS, CLASSES), kind)
    v = drawn(34, 2, seed=1)
    found = (op.mv(v[:, 0]), op.mm(v), op.diag(), op.gradient(), op.quadform(v[:, 0]), list(op.sample_gradients()))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    rescaled = Tokens().double()
    rescaled.load_state_dict(before)
    with torch.no_grad():
        norms = rescaled.embedding.weight.norm(dim=1, keepdim=True)
        rescaled.embedding.weight.mul_((0.8 / (norms + 1e-7)).clamp_max(1.0))
    plain = CurvatureOperator(rescaled, None, "cross_entropy", (TOKENS, CLASSES), kind)
    near(found[0], plain.mv(v[:, 0]), 1e-6)  # torch divides by the norm and 1e-7
    near(found[1], plain.mm(v), 1e-6)
    near(found[2], plain.diag(), 1e-6)
    near(found[3], plain.gradient(), 1e-6)


def test_embeddings_with_sparse_gradients() -> None:
    torch.manual_seed(0)
    model = Tokens(sparse=True).double()
    expected = oracle.dense(Tokens().double().requires_grad_(), (TOKENS,), CLASSES, oracle.cross_entropy)
    same = Tokens().double()
    same.load_state_dict(model.state_dict())
    expected = oracle.dense(same, (TOKENS,), CLASSES, oracle.cross_entropy)
    op = CurvatureOperator(model, None, "cross_entropy", (TOKENS, CLASSES))
    v = drawn(34, 2, seed=1)
    near(op.mm(v), expected @ v)
    near(op.mv(v[:, 0]), expected @ v[:, 0])
    near(op.dense(), expected)


def test_gradients_divided_by_frequencies_are_refused() -> None:
    torch.manual_seed(0)
    model = Tokens(scale_grad_by_freq=True).double()
    for kind in ("ggn", "empirical", "hessian"):
        with pytest.raises(CoupledSamples, match=r"`embedding` \(Embedding, scale_grad_by_freq=True\)"):
            CurvatureOperator(model, None, "cross_entropy", (TOKENS, CLASSES), kind, check=False)
    names = ["head.weight", "head.bias"]
    op = CurvatureOperator(model, names, "cross_entropy", (TOKENS, CLASSES))
    expected = oracle.dense(model, (TOKENS,), CLASSES, oracle.cross_entropy)[18:, 18:]
    near(op.dense(), expected)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(6, 3), nn.Linear(3, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.bag(tokens))


class Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(x, self.centres)


class Wrong(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.zeros(7, 2)


@pytest.mark.parametrize(
    ("model", "x", "match"),
    [
        (nn.Sequential(nn.Identity(), Bag()), TOKENS, r"at `1.bag` \(EmbeddingBag\), whose operator.*leave"),
        (nn.Sequential(nn.Linear(3, 3), Distances()), drawn(6, 3).float(), r"at `1` \(Distances\), whose operator"),
        (Distances(), drawn(6, 3).float(), r"at `model` \(Distances\)"),
        (nn.Sequential(nn.Linear(3, 3), Wrong()), drawn(6, 3).float(), r"at `1` \(Wrong\): RuntimeError"),
    ],
    ids=["bag", "cdist", "root", "wrong"],
)
def test_what_cannot_be_differentiated_is_named(model: nn.Module, x: Tensor, match: str) -> None:
    for kind in ("ggn", "hessian"):
        with pytest.raises(CaptureError, match=match):
            CurvatureOperator(model, None, "cross_entropy", (x, CLASSES), kind)


class _Doubled(torch.autograd.Function):
    """2 x, whose backward pass is a constant of autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        return 2 * delta.detach()


class Undifferentiable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(_Doubled.apply(self.first(x)))


def test_backward_passes_that_are_not_differentiable_are_noticed() -> None:
    torch.manual_seed(0)
    model, x, y = Undifferentiable().double(), drawn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    for kind in ("ggn", "empirical", "hessian"):
        for check in (True, False):
            with pytest.raises(CaptureError, match="not differentiable itself"):
                CurvatureOperator(model, None, "cross_entropy", (x, y), kind, check=check).mv(drawn(31))
    last = CurvatureOperator(model, ["last.weight", "last.bias"], "cross_entropy", (x, y))
    near(last.mv(drawn(15)), last.dense() @ drawn(15))


class Tapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(6, 4, padding_idx=0), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(tokens)).mean(1))


@pytest.mark.parametrize("kind", ["ggn", "empirical", "hessian"])
def test_statistics_of_taps_are_no_parameters(kind: str) -> None:
    torch.manual_seed(0)
    model = Tapped().double()
    tapped = instrument_fisher(model, (TOKENS,)).module
    assert list(own_parameters(tapped)) == [name for name, _ in model.named_parameters()]
    assert len(list(tapped.parameters())) > len(list(model.parameters()))
    plain = CurvatureOperator(model, None, "cross_entropy", (TOKENS, CLASSES), kind)
    op = CurvatureOperator(tapped, None, "cross_entropy", (TOKENS, CLASSES), kind)
    assert op.space.names == plain.space.names
    v = drawn(op.space.size, 2, seed=1)
    near(op.mv(v[:, 0]), plain.mv(v[:, 0]))
    near(op.mm(v), plain.mm(v))
    near(op.diag(), plain.diag())
    near(op.dense(), plain.dense())
    assert op.trace().value == pytest.approx(plain.trace().value, rel=RTOL)
    with pytest.raises(ConfigError, match=r"fisher_statistics\.t0"):
        CurvatureOperator(tapped, ["fisher_statistics.t0"], "cross_entropy", (TOKENS, CLASSES), kind)


class Writing(nn.Module):
    """Writes into buffers of several dtypes, past autograd too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))
        self.register_buffer("last", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.state = [torch.zeros(3)]

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        self.seen.fill_(True)
        self.count.add_(1)
        self.last.data.copy_(z.detach().mean(0))
        self.state[0].data.add_(1)
        return z


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_buffers_of_any_kind_are_given_back(kind: str) -> None:
    torch.manual_seed(0)
    model = Writing().double()
    op = CurvatureOperator(model, None, "cross_entropy", (drawn(5, 3), torch.tensor([0, 1, 2, 0, 1])), kind)
    for call in (op.diag, op.dense, op.gradient, lambda: op.mv(torch.ones(12)), lambda: op.mm(torch.ones(12, 2))):
        call()
        assert not model.seen and not model.count and not model.last.any() and not model.state[0].any()


def test_sharded_parameters_are_named_and_the_mend_works() -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, x, y = network()
    expected = CurvatureOperator(model, None, "cross_entropy", (x, y)).diag()
    with one_rank(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(model[2], mesh=mesh)
        match = r"`2.weight` \(=DTensor\) is sharded.*full_state_dict=True"
        with pytest.raises(ConfigError, match=match):
            CurvatureOperator(model, ["0.weight"], "cross_entropy", (x, y))
        with pytest.raises(ConfigError, match=match):
            instrument_fisher(model, (x,))
        whole, _, _ = network()
        whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    near(CurvatureOperator(whole, None, "cross_entropy", (x, y)).diag(), expected, 1e-13)


class Counted(nn.Module):
    """Reads rows of a weight by a function."""

    def __init__(self, lookup: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.rows, self.lookup = nn.Parameter(torch.randn(6, 3)), lookup

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lookup(tokens, self.rows * 1.5)


LOOKUPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "embedding": lambda ids, rows: F.embedding(ids, rows, None, None, 2.0, True).tanh().sum(1),
    "keyword": lambda ids, rows: F.embedding(ids, rows, scale_grad_by_freq=True).tanh().sum(1),
    "torch": lambda ids, rows: torch.embedding(rows, ids, -1, True).tanh().sum(1),
    "bag": lambda ids, rows: F.embedding_bag(ids, rows, mode="sum", scale_grad_by_freq=True).tanh(),
}


@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("kind", ["ggn", "empirical", "hessian"])
def test_functions_that_divide_gradients_by_frequencies_are_refused(lookup: str, kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Counted(LOOKUPS[lookup]), nn.Linear(3, 4)).double()
    op = CurvatureOperator(model, None, "cross_entropy", (TOKENS, CLASSES), kind, check=False)
    v = torch.ones(34)
    calls = [lambda: op.mv(v), lambda: op.mm(v[:, None].expand(-1, 2)), op.diag, op.dense, op.gradient]
    for call in (*calls, lambda: op.quadform(v), lambda: list(op.sample_gradients())):
        with pytest.raises(CoupledSamples, match=r"`0` \(Counted, scale_grad_by_freq=True\)"):
            call()
    last = CurvatureOperator(model, ["1.weight", "1.bias"], "cross_entropy", (TOKENS, CLASSES), kind)
    x = model[0](TOKENS).detach()
    near(last.dense(), CurvatureOperator(model[1], None, "cross_entropy", (x, CLASSES), kind).dense(), 1e-9)


class Standardised(nn.Module):
    """Writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.sub_(0.5).mul_(1.3)).tanh())


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
@pytest.mark.parametrize("check", [True, False])
def test_models_that_write_into_their_inputs_get_copies(kind: str, check: bool) -> None:
    torch.manual_seed(0)
    model, x, y = Standardised().double(), drawn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for mine, its in zip(plain.parameters(), model.parameters(), strict=True):
            mine.copy_(its)
    expected = CurvatureOperator(plain, None, "cross_entropy", ((x - 0.5) * 1.3, y), kind).dense()
    before, v = x.clone(), drawn(31, 2, seed=1)
    op = CurvatureOperator(model, None, "cross_entropy", (x, y), kind, check=check)
    for _ in range(2):
        near(op.mv(v[:, 0]), expected @ v[:, 0])
        near(op.mm(v), expected @ v)
        near(op.diag(), expected.diagonal())
        near(op.dense(), expected)
    assert torch.equal(x, before)


def test_the_caller_of_sample_gradients_is_outside_of_the_scope() -> None:
    model, x, y = network()
    model.train()
    op = CurvatureOperator(model, None, "cross_entropy", [(x, y), (x, y)], chunk=2)
    torch.manual_seed(3)
    expected = torch.rand(6)
    torch.manual_seed(3)
    found = []
    for _ in op.sample_gradients():
        assert all(module.training for module in model.modules())
        found.append(torch.rand(1))
    assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize("chunk", [0, -2, 1.5])
def test_pieces_have_samples(chunk: Any) -> None:
    model, x, y = network()
    op = CurvatureOperator(model, None, "cross_entropy", (x, y))
    for call in (lambda: op.diag(chunk=chunk), lambda: op.sample_gradients(chunk)):
        with pytest.raises(ConfigError, match=r"`chunk` .* must be an integer of at least 1"):
            call()


def test_a_product_with_no_column_has_none() -> None:
    model, x, y = network()
    op = CurvatureOperator(model, None, "cross_entropy", (x, y))
    assert op.mm(torch.zeros(31, 0)).shape == (31, 0)
    assert op.mm(np.zeros((31, 0))).shape == (31, 0)


def test_a_batch_as_loaders_give_it_is_a_pair() -> None:
    model, x, y = network()
    expected = CurvatureOperator(model, None, "cross_entropy", (x, y), "empirical").diag()
    near(CurvatureOperator(model, None, "cross_entropy", [x, y], "empirical").diag(), expected)
    batches = CurvatureOperator(model, None, "cross_entropy", [x[:2], x[2:]])
    assert batches.units == 5
    near(batches.diag(), CurvatureOperator(model, None, "cross_entropy", (x, y)).diag())


@pytest.mark.parametrize("chunk", [None, 2])
def test_batches_without_samples_are_passed_over(chunk: int | None) -> None:
    model, x, y = network()
    expected = oracle.dense(model, (x,), y, oracle.cross_entropy)
    op = CurvatureOperator(model, None, "cross_entropy", [(x[:0], y[:0]), (x, y), (x[:0], y[:0])], chunk=chunk)
    v = drawn(31, 2, seed=1)
    near(op.mv(v[:, 0]), expected @ v[:, 0])
    near(op.mm(v), expected @ v)
    near(op.diag(), expected.diagonal())
    near(op.dense(), expected)
    assert op.units == 5


class SingleNorm(nn.Module):
    """A norm that counts in single precision whatever the model's is, as those of language models do."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@pytest.mark.parametrize("kind", ["ggn", "empirical", "hessian"])
def test_double_models_that_count_in_single_precision_in_places(kind: str) -> None:
    """Their derivatives forward and backward differ by the rounding of single precision, which is no fault."""
    torch.manual_seed(0)
    layers = (nn.Linear(6, 16), SingleNorm(16), nn.Tanh(), nn.Linear(16, 16), SingleNorm(16), nn.Linear(16, 4))
    model = nn.Sequential(*layers).double()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(4, (20,))
    op = CurvatureOperator(model, None, "cross_entropy", [(x, y)], kind)
    v = torch.randn(op.space.size, dtype=torch.float64)
    exact = nn.Sequential(
        *(
            each if not isinstance(each, SingleNorm) else nn.RMSNorm(16, eps=1e-6, dtype=torch.float64)
            for each in layers
        )
    )
    for mine, own in zip(exact, layers, strict=True):
        if isinstance(own, SingleNorm):
            mine.weight = own.weight
    expected = CurvatureOperator(exact, None, "cross_entropy", [(x, y)], kind)
    torch.testing.assert_close(op.mv(v), expected.mv(v), rtol=1e-4, atol=1e-5)
    if kind != "hessian":
        torch.testing.assert_close(op.diag(), expected.diag(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["ggn", "empirical", "hessian"])
def test_data_that_are_no_numbers_are_told_before_data_that_change(kind: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    x[2, 1] = float("nan")
    with pytest.raises(DataError, match="NaN or infinite.*look for NaN or huge values in the data"):
        CurvatureOperator(model, None, "cross_entropy", [(x, y)], kind)
