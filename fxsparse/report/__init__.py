"""From the numbers of a run to a table and a self-contained page."""

from __future__ import annotations

from fxsparse.report.metrics import Metrics as Metrics
from fxsparse.report.metrics import read_metrics as read_metrics
from fxsparse.report.metrics import write_metrics as write_metrics
from fxsparse.report.page import render_page as render_page
from fxsparse.report.page import write_report as write_report
from fxsparse.report.statistics import Summary as Summary
from fxsparse.report.statistics import summarise as summarise
from fxsparse.report.table import markdown_table as markdown_table
from fxsparse.report.table import terminal_table as terminal_table
