"""Comparison of methods against loops, closed forms and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, rankdata, spearmanr
from torch import Tensor

from diagnostics.predictions.agreement import pareto_front, rank_agreement
from diagnostics.predictions.calibration import calibration, calibration_difference
from diagnostics.predictions.comparison import SCORES, BySeed, Comparison, compare_methods
from inference import scores
from tests.levels import binomial_range, deviation_error
from tests.seeds import seeded

SIZES = {"a": 120, "b": 80, "c": 60}


def suite(sharpness: dict[str, float], seeds: int = 1) -> tuple[dict[str, dict[str, list[Tensor]]], dict[str, Tensor]]:
    """Methods whose logits carry the label by their sharpness."""
    generator = seeded(11)
    labels = {task: torch.randint(0, 3, (size,), generator=generator) for task, size in SIZES.items()}
    predictions = {
        method: {
            task: [
                (
                    torch.randn(len(y), 3, generator=generator, dtype=torch.float64)
                    + strength * (1 + number / 4) * torch.nn.functional.one_hot(y, 3)
                ).softmax(1)
                for _ in range(seeds)
            ]
            for number, (task, y) in enumerate(labels.items())
        }
        for method, strength in sharpness.items()
    }
    return predictions, labels


@pytest.fixture(scope="module")
def compared() -> tuple[dict[str, dict[str, list[Tensor]]], dict[str, Tensor], Comparison]:
    predictions, labels = suite({"average": 0.5, "product": 1.0, "other": 1.0, "expert": 3.0})
    experts = predictions.pop("expert")
    return predictions, labels, compare_methods(predictions, labels, seed=0, experts=experts, num_resamples=300)


def test_values_are_those_of_the_plain_scores(
    compared: tuple[dict[str, dict[str, list[Tensor]]], dict[str, Tensor], Comparison],
) -> None:
    predictions, labels, found = compared
    plain = {
        "accuracy": scores.accuracy,
        "nll": lambda p, y: scores.nll(p.log(), y),
        "brier": scores.brier,
        "ece": scores.ece,
    }
    for score in SCORES:
        for method, by_task in predictions.items():
            own = [plain[score](by_task[task][0], y) for task, y in labels.items()]
            assert found.mean(method, score).value == pytest.approx(np.mean(own))
            assert found.on_task(method, "b", score).value == pytest.approx(own[1])
            if score == "accuracy":
                assert found.worst(method).value == pytest.approx(min(own))
                assert found.worst_task(method) == list(labels)[int(np.argmin(own))]


def test_ranks_and_normalised_accuracy_by_scipy(
    compared: tuple[dict[str, dict[str, list[Tensor]]], dict[str, Tensor], Comparison],
) -> None:
    predictions, _, found = compared
    table = found.values["accuracy"].numpy()
    ranks = rankdata(-table, axis=0).mean(1)
    normal = (table / found.experts.numpy()).mean(1)  # type: ignore[union-attr]
    for place, method in enumerate(predictions):
        assert found.rank(method).value == pytest.approx(ranks[place])
        assert found.normalised(method).value == pytest.approx(normal[place])
    assert found.rank("average", "nll").value == pytest.approx(rankdata(found.values["nll"].numpy(), axis=0).mean(1)[0])


def test_errors_are_closed_forms(
    compared: tuple[dict[str, dict[str, list[Tensor]]], dict[str, Tensor], Comparison],
) -> None:
    """The error of a mean over tasks adds binomial variances; a paired difference has that of the differences."""
    predictions, labels, found = compared
    accuracy = found.values["accuracy"][1]
    variances = [float(p * (1 - p)) / size for p, size in zip(accuracy, SIZES.values(), strict=True)]
    error = deviation_error(300) + 1 / min(SIZES.values())  # of 300 resamples, and n or n - 1
    assert found.mean("product").error == pytest.approx(math.sqrt(sum(variances)) / 3, rel=error)
    variances = []
    for task, y in labels.items():
        right = [(predictions[method][task][0].argmax(1) == y).double() for method in ("product", "average")]
        variances.append(float((right[0] - right[1]).var()) / len(y))
    difference = found.difference("product", "average")
    assert difference.error == pytest.approx(math.sqrt(sum(variances)) / 3, rel=error)
    assert difference.value == pytest.approx(found.mean("product").value - found.mean("average").value)


def test_a_clear_difference_is_told() -> None:
    predictions, labels = suite({"dull": 0.5, "sharp": 4.0})
    difference = compare_methods(predictions, labels, seed=0, num_resamples=300).difference("sharp", "dull")
    assert difference.value > 8 * difference.error
    assert difference.low > 0


def test_one_pair_has_the_same_interval_alone_and_in_a_family_of_one(
    compared: tuple[dict[str, dict[str, list[Tensor]]], dict[str, Tensor], Comparison],
) -> None:
    _, _, found = compared
    for score in SCORES:
        alone = found.difference("product", "average", score)
        family = found.differences([("product", "average")], score)["product", "average"]
        assert family.value == alone.value
        assert family.error == pytest.approx(alone.error, rel=1e-12)
        assert family.high - family.low == pytest.approx(2 * 1.96 * alone.error, rel=0.15)


def test_a_family_is_wider_than_a_pair_and_narrower_than_bonferroni(
    compared: tuple[dict[str, dict[str, list[Tensor]]], dict[str, Tensor], Comparison],
) -> None:
    _, _, found = compared
    pairs = [("product", "average"), ("product", "other"), ("other", "average")]
    family = found.differences(pairs)
    reaches = {(each.high - each.value) / each.error for each in family.values()}
    assert max(reaches) == pytest.approx(min(reaches))
    assert 2.0 < max(reaches) < 2.6  # of three normal pairs 2.34 (Tukey), by Bonferroni 2.39
    assert found.against_best() == {other: family["product", other] for other in ("average", "other")} or (
        found.best() == "other"
    )
    assert found.best() == max(found.methods, key=lambda method: found.mean(method).value)
    assert found.best("nll") == min(found.methods, key=lambda method: found.mean(method, "nll").value)
    again = found.differences([*pairs, ("product", "product")])
    assert (again["product", "product"].low, again["product", "product"].high) == (0.0, 0.0)
    assert {pair: again[pair] for pair in pairs} == family  # a pair that cannot differ costs nothing


def comparison_of(right: Tensor, num_resamples: int, generator: torch.Generator) -> Comparison:
    """Of methods on one task whose examples they get right or wrong, ``(methods, n)`` bool; accuracy alone."""
    methods, size = right.shape
    drawn = torch.randint(size, (num_resamples, size), generator=generator)
    values, replicates = right.double().mean(1), right.double()[:, drawn].mean(2).mT
    return Comparison(
        tuple(f"m{i}" for i in range(methods)), ("t",), {"accuracy": values[:, None]},
        {"accuracy": replicates[:, :, None]}, None, None, 0.95, (),
    )  # fmt: skip


def claims(simulations: int, methods: int, better: float, generator: torch.Generator) -> tuple[int, int, int]:
    """In how many data sets something is claimed about methods that are equal but for the first.

    Returns:
        Data sets in which the winner is said to beat some other, by intervals of the winner and by those of single
        pairs; and those in which the first is said to beat all the others.
    """
    by_winner, by_pairs, beats_all = 0, 0, 0
    chances = torch.full((methods, 1), 0.7)
    chances[0] += better
    for _ in range(simulations):
        right = torch.rand(methods, 150, generator=generator) < chances
        found = comparison_of(right, 400, generator)
        winner, gaps = found.best(), found.against_best()
        by_winner += any(gap.low > 0 for gap in gaps.values())
        by_pairs += any(found.difference(winner, other).low > 0 for other in gaps)
        beats_all += winner == "m0" and all(gap.low > 0 for gap in gaps.values())
    return by_winner, by_pairs, beats_all


def test_the_winner_of_equal_methods_beats_none_and_a_better_one_is_found(generator: torch.Generator) -> None:
    simulations, methods = 150, 8
    by_winner, by_pairs, _ = claims(simulations, methods, 0.0, generator)
    assert by_winner <= binom.isf(1e-6, simulations, 0.05)
    assert by_pairs > binom.isf(1e-6, simulations, 0.05), "single intervals are for single pairs"
    # Better by 0.22, which is 4.8 standard errors of a pair: found in most data sets, though 28 pairs were looked at.
    _, _, beats_all = claims(60, methods, 0.22, generator)
    assert beats_all > binom.ppf(1e-6, 60, 0.8)


def test_one_task_agrees_with_calibration() -> None:
    predictions, labels = suite({"one": 1.0, "two": 2.0})
    only = {method: {"a": by_task["a"]} for method, by_task in predictions.items()}
    found = compare_methods(only, {"a": labels["a"]}, seed=0, num_resamples=2000)
    one, two = (by_task["a"][0] for by_task in only.values())
    alone = calibration(one, labels["a"], seed=9, num_resamples=2000)
    between = calibration_difference(one, two, labels["a"], seed=9, num_resamples=2000)
    error = math.sqrt(2) * 1.4 * deviation_error(2000)  # of two bootstraps; ECE's are not normal: kurtosis below 5
    for score in SCORES:
        own = found.mean("one", score)
        assert own.value == pytest.approx(alone.scores[score].value)
        assert own.error == pytest.approx(alone.scores[score].error, rel=error)
        pair = found.difference("one", "two", score)
        assert pair.value == pytest.approx(between[score].value)
        assert pair.error == pytest.approx(between[score].error, rel=error)


def test_tasks_are_resampled_apart() -> None:
    """The same task twice: the mean's error is that of one by the root of two; the worst task's is its own."""
    predictions, labels = suite({"one": 0.5, "easy": 4.0})
    twice = {"one": {"a": predictions["one"]["a"], "b": predictions["one"]["a"]}}
    found = compare_methods(twice, {"a": labels["a"], "b": labels["a"]}, seed=0, num_resamples=1000)
    error = math.sqrt(2) * deviation_error(1000)
    assert found.mean("one").error == pytest.approx(found.on_task("one", "a").error / math.sqrt(2), rel=error)
    uneven = {"one": {"a": predictions["one"]["a"], "c": predictions["easy"]["c"]}}
    found = compare_methods(uneven, {"a": labels["a"], "c": labels["c"]}, seed=0, num_resamples=200)
    assert found.worst("one").error == pytest.approx(found.on_task("one", "a").error)
    assert found.worst_task("one") == "a"


def test_the_same_method_twice_is_no_different() -> None:
    predictions, labels = suite({"one": 1.0})
    found = compare_methods({"one": predictions["one"], "again": predictions["one"]}, labels, seed=0, num_resamples=50)
    same = found.difference("one", "again", "ece")
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    assert found.rank("one").value == 1.5
    assert found.front() == {"one": 1.0, "again": 1.0}
    assert found.on_front() == ("one", "again")


def test_seeds_add_their_spread() -> None:
    """Two seeds, one always right and one always wrong: the error is that of the seeds, 1 / (2 sqrt 2)."""
    y = torch.zeros(400, dtype=torch.int64)
    right, wrong = torch.tensor([[0.9, 0.1]] * 400), torch.tensor([[0.1, 0.9]] * 400)
    predictions: dict[str, dict[str, BySeed]] = {
        "swings": {"t": [right, wrong]},
        "steady": {"t": right},
        "swings too": {"t": [right, wrong]},
    }
    found = compare_methods(predictions, {"t": y}, seed=0, num_resamples=2000)
    assert found.mean("swings").value == 0.5
    assert found.mean("swings").error == pytest.approx(0.5 / math.sqrt(2), rel=0.05)
    assert found.mean("steady").error == 0.0
    assert found.difference("swings", "swings too").error == 0.0
    assert found.warnings == ("2 seeds: intervals are too narrow over seeds",)


def test_summaries_say_the_same(
    compared: tuple[dict[str, dict[str, list[Tensor]]], dict[str, Tensor], Comparison],
) -> None:
    _, _, found = compared
    summary = found.summary("product")
    assert list(summary) == ["accuracy", "worst", "normalised", "nll", "brier", "ece", "rank"]
    assert summary["accuracy"] == found.mean("product")
    assert summary["normalised"] == found.normalised("product")
    table = found.to_dataframe()
    assert table.index.tolist() == ["average", "product", "other"]
    assert table.loc["product", "worst_low"] == found.worst("product").low
    assert table.loc["product", "worst_task"] == found.worst_task("product")
    assert table.loc["product", "front"] == found.front()["product"]
    assert found.warnings == ("one seed: intervals are over test examples only",)


def test_without_experts_there_is_nothing_to_normalise_by() -> None:
    predictions, labels = suite({"one": 1.0})
    found = compare_methods(predictions, labels, seed=0, num_resamples=10)
    assert "normalised" not in found.summary("one")
    assert "normalised" not in found.to_dataframe()
    with pytest.raises(ValueError, match="no experts"):
        found.normalised("one")


def test_experts_may_be_compared_with_themselves() -> None:
    predictions, labels = suite({"own experts": 1.0})
    found = compare_methods(predictions, labels, seed=0, experts=predictions["own experts"], num_resamples=50)
    share = found.normalised("own experts")
    assert (share.value, share.error) == (1.0, 0.0)


def test_wrong_names_and_tasks_are_refused() -> None:
    predictions, labels = suite({"one": 1.0, "two": 1.0})
    found = compare_methods(predictions, labels, seed=0, num_resamples=10)
    for call in (
        lambda: found.mean("three"),
        lambda: found.mean("one", "f1"),
        lambda: found.on_task("one", "z"),
        lambda: found.rank("one", "f1"),
        lambda: found.front("f1"),
        lambda: found.on_front("f1"),
    ):
        with pytest.raises(ValueError, match="Give one of"):
            call()
    with pytest.raises(ValueError, match=r"`compare_methods\(confidence=95\)`: give a level between 0 and 1"):
        compare_methods(predictions, labels, seed=0, confidence=95)
    missing = {"one": {task: predictions["one"][task] for task in ("a", "b")}}
    with pytest.raises(ValueError, match="same tasks"):
        compare_methods(missing, labels, seed=0)
    uneven = {"one": {**predictions["one"], "a": predictions["one"]["a"] * 2}}
    with pytest.raises(ValueError, match="same number for every task"):
        compare_methods(uneven, labels, seed=0)
    with pytest.raises(ValueError, match="two, b.*row 0 has NaN"):
        compare_methods({"two": {**predictions["two"], "b": predictions["two"]["b"][0] * math.nan}}, labels, seed=0)
    with pytest.raises(ValueError, match="0 methods and 3 tasks"):
        compare_methods({}, labels, seed=0)


def test_front_against_a_loop(generator: torch.Generator) -> None:
    accuracy, ece = torch.randint(0, 6, (2, 20, 9), generator=generator)
    found = pareto_front(accuracy, ece)
    for b in range(20):
        for i in range(9):
            beaten = any(
                accuracy[b, j] >= accuracy[b, i]
                and ece[b, j] <= ece[b, i]
                and (accuracy[b, j] > accuracy[b, i] or ece[b, j] < ece[b, i])
                for j in range(9)
            )
            assert bool(found[b, i]) != beaten
    assert bool(found.any(1).all())
    for wrong in (torch.tensor([math.nan]), torch.zeros(2)):
        with pytest.raises(ValueError, match="same designs"):
            pareto_front(torch.zeros(1), wrong)


def test_rank_correlation_is_that_of_scipy(generator: torch.Generator) -> None:
    one = torch.randn(25, generator=generator).round(decimals=1)
    two = one + torch.randn(25, generator=generator)
    assert rank_agreement(one, two.numpy()).value == pytest.approx(spearmanr(one, two).statistic)
    assert rank_agreement(one, -two).value == pytest.approx(-rank_agreement(one, two).value)


@pytest.mark.parametrize("correlation", [0.0, 0.7])
def test_rank_correlation_covers(correlation: float, generator: torch.Generator) -> None:
    truth = 6 / math.pi * math.asin(correlation / 2)  # of normal pairs
    hits, trials = 0, 1000
    for _ in range(trials):
        x, e = torch.randn(2, 15, generator=generator)
        found = rank_agreement(x, correlation * x + math.sqrt(1 - correlation**2) * e)
        hits += found.low <= truth <= found.high
    fewest, most = binomial_range(trials, 0.94, 0.97)  # an approximation, wide where there is no correlation
    assert fewest <= hits <= most


def test_rank_correlation_at_awkward_points() -> None:
    perfect = rank_agreement(torch.arange(10.0), -torch.arange(10.0))
    assert perfect.value == pytest.approx(-1.0, abs=1e-12)
    assert perfect.low == -1.0
    assert -0.99 < perfect.high < -0.9
    assert perfect.trusted
    few = rank_agreement(torch.arange(5.0), torch.tensor([0.0, 1, 2, 4, 3]))
    assert few.value == pytest.approx(0.9)
    assert few.warnings == ("only 5 designs",)
    assert rank_agreement(torch.arange(3.0), torch.arange(3.0)).low == -1.0
    constant = rank_agreement(torch.arange(12.0), torch.zeros(12))
    assert math.isnan(constant.value)
    assert not constant.trusted
    for wrong in (torch.arange(4.0), torch.tensor([0.0, 1.0, math.nan]), torch.zeros(3, 1)):
        with pytest.raises(ValueError, match="three at least"):
            rank_agreement(torch.arange(3.0), wrong)
