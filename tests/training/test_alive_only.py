"""Training that stores alive entries alone against the same training in dense storage, in float64."""

import copy
import gc
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fxsparse
from fxsparse.errors import ConfigError, FxSparseError
from fxsparse.nn.shared import FastMode
from fxsparse.nn.shared_accelerate import accelerate, decelerate, fast_report
from fxsparse.sparsity import SharedSupport
from fxsparse.training import Diversity, Initial, Regroup, alive_only
from fxsparse.training.alive_only import ELEMENTWISE, restore_dense, store_alive
from tests.strategies import OPTIMIZERS

CLOSE = dict(rtol=1e-9, atol=1e-10)
SGD = partial(torch.optim.SGD, lr=0.05)
MOMENTUM = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
ADAMW = partial(torch.optim.AdamW, lr=0.01)
STEPS = 50


def network(seed: int = 0) -> nn.Module:
    """A convolution, a pointwise one and two linear layers with groups that do not divide the rows."""
    torch.manual_seed(seed)
    layers = (nn.Conv2d(4, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 18, 1), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(18 * 9, 22), nn.ReLU(), nn.Linear(22, 3)).double()


class Run:
    """A training of the network."""

    def __init__(self, optimizer, method, storage: str) -> None:
        self.model = fxsparse.transform(
            network(), (torch.randn(2, 4, 3, 3).double(),), pattern=SharedSupport(8), exclude=["7"]
        )
        self.optimizer = optimizer(self.model.parameters())
        self.handle = fxsparse.attach(self.model, self.optimizer, method, total_steps=STEPS)
        if storage != "plain":
            accelerate(self.model, mode=FastMode.SPARSE)
        if storage == "alive":
            store_alive(self.handle)

    def go(self, first: int = 0, last: int = STEPS) -> "Run":
        for step in range(first, last):
            source = torch.Generator().manual_seed(step)
            x = torch.randn(6, 4, 3, 3, generator=source, dtype=torch.float64)
            self.optimizer.zero_grad()
            self.model(x).square().mean().backward()
            self.optimizer.step()
        return self

    def dense(self) -> "Run":
        restore_dense(self.handle)
        return self


def agree(one: Run, other: Run) -> None:
    """Equal masks and reports; weights, gradients and optimizer state within tolerance."""
    for name, mask in fxsparse.masks(one.model).items():
        assert torch.equal(mask, fxsparse.masks(other.model)[name]), name
    assert str(one.handle.report()) == str(other.handle.report())
    for (name, a), b in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(a.grad, b.grad, **CLOSE)
        first, second = one.optimizer.state[a], other.optimizer.state[b]
        assert first.keys() == second.keys()
        for key, value in first.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, second[key], **CLOSE)


METHODS = (
    fxsparse.Static(sparsity=0.7),
    fxsparse.RigL(sparsity=0.7, every=7),
    fxsparse.SET(sparsity=0.7, every=7, end=40),
    fxsparse.RigL(sparsity=0.7, every=7, regroup=Regroup()),
    fxsparse.MEST(sparsity=0.7),
    fxsparse.SNFS(sparsity=0.7, every=7, redistribute=False),
    fxsparse.RigL(sparsity=0.7, every=7, diversity=Diversity()),
)


@pytest.mark.parametrize("method", METHODS[:3], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("make", [SGD, MOMENTUM, ADAMW], ids=["SGD", "momentum", "AdamW"])
def test_both_storages_equal_the_plain_training(make, method) -> None:
    plain, fast, alive = (Run(make, method, storage).go() for storage in ("plain", "sparse", "alive"))
    agree(plain, fast)
    stored = [p.numel() for p in alive.model.parameters() if p.ndim > 1]
    agree(plain, alive.dense())
    assert sum(stored) < 0.45 * sum(p.numel() for p in alive.model.parameters() if p.ndim > 1)


@pytest.mark.parametrize("method", METHODS[3:], ids=lambda m: f"{type(m).__name__}-{m.regroup or m.diversity}")
def test_methods_that_move_groups_and_budgets(method) -> None:
    agree(Run(MOMENTUM, method, "plain").go(), Run(MOMENTUM, method, "alive").go().dense())


@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: f"{make.func.__name__}")
def test_every_elementwise_optimizer(make) -> None:
    method = fxsparse.RigL(sparsity=0.7, every=3)
    plain, alive = Run(make, method, "plain").go(0, 10), Run(make, method, "alive").go(0, 10)
    agree(plain, alive.dense())
    assert type(plain.optimizer) in ELEMENTWISE


