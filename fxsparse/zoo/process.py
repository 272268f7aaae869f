"""One child process: started, listened to, and ended whatever it does."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fxsparse.errors import ConfigError
from fxsparse.zoo.records import EAGER, StageResult, Status

TAIL = 3000  # characters of output that are kept
_TICK = 0.2  # seconds between looks at the child
_START_UP = 120.0  # seconds to import torch, at least, before the time of the first stage begins
_DEATHS = 2  # processes that a model may lose; the stages left after that are not run

# Loads this very fxsparse in an interpreter that may not have it, without putting anything else in that one's way.
_START = """
import importlib.util, os, sys
root, descriptor = sys.argv[1], int(sys.argv[2])
place = os.path.join(root, "__init__.py")
spec = importlib.util.spec_from_file_location("fxsparse", place, submodule_search_locations=[root])
module = importlib.util.module_from_spec(spec)
sys.modules["fxsparse"] = module
spec.loader.exec_module(module)
from fxsparse.zoo.worker import main
main(descriptor)
"""


@dataclass(frozen=True)
class Limits:
    """What a child may use.

    Attributes:
        timeout: seconds for a stage.
        python: interpreter.
        threads: threads of a child, where the environment does not say.
        package: folder of the fxsparse that the child imports.
    """

    timeout: float
    python: str
    threads: int
    package: str


class Interrupted(Exception):
    """The run was stopped."""


def run_stages(
    request: Mapping[str, Any],
    stages: Sequence[str],
    limits: Limits,
    stop: threading.Event,
    tell: Callable[[str], None],
) -> list[StageResult]:
    """Run the stages of one model; a child that dies costs the stage in which it died, a new child does the rest.

    Args:
        request: the entry and what it needs, without `stages` and `scratch`.
        stages: names of the stages to run after `eager`.
        limits: seconds, interpreter, threads.
        stop: set from outside to end at once.
        tell: is called with the name of each stage that begins.

    Raises:
        Interrupted: `stop` was set.
        ConfigError: the interpreter cannot import fxsparse.
    """
    results: dict[str, StageResult] = {}
    deaths = 0
    while left := [name for name in (EAGER, *stages) if name not in results]:
        died = _run_child(request, [name for name in left if name != EAGER], limits, stop, tell, results)
        if died is not None:
            results[died.stage] = died
            deaths += 1
        if results[EAGER].status is Status.FAIL:
            rest = StageResult("", Status.NOT_APPLICABLE, "the original does not run")
        elif deaths >= _DEATHS:
            rest = StageResult("", Status.FAIL, f"not run: {deaths} processes of this model died before")
        else:
            continue
        for name in stages:
            results.setdefault(name, replace(rest, stage=name))
    return [results[name] for name in (EAGER, *stages)]


def _run_child(
    request: Mapping[str, Any],
    stages: Sequence[str],
    limits: Limits,
    stop: threading.Event,
    tell: Callable[[str], None],
    results: dict[str, StageResult],
) -> StageResult | None:
    """Run one child and add its results; what is returned is the result of the stage in which it died, if it did."""
    with tempfile.TemporaryDirectory(prefix="fxsparse-zoo-", ignore_cleanup_errors=True) as scratch:
        child = _Child({**request, "stages": stages, "scratch": scratch}, limits, scratch)
        try:
            child.listen(stop, tell)
        finally:
            child.end()
    child.check_started()
    for result in child.results:
        results.setdefault(result.stage, result)
    missing = [name for name in (EAGER, *stages) if name not in results]
    return child.obituary(missing[0]) if missing else None


class _Child:
    def __init__(self, request: Mapping[str, Any], limits: Limits, folder: str) -> None:
        self.limits, self.results = limits, list[StageResult]()
        self.running: str | None = EAGER
        self.since, self.begun = time.monotonic(), False
        self.cause = ""
        self.output = bytearray()
        self.events, write = os.pipe()
        self.buffer = b""
        try:
            self.process = subprocess.Popen(
                [limits.python, "-P", "-c", _START, limits.package, str(write)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(write,),
                cwd=folder,
                start_new_session=True,
                env=_environment(limits.threads),
            )
        finally:
            os.close(write)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        self.drain = threading.Thread(target=self._drain, daemon=True)
        self.drain.start()

    def _drain(self) -> None:
        """Read the output as fast as it comes, so that nothing waits for it, and keep its end."""
        assert self.process.stdout is not None
        while chunk := self.process.stdout.read1(65536):  # type: ignore[attr-defined]
            self.output += chunk
            del self.output[:-TAIL]

    def listen(self, stop: threading.Event, tell: Callable[[str], None]) -> None:
        """Take the events until the process ends or its time is up."""
        while True:
            if stop.is_set():
                raise Interrupted
            ready, _, _ = select.select([self.events], [], [], _TICK)
            if ready:
                chunk = os.read(self.events, 65536)
                if not chunk:
                    break
                self._take(chunk, tell)
            elif self.process.poll() is not None:
                break
            limit = self.limits.timeout if self.begun else max(self.limits.timeout, _START_UP)
            if time.monotonic() - self.since > limit:
                self.cause = f"no result after {limit:g} s; the process was ended"
                return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)

    def _take(self, chunk: bytes, tell: Callable[[str], None]) -> None:
        *lines, self.buffer = (self.buffer + chunk).split(b"\n")
        for line in lines:
            event = json.loads(line)
            self.since = time.monotonic()
            if "broken" in event:
                raise self._broken(event["broken"])
            if "begin" in event:
                self.begun, self.running = True, event["begin"]
                tell(event["begin"])
            else:
                self.results.append(StageResult.from_plain(event["end"]))
                self.running = None

    def _broken(self, why: str) -> ConfigError:
        return ConfigError(f"`python` (={self.limits.python}) cannot import fxsparse ({why}): mend that")

    def check_started(self) -> None:
        """Raise ConfigError when the interpreter gave up before it said anything: no model is to blame."""
        if not self.begun and not self.cause and self.process.returncode > 0:
            raise self._broken(self._last_line() or f"exit code {self.process.returncode}")

    def _last_line(self) -> str:
        return next((line[:300] for line in reversed(self.tail().splitlines()) if line.strip()), "")

    def end(self) -> None:
        """End the process and everything that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        self.process.wait()
        self.drain.join(2)
        if self.process.stdout is not None and not self.drain.is_alive():
            self.process.stdout.close()
        os.close(self.events)

    def tail(self) -> str:
        """The end of the output."""
        return self.output.decode("utf-8", "replace")

    def obituary(self, following: str) -> StageResult:
        """A result for the stage in which the process died, or before which: `following`."""
        code = self.process.returncode
        cause = self.cause
        if not cause and code < 0:
            with contextlib.suppress(ValueError):
                cause = f"the process was ended by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                cause += " (out of memory?)"
        if not cause:
            last = self._last_line()
            cause = f"the process ended with exit code {code}{last and f': {last}'}"
        stage = following if self.running is None else self.running
        return StageResult(stage, Status.FAIL, cause, time.monotonic() - self.since, detail=self.tail())


def _environment(threads: int) -> dict[str, str]:
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    environment["PYTHONHASHSEED"] = "0"
    return environment
