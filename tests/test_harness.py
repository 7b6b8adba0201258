"""The harness's merges against closed forms, and its search."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.harness.evaluate import Scores
from benchmarks.harness.methods import BASELINES, MAPS, METHODS, RULES, Method, solve
from benchmarks.harness.search import ETA_HALF_DECADES, Settings, search
from inference.models.design import Design
from inference.models.merge import merge_checkpoint
from poe_models import TaskVectors
from poe_models.methods import MergingMethod, ModuleBatch
from tests.seeds import seeded

AVERAGE, ARITHMETIC = BASELINES
BY_NAME = {method.name: method for method in METHODS}


def toy_vectors() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], TaskVectors]:
    """Two convolutions, one of them twice, and their biases; three experts, float64."""
    generator = seeded(0)
    shapes = {"a.weight": (4, 3, 3, 3), "b.weight": (4, 3, 3, 3), "c.weight": (6, 4, 1, 1), "a.bias": (4,)}

    def draw(scale: float) -> dict[str, Tensor]:
        normal = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
        return {name: scale * value for name, value in normal.items()}

    base = draw(1.0)
    experts = {name: {n: base[n] + d for n, d in draw(0.1).items()} for name in ("x", "y", "z")}
    return base, experts, TaskVectors(base, experts, dtype=torch.float64)


class TestMethods:
    def test_every_map_has_gaussian_cauchy_and_student(self) -> None:
        assert len(METHODS) == len(BY_NAME) == 19
        assert [sum(m.family == family for m in MAPS) for family in dict.fromkeys(m.family for m in MAPS)] == [3] * 4

    def test_average_and_task_arithmetic(self) -> None:
        base, experts, vectors = toy_vectors()
        for method, factor in ((AVERAGE, 1 / 3), (ARITHMETIC, 1.0)):
            state = solve(method, vectors, 0.0).state(0.7)
            for name in base:
                total = torch.stack([expert[name] - base[name] for expert in experts.values()]).sum(0)
                weight = 0.7 * (factor if name.endswith("weight") else 1 / 3)  # biases are averaged
                torch.testing.assert_close(state[name], base[name] + weight * total)

    def test_it_is_what_a_saved_merge_is(self, tmp_path: Path) -> None:
        _, _, vectors = toy_vectors()
        method = BY_NAME["InputGram, Cauchy"]
        merge_checkpoint(vectors, Design(method.design(vectors.names, 0.1), 0.7), tmp_path / "merged")
        saved = load_file(tmp_path / "merged" / "model.safetensors")
        for name, value in solve(method, vectors, 0.1).state(0.7).items():
            torch.testing.assert_close(saved[name], value)

    @pytest.mark.parametrize("method", RULES, ids=lambda m: m.name)
    def test_rules_meet_the_whole_model_and_names(self, method: Method) -> None:
        base, _, vectors = toy_vectors()
        merge = solve(method, vectors, 0.0)
        assert isinstance(method.rule, MergingMethod)
        ready = method.rule.prepare(vectors)
        for module in vectors:
            expected = ready.merge(ModuleBatch.of_module(module)).squeeze(0)
            torch.testing.assert_close(merge.matrices[module.name], expected)
            found = merge.state(0.7)[module.tensor]
            torch.testing.assert_close(found, base[module.tensor] + 0.7 * expected.reshape(found.shape))

    def test_a_strong_anchor_stays_at_its_centre(self) -> None:
        _, _, vectors = toy_vectors()
        centers = solve(BY_NAME["TIES"], vectors, 0.0).matrices
        held = solve(BY_NAME["InputGram, Cauchy"], vectors, 1e9, centers=centers)
        free = solve(BY_NAME["InputGram, Cauchy"], vectors, 1e-3, centers=centers)
        for name, center in centers.items():
            torch.testing.assert_close(held.matrices[name], center, rtol=1e-6, atol=1e-9)
            assert (free.matrices[name] - center).norm() > 0.1 * center.norm()

    def test_input_gram_is_the_closed_form(self) -> None:
        base, experts, vectors = toy_vectors()
        merge = solve(BY_NAME["InputGram, Gaussian"], vectors, 0.3)
        state = merge.state(0.9)
        for name in ("a.weight", "b.weight", "c.weight"):
            updates = torch.stack([(expert[name] - base[name]).flatten(1) for expert in experts.values()])
            grams = updates.mT @ updates
            lengths = updates.square().sum((1, 2))
            typical = ((updates @ updates.mT).square().sum((1, 2)) / lengths).quantile(0.5)  # q(0) = |U U^T|^2
            scaled = grams / (lengths * typical)[:, None, None]  # Balanced(1)
            eta = 0.3 * 2 * scaled.sum(0).trace() / updates.shape[-1]  # the weight of both twins at rest is 1
            left = (updates @ scaled).sum(0)
            merged = torch.linalg.solve(scaled.sum(0) + eta * torch.eye(updates.shape[-1]), left, left=False)
            torch.testing.assert_close(state[name], base[name] + 0.9 * merged.reshape(base[name].shape))
        assert merge.weight_spread == pytest.approx((1.0, 1.0, 1.0))
        assert merge.unconverged == merge.other_starts == ()

    @pytest.mark.parametrize("method", [method for method in MAPS if method.heavy_tailed], ids=lambda m: m.name)
    def test_twin_is_the_limit_of_small_residuals(self, method: Method) -> None:
        """With one expert repeated, every residual vanishes: tail and twin give the same merge."""
        base, experts, _ = toy_vectors()
        vectors = TaskVectors(base, {"x": experts["x"], "y": experts["x"]}, dtype=torch.float64)
        tail, twin = (solve(each, vectors, 1e-6).state(1.0) for each in (method, method.twin()))
        for name in base:
            torch.testing.assert_close(tail[name], twin[name], rtol=1e-7, atol=1e-9)
        _, _, mixed = toy_vectors()
        assert max(solve(method, mixed, 0.1).weight_spread) > 1.0001

    def test_eta_without_an_anchor_is_refused(self) -> None:
        _, _, vectors = toy_vectors()
        with pytest.raises(ValueError, match="it has no anchor. Give eta=0"):
            solve(AVERAGE, vectors, 0.1)
        with pytest.raises(ValueError, match="no centers"):
            solve(AVERAGE, vectors, 0.0, centers={})
        with pytest.raises(ValueError, match="no experts"):
            AVERAGE.design(["x"], 0.1)
        with pytest.raises(ValueError, match="no Gaussian twin"):
            AVERAGE.twin()


def bowl(settings: Settings) -> Scores:
    """Best at scaling 0.5 and eta 1."""
    off = abs(settings.scaling - 0.5) + (abs(settings.eta - 1.0) if settings.eta else 0.0)
    off += abs(settings.own - 0.2) if settings.own else 0.0
    return Scores(1 - off, off, 0.0, 0.0)


class TestSearch:
    @pytest.mark.parametrize(
        ("tuned", "first"), [(("scaling",), Settings(0.3, 0.0)), (("scaling", "eta"), Settings(1, 0.1))]
    )
    def test_budget_first_trial_and_best(self, tuned: tuple[str, ...], first: Settings) -> None:
        best, trials = search(bowl, tuned, 9, seed=0)
        assert len(trials) == 9
        assert trials[0].settings == first
        assert best.scores.accuracy == max(trial.scores.accuracy for trial in trials)
        grid = {0.0, *(10 ** (k / 2) for k in range(ETA_HALF_DECADES[0], ETA_HALF_DECADES[1] + 1))}
        assert {trial.settings.eta for trial in trials} <= grid

    def test_seed_decides(self) -> None:
        one, same, other = (search(bowl, ("scaling", "eta"), 6, seed)[1] for seed in (1, 1, 2))
        assert one == same
        assert one != other

    def test_nothing_to_tune_takes_one_trial(self) -> None:
        best, trials = search(bowl, (), 9, seed=0)
        assert (best.settings, len(trials)) == (Settings(1.0, 0.0), 1)

    def test_own_parameter(self) -> None:
        first, choices = Settings(1.0, 0.0, 0.8), (0.1, 0.2, 0.8)
        best, trials = search(bowl, ("scaling", "own"), 20, 0, choices, [first])
        assert trials[0].settings == first
        assert {trial.settings.own for trial in trials} == set(choices)
        assert best.settings.own == 0.2
        kept, trials = search(bowl, ("scaling",), 4, 0, first=[first])
        assert {trial.settings.own for trial in (kept, *trials)} == {0.8}

    def test_several_first_trials_and_another_range(self) -> None:
        first = (Settings(1.0, 10**2.5), Settings(1.0, 1000.0))
        _, trials = search(bowl, ("scaling", "eta"), 12, 0, first=first, eta_half_decades=(5, 6))
        assert tuple(trial.settings for trial in trials[:2]) == first
        assert {trial.settings.eta for trial in trials[2:]} == {10**2.5, 10**3.0}

    def test_ties_go_to_the_lower_nll(self) -> None:
        def tied(settings: Settings) -> Scores:
            return Scores(0.5, settings.scaling, 0.0, 0.0)

        best, trials = search(tied, ("scaling",), 9, seed=0)
        assert best.settings.scaling == min(trial.settings.scaling for trial in trials)
