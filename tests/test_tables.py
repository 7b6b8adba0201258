"""Tables of results have one line per row of what they say, and results print in a few lines."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from diagnostics.estimates import Estimate
from diagnostics.predictions.calibration import calibration
from diagnostics.predictions.evaluation import evaluate_predictions
from diagnostics.predictions.files import predictions_of
from diagnostics.predictions.shift import compare_detection, point_prediction
from diagnostics.report.page import page
from diagnostics.tails import hill, pooled_tails, tail_posterior
from diagnostics.tails.families import CAUCHY
from poe_models.printing import Brief
from tests.diagnosed import MODULES, NAMES, Results, made
from tests.seeds import seeded


@pytest.fixture(scope="module")
def results() -> Results:
    return made()


def test_one_row_for_each_module_of_a_merge(results: Results) -> None:
    table = results.convergence.to_dataframe()
    assert table["module"].tolist() == list(MODULES)
    assert table["status"].tolist() == ["converged", "converged"]
    assert table["rate"].tolist() == results.convergence.rate.tolist()
    assert np.isnan(table.loc[0, "weight_emoji"])  # its update is zero
    assert table.loc[1, "weight_emoji"] == results.convergence.relative_weights[1, 1]


def test_one_row_for_each_quantity_of_chains(results: Results) -> None:
    table = results.chains.to_dataframe()
    assert len(table) == 2 * 3
    row = table[(table["module"] == MODULES[1]) & (table["quantity"] == "animals")]
    assert row["r_hat"].item() == results.chains.summary.r_hat[1, 2]
    assert row["mcse_mean"].item() == results.chains.summary.mcse_mean[1, 2]
    silent = np.array([[False, True, False], [False] * 3])
    assert len(replace(results.chains, silent=silent).to_dataframe()) == 5


def test_one_row_for_each_coefficient(results: Results) -> None:
    table = results.intervals.to_dataframe()
    row = table[(table["module"] == MODULES[1]) & (table["update"] == "emoji")]
    found = [row[name].item() for name in ("median", "low", "high")]
    assert found == [getattr(results.intervals, name)[1, 1] for name in ("median", "low", "high")]
    assert len(table) == 2 * 3


def test_one_row_for_each_gamma_and_module(results: Results) -> None:
    table = results.sensitivity.to_dataframe()
    row = table[(table["gamma"] == 3.0) & (table["module"] == MODULES[0])]
    assert row["from_twin"].item() == results.sensitivity.from_twin[2, 0]
    assert row["score"].item() == results.sensitivity.scores[2]
    assert len(table) == 3 * 2
    assert "score" not in replace(results.sensitivity, scores=None).to_dataframe()


def test_one_row_for_each_module_and_expert(results: Results) -> None:
    table = results.residuals.to_dataframe()
    assert list(zip(table["module"], table["expert"], strict=True)) == [(m, n) for m in MODULES for n in NAMES]
    assert np.isnan(table.loc[1, "left"])
    assert not table.loc[1, "active"]
    np.testing.assert_allclose(
        table.groupby("module", sort=False)["left"].mean(), results.residuals.mean_squared("own")
    )


def test_one_row_for_each_bin_and_threshold(results: Results) -> None:
    bins, curve = results.reliability.to_dataframe(), results.selective.to_dataframe()
    assert bins["count"].sum() == 80
    assert (bins["right"][:-1].to_numpy() == bins["left"][1:].to_numpy()).all()
    assert curve["coverage"].tolist() == results.selective.coverage.tolist()
    assert (curve["low"] <= curve["high"]).all()


def test_one_row_for_each_corruption(results: Results) -> None:
    table = results.corrupted.to_dataframe()
    assert list(zip(table["kind"], table["severity"], strict=True)) == [(c.kind, c.severity) for c in results.corrupted]
    last = results.corrupted[-1].calibration
    assert (table.loc[6, "ece"], table.loc[6, "ece_low"]) == (last.ece.value, last.ece.low)


def test_one_row_for_each_score() -> None:
    generator = seeded(0)
    p, y = torch.rand(60, 3, generator=generator).softmax(1), torch.randint(3, (60,), generator=generator)
    found = calibration(p, y, seed=0, num_resamples=20)
    table = found.to_dataframe()
    assert table.index.tolist() == list(found.scores)
    assert table.loc["nll", ["value", "low", "high", "error"]].tolist() == [
        found.nll.value, found.nll.low, found.nll.high, found.nll.error,
    ]  # fmt: skip
    assert str(found).splitlines()[1] == f"nll: {found.nll}"


def test_gains_under_shift_are_beside_what_they_are_over() -> None:
    inside, outside = (point_prediction(torch.rand(30, 3, generator=seeded(k)).softmax(1)) for k in range(2))
    found = compare_detection((inside, outside), (inside, outside), seed=0, num_resamples=20)
    table = found.to_dataframe()
    assert table.loc["entropy_gain", "value"] == 0.0
    assert table.loc["point_entropy", "value"] == found.point.entropy.value
    assert table.loc["mutual_information_gain", "warnings"] == "one member has no mutual information"


def test_one_row_for_each_method_and_task() -> None:
    labels = {task: torch.randint(3, (40,), generator=seeded(1)) for task in NAMES}
    tables = {m: {t: torch.full((40, 3), 1 / 3) for t in NAMES} for m in ("average", "product")}
    found = evaluate_predictions(predictions_of(labels, tables), seed=0, num_resamples=20)
    table = found.to_dataframe()
    assert len(table) == 2 * 3
    assert table["examples"].tolist() == [40] * 6
    assert table.loc[4, "ece_if_calibrated"] == found.calibrations["product"]["emoji"].ece_if_calibrated.value


def test_results_print_in_a_few_lines(results: Results) -> None:
    groups = {f"layer {i}": results.values[i::5] for i in range(5)}
    objects = [
        *(
            getattr(results, name)
            for name in ("convergence", "sensitivity", "chains", "intervals", "tails", "residuals")
        ),
        *(getattr(results, name) for name in ("reliability", "selective", "comparison")),
        results.tails.best,
        results.residuals.entries[0],
        hill(results.values),
        tail_posterior(results.values, CAUCHY),
        pooled_tails(groups, ["Gaussian", "Cauchy"]),
        page("title", "subtitle", []),
    ]
    for each in objects:
        assert isinstance(each, Brief)
        text = repr(each)
        assert text.startswith(f"{type(each).__name__}(")
        assert len(text.splitlines()) <= 8, text
        assert all(len(line) <= 120 for line in text.splitlines()), text
    assert "values=float64 (4, 60, 2, 3)" in repr(results.chains)
    assert f"modules={MODULES}" in repr(results.convergence)


@dataclass(repr=False)
class Many(Brief):
    names: tuple[str, ...]
    parts: tuple[float, ...]
    by_name: dict[str, int]
    text: str
    number: Estimate


def test_long_lists_are_cut_and_other_things_counted() -> None:
    found = Many(tuple("abcdef"), (1.0, 2.0), {"x": 1}, "x" * 200, Estimate(1.0, 0.5, 1.5, 0.25))
    shown = repr(found).replace("\n    ", " ")
    assert "names=('a', 'b', 'c', 'd', ... 6 in all), parts=(2 x float), by_name={'x'}" in shown
    assert "x" * 60 not in shown
    assert "number=1.00 [0.50, 1.50]" in shown
