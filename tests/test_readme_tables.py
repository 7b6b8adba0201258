"""The demos' pages, and the demo's tables in the README."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import readme

RESULTS = (
    "| method | accuracy |\n|---|---:|\n| a | 0.5 |\n\nOne run.\n\n| method | minus twin |\n|---|---:|\n| b | 0 |\n"
)
ENSEMBLES = "Ensembles.\n\n| members | NLL |\n|---|---:|\n| MAP | 0.4 |\n\nNot told apart: everything.\n"


def test_the_page_has_everything_and_the_readme_the_tables() -> None:
    page = readme.page("language", RESULTS, ENSEMBLES)
    assert page.startswith("What `make demo-language` printed")
    assert all(part in page for part in ("| b | 0 |", "One run.", "| MAP | 0.4 |", "Not told apart: everything."))
    marks = "<!-- demo:begin -->\nold\n<!-- demo:end -->\n\n<!-- ensembles:begin -->\n<!-- ensembles:end -->"
    text = f"Before\n{marks}\nAfter\n"
    found = readme.with_tables(text, RESULTS, ENSEMBLES)
    assert found == (
        "Before\n<!-- demo:begin -->\n| method | accuracy |\n|---|---:|\n| a | 0.5 |\n\nOne run.\n<!-- demo:end -->\n\n"
        "<!-- ensembles:begin -->\nEnsembles.\n\n| members | NLL |\n|---|---:|\n| MAP | 0.4 |\n<!-- ensembles:end -->\n"
        "After\n"
    )
    assert readme.with_tables(found, RESULTS, ENSEMBLES) == found


def test_missing_marks_are_named() -> None:
    with pytest.raises(ValueError, match="no marks `demo:begin` and `demo:end`"):
        readme.with_tables("nothing", RESULTS, ENSEMBLES)


def test_the_readme_has_the_marks() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert "| a | 0.5 |" in readme.with_tables(text, RESULTS, ENSEMBLES)
