"""Plan of a merge as text: under each treatment its tensors, those of different layers in one line."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.table import Table

from poe_merge.console import console_for, shown, size, visible

if TYPE_CHECKING:
    from inference.models.merge import Plan
    from inference.models.plan import TensorPlan
    from poe_models.weights.task_vectors import TaskVectors

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A part of a name, between dots, that is a number."""


def ranges(numbers: Iterable[int]) -> str:
    """Numbers with neighbours joined.

    >>> ranges([3, 0, 1, 2, 7])
    '0-3,7'
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def folded(names: Sequence[str]) -> list[tuple[str, int]]:
    """Names with their counts, those that differ in numbers between dots as one if every combination is there.

    >>> folded(["h.0.w", "h.1.w", "norm"])
    [('h.{0-1}.w', 2), ('norm', 1)]
    >>> folded(["h.0.e.0.w", "h.1.e.1.w"])
    [('h.0.e.0.w', 1), ('h.1.e.1.w', 1)]
    """
    families: dict[tuple[str, ...], dict[tuple[str, ...], str]] = {}
    for name in names:
        families.setdefault(tuple(_NUMBER.split(name)), {})[tuple(_NUMBER.findall(name))] = name
    found: list[tuple[str, int]] = []
    for texts, members in families.items():
        places = [{int(number) for number in column} for column in zip(*members, strict=True)]
        padded = any(number != str(int(number)) for numbers in members for number in numbers)
        if len(members) == 1 or padded or math.prod(map(len, places)) != len(members):
            found += [(name, 1) for name in members.values()]
            continue
        numbers = [ranges(place) for place in places]
        holes = [number if number.isdecimal() else "{" + number + "}" for number in numbers]
        found.append(("".join(a + b for a, b in zip(texts, [*holes, ""], strict=True)), len(members)))
    return found


def aligned(rows: Sequence[tuple[str, str, str]], width: int) -> str:
    """Rows of names, shapes and counts below each other; a name that leaves no room has a line of its own.

    A Rich table does the same in a hundred times the time, which 100,000 tensors do not have.
    """
    second, third = (max(len(row[place]) for row in rows) for place in (1, 2))
    first = min(max(cell_len(row[0]) for row in rows), max(width - second - third - 4, 0))
    lines = []
    for name, shape, count in rows:
        begins = name + " " * (first - cell_len(name)) if cell_len(name) <= first else f"{name}\n{' ' * first}"
        lines.append(f"{begins}  {shape:<{second}}  {count}".rstrip())
    return "\n".join(lines)


def treatments(planned: Plan, width: int) -> str:
    """Every tensor under its treatment, and under its design where there are several."""
    parts: dict[tuple[str, int | None], dict[tuple[int, ...], list[str]]] = {}
    for tensor in planned.tensors:
        numbered = len(planned.designs) > 1 and tensor.design is not None
        design = planned.designs.index(tensor.design) + 1 if numbered and tensor.design is not None else None
        shapes = parts.setdefault((str(tensor.treatment), design), {})
        shapes.setdefault(tuple(tensor.shape), []).append(_names(tensor))
    lines = []
    for (treatment, design), shapes in parts.items():
        lines += textwrap.wrap(visible(treatment) + (f", design {design}" if design else ""), width)
        rows = [
            (f"  {name}", "x".join(map(str, shape)), f"x {count}" if count > 1 else "")
            for shape, names in shapes.items()
            for name, count in folded(names)
        ]
        lines.append(aligned(rows, width))
    return "\n".join(lines)


def _names(tensor: TensorPlan) -> str:
    return " = ".join(map(visible, (tensor.name, *tensor.aliases)))


def counted(count: int, one: str, several: str) -> str:
    """A number of things.

    >>> counted(1, "file", "files"), counted(2, "file", "files")
    ('1 file', '2 files')
    """
    return f"{count} {one if count == 1 else several}"


def duration(seconds: float) -> str:
    """A predicted time in words, to one digit or two.

    >>> duration(0.3), duration(4.4), duration(38), duration(200), duration(100_000)
    ('about a second', 'about 4 s', 'about 40 s', 'about 3 min', 'about 28 h')
    """
    if seconds < 1.5:
        return "about a second"
    if seconds < 90:
        return f"about {round(seconds, 0 if seconds < 10 else -1):.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.0f} h"


def time_text(seconds: float | None, task_vectors: TaskVectors) -> str:
    """The predicted time of a merge with what it is predicted for."""
    from torch import get_num_threads

    if seconds is None:
        return "not predicted: the method needs data, or modules of given shapes"
    count, device = get_num_threads(), task_vectors.device.type
    where = f"{count} thread{'s' * (count > 1)}" if device == "cpu" else device
    return f"{duration(seconds)} on this machine ({where})"


def show_plan(planned: Plan, task_vectors: TaskVectors, seconds: float | None) -> None:
    """Print the treatment of every tensor, the designs, and what the merge takes, its time in seconds included."""
    from inference.models.budget import memory_of

    console, device = console_for(), task_vectors.device
    print(treatments(planned, console.width))
    facts = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    batches = [batch.modules for batch in planned.batches if batch.modules]
    several = counted(len(batches), "batch", "batches")
    rows = {
        "base": task_vectors.base.source,
        "experts": ", ".join(task_vectors.names),
        "tensors": f"{planned.count('merge')} merged, {planned.count('average')} averaged, "
        f"{planned.count('base')} kept from the base",
        "merged": planned.reach,
        "parameters": f"{planned.share('merge'):.1%} merged, {planned.share('average'):.1%} averaged with the same "
        f"weights and λ, {planned.share('base'):.1%} kept from the base",
        "matrices": f"{planned.modules} in {several} of at most {max(batches, default=0)}",
        "time": time_text(seconds, task_vectors),
        "peak memory": f"{size(planned.peak_bytes)} of tensors, at most {size(memory_of(planned, device))} "
        + ("with Python and its libraries" if device.type == "cpu" else f"on {device.type}"),
        "to read": f"{size(planned.read_bytes)} (checksums included)",
        "to write": f"{size(planned.write_bytes)} in {counted(len(planned.shards), 'file', 'files')}",
        "free disk": f"{size(planned.disk_bytes)} needed while merging",
    }
    for number, design in enumerate(planned.designs, 1):
        rows["design" if len(planned.designs) == 1 else f"design {number}"] = str(design)
    for key, value in rows.items():
        facts.add_row(f"[bold]{key}[/bold]", "\n".join(map(shown, value.split("\n"))))
    console.print()
    console.print(facts)
