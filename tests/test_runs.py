"""Kept runs of a benchmark: made once for each suite and seed, and read back after that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

import benchmarks.registry
from benchmarks.harness.suite import Suite
from benchmarks.registry import suite_parser
from benchmarks.runs import Tell, kept_runs
from tests.toy_suites import toy_language


@dataclass(frozen=True)
class Line:
    seed: int


def test_what_is_kept_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = toy_language(tmp_path / "toy")
    monkeypatch.setitem(benchmarks.registry.SUITES, "language", lambda *arguments: suite)
    arguments = suite_parser("x", "toy", "nothing").parse_args(
        ["--suites", "language", "--seeds", "3", "4", "--kept", str(tmp_path / "kept")]
    )
    made: list[int] = []

    def lines_of(suite: Suite, seed: int, tell: Tell[Line]) -> list[Line]:
        made.append(seed)
        tell(Line(seed))
        return [Line(seed)]

    for settings, seeds in ((1, [3, 4]), (1, [3, 4]), (2, [3, 4, 3, 4])):  # other settings are other runs
        found, machines = kept_runs(arguments, settings, lines_of, lambda each: Line(**each), Console(quiet=True))
        assert found == {("language", 3): [Line(3)], ("language", 4): [Line(4)]}
        assert len(machines) == 2
        assert made == seeds
