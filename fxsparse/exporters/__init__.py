"""Trained sparse models -> files that other runtimes read, verified against PyTorch."""

from __future__ import annotations

from fxsparse.exporters.against import FileVerdict as FileVerdict
from fxsparse.exporters.against import verify_file as verify_file
from fxsparse.exporters.agreement import Agreement as Agreement
from fxsparse.exporters.axes import Axes as Axes
from fxsparse.exporters.bench import BenchReport as BenchReport
from fxsparse.exporters.bench import bench_files as bench_files
from fxsparse.exporters.contents import Contents as Contents
from fxsparse.exporters.contents import read_contents as read_contents
from fxsparse.exporters.file_optimize import optimize_file as optimize_file
from fxsparse.exporters.file_report import FileReport as FileReport
from fxsparse.exporters.forms import LayerForm as LayerForm
from fxsparse.exporters.latency import Latency as Latency
from fxsparse.exporters.latency import measure as measure
from fxsparse.exporters.metadata import Layer as Layer
from fxsparse.exporters.metadata import read_metadata as read_metadata
from fxsparse.exporters.onnx import export_onnx as export_onnx
from fxsparse.exporters.quantize import Quantized as Quantized
from fxsparse.exporters.reference import Verification as Verification
from fxsparse.exporters.report import Exporter as Exporter
from fxsparse.exporters.report import ExportReport as ExportReport
from fxsparse.exporters.targets import Calibrate as Calibrate
from fxsparse.exporters.targets import Dynamic as Dynamic
from fxsparse.exporters.targets import Int8 as Int8
from fxsparse.exporters.targets import Optimize as Optimize
from fxsparse.exporters.targets import Target as Target
from fxsparse.exporters.verify import Parity as Parity
