"""What a solution says of itself: one module's numbers, and whether all have converged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from inference import fixed_point
from inference.solution import FixedPointInfo, Solution, Status
from poe_models import ProductOfExperts
from tests.helpers import random_updates

NAMES = ["a", "b", "c"]


@pytest.fixture
def solution(generator: torch.Generator) -> Solution[FixedPointInfo]:
    """Of three modules; expert `b` did not change the second."""
    updates = random_updates(generator, 3, 3, 4, 5)
    updates[1, 1] = 0.0
    return fixed_point(ProductOfExperts.of(NAMES).bind(updates))


def test_a_record_holds_one_modules_numbers(solution: Solution[FixedPointInfo]) -> None:
    error = torch.tensor([0.25, torch.nan, 0.5], dtype=torch.float64)
    info = replace(solution.info, forward_error=error)
    records = [info.record(m) for m in range(3)]
    assert [record["forward_error"] for record in records] == [0.25, None, 0.5]
    assert [record["inactive"] for record in records] == [[], ["b"], []]
    assert [set(record["relative_weights"]) for record in records] == [{"a", "b", "c"}, {"a", "c"}, {"a", "b", "c"}]
    for m, record in enumerate(records):
        assert record["weights"] == dict(zip(NAMES, info.weights[m].tolist(), strict=True))
        assert record["residuals"] == dict(zip(NAMES, info.residuals[m].tolist(), strict=True))
        kept = record["relative_weights"]
        assert kept == {n: w for n, w in zip(NAMES, info.relative_weights[m].tolist(), strict=True) if n in kept}
        assert record["energy_trace"] == info.energy_trace[m, : int(info.steps[m])].tolist()
        assert (record["start"], record["norm"]) == (info.start[m], float(info.retention.norm[m]))


def test_a_solution_is_recorded_with_its_status(solution: Solution[FixedPointInfo]) -> None:
    status = (Status.CONVERGED, Status.MAX_STEPS, Status.SADDLE)
    mixed = replace(solution, status=status)
    assert [mixed.record(m)["status"] for m in range(3)] == ["converged", "max_steps", "saddle"]
    assert mixed.record(2)["energy"] == float(solution.info.energy[2])
    assert mixed.record()["energy"] == float(solution.info.energy[0])


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_one_module_that_did_not_converge_is_enough(bad: int, solution: Solution[FixedPointInfo]) -> None:
    good = (Status.CONVERGED, Status.CONVERGED_LINE_SEARCH, Status.COMPUTED)
    assert replace(solution, status=good).converged
    assert replace(solution, status=(Status.STOPPED,) * 3).converged
    for status in (Status.MAX_STEPS, Status.ROUNDING, Status.SADDLE, Status.NO_MINIMUM):
        mixed = tuple(status if m == bad else each for m, each in enumerate(good))
        assert not replace(solution, status=mixed).converged
