"""Temperatures: the range against propriety, the search again by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from inference.gibbs import gibbs
from inference.models.ensemble import MergedEnsemble
from inference.models.model_draws import SpanDraws
from inference.models.statistics_files import collect_statistics
from inference.propriety import require_proper
from inference.tempering import COLDEST, Tempering, temper, temperature_range
from poe_models import (
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Directional,
    Energy,
    Gaussian,
    Huber,
    Identity,
    InputGram,
    ProductOfExperts,
    Relative,
    StudentT,
    TaskVectors,
    average,
    span_statistics,
)
from poe_models.posterior import Posterior
from tests.helpers import name_of, random_updates
from tests.seeds import seed_of, seeded

NAMES = ["a", "b", "c"]


POWERS: list[tuple[Energy, float]] = [(Cauchy(), 1.0), (Cauchy(2.5), 2.5), (StudentT(4.0), 2.5)]


IMPORTANCE = [1.0, 2.0, 0.5]


def assert_edge(posterior: Posterior, temperature: float) -> None:
    """Without an anchor there is a posterior just below this temperature, and none at it."""
    require_proper(replace(posterior, temperature=0.999 * temperature))
    with pytest.raises(ValueError, match="improper"):
        require_proper(replace(posterior, temperature=temperature))


@pytest.mark.parametrize(("energy", "k"), [*POWERS, (StudentT(3.0, "multivariate"), 5.5)], ids=name_of)
def test_the_highest_temperature_is_where_the_experts_stop_to_hold_the_update(
    energy: Energy, k: float, generator: torch.Generator
) -> None:
    updates = random_updates(generator, 2, 3, 2, 4)
    bare = Anchor(average, AbsolutePrecision(0.0))
    posterior = ProductOfExperts.of(NAMES, Identity(), energy, importance=IMPORTANCE, anchor=bare).bind(updates)
    low, high = temperature_range(posterior)
    assert math.isclose(high, 2 * 3.5 * k / 8, rel_tol=1e-12)
    assert math.isclose(low, COLDEST * high, rel_tol=1e-12)
    assert_edge(posterior, high)


@pytest.mark.parametrize(("energy", "k"), POWERS, ids=name_of)
def test_in_the_span_it_is_the_spans_dimension_that_counts(
    energy: Energy, k: float, generator: torch.Generator
) -> None:
    updates = random_updates(generator, 1, 3, 4, 5)
    poe = ProductOfExperts.of(NAMES, Identity(), energy, importance=IMPORTANCE)
    posterior = poe.bind(span_statistics(poe, updates))
    _, high = temperature_range(posterior)
    assert math.isclose(high, 2 * 3.5 * k / 3, rel_tol=1e-12)
    # The same experts in the three coordinates of the span, as updates of their own.
    inside = (posterior.span.transform[0] != 0).any(0)
    own = torch.stack([expert.update[0, inside] for expert in posterior.experts])
    bare = replace(poe, anchor=Anchor(precision=AbsolutePrecision(0.0)))
    assert_edge(bare.bind(own), high)


@pytest.mark.parametrize("energy", [Gaussian(2.0), Huber(0.7)], ids=name_of)
def test_other_energies_are_measured_by_what_the_base_costs(energy: Energy, generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 4, 2)
    posterior = ProductOfExperts.of(NAMES, Identity(), energy, Relative(0.5)).bind(updates)
    _, high = temperature_range(posterior)
    cost = 3 * float(energy.rho(torch.tensor(4.0, dtype=torch.float64)))  # q(0) / s^2 = 1 / 0.5^2
    assert math.isclose(high, 2 * cost / 8, rel_tol=1e-12)


def test_directions_that_no_expert_sees_do_not_count(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 1, 12)
    assert math.isclose(temperature_range(ProductOfExperts.of(NAMES).bind(updates))[1], 2 * 3 / 3)
    directional = ProductOfExperts.of(NAMES, Directional()).bind(random_updates(generator, 1, 3, 4, 5))
    assert math.isclose(temperature_range(directional)[1], 2 * 3 / 3)


def test_modules_of_different_rank_span_the_range(generator: torch.Generator) -> None:
    updates = random_updates(generator, 3, 3, 4, 5)
    updates[1, 2] = updates[1, 1]  # two experts agree: a plane
    updates[2] = 0.0  # nothing to say
    poe = ProductOfExperts.of(NAMES)
    with pytest.warns(UserWarning, match="nothing changes 2"):
        posterior = poe.bind(span_statistics(poe, updates))
    low, high = temperature_range(posterior)
    assert math.isclose(high, 2 * 3 / 2)
    assert math.isclose(low, COLDEST * 2 * 3 / 3)
    nothing = poe.bind(span_statistics(poe, updates[2:]))
    with pytest.raises(ValueError, match="every update is zero"):
        temperature_range(nothing)


def test_modules_without_updates_say_nothing_in_full_coordinates_either(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 2, 4)
    updates[1] = 0.0
    anchored = Anchor(precision=AbsolutePrecision(0.3))
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy(), Relative(1.0), anchor=anchored)
    both = temperature_range(poe.bind(updates))
    assert both == temperature_range(poe.bind(updates[:1]))
    assert both[0] > 0


def wobbling(log_temperature_star: float, n: int = 400) -> tuple[Any, Any, Tensor]:
    """A made-up ensemble of two members with validation labels whose best temperature is known by symmetry.

    At log temperature ``t`` the members' logits for class 1 are ``exp(t - t*) - 1`` apart from the truth.
    """
    generator = seeded(0)
    truth = torch.randn(n, generator=generator, dtype=torch.float64)
    labels = (torch.rand(n, generator=generator, dtype=torch.float64) < truth.sigmoid()).long()

    def sample(temperature: float) -> list[Tensor]:
        return [torch.tensor([math.log(temperature) - log_temperature_star, sign]).double() for sign in (-1.0, 1.0)]

    def predict(draw: Tensor) -> Tensor:
        logit = truth + 3 * draw[1] * draw[0].abs() + draw[0]
        return torch.stack([torch.zeros_like(logit), logit], 1).log_softmax(1)

    return sample, predict, labels


def test_the_best_temperature_is_found_with_its_whole_path() -> None:
    sample, predict, labels = wobbling(math.log(0.05))
    ticks: list[tuple[int, int]] = []
    found = temper(
        sample, predict, labels, (1e-3, 1.0), num_temperatures=7, refinements=4,
        progress=lambda i, n: ticks.append((i, n)),
    )  # fmt: skip
    assert isinstance(found, Tempering)
    # The labels' own best temperature, by a fine grid. The search halves its first spacing four times.
    grid = [math.log(0.05) + step / 100 for step in range(-80, 81)]
    means = (torch.stack([predict(member).exp() for member in sample(math.exp(t))]).mean(0) for t in grid)
    nll = [float(nn.functional.nll_loss(mean.log(), labels)) for mean in means]
    spacing = math.log(1e3) / 6 / 2**4
    assert abs(math.log(found.temperature) - grid[nll.index(min(nll))]) < spacing + 0.01
    assert found.best.nll == min(point.nll for point in found.path)
    temperatures = [point.temperature for point in found.path]
    assert temperatures == sorted(set(temperatures))
    assert temperatures[0] == 1e-3
    assert temperatures[-1] == 1.0
    assert 7 <= len(found.path) <= 15
    assert found.status == "the best temperature is inside the range"
    assert ticks == [(i, 15) for i in range(1, len(found.path) + 1)]
    assert found.num_evaluations == 2 * len(found.path)


def test_every_score_is_that_of_the_mean_probabilities() -> None:
    sample, predict, labels = wobbling(0.0)
    found = temper(sample, predict, labels, (0.5, 2.0), num_temperatures=3, refinements=0)
    for point in found.path:
        mean = torch.stack([predict(draw).exp() for draw in sample(point.temperature)]).mean(0)
        assert math.isclose(point.nll, float(nn.functional.nll_loss(mean.log(), labels)), rel_tol=1e-12)
        assert math.isclose(point.accuracy, float((mean.argmax(1) == labels).double().mean()))
        oracle = multiclass_calibration_error(mean, labels, num_classes=2, n_bins=20, norm="l1")
        assert math.isclose(point.ece, float(oracle), rel_tol=1e-5)
        assert point.num_members == 2


@pytest.mark.parametrize("refinements", [0, 2])  # the grid alone ends far from its best point
def test_the_chosen_members_are_those_that_were_judged(refinements: int) -> None:
    """The draws that are kept have the best point's scores, whatever a second call of `sample` would give."""
    sample, predict, labels = wobbling(math.log(0.05))
    asked: list[float] = []

    def fresh(temperature: float) -> list[Tensor]:
        asked.append(temperature)
        return [draw + 0.01 * len(asked) for draw in sample(temperature)]

    found = temper(fresh, predict, labels, (1e-3, 1.0), num_temperatures=5, refinements=refinements)
    mean = torch.stack([predict(draw).exp() for draw in found.draws]).mean(0)
    assert math.isclose(found.best.nll, float(nn.functional.nll_loss(mean.log(), labels)), rel_tol=1e-12)
    assert found.best.num_members == len(found.draws) == 2
    assert len(asked) == len(set(asked)) == len(found.path)


