"""The script that scores merges of Llama, run with a stand-in of the harness, and the table that it ends with."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.papers.harness import collect, scores_in
from benchmarks.papers.llama import Llama
from benchmarks.papers.setups import setup_named
from benchmarks.papers.sources import Sources

ROOT = Path(__file__).parents[2]
SETUP = setup_named("llama-3b").of(("math",))
STAND_IN = r"""#!/bin/sh
for word in "$@"; do
    test "$before" = --output_path && out="$word/some__model"
    before="$word"
done
mkdir -p "$out"
echo '{"results": {"gsm8k_cot": {"alias": "gsm8k_cot", "exact_match,strict-match": 0.25,
      "exact_match_stderr,strict-match": 0.1}}}' > "$out/results_2026-01-01T00-00-00.json"
"""


def write_results(folder: Path, stamp: str, results: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"results_{stamp}.json").write_text(json.dumps({"results": results}))


def test_the_script_scores_and_ends_with_the_table(tmp_path: Path) -> None:
    harness, out = tmp_path / "bin" / "lm_eval", tmp_path / "a run"
    harness.parent.mkdir()
    harness.write_text(STAND_IN)
    harness.chmod(0o755)
    models = {"base": "org/base", "math": "org/math", "InputGram, Cauchy": tmp_path / "merged"}
    script = tmp_path / "score.sh"
    script.write_text(Llama(SETUP, Sources(tmp_path)).script(models, out))
    paths = {"PATH": f"{harness.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    subprocess.run(["sh", str(script)], check=True, env={**os.environ, **paths}, capture_output=True)
    lines = (out / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[-3] == "| task | metric | base | math | InputGram-Cauchy |"
    assert lines[-1] == "| gsm8k_cot | exact_match,strict-match | 0.2500 | 0.2500 | 0.2500 |"


def test_the_newest_results_count_and_only_scores_are_taken(tmp_path: Path) -> None:
    write_results(tmp_path / "model", "2026-01-02", {"a": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "a"}})
    write_results(tmp_path / "model", "2026-01-01", {"a": {"acc,none": 0.4}, "b": {"acc,none": 1}})
    assert scores_in(tmp_path) == {("a", "acc,none"): 0.5}


def test_a_score_that_a_model_lacks_is_an_empty_cell(tmp_path: Path) -> None:
    write_results(tmp_path / "scores" / "TIES" / "model", "1", {"b": {"acc,none": 1, "done": True}})
    write_results(tmp_path / "scores" / "base" / "model", "1", {"a": {"acc,none": 0.5}})
    lines = collect(SETUP, tmp_path).read_text(encoding="utf-8").splitlines()
    assert lines[-2:] == ["| a | acc,none | 0.5000 |  |", "| b | acc,none |  | 1.0000 |"]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--collect: clip-b32-8 is scored without lm_eval"):
        collect(setup_named("clip-b32-8"), tmp_path)
    with pytest.raises(ValueError, match=r"scores: no scores\. Run .*score\.sh first"):
        collect(SETUP, tmp_path)
    (tmp_path / "scores" / "base").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"base: no results_\*\.json"):
        collect(SETUP, tmp_path)
    (tmp_path / "scores" / "base" / "results_1.json").write_text("{}")
    with pytest.raises(ValueError, match=r"results_1\.json: has no `results`"):
        collect(SETUP, tmp_path)
