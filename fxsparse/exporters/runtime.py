"""Sessions of onnxruntime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fxsparse.errors import ExportError
from fxsparse.exporters.inputs import first_line


def open_session(model: Path | bytes, threads: int = 1) -> Any:
    """An `onnxruntime.InferenceSession` with `threads` threads, sequential, all graph optimisations on.

    Raises:
        ExportError: when onnxruntime refuses the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    source = str(model) if isinstance(model, Path) else model
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} refuses the model ({first_line(error)}): "
            "cast the model to float32, try another `opset`, or a newer onnxruntime"
        ) from error
