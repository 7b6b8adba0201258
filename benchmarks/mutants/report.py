"""What became of the edits of each file: kept as JSON between runs, and the table made of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.mutants.edits import Edit

DETECTED = ("killed", "timed out")
MISSED = ("survived", "not reached")
Key = tuple[tuple[int, int], str]
LEFT_OUT = ("equivalent", "setting")
COLUMNS = ("file", "possible", "tried", "killed", "timed out", "survived", "not reached", "left out", "share killed")


@dataclass(frozen=True)
class Tried:
    """One sampled edit.

    Attributes:
        span: its bytes in the file.
        new: the text put there.
        line: the line number.
        code: the line's text.
        edit: old and new text.
        outcome: "open", "killed", "timed out", "survived", "not reached" by any test, or one of `LEFT_OUT`.
        reason: why it is left out.
    """

    span: tuple[int, int]
    new: str
    line: int
    code: str
    edit: str
    outcome: str = "open"
    reason: str = ""

    @property
    def key(self) -> Key:
        """What tells it from the file's other edits."""
        return self.span, self.new

    @classmethod
    def of(cls, edit: Edit, lines: Sequence[str]) -> Tried:
        """An edit that was not tried yet."""
        return cls(edit.span, edit.new, edit.line, lines[edit.line - 1].strip(), edit.text)


@dataclass(frozen=True)
class FileResult:
    """The sampled edits of one file.

    Attributes:
        file: its path.
        digest: of its text when the edits were made.
        possible: number of edits that could be made.
        tried: the sample.
    """

    file: str
    digest: str
    possible: int
    tried: tuple[Tried, ...]

    @property
    def open(self) -> list[Tried]:
        """Edits that are still to be tried."""
        return [each for each in self.tried if each.outcome == "open"]

    def count(self, *outcomes: str) -> int:
        """Number of edits with one of these outcomes."""
        return sum(each.outcome in outcomes for each in self.tried)

    def with_outcome(self, key: Key, outcome: str) -> FileResult:
        """The same with the outcome of one edit."""
        return replace(self, tried=tuple(replace(t, outcome=outcome) if t.key == key else t for t in self.tried))

    def write(self, folder: Path) -> None:
        """Keep it for the next run."""
        folder.mkdir(parents=True, exist_ok=True)
        _place(folder, self.file).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def with_stored(result: FileResult, folder: Path, survivors_again: bool) -> FileResult:
    """The outcomes that an earlier run found for the same text, for edits that are open.

    Args:
        result: the edits sampled now.
        folder: where results are kept.
        survivors_again: leave edits that survived open.
    """
    known = {each.key: each.outcome for each in stored(result.file, folder, result.digest)}
    if survivors_again:
        known = {key: outcome for key, outcome in known.items() if outcome not in MISSED}
    tried = [
        replace(each, outcome=known.get(each.key, "open")) if each.outcome == "open" else each for each in result.tried
    ]
    return replace(result, tried=tuple(tried))


def stored(file: str, folder: Path, digest: str) -> list[Tried]:
    """The outcomes kept for a file with this text; none if its text has changed."""
    place = _place(folder, file)
    if not place.exists():
        return []
    kept = json.loads(place.read_text(encoding="utf-8"))
    if kept["digest"] != digest:
        return []
    found = [Tried(**{**each, "span": tuple(each["span"])}) for each in kept["tried"]]
    return [each for each in found if each.outcome not in {"open", *LEFT_OUT}]


def digest_of(source: str) -> str:
    """A short digest of a file's text."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def judged(tried: Tried, file: str, table: Mapping[str, Any]) -> Tried:
    """An edit with the judgement that the table has for it, if any.

    Args:
        tried: the edit.
        file: path of its file.
        table: lists "equivalent" and "setting" of entries with file, code, reason, and edit unless all edits of the
            line are meant.
    """
    for kind in LEFT_OUT:
        for entry in table.get(kind, []):
            if (file, tried.code) == (entry["file"], entry["code"]) and entry.get("edit", tried.edit) == tried.edit:
                return replace(tried, outcome=kind, reason=entry["reason"])
    return tried


def markdown(results: Iterable[FileResult], options: str) -> str:
    """The report: a row per file, the survivors, and what was left out with the reasons."""
    results = list(results)
    every = [(result.file, each) for result in results for each in result.tried]
    whole = FileResult("**all**", "", sum(result.possible for result in results), tuple(each for _, each in every))
    rows = [_row(result) for result in [*results, whole]]
    missed = [f"- `{file}:{t.line}` {t.outcome}: `{t.edit}`" for file, t in every if t.outcome in MISSED]
    left_out = [f"| `{f}` | `{_cell(t.edit)}` | {t.reason} |" for f, t in every if t.outcome in LEFT_OUT]
    return "\n".join(
        [
            "Single edits of the core, and whether the tests notice.",
            f"Made by `python -m benchmarks.mutants {options}`.",
            "",
            "Timed out counts as killed; what is left out (below, with reasons) does not count. Tests are written for",
            "the survivors of earlier runs, so that a seed that was not used before gives a fairer share.",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|---|" + "---:|" * (len(COLUMNS) - 1),
            *rows,
            "\n## Survivors\n",
            *(missed or ["None."]),
            "\n## Left out\n",
            "| file | edit | reason |\n|---|---|---|",
            *left_out,
            "",
        ]
    )


def _row(result: FileResult) -> str:
    left_out = result.count(*LEFT_OUT)
    counted = len(result.tried) - left_out - result.count("open")
    share = f"{100 * result.count(*DETECTED) / counted:.0f} %" if counted else "-"
    outcomes = [result.count(outcome) for outcome in (*DETECTED, *MISSED)]
    return (
        "| "
        + " | ".join(map(str, [result.file, result.possible, len(result.tried), *outcomes, left_out, share]))
        + " |"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _place(folder: Path, file: str) -> Path:
    return folder / (file.replace("/", ".") + ".json")
