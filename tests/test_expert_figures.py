"""Single experts in figures and the report, alignment in the report, and the course of searches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diagnostics import Level, plots
from diagnostics.alignment import Alignment
from diagnostics.experts import ExpertShares, expert_shares
from diagnostics.report.experts import alignment_section, expert_sections
from diagnostics.report.page import Details, Facts, Table
from inference.models.averages import ModelDesigns
from inference.search import SearchResult, SearchTrial
from poe_merge.cli import run
from poe_models import ModuleMoments

MODULES = ("layers.0.fc.weight", "layers.1.fc.weight")


def module(name: str, kept: float, weight: float | None = None) -> dict[str, Any]:
    retained: dict[str, Any] = {"norm": 1.0, "update_norms": {"mnist": 2.0, "silent": 0.0}, "kept": {"mnist": kept}}
    if weight is None:  # by a merging rule
        return {"module": name, "retention": retained}
    residuals = {"residuals": {"mnist": 0.25, "silent": 0.0}, "residuals_at_zero": {"mnist": 0.5, "silent": 0.0}}
    return {"module": name, "relative_weights": {"mnist": weight}, "retention": retained | residuals}


def shares() -> ExpertShares:
    return expert_shares([module(MODULES[0], 0.9, 0.5), module(MODULES[1], 0.2)])["mnist"]


def alignment(own: float = 0.9) -> Alignment:
    others = torch.full((2, 4, 4), 0.3, dtype=torch.float64)
    cosines = torch.where(torch.eye(4, dtype=torch.bool), torch.tensor(own, dtype=torch.float64), others)
    p = 1 / 24 if own > 0.3 else 1.0
    return Alignment(MODULES, ("a", "b", "c", "d"), "input", cosines, torch.tensor([p, 1.0], dtype=torch.float64), p)


def searched(*scores: float, minimize: bool = False) -> SearchResult:
    trials = tuple(SearchTrial(i, {"eta": 0.1}, score, 0.1, 0.1) for i, score in enumerate(scores))
    designs: ModelDesigns[Any] = ModelDesigns(lambda tensor: None, lambda tensor: None)  # type: ignore[arg-type,return-value]
    return SearchResult({"eta": 0.1}, max(scores), trials, minimize, 0.0, designs)


def test_shares_are_the_records_numbers() -> None:
    found = expert_shares([module(MODULES[0], 0.9, 0.5), module(MODULES[1], 0.2), {"module": "older"}])
    assert list(found) == ["mnist", "silent"]
    assert found["mnist"].modules == MODULES
    assert found["mnist"].kept.tolist() == [0.9, 0.2]
    np.testing.assert_equal(found["mnist"].residual_left, [0.5, math.nan])
    np.testing.assert_equal(found["mnist"].relative_weights, [0.5, math.nan])
    assert np.isnan(found["silent"].kept).all()
    assert list(found["mnist"].to_dataframe().columns) == ["module", "kept", "residual_left", "relative_weights"]


def test_an_experts_figure_leaves_out_what_is_unknown() -> None:
    drawn = {line.get_label(): line.get_ydata() for line in plots.plot_expert(shares()).get_lines()}
    np.testing.assert_equal(drawn["of its update kept"], [0.9, 0.2])
    ruled = expert_shares([module(MODULES[0], 0.9)])["mnist"]
    assert len(plots.plot_expert(ruled).get_lines()) == 2  # and the line at zero


def test_a_report_has_a_part_for_each_expert() -> None:
    expert = {"name": "mnist", "residual_map": "InputGram()", "energy": "Cauchy()", "scale": "Balanced(1.0)"}
    record = {
        "inputs": {"expert mnist": {"source": "/secret/mnist"}},
        "designs": [{"experts": [expert | {"importance": 2.0}]}],
        "tensors": [{"modules": [module(MODULES[0], 0.9, 0.5), module(MODULES[1], 0.2, 0.7)]}, {"tensor": "kept"}],
    }
    mnist, silent = expert_sections(record)
    assert (mnist.title, silent.title) == ("Expert mnist", "Expert silent")
    facts, _, details = mnist.blocks
    assert isinstance(facts, Facts)
    assert isinstance(details, Details)
    assert dict(facts.rows)["Settings"] == "InputGram(), Cauchy(), Balanced(1.0), importance 2"
    assert dict(facts.rows)["Kept"] == "55% of its update; least in layers.1.fc.weight, layers.0.fc.weight"
    assert dict(facts.rows)["Source"] == "mnist"
    (table,) = details.blocks
    assert isinstance(table, Table)
    assert table.rows == [[MODULES[0], "0.9", "0.5", "0.5"], [MODULES[1], "0.2", "0.5", "0.7"]]


def test_alignment_in_the_report_warns_where_updates_do_not_stand_for_data() -> None:
    assert alignment_section(alignment(0.9)).verdicts[0].level is Level.GOOD
    (verdict,) = alignment_section(alignment(0.1)).verdicts
    assert verdict.level is Level.CAUTION
    assert "without data is not to be trusted" in verdict.text


def test_alignment_is_drawn_beside_that_with_other_tasks() -> None:
    drawn = {str(line.get_label()): line for line in plots.plot_alignment(alignment()).get_lines()}
    assert np.allclose(drawn["own task's inputs"].get_ydata(), 0.9)
    assert np.allclose(drawn["other tasks'"].get_ydata(), 0.3)
    assert np.asarray(drawn["p up to 0.05"].get_xdata()).tolist() == [0]


def test_a_search_is_drawn_by_its_best_score_so_far() -> None:
    runs = {"gp": [searched(math.nan, 0.2, 0.1, 0.4), searched(0.3, 0.2, 0.5)], "random": searched(0.1, 0.2)}
    drawn = {str(line.get_label()): line.get_ydata() for line in plots.plot_search(runs).get_lines()}
    np.testing.assert_allclose(np.asarray(drawn["gp"], float), [math.nan, 0.25, 0.35])
    np.testing.assert_allclose(np.asarray(drawn["random"], float), [0.1, 0.2])
    (least,) = plots.plot_search({"kl": searched(0.3, 0.4, 0.1, minimize=True)}).get_lines()
    np.testing.assert_allclose(np.asarray(least.get_ydata(), float), [0.3, 0.3, 0.1])


@pytest.mark.parametrize("runs", [{}, {"a": searched(0.1), "b": searched(0.1, minimize=True)}])
def test_searches_that_cannot_be_drawn_together(runs: dict[str, SearchResult]) -> None:
    with pytest.raises(ValueError, match=r"plot_search.*directions"):
        plots.plot_search(runs)


def test_diagnose_takes_the_moments_of_inputs(tmp_path: Path, generator: torch.Generator) -> None:
    folders = {name: tmp_path / name for name in ("base", "mnist", "emoji")}
    moments = {}
    for name, folder in folders.items():
        folder.mkdir()
        save_file({"fc.weight": torch.randn(6, 5, generator=generator)}, folder / "model.safetensors")
        x = torch.randn(5, 20, generator=generator)
        moments[name] = {"fc.weight": x @ x.mT / 20}
    del moments["base"]
    ModuleMoments("activations", moments).save(tmp_path / "moments")
    models = [f"--model={name}={folders[name]}" for name in ("mnist", "emoji")]
    merged, page = tmp_path / "merged", tmp_path / "report.html"
    assert run(["merge", "--base-model", str(folders["base"]), *models, "--out", str(merged)]) == 0
    given = ["diagnose", str(merged), "--no-tails", "--activations", str(tmp_path / "moments"), "--out", str(page)]
    assert run(given) == 0
    text = page.read_text(encoding="utf-8")
    titles = ["What was merged", "Convergence", "Alignment with the tasks", "Expert mnist", "Expert emoji"]
    positions = [text.index(f"<h2>{title}</h2>") for title in titles]
    assert positions == sorted(positions)
    assert "Too few tasks to tell by shuffling them" in text
    assert run([*given[:4], str(tmp_path / "nowhere"), *given[5:]]) == 2
