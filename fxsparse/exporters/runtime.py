"""Sessions of onnxruntime on the CPU, and times of calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fxsparse.errors import ExportError
from fxsparse.exporters.inputs import first_line

WARM = 3
_FEWEST, _MOST = 5, 1000


def open_session(model: Path | bytes, threads: int = 1, *, optimised: bool = True) -> Any:
    """An `onnxruntime.InferenceSession` with `threads` threads, sequential, all graph optimisations on.

    Args:
        model: a file, or the message itself (without external data).
        threads: threads of one operator.
        optimised: False runs the graph as it is written.

    Raises:
        ExportError: when onnxruntime refuses the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else model
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} refuses the model ({first_line(error)}): "
            "cast the model to float32, try another `opset`, or a newer onnxruntime"
        ) from error


def interleaved(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of every call, all of them in turn.

    Every round makes each call once, in an order that turns by one each round, so that drifts of the machine meet all
    alike. Three rounds of warm-up are not counted.

    Args:
        calls: what to time, by name.
        seconds: about how long to measure; at least 5 and at most 1000 rounds.

    Returns:
        The times by name, as many for each.
    """
    names = list(calls)
    warm = [_time(calls[name]) for _ in range(WARM) for name in names]
    round_s = max(statistics.median(warm[i :: len(names)]) for i in range(len(names))) * len(names)
    rounds = min(_MOST, max(_FEWEST, int(seconds / max(round_s, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(_time(calls[name]))
    return times


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
