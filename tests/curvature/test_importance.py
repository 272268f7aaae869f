"""Scores of removal: goldens, predictions against measured changes, channels, and the saliencies of updaters."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse.curvature.importance import (
    channel_scores,
    obd_scores,
    obs_scores,
    obs_update,
    taylor_scores,
    theis_scores,
    woodfisher_inverse,
    woodfisher_scores,
)
from fxsparse.curvature.importance_channels import channel_element_scores, channel_importance
from fxsparse.curvature.importance_saliency import (
    OBD,
    FisherDiagonal,
    GivenScores,
    NewtonGain,
    WoodFisher,
    with_saliencies,
)
from fxsparse.curvature.importance_source import CurvatureSource
from fxsparse.curvature.losses import MSE
from fxsparse.curvature.operator import CurvatureOperator
from fxsparse.errors import ConfigError, DataError
from fxsparse.training import GMP, ITOP, MEST, RESU, SET, SNFS, OneShot, RigL, SRigL, Static
from tests.curvature import operator_oracle as oracle

H = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
ONES = torch.ones(2, dtype=torch.float64)


def test_golden_obd_and_obs() -> None:
    assert obd_scores(ONES, H.diagonal()).tolist() == [1.0, 1.0]
    inverse = torch.linalg.inv(H)
    assert obs_scores(ONES, inverse).tolist() == pytest.approx([0.75, 0.75])
    score, delta = obs_update(ONES, inverse, 0)
    assert score == pytest.approx(0.75)
    assert delta.tolist() == pytest.approx([-1.0, 0.5])
    both, whole = obs_update(ONES, inverse, [0, 1])
    assert both == pytest.approx(3.0)  # the sum of single scores, 1.5, is wrong
    assert (ONES + whole).tolist() == [0.0, 0.0]
    assert obs_update(ONES, inverse, [])[0] == 0.0


def test_obs_predicts_the_loss_of_a_quadratic_and_is_its_minimum() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(9, 6, generator=g, dtype=torch.float64)
    f = a.T @ a / 9 + 0.1 * torch.eye(6, dtype=torch.float64)
    w = torch.randn(6, generator=g, dtype=torch.float64)
    for removed in ([2], [0, 5], [1, 2, 3]):
        score, delta = obs_update(w, torch.linalg.inv(f), removed)
        assert bool(((w + delta)[removed] == 0).all())
        assert score == pytest.approx(float(0.5 * delta @ f @ delta), abs=1e-10)
        free = [i for i in range(6) if i not in removed]
        solved = torch.zeros(6, dtype=torch.float64)  # the constrained minimum, by normal equations
        solved[removed] = -w[removed]
        solved[free] = -torch.linalg.solve(f[free][:, free], f[free][:, removed] @ solved[removed])
        assert torch.allclose(delta, solved, atol=1e-10)
    single = obs_scores(w, torch.linalg.inv(f))
    for i in range(6):
        assert float(single[i]) == pytest.approx(obs_update(w, torch.linalg.inv(f), i)[0], abs=1e-12)


def test_obs_of_a_least_squares_model_is_what_the_loss_changes_by() -> None:
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(30, n, generator=g, dtype=torch.float64) for n in (5, 1))
    model = nn.Linear(5, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    op = CurvatureOperator(model, None, MSE("half"), (x, y))
    loss = lambda: float(0.5 * (model(x) - y).detach().square().mean())  # noqa: E731
    before, w = loss(), model.weight.detach()[0].clone()
    score, delta = obs_update(w, torch.linalg.inv(op.dense()), [1, 4])
    with torch.no_grad():
        model.weight += delta
    assert loss() - before == pytest.approx(score, abs=1e-10)


def test_golden_woodfisher() -> None:
    g = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    inverse = woodfisher_inverse(g, 1.0)[0]
    assert inverse.flatten().tolist() == pytest.approx([6 / 11, -2 / 11, -2 / 11, 8 / 11])
    direct = torch.linalg.inv(torch.eye(2).double() + g.double().T @ g.double() / 2)
    assert torch.allclose(inverse, direct, atol=1e-14)


def test_woodfisher_blocks_are_inverses_of_the_blocks() -> None:
    g = torch.randn(12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    f = 0.3 * torch.eye(7, dtype=torch.float64) + g.T @ g / 12
    inverse = woodfisher_inverse(g, 0.3, 3)
    assert inverse.shape == (3, 3, 3)
    for block, place in enumerate((slice(0, 3), slice(3, 6), slice(6, 7))):
        size = place.stop - place.start
        assert torch.allclose(inverse[block][:size, :size], torch.linalg.inv(f[place, place]), atol=1e-12)
    whole = woodfisher_scores(w.view(1, 7), g.view(12, 1, 7), 0.3)
    assert torch.allclose(whole[0], obs_scores(w, torch.linalg.inv(f)), atol=1e-12)


def test_per_sample_gradients_are_not_the_batch_mean() -> None:
    g, w = torch.tensor([[1.0], [-1.0]]), torch.tensor([2.0])
    assert taylor_scores(w, g).item() == 2.0
    assert taylor_scores(w, g, "batch").item() == 0.0
    assert taylor_scores(w, torch.tensor([[1.0], [2.0]]), "squared").item() == 9.0
    a = torch.tensor([[[1.0]], [[1.0]]])
    assert theis_scores(a, torch.tensor([[[2.0]], [[-2.0]]])).item() == 2.0  # the batch mean gives 0
    members = [torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0], [0.0]])]
    assert channel_scores(members).item() == 2.5  # squares first give 1.5
    assert channel_scores(members, 5.0).item() == 0.5


@pytest.mark.parametrize(
    "removed", [True, [True], torch.tensor([True, False]), np.array([True]), 1.0, [0.5], "0", None, [[0]]]
)
def test_weights_to_remove_are_named_by_indices(removed: Any) -> None:
    with pytest.raises(ConfigError, match="`removed`"):
        obs_update(ONES, torch.linalg.inv(H), removed)


@pytest.mark.parametrize(
    "removed", [np.int64(0), [np.int64(0)], torch.tensor(0), torch.tensor([0]), np.array([0]), (0,)]
)
def test_indices_may_come_from_anywhere(removed: Any) -> None:
    score, delta = obs_update(ONES, torch.linalg.inv(H), removed)
    assert score == pytest.approx(0.75) and delta.tolist() == pytest.approx([-1.0, 0.5])


def test_bad_scores_have_typed_errors() -> None:
    inverse = torch.linalg.inv(H)
    for call in (
        lambda: obd_scores(ONES, H),
        lambda: obs_scores(H, inverse),
        lambda: obs_update(ONES, inverse, [0, 0]),
        lambda: obs_update(ONES, inverse, 2),
        lambda: woodfisher_inverse(H, 0.0),
        lambda: woodfisher_inverse(H, 1.0, 0),
        lambda: woodfisher_scores(ONES, torch.ones(2, 3), 1.0),
        lambda: taylor_scores(ONES, torch.ones(2, 2), "other"),
        lambda: taylor_scores(ONES, torch.ones(0, 2)),
        lambda: theis_scores(torch.ones(2, 2), torch.ones(2, 2), 0),
        lambda: channel_scores([]),
        lambda: channel_scores([torch.ones(2, 1)], 0.0),
    ):
        with pytest.raises(ConfigError):
            call()
    with pytest.raises(DataError):
        obd_scores(ONES, -ONES)
    with pytest.raises(DataError):
        obs_scores(ONES, -inverse)
    with pytest.raises(DataError):
        obs_update(ONES, -inverse, 0)


BAD = torch.tensor([1.0, float("nan")])
ROWS = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ConfigError, r"`weight` \(=\[1.0\]\)|`weight` \(=list", lambda: obd_scores([1.0], ONES)),
        (ConfigError, r"`fisher` \(=None\)", lambda: obd_scores(ONES, None)),
        (DataError, "`weight` has 1 values", lambda: obd_scores(BAD, ONES)),
        (ConfigError, r"`weight` \(=torch.complex64\)", lambda: obd_scores(ONES.to(torch.complex64), ONES)),
        (ConfigError, r"`inverse` \(='x'\)", lambda: obs_scores(ONES, "x")),
        (DataError, "`inverse` has 2 values", lambda: obs_update(ONES, torch.stack([BAD, BAD]), 0)),
        (ConfigError, r"`gradients` \(=None\)", lambda: woodfisher_inverse(None, 1.0)),
        (ConfigError, r"`gradients` \(=\(2,\)\)", lambda: woodfisher_inverse(ONES, 1.0)),
        (ConfigError, r"`gradients` \(=\(0, 2\)\)", lambda: woodfisher_inverse(ROWS[:0], 1.0)),
        (DataError, "`gradients` has 1 values", lambda: woodfisher_inverse(BAD[None], 1.0)),
        (ConfigError, r"`damping` \(='a'\)", lambda: woodfisher_inverse(ROWS, "a")),
        (ConfigError, r"`damping` \(=nan\)", lambda: woodfisher_inverse(ROWS, float("nan"))),
        (ConfigError, r"`damping` \(=inf\)", lambda: woodfisher_inverse(ROWS, float("inf"))),
        (ConfigError, r"`block` \(=2.5\)", lambda: woodfisher_inverse(ROWS, 1.0, 2.5)),
        (ConfigError, r"`block` \(=True\)", lambda: woodfisher_inverse(ROWS, 1.0, True)),
        (ConfigError, r"`gradients` \(=3\)", lambda: woodfisher_scores(ONES, 3, 1.0)),
        (ConfigError, r"`gradients` \(=\(\)\)", lambda: taylor_scores(torch.ones(()), torch.ones(()))),
        (DataError, "`gradients` has 1 values", lambda: taylor_scores(ONES, BAD[None])),
        (ConfigError, r"`kind` \(=3\)", lambda: taylor_scores(ONES, ROWS, 3)),
        (ConfigError, r"`gradients` \(=None\)", lambda: theis_scores(ROWS, None)),
        (ConfigError, r"`axis` \(=5\)", lambda: theis_scores(ROWS, ROWS, 5)),
        (ConfigError, r"`axis` \(='a'\)", lambda: theis_scores(ROWS, ROWS, "a")),
        (ConfigError, r"`axis` \(=1\)", lambda: theis_scores(torch.ones(()), torch.ones(()))),
        (ConfigError, r"`sums` \(=Tensor \(3, 2\)\)", lambda: channel_scores(ROWS)),
        (ConfigError, r"`sums` \(=None\)", lambda: channel_scores([ROWS, None])),
        (ConfigError, r"`sums` \(=\[\(0, 2\)\]\)", lambda: channel_scores([ROWS[:0]])),
        (ConfigError, r"`cost` \(='a'\)", lambda: channel_scores([ROWS], "a")),
        (ConfigError, r"`cost` \(=inf\)", lambda: channel_scores([ROWS], float("inf"))),
        (ConfigError, r"`cost` \(=Tensor \(2,\)\)", lambda: channel_scores([ROWS], BAD)),
        (ConfigError, r"`cost` \(=Tensor \(3, 1\)\)", lambda: channel_scores([ROWS], torch.ones(3, 1))),
    ],
)
def test_scores_name_bad_arguments(error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        call()
    assert bool((ONES == 1).all()) and bool((ROWS == 1).all())


class Residual(nn.Module):
    """Channels of a and b are coupled by an addition, those of c and the depthwise d by position."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c, self.d = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, first: Tensor | None = None, second: Tensor | None = None) -> Tensor:
        one = torch.ones((), dtype=x.dtype)
        first = one if first is None else first[:, None, None]
        second = one if second is None else second[:, None, None]
        x = torch.relu(self.a(x))
        x = x + torch.relu(self.b(x * first))
        x = torch.relu(self.c(x * first))
        x = torch.relu(self.d(x * second))
        return self.head((x * second).mean((2, 3)))


