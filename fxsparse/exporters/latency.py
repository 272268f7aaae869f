"""Latency in onnxruntime: variants interleaved in one process, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Latency:
    """Time of one call, dense against ticket.

    Attributes:
        dense_ms: median milliseconds with every weight alive.
        ticket_ms: median milliseconds of the exported file.
        batch: batch size of the call.
        threads: threads of onnxruntime.
        runs: calls of each, interleaved.
        variants: median milliseconds of everything that was measured, by name: "dense", "ticket"; for an 8-bit target
            also "dense int8" and "ticket float".
    """

    dense_ms: float
    ticket_ms: float
    batch: int
    threads: int
    runs: int
    variants: Mapping[str, float] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        """Dense over ticket: above 1 the ticket is faster."""
        return self.dense_ms / self.ticket_ms

    def __str__(self) -> str:
        others = "".join(
            f", {name} {ms:.3f} ms ({self.dense_ms / ms:.2f}x)"
            for name, ms in self.variants.items()
            if name not in ("dense", "ticket")
        )
        return (
            f"dense {self.dense_ms:.3f} ms, ticket {self.ticket_ms:.3f} ms ({self.speedup:.2f}x){others} "
            f"at batch {self.batch}; {self.threads} thread, medians of {self.runs} interleaved runs"
        )


def measure(sessions: Mapping[str, Any], feed: Mapping[str, Any], seconds: float = 0.5) -> tuple[dict[str, float], int]:
    """Time calls of several sessions on one feed.

    Every round calls each session once, in an order that turns by one each round, so that drifts of the machine meet
    all alike.

    Args:
        sessions: onnxruntime sessions by name.
        feed: input arrays by name.
        seconds: about how long to measure; at least 5 and at most 1000 rounds after 3 rounds of warm-up.

    Returns:
        Median milliseconds by name, and the number of rounds.
    """
    names = list(sessions)
    warm = [_call(sessions[name], feed) for _ in range(3) for name in names]
    rounds = min(1000, max(5, int(seconds / (statistics.median(warm) * len(names)))))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(_call(sessions[name], feed))
    return {name: 1e3 * statistics.median(each) for name, each in times.items()}, rounds


def _call(session: Any, feed: Mapping[str, Any]) -> float:
    start = time.perf_counter()
    session.run(None, feed)
    return time.perf_counter() - start
