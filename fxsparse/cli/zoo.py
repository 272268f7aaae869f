"""`fxsparse zoo`: a list of models through every stage, as a matrix."""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from fxsparse.zoo.records import EntryResult
    from fxsparse.zoo.runner import Settings


def zoo(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A folder with a zoo.json, or such a file.")],
    only: Annotated[list[str] | None, typer.Option(help="Only entries with this name or glob; repeatable.")] = None,
    stages: Annotated[
        str | None, typer.Option(help="transform,train,reload,half,batch,compile,onnx,compact; all by default.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes at a time.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds for one stage of one model.")] = 300.0,
    python: Annotated[Path | None, typer.Option(help="Interpreter that has the models' packages.")] = None,
    out: Annotated[Path, typer.Option(help="Run directory; a run that is repeated goes on there.")] = Path("runs/zoo"),
    sparsity: Annotated[float, typer.Option(help="Dead fraction of the sparse models, in (0, 1).")] = 0.8,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run finished models again.")] = False,
    retry: Annotated[
        str | None,
        typer.Option(metavar="failed", help="failed: run models again that failed a stage, keep the others."),
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Write report.html into the run directory.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the matrix as Markdown to this file.")] = None,
) -> None:
    """Hold a list of models against every promise: transform, train, reload, half, batch, compile, onnx, compact.

    The list is Python code that is executed: only run files that you trust. Each model has a process of its own; one
    that crashes, hangs or takes all memory is a row of the matrix. Exit code 0 when all targets are met, else 1.

    Example: fxsparse zoo my_models/ --only 'vision/*' --stages transform,train,reload --report
    """
    from rich.console import Console

    from fxsparse.zoo.progress import Progress
    from fxsparse.zoo.records import STAGES
    from fxsparse.zoo.runner import Settings, chosen, run_zoo
    from fxsparse.zoo.schema import load_zoo
    from fxsparse.zoo.summary import all_met

    listed, folder = load_zoo(path)
    wanted = tuple(name.strip() for name in stages.split(",")) if stages is not None else STAGES
    settings = Settings(
        stages=tuple(name for name in STAGES if name in wanted) + tuple(n for n in wanted if n not in STAGES),
        python=str(python.absolute()) if python is not None else sys.executable,
        only=tuple(only or ()),
        jobs=jobs,
        timeout=timeout,
        sparsity=sparsity,
        fresh=fresh,
        retry_failed=_retry(retry),
    )
    console = Console() if sys.stdout.isatty() else Console(width=160)
    began = time.monotonic()
    with Progress(console, len(chosen(listed, settings.only))) as progress:
        results = run_zoo(listed, folder, settings, out, progress.tell)
    made = _made(path, settings, results, time.monotonic() - began)
    _write(results, made, out, report, markdown)
    _show(console, results, out)
    if not all_met(results):
        raise typer.Exit(1)


def _retry(text: str | None) -> bool:
    from fxsparse.errors import ConfigError

    if text not in (None, "failed"):
        raise ConfigError(f"`retry` (={text}) must be `failed`")
    return text is not None


def _made(path: Path, settings: Settings, results: list[EntryResult], seconds: float) -> dict[str, str]:
    import torch

    import fxsparse
    from fxsparse.zoo.runner import source_digest

    source = source_digest()
    older = sum(1 for result in results if result.key.get("source") != source)
    return {
        "list": str(path),
        "stages": ", ".join(settings.stages),
        "sparsity": f"{settings.sparsity:g}",
        "timeout": f"{settings.timeout:g} s a stage",
        "fxsparse": f"{fxsparse.__version__} (source {source})",
        "made with another source": f"{older} models",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
        "last call": f"{seconds:.0f} s",
    }


def _write(results: list[EntryResult], made: dict[str, str], out: Path, report: bool, markdown: Path | None) -> None:
    from fxsparse.report.metrics import write_atomically
    from fxsparse.zoo import render
    from fxsparse.zoo.page import render_page

    write_atomically(out / "results.jsonl", render.json_lines(results))
    said = f"{len(results)} models, fxsparse {made['fxsparse'].split()[0]}, torch {made['torch']}, {made['date']}."
    write_atomically(out / "matrix.md", render.markdown(results, said))
    if markdown is not None:
        write_atomically(markdown, render.markdown(results, said))
    if report:
        write_atomically(out / "report.html", render_page(results, "Model compatibility", made))


def _show(console: Console, results: list[EntryResult], out: Path) -> None:
    from rich.text import Text

    from fxsparse.zoo import render

    console.print(render.matrix_table(results))
    for line in render.failure_lines(results):
        console.print(Text(line), soft_wrap=True)
    console.print()
    console.print(render.target_table(results))
    console.print(Text(str(out)), soft_wrap=True)
