"""The temperature of logits, alone and chosen together with the posterior's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inference.logit_temperature import fit_ensemble_temperature, fit_logit_temperature, scaled_mean
from inference.tempering import temper
from tests.levels import inverse_temperature_error
from tests.seeds import seeded


def test_the_logit_temperature_is_the_minimum_of_the_nll(generator: torch.Generator) -> None:
    logits = 4 * torch.randn(300, 5, generator=generator, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=logits / 2.5).sample()
    found = fit_logit_temperature(logits, labels)
    grid = torch.linspace(0.2, 10, 100_001, dtype=torch.float64)
    losses = torch.stack([nn.functional.cross_entropy(logits / t, labels) for t in grid[::100]])
    assert abs(found - float(grid[::100][losses.argmin()])) < 0.011
    t = torch.tensor(found, dtype=torch.float64, requires_grad=True)
    nn.functional.cross_entropy(logits / t, labels).backward()
    assert t.grad is not None
    assert abs(float(t.grad)) < 1e-9
    assert abs(1 / found - 1 / 2.5) < inverse_temperature_error(logits, 1 / 2.5)


def test_tasks_count_alike_in_the_logit_temperature(generator: torch.Generator) -> None:
    """The minimum of the unweighted mean over tasks, of unequal sizes and classes; not the pooled one."""
    logits = {
        "small": 4 * torch.randn(60, 3, generator=generator, dtype=torch.float64),
        "large": 4 * torch.randn(900, 7, generator=generator, dtype=torch.float64),
    }
    truth = {"small": 4.0, "large": 1.0}
    labels = {task: torch.distributions.Categorical(logits=z / truth[task]).sample() for task, z in logits.items()}
    found = fit_logit_temperature(logits, labels)
    t = torch.tensor(found, dtype=torch.float64, requires_grad=True)
    losses = [nn.functional.cross_entropy(z / t, labels[task]) for task, z in logits.items()]
    torch.stack(losses).mean().backward()
    assert t.grad is not None
    assert abs(float(t.grad)) < 1e-9
    padded = torch.cat([nn.functional.pad(z, (0, 7 - z.shape[1]), value=-1e4) for z in logits.values()])
    pooled = fit_logit_temperature(padded, torch.cat(list(labels.values())))
    assert abs(found - pooled) > 0.1
    # Of tasks of one size, pooling is the same; and one task is that task.
    even = {task: z[:60] for task, z in logits.items()}, {task: y[:60] for task, y in labels.items()}
    padded = torch.cat([nn.functional.pad(z, (0, 7 - z.shape[1]), value=-1e4) for z in even[0].values()])
    assert math.isclose(
        fit_logit_temperature(*even), fit_logit_temperature(padded, torch.cat(list(even[1].values()))), rel_tol=1e-6
    )
    alone = fit_logit_temperature({"small": logits["small"]}, {"small": labels["small"]})
    assert alone == fit_logit_temperature(logits["small"], labels["small"])
    with pytest.raises(ValueError, match="logits of small, large; labels of small"):
        fit_logit_temperature(logits, {"small": labels["small"]})


def test_the_logit_temperature_scales_with_the_logits_and_takes_any_dtype(generator: torch.Generator) -> None:
    logits = 3 * torch.randn(200, 4, generator=generator)
    labels = torch.distributions.Categorical(logits=logits).sample()
    one, two = fit_logit_temperature(logits, labels), fit_logit_temperature(2 * logits, labels)
    assert math.isclose(two, 2 * one, rel_tol=1e-9)


def test_classes_that_are_ruled_out_have_no_say_in_the_logit_temperature(generator: torch.Generator) -> None:
    logits = 4 * torch.randn(100, 3, generator=generator, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=logits / 2).sample()
    padded = nn.functional.pad(logits, (0, 2), value=-math.inf)
    assert math.isclose(fit_logit_temperature(padded, labels), fit_logit_temperature(logits, labels), rel_tol=1e-9)
    for bad in (-math.inf, math.inf, math.nan):
        wrong = logits.clone()
        wrong[3, labels[3]] = bad
        with pytest.raises(ValueError, match="logits of all are NaN or .inf, or -inf for a label"):
            fit_logit_temperature(wrong, labels)


def test_logits_that_are_all_right_or_all_wrong_hit_the_bounds() -> None:
    logits = torch.eye(3, dtype=torch.float64)
    assert fit_logit_temperature(logits, torch.arange(3)) == 0.01
    assert fit_logit_temperature(-logits, torch.arange(3)) == 100.0
    assert fit_logit_temperature(torch.full((3, 4), 0.3), torch.arange(3)) == 1.0
    for bad in ((torch.zeros(3), torch.arange(3)), (logits, torch.arange(2)), (logits[:0], torch.arange(0))):
        with pytest.raises(ValueError, match="fit_logit_temperature"):
            fit_logit_temperature(*bad)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="are NaN or .inf, or -inf for a label"):
            fit_logit_temperature(torch.tensor([[0.0, value]]), torch.tensor([0]))


@pytest.mark.parametrize("share", [0.65, 0.8])
def test_logit_temperature_of_two_members_is_the_closed_form(share: float) -> None:
    """One member is sure by a gap g, the other says nothing: (s(g / tau) + 1/2) / 2 = share."""
    right = torch.arange(20) < 20 * share
    gap = 3.0
    sure = torch.tensor([gap, 0.0], dtype=torch.float64).expand(20, 2)
    found = fit_ensemble_temperature(torch.stack([sure, torch.zeros_like(sure)]), (~right).long())
    wanted = 2 * share - 0.5
    if wanted < 1:
        assert math.isclose(found, gap / math.log(wanted / (1 - wanted)), rel_tol=1e-5)
    else:
        assert found < 0.02  # no temperature makes the mean so sure


def test_equal_members_are_one_model(generator: torch.Generator) -> None:
    logits = {task: torch.randn(n, c, generator=generator).double() for task, n, c in (("a", 40, 3), ("b", 60, 5))}
    labels = {task: (3 * table).softmax(1).multinomial(1, generator=generator)[:, 0] for task, table in logits.items()}
    alone = fit_logit_temperature(logits, labels)
    stacked = {task: table.expand(4, -1, -1) for task, table in logits.items()}
    assert math.isclose(fit_ensemble_temperature(stacked, labels), alone, rel_tol=1e-5)
    assert fit_ensemble_temperature(torch.ones(2, 3, 4), torch.zeros(3, dtype=torch.long)) == 1.0
    with pytest.raises(ValueError, match="Give both for the same tasks"):
        fit_ensemble_temperature({"a": stacked["a"]}, labels)
    with pytest.raises(ValueError, match=r"give \(n, classes\) and \(n,\)"):
        fit_ensemble_temperature(stacked["a"], labels["b"])


def test_scaled_mean_is_that_of_scaled_members(generator: torch.Generator) -> None:
    members = torch.randn(3, 5, 4, generator=generator).double()
    expected = (members / 1.7).softmax(-1).mean(0)
    torch.testing.assert_close(scaled_mean(members.log_softmax(-1), 1.7).exp(), expected)


def test_chosen_together_the_posterior_is_colder_and_the_likelihood_better() -> None:
    """Members that are too sure by a factor of 3: spread mends that a little, one divisor mends it all."""
    generator = seeded(0)
    truth = 2 * torch.randn(400, generator=generator, dtype=torch.float64)
    labels = (torch.rand(400, generator=generator, dtype=torch.float64) < truth.sigmoid()).long()
    noise = torch.randn(32, 400, generator=generator, dtype=torch.float64)

    def predict(draw: Tensor) -> Tensor:
        logit = 3 * truth + draw
        return torch.stack([torch.zeros_like(logit), logit], 1).log_softmax(1)

    cache: dict[str, Any] = {}
    alone, both = (
        temper(
            lambda t: list(t * noise), predict, labels, (0.1, 30.0),
            num_temperatures=9, scale_logits=scale, cache=cache,
        )
        for scale in (False, True)
    )  # fmt: skip
    assert both.temperature < alone.temperature
    assert both.best.nll < alone.best.nll
    assert alone.best.logit_temperature == 1.0
    for point in both.path:
        members = torch.stack([predict(point.temperature * each) for each in noise])
        assert math.isclose(point.logit_temperature, fit_ensemble_temperature(members, labels), rel_tol=1e-6)
        mean = scaled_mean(members, point.logit_temperature)
        assert math.isclose(point.nll, float(nn.functional.nll_loss(mean, labels)), rel_tol=1e-9)
        assert math.isclose(point.accuracy, float((mean.argmax(1) == labels).double().mean()))
    plain = {point.temperature: point.nll for point in alone.path}
    assert all(point.nll <= plain[point.temperature] + 1e-12 for point in both.path if point.temperature in plain)