def test_gradual_pruning_changes_the_shapes() -> None:
    method = fxsparse.GMP(sparsity=0.7, every=7)
    plain, alive = Run(MOMENTUM, method, "plain").go(0, 8), Run(MOMENTUM, method, "sparse").go(0, 8)
    store_alive(alive.handle)
    before = [p.shape for p in alive.model.parameters()]
    plain.go(8)
    alive.go(8)
    assert before != [p.shape for p in alive.model.parameters()]
    agree(plain, alive.dense())


def test_no_dense_tensor_lives_between_steps() -> None:
    run = Run(ADAMW, fxsparse.RigL(sparsity=0.7, every=7), "alive").go(0, 20)
    largest = 22 * 18 * 9
    held = [*run.model.parameters(), *run.model.buffers()]
    held += [p.grad for p in run.model.parameters()]
    held += [v for state in run.optimizer.state.values() for v in state.values()]
    assert max(each.numel() for each in held) < 0.5 * largest


@pytest.mark.parametrize(("make", "copies"), [(SGD, 2), (MOMENTUM, 3), (ADAMW, 4)], ids=["SGD", "momentum", "AdamW"])
def test_memory_at_ninety_percent(make, copies: int) -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    dense_bytes = copies * 4 * 2 * 512 * 512
    sparse = fxsparse.transform(model, (torch.randn(2, 512),), pattern=SharedSupport(64))
    optimizer = make(sparse.parameters())
    handle = fxsparse.attach(sparse, optimizer, fxsparse.RigL(sparsity=0.9, distribution=fxsparse.Uniform()), 1000)
    report = store_alive(handle)
    assert all(row.reason is None and row.stored <= 0.102 * row.elements for row in report.rows)
    assert "0.102" in str(report)
    sparse(torch.randn(8, 512)).sum().backward()
    optimizer.step()
    held = [*sparse.parameters(), *sparse.buffers(), *(p.grad for p in sparse.parameters())]
    held += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    held += [bits for bits, _ in handle._coverage._ever.values()]
    assert sum(each.numel() * each.element_size() for each in held) <= 0.2 * dense_bytes


def test_masks_set_by_hand_carry_values_and_state() -> None:
    plain, alive = (Run(ADAMW, fxsparse.Static(sparsity=0.7), storage).go(0, 5) for storage in ("plain", "alive"))
    name = next(iter(fxsparse.masks(plain.model)))
    other = Run(ADAMW, fxsparse.Static(sparsity=0.7, seed=9), "plain")
    mask = fxsparse.masks(other.model)[name].clone()
    for run in (plain, alive):
        fxsparse.set_masks(run.model, {name: mask})
        with pytest.raises(ConfigError, match="must be a bool tensor"):
            fxsparse.set_masks(run.model, {name: mask.float()})
        with pytest.raises(ConfigError, match="does not fit"):
            fxsparse.set_masks(run.model, {name: torch.rand_like(mask, dtype=torch.float32) > 0.5})
    for a, b in zip(
        plain.go(5, 6).model.state_dict().values(), alive.go(5, 6).model.state_dict().values(), strict=True
    ):
        assert a.shape == b.shape
    agree_weights(plain, alive)


def agree_weights(plain: Run, alive: Run) -> None:
    """Equal weights and masks."""
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(value, alive.model.state_dict()[name], **CLOSE)


def test_state_dicts_fit_both_storages() -> None:
    method = fxsparse.RigL(sparsity=0.7, every=7)
    plain, alive = Run(MOMENTUM, method, "plain").go(0, 20), Run(MOMENTUM, method, "alive").go(0, 20)
    assert plain.model.state_dict().keys() == alive.model.state_dict().keys()
    for source in (plain, alive):
        for storage in ("plain", "alive"):
            fresh = Run(MOMENTUM, method, storage)
            fresh.model.load_state_dict(source.model.state_dict())
            agree_weights(source, fresh)
    broken = {**plain.model.state_dict(), "0.weight_mask": torch.rand(12, 4, 3, 3) > 0.5}
    before = alive.model.state_dict()
    with pytest.raises(RuntimeError, match="does not fit"):
        alive.model.load_state_dict(broken)
    assert torch.equal(before["0.weight"], alive.model.state_dict()["0.weight"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        alive.model.load_state_dict({**plain.model.state_dict(), "5.weight": torch.zeros(3, 3)})


@pytest.mark.parametrize("order", [("model", "optimizer", "handle"), ("handle", "optimizer", "model")])
@pytest.mark.parametrize("stop", [20, 21, 22])
def test_a_killed_run_goes_on_bit_for_bit(stop: int, order: tuple[str, ...]) -> None:
    method = fxsparse.RigL(sparsity=0.7, every=7)
    whole, first = Run(ADAMW, method, "alive").go(), Run(ADAMW, method, "alive").go(0, stop)
    saved = {part: copy.deepcopy(getattr(first, part).state_dict()) for part in order}
    second = Run(ADAMW, method, "alive")
    for part in order:
        getattr(second, part).load_state_dict(saved[part])
    second.go(stop)
    for a, b in zip(whole.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    agree(whole.dense(), second.dense())


@pytest.mark.parametrize("make", [MOMENTUM, ADAMW])
def test_going_back_to_earlier_weights_moves_the_state_of_the_optimizer_along(make) -> None:
    method = fxsparse.RigL(sparsity=0.7, every=3)
    runs = [Run(make, method, storage).go(0, 4) for storage in ("plain", "alive")]
    best = [copy.deepcopy(run.model.state_dict()) for run in runs]
    for run, state in zip(runs, best, strict=True):
        before = fxsparse.masks(run.go(4, 14).model)["5.weight"].clone()
        run.model.load_state_dict(state)
        assert not torch.equal(before, fxsparse.masks(run.model)["5.weight"])
    for run in runs:
        run.go(14, 22)
    agree_weights(*runs)


def test_copies_go_on_as_the_original() -> None:
    run = Run(ADAMW, fxsparse.RigL(sparsity=0.7, every=7), "alive").go(0, 10)
    twin = copy.copy(run)
    twin.model, twin.optimizer, twin.handle = copy.deepcopy((run.model, run.optimizer, run.handle))
    run.go(10)
    twin.go(10)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), twin.model.parameters(), strict=True))
    agree(run.dense(), twin.dense())


