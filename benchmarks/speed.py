"""What merges take beside a plain copy of the checkpoints, and how it grows.

`python -m benchmarks.speed` writes random checkpoints of known shapes into a temporary folder, runs every row of
`benchmarks.speed_rows` on them in a process of its own with one torch thread, and writes
`benchmarks/results/speed.md`. `--save` keeps the numbers; `--before` shows those of an earlier revision beside them.
`--mergekit` names a folder with mergekit's programs, in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.folders import write_page
from benchmarks.speed_mergekit import METHODS, merged_by_mergekit
from benchmarks.speed_models import shapes_of, write
from benchmarks.speed_rows import ROWS, measured

SETS = ("llama", "minilm")
SIZES = {
    "parameters": ("InputGram, Gaussian", {4: "4 512 512 4", 16: "16 512 512 4", 64: "64 512 512 4"}),
    "experts": ("InputGram, Gaussian", {n: f"8 512 512 {n}" for n in (2, 4, 8, 16)}),
    "largest side": ("InputGram, Gaussian", {side: f"1 {side} {side} 2" for side in (1024, 2048, 4096)}),
    "tensors": ("plan", {count: f"{count} 2 2 2" for count in (100, 10_000, 100_000)}),
}
"""Growth curves: the row, and the shapes for each size."""
HEADER = (
    "| row | CPU s | before | of it in the system | wall s | peak anonymous MiB | read GB | written GB | CPU / copy | "
    "CPU / bare algebra | not converged |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)
Numbers = Mapping[str, float]


def apart(folder: Path, shapes: str, row: str) -> Numbers:
    """Run one row in a process of its own; writes the checkpoints before if they are not there."""
    write(folder, shapes_of(shapes))
    command = [sys.executable, "-m", "benchmarks.speed", "--folder", str(folder), "--shapes", shapes, "--measure", row]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=one_thread)
    found: Numbers = json.loads(done.stdout.splitlines()[-1])
    return found


def exponent(costs: Mapping[int, float]) -> float:
    """Slope of log cost over log size, by least squares.

    >>> exponent({1: 3.0, 2: 12.0, 4: 48.0})
    2.0
    """
    points = [(math.log(size), math.log(cost)) for size, cost in costs.items()]
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return round(sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points), 2)


def row_text(name: str, found: Mapping[str, Numbers], before: Mapping[str, Numbers]) -> str:
    """One line of a table; what was not measured is left empty."""
    one = found[name]

    def ratio(other: str) -> str:
        return f"{one['cpu'] / found[other]['cpu']:.1f}" if other in found else ""

    def number(key: str, unit: float = 1.0, digits: int = 1) -> str:
        return f"{one[key] / unit:.{digits}f}" if key in one else ""

    cells = [
        *(name, number("cpu"), f"{before[name]['cpu']:.1f}" if name in before else "", number("system")),
        *(number("wall"), number("peak", 2**20, 0), number("read", 1e9), number("written", 1e9)),
        *(ratio("copy"), ratio("bare algebra"), number("unconverged", digits=0)),
    ]
    return f"| {' | '.join(cells)} |"


def table(shapes: str, found: Mapping[str, Numbers], before: Mapping[str, Numbers]) -> str:
    """The table of one set of checkpoints."""
    known = shapes_of(shapes)
    title = f"## {known.name}: {known.numel / 1e6:.1f} million parameters in float32, {known.experts} experts"
    return "\n".join([title, "", HEADER, *(row_text(name, found, before) for name in found), ""])


def growth(curves: Mapping[str, Mapping[str, float]]) -> str:
    """The table of growth curves; sizes are text, as JSON has them."""
    lines = ["## Growth", "", "| what grows | row | CPU s by size | exponent |", "|---|---|---|---:|"]
    for name, costs in curves.items():
        shown = ", ".join(f"{size}: {cost:.2f}" for size, cost in costs.items())
        lines.append(f"| {name} | {SIZES[name][0]} | {shown} | {exponent({int(k): v for k, v in costs.items()})} |")
    return "\n".join([*lines, ""])


def page(found: Mapping[str, Any], before: Mapping[str, Any], note: str = "") -> str:
    """The whole page of the numbers of each set, by its rows, and of the growth curves, with a note on the machine."""
    sets = [table(each, found[each], before.get(each, {})) for each in SETS if each in found]
    return "\n".join(
        [
            INTRODUCTION,
            *([note, ""] if note else []),
            *sets,
            *([growth(found["growth"])] if found.get("growth") else []),
        ]
    )


INTRODUCTION = """\
Made by `python -m benchmarks.speed`; one torch thread, every row in a process of its own, after its imports.

Merges include checksums, reading, the record and writing; the copy is of all checkpoints. The bare algebra is what a
merge by input Grams cannot do without: reading, a Gram matrix and a right-hand side for each expert, one Cholesky
factorisation and one solve for each matrix. Rows at about that ratio are bound by arithmetic, rows near the average by
checksums, memory and disk. MAP and draws are of Cauchy experts of every merged matrix, written nowhere; ten Gibbs draws
come after 20 sweeps. Memory is anonymous memory with the interpreter and its libraries (about 170 MiB); bytes read are
those that calls of the system gave, from the disk or its cache.

Where the time of the solver goes, for each matrix and N experts: N Gram matrices, of which a little more than half is
computed, N pulls, and for every step one factorisation, one solve and half a Gram matrix of the point, which serves all
residuals; one product for the gradient, a few rows in float64 for the error by rounding, and passes over the updates
that sum up in float64. A test counts them. Before, every step made N products for its residuals, tall matrices were
decomposed for them, the matrix of the gradient was summed up anew, and modules of a batch went through all of it
side by side, out of the processor's cache.
"""


def measure_all(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rows of all sets, and the growth curves, as plain data."""
    console, found = Console(), dict[str, Any]()
    for shapes in given.sets:
        rows = {name: apart(folder / shapes, shapes, name) for name in given.rows or ROWS}
        if given.mergekit is not None and shapes == "llama":
            rows |= {
                f"mergekit, {method}": merged_by_mergekit(folder / shapes, given.mergekit, method) for method in METHODS
            }
        found[shapes] = rows
        console.print(table(shapes, rows, {}), markup=False)
    found["growth"] = {}
    for name, (row, sizes) in SIZES.items() if given.growth else ():
        costs = {str(size): apart(folder / text.replace(" ", "x"), text, row)["cpu"] for size, text in sizes.items()}
        found["growth"][name] = costs
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed.md"))
    parser.add_argument("--folder", type=Path, help="where checkpoints are, or are to be written")
    parser.add_argument("--sets", nargs="*", choices=SETS, default=SETS)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS))
    parser.add_argument("--growth", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--mergekit", type=Path, help="a folder with mergekit's programs")
    parser.add_argument("--save", type=Path, help="a JSON file for the numbers")
    parser.add_argument("--before", type=Path, help="such a file, of an earlier revision")
    parser.add_argument("--note", default="", help="a sentence about the machine, for the page")
    parser.add_argument("--shapes", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.measure:
        print(
            json.dumps(
                measured(partial(ROWS[given.measure], given.folder, shapes_of(given.shapes), torch.device("cpu")))
            )
        )
        return
    with tempfile.TemporaryDirectory() as temporary:
        found = measure_all(given, given.folder or Path(temporary))
    if given.save is not None:
        given.save.write_text(json.dumps(found, indent=1), encoding="utf-8")
    before = {} if given.before is None else json.loads(given.before.read_text(encoding="utf-8"))
    write_page(given.out, page(found, before, given.note))


if __name__ == "__main__":
    main()
