"""The autotuner measures layers alone, keeps what is best, and says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError, ExportError
from fxsparse.exporters import Int8, Optimize, Target, Verification, autotune, candidates, export_onnx
from fxsparse.exporters.autotune import Choice, Tuner
from fxsparse.exporters.autotune_micro import Micro, arrays_of, micro_of, seen_inputs
from fxsparse.exporters.finish import micro_quantizer
from fxsparse.passes.lower_shared_support import Form, lower_shared_support
from fxsparse.planning import finalize, transform
from fxsparse.sparsity import SharedSupport

QUICK = Verification(batch_sizes=(1, 3), draws=2)


@pytest.fixture(autouse=True)
def _layers_are_exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of single layers are those of the library, made once for all tests."""
    true = Micro.export

    def cached(self: Micro, module: nn.Module) -> bytes:
        state = sum(float(tensor.double().square().sum()) for tensor in module.state_dict().values())
        key = (self.key, str(module), getattr(module, "code", ""), state)
        if key not in FILES:
            FILES[key] = true(self, module)
        return FILES[key]

    monkeypatch.setattr(Micro, "export", cached)


FILES: dict[Any, bytes] = {}


def model() -> nn.Module:
    """Two layers of one shape, a third of another, a dense one."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, 4),
    )
    return transform(net, (torch.randn(2, 256),), sparsity=0.75, pattern=SharedSupport(32), exclude="6").eval()


X = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))


def run(net: nn.Module) -> Any:
    return net(X)


def fake_times(times: Mapping[str, float]) -> Any:
    """In place of the clock: milliseconds by the name of a form."""

    def measured(sessions: Mapping[str, Any], feed: Mapping[str, Any], seconds: float = 0.5) -> Any:
        assert seconds > 0
        for session in sessions.values():
            session.run(None, feed)
        return {name: times[name] for name in sessions}, 7

    return measured


TIMES = {
    "dense": 1.0,
    "gather + batched product": 0.5,
    "gather + grouped convolution": 0.25,
    "dense, int8": 0.2,
    "gather + batched product, int8": 0.4,
    "gather + grouped convolution, int8": 0.125,
}


def tune(tuner: Tuner) -> dict[str, Choice]:
    plain = finalize(model())
    records = lower_shared_support(plain, (X,)).records
    return tuner.choose(plain, run, records)


def test_the_fastest_form_wins_and_equal_layers_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting(sessions: Mapping[str, Any], feed: Any, seconds: float = 0.5) -> Any:
        calls.append(len(sessions))
        return fake_times(TIMES)(sessions, feed, seconds)

    monkeypatch.setattr(autotune, "measure", counting)
    found = tune(Tuner(Optimize.LATENCY))
    assert {name: choice.form for name, choice in found.items() if name != "6.weight"} == dict.fromkeys(
        ("0.weight", "2.weight", "4.weight"), Form.GATHER_CONV
    )
    assert all(found[n].gain == 4.0 and found[n].int8 is None for n in ("0.weight", "4.weight"))
    assert "dense 1.0000 ms" in found["0.weight"].reason and "medians of 7" in found["0.weight"].reason
    assert len(calls) == 2 and all(count == 3 for count in calls)  # two shapes, three forms each


def test_a_layer_that_gains_nothing_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {**TIMES, "gather + batched product": 0.99, "gather + grouped convolution": 0.97}
    monkeypatch.setattr(autotune, "measure", fake_times(slow))
    found = tune(Tuner(Optimize.LATENCY))["0.weight"]
    assert found.form is Form.DENSE and found.gain == 1.0
    assert found.reason.startswith("no speed-up expected: measured alone: dense 1.0000 ms")


def test_precision_is_a_choice_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    twin = micro_quantizer(Target.INT8, Int8(), tmp_path)
    monkeypatch.setattr(autotune, "measure", fake_times(TIMES))
    found = tune(Tuner(Optimize.LATENCY, quantize=twin))
    assert (found["0.weight"].form, found["0.weight"].int8, found["0.weight"].gain) == (Form.GATHER_CONV, True, 8.0)
    assert (found["6.weight"].form, found["6.weight"].int8) == (Form.DENSE, True)  # no sparse layer, but 8 bits help it
    assert found["0.weight"].gain_of(Form.GATHER_CONV, False) == 4.0
    slow = {name: ms * (9 if name.endswith("int8") else 1) for name, ms in TIMES.items()}
    monkeypatch.setattr(autotune, "measure", fake_times(slow))
    found = tune(Tuner(Optimize.LATENCY, quantize=twin))
    assert (found["0.weight"].form, found["0.weight"].int8) == (Form.GATHER_CONV, False)
    assert (found["6.weight"].form, found["6.weight"].int8) == (Form.DENSE, False)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_is_timed_with_its_bias_where_the_file_will_have_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: set[bool] = set()

    def lowered(*given: Any, bias_inside: bool = True, **options: Any) -> Any:
        asked.add(bias_inside)
        return lower_shared_support(*given, bias_inside=bias_inside, **options)

    monkeypatch.setattr(autotune, "lower_shared_support", lowered)
    monkeypatch.setattr(autotune, "measure", fake_times(TIMES))
    tune(Tuner(Optimize.LATENCY))
    assert asked == {True}
    asked.clear()
    tune(Tuner(Optimize.LATENCY, quantize=micro_quantizer(Target.INT8, Int8(), tmp_path)))
    assert asked == {False}


def test_size_needs_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing to time")

    monkeypatch.setattr(autotune, "measure", never)
    found = tune(Tuner(Optimize.SIZE))["0.weight"]
    assert found.form is not Form.DENSE and found.gain is not None and 3 < found.gain < 4.5 and "bytes" in found.reason


def test_a_spent_budget_falls_back_to_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "measure", fake_times(TIMES))
    found = tune(Tuner(Optimize.LATENCY, budget=1e-9))
    measured = [choice for choice in found.values() if choice.gain is not None]
    left = [choice for choice in found.values() if choice.gain is None]
    assert len(measured) == 2 and len(left) == 1  # one shape fits before the clock is read
    assert "not measured, the budget of 1e-09 s was spent; by rule: " in left[0].reason


@pytest.mark.parametrize("budget", [0, -1.0, float("nan"), float("inf"), True, "60"])
def test_budgets_that_are_none(budget: Any) -> None:
    with pytest.raises(ConfigError, match="`budget`"):
        Tuner(Optimize.LATENCY, budget)


def test_a_micro_model_is_the_layer() -> None:
    plain = finalize(model())
    seen = seen_inputs(plain, run, ["2.weight", "nothing.weight", "2.bias"])
    assert set(seen) == {"2.weight"}
    first, second = (plain.get_submodule(path) for path in ("0", "2"))
    torch.testing.assert_close(seen["2.weight"], first(X).relu())
    micro = micro_of(plain, "2.weight", seen["2.weight"])
    assert micro is not None
    session = onnxruntime.InferenceSession(micro.export(micro.module), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, dict(arrays_of(micro.example)))
    np.testing.assert_allclose(found, second(first(X).relu()).detach().numpy(), atol=1e-5)
    assert micro_of(plain, "2.bias", X) is None


def check_equal(path: Path, net: nn.Module) -> None:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(5, 256)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, net(x).detach().numpy(), atol=1e-5)


def test_the_fastest_whole_file_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The clock for layers says lower, the clock for files says no: files decide."""
    monkeypatch.setattr(autotune, "measure", fake_times(TIMES))

    def files(sessions: Mapping[str, Any], feed: Any, seconds: float = 0.5) -> Any:
        assert len(sessions) == 2
        return {name: 1.0 + int(name) for name in sessions}, 5  # the first, which is the model as it is

    monkeypatch.setattr(candidates, "measure", files)
    net, path = model(), tmp_path / "m.onnx"
    report = export_onnx(net, path, (X,), optimize=Optimize.LATENCY, compact=False, verify=QUICK, latency=False)
    check_equal(path, net)
    note = next(note for note in report.notes if note.startswith("tuned for latency, whole files: "))
    said = dict(part.rsplit(" ", 2)[:2] for part in note.split("files: ")[1].split(", "))
    assert report.variant == min(said, key=lambda label: float(said[label])) and set(said) == {"as it is", "lowered"}
    wins = report.variant == "as it is"
    assert all((row.form == "dense") == wins for row in report.forms)
    assert all(("the whole file is better" in row.reason) == wins for row in report.forms)


