"""Every notebook runs from top to bottom on toy suites, ends in asserts, and is committed with small outputs."""

from __future__ import annotations

import json
import re
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


def code_cells(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


UNLEARNT = {"decoder_adapters": "assert scores."}
"""Starts of lines about what real experts have learnt: the toy decoder's learnt nothing that a merge could keep."""


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@EVERY_NOTEBOOK
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toys = {"vision": toy_suite, "language": toy_language, "decoder": decoder_suite}
    for name, make in toys.items():
        monkeypatch.setitem(
            benchmarks.registry.SUITES, name, lambda *arguments, make=make, name=name: make(tmp_path / name)
        )
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    monkeypatch.setattr(tests.seeds, "SHIFT", 0)  # their stories end in asserts that need not hold of every toy
    cells = code_cells(path)
    assert "assert " in "".join(cells[-1]["source"])
    namespace: dict[str, object] = {}
    with mpl.rc_context({"backend": "agg"}):
        for number, cell in enumerate(cells):
            lines = (line for line in cell["source"] if not line.startswith(UNLEARNT.get(path.stem, "\0")))
            exec(compile("".join(lines), f"{path.name}[{number}]", "exec"), namespace)


@EVERY_NOTEBOOK
def test_outputs_are_there_and_small_and_of_no_machine(path: Path) -> None:
    outputs = [output for cell in code_cells(path) for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs), "make notebooks"
    assert all(output["output_type"] != "error" for output in outputs)
    assert path.stat().st_size < 400_000
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert not re.search(r"/(root|home|tmp|Users)/", text)
    assert all("execution" not in cell["metadata"] for cell in code_cells(path))
