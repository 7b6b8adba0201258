"""The examples of CONTRIBUTING, run as they stand: energy, residual map, rule, sampler, suite, experts on outputs."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness.contest import Contest
from benchmarks.harness.rule_bench import Bench
from inference.functional import SpanModel
from inference.map import fixed_point
from inference.samplers import Sampler
from poe_models import Gaussian, Identity, ProductOfExperts, TaskVectors
from poe_models.methods.checking import check
from tests.helpers import assert_close, random_updates
from tests.sampling import assert_same_mean, gaussian_means
from tests.seeds import seeded

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """Everything that the Python blocks define, each run in a module of its own."""
    found: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S):
        space: dict[str, Any] = {"__name__": __name__}
        exec(compile(block, "CONTRIBUTING.md", "exec"), space)
        found |= space
    return found


def test_an_energy(names: dict[str, Any]) -> None:
    q = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    assert_close(names["GemanMcClure"]().weight(q), (1 + q) ** -2, 1e-12)


def test_a_residual_map(names: dict[str, Any]) -> None:
    """With Gaussian experts, and rows of equal norm in every update, it is the identity up to a scale."""
    updates = torch.nn.functional.normalize(random_updates(seeded(0), 1, 2, 4, 5), dim=-1)
    found, expected = (
        fixed_point(ProductOfExperts.of(["a", "b"], each, Gaussian()).bind(updates)).value
        for each in (names["RowNorms"](), Identity())
    )
    assert_close(found, expected, 1e-9)


def test_a_merging_rule(names: dict[str, Any]) -> None:
    updates = random_updates(seeded(0), 1, 3, 4, 5)
    assert_close(names["Median"]()(updates), updates.median(1).values, 0)
    assert not check(names["Median"]()).broken


def test_a_sampler(names: dict[str, Any]) -> None:
    """Its draws of a Gaussian posterior have the mean that is known in closed form."""
    poe = ProductOfExperts.of(["a", "b"], energy=Gaussian())
    posterior = poe.bind(random_updates(seeded(0), 1, 2, 5, 4), coordinates="span")
    sampler = Sampler(names["random_walk"], "a random walk, for any energy")
    assert not sampler.independent
    draws = sampler.draw(posterior, 500, generator=seeded(1), chains=8, thin=20)
    assert 0.1 < float(draws.stats["accepted"].double().mean()) < 0.95
    assert_same_mean(posterior, draws, gaussian_means(posterior), min_ess=100.0, max_rhat=1.05)


def test_a_suite(names: dict[str, Any], tmp_path: Path) -> None:
    """Experts learn their task, and a merge of both is judged on both."""
    suite = names["digits_suite"](tmp_path)
    assert all(record["expert_test"]["accuracy"] > 0.85 for record in suite.records.values())
    entry = Contest(Bench(suite, trials=2, seed=0, examples=32)).methods["InputGram, Cauchy"]()
    assert {task: table.shape for task, table in entry.probabilities.items()} == {"odd": (300, 2), "large": (300, 2)}
    accuracy = [(entry.probabilities[t].argmax(1) == suite.labels("test")[t]).double().mean() for t in suite.tasks]
    assert float(sum(accuracy)) / 2 > 0.6


def test_experts_on_outputs(names: dict[str, Any]) -> None:
    network = torch.nn.Linear(3, 2)
    state = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    vectors = TaskVectors(state, {"a": {"weight": torch.ones(2, 3), "bias": torch.ones(2)}})
    model = SpanModel(network, vectors, ProductOfExperts.of(["a"]))
    inputs, at = torch.randn(5, 3, generator=seeded(0)), model.coefficients({})
    rows, forward = torch.arange(5), (lambda net, x: net(x))
    even = torch.full((5,), math.log(2))
    assert_close(names["certain"](model, inputs, forward).function(at, rows), even, 1e-6)
    assert_close(names["few_shot"](model, inputs, torch.ones(5).long(), forward).function(at, rows), even, 1e-6)
