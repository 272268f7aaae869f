"""The demo on a small scale: exact counts, files that hold what the table says, resumption, and the display."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from rich.console import Console

from fxsparse.data import digits
from fxsparse.demo import NETWORKS, DemoSettings, run_demo
from fxsparse.demo import run as run_module
from fxsparse.demo.progress import Display
from fxsparse.errors import ConfigError
from fxsparse.lottery import load_ticket
from fxsparse.report import Metrics, read_metrics

TINY = DemoSettings(
    seeds=(0, 1), sparsity="0.5", epochs=1, rigl_epochs=2, rigl_every=5, networks=NETWORKS[:1], wide=None
)
ALIVE = [50_200, 40_160, 32_128, 25_702, 25_100]  # a - floor(0.2 a + 1/2), the last clipped to half


def screen(width: int = 120) -> Console:
    return Console(file=io.StringIO(), width=width)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Metrics, str]:
    console = screen()
    path = run_demo(TINY, tmp_path_factory.mktemp("runs"), console)
    return path, read_metrics(path / "metrics.json"), console.file.getvalue()  # type: ignore[attr-defined]


Finished = tuple[Path, Metrics, str]


def test_the_run_directory_is_complete(finished: Finished) -> None:
    path, metrics, _ = finished
    assert re.fullmatch(r"demo-[0-9a-f]{12}", path.name)
    assert {"metrics.json", "report.html", "tickets", "onnx"} <= {p.name for p in path.iterdir()}
    stems = [f"lenet_300_100-{method}-seed{s}" for method in ("imp", "rigl") for s in (0, 1)]
    assert {p.name for p in (path / "tickets").iterdir()} == {f"{stem}.ticket" for stem in stems}
    for result in metrics.networks[0].results:
        for seed in result.seeds:
            assert (path / str(seed.onnx)).is_file() and (path / str(seed.ticket)).is_dir()
            assert (path / str(seed.onnx)).stat().st_size == seed.onnx_bytes
    assert not list(path.rglob(".tmp-*"))


def test_counts_are_exact_and_masks_nested(finished: Finished) -> None:
    path, metrics, _ = finished
    assert [entry.active_params for entry in metrics.networks[0].rounds] == ALIVE
    for seed in TINY.seeds:
        rounds = sorted((path / "rounds" / "lenet_300_100" / f"seed_{seed}").glob("round_*"))
        masks = [load_ticket(entry / "round.ticket").masks for entry in rounds]
        for before, after in zip(masks, masks[1:], strict=False):
            assert all(bool((after[name] <= before[name]).all()) for name in after)
    dense, pruned, rigl = metrics.networks[0].results
    assert (dense.sparsity, dense.alive) == (0, 50_610)
    assert pruned.alive == rigl.alive == 25_100 + 410  # biases stay
    assert pruned.sparsity == rigl.sparsity == 0.5
    assert (pruned.macs_dense, pruned.macs_effective) == (50_200, 25_100)
    assert [seed.steps for seed in pruned.seeds] == [5 * 17] * 2 and [seed.steps for seed in rigl.seeds] == [34] * 2


def test_onnx_files_hold_the_accuracy_of_the_table(finished: Finished) -> None:
    path, metrics, _ = finished
    test = digits().test
    for result in metrics.networks[0].results:
        for seed in result.seeds:
            session = onnxruntime.InferenceSession(str(path / str(seed.onnx)), providers=["CPUExecutionProvider"])
            (logits,) = session.run(None, {session.get_inputs()[0].name: test.inputs.numpy()})
            accuracy = float(np.mean(logits.argmax(1) == test.labels.numpy()))
            assert accuracy == pytest.approx(seed.test_accuracy, abs=1e-12)
            assert seed.worst_difference is not None and 0 < seed.worst_difference < 1e-4


def test_rigl_differs_from_the_ticket_and_both_learn(finished: Finished) -> None:
    path, metrics, _ = finished
    tickets = [load_ticket(path / "tickets" / f"lenet_300_100-{m}-seed0.ticket") for m in ("imp", "rigl")]
    assert not torch.equal(tickets[0].masks["fc1.weight"], tickets[1].masks["fc1.weight"])
    for name, tensor in tickets[0].weights.items():
        assert torch.equal(tensor, tickets[1].weights[name]), "both start from the same initialisation"
    assert all(seed.test_accuracy > 0.6 for result in metrics.networks[0].results for seed in result.seeds)


def test_the_table_says_what_was_measured(finished: Finished) -> None:
    path, metrics, output = finished
    assert "\x1b" not in output  # no terminal: no escape codes, no bars
    for word in ("dense", "IMP", "RigL", "50.0%", "25,510", "100k→50.2k", str(path / "report.html"), "done in"):
        assert word in output
    _, pruned, _ = metrics.networks[0].results
    if any(note.startswith("not faster") for note in pruned.notes):
        assert "dense kernels" in output
    assert "IMP took 85 training steps a seed" in output and "RigL took 34 training steps a seed" in output
    assert "± standard deviation over 2 seeds" in output


def test_a_second_run_trains_and_exports_nothing(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    path, metrics, _ = finished
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*.onnx")}

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("finished work was done again")

    monkeypatch.setattr("fxsparse.demo.train.fit", forbidden)
    monkeypatch.setattr("fxsparse.lottery.rounds.fit", forbidden)
    monkeypatch.setattr("fxsparse.demo.exports.export_onnx", forbidden)
    assert run_demo(TINY, path.parent, screen()) == path
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*.onnx")} == before
    assert read_metrics(path / "metrics.json").networks == metrics.networks


def test_a_damaged_export_is_made_again(finished: Finished) -> None:
    path, _, _ = finished
    target = path / "onnx" / "lenet_300_100-imp-seed1.onnx"
    target.write_bytes(target.read_bytes()[:-1] + b"?")
    run_demo(TINY, path.parent, screen())
    onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    record = json.loads(target.with_suffix(".json").read_text())
    assert record["bytes"] == target.stat().st_size


def test_killed_and_started_again_the_tickets_are_the_same(finished: Finished, tmp_path: Path) -> None:
    path, metrics, _ = finished
    code = (
        "from pathlib import Path; from dataclasses import replace; from rich.console import Console\n"
        "from fxsparse.demo import *\n"
        "s = DemoSettings(seeds=(0,), sparsity='0.5', epochs=1, rigl_epochs=2, rigl_every=5,\n"
        "    networks=NETWORKS[:1], wide=None)\n"
        f"run_demo(s, Path({str(tmp_path)!r}), Console(quiet=True))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("demo-*/rounds/*/seed_0/round_002")) and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    with pytest.warns(RuntimeWarning, match="taken over"):
        again = run_demo(replace(TINY, seeds=(0,)), tmp_path, screen())
    assert again.name == path.name
    found = read_metrics(again / "metrics.json").networks[0]
    ids = [[seed.ticket_id for seed in entry.seeds if seed.seed == 0] for entry in metrics.networks[0].rounds]
    assert [[seed.ticket_id for seed in entry.seeds] for entry in found.rounds] == ids
    for ours, theirs in zip(found.results, metrics.networks[0].results, strict=True):
        assert ours.seeds[0].test_accuracy == theirs.seeds[0].test_accuracy


def test_two_runs_do_not_share_a_directory(finished: Finished) -> None:
    path, _, _ = finished
    assert TINY.describe() != replace(TINY, rate="0.3").describe()
    from fxsparse.lottery import RunDirectory

    with (
        RunDirectory.open(path.parent, "demo", TINY.describe(), digits().fingerprint),
        pytest.raises(ConfigError, match="in use"),
    ):
        run_demo(TINY, path.parent, screen())


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_seeds_must_be_distinct(seeds: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="`seeds`"):
        DemoSettings(seeds=seeds)


def test_threads_are_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), run_module.one_thread():
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def test_the_display_shows_rounds_steps_loss_and_time_left() -> None:
    console = Console(file=io.StringIO(), width=110, force_terminal=True, color_system=None)
    now = [1000.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxsparse.demo.progress.time.monotonic", lambda: now[0])
        with Display(console, work=100) as display:
            display.begin("LeNet-300-100, seed 1", 255, "round 3/11")
            display.advance(40, fresh=False)  # found done: no measure of the pace
            now[0] += 30
            display.advance(20)
            display.update(102, "round 3/11  step 102/255  loss 0.123")
            display.line("a finished line")
            display._live.refresh()
    output = console.file.getvalue()  # type: ignore[attr-defined]
    for word in ("LeNet-300-100, seed 1", "round 3/11  step 102/255  loss 0.123", "60 %", "a finished line"):
        assert word in output
    assert "0:30 · about 1:00 left" in output  # 20 units in 30 s, 40 remain


@pytest.mark.slow
def test_both_networks_end_to_end(tmp_path: Path) -> None:
    settings = replace(TINY, seeds=(0,), networks=NETWORKS)
    path = run_demo(settings, tmp_path, screen())
    metrics = read_metrics(path / "metrics.json")
    assert [network.name for network in metrics.networks] == ["lenet_300_100", "small_conv_net"]
    assert metrics.networks[1].rounds[-1].active_params == 14_536  # half of 29,072