def residual() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Residual().double(), torch.randn(5, 2, 6, 6, dtype=torch.float64), torch.randint(3, (5,))


def test_coupled_channels_are_the_fisher_of_a_gate_on_all_their_readers() -> None:
    model, x, y = residual()
    found = {each.group.channels: each for each in channel_importance(model, "cross_entropy", [(x, y)], (x,), None)}
    for channels, place in ((4, 0), (6, 1)):
        rows = []
        for n in range(5):
            gates = [torch.ones(c, dtype=torch.float64, requires_grad=True) for c in (4, 6)]
            F.cross_entropy(model(x[n : n + 1], *gates), y[n : n + 1]).backward()
            rows.append(gates[place].grad)
        expected = 0.5 * torch.stack(rows).square().mean(0)
        assert torch.allclose(found[channels].scores, expected, rtol=1e-10)
    model.zero_grad()
    assert found[4].gated == ("b.weight", "c.weight")


def test_costs_are_what_a_channel_saves() -> None:
    model, x, y = residual()
    memory = {e.group.channels: e for e in channel_importance(model, "cross_entropy", [(x, y)], (x,), "memory")}
    flops = {e.group.channels: e for e in channel_importance(model, "cross_entropy", [(x, y)], (x,), "flops", chunk=2)}
    plain = {e.group.channels: e for e in channel_importance(model, "cross_entropy", [(x, y)], (x,), None)}
    assert memory[4].cost == 2 * 36
    assert flops[6].cost == 36 * (4 * 9) + 36 * 9 + 3  # its filter, its depthwise kernel, its column of the head
    for each in (memory, flops):
        for channels in (4, 6):
            assert torch.allclose(each[channels].scores * each[channels].cost, plain[channels].scores)
    with pytest.raises(ConfigError):
        channel_importance(model, "cross_entropy", [(x, y)], (x,), "time")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_channels_have_no_scores_on_data_that_are_not_finite(value: float) -> None:
    model, x, y = residual()
    bad = x.clone()
    bad[2, 0, 0, 0] = value
    with pytest.raises(DataError, match="`.*weight` has gradients in `data` that are NaN or infinite"):
        channel_importance(model, "cross_entropy", [(x, y), (bad, y)], (x,), None)
    for scores in (channel_scores, lambda sums: theis_scores(sums[0], sums[0])):
        with pytest.raises(DataError, match="not finite"):
            scores([torch.tensor([[1.0, value]])])