def test_all_temperatures_are_judged_with_the_same_number_of_members() -> None:
    sample, predict, labels = wobbling(0.0)
    with pytest.raises(ValueError, match="1 members at temperature 1, 2 at another"):
        temper(lambda t: sample(t)[: 1 if t == 1.0 else 2], predict, labels, (0.1, 1.0), num_temperatures=3)
    with pytest.raises(ValueError, match="gave a list_iterator, which can be iterated once only"):
        temper(lambda t: iter(sample(t)), predict, labels, (0.1, 1.0))


def test_more_members_want_another_temperature() -> None:
    """Why the number is kept: of one member the coldest is best here; the mean of many wants a spread."""
    generator = seeded(0)
    truth = 2 * torch.randn(400, generator=generator, dtype=torch.float64)
    labels = (torch.rand(400, generator=generator, dtype=torch.float64) < truth.sigmoid()).long()
    noise = torch.randn(32, 400, generator=generator, dtype=torch.float64)

    def predict(draw: Tensor) -> Tensor:
        logit = 3 * truth + draw  # too sure
        return torch.stack([torch.zeros_like(logit), logit], 1).log_softmax(1)

    one, many = (
        temper(lambda t, n=n: list(t * noise[:n]), predict, labels, (0.1, 30.0), num_temperatures=9).temperature
        for n in (1, 32)
    )
    assert many > 2 * one


