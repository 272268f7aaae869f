"""Trained sparse models -> files that other runtimes read, verified against PyTorch."""

from __future__ import annotations

from fxsparse.exporters.contents import Contents as Contents
from fxsparse.exporters.contents import read_contents as read_contents
from fxsparse.exporters.latency import Latency as Latency
from fxsparse.exporters.latency import measure as measure
from fxsparse.exporters.metadata import Layer as Layer
from fxsparse.exporters.metadata import read_metadata as read_metadata
from fxsparse.exporters.onnx import export_onnx as export_onnx
from fxsparse.exporters.reference import Verification as Verification
from fxsparse.exporters.report import Exporter as Exporter
from fxsparse.exporters.report import ExportReport as ExportReport
from fxsparse.exporters.report import Target as Target
from fxsparse.exporters.verify import Parity as Parity
