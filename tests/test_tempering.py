"""Temperatures: the range against propriety, the search against a closed form, the baseline against a grid."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from inference.gibbs import gibbs
from inference.logit_temperature import fit_ensemble_temperature, fit_logit_temperature, scaled_mean
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
from tests.levels import inverse_temperature_error
from tests.seeds import seed_of, seeded

NAMES = ["a", "b", "c"]


# --- the range ---


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


# --- the search ---


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


# --- the calibration baseline ---


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


# --- the logit temperature of an ensemble ---


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
