"""Which module may import which, and how large files and functions may be; read from the source, nothing is run."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("poe_models", "inference", "diagnostics", "poe_merge")
"""From the ground up: a package imports itself and those before it."""
FILES = sorted(path.relative_to(ROOT) for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
GROUND = {
    "energy",
    "energies",
    "operators",
    "sums",
    "compression",
    "residual_maps",
    "scales",
    "experts",
    "posterior",
    "program",
    "binding",
    "updates",
    "densities",
    "span_labels",
    "span",
    "least_squares",
    "precisions",
}
"""Modules of `poe_models` that are mathematics."""
ABOVE_GROUND = ("poe_models.weights", "poe_models.methods")
LONGEST_FILE, LONGEST_BODY = 400, 40
"""Lines; a body's are counted without its docstring."""

every_file = pytest.mark.parametrize("path", FILES, ids=str)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imported(path: Path) -> list[str]:
    """Dotted names of all that a file imports, wherever in the file: of ``from a import b`` both ``a`` and ``a.b``."""
    nodes = list(ast.walk(parsed(path)))
    names = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{path}: a relative import"
            names += [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_the_ground_floor_is_there() -> None:
    assert {path.stem for path in FILES if path.parts[0] == "poe_models"} >= GROUND


@every_file
def test_imports_point_one_way(path: Path) -> None:
    above = FLOORS[FLOORS.index(path.parts[0]) + 1 :]
    wrong = [name for name in imported(path) if any(within(name, floor) for floor in (*above, "benchmarks", "tests"))]
    assert not wrong


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "poe_models" and len(path.parts) == 2])
def test_the_ground_floor_knows_nothing_of_files(path: Path) -> None:
    if path.name == "__init__.py":
        return
    assert not [name for name in imported(path) if any(within(name, package) for package in ABOVE_GROUND)]


@every_file
def test_nothing_private_crosses_a_module(path: Path) -> None:
    own = [name for name in imported(path) if any(within(name, floor) for floor in FLOORS)]
    assert not [name for name in own if any(part.startswith("_") for part in name.split("."))]
    assert path.stem in ("__init__", "__main__") or not path.stem.startswith("_")


@every_file
def test_pyro_and_arviz_are_where_they_belong(path: Path) -> None:
    homes = {
        "pyro": {
            "poe_models/program.py",
            "inference/nuts.py",
        },
        "arviz": {"diagnostics/arviz_adapter.py"},
    }
    for package, files in homes.items():
        used = any(within(name, package) for name in imported(path))
        assert not used or str(path) in files or (package == "pyro" and "hierarchical" in path.parts)


@every_file
def test_files_are_short(path: Path) -> None:
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


@every_file
def test_functions_are_short(path: Path) -> None:
    functions = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert {node.name: lines for node in functions if (lines := body_lines(node)) > LONGEST_BODY} == {}


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement after the docstring to the last."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