def test_accumulation_and_clipping() -> None:
    found = []
    for storage in ("plain", "alive"):
        run = Run(MOMENTUM, fxsparse.RigL(sparsity=0.7, every=3), storage)
        for step in range(8):
            run.optimizer.zero_grad()
            for part in range(2):
                source = torch.Generator().manual_seed(2 * step + part)
                x = torch.randn(3, 4, 3, 3, generator=source, dtype=torch.float64)
                (run.model(x).square().mean() / 2).backward()
            nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
            run.optimizer.step()
        found.append(run)
    agree(found[0], found[1].dense())


def test_compiled_training_is_not_compiled_anew_by_mask_updates() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, alive = (Run(MOMENTUM, fxsparse.RigL(sparsity=0.7, every=3), kind) for kind in ("plain", "alive"))
    plain.go(0, 10)
    inner = alive.model
    alive.model = torch.compile(inner, backend="aot_eager")
    alive.go(0, 10)
    alive.model = inner
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    agree(plain, alive.dense())
    torch._dynamo.reset()


def test_restoring_gives_back_everything() -> None:
    run = Run(ADAMW, fxsparse.Static(sparsity=0.7), "sparse").go(0, 4)
    parameters = list(run.model.parameters())
    before = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    buffers = {name for name, _ in run.model.named_buffers()}
    store_alive(run.handle)
    store_alive(run.handle)
    assert {row.product for row in fast_report(run.model)} == {"sparse"}
    with pytest.raises(ConfigError, match="restore"):
        decelerate(run.model)
    run.dense().dense()
    assert all(a is b for a, b in zip(parameters, run.model.parameters(), strict=True))
    assert {name for name, _ in run.model.named_buffers()} == buffers
    for name, value in before[0].items():
        assert torch.equal(value, run.model.state_dict()[name]), name
    for index, state in before[1]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, run.optimizer.state_dict()["state"][index][key])
    decelerate(run.model)
    run.go(4, 6)


class Mixing(torch.optim.SGD):
    """A class of the user's own may do anything."""


