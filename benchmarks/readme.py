"""Pages of the demos, and the demo's tables in the README, from the last run of `make demo` or `make demo-language`.

`python -m benchmarks.readme --suite vision` writes `benchmarks/results/demo_vision.md` with all that the demo says, and
puts its tables between marks in the README, without the list of differences; the language demo has its page alone.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from pathlib import Path

from benchmarks.folders import write_page

WIDTH = 130
MERGES, ENSEMBLES = "demo", "ensembles"
"""Marks in the README around the tables of merges and of ensembles."""
DEMOS = {"vision": ("demo", "make demo"), "language": ("demo-language", "make demo-language")}
"""Suite to the folder that its demo writes in `out`, and its command."""


def wrapped(text: str) -> str:
    """Paragraphs wrapped, tables as they are."""
    parts = [part if part.startswith("|") else textwrap.fill(part, WIDTH) for part in text.strip().split("\n\n")]
    return "\n\n".join(parts)


def filled(readme: str, name: str, text: str) -> str:
    """The README with the generated part between its marks replaced.

    Args:
        readme: Its text.
        name: Of the marks.
        text: Of the part.

    Raises:
        ValueError: If there are no such marks.
    """
    pattern = rf"(?<=<!-- {name}:begin -->\n).*?(?=<!-- {name}:end -->)"
    if not re.search(pattern, readme, re.S):
        raise ValueError(f"the README has no marks `{name}:begin` and `{name}:end`. Put them there.")
    return re.sub(pattern, lambda _: f"{text}\n", readme, count=1, flags=re.S)


def page(suite: str, results: str, ensembles: str) -> str:
    """All that a demo says, as a page.

    Args:
        suite: Whose demo.
        results: Its `results.md`: the merges, what they are, and the tails alone.
        ensembles: Its `ensembles.md`.
    """
    return "\n\n".join([
        f"What `{DEMOS[suite][1]}` printed, mean over the tasks of the {suite} suite.",
        "## Merges",
        wrapped(results),
        "## Ensembles",
        wrapped(ensembles),
    ]) + "\n"  # fmt: skip


def with_tables(readme: str, results: str, ensembles: str) -> str:
    """The README with a demo's tables: without that of the twins and the list of differences, which the page has."""
    merges, _, twins = results.strip().rpartition("\n\n|")
    table, _, _ = ensembles.strip().rpartition("\n\n")
    return filled(filled(readme, MERGES, wrapped(merges if twins else results)), ENSEMBLES, wrapped(table))


def main() -> None:
    """Write the page, and fill the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suite", choices=list(DEMOS), default="vision", help="whose demo")
    parser.add_argument("--demo", type=Path, default=None, help="the demo's output folder")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--out", type=Path, default=None, help="the page")
    arguments = parser.parse_args()
    demo: Path = arguments.demo or Path("out") / DEMOS[arguments.suite][0]
    results, ensembles = ((demo / f"{name}.md").read_text(encoding="utf-8") for name in ("results", "ensembles"))
    out = arguments.out or Path("benchmarks/results") / f"demo_{arguments.suite}.md"
    write_page(out, page(arguments.suite, results, ensembles))
    if arguments.suite == "vision":
        text = arguments.readme.read_text(encoding="utf-8")
        arguments.readme.write_text(with_tables(text, results, ensembles), encoding="utf-8")


if __name__ == "__main__":
    main()
