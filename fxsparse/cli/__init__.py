"""The command line: `fxsparse demo`, `imp`, `transform-report`, `show`, `export`, `zoo`."""

from __future__ import annotations

from fxsparse.cli.app import main as main
