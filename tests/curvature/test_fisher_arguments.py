"""What a collector and its keys refuse by name: arguments of other types, and values out of range."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsparse.curvature import FisherCollector, Heads, Key, from_old, restrict, to_old
from fxsparse.errors import ConfigError, DataError


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(6, 5, generator=draws), torch.randint(3, (6,), generator=draws)


OPTIONS: dict[str, tuple[Any, ...]] = {
    "model": ("x", None, nn.Linear),
    "loss": (3, None, "x", nn.CrossEntropyLoss),
    "kind": (3, "x", None),
    "unit": (3, "x", None),
    "groups": (3, "x", None),
    "accumulate": ("x", None),
    "beta": ("a", math.nan, math.inf, -0.1, 1.0, True, None),
    "samples": (0, -1, 1.5, True, "a", None),
    "support": ("x", None),
    "storage": (3, "fp16", None),
    "bn": (3, "x", None),
    "chunk": (0, 2.5, True, "a"),
    "generator": (3, "x"),
    "parameters": ("0.weight", 3, [3], ["nope"], []),
    "heads": (3, [3], "x", None, Heads(1), {"a": Heads(1)}),
    "token_method": (3, "x", None),
    "absent": (3, "x"),
    "variance": ("x", 1, None),
    "output": (3, "logits", None),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OPTIONS.items() for value in values])
def test_options_by_name(name: str, value: Any) -> None:
    plain = model()
    before = {key: each.clone() for key, each in plain.state_dict().items()}
    with pytest.raises(ConfigError, match=f"`{name}` \\(="):
        FisherCollector(**{"model": plain, name: value})
    assert all(torch.equal(each, before[key]) for key, each in plain.state_dict().items())
    assert plain.training and not any(module._forward_hooks for module in plain.modules())


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        *((DataError, "batches", lambda c, v=v: c.collect(v, top=1)) for v in (3, None, "x", batch()[0], {"x": 1})),
        *((ConfigError, "top", lambda c, v=v: c.collect([batch()], top=v)) for v in ("a", 0, 1.5, True, None)),
        *(
            (ConfigError, "overlap", lambda c, v=v: c.collect([batch()], top=1, overlap=v))
            for v in ("a", 0, 1.5, math.nan, True)
        ),
        *((ConfigError, "patience", lambda c, v=v: c.collect([batch()], top=1, patience=v)) for v in ("a", 0, 1.5)),
        *((ConfigError, "task", lambda c, v=v: c.collect([], v, top=1)) for v in (3, "", "a|b", None)),
        *((ConfigError, "task", lambda c, v=v: c.update(batch(), v)) for v in (3, "", "a|b", None)),
        (ConfigError, "task", lambda c: c.oneshot(batch(), 3)),
        (DataError, "batch", lambda c: c.update(3)),
        (DataError, "batch", lambda c: c.update(None)),
        (ConfigError, "path", lambda c: c.load(3)),
        (ConfigError, "path", lambda c: c.save(3)),
        (ConfigError, "key", lambda c: c.metadata(3)),
        (ConfigError, "param", lambda c: c.get(param=3)),
        (ConfigError, "group_type", lambda c: c.get(group_type=3)),
    ],
)
def test_calls_by_name_and_nothing_is_collected(error: type[Exception], name: str, call: Any) -> None:
    collector = FisherCollector(model(), "cross_entropy")
    collector.update(batch())
    before = collector.get()
    with pytest.raises(error, match=f"`{name}` \\(="):
        call(collector)
    assert collector.tasks() == ("default",) and collector.settled is None
    assert all(torch.equal(each, before[key]) for key, each in collector.get().items())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("heads", value) for value in ("a", 0, 2.5, True, None)),
        *(("kv_heads", value) for value in ("a", 0, 2.5, True, 3)),
        *((name, value) for name in ("queries", "keys", "outputs", "fused") for value in ("q.weight", 3, (3,), None)),
        ("interleaved", "x"),
        ("stored_transposed", 1),
    ],
)
def test_layouts_of_heads_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` \\(="):
        Heads(**{"heads": 4, name: value})


def test_batches_and_names_may_come_from_iterators() -> None:
    plain = model()
    listed = FisherCollector(plain, parameters=["0.weight", "2.bias"], heads=[])
    drawn = FisherCollector(plain, parameters=(name for name in ("0.weight", "2.bias")), heads=iter(()))
    assert listed.collect([batch(1), batch(2)], top=1) == drawn.collect((batch(seed) for seed in (1, 2)), top=1)
    assert listed.get().keys() == drawn.get().keys()
    assert all(torch.equal(each, listed.get()[key]) for key, each in drawn.get().items())


@pytest.mark.parametrize(
    ("name", "call"),
    [
        *(("key", lambda v=v: Key.of(v)) for v in (3, None, b"a|b|c", "a|b", "a||c", ["a", "b", "c"])),
        ("values", lambda: restrict([("a|b|c", 1)])),
        *((name, lambda name=name: restrict({"a|b|c": 1}, **{name: 3})) for name in ("task", "param", "prefix")),
        *((name, lambda name=name: restrict({"a|b|c": 1}, **{name: 3})) for name in ("module", "group_type")),
        ("key", lambda: restrict({3: 1})),
        ("values", lambda: from_old(None, ["fc"], "channel")),
        ("values", lambda: from_old({3: 1}, ["fc"], "channel")),
        ("parameters", lambda: from_old({"a_fc": 1}, "fc", "channel")),
        ("parameters", lambda: from_old({"a_fc": 1}, [3], "channel")),
        *(("group_type", lambda v=v: from_old({"a_fc": 1}, ["fc"], v)) for v in (3, "", "a|b")),
        ("values", lambda: to_old(["a|b|c"])),
        ("key", lambda: to_old({3: 1})),
    ],
)
def test_keys_by_name(name: str, call: Any) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` \\(="):
        call()
