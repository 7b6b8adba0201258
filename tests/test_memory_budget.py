"""A budget of memory is kept by a merge in a process of its own, or refused with what it would take."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.speed_models import Shapes, opened, shapes_of, write
from inference.models.budget import INTERPRETER, BudgetError, batch_bytes_within, memory_of
from inference.models.merge import plan
from poe_merge.cli import run
from poe_models import InputGram, ProductOfExperts

SHAPES = "8 512 1024 4"
MEASURED = """
import sys, threading, time
from benchmarks.harness.memory import Anonymous
from poe_merge.cli import run
watch = Anonymous()
watch.start()
status = run(sys.argv[1:])
watch.done.set()
watch.join()
print(f"status {status} peak {watch.peak}")
"""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shapes]:
    folder, known = tmp_path_factory.mktemp("models"), shapes_of(SHAPES)
    write(folder, known)
    return folder, known


def flags(folder: Path) -> list[str]:
    experts = [word for index in range(1, 5) for word in ("--model", f"e{index}={folder}/expert{index}")]
    return ["--base-model", str(folder / "base"), *experts]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads anonymous memory from /proc")
@pytest.mark.parametrize("method", ["poe", "Ties", "Average"])
def test_a_budget_is_kept(method: str, shapes: tuple[Path, Shapes], tmp_path: Path) -> None:
    folder, _ = shapes
    budget = INTERPRETER // 10**6 + (145 if method == "poe" else 65)
    words = [
        "merge",
        *flags(folder),
        "--method",
        method,
        "--memory-budget",
        f"{budget}MB",
        "--out",
        str(tmp_path / "m"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *words],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found = re.search(r"status (\d+) peak (\d+)", done.stdout)
    assert found is not None
    assert int(found[1]) == 0
    assert 100e6 < int(found[2]) <= budget * 1e6
    record = json.loads((tmp_path / "m" / "poe_merge.json").read_text())
    assert record["settings"]["config"]["memory_budget"] == budget * 10**6
    if method == "poe":
        assert record["batch_bytes"] < 64 * 2**20


def test_batches_are_as_large_as_the_budget_allows(shapes: tuple[Path, Shapes]) -> None:
    vectors = opened(*shapes)
    product = ProductOfExperts.of(vectors.names, InputGram())
    whole = memory_of(plan(vectors, product), vectors.device)
    assert batch_bytes_within(whole, vectors, product) == 64 * 2**20
    size = batch_bytes_within(whole - 1, vectors, product)
    assert memory_of(plan(vectors, product, batch_bytes=size), vectors.device) < whole
    assert memory_of(plan(vectors, product, batch_bytes=2 * size), vectors.device) == whole
    least = memory_of(plan(vectors, product, batch_bytes=1), vectors.device)
    assert batch_bytes_within(least, vectors, product) >= 1
    with pytest.raises(BudgetError, match="one tensor at a time takes"):
        batch_bytes_within(least - 1, vectors, product)


def test_too_little_is_refused_with_what_it_would_take(
    shapes: tuple[Path, Shapes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*flags(shapes[0]), "--memory-budget"]
    assert run(["merge", *words, "350MB", "--out", str(tmp_path / "m")]) == 2
    told = " ".join(capsys.readouterr().err.split())
    needed = re.search(r"Give --memory-budget (\d+)MB", told)
    assert needed is not None, told
    assert not (tmp_path / "m").exists()
    assert run(["plan", *words, f"{needed[1]}MB", "--json"]) == 0
    assert run(["plan", *words, "much"]) == 2
    assert "'much' is no amount of memory" in capsys.readouterr().err


def test_what_is_not_merged_in_batches_has_no_budget(
    shapes: tuple[Path, Shapes], capsys: pytest.CaptureFixture[str]
) -> None:
    (shapes[0] / "tasks.py").write_text("")
    words = ["plan", *flags(shapes[0]), "--memory-budget", "2GB", "--tasks", str(shapes[0] / "tasks.py")]
    assert run(words) == 2
    assert "memory_budget: not with `functional`" in " ".join(capsys.readouterr().err.split())
