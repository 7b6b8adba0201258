"""The vision demo: merges against closed forms, the search, the report, and a small run from end to end."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.harness.evaluate import Scores, evaluate, mean_scores
from benchmarks.harness.methods import BASELINES, MAPS, METHODS, RULES, Method, solve
from benchmarks.harness.search import ETA_HALF_DECADES, Settings, search
from benchmarks.harness.suite import Head, Suite
from benchmarks.harness.training import save_folder
from benchmarks.vision import demo, report
from benchmarks.vision.ensemble_report import ensemble_note
from benchmarks.vision.ensembles import GIBBS, MAP, NOISE, SCALED_MAP, SCOPES, Budget, Ensembles, Outcome
from benchmarks.vision.memory import PeakMemory
from benchmarks.vision.model import CONFIG, SqueezeNet, SqueezeNetwork, build
from benchmarks.vision.plot import bar_plot
from benchmarks.vision.report import EXPERTS, MEAN, Row
from benchmarks.vision.tasks import Split, Task
from diagnostics.estimates import Estimate
from diagnostics.predictions.files import load_predictions
from inference.models.design import Design
from inference.scores import nll
from poe_models import TaskVectors
from poe_models.methods import MergingMethod, ModuleBatch
from tests.seeds import seeded

AVERAGE, ARITHMETIC = BASELINES
BY_NAME = {method.name: method for method in METHODS}

# How far ensembles are from the merge is a column of the demo's table.
pytestmark = pytest.mark.filterwarnings("ignore:.*standard deviations of the draws from the merge")


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
                weight = 0.7 * factor if name.endswith("weight") else 1 / 3  # the scale does not touch averages
                torch.testing.assert_close(state[name], base[name] + weight * total)

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
    """Best at scale 0.5 and eta 1."""
    off = abs(settings.scale - 0.5) + (abs(settings.eta - 1.0) if settings.eta else 0.0)
    off += abs(settings.own - 0.2) if settings.own else 0.0
    return Scores(1 - off, off, 0.0, 0.0)


class TestSearch:
    @pytest.mark.parametrize(
        ("tuned", "first"), [(("scale",), Settings(0.3, 0.0)), (("scale", "eta"), Settings(1, 0.1))]
    )
    def test_budget_first_trial_and_best(self, tuned: tuple[str, ...], first: Settings) -> None:
        best, trials = search(bowl, tuned, 9, seed=0)
        assert len(trials) == 9
        assert trials[0].settings == first
        assert best.scores.accuracy == max(trial.scores.accuracy for trial in trials)
        grid = {0.0, *(10 ** (k / 2) for k in range(ETA_HALF_DECADES[0], ETA_HALF_DECADES[1] + 1))}
        assert {trial.settings.eta for trial in trials} <= grid

    def test_seed_decides(self) -> None:
        one, same, other = (search(bowl, ("scale", "eta"), 6, seed)[1] for seed in (1, 1, 2))
        assert one == same
        assert one != other

    def test_nothing_to_tune_takes_one_trial(self) -> None:
        best, trials = search(bowl, (), 9, seed=0)
        assert (best.settings, len(trials)) == (Settings(1.0, 0.0), 1)

    def test_own_parameter(self) -> None:
        first, choices = Settings(1.0, 0.0, 0.8), (0.1, 0.2, 0.8)
        best, trials = search(bowl, ("scale", "own"), 20, 0, choices, [first])
        assert trials[0].settings == first
        assert {trial.settings.own for trial in trials} == set(choices)
        assert best.settings.own == 0.2
        kept, trials = search(bowl, ("scale",), 4, 0, first=[first])
        assert {trial.settings.own for trial in (kept, *trials)} == {0.8}

    def test_several_first_trials_and_another_range(self) -> None:
        first = (Settings(1.0, 10**2.5), Settings(1.0, 1000.0))
        _, trials = search(bowl, ("scale", "eta"), 12, 0, first=first, eta_half_decades=(5, 6))
        assert tuple(trial.settings for trial in trials[:2]) == first
        assert {trial.settings.eta for trial in trials[2:]} == {10**2.5, 10**3.0}

    def test_ties_go_to_the_lower_nll(self) -> None:
        def tied(settings: Settings) -> Scores:
            return Scores(0.5, settings.scale, 0.0, 0.0)

        best, trials = search(tied, ("scale",), 9, seed=0)
        assert best.settings.scale == min(trial.settings.scale for trial in trials)


def row(name: str, accuracies: tuple[float, float], **kwargs: object) -> Row:
    scores = {task: Scores(a, 1 - a, 0.5, 0.25) for task, a in zip(("s", "t"), accuracies, strict=True)}
    correct = {task: torch.arange(100) < 100 * score.accuracy for task, score in scores.items()}
    return dataclasses.replace(Row(name, name, "", scores, correct), **kwargs)  # type: ignore[arg-type]


class TestReport:
    own = row(EXPERTS, (1.0, 0.8))
    best = row("InputGram, Cauchy", (0.5, 0.6), family="InputGram", energy="Cauchy", settings=Settings(0.7, 0.1))
    best = dataclasses.replace(best, weight_spread=(1.5, 3.0, 2.0), validation=0.6, merge_seconds=1.25)
    rows = (row("base", (0.25, 0.3)), own, best)

    def test_normalised_accuracy(self) -> None:
        assert report.normalised(self.best, self.own, "s") == pytest.approx(0.5)
        assert report.normalised(self.best, self.own, MEAN) == pytest.approx((0.5 / 1.0 + 0.6 / 0.8) / 2)

    def test_paired_difference(self) -> None:
        gap, error = report.paired_difference(self.best, self.rows[0])
        assert gap == pytest.approx(0.275)
        variances = [p * (1 - p) / 99 for p in (0.25, 0.3)]  # of 0/1 differences, unbiased, over 100
        assert error == pytest.approx(sum(variances) ** 0.5 / 2)
        assert report.paired_difference(self.best, self.best) == (0.0, 0.0)

    def test_csv(self, tmp_path: Path) -> None:
        report.write_csv(tmp_path / "results.csv", self.rows)
        with (tmp_path / "results.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert [(line["method"], line["task"]) for line in lines[-3:]] == [
            ("InputGram, Cauchy", "s"),
            ("InputGram, Cauchy", "t"),
            ("InputGram, Cauchy", MEAN),
        ]
        last = lines[-1]
        assert float(last["accuracy"]) == pytest.approx(0.55)
        assert float(last["nll"]) == pytest.approx(0.45)
        assert (last["scale"], last["eta"]) == ("0.7", "0.1")
        assert (last["weight_spread_median"], last["weight_spread_max"]) == ("2.0", "3.0")
        assert lines[0]["scale"] == lines[0]["merge_seconds"] == ""

    def test_tables(self) -> None:
        lines = report.markdown(self.rows, [(self.best, self.rows[0])], "a note").splitlines()
        assert len(lines) == 11
        assert "| InputGram, Cauchy | 0.70 | 0.1 | 0.550 | 0.625 |" in lines[4]
        assert lines[6] == "a note"
        assert lines[-1].startswith("| InputGram, Cauchy | 2.000 | 3.000 | 0.550 | +0.2750 ± ")
        assert len({line.count("|") for line in lines[:5]}) == len({line.count("|") for line in lines[8:]}) == 1
        console = Console(width=160, record=True, quiet=True)
        for table in (report.task_table(self.rows, "s"), report.task_table(self.rows, MEAN)):
            console.print(table)
        console.print(report.tail_table([(self.best, self.rows[0])]))
        console.print(report.device_table("m", {"CPU": 0.5}))
        assert report.task_table(self.rows, MEAN).row_count == 3

    def test_selection_note(self) -> None:
        error = (0.6 * 0.4 / 300 + 0.6 * 0.4 / 150) ** 0.5 / 2
        assert f"standard error of {100 * error:.1f} points" in report.selection_note(self.best, (300, 150))

    def test_notes_follow_from_the_numbers(self) -> None:
        note = report.best_note(self.best, self.rows[0])
        gap, error = report.paired_difference(self.best, self.rows[0])
        assert f"less that of base is {100 * gap:+.1f} ± {100 * error:.1f} points" in note
        assert report.run_note((0, 3), 7).startswith("One run (training seed 0, 3, seed 7 of searches and draws, ")
        assert report.run_note((), 7).startswith("One run (seed 7 of ")

    def test_the_note_on_ensembles_says_on_which_side_intervals_lie(self) -> None:
        sides = {"below": (-0.2, -0.1), "above": (0.1, 0.2), "not told apart": (-0.1, 0.1)}
        estimates = {side: Estimate(sum(ends) / 2, *ends, 0.05) for side, ends in sides.items()}
        scores = {"s": Scores(0.5, 1.0, 0.5, 0.1)}
        scaled = Outcome(SCALED_MAP, {}, scores, logit_temperature=1.7, differences={"nll": estimates["below"]})
        drawn = [
            Outcome(
                kind, {}, scores, scope=scope, nll_from_scaled=estimates[other],
                differences={"accuracy": estimates["not told apart"], "nll": estimates[side]},
            )
            for scope in SCOPES
            for kind, side, other in ((GIBBS, "below", "above"), (NOISE, "above", "not told apart"))
        ]  # fmt: skip
        note = ensemble_note([Outcome(MAP, {}, scores), scaled, *drawn])
        assert "Dividing the MAP's logits by 1.70 gives NLL 1.000" in note
        for scope in SCOPES:
            both = f"not told apart: Gibbs ({estimates['not told apart']}), white noise"
            assert f"Sampling {scope}, accuracy against the MAP's is {both}" in note
            split = f"below: Gibbs ({estimates['below']}); above: white noise ({estimates['above']})."
            assert f"Sampling {scope}, NLL against the MAP's is {split}" in note
        assert (
            note.count(f"scaled logits, NLL is above: Gibbs ({estimates['above']}); not told apart: white noise") == 2
        )

    def test_plot(self) -> None:
        other = dataclasses.replace(self.best, name="average", family="average", energy="")
        figure = bar_plot((*self.rows, other), [(self.best, self.rows[0])])
        above, below = figure.axes
        heights = sorted(patch.get_height() for patch in above.patches)  # type: ignore[attr-defined]
        assert heights == pytest.approx([0.55, 0.55])
        assert [patch.get_height() for patch in below.patches] == pytest.approx([0.25, 0.25])  # type: ignore[attr-defined]
        assert [text.get_text() for text in below.get_xticklabels()] == ["InputGram", "average"]
        lines = {line.get_label(): np.asarray(line.get_ydata())[0] for line in above.lines}
        assert lines == pytest.approx({"base": 0.275, EXPERTS: 0.9, "Gaussian twin, same λ and η": 0.275})


class TestMemory:
    def test_peak_is_what_the_block_took(self) -> None:
        with PeakMemory() as memory:
            block = torch.ones(16 * 2**20)  # 64 MiB
            block += 1
            del block
        assert 60 < memory.mib < 100
        with PeakMemory() as idle:
            pass
        assert idle.mib < 16


def toy_suite(folder: Path) -> Suite:
    """A random SqueezeNet, two experts near it and two tasks of two classes."""
    generator = seeded(1)
    shapes = {name: value.shape for name, value in SqueezeNet().state_dict().items()}
    base = {n: torch.randn(s, generator=generator) * (2 / max(1, s[1:].numel())) ** 0.5 for n, s in shapes.items()}
    save_folder(folder / "base", base, CONFIG)
    tasks, heads, experts = {}, {}, {}
    for task in ("one", "two"):
        noise = {name: 0.02 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        save_folder(folder / task, {name: value + noise[name] for name, value in base.items()}, CONFIG)
        images = torch.randint(0, 256, (12, 1, 28, 28), generator=generator).to(torch.uint8)
        index = torch.arange(12)
        split = Split(images, index % 2, index, index)
        tasks[task] = Task(task, ("a", "b"), {"validation": split, "test": split}, 0, "toy")
        heads[task] = Head(torch.randn(2, 512, generator=generator) * 0.01, torch.zeros(2))
        experts[task] = folder / task
    return Suite("vision", SqueezeNetwork(), folder / "base", experts, tasks, heads)


def check_outcomes(outcomes: list[Outcome], best: Row, suite: Suite, out: Path) -> None:
    """The table of ensembles hangs together, and the files say what it says."""
    point, scaled, *ensembles = outcomes
    assert (point.name, scaled.name) == ("MAP", "MAP, scaled logits")
    assert dataclasses.astuple(point.mean) == pytest.approx(dataclasses.astuple(best.on(MEAN)), abs=1e-4)
    assert scaled.mean.accuracy == point.mean.accuracy
    assert [each.scope for each in ensembles] == ["all layers"] * 4 + ["last layer"] * 4
    for each in (scaled, *ensembles):
        for name, difference in each.differences.items():
            assert difference.value == pytest.approx(getattr(each.mean, name) - getattr(point.mean, name), abs=1e-6)
            assert difference.low <= difference.value <= difference.high
    for scope in (ensembles[:4], ensembles[4:]):
        assert len({each.mean.nll for each in scope}) >= 3  # the twin of a Gaussian design draws the same members
        for each in scope:
            assert each.search is not None
            assert each.temperature == each.search.tempering.temperature
            assert {tried.num_members for tried in each.search.tempering.path} == {2}
            assert len(each.search.tempering.draws) == 2
            assert each.nll_from_scaled is not None
            assert each.nll_from_scaled.value == pytest.approx(each.mean.nll - scaled.mean.nll, abs=1e-6)
    found = load_predictions(out / "predictions.npz")
    assert {EXPERTS, "task arithmetic", "MAP", "Gibbs, all layers", "white noise, last layer"} <= set(found.methods)
    mean_nll = [nll(found.probabilities["Gibbs, last layer"][task].log(), found.labels[task]) for task in found.tasks]
    assert sum(mean_nll) / len(mean_nll) == pytest.approx(ensembles[4].mean.nll, abs=1e-9)
    with (out / "temperatures.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(dict.fromkeys((line["members"], line["sampled"]) for line in lines)) == [
        (each.name, each.scope) for each in ensembles
    ]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(word in page for word in ("Convergence", "tails", "Calibration", "Comparison", EXPERTS))
    text = (out / "ensembles.md").read_text()
    assert text.count("\n| ") == len(outcomes) + 1
    assert text.startswith("One run (seed 0 of searches and draws, ")
    assert "Ensembles of 2 around the best merge" in text


def test_white_noise_is_as_far_away_as_the_posterior(tmp_path: Path) -> None:
    suite = toy_suite(tmp_path)
    design = Design(BY_NAME["InputGram, Cauchy"].design(tuple(suite.experts), 0.1))
    save_folder(tmp_path / "merged", load_file(suite.base / "model.safetensors"), CONFIG)
    ensembles = Ensembles(suite, design, tmp_path / "merged", 0, Budget(members=2, warmup=1, thin=1))
    drawn, noise = (ensembles.ensemble("last layer", kind, 1e-5, 2) for kind in (GIBBS, NOISE))
    low, high = ensembles.ensemble("last layer", GIBBS, 1e-9, 1), ensembles.ensemble("last layer", GIBBS, 1e-3, 1)
    name = "fire9.expand3x3.weight"
    (mode,), (far,) = (list(each.members()) for each in (low, high))
    for one, other in zip(drawn.members(), noise.members(), strict=True):
        lengths = [float((state[name] - mode[name]).norm()) for state in (one, other)]
        assert lengths[0] == pytest.approx(lengths[1], rel=0.05)
        assert lengths[0] < float((far[name] - mode[name]).norm())


class TestDemo:
    methods = (*BASELINES, BY_NAME["Directional, Cauchy"], BY_NAME["InputGram, Gaussian"])
    budget = Budget(members=2, temperatures=2, refinements=0, walk_temperatures=2, warmup=1, thin=1)

    def test_from_end_to_end(self, tmp_path: Path) -> None:
        suite, out = toy_suite(tmp_path), tmp_path / "out"
        console = Console(width=140, quiet=True)
        rows, outcomes = demo.run(suite, out, 2, 0, console, self.methods, self.budget)
        assert [row.name for row in rows] == ["base", EXPERTS, *(method.name for method in self.methods)]
        assert {path.name for path in out.iterdir()} == {
            *("merged", "results.csv", "results.md", "results.png"),
            *("ensembles.md", "temperatures.csv", "temperatures.png", "draws", "predictions.npz", "report.html"),
        }
        method, best = demo.best_of(rows[2:], self.methods)
        merged = load_file(out / "merged" / "model.safetensors")
        build(merged)
        got = mean_scores(evaluate(suite, merged, "test"))
        assert dataclasses.astuple(got) == pytest.approx(dataclasses.astuple(best.on(MEAN)), abs=1e-4)
        assert method.energy is not None
        again, same = demo.run(suite, out, 2, 0, console, self.methods, self.budget)  # an earlier folder is replaced
        assert [row.scores for row in again] == [row.scores for row in rows]
        assert [outcome.scores for outcome in same] == [outcome.scores for outcome in outcomes]
        check_outcomes(outcomes, best, suite, out)

    def test_a_folder_of_somebody_else_is_kept(self, tmp_path: Path) -> None:
        suite = toy_suite(tmp_path)
        with pytest.raises(FileExistsError, match="not a merged model"):
            demo.save_merge(BY_NAME["InputGram, Gaussian"], Settings(1.0, 0.1), suite, tmp_path / "one")
        assert (tmp_path / "one" / "model.safetensors").is_file()

    def test_the_scale_alone_needs_no_other_solve(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        suite = toy_suite(tmp_path)
        asked: list[float] = []

        def counting(method: Method, vectors: TaskVectors, eta: float) -> object:
            asked.append(eta)
            return solve(method, vectors, eta)

        monkeypatch.setattr(demo, "solve", counting)
        vectors = suite.vectors()
        demo.choose(ARITHMETIC, suite, vectors, 5, 0)
        assert asked == [0.0]
        demo.choose(BY_NAME["Directional, Cauchy"], suite, vectors, 6, 0)
        assert len(asked[1:]) == len(set(asked[1:])) <= 6
