"""One dialect of docstrings: sections, capitals, periods, double backticks, summaries that say what a thing is or
does."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for package in ("poe_models", "inference", "diagnostics", "poe_merge")
    for path in (ROOT / package).rglob("*.py")
)
SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:")
ENTRY = re.compile(r"^\*{0,2}[A-Za-z_][\w.]*: (.*)$")
RIDDLE = re.compile(r"(What|Which|Who|Whose|How|Why|Where|When)\b")
DOCTEST = re.compile(r"^ *>>> .*?(?=\n *\n|\Z)", re.M | re.S)
SINGLE = re.compile(r"(?<![`:\w])`[^`\n]+`(?!`)")


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Name and text of every docstring of a file, those beneath constants included.

    Yields:
        Each of them.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for constant, node in itertools.pairwise(tree.body):
        if isinstance(constant, ast.Assign | ast.AnnAssign) and isinstance(node, ast.Expr):
            yield ast.unparse(constant).partition(" = ")[0], inspect.cleandoc(ast.literal_eval(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", "module"), text


def entries(text: str) -> Iterator[tuple[str, str]]:
    """Section and text of every entry with a name.

    Yields:
        Each of them, its lines joined.
    """
    section, depth, entry = "", 0, ""
    for line in [*text.splitlines(), "end"]:
        indent = len(line) - len(line.lstrip())
        starts = section and indent == depth + 4 and ENTRY.match(line.strip())
        if entry and (starts or (line.strip() and indent <= depth)):
            yield section, entry
            entry = ""
        if line.strip() in SECTIONS:
            section, depth = line.strip(), indent
        elif line.strip() and indent <= depth:
            section = ""
        elif starts and section in ("Args:", "Attributes:", "Raises:"):
            entry = starts[1]
        elif entry:
            entry += " " + line.strip()


def complaints(text: str) -> list[str]:
    """Everything about a docstring that is not in the dialect."""
    summary = text.split("\n\n")[0].replace("\n", " ")
    prose = DOCTEST.sub("", text)
    found = []
    if not summary.endswith((".", "::", ":", "?")):
        found.append(f"the summary does not end with a period: {summary}")
    if RIDDLE.match(summary):
        found.append(f"the summary is a riddle: {summary}")
    found += [f"single backticks: {each}" for each in SINGLE.findall(prose)]
    for section, entry in entries(text):
        words = entry.strip()
        if words[:1].islower():
            found.append(f"{section} does not start with a capital: {words}")
        if not words.rstrip().endswith((".", ":")):
            found.append(f"{section} does not end with a period: {words}")
        if section == "Raises:" and not re.match(r"(If|Always)\b", words):
            found.append(f"{section} does not say when: {words}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_are_in_one_dialect(path: Path) -> None:
    found = [f"{name}: {each}" for name, text in docstrings(path) for each in complaints(text)]
    assert not found, "\n".join(found)


def test_the_dialect_is_checked() -> None:
    bad = "What it is\n\nArgs:\n    x: a number\n\nRaises:\n    ValueError: the `x` is bad.\n"
    assert len(complaints(bad)) == 7
    good = "Numbers.\n\nArgs:\n    x: A number,\n        of a kind.\n\nRaises:\n    ValueError: If ``x`` is bad.\n"
    assert complaints(good) == []
