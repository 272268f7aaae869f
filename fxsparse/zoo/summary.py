"""What a run amounts to: passes a stage, and the targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fxsparse.zoo.records import EAGER, EntryResult, StageResult, Status

SLOWEST = 10.0
"""CPU seconds that a transform may take."""

RATIO = 3.0
"""CPU time of a transform, at most, as a multiple of one recorder run and one symbolic trace."""

QUICK = 0.25
"""CPU seconds below which the ratio of a transform is not held against it."""


@dataclass(frozen=True)
class Count:
    """A share: `good` of `total`, and who is not among the good ones."""

    good: int
    total: int
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.good}/{self.total}" if self.total else "-"


@dataclass(frozen=True)
class TargetRow:
    """One target.

    Attributes:
        name: what is asked for.
        wanted: how much of it, in words.
        found: how much there is, in words.
        met: whether that is enough.
        worst: names of the entries that miss it, or of the worst ones.
    """

    name: str
    wanted: str
    found: str
    met: bool
    worst: tuple[str, ...] = ()


def stage_counts(results: Sequence[EntryResult]) -> dict[str, Count]:
    """Passes among the entries to which each stage applies, in the order of the stages."""
    names = list(dict.fromkeys(stage.stage for result in results for stage in result.stages))
    return {name: _count(results, (name,)) for name in names}


def _count(results: Iterable[EntryResult], names: Sequence[str]) -> Count:
    good, bad = 0, []
    for result in results:
        ran = [s for name in names if (s := result.stage(name)) and s.status is not Status.NOT_APPLICABLE]
        if not ran:
            continue
        if all(stage.status is Status.PASS for stage in ran):
            good += 1
        else:
            bad.append(result.name)
    return Count(good, good + len(bad), tuple(bad))


def target_rows(results: Sequence[EntryResult]) -> list[TargetRow]:
    """The targets, for the stages that were run."""
    present = set(stage_counts(results))
    rows = [_share("the original builds and runs", _count(results, (EAGER,)), 1.0)]
    core = [name for name in ("transform", "train", "reload") if name in present]
    if core:
        rows.append(_share(" + ".join(core), _count(results, core), 1.0))
    for name, title in (
        ("half", "bfloat16, where the original runs in it"),
        ("batch", "another batch size, where the original takes it"),
        ("compile", "torch.compile, where the original compiles"),
    ):
        if name in present:
            rows.append(_share(title, _count(results, (name,)), 1.0))
    if "onnx" in present:
        rows.append(_share("ONNX parity, where the original exports", _count(results, ("onnx",)), 0.95))
    if "transform" in present:
        rows.append(_none("silent skips", results, lambda stage: int(stage.numbers.get("silent_count", 0))))
        rows += _time_rows(results)
    rows.append(_none("wrong outputs", results, lambda stage: int(stage.wrong)))
    return rows


def _share(name: str, count: Count, wanted: float) -> TargetRow:
    share = count.good / count.total if count.total else 1.0
    found = f"{100 * share:.1f} % ({count})" if count.total else "none to try"
    text = f"{100 * wanted:.0f} %" if wanted == 1.0 else f">= {100 * wanted:.0f} %"
    return TargetRow(name, text, found, share >= wanted, count.others)


def _none(name: str, results: Sequence[EntryResult], amount: Callable[[StageResult], int]) -> TargetRow:
    per_entry = {result.name: sum(map(amount, result.stages)) for result in results}
    guilty = tuple(entry for entry, value in per_entry.items() if value)
    total = sum(per_entry.values())
    return TargetRow(name, "0", str(total), total == 0, guilty)


def _time_rows(results: Sequence[EntryResult]) -> list[TargetRow]:
    timed = [(r.name, s.numbers) for r in results if (s := r.stage("transform")) and "ratio" in s.numbers]
    if not timed:
        return []
    slow = sorted(timed, key=lambda pair: -pair[1]["transform_s"])
    over = [pair for pair in timed if pair[1]["ratio"] > RATIO and pair[1]["transform_s"] > QUICK]
    over.sort(key=lambda pair: -pair[1]["ratio"])
    ratios = sorted(numbers["ratio"] for _, numbers in timed)
    highest = max(timed, key=lambda pair: pair[1]["ratio"])
    return [
        TargetRow(
            f"transform time / (recorder run + symbolic trace), above {QUICK} s",
            f"<= {RATIO:g}",
            f"median {ratios[len(ratios) // 2]:.1f}, {len(over)} above, highest {highest[1]['ratio']:.1f}",
            not over,
            tuple(f"{name} ({numbers['ratio']:.1f})" for name, numbers in over),
        ),
        TargetRow(
            "transform time of the slowest, CPU seconds",
            f"<= {SLOWEST:g}",
            f"{slow[0][1]['transform_s']:.1f} ({slow[0][0]})",
            slow[0][1]["transform_s"] <= SLOWEST,
            tuple(
                f"{name} ({numbers['transform_s']:.1f})" for name, numbers in slow if numbers["transform_s"] > SLOWEST
            ),
        ),
    ]


def all_met(results: Sequence[EntryResult]) -> bool:
    """Whether every target is met."""
    return all(row.met for row in target_rows(results))
