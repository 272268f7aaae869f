"""A damaged state is refused by name, changes nothing, and leaves the optimizer free."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxsparse.errors import ConfigError
from fxsparse.nn import Linear, masks, set_masks
from fxsparse.sparsity import SharedSupport, Taylor, Uniform
from fxsparse.training import ITOP, RESU, SNFS, Growth, Initial, Lengths, Method, RigL, Static, attach
from fxsparse.training.alive_only import restore_dense, store_alive
from fxsparse.training.handle import Handle, handle_of

TOTAL = 20
METHODS: dict[str, Method] = {
    "rigl": RigL(0.5, every=2),
    "snfs": SNFS(0.5, every=2),
    "resu": RESU(0.5, cycles=2, rise=1, distribution=Uniform(), lengths=Lengths(0.5, 0, 0.5), score=Taylor()),
}
_CYCLES = METHODS["resu"].timed(TOTAL).timeline.cycles  # type: ignore[attr-defined]
STOPS = {"rigl": 5, "snfs": 5, "resu": _CYCLES[1].enter + 1}  # RESU's within a phase


def build(seed: int = 0, pattern: Any = None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {} if pattern is None else {"pattern": pattern}
        return nn.Sequential(Linear(8, 12, **options), nn.Tanh(), Linear(12, 4, **options)).double()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, end: int) -> None:
    for step in range(start, end):
        optimizer.zero_grad()
        x = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        optimizer.step()


def trained(name: str) -> tuple[nn.Module, torch.optim.Optimizer, Handle]:
    model = build()
    optimizer = adamw(model)
    handle = attach(model, optimizer, METHODS[name], TOTAL)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "theta hardly moved")
        train(model, optimizer, 0, STOPS[name])
    return model, optimizer, handle


def changed(state: dict[str, Any], key: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    part = copy.deepcopy(state[key])
    return {**state, key: (change(part[0]),) if isinstance(part, tuple) else change(part)}


def renamed(part: dict[str, Any]) -> dict[str, Any]:
    return {"zzz": next(iter(part.values()), 1), **part}


def cut(part: dict[str, Any]) -> dict[str, Any]:
    return dict(list(part.items())[1:])


COMMON: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "step of text": ("step", lambda _: "x", r"`step` of the state \(='x'\) must be an integer"),
    "step true": ("step", lambda _: True, r"`step` of the state \(=True\)"),
    "step negative": ("step", lambda _: -1, r"`step` of the state \(=-1\) must be at least 0"),
    "updates": ("updates", lambda _: 1.5, r"`updates` of the state \(=1.5\)"),
    "masks": ("masks", lambda _: "x", r"`masks` of the state \(='x'\)"),
    "version": ("version", lambda _: 9, "version 9.* is not of this handle"),
    "records of numbers": ("records", lambda _: [1, 2], r"`records\[0\]` of the state \(=1\) must be a list"),
    "records short": ("records", lambda r: [row[:-1] for row in r], r"`records\[0\]` .* must have 6 values"),
    "records mixed": ("records", lambda r: [(r[0][1], *r[0][1:])], r"`records\[0\]` .* another `step` \(='0.weight'\)"),
    "records no list": ("records", lambda _: 7, r"`records` of the state \(=7\) must be a list"),
    "records of others": ("records", lambda r: [(1, "zzz", *r[0][2:])], "`records` of the state names `zzz`"),
    "memory of others": ("memory", renamed, "`memory` of the state names `zzz`"),
    "memory no dict": ("memory", lambda _: [1], r"`memory` of the state \(=\[1\]\) must be a dict"),
    "memory of numbers": ("memory", lambda _: {"0.weight": 3}, r"`memory\[0.weight\]` of the state \(=3\)"),
    "memory no tensor": ("memory", lambda _: {"0.weight": {"m": 3}}, r"`memory\[0.weight\]\[m\]` of the state \(=3\)"),
    "explored empty": ("explored", lambda _: {}, "`explored` of the state lacks .*, which is sparse"),
    "explored cut": ("explored", cut, "`explored` of the state lacks 0.weight, which is sparse"),
    "explored of others": ("explored", renamed, "`explored` of the state names `zzz`"),
    "explored small": (
        "explored",
        lambda e: {n: m[:1] for n, m in e.items()},
        r"`explored\[0.weight\]` .*\(1, 8\)\)",
    ),
    "explored floats": (
        "explored",
        lambda e: {n: m.float() for n, m in e.items()},
        "torch.float32.* must be torch.bool",
    ),
    "explored numbers": ("explored", lambda e: dict.fromkeys(e, 1), r"`explored\[0.weight\]` .* must be a tensor"),
    "targets empty": ("targets", lambda _: {}, "`targets` of the state lacks `0.weight`"),
    "targets cut": ("targets", cut, "`targets` of the state lacks `0.weight`"),
    "targets of others": ("targets", renamed, "`targets` of the state names `zzz`"),
    "targets of text": ("targets", lambda t: dict.fromkeys(t, ["a", 1]), r"`targets\[0.weight\]` .* a sparsity and"),
    "targets too many": ("targets", lambda t: dict.fromkeys(t, [0.5, 999]), r"`targets\[0.weight\]` .* a sparsity and"),
}
OWN: dict[str, dict[str, tuple[str, Callable[[Any], Any], str]]] = {
    "rigl": {},
    "snfs": {
        "memory empty": ("memory", lambda _: {}, "`memory` of the state lacks the averaged gradients that SNFS keeps"),
        "memory small": (
            *("memory", lambda m: {n: {k: v[:1] for k, v in each.items()} for n, each in m.items()}),
            r"`memory\[0.weight\]\[m\]` of the state \(=torch.float64, \(1, 8\)\)",
        ),
    },
    "resu": {
        "theta of others": ("theta", renamed, "`theta` of the state names `zzz`"),
        "theta of text": ("theta", lambda t: dict.fromkeys(t, {"m": "x"}), r"`theta\[0.weight\]` of the state"),
        "scales": ("scales", lambda s: dict.fromkeys(s, "x"), r"`scales\[0.weight\]` of the state \(='x'\)"),
        "revived": ("revived", lambda _: {"0.weight": 1}, r"`revived\[0.weight\]` .* must be a tensor"),
        "resurrections": ("resurrections", lambda _: [1], r"`resurrections\[0\]` of the state \(=1\)"),
        "averages": ("averages", lambda _: [{}], "`averages` of the state lacks weights of a copy"),
        "inputs": ("inputs", lambda _: 1, r"`inputs` of the state \(=1\)"),
        "sums": ("inputs", lambda i: {**i, "sums": {"0.weight": [1]}}, r"`inputs\[0.weight\]` .* must be sums"),
    },
}  # fmt: skip
CASES = [(name, case) for name in METHODS for case in (*COMMON, *OWN[name])]


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    return {name: trained(name) for name in METHODS}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_damaged_state_changes_nothing(name: str, case: str, runs: dict[str, Any]) -> None:
    model, optimizer, handle = runs[name]
    saved = handle.state_dict()
    key, change, message = {**COMMON, **OWN[name]}[case]
    bad = changed(saved, key, change)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        handle.load_state_dict(bad)
    assert repr(handle.state_dict()) == repr(saved) and handle.attached
    other = copy.deepcopy(model)
    fresh = adamw(other)
    keys, slots = list(other.state_dict()), [each.spec for each in _slots(other)]
    with pytest.raises(ConfigError, match=message):
        attach(other, fresh, METHODS[name], TOTAL, state=bad)
    assert handle_of(fresh) is None and list(other.state_dict()) == keys and [e.spec for e in _slots(other)] == slots
    assert not fresh._optimizer_step_pre_hooks and not fresh._optimizer_step_post_hooks
    assert all(torch.equal(before[n], v) for n, v in other.state_dict().items())
    attach(other, fresh, METHODS[name], TOTAL, state=saved).detach()


def _slots(model: nn.Module) -> list[Any]:
    from fxsparse.nn.slot import slots_of

    return [slot for module in model.modules() for slot in slots_of(module).values()]


@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_state_at_all(name: str) -> None:
    for bad, message in ((3, r"`state` \(=3\)"), ("x", "`state`"), ({}, "lacks")):
        model = build()
        keys = list(model.state_dict())
        optimizer = adamw(model)
        with pytest.raises(ConfigError, match=message):
            attach(model, optimizer, METHODS[name], TOTAL, state=bad)  # type: ignore[arg-type]
        assert list(model.state_dict()) == keys  # RESU's buffers are gone again
        attach(model, optimizer, METHODS[name], TOTAL).detach()
    handle = trained(name)[2]
    with pytest.raises(ConfigError, match="must be what"):
        handle.load_state_dict(3)  # type: ignore[arg-type]


def test_an_error_of_any_kind_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, handle = trained("rigl")
    saved = handle.state_dict()
    handle.detach()

    def broken(self: Handle, state: object) -> None:
        raise KeyboardInterrupt

    fresh = adamw(model)
    with monkeypatch.context() as patch:
        patch.setattr(Handle, "load_state_dict", broken)
        with pytest.raises(KeyboardInterrupt):
            attach(model, fresh, METHODS["rigl"], TOTAL, state=saved)
    assert handle_of(fresh) is None
    attach(model, fresh, METHODS["rigl"], TOTAL, state=saved)


def test_sums_of_gradients_are_missed_in_the_middle_of_a_phase() -> None:
    method = RESU(0.5, cycles=1, rise=1, distribution=Uniform(), score=Taylor(), calibration=3)
    model = build()
    optimizer = adamw(model)
    handle = attach(model, optimizer, method, 30)
    cycle = method.timed(30).timeline.cycles[0]
    train(model, optimizer, 0, cycle.end - 1)
    state = handle.state_dict()
    for lost in ({**state, "memory": ({},)}, {key: part for key, part in state.items() if key != "memory"}):
        with pytest.raises(ConfigError, match="lacks the sums of gradients that RESU keeps"):
            handle.load_state_dict(lost)
    handle.load_state_dict(state)


def test_what_was_empty_may_be_missing() -> None:
    """Dense so far, nothing remembered: a checkpoint that drops empty dicts has neither."""
    model = build()
    optimizer = adamw(model)
    method = Static(0.5, initial=Initial.KEEP)
    handle = attach(model, optimizer, method, TOTAL)
    state = handle.state_dict()
    handle.load_state_dict({key: part for key, part in state.items() if key not in ("memory", "explored")})
    set_masks(model, {"0.weight": torch.eye(12, 8, dtype=torch.bool)})
    late = handle.state_dict()  # masks that were set by hand since are in it
    assert torch.equal(late["explored"][0]["0.weight"], torch.ones(12, 8, dtype=torch.bool))
    handle.load_state_dict(late)


def test_unseen_growth_goes_on_from_what_was_explored() -> None:
    model = build()
    optimizer = adamw(model)
    method = ITOP(0.5, every=1, growth=Growth.UNSEEN)
    handle = attach(model, optimizer, method, TOTAL)
    train(model, optimizer, 0, 4)
    other, state = copy.deepcopy(model), handle.state_dict()
    second = adamw(other)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again = attach(other, second, method, TOTAL, state=state)
    train(model, optimizer, 4, TOTAL)
    train(other, second, 4, TOTAL)
    assert all(torch.equal(mask, masks(other)[name]) for name, mask in masks(model).items())
    assert str(handle.report()) == str(again.report())


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("width", [4, 64])
def test_optimizer_state_of_another_storage_is_named(kind: Any, width: int) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer, Handle]:
        model = build(pattern=SharedSupport(width))
        optimizer = kind(model.parameters(), lr=0.01)
        handle = attach(model, optimizer, RigL(0.5, every=3, distribution=Uniform()), TOTAL)
        return model, optimizer, handle

    model, optimizer, handle = made()
    store_alive(handle)
    train(model, optimizer, 0, 2)
    alive = copy.deepcopy(optimizer.state_dict())
    restore_dense(handle)
    dense = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(copy.deepcopy(alive))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"of `0.weight` \(=\(.*\)\) is not stored as .* but alive entries only"):
        train(model, optimizer, 2, 3)
    assert handle.step == 2 and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    optimizer.load_state_dict(copy.deepcopy(dense))
    train(model, optimizer, 2, 3)
    store_alive(handle)
    optimizer.load_state_dict(copy.deepcopy(dense))
    with pytest.raises(ConfigError, match=r"alive entries only\): load a state of dense storage before `store_alive`"):
        train(model, optimizer, 3, 4)


def test_factored_state_of_dense_weights_is_not_taken_for_another_storage() -> None:
    model = build(pattern=SharedSupport(4))
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    handle = attach(model, optimizer, RigL(0.5, every=9, distribution=Uniform()), TOTAL)
    train(model, optimizer, 0, 3)
    assert handle.step == 3
