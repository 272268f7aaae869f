"""What attach sets up, and what it refuses."""

from __future__ import annotations

import gc
import inspect
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxsparse.errors import ConfigError
from fxsparse.nn import (
    Conv2d,
    ConvTranspose2d,
    Linear,
    MaskSpec,
    install_mask,
    mask_spec,
    masked_weights,
    masks,
    set_masks,
)
from fxsparse.nn.functional import collecting
from fxsparse.sparsity import (
    ERK,
    Block,
    Channel,
    ConstantFanIn,
    Custom,
    DropKind,
    Global,
    LinearSparsity,
    Magnitude,
    NByM,
    SharedSupport,
    Target,
    Taylor,
    Uniform,
    Unstructured,
    keep_count,
)
from fxsparse.training import ACDC, GMP, METHODS, PRUNINGS, RESU, SET, Initial, Method, RigL, SRigL, Static, attach

PATTERNS = (
    Unstructured(),
    NByM(2, 4),
    Block(2, 2),
    Channel(0),
    Channel(1),
    ConstantFanIn(),
    SharedSupport(3),
    SharedSupport(64),
)


def build(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            Conv2d(4, 8, 3, padding=1),
            nn.ReLU(),
            ConvTranspose2d(8, 4, 2),
            nn.Flatten(),
            Linear(100, 12),
            nn.Linear(12, 3),
        )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(8, 4, 4, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(PATTERNS), st.sampled_from([Static, SET, RigL]), st.sampled_from([0.3, 0.5, 0.9]), st.integers(0, 9)
)
def test_every_pattern_holds_for_every_dynamic_method(pattern, kind, sparsity, seed):
    sparsity = 0.5 if isinstance(pattern, NByM) else sparsity
    kwargs = {} if kind is Static else {"every": 2, "alpha": 0.5}
    model = build()
    optimizer = sgd(model)
    method = kind(sparsity=sparsity, pattern=pattern, distribution=Uniform(), seed=seed, **kwargs)
    handle = attach(model, optimizer, method, 40)
    units = {name: w.spec.pattern.units(w.weight.shape, w.spec.layout) for name, w in masked_weights(model).items()}
    counts = {name: units[name].collect(mask).sum(1) for name, mask in masks(model).items()}
    for name, masked in masked_weights(model).items():
        assert masked.spec.pattern == pattern
        target = pattern.target(masked.weight.shape, masked.spec.layout, Target.of(masked.weight.numel(), sparsity))
        assert torch.equal(counts[name], units[name].counts(target))
    train(model, optimizer, 5)
    for name, masked in masked_weights(model).items():
        pattern.check(masked.mask, masked.spec.layout)
        assert torch.equal(units[name].collect(masked.mask).sum(1), counts[name])
        assert bool((masked.weight.detach()[~masked.mask] == 0).all())
    assert handle.updates == (0 if kind is Static else 2)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_dynamic_masks_do_move(pattern):
    model = build()
    optimizer = sgd(model)
    method = RigL(sparsity=0.5, pattern=pattern, distribution=Uniform(), every=1, alpha=0.5)
    handle = attach(model, optimizer, method, 40)
    train(model, optimizer, 4)
    assert sum(row.grown for row in handle.report()) > 0


@pytest.mark.parametrize(
    "pattern", [p for p in PATTERNS if not isinstance(p, NByM)] + [NByM(2, 4, exact=False)], ids=str
)
@pytest.mark.parametrize("distribution", [Uniform(), ERK(), Global()], ids=str)
def test_gmp_is_nested_and_exact(pattern, distribution):
    model = build()
    optimizer = sgd(model)
    method = GMP(sparsity=0.8, pattern=pattern, distribution=distribution, every=2, start=1, end=8)
    handle = attach(model, optimizer, method)
    assert all(bool(mask.all()) for mask in masks(model).values())
    previous = {name: mask.clone() for name, mask in masks(model).items()}
    for step in range(1, 11):
        train(model, optimizer, 1)
        for name, masked in masked_weights(model).items():
            assert bool((masked.mask <= previous[name]).all())
            previous[name] = masked.mask.clone()
            if not bool(masked.mask.all()):
                pattern.check(masked.mask, masked.spec.layout)
        assert handle.updates == {1: 1, 2: 1, 3: 2, 4: 2, 5: 3, 6: 3, 7: 4}.get(step, 5)
    weights = masked_weights(model)
    numel = sum(w.weight.numel() for w in weights.values())
    alive = sum(int(w.mask.sum()) for w in weights.values())
    if isinstance(pattern, Unstructured):
        expected = sum(keep_count(w.weight.numel(), 0.8) for w in weights.values())
        assert alive == (keep_count(numel, 0.8) if isinstance(distribution, Global) else expected)
    elif isinstance(distribution, Uniform) and not isinstance(pattern, (NByM, Block)):
        for w in weights.values():
            units = pattern.units(w.weight.shape, w.spec.layout)
            assert torch.equal(units.collect(w.mask).sum(1), units.counts(0.8))
    assert all(row.grown == 0 for row in handle.report())


