"""Figures: what is drawn are the results, into the axes given; series differ without colour, and nothing is global."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from math import nan
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from diagnostics import plots
from diagnostics.chains import rank_histogram
from diagnostics.plots.style import COLORS, distinct, line_style, point_style, shortened
from diagnostics.tails import hill, log_density, quantiles
from tests.diagnosed import MODULES, Results, made
from tests.test_expert_figures import alignment, searched, shares


@pytest.fixture(scope="module")
def results() -> Results:
    return made()


def _log_density(r: Results) -> Any:
    return log_density(r.values, [each.fit for each in r.tails.results], bins=21)


def _quantiles(r: Results) -> Any:
    return [quantiles(r.values, each.fit) for each in r.tails.results]


Draw = Callable[[Results, Axes | None], Axes]
DRAWN: dict[str, Draw] = {
    "plot_energy_traces": lambda r, ax: plots.plot_energy_traces(r.convergence, ax),
    "plot_contraction": lambda r, ax: plots.plot_contraction(r.convergence, ax),
    "plot_expert_weights": lambda r, ax: plots.plot_expert_weights(r.convergence, ax),
    "plot_gamma_moves": lambda r, ax: plots.plot_gamma_moves(r.sensitivity, ax),
    "plot_gamma_scores": lambda r, ax: plots.plot_gamma_scores(r.sensitivity, ax),
    "plot_chain_traces": lambda r, ax: plots.plot_chain_traces(r.chains, MODULES[1], "emoji", ax),
    "plot_r_hat": lambda r, ax: plots.plot_r_hat(r.chains, ax),
    "plot_effective_sizes": lambda r, ax: plots.plot_effective_sizes(r.chains, ax),
    "plot_ranks": lambda r, ax: plots.plot_ranks(rank_histogram(r.chains.values[..., 0, 0]), ax),
    "plot_forest": lambda r, ax: plots.plot_forest(r.intervals, ax),
    "plot_residual_histogram": lambda r, ax: plots.plot_residual_histogram(r.tails, ax=ax),
    "plot_log_density": lambda r, ax: plots.plot_log_density(_log_density(r), ax),
    "plot_quantiles": lambda r, ax: plots.plot_quantiles(_quantiles(r), ax),
    "plot_hill": lambda r, ax: plots.plot_hill(hill(r.values), ax),
    "plot_families": lambda r, ax: plots.plot_families(r.tails, ax),
    "plot_mean_squared_residuals": lambda r, ax: plots.plot_mean_squared_residuals({"product": r.residuals}, ax=ax),
    "plot_reliability": lambda r, ax: plots.plot_reliability(r.reliability, "product", ax),
    "plot_risk_coverage": lambda r, ax: plots.plot_risk_coverage({"product": r.selective}, ax),
    "plot_corruptions": lambda r, ax: plots.plot_corruptions({"product": r.corrupted}, "accuracy", ax),
    "plot_pareto": lambda r, ax: plots.plot_pareto(r.comparison, ax=ax),
    "plot_radar": lambda r, ax: plots.plot_radar(r.comparison, ax=ax),
    "plot_expert": lambda r, ax: plots.plot_expert(shares(), ax),
    "plot_alignment": lambda r, ax: plots.plot_alignment(alignment(), ax),
    "plot_search": lambda r, ax: plots.plot_search({"gp": [searched(0.1, 0.3), searched(0.2, nan)]}, ax),
}


def given_axes(name: str) -> Axes:
    return Figure().add_subplot(projection="polar" if name == "plot_radar" else None)


def lines(ax: Axes) -> dict[str, Any]:
    return {str(line.get_label()): line for line in ax.get_lines()}


def test_every_figure_is_tested() -> None:
    assert set(DRAWN) == set(plots.__all__)


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_goes_where_it_is_told_and_leaves_nothing_behind(name: str, results: Results) -> None:
    before, ax = plt.get_fignums(), given_axes(name)
    assert DRAWN[name](results, ax) is ax
    own = DRAWN[name](results, None)
    assert own.figure is not ax.figure
    assert plt.get_fignums() == before
    figure = own.get_figure(root=True)
    assert figure is not None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)  # warnings, of glyphs or layouts, are errors
    assert buffer.getvalue().startswith(b"\x89PNG")
    assert own.get_title(loc="left")


@pytest.mark.parametrize("style", [line_style, point_style])
def test_series_differ_without_colour(style: Callable[[int], dict[str, Any]]) -> None:
    plain = [{k: str(v) for k, v in style(i).items() if k != "color"} for i in range(7)]
    assert all(plain.count(each) == 1 for each in plain)
    full = [{k: str(v) for k, v in style(i).items()} for i in range(49)]
    assert all(full.count(each) == 1 for each in full)


def test_traces_are_the_energies_above_the_last(results: Results) -> None:
    drawn = plots.plot_energy_traces(results.convergence).get_lines()
    for line, trace in zip(drawn, results.convergence.traces, strict=True):
        expected = np.maximum((trace - trace[-1]) / abs(trace[-1]), 1e-16)
        assert np.allclose(line.get_ydata(), expected)
        assert np.asarray(line.get_xdata()).tolist() == list(range(1, len(trace) + 1))


def test_contraction_shows_rate_and_bound(results: Results) -> None:
    found = lines(plots.plot_contraction(results.convergence))
    assert np.allclose(found["exact rate"].get_ydata(), results.convergence.rate)
    assert np.allclose(found["bound L ([PoE] Eq. 41)"].get_ydata(), results.convergence.bound)


def test_the_heat_map_hatches_silent_experts(results: Results) -> None:
    ax = plots.plot_expert_weights(results.convergence)
    shown: Any = ax.get_images()[0].get_array()
    assert np.ma.getmaskarray(shown).tolist() == [[False, False], [True, False], [False, False]]
    assert np.allclose(shown.compressed(), results.convergence.relative_weights.T[[0, 0, 1, 2, 2], [0, 1, 1, 0, 1]])
    assert len(ax.texts) == 5
    assert [c.get_hatch() for c in ax.collections] == ["////"]


def test_the_forest_has_medians_and_reach(results: Results) -> None:
    ax = plots.plot_forest(results.intervals)
    for index, bars in enumerate(ax.containers):
        middle, _, reach = bars
        assert np.allclose(middle.get_xdata(), results.intervals.median[:, index])
        ends = np.array([segment[:, 0] for segment in reach[0].get_segments()])
        assert np.allclose(ends, np.stack([results.intervals.low[:, index], results.intervals.high[:, index]], 1))
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0", "1"]


def test_gamma_scores_are_marked_at_the_best(results: Results) -> None:
    found = plots.plot_gamma_scores(results.sensitivity).get_lines()
    assert np.allclose(found[0].get_ydata(), results.sensitivity.scores)
    assert found[1].get_ydata() == [results.sensitivity.scores.max()]
    with pytest.raises(ValueError, match="plot_gamma_moves"):
        plots.plot_gamma_scores(replace(results.sensitivity, scores=None))


def test_ranks_are_counted_in_bars(results: Results) -> None:
    ranks = rank_histogram(results.chains.values[..., 0, 0], bins=10)
    patches: Any = plots.plot_ranks(ranks).patches
    bars = [bar.get_height() for bar in patches]
    assert bars == ranks.counts.flatten().tolist()


def test_the_histogram_is_a_density(results: Results) -> None:
    ax = plots.plot_residual_histogram(results.tails, ["Gaussian", "unheard of"])
    heights, edges, _ = ax.patches[0].get_data()  # type: ignore[attr-defined]
    inside = (np.abs(results.values) <= edges[-1]).mean()
    assert float(heights @ np.diff(edges)) == pytest.approx(inside)
    (fitted,) = ax.get_lines()
    fit = results.tails.result("Gaussian").fit
    assert np.allclose(np.log(np.asarray(fitted.get_ydata())), fit.log_density(np.asarray(fitted.get_xdata())))


def test_a_family_looks_the_same_in_every_figure(results: Results) -> None:
    looks = [
        {
            name: (line.get_color(), line.get_linestyle())
            for name, line in lines(ax).items()
            if name in ("Cauchy", "Gaussian")
        }
        for ax in (plots.plot_residual_histogram(results.tails), plots.plot_log_density(_log_density(results)))
    ]
    assert looks[0] == looks[1]
    assert len(looks[0]) == 2


def test_quantiles_and_hill_are_those_of_the_results(results: Results) -> None:
    curves = _quantiles(results)
    for each, line in zip(curves, plots.plot_quantiles(curves).get_lines(), strict=False):
        assert np.allclose(line.get_ydata(), each.observed)
        assert np.allclose(line.get_xdata(), each.theoretical)
    found = hill(results.values)
    assert np.allclose(plots.plot_hill(found).get_lines()[0].get_ydata(), found.index, equal_nan=True)


def test_families_that_are_tied_are_filled(results: Results) -> None:
    ax = plots.plot_families(results.tails)
    for bars, each in zip(ax.containers, results.tails.results, strict=True):
        line = bars[0]
        assert np.allclose(line.get_xdata(), -each.difference)
        assert (to_hex(line.get_markerfacecolor()) == "#000000") == each.tied


def test_mean_squared_residuals_of_methods(results: Results) -> None:
    ax = plots.plot_mean_squared_residuals({"a": results.residuals, "b": results.residuals}, "raw")
    assert np.allclose(lines(ax)["a"].get_ydata(), results.residuals.mean_squared("raw"))
    other = results.residuals.where(module=MODULES[0])
    for bad in ({}, {"a": results.residuals, "b": other}):
        with pytest.raises(ValueError, match="same model"):
            plots.plot_mean_squared_residuals(bad)


def test_reliability_leaves_empty_bins_out(results: Results) -> None:
    ax = plots.plot_reliability(results.reliability)
    points = ax.containers[1][0].get_xydata()
    filled = results.reliability.counts > 0
    assert len(points) == int(filled.sum())
    assert np.allclose(points[:, 1], results.reliability.accuracy[filled])


def test_corruptions_are_means_over_kinds(results: Results) -> None:
    ax = plots.plot_corruptions({"product": results.corrupted}, "accuracy")
    drawn = ax.containers[0][0].get_ydata()
    for severity, height in enumerate(drawn):
        kinds = [c.calibration.accuracy.value for c in results.corrupted if c.severity == severity]
        assert height == pytest.approx(float(np.mean(kinds)))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["clean", "1", "2", "3"]


def test_pareto_points_and_series(results: Results) -> None:
    found = results.comparison
    ax = plots.plot_pareto(found, {"all": list(found.methods)})
    points = ax.containers[0][0].get_xydata()
    assert np.allclose(points[:, 0], [found.mean(m).value for m in found.methods])
    assert np.allclose(points[:, 1], [found.mean(m, "ece").value for m in found.methods])
    front = lines(ax)["Pareto front"].get_xydata()
    assert {tuple(p) for p in front} == {(found.mean(m).value, found.mean(m, "ece").value) for m in found.on_front()}


def test_the_radar_closes_and_has_a_spoke_for_each_task(results: Results) -> None:
    found = results.comparison
    ax = plots.plot_radar(found, ["product"])
    (line,) = ax.get_lines()
    values = np.asarray(line.get_ydata())
    assert values[0] == values[-1]
    assert np.allclose(values[:-1], found.values["accuracy"][found.methods.index("product")])
    with pytest.raises(ValueError, match="polar"):
        plots.plot_radar(found, ax=given_axes(""))
    with pytest.raises(ValueError, match="three or more"):
        plots.plot_radar(replace(found, tasks=found.tasks[:2]))


def test_draws_that_are_not_there(results: Results) -> None:
    with pytest.raises(ValueError, match="no such draws"):
        plots.plot_chain_traces(results.chains, "another", "mnist")


def test_labels_say_what_differs() -> None:
    assert distinct(["a.0.w", "a.1.w", "a.1.b.w"]) == ["0", "1", "1.b"]
    assert distinct(["same", "same"]) == ["same", "same"]
    assert distinct([]) == []
    assert len(shortened("x" * 100)) <= 31


def test_many_modules_are_not_all_named(results: Results) -> None:
    many = replace(
        results.convergence,
        modules=tuple(f"layers.{i}.weight" for i in range(150)),
        rate=np.full(150, 0.5),
        bound=np.full(150, 0.9),
    )
    ax = plots.plot_contraction(many)
    assert 15 <= len(ax.get_xticks()) <= 30
    assert len(COLORS) == 7
