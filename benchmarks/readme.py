"""The demos' tables in the README: `python -m benchmarks.readme --suite vision` puts those of its last run there."""

from __future__ import annotations

import argparse
import re
import textwrap
from pathlib import Path

WIDTH = 130
MARKS = {
    "vision": ("demo", "ensembles", "demo"),
    "language": ("demo-language", "ensembles-language", "demo-language"),
}
"""Suite to the marks around its tables of merges and of ensembles, and the folder that its demo writes."""


def wrapped(text: str) -> str:
    """Paragraphs wrapped, tables as they are."""
    parts = [part if part.startswith("|") else textwrap.fill(part, WIDTH) for part in text.strip().split("\n\n")]
    return "\n\n".join(parts)


def filled(readme: str, name: str, text: str) -> str:
    """The README with the generated part between its marks replaced.

    Args:
        readme: its text.
        name: of the marks.
        text: of the part.

    Raises:
        ValueError: there are no such marks.
    """
    pattern = rf"(?<=<!-- {name}:begin -->\n).*?(?=<!-- {name}:end -->)"
    if not re.search(pattern, readme, re.S):
        raise ValueError(f"the README has no marks `{name}:begin` and `{name}:end`. Put them there.")
    return re.sub(pattern, lambda _: f"{text}\n", readme, count=1, flags=re.S)


def main() -> None:
    """Fill the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suite", choices=list(MARKS), default="vision", help="whose demo")
    parser.add_argument("--demo", type=Path, default=None, help="the demo's output folder")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    arguments = parser.parse_args()
    merges_mark, ensembles_mark, folder = MARKS[arguments.suite]
    demo: Path = arguments.demo or Path("out") / folder
    results = (demo / "results.md").read_text(encoding="utf-8").strip()
    merges, _, twins = results.rpartition("\n\n|")  # the table of twins is in the page
    text = filled(arguments.readme.read_text(encoding="utf-8"), merges_mark, wrapped(merges if twins else results))
    ensembles = (demo / "ensembles.md").read_text(encoding="utf-8")
    arguments.readme.write_text(filled(text, ensembles_mark, wrapped(ensembles)), encoding="utf-8")


if __name__ == "__main__":
    main()