def test_what_cannot_be_stored_is_refused_by_name() -> None:
    static = fxsparse.Static(sparsity=0.7)
    for make in (Mixing, torch.optim.Adafactor):
        run = Run(partial(make, lr=0.1), static, "plain")
        with pytest.raises(ConfigError, match=make.__name__):
            store_alive(run.handle)
    with pytest.raises(ConfigError, match="RESU"):
        store_alive(Run(SGD, fxsparse.RESU(sparsity=0.7), "plain").handle)
    with pytest.raises(ConfigError, match="mask is full; call store_alive again after the update that first prunes"):
        store_alive(Run(SGD, fxsparse.GMP(sparsity=0.7), "plain").handle)
    with pytest.raises(ConfigError, match="`eps`"):
        store_alive(Run(partial(torch.optim.AdamW, lr=0.1, eps=0.0), static, "plain").handle)
    with pytest.raises(ConfigError, match="`handle`"):
        store_alive(network())
    run = Run(SGD, static, "plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alive_only, "is_sharded", lambda weight: weight.ndim == 4)
        with pytest.raises(ConfigError, match="`0.weight` .*sharded"):
            store_alive(run.handle)
    run.handle.follow(AveragedModel(run.model))
    with pytest.raises(ConfigError, match="averaged"):
        store_alive(run.handle)
    run.handle.detach()
    with pytest.raises(ConfigError, match="detached"):
        store_alive(run.handle)
    assert not any(hasattr(module, "_fxsparse_shared") for module in run.model.modules())


def test_another_method_asks_for_dense_weights() -> None:
    run = Run(MOMENTUM, fxsparse.RigL(sparsity=0.7, every=3), "alive").go(0, 5)
    run.handle.detach()
    optimizer, method = MOMENTUM(run.model.parameters()), fxsparse.Static(sparsity=0.7)
    with pytest.raises(ConfigError, match=r"`0.weight` is stored alive only: call restore_dense\(handle\)"):
        fxsparse.attach(run.model, optimizer, method, total_steps=9)
    restore_dense(run.handle)
    fxsparse.attach(run.model, optimizer, method, total_steps=9)


def test_what_needs_dense_weights_is_refused_until_they_are_back(tmp_path) -> None:
    run = Run(SGD, fxsparse.Static(sparsity=0.7), "alive").go(0, 2)
    acts = (
        lambda: fxsparse.finalize(run.model),
        lambda: fxsparse.save_ticket(run.model, tmp_path / "ticket"),
        lambda: fxsparse.nn.remove_mask(run.model.get_submodule("0"), "weight"),
        lambda: fxsparse.nn.set_guard(run.model.get_submodule("0"), "weight", fxsparse.nn.Guard.GRADIENT),
        lambda: run.model.get_submodule("0").to_dense(),
        lambda: run.handle.follow(AveragedModel(network())),
        lambda: fxsparse.attach(run.model, SGD(run.model.parameters()), fxsparse.Static(initial=Initial.KEEP)),
    )
    for act in acts:
        with pytest.raises(FxSparseError, match="restore_dense|stored alive|does not match|driven by"):
            act()
    run.dense()
    x = torch.randn(2, 4, 3, 3).double()
    torch.testing.assert_close(fxsparse.finalize(run.model)(x), run.model(x))


def test_reports_and_masks_see_dense_shapes() -> None:
    run = Run(SGD, fxsparse.Static(sparsity=0.7), "plain")
    masks = {name: mask.clone() for name, mask in fxsparse.masks(run.model).items()}
    store_alive(run.handle)
    assert all(torch.equal(mask, fxsparse.masks(run.model)[name]) for name, mask in masks.items())
    x = torch.randn(2, 4, 3, 3).double()
    expected = run.model(x)
    per_sample = torch.func.vmap(
        lambda sample: torch.func.functional_call(run.model, dict(run.model.named_parameters()), (sample[None],))
    )(x)
    torch.testing.assert_close(per_sample[:, 0], expected)
    torch.testing.assert_close(
        run.model.get_submodule("5").effective_weight, run.dense().model.get_submodule("5").weight
    )


def tensors() -> list[torch.Tensor]:
    """All that live in this process."""
    return [each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter)]


def test_nothing_of_dense_size_stays_between_two_steps() -> None:
    others = {id(each): each for each in tensors()}  # of other tests
    run = Run(MOMENTUM, fxsparse.RigL(sparsity=0.75, every=2), "sparse")
    run.model(torch.randn(2, 4, 3, 3).double()).sum().backward()  # a dense gradient was there
    store_alive(run.handle)
    run.go(0, 4)
    sizes = {22 * 18 * 9, 12 * 4 * 9, 18 * 12}
    gc.collect()
    found = [each for each in tensors() if id(each) not in others and each.numel() in sizes]
    assert run.handle.updates and not [tuple(each.shape) for each in found]


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAMW])
def test_gradual_pruning_goes_on_while_the_loss_of_the_last_step_is_held(optimizer) -> None:
    runs = []
    for storage in ("sparse", "alive"):
        run = Run(
            optimizer,
            fxsparse.GMP(sparsity=0.8, initial_sparsity=0.3, every=3, initial=fxsparse.sparsity.Magnitude()),
            storage,
        )
        seen: list[torch.Size] = []
        run.model[5].weight.register_post_accumulate_grad_hook(lambda weight, seen=seen: seen.append(weight.grad.shape))
        loss = None  # the old loss holds the old graph until the next one is there
        for step in range(12):
            run.optimizer.zero_grad()
            loss = run.model(torch.full((6, 4, 3, 3), 0.1 * step, dtype=torch.float64)).square().mean()
            loss.backward()
            run.optimizer.step()
        assert len(seen) == 12 and len(set(seen)) == (1 if storage == "sparse" else 4)
        runs.append(run.dense() if storage == "alive" else run)
    for own, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(own, other, **CLOSE)