@pytest.mark.parametrize("start", [1e-9, 1e-3, 0.04, 1.0, 50.0])
@pytest.mark.parametrize("star", [1e-3, 0.05, 1.0])
def test_a_walk_from_anywhere_finds_what_the_grid_finds(start: float, star: float) -> None:
    sample, predict, labels = wobbling(math.log(star))
    grid = temper(sample, predict, labels, (1e-3, 1.0), num_temperatures=13, refinements=1)
    walk = temper(sample, predict, labels, (1e-3, 1.0), num_temperatures=13, refinements=1, start=start)
    assert walk.temperature == grid.temperature
    assert set(walk.path) <= set(grid.path)
    assert walk.status == grid.status
    if start == 0.04 and star == 0.05:
        assert len(walk.path) <= 6


@pytest.mark.parametrize(("star", "word"), [(1e-6, "lowest temperature is the best"), (1e6, "highest temperature is")])
def test_the_end_of_the_range_is_said(star: float, word: str) -> None:
    sample, predict, labels = wobbling(math.log(star))
    found = temper(sample, predict, labels, (0.1, 1.0), num_temperatures=4)
    assert word in found.status


def test_nothing_is_evaluated_twice() -> None:
    sample, predict, labels = wobbling(math.log(0.3))
    calls: list[Tensor] = []

    def counting(draw: Tensor) -> Tensor:
        calls.append(draw)
        return predict(draw)

    cache: dict[str, Any] = {}
    first = temper(sample, counting, labels, (0.1, 1.0), num_temperatures=4, cache=cache)
    assert len(calls) == first.num_evaluations == len(cache)
    again = temper(sample, counting, labels, (0.1, 1.0), num_temperatures=4, cache=cache)
    assert again.num_evaluations == 0
    assert again.path == first.path
    assert len(calls) == len(cache)
    # Draws of an unknown kind are not cached, for they have no digest.
    temper(
        lambda t: [object()], lambda draw: predict(sample(1.0)[0]), labels, (0.1, 1.0), num_temperatures=2, cache=cache
    )
    assert len(cache) == len(calls)


