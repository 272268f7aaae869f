"""The house rules that a machine can check: floors, lightness of the import, no unsafe loading."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fxsparse"

# A package may import from itself and from what its row names (errors is open to all).
FLOORS: dict[str, set[str]] = {
    "sparsity": set(),
    "nn": {"sparsity"},
    "graph": {"sparsity", "nn"},
    "passes": {"sparsity", "nn", "graph"},
    "planning": {"sparsity", "nn", "graph", "passes"},
    "testing": {"sparsity", "nn", "graph", "passes", "planning"},
    "training": {"sparsity", "nn"},
    "curvature": {"sparsity", "nn", "graph", "passes", "planning", "training"},
    "models": set(),
    "data": set(),
    "exporters": {"sparsity", "nn", "graph", "passes", "planning"},
    "lottery": {"sparsity", "nn", "graph", "passes", "planning", "training", "curvature", "models", "data"},
    "integrations": {"nn", "training", "lottery"},
    "report": set(),
    "comparison": {"sparsity", "nn", "graph", "passes", "planning", "training", "models", "data", "report"},
}
TOP = {"cli", "demo", "zoo", "__init__", "__main__"}  # may import everything
HEAVY = (
    *("onnx", "onnxruntime", "onnxscript", "plotly", "sklearn", "typer", "rich", "pydantic", "yaml", "hypothesis"),
    *("lightning", "transformers", "triton"),
)

FILES = sorted(PACKAGE.rglob("*.py"))


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module == "fxsparse":
                names |= {f"fxsparse.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_from_the_floors_below(path: Path) -> None:
    unit = unit_of(path)
    if unit in TOP or unit == "errors":
        return
    assert unit in FLOORS, f"{path} stands on no floor: add it to FLOORS and to the code map"
    allowed = FLOORS[unit] | {unit, "errors", "__version__"}
    used = {name.split(".")[1] for name in imported(path) if name.startswith("fxsparse.")}
    assert used <= allowed, f"{path} ({unit}) may not import {sorted(used - allowed)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_is_unpickled(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            call = ast.unparse(node.func)
            assert call not in {"pickle.load", "pickle.loads", "yaml.load", "dill.load", "joblib.load"}, (path, call)
            if call == "torch.load":
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("weights_only") == "True", path


def test_importing_fxsparse_imports_nothing_heavy() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import fxsparse; "
        "print(' '.join(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(found) & set(HEAVY)


def test_every_lazy_name_of_the_face_resolves() -> None:
    import fxsparse

    for name in dir(fxsparse):
        assert getattr(fxsparse, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        fxsparse.no_such_name  # noqa: B018  (the attribute access is the test)


def test_the_documentation_lists_the_face_and_names_files_that_exist() -> None:
    import fxsparse

    root = PACKAGE.parent
    listed = set(re.findall(r"^::: fxsparse\.(?:\w+\.)*(\w+)$", (root / "docs/api/face.md").read_text(), re.M))
    assert listed == set(fxsparse._HOMES) | {name for name in dir(fxsparse) if name.endswith("Error")}
    for page in (root / "README.md", *(root / "docs").rglob("*.md")):
        for config in re.findall(r"configs/\w+\.yaml", page.read_text()):
            assert (root / config).is_file(), (page, config)


def test_files_stay_short() -> None:
    long = {str(p.relative_to(PACKAGE)): n for p in FILES if (n := len(p.read_text().splitlines())) > 450}
    assert not long
