"""Every failure of an export is an ExportError with the mend, and leaves no file."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse.errors import ConfigError, ExportError
from fxsparse.exporters import Exporter, Verification, export_onnx
from fxsparse.nn import Linear, Resurrection, masked_weights
from fxsparse.planning import transform
from fxsparse.sparsity import Unstructured

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.linear(x)


class ExportBranch(Base):
    """A thousandth off when exported."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (1.001 if torch.compiler.is_exporting() else 1.0)


class ValueBranch(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else -self.linear(x)


class AlwaysDropout(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), 0.5, training=True)


class Counter(Base):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * self.calls


class NoOutput(Base):
    def forward(self, x: Tensor) -> Any:
        return [None]


class NaNOutput(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * float("nan")


class NoKernel(Base):
    def forward(self, x: Tensor) -> Any:
        return torch.linalg.svd(self.linear(x))[1]


class Half(Base):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.bfloat16()).float()


def with_nan() -> nn.Module:
    model = Base()
    model.linear.weight.data[1, 2] = float("nan")
    return model


def resurrecting() -> nn.Module:
    model = nn.Sequential(Linear(4, 3, pattern=Unstructured(), mask=torch.rand(3, 4) > 0.5))
    Resurrection(masked_weights(model)["0.weight"]).enter()
    return model


FAILURES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "branch on a value": (ValueBranch, r"cannot export this model.*data-dependent"),
    "dropout that is always on": (AlwaysDropout, r"differs between two equal calls"),
    "state": (Counter, r"differs between two equal calls"),
    "no output": (NoOutput, r"returns no tensor"),
    "NaN output": (NaNOutput, r"never finite"),
    "operator without a translation": (NoKernel, r"cannot export this model"),
    "bfloat16": (Half, r"bfloat16.*cast both to float32"),
    "NaN weight": (with_nan, r"`linear\.weight` holds NaN"),
    "open resurrection": (resurrecting, r"`0` cannot be exported: .*commit or discard"),
}