def test_several_tasks_count_alike(generator: torch.Generator) -> None:
    sample, predict, labels = wobbling(0.0)
    sizes = {"small": 50, "large": 400}

    def both(draw: Tensor) -> dict[str, Tensor]:
        return {task: predict(draw)[:n] for task, n in sizes.items()}

    tasks = {task: labels[:n] for task, n in sizes.items()}
    found = temper(sample, both, tasks, (0.5, 1.0), num_temperatures=2, refinements=0)
    for task in sizes:
        alone = temper(
            sample, lambda draw, task=task: both(draw)[task], tasks[task], (0.5, 1.0), num_temperatures=2, refinements=0
        )
        tasks[task] = alone.path[0].nll  # type: ignore[assignment]
    assert math.isclose(found.path[0].nll, sum(map(float, tasks.values())) / 2, rel_tol=1e-12)


def test_bad_arguments_are_named() -> None:
    sample, predict, labels = wobbling(0.0)
    for bounds in ((1.0, 1.0), (0.0, 1.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="give 0 < lowest < highest"):
            temper(sample, predict, labels, bounds)
    with pytest.raises(ValueError, match=r"`temper\(start=0\)`: give a temperature"):
        temper(sample, predict, labels, (0.1, 1.0), start=0.0)
    with pytest.raises(ValueError, match="no members at temperature 0.1"):
        temper(lambda temperature: [], predict, labels, (0.1, 1.0))
    with pytest.raises(ValueError, match=r"expected log probabilities \(400, classes\).*log_softmax"):
        temper(sample, lambda draw: predict(draw).exp(), labels, (0.1, 1.0))
    with pytest.raises(ValueError, match=r"expected log probabilities \(400, classes\)"):
        temper(sample, lambda draw: predict(draw)[:7], labels, (0.1, 1.0))
    with pytest.raises(ValueError, match="predictions are about all; labels about one"):
        temper(sample, predict, {"one": labels}, (0.1, 1.0))


def test_from_weights_to_a_temperature(generator: torch.Generator) -> None:
    """The whole way on a real model: at the chosen temperature the ensemble is what `predict` says."""
    torch.manual_seed(seed_of(0))
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    experts = {
        name: {k: w + 0.4 * torch.randn(w.shape, generator=generator, dtype=torch.float64) for k, w in base.items()}
        for name in NAMES
    }
    vectors = TaskVectors(base, experts, dtype=torch.float64)
    poe = ProductOfExperts.of(NAMES)
    statistics = collect_statistics(vectors, poe)
    posterior = poe.bind(statistics)
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (60,), generator=generator)

    def sample(temperature: float) -> SpanDraws:
        tempered = replace(posterior, temperature=temperature)
        draws = gibbs(tempered, 20, generator=seeded(1), warmup=20)
        return SpanDraws.of(draws, posterior).thinned(5).restrict(r"2\.weight")

    low, high = temperature_range(posterior)
    ensemble = MergedEnsemble(vectors, poe, sample(high))
    predictor = ensemble.predictor(model, [x])
    found = temper(sample, predictor, labels, (low, high), num_temperatures=5)
    assert predictor.reused == "2"
    # Labels are random, so the most spread-out predictions are the best ones, and the status says where they are.
    assert found.temperature > 10 * low
    chosen = MergedEnsemble(vectors, poe, found.draws).predict(model, [x])
    nll = nn.functional.nll_loss(chosen.probabilities.log(), labels)
    assert math.isclose(found.best.nll, float(nll), rel_tol=1e-10)
