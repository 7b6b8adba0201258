"""The numbers of a table, from models whose scores are known."""

from __future__ import annotations

import math

import torch
from torch import nn

from benchmarks.papers.published import BASE, OWN
from benchmarks.papers.report import Measured, page
from benchmarks.papers.setups import setup_named
from diagnostics.predictions.model_scores import ModelScores, evaluate
from inference.models.tasks import Task

SETUP = setup_named("clip-b32-8").of(("mnist", "dtd"))


class Diagonal(nn.Module):
    """Logits are the inputs times a number: right for 1, wrong for -1 where the inputs are unit vectors."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.factor * inputs


def scores(expert: float) -> ModelScores:
    """On mnist three of four labels are those of the inputs, on dtd two of four."""
    inputs = torch.eye(2).repeat(2, 1)
    labels = {"mnist": torch.tensor([0, 1, 0, 0]), "dtd": torch.tensor([0, 1, 1, 0])}
    tasks = [Task(name, [(inputs, each)], metrics=("accuracy", "nll", "ece")) for name, each in labels.items()]
    experts = {"mnist": Diagonal(1.0), "dtd": Diagonal(expert)}
    models = {BASE: Diagonal(-1.0), "average": Diagonal(2.0)}
    return evaluate(models, tasks, seed=0, experts=experts, num_resamples=5)


def test_scores_are_percent_of_the_examples_and_of_the_experts() -> None:
    found = Measured(SETUP, scores(1.0), {})
    assert [found.score(BASE, task) for task in SETUP.tasks] == [25, 50]
    assert [found.score("average", task) for task in SETUP.tasks] == [75, 50]
    assert [found.score(OWN, task) for task in SETUP.tasks] == [75, 50]
    assert (found.mean(BASE), found.mean("average")) == (37.5, 62.5)
    assert abs(found.normalised(BASE) - 100 * (25 / 75 + 50 / 50) / 2) < 1e-9
    assert found.normalised("average") == 100


def test_nothing_is_divided_by_an_expert_without_a_right_answer() -> None:
    task = Task("mnist", [(torch.eye(2), torch.tensor([1, 0]))], metrics=("accuracy",))
    found = evaluate({BASE: Diagonal(-1.0)}, [task], seed=0, experts={"mnist": Diagonal(1.0)}, num_resamples=5)
    measured = Measured(SETUP.of(("mnist",)), found, {})
    assert (measured.score(BASE, "mnist"), measured.score(OWN, "mnist")) == (100, 0)
    assert math.isnan(measured.normalised(BASE))
    assert "| base | here | 100.0 | 100.0 | undefined |" in page(measured)


def test_published_rows_stand_below_ours_and_their_means_only_under_all_tasks() -> None:
    lines = page(Measured(SETUP, scores(1.0), {"average": {"merge_method": "Average()"}}, ("Percent.",))).splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("| average | here |"))
    assert lines[place].startswith("| average | here | 75.0 | 50.0 | 62.5 | 100.0 |")
    assert lines[place + 1] == "| average | FusionBench | 86.3 | 50.9 |  |  |  |  |"
    assert lines[0] == "# clip-b32-8: CLIP ViT-B/32, 8 tasks"
    assert lines[2] == "Percent."
    assert lines[-1] == '- average: `{"merge_method": "Average()"}`'
