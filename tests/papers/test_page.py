"""The page of the set-ups: its commands parse, and every table has one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from benchmarks.papers.__main__ import parser, setup_of
from benchmarks.papers.merges import configurations
from benchmarks.papers.setups import SETUPS

PAGE = (Path(__file__).parents[2] / "docs" / "setups.md").read_text(encoding="utf-8")
COMMAND = re.compile(r"^python -m benchmarks\.papers (.+)$", re.M)


def test_every_command_of_the_page_is_one() -> None:
    found = [shlex.split(line, comments=True) for line in COMMAND.findall(PAGE)]
    assert len(found) > 5
    for words in found:
        arguments = parser().parse_args(words)
        if arguments.setup is not None:
            known = configurations(setup_of(arguments), Path("moments"))
            assert set(arguments.methods or ()) <= set(known)


def test_every_table_is_on_the_page() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "`python -m benchmarks.papers " in line]
    named = [name.rpartition(" ")[2] for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert [name for name in named if not name.endswith("score.sh")] == list(SETUPS)
