"""The page of the GPU benchmark, on small matrices and the CPU: its tables, and what their numbers must be there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_measures import Sizes, measured
from benchmarks.gpu_models import shortened, suite_rows
from benchmarks.harness import functional
from benchmarks.harness.suite import Suite
from benchmarks.speed_rows import ROWS
from tests.toy_suites import toy_language, toy_suite


def rows(page: str, title: str) -> list[list[str]]:
    """Cells of the table of a section, without its head."""
    section = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(each) for each in cells}) == 1, "every line has as many cells as the head"
    return cells[2:]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "new" / "gpu.md"
    gpu.main(["--device", "cpu", "--small", "--out", str(out)])
    return out.read_text(encoding="utf-8")


def test_the_page_says_what_made_it(page: str) -> None:
    assert "Made by `python -m benchmarks.gpu --device cpu --small`." in page
    assert f"torch {torch.__version__}" in page
    assert "seed 0" in page
    assert "no GPU (cpu)" in page


def test_a_device_agrees_with_itself_and_float32_with_float64(page: str) -> None:
    found = rows(page, "Agreement")
    assert len(found) == len(gpu.MAPS) * len(Sizes.small().layers) + len(gpu.ENERGIES)
    for *_, same, one, other in found:
        assert float(same) == 0
        assert float(one) == float(other)
        assert 0 < float(one) < 1e-4


def test_times_of_a_block_sum_up(page: str) -> None:
    found = rows(page, "Time of the MAP")
    for name, batches, on_cpu in Sizes.small().blocks:
        mine = [row for row in found if row[0] == name]
        assert len(mine) == len(batches) + 1
        assert mine[-1][1] == f"all {sum(count for count, _ in batches)}"
        for column in (2, 3) if on_cpu else (3,):
            *parts, total = (float(row[column]) for row in mine)
            assert all(part > 0 for part in parts)
            assert total == pytest.approx(sum(parts), abs=2e-3)
        assert on_cpu or {row[2] for row in mine} == {"not measured"}


def test_draws_and_checkpoints_are_measured(page: str) -> None:
    assert [row[0] for row in rows(page, "Draws")] == ["Gibbs", "Laplace"]
    assert all(float(cell) > 0 for row in rows(page, "Draws") for cell in row[3:5])
    models = [(name, layers) for layers, names in Sizes.small().models for name in names]
    found = rows(page, "Whole checkpoints")
    assert [(row[0], int(row[1])) for row in found] == models
    assert all(float(row[3]) > 0 and float(row[6]) > 0 for row in found)


def test_whole_models_are_measured(page: str) -> None:
    assert [row[0] for row in rows(page, "Rows of the benchmark of speed")] == list(ROWS)
    ((experts, *_, missed),) = rows(page, "Seven billion weights")
    assert (int(experts), int(missed)) == (Sizes.small().large[-1], 0)
    kinds = [row[:2] for row in rows(page, "Less precise products")]
    assert kinds == [[precision, e] for e in ("Gaussian", "Cauchy") for precision in ("highest", "high", "medium")]


@pytest.mark.filterwarnings("ignore:.*had not converged", "ignore:.*no forward pass uses pooler")
@pytest.mark.parametrize("make", [toy_suite, toy_language])
def test_merges_of_a_suite_are_judged_alike_in_one_place(
    make: Callable[[Path], Suite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "STEPS", 3)
    suite = make(tmp_path)
    tasks = {n: replace(t, splits={**t.splits, "train": t.splits["test"]}) for n, t in suite.tasks.items()}
    suite = replace(suite, tasks=tasks)
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in suite_rows(suite, suite, 6)]
    assert [row[1] for row in found] == ["task arithmetic", "InputGram, Cauchy", "InputGram, Cauchy + predictions"]
    assert all(row[2] == row[3] and row[4] == row[5] for row in found[:2])
    assert {row[2] for row in found[2:]} == {"not measured"}
    assert {len(task.splits["test"]) for task in shortened(suite.tasks, 6).values()} == {6}


def test_the_median_of_the_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr("benchmarks.gpu_measures.time.perf_counter", lambda: next(clock))
    runs: list[int] = []
    spent = measured(lambda: runs.append(0), torch.device("cpu"), 3)
    assert (len(runs), spent.seconds, spent.peak) == (3, 2.0, None)
    assert spent.main > 2**20


def test_without_a_gpu_the_default_device_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--small", "--out", str(tmp_path / "gpu.md")])
    assert "--device cuda: there is no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "gpu.md").exists()