def test_torchs_log_of_the_tracer_stays_off_and_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An export by torch's own legacy exporter leaves it on; ours prints nothing all the same."""
    make, message = FAILURES["operator without a translation"]
    torch._C._jit_set_onnx_log_enabled(True)
    try:
        with pytest.raises(ExportError, match=message):
            export_onnx(make(), tmp_path / "m.onnx", (X,), latency=False)
        assert torch._C._jit_is_onnx_log_enabled()
    finally:
        torch._C._jit_set_onnx_log_enabled(False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", FAILURES)
def test_a_model_that_cannot_be_exported_leaves_no_file(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, message = FAILURES[name]
    torch.manual_seed(0)
    with pytest.raises(ExportError, match=message):
        export_onnx(make(), tmp_path / "m.onnx", (X,), latency=False)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_model_that_is_another_when_exported_is_traced_instead(tmp_path: Path) -> None:
    model = ExportBranch()
    report = export_onnx(model, tmp_path / "m.onnx", (X,), latency=False)
    assert report.exporter is Exporter.TRACE and report.worst_relative is not None and report.worst_relative < 1e-5


def test_without_verification_the_wrong_file_would_have_been_written(tmp_path: Path) -> None:
    report = export_onnx(ExportBranch(), tmp_path / "m.onnx", (X,), verify=False, latency=False)
    assert report.verification is None and report.worst_absolute is None and (tmp_path / "m.onnx").exists()
    assert "verified    no" in str(report)


@pytest.mark.parametrize("opset", [0, 9, 17, 99])
def test_an_opset_out_of_range_is_refused(opset: int, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"`opset` \(={opset}\) is too (old|new): .* 18 to \d+"):
        export_onnx(Base(), tmp_path / "m.onnx", (X,), opset=opset)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [18, 21, 23])
def test_an_opset_in_range_is_reached(opset: int, tmp_path: Path) -> None:
    assert export_onnx(Base(), tmp_path / "m.onnx", (X,), opset=opset, latency=False).opset == opset


def test_an_old_file_survives_a_failure_and_yields_to_a_success(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ExportError):
        export_onnx(NoKernel(), path, (X,), latency=False)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    export_onnx(Base(), path, (X,), latency=False)
    assert path.read_bytes() != b"old" and list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_no_file(tmp_path: Path) -> None:
    class Interrupted(Base):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_onnx(Interrupted(), tmp_path / "m.onnx", (X,))
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "m.onnx", tmp_path / "missing" / "m.onnx", Path("/proc/m.onnx")):
        with pytest.raises(ExportError, match=r"cannot be written .*choose a writable directory"):
            export_onnx(Base(), path, (X,))
    with pytest.raises(ExportError, match="is a directory"):
        export_onnx(Base(), tmp_path, (X,))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    """The limit on file sizes stands in for the disk: the write stops in the middle of the file."""
    code = f"""
        import resource, signal, sys
        from pathlib import Path
        import torch
        from torch import nn
        from fxsparse.errors import ExportError
        from fxsparse.exporters import export_onnx
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        folder = Path({str(tmp_path)!r})
        try:
            export_onnx(nn.Linear(100, 100), folder / "m.onnx", (torch.randn(2, 100),))
        except ExportError as error:
            print(error)
        print(sorted(folder.iterdir()))
        export_onnx(nn.Linear(10, 10), folder / "m.onnx", (torch.randn(2, 10),), latency=False)
        print([p.name for p in folder.iterdir()])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    message, left, after = done.stdout.strip().splitlines()
    assert "could not be written (File too large): make room" in message
    assert left == "[]" and after == "['m.onnx']"


def test_inputs_that_do_not_fit(tmp_path: Path) -> None:
    cases: list[tuple[Any, type[Exception], str]] = [
        ((torch.randn(2, 5),), ExportError, r"the model fails on `example_inputs` \(RuntimeError: mat1 and mat2"),
        ((), ExportError, r"holds no tensor"),
        (X, ConfigError, r"`example_inputs` \(=Tensor\) must be a tuple"),
        ((torch.randn(0, 4),), ConfigError, r"batch of size 0"),
    ]
    for example, kind, message in cases:
        with pytest.raises(kind, match=message):
            export_onnx(Base(), tmp_path / "m.onnx", example)
    assert list(tmp_path.iterdir()) == []


def test_options_of_the_wrong_form(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`target` \(='stock'\) must be one of Target.STOCK"):
        export_onnx(Base(), tmp_path / "m.onnx", (X,), target="stock")  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(ConfigError, match=r"`verify` \(='yes'\)"):
        export_onnx(Base(), tmp_path / "m.onnx", (X,), verify="yes")  # type: ignore[arg-type]  # the point of the test
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"batch_sizes": ()}, {"batch_sizes": (0,)}, {"draws": 0}, {"tolerance": 1.0}])
def test_verification_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"`{next(iter(options))}`"):
        Verification(**options)


def test_a_stated_tolerance_decides(tmp_path: Path) -> None:
    loose = Verification(batch_sizes=(3,), draws=2, tolerance=0.01)
    report = export_onnx(ExportBranch(), tmp_path / "m.onnx", (X,), verify=loose, latency=False)
    assert report.verification is not None
    assert report.verification.worst_relative == pytest.approx(1e-3, rel=1e-2)
    assert report.verification.batch_sizes == (3,) and report.verification.samples == 6
    (tmp_path / "m.onnx").unlink()
    with pytest.raises(ExportError, match="allowed is 0"):
        export_onnx(transform(Base(), sparsity=0.5), tmp_path / "m.onnx", (X,), verify=Verification(tolerance=0.0))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`model` \(=int\) must be a torch.nn.Module"):
        export_onnx(3, tmp_path / "a.onnx", (torch.randn(2, 3),))
    assert not list(tmp_path.iterdir())
