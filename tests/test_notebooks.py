"""Every notebook runs from top to bottom, keeps what its title says, and ends in a figure and asserts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

import benchmarks.registry
import tests.seeds
from tests.toy_decoder import decoder_suite
from tests.toy_suites import toy_language, toy_suite

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
EVERY_NOTEBOOK = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
Cell = dict[str, Any]


def cells_of(path: Path) -> list[Cell]:
    cells: list[Cell] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return cells


def code_cells(path: Path) -> list[Cell]:
    return [cell for cell in cells_of(path) if cell["cell_type"] == "code"]


def text_of(cell: Cell) -> str:
    return "".join(cell["source"])


def shows_a_figure(cell: Cell) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


UNLEARNT = {"decoder_adapters": "assert scores."}
"""Starts of lines about what real experts have learnt: the toy decoder's learnt nothing that a merge could keep."""

SHORTER = {"calibrated_ensembles": ("for seed in (1, 2, 3)", "for seed in (1,)")}
"""What is run of long notebooks: the text of a cell, and what is put there."""

PROMISES: dict[str, dict[str, str]] = {
    "calibrated_ensembles": {
        "temperature": r"pm\.temper\(",
        "calibration": r"dx\.reliability\(",
        "uncertainty": r"dx\.detect_shift\(",
        "under shift": r"severity \* noise.*\bnll\(.*\bece\(",
    },
    "decoder_adapters": {
        "One adapter out of three": r"pm\.merge_adapters\(",
        "a language model": r"AutoModelForCausalLM\.from_pretrained\(",
        "cut to the rank": r"rank=smaller",
        "judged": r"dx\.evaluate\(",
    },
    "quick_start": {
        "Hugging Face": r"pm\.merge_checkpoint\(.*AutoModel\.from_pretrained\(",
        "how good it is": r"dx\.evaluate\(",
        "what is left of each fine-tune": r"kept_percent.*dx\.functional_score\(",
    },
    "search": {
        "search": r"\bsearch\(space,",
        "with labels and without": r"with_labels = search\(.*without = search\(",
    },
    "tails": {
        "heavy-tailed": r"dx\.pooled_tails\(",
        "null control": r"dx\.null_control\(",
        "two real suites": r"for name in \(\"vision\", \"language\"\)",
    },
    "your_own_expert": {
        "an energy": r"class \w+\(Energy\):.*def rho\(",
        "a residual map": r"class \w+\(ResidualMap\):.*def operator\(",
        "a factor on predictions": r"prediction_expert\(.*functional\(|functional\(.*prediction_expert\(",
        "a Pyro model around the merge": r"SVI\(.*Predictive\(.*pyro\.sample\(.*NUTS\(",
    },
}
"""What the title or the introduction of a notebook says, and the code that keeps it."""


def broken_promises(stem: str, cells: Sequence[Cell]) -> list[str]:
    """Promises that the introduction does not make, or that no code keeps."""
    code = "\n".join(text_of(cell) for cell in cells if cell["cell_type"] == "code")
    said = re.sub(r"\s+", " ", text_of(cells[0]))
    found = [f"the introduction does not say {phrase!r}" for phrase in PROMISES[stem] if phrase not in said]
    kept = {phrase: re.search(pattern, code, re.S) for phrase, pattern in PROMISES[stem].items()}
    return found + [f"no code for {phrase!r}" for phrase, match in kept.items() if match is None]


def faults_of_the_end(cells: Sequence[Cell]) -> list[str]:
    """What is wrong with the end of a story: it should be a section's figure, and asserts."""
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    faults = [] if re.search(r"^\s*assert ", text_of(code[-1]), re.M) else ["the last cell asserts nothing"]
    figures = [number for number, cell in enumerate(cells) if shows_a_figure(cell)]
    if not figures:
        return [*faults, "no figure: `make notebooks`"]
    behind = cells[figures[-1] + 1 :]
    if any(re.search(r"^#+ ", text_of(cell), re.M) for cell in behind if cell["cell_type"] == "markdown"):
        faults.append("a section comes after the last figure")
    if any(cell.get("outputs") for cell in behind):
        faults.append("something is printed after the last figure")
    return faults


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(PROMISES)


@EVERY_NOTEBOOK
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toys = {"vision": toy_suite, "language": toy_language, "decoder": decoder_suite}
    for name, make in toys.items():
        monkeypatch.setitem(
            benchmarks.registry.SUITES, name, lambda *arguments, make=make, name=name: make(tmp_path / name)
        )
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    monkeypatch.setattr(tests.seeds, "SHIFT", 0)  # their stories end in asserts that need not hold of every toy
    namespace: dict[str, object] = {}
    long, short = SHORTER.get(path.stem, ("\0", ""))
    assert sum(long in text_of(cell) for cell in code_cells(path)) == (path.stem in SHORTER)
    with mpl.rc_context({"backend": "agg"}):
        for number, cell in enumerate(code_cells(path)):
            lines = (line for line in cell["source"] if not line.startswith(UNLEARNT.get(path.stem, "\0")))
            exec(compile("".join(lines).replace(long, short), f"{path.name}[{number}]", "exec"), namespace)


@EVERY_NOTEBOOK
def test_outputs_are_there_and_small_and_of_no_machine(path: Path) -> None:
    outputs = [output for cell in code_cells(path) for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    assert path.stat().st_size < 400_000
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert not re.search(r"/(root|home|tmp|Users)/", text)
    assert all("execution" not in cell["metadata"] for cell in code_cells(path))
    assert [cell["execution_count"] for cell in code_cells(path)] == list(range(1, len(code_cells(path)) + 1))


@EVERY_NOTEBOOK
def test_the_story_ends_in_a_figure_and_asserts(path: Path) -> None:
    assert faults_of_the_end(cells_of(path)) == []


@EVERY_NOTEBOOK
def test_what_the_title_says_is_in_the_code(path: Path) -> None:
    assert broken_promises(path.stem, cells_of(path)) == []


@EVERY_NOTEBOOK
def test_another_end_would_be_noticed(path: Path) -> None:
    cells = cells_of(path)
    printed = {"cell_type": "code", "source": ["assert 1"], "outputs": [{"output_type": "stream", "text": ["1"]}]}
    section = {"cell_type": "markdown", "source": ["## One thing more\n"]}
    without = [cell for cell in cells if not shows_a_figure(cell)]
    silent = {"cell_type": "code", "source": ["x = 1  # assert nothing"], "outputs": []}
    assert faults_of_the_end([*cells, section, {**printed, "outputs": []}]) == ["a section comes after the last figure"]
    assert faults_of_the_end([*cells, printed]) == ["something is printed after the last figure"]
    assert faults_of_the_end([*without, {**printed, "outputs": []}]) == ["no figure: `make notebooks`"]
    assert faults_of_the_end([*cells, silent]) == ["the last cell asserts nothing"]


@EVERY_NOTEBOOK
def test_a_broken_promise_would_be_noticed(path: Path) -> None:
    introduction = cells_of(path)[0]
    assert len(broken_promises(path.stem, [introduction])) == len(PROMISES[path.stem])