def test_channel_scores_serve_as_a_saliency() -> None:
    model, x, y = residual()
    sparse = fxsparse.transform(model, (x,), include="c", pattern=fxsparse.Channel(0))
    found = channel_importance(sparse, "cross_entropy", [(x, y)], (x,))
    source = CurvatureSource(sparse, "cross_entropy", [(x, y)])
    scores = channel_element_scores(found, {"c.weight": sparse.get_parameter("c.weight").shape})
    group = next(each for each in found if each.group.channels == 6)
    assert torch.allclose(scores["c.weight"].flatten(1).sum(1), group.scores)
    fxsparse.prune(sparse, OneShot(0.5, saliency=GivenScores(source, scores), pattern=fxsparse.Channel(0)))
    kept = fxsparse.masks(sparse)["c.weight"].flatten(1).all(1)
    assert set(kept.nonzero()[:, 0].tolist()) == set(group.scores.topk(3).indices.tolist())


def sparse_mlp(sparsity: float = 0.0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x, y = torch.randn(24, 6, dtype=torch.float64), torch.randint(3, (24,))
    return fxsparse.transform(model, (x,), sparsity=sparsity), x, y


def test_saliencies_are_their_formulas() -> None:
    model, x, y = sparse_mlp(0.5)
    source = CurvatureSource(model, "cross_entropy", [(x, y)])
    weight = model.get_parameter("0.weight")
    mask = fxsparse.masks(model)["0.weight"]
    plain = fxsparse.finalize(model)
    op = CurvatureOperator(plain, ["0.weight"], "cross_entropy", (x, y))
    dense = op.diag().view(12, 6)
    assert torch.allclose(OBD(source).score(weight.detach()), 0.5 * dense * mask * weight.square(), rtol=1e-9)
    gradient = torch.randn(12, 6, dtype=torch.float64)
    gain = NewtonGain(source, 0.01).score(weight, gradient)
    assert torch.allclose(gain, gradient.square() / (2 * (dense + 0.01)), rtol=1e-9)  # dead weights have curvature too
    assert bool((FisherDiagonal(source).score(weight)[~mask] > 0).any())
    g = torch.cat(
        [rows["0.weight"] for rows in CurvatureOperator(model, None, "cross_entropy", (x, y)).sample_gradients()]
    )
    wood = WoodFisher(source, 0.1, 8).score(weight)
    assert torch.allclose(wood, woodfisher_scores(weight, g, 0.1, 8), rtol=1e-9)
    with pytest.raises(ConfigError, match="very"):
        OBD(source).score(weight.detach().clone())
    with pytest.raises(ConfigError, match="gradient"):
        NewtonGain(source).score(weight)
    with pytest.raises(ConfigError):
        NewtonGain(source, 0.0)


@pytest.mark.parametrize("kind", [OBD, WoodFisher, NewtonGain, FisherDiagonal, GivenScores])
@pytest.mark.parametrize("source", ["x", None, CurvatureSource])
def test_saliencies_need_a_source(kind: Any, source: Any) -> None:
    with pytest.raises(ConfigError, match=r"`source` \(=.*CurvatureSource"):
        kind(source, {}) if kind is GivenScores else kind(source)


@pytest.mark.parametrize(
    ("match", "call"),
    [
        (r"`block` \(=2.5\)", lambda s: WoodFisher(s, block=2.5)),
        (r"`block` \(=0\)", lambda s: WoodFisher(s, block=0)),
        (r"`fisher_batch` \(=True\)", lambda s: WoodFisher(s, fisher_batch=True)),
        *((r"`damping` \(=", lambda s, v=v: WoodFisher(s, v)) for v in ("a", 0, -1.0, float("nan"), float("inf"))),
        *((r"`damping` \(=", lambda s, v=v: NewtonGain(s, v)) for v in ("a", 0, float("nan"), float("inf"))),
        (r"`scores` \(=list\)", lambda s: GivenScores(s, [ONES])),
        ("`scores` has a float at 'w'", lambda s: GivenScores(s, {"w": 1.0})),
        (r"`label` \(=3\)", lambda s: GivenScores(s, {}, 3)),
        (r"`weight` \(=3\)", lambda s: s.diagonal(3)),
        (r"`weight` \(='0.weight'\)", lambda s: OBD(s).source.name_of("0.weight")),
        (r"`block` \(=2.5\)", lambda s: s.inverse_diagonal(s.model.get_parameter("0.weight"), 1.0, 2.5)),
        (r"`damping` \(=0\)", lambda s: s.inverse_diagonal(s.model.get_parameter("0.weight"), 0, 2)),
        (r"`method` \(='RigL'\)", lambda s: with_saliencies("RigL", OBD(s))),
        (r"`method` \(=<class", lambda s: with_saliencies(RigL, OBD(s))),
        (r"`method` \(=None\)", lambda s: with_saliencies(None, OBD(s))),
        (r"`drop` \(=<class", lambda s: with_saliencies(SET(), OBD)),
        (r"`grow` \(='x'\)", lambda s: with_saliencies(SET(), grow="x")),
        (r"`model` \(='x'\)", lambda s: CurvatureSource("x", "mse", [])),
        (r"`loss` \(=3\)", lambda s: CurvatureSource(s.model, 3, [])),
        (r"`data` \(=None\)", lambda s: CurvatureSource(s.model, "mse", None)),
        *(
            (rf"`{name}` \(=", lambda s, name=name, v=v: CurvatureSource(s.model, "mse", [], **{name: v}))
            for name, values in {
                "kind": (3, "x"),
                "method": ("x", 3),
                "samples": (0, 1.5, True, "a"),
                "chunk": (0, 2.5, "a"),
                "unit": ("x", None),
                "seed": (1.5, "a", None),
                "output": (3,),
            }.items()
            for v in values
        ),
    ],
)
def test_saliencies_and_sources_name_bad_arguments(match: str, call: Any) -> None:
    model, x, y = sparse_mlp()
    source = CurvatureSource(model, "cross_entropy", [(x, y)])
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(ConfigError, match=match):
        call(source)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert not source._kept


@pytest.mark.parametrize(
    ("match", "call"),
    [
        (r"`found` \(=None\)", lambda m, x, y, f: channel_element_scores(None, {})),
        (r"`found` \(='x'\)", lambda m, x, y, f: channel_element_scores(["x"], {})),
        (r"`shapes` \(=list", lambda m, x, y, f: channel_element_scores(f, [(6, 4, 3, 3)])),
        (r"`shapes` of `c.weight` \(=3\)", lambda m, x, y, f: channel_element_scores(f, {"c.weight": 3})),
        (r"`shapes` of `c.weight` \(=tuple", lambda m, x, y, f: channel_element_scores(f, {"c.weight": (6, 4.0)})),
        (r"`shapes` of `c.weight` \(=5 at", lambda m, x, y, f: channel_element_scores(f, {"c.weight": (5, 4, 3, 3)})),
        (r"`layouts` \(='x'\)", lambda m, x, y, f: channel_element_scores(f, {}, "x")),
        (r"`layouts` \(=1\)", lambda m, x, y, f: channel_element_scores(f, {}, {"c.weight": 1})),
        (r"`model` \(='x'\)", lambda m, x, y, f: channel_importance("x", "mse", [(x, y)], (x,))),
        (r"`loss` \(=3\)", lambda m, x, y, f: channel_importance(m, 3, [(x, y)], (x,))),
        (r"`data` \(=NoneType\)", lambda m, x, y, f: channel_importance(m, "cross_entropy", None, (x,))),
        (r"`example_inputs` \(=Tensor\)", lambda m, x, y, f: channel_importance(m, "mse", [(x, y)], x)),
        (r"`cost` \(=3\)", lambda m, x, y, f: channel_importance(m, "mse", [(x, y)], (x,), 3)),
        (r"`chunk` \(=0\)", lambda m, x, y, f: channel_importance(m, "cross_entropy", [(x, y)], (x,), chunk=0)),
    ],
)
def test_channel_importance_names_bad_arguments(match: str, call: Any) -> None:
    model, x, y = residual()
    found = channel_importance(model, "cross_entropy", [(x, y)], (x,), None)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(ConfigError, match=match):
        call(model, x, y, found)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_shapes_may_be_tuples() -> None:
    model, x, y = residual()
    found = channel_importance(model, "cross_entropy", [(x, y)], (x,), None)
    own = {name: each.shape for name, each in model.named_parameters()}
    plain = channel_element_scores(found, {name: tuple(each) for name, each in own.items()})
    for name, scores in channel_element_scores(found, own).items():
        assert torch.equal(scores, plain[name])


def test_curvature_is_kept_until_a_weight_or_mask_changes() -> None:
    model, x, y = sparse_mlp(0.5)
    reads = []

    class Counted:
        def __iter__(self):  # noqa: ANN204
            reads.append(1)
            yield x, y

    source = CurvatureSource(model, "cross_entropy", Counted())
    first = OBD(source).score(model.get_parameter("0.weight"))
    OBD(source).score(model.get_parameter("2.weight"))
    assert len(reads) == 1
    with torch.no_grad():
        model.get_parameter("2.weight").mul_(2.0)
    second = OBD(source).score(model.get_parameter("0.weight"))
    assert len(reads) == 2
    assert not torch.allclose(first, second)
    fxsparse.set_masks(model, {"2.weight": torch.ones(3, 12, dtype=torch.bool)})
    third = OBD(source).score(model.get_parameter("0.weight"))
    assert len(reads) == 3
    model.get_parameter("2.weight").data.mul_(3.0)  # changes no version
    fourth = OBD(source).score(model.get_parameter("0.weight"))
    assert len(reads) == 4
    assert not torch.allclose(third, fourth)
    fresh = CurvatureSource(model, "cross_entropy", [(x, y)])
    assert torch.equal(fourth, OBD(fresh).score(model.get_parameter("0.weight")))


@pytest.mark.parametrize("kind", [Static, OneShot, fxsparse.SNIP, fxsparse.GraSP, fxsparse.SynFlow])
@pytest.mark.parametrize("where", ["drop", "grow"])
def test_methods_that_update_no_masks_refuse_saliencies(kind: type, where: str) -> None:
    model, x, y = sparse_mlp()
    source = CurvatureSource(model, "cross_entropy", [(x, y)])
    with pytest.raises(ConfigError, match=rf"`method` \(={kind.__name__}\).*OneShot\(saliency=...\)"):
        with_saliencies(kind(0.5), **{where: OBD(source)})


@pytest.mark.parametrize("kind", [SET, RigL, ITOP, SNFS, SRigL, MEST, GMP, RESU], ids=lambda kind: kind.__name__)
def test_channel_scores_serve_every_updater_on_a_whole_network(kind: type) -> None:
    model, x, y = sparse_mlp()
    found = channel_importance(model, "cross_entropy", [(x, y)], (x,))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    scores = channel_element_scores(found, shapes)
    assert list(scores) == list(shapes)
    assert torch.allclose(scores["2.weight"].sum(0), found[0].scores)  # the last layer, by the channels that it reads
    assert torch.allclose(scores["0.weight"].sum(1), found[0].scores)
    highest = max(float(scores[name].max()) for name in ("0.weight", "0.bias", "2.weight"))
    assert bool((scores["2.bias"] == highest).all())  # in no group
    given = GivenScores(CurvatureSource(model, "cross_entropy", [(x, y)]), scores)
    options = {"sparsity": 0.5} if kind is RESU else {"sparsity": 0.5, "every": 4}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = fxsparse.attach(
            model, optimizer, with_saliencies(kind(**options), drop=given, grow=given), total_steps=32
        )
        for _ in range(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert handle.updates > 1


@pytest.mark.parametrize("kind", [SET, RigL, ITOP, SNFS, SRigL, MEST, GMP, RESU], ids=lambda kind: kind.__name__)
def test_every_updater_drops_and_grows_by_curvature(kind: type) -> None:
    model, x, y = sparse_mlp()
    source = CurvatureSource(model, "cross_entropy", [(x, y)])
    options = {"sparsity": 0.5} if kind is RESU else {"sparsity": 0.5, "every": 4}
    grow = NewtonGain(source)
    asked: list[str] = []

    class Spy(OBD):
        def score(self, *args: object, **options: object) -> Tensor:
            asked.append("drop")
            return super().score(*args, **options)

    method = with_saliencies(kind(**options), drop=Spy(source), grow=grow)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # RESU says that so short a training teaches theta little
        handle = fxsparse.attach(model, optimizer, method, total_steps=32)
        for _ in range(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert handle.updates > 1
    assert asked
    alive = sum(int(mask.sum()) for mask in fxsparse.masks(model).values())
    assert abs(alive - 54) <= 3
    assert isinstance(method, kind)


def test_chosen_saliencies_decide_what_is_dropped_and_grown() -> None:
    model, x, y = sparse_mlp()
    source = CurvatureSource(model, "cross_entropy", [(x, y)])
    handle = fxsparse.attach(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        with_saliencies(SET(0.5, every=1, alpha=0.3, regrow_dropped=False), OBD(source), FisherDiagonal(source)),
        total_steps=4,
    )
    before = {name: mask.clone() for name, mask in fxsparse.masks(model).items()}
    scores = {
        n: (OBD(source).score(p), FisherDiagonal(source).score(p)) for n, p in model.named_parameters() if n in before
    }
    while handle.updates < 1:
        handle.optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        handle.optimizer.step()
    for name, mask in fxsparse.masks(model).items():
        drop, grow = scores[name]
        dropped, grown = before[name] & ~mask, mask & ~before[name]
        if not bool(dropped.any()):
            continue
        assert float(drop[dropped].max()) <= float(drop[before[name] & mask].min())
        assert float(grow[grown].min()) >= float(grow[~before[name] & ~mask].max())
    assert any(not torch.equal(mask, before[name]) for name, mask in fxsparse.masks(model).items())


def test_chosen_methods_survive_copies_pickles_and_replacement() -> None:
    model, x, y = sparse_mlp()
    source = CurvatureSource(model, "cross_entropy", [(x, y)])
    method = with_saliencies(RigL(0.5), OBD(source))
    for other in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert type(other) is type(method)
        assert repr(other) == repr(method)
        assert isinstance(other.drop, OBD)
    again = with_saliencies(method, grow=NewtonGain(source))
    assert isinstance(again.drop, OBD)
    assert isinstance(again.grow, NewtonGain)
    assert type(again) is type(method)
    assert with_saliencies(GMP(0.5), OBD(source)).drop.source is source
    for bad in (
        lambda: with_saliencies(SET(0.5)),
        lambda: with_saliencies(SET(0.5), drop="obd"),
        lambda: with_saliencies(fxsparse.ACDC(0.5), OBD(source), NewtonGain(source)),
    ):
        with pytest.raises(ConfigError):
            bad()
    Static(0.5)  # untouched


def test_one_shot_pruning_by_obd_costs_less_than_by_magnitude() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 8, dtype=torch.float64) * torch.tensor(
        [1, 1, 1, 1, 1e-2, 1e-2, 1e-2, 1e-2], dtype=torch.float64
    )
    y = (x[:, 0] + x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    losses = {}
    for name in ("obd", "magnitude"):
        sparse = fxsparse.transform(model, (x,))
        source = CurvatureSource(sparse, "cross_entropy", [(x, y)])
        saliency = OBD(source) if name == "obd" else fxsparse.Magnitude()
        fxsparse.prune(sparse, OneShot(0.7, saliency=saliency, distribution=fxsparse.Global()))
        losses[name] = F.cross_entropy(sparse(x), y).item()
    assert losses["obd"] < losses["magnitude"]


def test_golden_network_gradients_are_of_single_samples() -> None:
    model, x, y = oracle.golden_mlp()
    found = list(CurvatureOperator(model, None, "cross_entropy", (x, y)).sample_gradients(3))
    g = torch.cat([torch.cat([rows[n].flatten(1) for n in rows], 1) for rows in found])
    assert g.shape == (4, 21)
    assert float(g.square().sum(1).mean()) == pytest.approx(2.5137386230376, abs=1e-12)
    assert float(g.mean(0).square().sum()) == pytest.approx(0.4572831993609, abs=1e-12)
