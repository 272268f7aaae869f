"""Damaged states and files: each is refused by name, and the collector stays as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxsparse.curvature import FisherCollector
from fxsparse.errors import ConfigError

F64 = torch.float64
KEY = "default|0.weight|channel"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(n: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 6, generator=generator, dtype=F64), torch.randint(0, 3, (n,), generator=generator)


def collector(**options: Any) -> FisherCollector:
    made = FisherCollector(network(), **options)
    made.update(batch())
    made.consolidate()
    made.update(batch(4))
    return made


def told(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.tolist()
    return {name: told(each) for name, each in state.items()} if isinstance(state, dict) else state


def refused(state: Any, match: str, **options: Any) -> None:
    """A collector that holds something of its own refuses the state, and is as before."""
    own = FisherCollector(network(), **options)
    own.update(batch(3), "own")
    before = told(own.state_dict())
    with pytest.raises(ConfigError, match=match):
        own.load(state) if isinstance(state, Path) else own.load_state_dict(state)
    assert told(own.state_dict()) == before


def entry(state: dict[str, Any], key: str = KEY) -> dict[str, Any]:
    found: dict[str, Any] = state["tasks"]["default"]["entries"][key]
    return found


TENSORS = [("tensors", "total"), ("tensors", "spread"), ("tensors", "cross"), ("stored", "values")]


@pytest.mark.parametrize("part, name", TENSORS)
@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t: None, "is missing"),
        (lambda t: torch.zeros(7), "(is of shape|has 7 groups)"),
        (lambda t: t[None], "is of shape"),
        (lambda t: t * torch.nan, "is not finite"),
        (lambda t: t / 0, "is not finite"),
        (lambda t: -t - 1, "is negative"),
        (lambda t: t.long(), "no tensor of real numbers"),
        (lambda t: t.tolist(), "(no tensor of real numbers|is missing)"),
    ],
)
def test_tensors_of_an_entry(part: str, name: str, change: Callable[[Tensor], Any], match: str) -> None:
    if name == "cross" and match == "is negative":
        return  # a covariance may be
    state = collector().state_dict()
    found = change(entry(state)[part].pop(name))
    if found is not None:
        entry(state)[part][name] = found
    refused(state, match)


@pytest.mark.parametrize("accumulate", ["mean", "ema"])
@pytest.mark.parametrize("value", [None, "zzz", -1.0, float("nan"), float("inf"), True, "gone"])
def test_numbers_of_an_entry(accumulate: str, value: Any) -> None:
    state = collector(accumulate=accumulate).state_dict()
    for name in list(entry(state)["numbers"]):
        damaged = copy.deepcopy(state)
        if value == "gone":
            del entry(damaged)["numbers"][name]
        else:
            entry(damaged)["numbers"][name] = value
        refused(damaged, "damaged", accumulate=accumulate)


@pytest.mark.parametrize("name", ["count", "squares", "mass"])
def test_sums_without_units(name: str) -> None:
    state = collector().state_dict()
    entry(state)["numbers"][name] = 0.0
    refused(state, f"`{name}` of `default.0.weight.channel` is 0.0")


def test_what_is_missing_altogether() -> None:
    state = collector().state_dict()
    del state["tasks"]["default"]["entries"][KEY]
    refused(state, r"`0\.weight` of task 'default' is missing")
    state = collector().state_dict()
    for part in ("tensors", "stored"):
        for name in list(entry(state)[part]):
            if name != "total":
                damaged = copy.deepcopy(state)
                del entry(damaged)[part][name]
                refused(damaged, "is missing")
    state = collector().state_dict()
    del entry(state)["stored"]
    refused(state, "`values` of .* is missing; others of task 'default' have it")
    state = collector().state_dict()
    for name in ("spread", "cross"):
        del entry(state)["tensors"][name]
    refused(state, "is missing; others of task 'default' have it")


def test_exponential_means_and_roots() -> None:
    state = collector(accumulate="ema", storage="cpu_fp16").state_dict()
    for part, name, value, match in (
        ("tensors", "num", torch.ones(5) / 0, "not finite"), ("tensors", "num", torch.ones(4), "has 4 groups"),
        ("stored", "scale", torch.ones(2), "of 2 numbers"), ("stored", "scale", torch.tensor(torch.nan), "not finite"),
        ("stored", "values", torch.ones(5), "without roots"), ("numbers", "steps", 1.5, "must be an integer"),
    ):  # fmt: skip
        damaged = copy.deepcopy(state)
        entry(damaged)[part][name] = value
        refused(damaged, match, accumulate="ema", storage="cpu_fp16")
    del entry(state)["stored"]["scale"]
    refused(state, "`scale` of .* is missing", accumulate="ema", storage="cpu_fp16")


def test_sums_of_the_other_form() -> None:
    state, ema = collector().state_dict(), collector(accumulate="ema").state_dict()
    refused({**ema, "settings": state["settings"]}, "of the other form")
    refused({**state, "settings": ema["settings"]}, "of the other form", accumulate="ema")


@pytest.mark.parametrize(
    "path", ["rank", "ranks", "generator", "settings", "shapes", "tasks", "schema", "tasks/default/skipped",
             "tasks/default/shared_skipped", "tasks/default/origin", "tasks/default/entries", "shapes/0.bias",
             f"tasks/default/entries/{KEY}", f"tasks/default/entries/{KEY}/numbers",
             f"tasks/default/entries/{KEY}/tensors"],
)  # fmt: skip
@pytest.mark.parametrize("value", ["gone", None, "zzz", -1, [], 1.5])
def test_every_other_place_of_a_state(path: str, value: Any) -> None:
    if (path, value) == ("tasks/default/origin", "zzz"):
        return  # it names what ranks share
    state = collector().state_dict()
    *above, last = path.split("/")
    held: Any = state
    for name in above:
        held = held[name]
    if value == "gone":
        del held[last]
    else:
        held[last] = value
    refused(state, "(damaged|must be|is missing|has shape|differs|not empty)")


def test_generators_that_are_none() -> None:
    state = collector().state_dict()
    wrong = torch.zeros_like(state["generator"])
    refused({**state, "generator": wrong}, "`generator` of the state is damaged")
    for other in (state["generator"].float(), state["generator"][None]):
        refused({**state, "generator": other}, "no bytes of a generator")


def test_draws_of_another_kind_of_device_go_on_apart() -> None:
    """Generators differ in the size of their state; a file from an accelerator must load elsewhere."""
    state = collector(kind="mc").state_dict()
    state["generator"] = torch.arange(16, dtype=torch.uint8)
    first, second, other = (FisherCollector(network(), kind="mc") for _ in "abc")
    first.load_state_dict(state)
    second.load_state_dict(state)
    other.load_state_dict({**state, "generator": torch.ones(16, dtype=torch.uint8)})
    for each in (first, second, other):
        each.update(batch(5))
    assert all(torch.equal(value, second.get()[key]) for key, value in first.get().items())
    assert not torch.equal(first.get()[KEY], other.get()[KEY])


def test_what_is_no_state() -> None:
    for state in (None, {}, network().state_dict(), [1], "state"):
        refused(state, "`schema`")


def written(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, without the checksum, which would be the first to notice what is changed."""
    collector().save(path)
    with safe_open(str(path), framework="pt") as file:
        return load_file(path), {name: value for name, value in file.metadata().items() if name != "sha256"}


