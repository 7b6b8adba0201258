"""The table of the mutation run is about the code as it is."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from benchmarks.mutants.__main__ import TABLE, sampled
from benchmarks.mutants.report import LEFT_OUT

ROOT = Path(__file__).parents[1]
CONTENTS = tomllib.loads(TABLE.read_text(encoding="utf-8"))


def test_every_judgement_is_of_an_edit_that_the_file_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of a file that is guarded: otherwise it is read by nobody."""
    monkeypatch.chdir(ROOT)
    for file in CONTENTS["guards"]:
        assert sampled(file, CONTENTS, per_file=1, seed=0).possible > 0
    judged = {entry["file"] for kind in LEFT_OUT for entry in CONTENTS[kind]}
    assert judged <= set(CONTENTS["guards"])


def test_no_edit_is_judged_twice() -> None:
    entries = [(e["file"], e["code"], e.get("edit")) for kind in LEFT_OUT for e in CONTENTS[kind]]
    assert len(set(entries)) == len(entries)
    for file, code, edit in entries:
        assert edit is None or (file, code, None) not in entries