def test_really_tuned(tmp_path: Path) -> None:
    """With the real clock: whatever wins is right, and every layer has a measured row."""
    torch.manual_seed(0)
    net = transform(nn.Sequential(nn.Linear(256, 256)), (X,), sparsity=0.75, pattern=SharedSupport(32)).eval()
    path = tmp_path / "m.onnx"
    report = export_onnx(net, path, (X,), optimize=Optimize.LATENCY, budget=20, verify=QUICK)
    check_equal(path, net)
    assert all(row.measured and "measured alone" in row.reason for row in report.forms)
    assert report.latency is not None


def test_a_layer_that_torch_cannot_export_alone_is_left_to_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise ExportError("no")

    monkeypatch.setattr("fxsparse.exporters.autotune_micro.Micro.export", refuse)
    found = tune(Tuner(Optimize.LATENCY))
    assert all("not measured, it does not run alone: ExportError: no" in choice.reason for choice in found.values())


def test_a_weight_of_no_plain_layer_is_left_to_the_rule() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 256))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight)

    net = finalize(transform(Functional(), (X,), sparsity=0.75, pattern=SharedSupport(32)).eval())
    records = lower_shared_support(net, (X,)).records
    found = Tuner(Optimize.LATENCY).choose(net, run, records)
    assert all("cannot be taken out of the model alone" in choice.reason for choice in found.values()) and found