def places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every place in a structure."""
    if path:
        yield path
    for name, each in value.items() if isinstance(value, dict) else ():
        yield from places(each, (*path, name))


def test_damaged_files(tmp_path: Path) -> None:
    tensors, metadata = written(tmp_path / "good")
    bad = tmp_path / "bad"
    for text in ("", "garbage", "[]", "1", "null", '{"schema": 2}'):
        save_file(tensors, bad, {**metadata, "structure": text})
        refused(bad, "(is damaged|`schema`)")
    save_file(tensors, bad, {"format": metadata["format"]})
    refused(bad, "damaged: KeyError")
    save_file({**tensors, "foreign": torch.zeros(1)}, bad, metadata)
    refused(bad, "is damaged")
    save_file({**tensors, "default|x|element|tensors|total": torch.zeros(1)}, bad, metadata)
    refused(bad, "is damaged")
    for name in tensors:
        save_file({other: each for other, each in tensors.items() if other != name}, bad, metadata)
        refused(bad, "(is missing|damaged)")
    for path in (None, 3, tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="`path`"):
            FisherCollector(network()).load(path)  # type: ignore[arg-type]


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """Wherever it is, also in numbers that would pass for sums; a file without a checksum loads as ever."""
    path = tmp_path / "file"
    collector().save(path)
    whole = path.read_bytes()
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    assert len(metadata["sha256"]) == 64
    tensors = 8 + int.from_bytes(whole[:8], "little")
    structure = whole.index(b"structure")
    for place in (*range(structure, structure + 200, 7), *range(tensors, len(whole), 61)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        refused(path, "`path`")
    good, told_of = written(path)
    save_file(good, path, told_of)
    FisherCollector(network()).load(path)


def test_no_place_of_a_structure_can_be_left_out(tmp_path: Path) -> None:
    tensors, metadata = written(tmp_path / "good")
    structure = json.loads(metadata["structure"])
    own = FisherCollector(network())
    own.update(batch(3), "own")
    for path in places(structure):
        if path == ("tasks", "default"):
            continue  # then its tensors are too many, as above
        for value in ("gone", None, "zzz"):
            if path[-1] == "origin" and value == "zzz":
                continue
            damaged = copy.deepcopy(structure)
            held = damaged
            for name in path[:-1]:
                held = held[name]
            if value == "gone":
                del held[path[-1]]
            else:
                held[path[-1]] = value
            save_file(tensors, tmp_path / "bad", {**metadata, "structure": json.dumps(damaged)})
            with pytest.raises(ConfigError):
                own.load(tmp_path / "bad")
            assert own.tasks() == ("own",), path


@pytest.mark.parametrize("options", [{}, {"accumulate": "ema"}, {"variance": False}, {"storage": "cpu_fp16"}])
def test_what_is_whole_loads(tmp_path: Path, options: dict[str, Any]) -> None:
    made = collector(**options)
    made.update((batch()[0][:0], batch()[1][:0]), "skipped alone")
    made.save(tmp_path / "state")
    other = FisherCollector(network(), **options)
    other.load(str(tmp_path / "state"))
    assert told(other.state_dict()) == told(made.state_dict())
    assert other.tasks() == ("default", "skipped alone") and other.skipped("skipped alone") == 1


def test_a_state_without_variances_loads_where_they_are_wanted() -> None:
    other = FisherCollector(network())
    other.load_state_dict(collector(variance=False).state_dict())
    other.update(batch(5))
    assert all(bool(value.isfinite().all()) for value in other.get().values())