def test_gmp_drops_the_smallest_alive_and_follows_its_schedule():
    model = nn.Sequential(Linear(1000, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = attach(model, optimizer, GMP(sparsity=0.9, every=1000, start=1000, end=5000))
    alive, magnitude = {}, model[0].weight.detach().abs().flatten()
    for step in range(1, 5501):
        if step % 500:  # only the count of steps matters between updates
            handle.step += 1
            continue
        model[0].weight.sum().backward()
        optimizer.step()
        alive[step] = int(model[0].weight_mask.sum())
    assert alive[500] == alive[1000] == 1000
    assert [alive[step] for step in (2000, 3000, 4000, 5000, 5500)] == [480, 213, 115, 100, 100]
    kept = model[0].weight_mask.flatten()
    assert float(magnitude[kept].min()) >= float(magnitude[~kept].max())


def test_gmp_refuses_what_its_definition_excludes():
    model = build()
    with pytest.raises(ConfigError, match="`0.weight` with GMP: GMP passes through other sparsities.*1 - n/m"):
        attach(model, sgd(model), GMP(sparsity=0.5, pattern=NByM(2, 4)), 1000)
    one_shot = attach(model, sgd(model), GMP(sparsity=0.5, pattern=NByM(2, 4), start=3, end=3))
    assert [one_shot.method.update_due(step) for step in range(6)] == [False, False, False, True, False, False]
    one_shot.detach()
    with pytest.raises(ConfigError, match="`total_steps`"):
        attach(model, sgd(model), GMP())
    with pytest.raises(ConfigError, match="`sparsity` \\(=0.9\\) must be the schedule's final"):
        GMP(schedule=LinearSparsity(0.0, 0.5, 0, 10))
    with pytest.raises(ConfigError, match="`initial_sparsity`"):
        GMP(sparsity=0.5, initial_sparsity=0.6)


def test_gmp_takes_other_schedules_and_saliencies_and_sparse_starts():
    model = build()
    optimizer = sgd(model)
    method = GMP(sparsity=0.6, initial_sparsity=0.2, schedule=LinearSparsity(0.2, 0.6, 0, 4), every=1, drop=Taylor())
    with pytest.raises(ConfigError, match="gradient"):  # a start at .2 needs scores before there is a gradient
        attach(model, optimizer, method)
    set_masks(model, {name: torch.rand(mask.shape) < 0.9 for name, mask in masks(model).items()})
    before = {name: mask.clone() for name, mask in masks(model).items()}
    attach(model, optimizer, method)
    train(model, optimizer, 4)
    for name, mask in masks(model).items():
        assert int(mask.sum()) == keep_count(mask.numel(), 0.6) and bool((mask <= before[name]).all())


def test_gmp_goes_on_from_masks_that_are_ahead_of_its_schedule():
    model = sparse(0.7)
    optimizer = sgd(model)
    before = {name: mask.clone() for name, mask in masks(model).items()}
    attach(model, optimizer, GMP(sparsity=0.9, every=1, end=4))
    train(model, optimizer, 1)  # the schedule says 0.52
    assert all(torch.equal(mask, before[name]) for name, mask in masks(model).items())
    train(model, optimizer, 4)
    for name, mask in masks(model).items():
        assert bool((mask <= before[name]).all()) and int(mask.sum()) <= keep_count(mask.numel(), 0.9)


@pytest.mark.parametrize("kind", METHODS)
def test_defaults_are_frozen_and_positional(kind):
    method = kind(0.5)
    assert method.sparsity == 0.5 and method.seed == 0
    assert method.pattern == (ConstantFanIn() if kind is SRigL else None)
    assert isinstance(method.distribution, {GMP: Uniform, ACDC: Global}.get(kind, ERK))
    with pytest.raises(AttributeError):
        method.sparsity = 0.9
    assert hash(method) == hash(kind(0.5)) and method == kind(0.5)
    for sparsity in (-0.1, 1.0, 2, "0.9", float("nan")):
        with pytest.raises(ConfigError, match="`sparsity`"):
            kind(sparsity=sparsity)


def test_defaults_of_the_papers():
    rigl = RigL().timed(1000)
    assert rigl.end == 750 and rigl.replaces_step and rigl.needs_gradient
    assert [step for step in range(1001) if rigl.update_due(step)] == [100, 200, 300, 400, 500, 600, 700]
    assert [step for step in range(1001) if RigL(end=700).update_due(step)] == [100, 200, 300, 400, 500, 600]
    golden = {100: 0.292658, 250: 0.256066, 500: 0.15, 750: 0.043934, 900: 0.007342, 1000: 0.0}
    for step, fraction in golden.items():
        assert RigL(end=1000).drop_fraction(step) == pytest.approx(fraction, abs=1e-6)
    assert SET().timed(None).drop_fraction(10**9) == 0.3 and not SET().replaces_step and not SET().needs_gradient
    for bad in ({"alpha": 1.1}, {"every": 0}, {"start": 5, "end": 4}):
        with pytest.raises(ConfigError):
            SET(**bad)
    with pytest.raises(ConfigError, match="`total_steps`"):
        RigL().timed(None)
    with pytest.raises(ConfigError, match="`decay`"):
        SET(decay=DropKind.COSINE).timed(None)


def test_initial_masks_are_keyed_by_the_seed_alone():
    found = []
    for seed, weights in ((1, 0), (1, 5), (2, 0)):
        model = build(weights)
        attach(model, sgd(model), SET(seed=seed))
        found.append(masks(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_initial_masks_from_a_saliency():
    model = build()
    largest = {name: w.weight.detach().abs() for name, w in masked_weights(model).items()}
    attach(model, sgd(model), Static(sparsity=0.75, initial=Magnitude(), distribution=Uniform()))
    for name, mask in masks(model).items():
        assert int(mask.sum()) == keep_count(mask.numel(), 0.75)
        assert float(largest[name][mask].min()) >= float(largest[name][~mask].max())


def sparse(sparsity: float) -> nn.Module:
    model = build()
    attach(model, sgd(model), Static(sparsity=sparsity)).detach()
    return model


@pytest.mark.parametrize("kind", [Static, SET, RigL])
def test_sparse_models_keep_masks_of_the_right_sparsity(kind):
    model = sparse(0.8)
    before = {name: mask.clone() for name, mask in masks(model).items()}
    attach(model, sgd(model), kind(sparsity=0.8, seed=5), 100).detach()
    assert all(torch.equal(mask, before[name]) for name, mask in masks(model).items())
    with pytest.raises(ConfigError, match="`sparsity` \\(=0.5\\) is not that of the model's masks"):
        attach(model, sgd(model), kind(sparsity=0.5), 100)
    attach(model, sgd(model), kind(sparsity=0.5, initial=Initial.KEEP), 100).detach()
    assert all(torch.equal(mask, before[name]) for name, mask in masks(model).items())
    attach(model, sgd(model), kind(sparsity=0.5, initial=Magnitude()), 100)
    assert sum(int(mask.sum()) for mask in masks(model).values()) > 2 * sum(int(mask.sum()) for mask in before.values())


def test_kept_masks_must_hold_the_pattern():
    model = sparse(0.5)
    with pytest.raises(ConfigError, match="`0.weight`: `mask` breaks NByM.*`initial`"):
        attach(model, sgd(model), Static(sparsity=0.5, pattern=NByM(2, 4)))
    assert masked_weights(model)["0.weight"].spec.pattern == Unstructured()


def test_row_order_is_honoured():
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    install_mask(model[0], "weight", MaskSpec(SharedSupport(2)), row_order=order)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer, RigL(sparsity=0.5, every=1, end=9, alpha=0.5))
    for _ in range(3):
        mask = model[0].weight_mask[order].reshape(3, 2, 8)
        assert bool((mask[:, 0] == mask[:, 1]).all()) and mask[:, 0].sum(1).tolist() == [4, 4, 4]
        model[0](torch.randn(4, 8)).square().sum().backward()
        optimizer.step()


REFUSALS = [
    (lambda m: (nn.Linear(2, 2), Static(), {}), "`model` \\(=Linear\\) has no masks; call fxsparse.transform"),
    (lambda m: (m, "rigl", {}), "`method` \\(='rigl'\\) must be a fxsparse method"),
    (lambda m: (m, Static, {}), "`method`"),
    (lambda m: (m, RigL(), {"total_steps": 0}), "`total_steps` \\(=0\\)"),
    (lambda m: (m, RigL(), {}), "`total_steps` \\(=None\\) must be given"),
    (lambda m: (m, Static(pattern=NByM(2, 5)), {}), "`0.weight` with Static: .*must be divisible by `m` \\(=5\\)"),
    (lambda m: (m, SET(pattern=NByM(2, 4, exact=False)), {}), "`0.weight` with SET: .*exact=True"),
    (lambda m: (m, SET(pattern=Channel(0), sign_split=True), {}), "`sign_split`"),
    (lambda m: (m, Static(distribution=Custom({"nowhere": 0.5})), {}), "`nowhere` matches no weight"),
    (lambda m: (m, Static(sparsity=0.999, pattern=ConstantFanIn()), {}), "`0.weight`"),
]


@pytest.mark.parametrize(("make", "message"), REFUSALS)
def test_refusals_change_nothing(make, message):
    own = build()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    model, method, kwargs = make(own)
    with pytest.raises(ConfigError, match=message):
        attach(model, sgd(model), method, **kwargs)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    assert mask_spec(own[0], "weight").pattern == Unstructured()


def test_an_optimizer_without_a_masked_weight_names_it():
    model = build()
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if name != "4.weight"], lr=0.1)
    with pytest.raises(ConfigError, match="`optimizer` \\(=SGD\\) does not hold `4.weight`.*inplace=True"):
        attach(model, optimizer, Static())


def test_a_method_is_a_small_file():
    lines = {kind: len(inspect.getsource(inspect.getmodule(kind)).splitlines()) for kind in (*METHODS, *PRUNINGS)}
    del lines[RESU]  # phases, theta and tournament of its own
    assert all(count < 60 for count in lines.values()), lines


@dataclass(frozen=True)
class Youngest(Method):
    """A user's method: one hook for the time, one for the growth."""

    every: int = 2

    def update_due(self, step: int) -> bool:
        return step % self.every == 0

    def drop_fraction(self, step: int) -> float:
        return 0.25

    def grow_scores(self, state):
        return -state.scores(Magnitude())


def test_a_method_of_ten_lines_trains():
    model = build()
    optimizer = sgd(model)
    handle = attach(model, optimizer, Youngest(sparsity=0.5))
    train(model, optimizer, 4)
    assert handle.updates == 2 and sum(row.grown for row in handle.report()) > 0
    assert sum(int(m.sum()) for m in masks(model).values()) == sum(
        keep_count(m.numel(), 0.5) for m in masks(model).values()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4"}, r"`pattern` \(='2:4'\) must be a Pattern"),
        ({"distribution": "erk"}, r"`distribution` \(='erk'\) must be a Distribution"),
        ({"seed": "a"}, r"`seed` \(='a'\) must be an integer"),
    ],
)
def test_options_of_the_wrong_kind_are_refused_when_the_method_is_written(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        SET(sparsity=0.5, **options)


def test_a_training_that_is_dropped_in_an_open_window_leaves_nothing_active():
    model = build()
    optimizer = sgd(model)
    handle = attach(model, optimizer, RigL(sparsity=0.5, every=1), total_steps=10)
    assert len(collecting()) > 0  # the next step is an update step
    del model, optimizer, handle
    gc.collect()
    assert collecting() == ()
