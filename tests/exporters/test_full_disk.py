"""A disk that fills up, wherever in the export: a typed error, nothing half written, what stood there stays."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

_CODE = """
    import resource, signal, sys
    from pathlib import Path
    import torch
    from torch import nn
    from fxsparse.errors import ExportError
    from fxsparse.exporters import Target, Verification, export_onnx

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 8)).eval()  # 1.4 MB in one tensor
    data = torch.randn(4, 600)
    folder, limit, options = Path(sys.argv[1]), int(sys.argv[2]), eval(sys.argv[3])
    options = {"verify": Verification(batch_sizes=(1, 2), draws=2), "latency": False, **options}
    old = folder / "m.onnx"
    old.write_bytes(b"what stood there")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        export_onnx(model, old, (data,), **options)
        print("written")
    except ExportError as error:
        print(str(error).replace(chr(10), " "))
    print([path.name for path in sorted(folder.iterdir())], old.read_bytes()[:16])
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    export_onnx(model, old, (data,), **options)
    print(len([path.name for path in folder.iterdir()]), old.stat().st_size > 1000)
"""


@pytest.mark.parametrize(
    ("limit", "options", "files"),
    [
        (1_000_000, "{}", 1),  # in the middle of a tensor that is written by itself
        (1_000_000, "{'external_data': True}", 2),
        (1_000_000, "{'sparse_initializers': True}", 1),
        (300_000, "{'target': Target.INT8, 'calibration': [(data,)]}", 1),
        (1_475_000, "{'target': Target.INT8, 'calibration': [(data,)]}", 1),  # the float file fits, more does not
    ],
    ids=["one file", "external data", "sparse", "8-bit", "8-bit, late"],
)
def test_a_full_disk(limit: int, options: str, files: int, tmp_path: Path) -> None:
    """The limit on file sizes stands in for the disk."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(_CODE), str(tmp_path), str(limit), options],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said, left, after = done.stdout.strip().splitlines()[-3:]
    if said != "written":
        assert "make room" in said or "File too large" in said or "cannot" in said
        assert left == "['m.onnx'] b'what stood there'"
    else:
        assert limit > 1_450_000
    assert after == f"{files} True"
