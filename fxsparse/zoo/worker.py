"""The process of one model: runs its stages and writes a line of JSON for each beginning and each end."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import math
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fxsparse.zoo.records import EAGER, StageResult, Status

DETAIL = 3000  # characters of a traceback that are kept


def main(descriptor: int) -> None:
    """Run the request that the first line of standard input holds; report to the file `descriptor`.

    Standard input stays open for as long as the parent lives; when it ends, this process does.
    """
    faulthandler.enable()
    _be_first_to_go()
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with os.fdopen(descriptor, "w", encoding="utf-8") as events:
        try:
            _run(request, events)
        except BaseException:  # what a stage raises is a result; this is the harness's own failure
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    os._exit(0)  # libraries that hang at exit have nothing left to do


def _be_first_to_go() -> None:
    """When memory runs out, the system should end this process and not the one that writes the results."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(70)


def _run(request: Mapping[str, Any], events: Any) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)

    def tell(value: Mapping[str, Any]) -> None:
        events.write(json.dumps(value, allow_nan=False, default=str) + "\n")
        events.flush()

    try:
        from fxsparse.zoo.stages import FUNCTIONS
        from fxsparse.zoo.subject import Subject
    except Exception as error:
        tell({"broken": f"{type(error).__name__}: {error}"})
        return
    sys.path.insert(0, request["folder"])
    tell({"begin": EAGER})
    subject = Subject(request["entry"], request["batch"], request["sparsity"], request["scratch"])
    first = _stage(EAGER, FUNCTIONS[EAGER], subject)
    tell({"end": first.plain()})
    for name in request["stages"]:
        if first.status is not Status.PASS:
            result = StageResult(name, Status.NOT_APPLICABLE, "the original does not run")
        else:
            tell({"begin": name})
            result = _stage(name, FUNCTIONS[name], subject)
        tell({"end": result.plain()})


def _stage(name: str, function: Any, subject: Any) -> StageResult:
    from fxsparse.zoo.subject import NotApplicableError, Sheet, first_line

    sheet = Sheet()
    status, reason, detail = Status.PASS, "", ""
    began = time.monotonic()
    try:
        with _quiet_warnings():
            function(subject, sheet)
    except NotApplicableError as error:
        status, reason = Status.NOT_APPLICABLE, str(error)
    except (Exception, SystemExit) as error:
        status, reason = Status.FAIL, first_line(error)
        detail = traceback.format_exc()[-DETAIL:]
    if sheet.problems and status is not Status.NOT_APPLICABLE:
        status = Status.FAIL
        reason = "; ".join([*sheet.problems, *([reason] if reason else [])])
    elif status is Status.PASS:
        reason = "; ".join(sheet.remarks)
    seconds = time.monotonic() - began
    return StageResult(name, status, reason[:2000], seconds, sheet.wrong, _finite(sheet.numbers), detail)


@contextlib.contextmanager
def _quiet_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _finite(value: Any) -> Any:
    """JSON has no infinities and NaN: they become text."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
