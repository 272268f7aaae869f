"""Damage, asymmetry, overlap, comparison, merging, scaling, EWC, uncertainty."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxsparse
from fxsparse.curvature.damage import damage_asymmetry, fisher_damage
from fxsparse.curvature.damage_compare import compare_task_fisher, mask_overlap, spearman
from fxsparse.curvature.ewc import EWC
from fxsparse.curvature.importance_masks import fisher_importance, fisher_pruning_masks, top_fisher_directions
from fxsparse.curvature.importance_uncertainty import fisher_uncertainty
from fxsparse.curvature.merge import fisher_weighted_merge, scale_by_fisher
from fxsparse.curvature.operator import CurvatureOperator
from fxsparse.errors import ConfigError, DataError
from tests.curvature import operator_oracle as oracle


def w(*values: float) -> dict[str, Tensor]:
    return {"w": torch.tensor(values, dtype=torch.float64)}


def test_golden_damage_is_not_quartic() -> None:
    found = fisher_damage(w(1, 4), w(2, 1))
    assert (found.value, found.normalised) == (8.0, 1.6)
    assert found.value != 1 * 2**4 * 0 + 4  # g^4 reduces squared gradients and squares again
    other = fisher_damage(w(2, 2), w(1, 1))
    assert other.normalised == 1.0
    both = damage_asymmetry(w(1, 4), w(2, 2), w(1, 1), w(2, 1))
    assert both.asymmetry == pytest.approx(0.230769, abs=1e-6)
    assert both.log_ratio == pytest.approx(0.470004, abs=1e-6)


def test_damage_scales_as_a_quadratic_form() -> None:
    fisher, direction = w(1, 4, 0.5), w(2, 1, -3)
    base = fisher_damage(fisher, direction)
    assert fisher_damage(w(10, 40, 5), direction).normalised == pytest.approx(base.normalised)
    assert fisher_damage(fisher, w(4, 2, -6)).value == pytest.approx(4 * base.value)
    assert fisher_damage(fisher, direction, "l1").value == pytest.approx(2 + 4 + 1.5)
    assert fisher_damage(fisher, direction, "sqrt").value == pytest.approx(2 + 2 + 3 * 0.5**0.5)
    assert fisher_damage(fisher, direction, step=0.1, gradient=w(1, 0, 1)).predicted == pytest.approx(
        -0.1 * (2 - 3) + 0.5 * 0.01 * base.value
    )
    with pytest.raises(ConfigError, match="step"):
        fisher_damage(fisher, direction, "l1", step=0.1)
    with pytest.raises(ConfigError, match="kind"):
        fisher_damage(fisher, direction, "quartic")


def test_grouped_damage_is_the_group_mean_times_the_groups_squares() -> None:
    expanded = {"w": torch.tensor([[2.0, 2, 2], [3, 3, 3]], dtype=torch.float64)}  # groups of sums 6 and 9
    d = {"w": torch.tensor([[1.0, 0, 2], [0, 1, 1]], dtype=torch.float64)}
    assert fisher_damage(expanded, d).value == 2 * 5 + 3 * 2
    with pytest.raises(ConfigError, match="expand"):
        fisher_damage({"w": torch.tensor([6.0, 9.0])}, d)


def test_degenerate_and_one_sided_damage() -> None:
    nothing = fisher_damage(w(0, 0), w(1, 1))
    assert nothing.degenerate
    assert nothing.normalised == 0.0
    assert damage_asymmetry(w(0, 0), w(0, 0), w(1, 1), w(1, 1)).log_ratio == 0.0
    one = damage_asymmetry(w(1, 1), w(0, 0), w(1, 1), w(1, 1))
    assert (one.asymmetry, one.log_ratio) == (1.0, math.inf)
    other = damage_asymmetry(w(0, 0), w(1, 1), w(1, 1), w(1, 1))
    assert (other.asymmetry, other.log_ratio) == (-1.0, -math.inf)


def test_a_missing_or_bad_fisher_is_an_error() -> None:
    for call in (
        lambda: fisher_damage({}, w(1, 1)),
        lambda: fisher_damage({"other_w": torch.ones(2)}, w(1, 1)),  # names are compared whole
        lambda: damage_asymmetry(w(1, 1), {}, w(1, 1), w(1, 1)),
        lambda: scale_by_fisher(w(1, 1), {"x.w": torch.ones(2)}),
        lambda: scale_by_fisher(w(1, 1), w(1, 1, 1)),
        lambda: fisher_uncertainty(w(1), w(1, 1), 1, 1.0),
        lambda: fisher_damage(w(1, 1), w(1, 1), step=1.0, gradient=w(1)),
    ):
        with pytest.raises(ConfigError):
            call()
    for bad in (w(-1, 1), w(math.nan, 1), w(math.inf, 1)):
        with pytest.raises(DataError, match="`w`"):
            fisher_damage(bad, w(1, 1))


def test_predicted_damage_is_the_loss_change_on_a_quadratic() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    x = torch.linalg.qr(x).Q * 50**0.5  # a diagonal Hessian
    model = nn.Linear(4, 1, bias=False).double()
    y = torch.randn(50, 1, generator=generator, dtype=torch.float64)
    op = CurvatureOperator(model, None, fxsparse_mse(), (x, y))
    fisher, gradient = op.space.split(op.diag()), op.space.split(op.gradient())
    d = {"weight": torch.randn(1, 4, generator=generator, dtype=torch.float64)}
    loss = lambda: float((model(x) - y).detach().square().sum() / 100)  # noqa: E731
    before = loss()
    with torch.no_grad():
        model.weight -= 0.3 * d["weight"]
    assert fisher_damage(fisher, d, step=0.3, gradient=gradient).predicted == pytest.approx(loss() - before, abs=1e-10)


def fxsparse_mse() -> object:
    from fxsparse.curvature.losses import MSE

    return MSE("half")


def test_overlap_is_jaccard_with_its_chance_level() -> None:
    a, b = torch.zeros(2, 10, dtype=torch.bool)
    a[1:4], b[2:5] = True, True
    found = mask_overlap(a, b)
    assert found.jaccard == 0.5
    assert found.dice == pytest.approx(2 / 3)
    assert found.coefficient == pytest.approx(2 / 3)
    same = torch.zeros(1000, dtype=torch.bool)
    same[:100] = True
    assert mask_overlap(same, same).jaccard == 1.0  # over numel it would be .1
    assert mask_overlap(same, same).chance == pytest.approx(0.052632, abs=1e-6)
    none = torch.zeros(5, dtype=torch.bool)
    assert mask_overlap(none, none).jaccard == 1.0
    assert mask_overlap({"x": a, "y": b}, {"y": b, "x": a}).jaccard == 1.0
    for bad in (
        lambda: mask_overlap(a, a[:3]),
        lambda: mask_overlap({"x": a}, {"y": a}),
        lambda: mask_overlap(a.float(), a),
    ):
        with pytest.raises(ConfigError):
            bad()


def test_task_comparison_pools_entries() -> None:
    a = {"big": torch.rand(90, generator=torch.Generator().manual_seed(0)), "small": torch.tensor([5.0])}
    same = compare_task_fisher(a, {name: 3 * each for name, each in a.items()})
    for value in (same.cosine, same.pearson, same.spearman, same.overlap.jaccard, same.bhattacharyya):
        assert value == pytest.approx(1.0)
    other = {"big": a["big"], "small": torch.tensor([0.0])}
    pooled = compare_task_fisher(a, other).cosine
    flat_a, flat_b = (torch.cat([t["big"], t["small"]]).double() for t in (a, other))
    assert pooled == pytest.approx(float(flat_a @ flat_b / flat_a.norm() / flat_b.norm()))
    assert pooled != pytest.approx(0.5)  # the mean of the tensors' own cosines, 1 and 0
    assert spearman(torch.tensor([1.0, 1, 2]), torch.tensor([3.0, 3, 9])) == pytest.approx(1.0)
    assert spearman(torch.tensor([1.0, 1, 2, 3]), torch.tensor([1.0, 2, 3, 3])) == pytest.approx(8 / 9)
    with pytest.raises(ConfigError):
        compare_task_fisher({"a": torch.ones(2)}, {"b": torch.ones(2)})
    assert compare_task_fisher(w(0, 0), w(1, 2)).bhattacharyya == 0.0


def test_merge_weighs_elements_by_fisher() -> None:
    assert fisher_weighted_merge([w(1), w(5)], [w(3), w(1)])["w"].item() == pytest.approx(2.0)
    merged = fisher_weighted_merge([w(1, 1), w(5, 5)], [w(3, 0), w(1, 0)])["w"]
    assert merged.tolist() == pytest.approx([2.0, 3.0])  # no Fisher: the plain mean, not one weight for the tensor
    assert fisher_weighted_merge([w(1), w(5)], [w(0), w(0)], [3, 1])["w"].item() == pytest.approx(2.0)
    assert fisher_weighted_merge([w(1), w(5)], [w(2), w(2)], [3, 1])["w"].item() == pytest.approx(2.0)
    masks = [{"w": torch.tensor([True, True, False])}, {"w": torch.tensor([True, False, False])}]
    both = fisher_weighted_merge([w(1, 2, 0), w(3, 0, 0)], [w(1, 1, 1)] * 2, masks=masks)["w"]
    assert both.tolist() == pytest.approx([2, 0, 0])
    union = fisher_weighted_merge([w(1, 2, 0), w(3, 0, 0)], [w(1, 1, 1)] * 2, masks=masks, rule="union")["w"]
    assert union.tolist() == pytest.approx([2, 2, 0])
    single = {"w": torch.tensor([1.5], dtype=torch.float32)}
    assert fisher_weighted_merge([single], [w(2)])["w"].dtype is torch.float32
    for bad in (
        lambda: fisher_weighted_merge([], []),
        lambda: fisher_weighted_merge([w(1)], []),
        lambda: fisher_weighted_merge([w(1)], [w(1)], [-1.0]),
        lambda: fisher_weighted_merge([w(1)], [w(1)], [0.0]),
        lambda: fisher_weighted_merge([w(1), {"v": torch.ones(1)}], [w(1), w(1)]),
        lambda: fisher_weighted_merge([w(1)], [w(1)], rule="both"),
        lambda: fisher_weighted_merge([w(1)], [{"fc.w": torch.ones(1)}]),
    ):
        with pytest.raises(ConfigError):
            bad()


def test_scaling_by_fisher() -> None:
    g, f = w(2, 2), w(3, 0)
    assert scale_by_fisher(g, f, 1.0, absolute=1.0)["w"].tolist() == pytest.approx([0.5, 2.0])
    assert scale_by_fisher(g, f, 0.5, absolute=1.0)["w"].tolist() == pytest.approx([1.0, 2.0])
    assert scale_by_fisher(g, f, 0.0)["w"].tolist() == [2.0, 2.0]
    assert scale_by_fisher(g, f, 1.0, relative=1.0)["w"].tolist() == pytest.approx([2 / 4.5, 2 / 1.5])
    with pytest.raises(DataError, match="damping"):
        scale_by_fisher(g, f, 1.0)
    with pytest.raises(ConfigError):
        scale_by_fisher(g, f, 1.0, absolute=-1.0)


@pytest.mark.parametrize(
    "options",
    [{"alpha": math.nan}, {"alpha": math.inf}, {"relative": math.nan}, {"absolute": math.nan}, {"absolute": math.inf}],
)
def test_scaling_by_what_is_no_number(options: dict[str, float]) -> None:
    one = {"w": torch.ones(2)}
    with pytest.raises(ConfigError, match=f"`{next(iter(options))}`"):
        scale_by_fisher(one, one, **options)


@pytest.mark.parametrize("weights", [[1.0, math.nan], [math.inf, 1.0]])
def test_merging_with_weights_that_are_no_numbers(weights: list[float]) -> None:
    one = {"w": torch.ones(2)}
    with pytest.raises(ConfigError, match="`weights`"):
        fisher_weighted_merge([one, one], [one, one], weights)


def test_ewc_golden_and_gradient() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    ewc = EWC(2.0)
    ewc.consolidate("a", {"weight": torch.tensor([[1.0, 3.0]], dtype=torch.float64)}, model)
    with torch.no_grad():
        model.weight += torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    penalty = ewc.penalty(model)
    assert penalty.item() == pytest.approx(3.25)
    (gradient,) = torch.autograd.grad(penalty, model.weight)
    assert gradient.flatten().tolist() == pytest.approx([1.0, -6.0])


def test_the_anchor_moves_at_consolidation_only() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    ewc = EWC(1.0)
    ones = {"weight": torch.ones(1, 2, dtype=torch.float64)}
    ewc.consolidate("a", ones, model)
    for _ in range(3):  # using or updating the model leaves theta* where it was
        with torch.no_grad():
            model.weight += 1.0
        ewc.penalty(model)
    assert ewc.penalty(model).item() == pytest.approx(0.5 * 2 * 9)
    ewc.consolidate("b", ones, model)
    assert ewc.penalty(model).item() == pytest.approx(9.0)
    ewc.clear("a")
    assert ewc.penalty(model).item() == 0.0
    assert ewc.tasks == ("b",)
    with pytest.raises(ConfigError):
        ewc.clear("a")


def test_online_ewc_keeps_one_anchor_and_a_decaying_fisher() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    ewc = EWC(2.0, online=True, decay=0.5)
    f = lambda value: {"weight": torch.tensor([[value]], dtype=torch.float64)}  # noqa: E731
    ewc.consolidate("a", f(4.0), model)
    with torch.no_grad():
        model.weight += 1.0
    ewc.consolidate("b", f(1.0), model)
    with torch.no_grad():
        model.weight += 1.0
    assert ewc.penalty(model).item() == pytest.approx(0.5 * 4 + 1)  # from the last anchor
    other = EWC(2.0, online=True, decay=0.5)
    other.load_state_dict(ewc.state_dict())
    assert torch.equal(other.penalty(model), ewc.penalty(model))


def test_ewc_holds_every_parameter_that_is_not_free() -> None:
    model = nn.Linear(2, 2).double()
    weight = {"weight": torch.ones(2, 2, dtype=torch.float64)}
    ewc = EWC(2.0)
    with pytest.raises(ConfigError, match="no entry for `bias` of the model.*`free`"):
        ewc.consolidate("a", weight, model)
    with pytest.raises(ConfigError, match="`free` names `beta`"):
        ewc.consolidate("a", weight, model, free=["beta"])
    assert ewc.tasks == ()
    ewc.consolidate("a", weight, model, free=["bias"])
    with torch.no_grad():
        model.weight += 1.0
        model.bias += 1.0
    assert ewc.penalty(model).item() == pytest.approx(4.0)
    model.bias.requires_grad_(False)  # what is frozen needs no hold
    ewc.consolidate("a", weight, model)
    tied = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)}).double()
    tied["b"].weight = tied["a"].weight
    ewc.consolidate("tied", {"b.weight": weight["weight"]}, tied)  # under any of its names


def test_ewc_on_the_support_and_bad_options() -> None:
    model = fxsparse.transform(
        nn.Linear(4, 2, bias=False).double(), (torch.randn(1, 4, dtype=torch.float64),), sparsity=0.5
    )
    ones = {"weight": torch.ones(2, 4, dtype=torch.float64)}
    whole, alive = EWC(2.0), EWC(2.0, alive_only=True)
    for each in (whole, alive):
        each.consolidate("a", ones, model)
    mask = fxsparse.masks(model)["weight"]
    with torch.no_grad():
        model.weight += 1.0
    assert whole.penalty(model).item() == pytest.approx(8.0)
    assert alive.penalty(model).item() == pytest.approx(float(mask.sum()))
    for bad in (lambda: EWC(-1.0), lambda: EWC(1.0, decay=2.0), lambda: whole.consolidate("", ones, model)):
        with pytest.raises(ConfigError):
            bad()
    with pytest.raises(ConfigError, match="nope"):
        whole.consolidate("b", {"nope": torch.ones(1)}, model)
    with pytest.raises(ConfigError):
        whole.load_state_dict({"version": 9})


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"version": 1},
        {"version": 1, "anchors": None},
        {"version": 1, "anchors": {"a": {}}},
        {"version": 1, "anchors": {"a": {"fisher": {"weight": torch.ones(2)}, "point": {}}}},
        {"version": 1, "anchors": {"a": {"fisher": {"weight": torch.ones(2)}, "point": {"weight": torch.ones(3)}}}},
        {"version": 1, "anchors": {"a": {"fisher": {"weight": 1.0}, "point": {"weight": torch.ones(2)}}}},
        {"version": 1, "anchors": {1: {"fisher": {}, "point": {}}}},
        {"version": 1, "anchors": {"a": {"fisher": {}, "point": {}, "more": {}}}},
    ],
)
def test_damaged_states_of_ewc(state: Any) -> None:
    model = nn.Linear(2, 1, bias=False)
    own = EWC(1.0)
    own.consolidate("own", {"weight": torch.ones(1, 2)}, model)
    with pytest.raises(ConfigError, match="`(state_dict|fisher|point)`"):
        own.load_state_dict(state)
    assert own.tasks == ("own",)
    held = own.state_dict()
    other = EWC(1.0)
    other.load_state_dict(held)
    held["anchors"]["own"]["fisher"]["weight"].zero_()
    with torch.no_grad():
        model.weight += 1.0
    assert other.penalty(model).item() == pytest.approx(1.0)


@pytest.mark.parametrize("shapes", [((2, 3), (3, 2)), ((6,), (2, 3))])
def test_masks_of_other_shapes_do_not_overlap(shapes: tuple[tuple[int, ...], ...]) -> None:
    one, other = ({"a": torch.ones(shape, dtype=torch.bool)} for shape in shapes)
    with pytest.raises(ConfigError, match="masks `a`"):
        mask_overlap(one, other)
    full = torch.ones(4, dtype=torch.bool)
    with pytest.raises(ConfigError, match="masks `a`"):
        mask_overlap({"a": full[:2], "b": full}, {"a": full[:3], "b": full[:3]})
    with pytest.raises(ConfigError, match="masks `b`.*missing"):
        mask_overlap({"a": full, "b": full[:0]}, {"a": full})


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        ({"x": torch.ones(2, dtype=torch.bool)}, "`x`, which is none"),
        ({"w": torch.ones(2)}, r"`w` \(=torch.float32, \(2,\)\) must be bool"),
        ({"w": torch.ones(1, dtype=torch.bool)}, r"`w` \(=torch.bool, \(1,\)\) must be bool \(2,\)"),
        ({"w": [True, False]}, r"`w` \(=list\)"),
    ],
)
def test_merging_by_masks_that_are_none(mask: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        fisher_weighted_merge([w(1, 2)], [w(1, 1)], masks=[mask])


def test_what_is_no_number_is_refused_by_name() -> None:
    nan = float("nan")
    for call in (
        lambda: fisher_damage(w(1, 1), w(nan, 1)),
        lambda: scale_by_fisher(w(nan, 1), w(1, 1)),
        lambda: fisher_weighted_merge([w(1, nan)], [w(1, 1)]),
        lambda: fisher_uncertainty(w(1, 1), w(nan, 1), 1, 1.0),
    ):
        with pytest.raises(DataError, match="`(direction|gradients|models|gradient)` has 1 values at `w`"):
            call()
    for call in (
        lambda: fisher_damage(w(1, 1), w(1, 1), step=nan),
        lambda: fisher_damage([torch.ones(2)], w(1, 1)),  # type: ignore[arg-type]
        lambda: fisher_damage(w(1, 1), {"w": np.ones(2)}),  # type: ignore[dict-item]
        lambda: fisher_uncertainty({**w(1, 1), "b": torch.ones(1)}, w(1, 1), 1, 1.0),
        lambda: top_fisher_directions(w(1, 1), "a"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError):
            call()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("strength", {"strength": value}) for value in ("a", math.nan, math.inf, -1.0, True, None)),
        *(("decay", {"decay": value}) for value in ("a", math.nan, 1.5, -0.5, True)),
        ("online", {"online": "x"}),
        ("alive_only", {"alive_only": 1}),
    ],
)
def test_options_of_ewc_by_name(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` \\(="):
        EWC(**options)


ONE = {"weight": torch.ones(1, 2)}


@pytest.mark.parametrize(
    ("match", "call"),
    [
        (r"`fisher` \(=NoneType\)", lambda e, m: e.consolidate("b", None, m)),
        ("`fisher` has a float", lambda e, m: e.consolidate("b", {"weight": 1.0}, m)),
        ("`fisher` of 'weight'.*real", lambda e, m: e.consolidate("b", {"weight": torch.ones(1, 2) + 0j}, m)),
        (r"`task` \(=5\)", lambda e, m: e.consolidate(5, ONE, m)),
        (r"`task` \(=''\)", lambda e, m: e.consolidate("", ONE, m)),
        (r"`model` \(='x'\)", lambda e, m: e.consolidate("b", ONE, "x")),
        (r"`free` \(='weight'\)", lambda e, m: e.consolidate("b", ONE, m, free="weight")),
        (r"`free` \(=3\)", lambda e, m: e.consolidate("b", ONE, m, free=3)),
        (r"`free` \(=list of 3\)", lambda e, m: e.consolidate("b", ONE, m, free=[3])),
        (r"`weight` \(=\(1, 3\)\)", lambda e, m: e.consolidate("b", {"weight": torch.ones(1, 3)}, wider())),
        (r"`model` \(='x'\)", lambda e, m: e.penalty("x")),
        (r"`weight` \(=\(1, 3\)\)", lambda e, m: e.penalty(wider())),
        ("`fisher` names `weight`", lambda e, m: e.penalty(nn.ReLU())),
        (r"`task` \(=\['a'\]\)", lambda e, m: e.clear(["a"])),
        (r"`state_dict` \(=version None\)", lambda e, m: e.load_state_dict(3)),
    ],
)
def test_arguments_of_ewc_by_name(match: str, call: Any) -> None:
    model = nn.Linear(2, 1, bias=False)
    ewc = EWC(1.0, online=True)
    ewc.consolidate("a", ONE, model)
    before = model.weight.detach().clone()
    with pytest.raises(ConfigError, match=match):
        call(ewc, model)
    assert ewc.tasks == ("a",) and torch.equal(ewc.state_dict()["anchors"]["a"]["point"]["weight"], before)
    assert torch.equal(ewc.state_dict()["anchors"]["a"]["fisher"]["weight"], ONE["weight"])
    assert torch.equal(model.weight, before)


def wider() -> nn.Module:
    return nn.Linear(3, 1, bias=False)


def test_a_penalty_of_nothing_is_zero() -> None:
    assert EWC().penalty(nn.ReLU()).item() == 0.0


F1 = {"w": torch.ones(2, dtype=torch.float64)}
NAN = {"w": torch.tensor([math.nan, 1.0])}


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ConfigError, r"`weights` \(='x'\)", lambda: fisher_weighted_merge([F1, F1], [F1, F1], ["x", 1])),
        (ConfigError, r"`weights` \(='ab'\)", lambda: fisher_weighted_merge([F1, F1], [F1, F1], "ab")),
        (ConfigError, r"`weights` \(=-1\)", lambda: fisher_weighted_merge([F1, F1], [F1, F1], [-1, 2])),
        (ConfigError, r"`weights` \(=True\)", lambda: fisher_weighted_merge([F1, F1], [F1, F1], [True, 2])),
        (ConfigError, "`models`.*must be a list", lambda: fisher_weighted_merge(F1, [F1])),
        (ConfigError, r"`models` \(=None\)", lambda: fisher_weighted_merge([None], [F1])),
        (ConfigError, "`models` has a int at 'w'", lambda: fisher_weighted_merge([{"w": 1}], [F1])),
        (ConfigError, r"`fishers` \(=None\)", lambda: fisher_weighted_merge([F1], None)),
        (ConfigError, r"`masks` \(=3\)", lambda: fisher_weighted_merge([F1], [F1], masks=3)),
        (ConfigError, r"`masks` \(=list", lambda: fisher_weighted_merge([F1], [F1], masks=[[True]])),
        (ConfigError, r"`rule` \(=3\)", lambda: fisher_weighted_merge([F1], [F1], rule=3)),
        (ConfigError, r"`alpha` \(='a'\)", lambda: scale_by_fisher(F1, F1, "a")),
        (ConfigError, r"`relative` \(='a'\)", lambda: scale_by_fisher(F1, F1, relative="a")),
        (ConfigError, r"`absolute` \(=True\)", lambda: scale_by_fisher(F1, F1, absolute=True)),
        (ConfigError, r"`gradients` \(=NoneType\)", lambda: scale_by_fisher(None, F1)),
        (ConfigError, r"`step` \(='a'\)", lambda: fisher_damage(F1, F1, step="a")),
        (ConfigError, r"`gradient` \(=list\)", lambda: fisher_damage(F1, F1, step=0.1, gradient=[1.0])),
        (DataError, "`gradient` has 1 values at `w`", lambda: fisher_damage(F1, F1, step=0.1, gradient=NAN)),
        (ConfigError, r"`kind` \(=3\)", lambda: damage_asymmetry(F1, F1, F1, F1, 3)),
        (ConfigError, r"`a` \(=3\)", lambda: mask_overlap(3, F1)),
        (ConfigError, r"`b` \(=", lambda: mask_overlap({"w": torch.ones(2, dtype=torch.bool)}, {"w": [True, True]})),
        (ConfigError, r"`a` \(=list\)", lambda: compare_task_fisher([F1], F1)),
        (ConfigError, "`b` has a int", lambda: compare_task_fisher(F1, {"w": 1})),
        (ConfigError, r"`share` \(='a'\)", lambda: compare_task_fisher(F1, F1, "a")),
        (ConfigError, r"`samples` \(='a'\)", lambda: fisher_uncertainty(F1, F1, "a", 1.0)),
        (ConfigError, r"`samples` \(=nan\)", lambda: fisher_uncertainty(F1, F1, math.nan, 1.0)),
        (ConfigError, r"`samples` \(=0\)", lambda: fisher_uncertainty(F1, F1, 0, 1.0)),
        (ConfigError, r"`prior` \(='a'\)", lambda: fisher_uncertainty(F1, F1, 1, "a")),
        (ConfigError, r"`prior` \(=inf\)", lambda: fisher_uncertainty(F1, F1, 1, math.inf)),
        (ConfigError, r"`prior` \(=0\)", lambda: fisher_uncertainty(F1, F1, 1, 0)),
        (ConfigError, r"`fisher` \(=NoneType\)", lambda: fisher_uncertainty(None, F1, 1, 1.0)),
        (ConfigError, r"`fisher` \(=list\)", lambda: fisher_pruning_masks([F1], 0.5)),
        (ConfigError, r"`fisher` \(=empty\)", lambda: fisher_pruning_masks({}, 0.5)),
        (ConfigError, r"`sparsity` \(='a'\)", lambda: fisher_pruning_masks(F1, "a")),
        (ConfigError, r"`axis` \(=0.5\)", lambda: fisher_pruning_masks(F1, 0.5, axis=0.5)),
        (ConfigError, r"`axis` \(=True\)", lambda: fisher_pruning_masks(F1, 0.5, axis=True)),
        (ConfigError, r"`axis` \(=2\)", lambda: fisher_pruning_masks(F1, 0.5, axis=2)),
        (ConfigError, r"`fisher` \(=int\)", lambda: fisher_importance(3)),
        (ConfigError, r"`k` \(=1.0\)", lambda: top_fisher_directions(F1, 1.0)),
    ],
)
def test_what_reads_fishers_names_bad_arguments(error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        call()
    assert torch.equal(F1["w"], torch.ones(2, dtype=torch.float64))


def test_uncertainty_counts_every_parameter() -> None:
    found = fisher_uncertainty(w(1, 3), w(1, 2), 1, 1.0)
    assert found.variance == pytest.approx(1.5)
    assert found.deviation == pytest.approx(1.5**0.5)
    two = fisher_uncertainty({**w(1, 3), "m": torch.ones(2, 2)}, {**w(1, 2), "m": torch.ones(2, 2)}, 1, 1.0)
    assert two.per_parameter == pytest.approx({"w": 1.5, "m": 2.0})  # weights count, not biases only
    for bad in (lambda: fisher_uncertainty(w(1), w(1), 0, 1.0), lambda: fisher_uncertainty(w(1), w(1), 1, 0.0)):
        with pytest.raises(ConfigError):
            bad()


def test_masks_have_exact_counts_also_on_constants() -> None:
    constant = {"a": torch.ones(10), "b": torch.ones(10)}
    masks = fisher_pruning_masks(constant, 0.5)
    assert [int(m.sum()) for m in masks.values()] == [10, 0]  # of equals the last go first; none vanish wholly by ">"
    per_tensor = fisher_pruning_masks(constant, 0.5, "tensor")
    assert [int(m.sum()) for m in per_tensor.values()] == [5, 5]
    hundred = {"a": torch.arange(100.0)}
    assert int((~fisher_pruning_masks(hundred, 0.29)["a"]).sum()) == 29  # int(.29 * 100) is 28
    outlier = {"a": torch.cat([torch.rand(999, generator=torch.Generator().manual_seed(0)), torch.tensor([1e6])])}
    assert int(fisher_pruning_masks(outlier, 0.5)["a"].sum()) == 500
    assert int(fisher_pruning_masks(outlier, 0.0)["a"].sum()) == 1000
    assert int(fisher_pruning_masks(outlier, 1.0)["a"].sum()) == 0
    rows = fisher_pruning_masks({"a": torch.arange(12.0).view(4, 3)}, 0.5, axis=0)["a"]
    assert rows.shape == (4, 3)
    assert rows.tolist() == [[False] * 3] * 2 + [[True] * 3] * 2
    for bad in (
        lambda: fisher_pruning_masks(hundred, 1.5),
        lambda: fisher_pruning_masks(hundred, 0.5, "layer"),
        lambda: fisher_pruning_masks(hundred, 0.5, axis=3),
    ):
        with pytest.raises(ConfigError):
            bad()
    with pytest.raises(DataError):
        fisher_pruning_masks({"a": torch.tensor([math.nan])}, 0.5)


def test_shares_and_top_directions() -> None:
    assert fisher_importance(w(3, 1))["w"].tolist() == [0.75, 0.25]
    assert fisher_importance(w(0, 0))["w"].tolist() == [0.0, 0.0]
    found = top_fisher_directions({"a": torch.tensor([[5.0, 1.0]]), "b": torch.tensor([4.0])}, 2)
    assert found.entries == (("a", 0), ("b", 0))
    assert found.values.tolist() == [5.0, 4.0]
    assert found.share == pytest.approx(0.9)
    for k in (0, 4):
        with pytest.raises(ConfigError):
            top_fisher_directions({"a": torch.ones(3)}, k)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**16), st.floats(0, 1))
def test_masks_prune_the_smallest(n: int, seed: int, sparsity: float) -> None:
    values = torch.randint(0, 6, (n,), generator=torch.Generator().manual_seed(seed)).double()
    mask = fisher_pruning_masks({"w": values}, sparsity)["w"]
    dead = math.floor(sparsity * n + 1e-6)
    order = sorted(range(n), key=lambda i: (float(values[i]), -i))
    assert sorted((~mask).nonzero()[:, 0].tolist()) == sorted(order[:dead])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16))
def test_damage_of_random_fishers(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    fisher, d = (torch.rand(7, generator=g, dtype=torch.float64) for _ in range(2))
    found = fisher_damage({"w": fisher}, {"w": d})
    assert found.value == pytest.approx(float(d @ torch.diag(fisher) @ d))
    a = damage_asymmetry({"w": fisher}, {"w": d}, {"w": fisher}, {"w": d})
    b = damage_asymmetry({"w": d}, {"w": fisher}, {"w": d}, {"w": fisher})
    assert a.asymmetry == pytest.approx(-b.asymmetry)
    assert -1 <= a.asymmetry <= 1


def test_the_golden_network_as_a_whole() -> None:
    """The diagonal of an operator serves every function here."""
    model, x, y = oracle.golden_mlp()
    op = CurvatureOperator(model, None, "cross_entropy", (x, y))
    fisher, gradient = op.space.split(op.diag()), op.space.split(op.gradient())
    assert fisher_damage(fisher, gradient).value == pytest.approx(float(op.diag() @ op.gradient().square()))
    assert sum(float(m.sum()) for m in fisher_pruning_masks(fisher, 0.5).values()) == 11
    scaled = scale_by_fisher(gradient, fisher, 0.5, relative=0.1)
    assert scaled.keys() == gradient.keys()
