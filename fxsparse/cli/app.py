"""The command group. Command files import the library inside their functions, so `--help` stays quick."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from fxsparse.cli.bench import bench
from fxsparse.cli.compare import compare
from fxsparse.cli.demo import demo
from fxsparse.cli.errors import OTHER, exit_code, one_line
from fxsparse.cli.export import export
from fxsparse.cli.imp import imp
from fxsparse.cli.optimize import optimize
from fxsparse.cli.regroup import regroup
from fxsparse.cli.show import show
from fxsparse.cli.transform_report import transform_report
from fxsparse.cli.verify import verify
from fxsparse.cli.zoo import zoo

TRACEBACK = "FXSPARSE_TRACEBACK"

app = typer.Typer(
    name="fxsparse",
    help="Make neural networks sparse, and cash the sparsity in.",
    epilog="Exit codes: 0 done, 2 usage or configuration, 3 data or ticket, 4 verification or export, 1 other.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _name, _command in (
    ("demo", demo),
    ("imp", imp),
    ("compare", compare),
    ("transform-report", transform_report),
    ("show", show),
    ("regroup", regroup),
    ("export", export),
    ("verify", verify),
    ("bench", bench),
    ("optimize", optimize),
    ("zoo", zoo),
):
    app.command(_name)(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("fxsparse"))
        raise typer.Exit


@app.callback()
def _group(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make neural networks sparse, and cash the sparsity in."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code; `arguments` default to those of the process.

    An error ends in one line on stderr, a warning is one line; FXSPARSE_TRACEBACK=1 shows both as Python does.
    """
    if os.environ.get(TRACEBACK):
        app(args=arguments)
        return
    try:
        with _one_line_warnings():
            app(args=arguments)
    except Exception as error:  # the outermost frame: whatever happened becomes one line and an exit code
        code = exit_code(error)
        hint = f" (set {TRACEBACK}=1 for the traceback)" if code == OTHER else ""
        print(f"fxsparse: error: {one_line(error)}{hint}", file=sys.stderr)
        raise SystemExit(code) from None


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"fxsparse: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
