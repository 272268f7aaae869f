"""The wide network on a small scale: stages, files that hold what the record says, and resumption."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from rich.console import Console

from fxsparse.data import digits
from fxsparse.demo import NETWORKS, DemoSettings, run_demo
from fxsparse.demo.progress import Display
from fxsparse.demo.run import one_thread
from fxsparse.demo.settings import DemoNetwork, WideSettings
from fxsparse.demo.train import Place
from fxsparse.demo.wide import train_wide
from fxsparse.demo.wide_files import NAMES
from fxsparse.lottery import load_ticket
from fxsparse.models import mlp
from fxsparse.report import Metrics, read_metrics
from fxsparse.report.metrics import Network
from fxsparse.sparsity import SharedSupport
from fxsparse.sparsity.grouping import support_order

ARGUMENTS = {"hidden": [96, 64]}
SMALL = WideSettings(
    network=DemoNetwork(
        "mlp", "Small MLP", partial(mlp, **ARGUMENTS), 1.0, ARGUMENTS, ("hidden.0.weight", "output.weight")
    ),
    group=16,
    sparsity="0.75",
    epochs=4,
    prune_epochs=4,
    tune_epochs=2,
    batches=(1, 8),
)
TINY = DemoSettings(
    seeds=(0, 1), sparsity="0.5", rate="0.5", epochs=1, rigl_epochs=1, rigl_every=5, networks=NETWORKS[:1], wide=SMALL
)
Finished = tuple[Path, Metrics, str]


def screen() -> Console:
    return Console(file=io.StringIO(), width=120)


@pytest.fixture(scope="module", autouse=True)
def the_wide_network_alone() -> Iterator[None]:
    """The other networks have tests of their own: here a record stands for them."""
    seed = {"seed": 0, "val_accuracy": 0.9, "test_accuracy": 0.9, "steps": 1}
    counts = {"alive": 1, "parameters": 1, "macs_dense": 1, "macs_effective": 1}
    result = {"method": "dense", "sparsity": 0.0, "seeds": [seed], **counts}
    other = Network.model_validate({"name": "other", "title": "Other", "rounds": [], "results": [result]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxsparse.demo.run._network", lambda _: other)
        patch.setattr("fxsparse.demo.wide_files.SECONDS", 0.05)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, the_wide_network_alone: None) -> Finished:
    console = screen()
    path = run_demo(TINY, tmp_path_factory.mktemp("runs"), console)
    return path, read_metrics(path / "metrics.json"), console.file.getvalue()  # type: ignore[attr-defined]


def test_the_tickets_hold_shared_supports(finished: Finished) -> None:
    path, metrics, _ = finished
    speed = metrics.speed
    assert speed is not None and speed.seeds == [0, 1] and speed.group == 16
    for place, seed in enumerate(speed.seeds):
        ticket = load_ticket(path / "tickets" / f"mlp-shared16-seed{seed}.ticket")
        assert list(ticket.masks) == ["hidden.1.weight"] and ticket.lineage["method"] == "regroup"
        mask = ticket.masks["hidden.1.weight"]
        SharedSupport(16).check(mask, row_order=support_order(mask, 16))
        assert abs(ticket.sparsity - 0.75) < 0.01
        parent = load_ticket(path / "wide" / "mlp" / f"seed_{seed}" / "unstructured.ticket")
        assert ticket.lineage["parent"] == parent.ticket_id
        assert parent.masks["hidden.1.weight"].sum() == 96 * 64 // 4
        stages = {stage.name: stage.val_accuracy[place] for stage in speed.stages}
        assert list(stages) == ["dense", "unstructured", "magnitude", "compensated", "fine-tuned"]
        assert {name: stages[name] for name in ticket.metrics["stages"]} == ticket.metrics["stages"]
        assert stages["fine-tuned"] > 0.6


def test_the_files_hold_what_the_record_says(finished: Finished) -> None:
    path, metrics, _ = finished
    speed, test = metrics.speed, digits().test
    assert speed is not None and [file.name for file in speed.files] == list(NAMES)
    found = {}
    for file in speed.files:
        assert (path / file.onnx).stat().st_size == file.bytes
        session = onnxruntime.InferenceSession(str(path / file.onnx), providers=["CPUExecutionProvider"])
        (found[file.name],) = session.run(None, {session.get_inputs()[0].name: test.inputs.numpy()})
        assert file.test_accuracy == float(np.mean(found[file.name].argmax(1) == test.labels.numpy()))
        assert sorted(file.latency_ms) == [1, 8] and all(value > 0 for value in file.latency_ms.values())
    assert speed.files[0].test_accuracy == pytest.approx(speed.dense_test[0], abs=1e-12)
    assert speed.files[1].test_accuracy == pytest.approx(speed.ticket_test[0], abs=1e-12)
    ticket = load_ticket(path / "tickets" / "mlp-shared16-seed0.ticket")
    with torch.no_grad():
        expected = ticket.apply(mlp(**ARGUMENTS), final=True).eval()(test.inputs)
    torch.testing.assert_close(torch.from_numpy(found["ticket float"]), expected, rtol=1e-4, atol=1e-4)
    assert [layer.name for layer in speed.layers] == ["hidden.1.weight"] and speed.layers[0].reason


def test_the_terminal_and_the_page_show_it(finished: Finished) -> None:
    path, metrics, output = finished
    page = (path / "report.html").read_text(encoding="utf-8")
    for word in ("Small MLP, 75 % in shared supports of 16 rows", "dense int8", "ticket int8", "hidden.1.weight"):
        assert word in output and word in page
    assert 'id="speed"' in page and "compensated" in output
    assert "GMP to 75 %" in metrics.settings["wide network"]


def test_a_second_run_trains_exports_and_times_nothing(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    path, metrics, _ = finished

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("finished work was done again")

    for place in ("wide.fit", "wide.regroup_ticket", "wide_files.export_onnx", "wide_files.bench_files"):
        monkeypatch.setattr(f"fxsparse.demo.{place}", forbidden)
    assert run_demo(TINY, path.parent, screen()) == path
    assert read_metrics(path / "metrics.json").speed == metrics.speed


def test_damaged_files_are_made_again(finished: Finished) -> None:
    path, metrics, _ = finished
    target = path / "onnx" / "mlp-ticket-int8.onnx"
    target.write_bytes(target.read_bytes()[:-1] + b"?")
    run_demo(TINY, path.parent, screen())
    onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    record = json.loads((path / "onnx" / "mlp-speed.json").read_text())
    assert [entry["name"] for entry in record["files"]] == list(NAMES)


def test_a_seed_alone_gives_the_same_ticket(finished: Finished, tmp_path: Path) -> None:
    path, _, _ = finished
    with one_thread(), Display(screen(), 1.0) as display:
        alone = train_wide(Place(TINY, SMALL.network, digits(), tmp_path, display), SMALL, 1)
    ids = {load_ticket(where / "tickets" / "mlp-shared16-seed1.ticket").ticket_id for where in (path, tmp_path)}
    assert ids == {alone.shared.ticket_id}


def test_the_settings_name_the_run() -> None:
    assert replace(TINY, wide=None).describe() != TINY.describe()
    assert replace(TINY, wide=replace(SMALL, group=32)).describe() != TINY.describe()
    assert "wide" not in replace(TINY, wide=None).describe()
