"""The tool that edits the core and counts what the tests notice."""

from __future__ import annotations

import tomllib
import types
from pathlib import Path

import pytest

from benchmarks.mutants.__main__ import TABLE
from benchmarks.mutants.edits import edits_of
from benchmarks.mutants.report import FileResult, Tried, digest_of, judged, markdown, with_stored
from benchmarks.mutants.run import patch

SOURCE = '''"""A module with 1 number in its text."""

LIMIT = 2.0


def area(width: float, height: float = 3.0) -> float:
    """No edit of 5 - 2 here."""
    if width <= 0:
        raise ValueError(f"`area({width + 1})`: must be positive.")
    return max(width, 1.5) * height
'''


def texts(source: str) -> set[str]:
    return {edit.text for edit in edits_of(source)}


def test_edits_are_of_code_and_never_of_text() -> None:
    assert texts(SOURCE) == {
        "2.0 -> 3.0",
        "3.0 -> 4.5",
        "width <= 0 -> width < 0",
        "width <= 0 -> width > 0",
        "0 -> 1",
        "1.5 -> 2.25",
        "max(width, 1.5) -> min(width, 1.5)",
        "max(width, 1.5) * height -> max(width, 1.5) / height",
    }


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x.mT", {"x.mT -> x"}),
        ("not x", {"not x -> x"}),
        ("-x", {"-x -> x"}),
        ("a and b", {"a and b -> a or b"}),
        ("a if b else c", {"a if b else c -> c if b else a"}),
        ("f(exact=True)", {"True -> False"}),
        ("torch.where(a, b, c)", {"torch.where(a, b, c) -> torch.where(a, c, b)"}),
        ("torch.exp(x)", {"torch.exp(x) -> x"}),
        ("x.exp()", {"x.exp() -> x"}),
        ("x.amax(d)", {"x.amax(d) -> x.amin(d)"}),
        ("x.sum(d)", {"x.sum(d) -> x.mean(d)"}),
        ("a @ b", set()),
        ("'a' + b", set()),
        ("x is None", {"x is None -> x is not None"}),
        (
            "a < b < c",
            {"a < b < c -> a <= b < c", "a < b < c -> a > b < c", "a < b < c -> a < b <= c", "a < b < c -> a < b > c"},
        ),
        ("if x:\n    y", {"x -> not x"}),
    ],
)
def test_each_kind_of_edit(code: str, expected: set[str]) -> None:
    assert texts(code) == expected


def test_an_edit_replaces_its_own_bytes_only() -> None:
    source = "γ = '→'; a = (1 - b) * c\n"
    results = {edit.applied(source) for edit in edits_of(source)}
    assert "γ = '→'; a = ((1 + b)) * c\n" in results
    assert "γ = '→'; a = ((2) - b) * c\n" in results
    for changed in results:
        compile(changed, "<edited>", "exec")


def test_live_functions_take_on_an_edit(tmp_path: Path) -> None:
    module = types.ModuleType("area")
    path = str(tmp_path / "area.py")
    exec(compile(SOURCE, path, "exec"), vars(module))
    (product,) = [edit for edit in edits_of(SOURCE) if edit.text.endswith("/ height")]
    assert product.in_body
    assert product.reached_by([6])
    assert not product.reached_by([5])
    assert module.area(2.0) == 6.0
    patch([module.area], SOURCE, product, path)
    assert module.area(2.0) == 2.0 / 3.0
    (default,) = [edit for edit in edits_of(SOURCE) if edit.text == "3.0 -> 4.5"]
    assert not default.in_body


def result_of(*outcomes: str) -> FileResult:
    tried = [Tried.of(edit, SOURCE.splitlines()) for edit in edits_of(SOURCE)][: len(outcomes)]
    result = FileResult("area.py", digest_of(SOURCE), 8, tuple(tried))
    for each, outcome in zip(tried, outcomes, strict=True):
        result = result.with_outcome(each.key, outcome)
    return result


def test_report_counts_what_was_tried(tmp_path: Path) -> None:
    result = result_of("killed", "timed out", "survived", "equivalent", "open")
    row = "| area.py | 8 | 5 | 1 | 1 | 1 | 0 | 1 | 67 % |"
    assert row in markdown([result], "").splitlines()
    result.write(tmp_path)
    again = with_stored(result_of(*["open"] * 5), tmp_path, survivors_again=True)
    assert [each.outcome for each in again.tried] == ["killed", "timed out", "open", "open", "open"]
    changed = FileResult("area.py", digest_of(SOURCE + "\n"), 8, again.tried)
    assert with_stored(changed, tmp_path, survivors_again=False).count("killed") == again.count("killed")


def test_a_judgement_needs_the_same_code() -> None:
    (each,) = [Tried.of(edit, SOURCE.splitlines()) for edit in edits_of(SOURCE) if edit.text == "0 -> 1"]
    entry = {"file": "area.py", "code": "if width <= 0:", "edit": "0 -> 1", "reason": "why"}
    assert judged(each, "area.py", {"equivalent": [entry]}).outcome == "equivalent"
    assert judged(each, "area.py", {"equivalent": [{**entry, "edit": "0 -> 2"}]}).outcome == "open"
    assert judged(each, "other.py", {"equivalent": [entry]}).outcome == "open"


def test_the_table_names_files_and_tests_that_exist() -> None:
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    root = Path(__file__).parents[1]
    for file, tests in table["guards"].items():
        assert (root / file).is_file(), file
        for test in tests:
            path, _, name = test.partition("::")
            assert not name or f"def {name}(" in (root / path).read_text(encoding="utf-8"), test
