"""The demo: merges against closed forms, the search, the report, and a small run of both suites from end to end."""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from benchmarks.harness import demo, page, report
from benchmarks.harness import plan as plan_module
from benchmarks.harness.ensemble_report import ensemble_note
from benchmarks.harness.ensembles import Ensembles
from benchmarks.harness.evaluate import Scores, evaluate, mean_scores, task_logits
from benchmarks.harness.memory import PeakMemory
from benchmarks.harness.methods import BASELINES, METHODS, Loaded, Method, solve
from benchmarks.harness.outcomes import GIBBS, KINDS, MAP, NOISE, SCALED, SCALED_MAP, SCOPES, Budget, Outcome
from benchmarks.harness.page import save_span_draws
from benchmarks.harness.plan import ETA, Plan
from benchmarks.harness.plot import bar_plot
from benchmarks.harness.report import EXPERTS, MEAN, Row
from benchmarks.harness.search import Settings
from benchmarks.harness.suite import Suite
from benchmarks.harness.suite_model import NO_CLASS, Examples, SuiteModel
from benchmarks.harness.training import save_folder
from benchmarks.vision.model import CONFIG
from diagnostics.estimates import Estimate
from diagnostics.predictions.files import load_predictions
from inference.models.design import Design
from inference.scores import nll
from tests.toy_suites import toy_language, toy_suite

AVERAGE, ARITHMETIC = BASELINES
BY_NAME = {method.name: method for method in METHODS}

# How far ensembles are from the merge is a column of the demo's table.
pytestmark = pytest.mark.filterwarnings("ignore:.*standard deviations of the draws from the merge")


def bowl(settings: Settings) -> Scores:
    """Best at scaling 0.5 and eta 1."""
    off = abs(settings.scaling - 0.5) + (abs(settings.eta - 1.0) if settings.eta else 0.0)
    off += abs(settings.own - 0.2) if settings.own else 0.0
    return Scores(1 - off, off, 0.0, 0.0)


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
        assert (last["scaling"], last["eta"]) == ("0.7", "0.1")
        assert (last["weight_spread_median"], last["weight_spread_max"]) == ("2.0", "3.0")
        assert lines[0]["scaling"] == lines[0]["merge_seconds"] == ""

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


def check_outcomes(outcomes: list[Outcome], best: Row, suite: Suite, out: Path) -> None:
    """The table of ensembles hangs together, and the files say what it says."""
    point, scaled, *ensembles = outcomes
    assert (point.name, scaled.name) == ("MAP", "MAP, scaled logits")
    assert dataclasses.astuple(point.mean) == pytest.approx(dataclasses.astuple(best.on(MEAN)), rel=1e-3, abs=1e-4)
    assert scaled.mean.accuracy == point.mean.accuracy
    assert [each.scope for each in ensembles] == ["all layers"] * 4 + ["last layer"] * 8
    assert [each.name for each in ensembles[4:]] == [name + end for name in KINDS for end in ("", SCALED)]
    for each in (scaled, *ensembles):
        for name, difference in each.differences.items():
            assert difference.value == pytest.approx(getattr(each.mean, name) - getattr(point.mean, name), abs=1e-6)
            assert difference.low <= difference.value <= difference.high
    assert len({each.mean.nll for each in ensembles[4::2]}) >= 3  # the twin of a Gaussian design draws the same members
    for each in ensembles:
        assert each.tempering is not None
        assert each.temperature == each.tempering.temperature
        assert {tried.num_members for tried in each.tempering.path} == {2}
        assert each.nll_from_scaled is not None
        assert each.nll_from_scaled.value == pytest.approx(each.mean.nll - scaled.mean.nll, abs=1e-6)
        assert {name: table.shape[1] for name, table in each.probabilities.items()} == {
            name: len(task.classes) for name, task in suite.tasks.items()
        }
    for plain, divided in zip(ensembles[::2], ensembles[1::2], strict=True):
        assert plain.tempering is not None
        assert divided.tempering is not None
        assert (plain.logit_temperature, divided.logit_temperature) == (1.0, divided.tempering.best.logit_temperature)
        assert divided.tempering.best.nll <= plain.tempering.best.nll + 1e-12
    found = load_predictions(out / "predictions.npz")
    shown = {"Gibbs, all layers", "white noise, last layer", "Gibbs, scaled logits, last layer"}
    assert {EXPERTS, "task arithmetic", "MAP", *shown} <= set(found.methods)
    mean_nll = [nll(found.probabilities["Gibbs, last layer"][task].log(), found.labels[task]) for task in found.tasks]
    assert sum(mean_nll) / len(mean_nll) == pytest.approx(ensembles[4].mean.nll, abs=1e-9)
    with (out / "temperatures.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(dict.fromkeys((line["members"], line["sampled"]) for line in lines)) == [
        (each.name, each.scope) for each in ensembles
    ]
    assert {line["logit_temperature"] for line in lines if SCALED not in line["members"]} == {"1.0"}
    html = (out / "report.html").read_text(encoding="utf-8")
    assert all(word in html for word in ("Convergence", "tails", "Calibration", "Comparison", EXPERTS))
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


@pytest.fixture(scope="module", params=[toy_suite, toy_language], ids=["vision", "language"])
def suite(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """A toy suite of either kind."""
    made: Suite = request.param(tmp_path_factory.mktemp("suite"))
    return made


class TestSuiteModel:
    def test_its_logits_are_each_tasks_own(self, suite: Suite) -> None:
        """Whatever the order of the batches, and with the classes that a task lacks ruled out."""
        examples, model = Examples.of(suite, "test", batch_size=5), SuiteModel(suite, suite.base).eval()
        with torch.inference_mode():
            logits = examples.by_task(torch.cat([model(*batch) for batch in examples.batches]))
        for task, expected in task_logits(suite, suite.base, "test").items():
            torch.testing.assert_close(logits[task][:, : expected.shape[1]], expected, rtol=1e-4, atol=1e-5)
            assert bool((logits[task][:, expected.shape[1] :] == NO_CLASS).all())

    def test_the_last_layer_is_behind_the_cut(self, suite: Suite) -> None:
        network, model = suite.network, suite.model(suite.base)
        own = [name for name in model.state_dict() if re.search(network.last_layer, name)]
        assert own
        assert all(name.startswith(f"{network.cut}.") for name in own)
        matrices = {name: treatment.action for name, treatment in suite.vectors().treatments.items() if name in own}
        assert "merge" in matrices.values()

    def test_a_limit_keeps_the_first_examples(self, suite: Suite) -> None:
        some = suite.limited(5, None)
        for name, task in some.tasks.items():
            assert torch.equal(task.splits["validation"].labels, suite.tasks[name].splits["validation"].labels[:5])
            assert len(task.splits["test"]) == len(suite.tasks[name].splits["test"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scope", SCOPES)
def test_members_are_those_of_the_merged_ensemble(kind: str, scope: str, tmp_path: Path) -> None:
    suite = toy_language(tmp_path)
    method, settings = BY_NAME["InputGram, Cauchy"], Settings(0.7, 0.1)
    design = demo.save_merge(method, settings, suite, tmp_path / "merged")
    ensembles = Ensembles(suite, design, tmp_path / "merged", 0, Budget(members=2, warmup=1, thin=1))
    states = ensembles.states(ensembles.draw(scope, kind, 1e-4, 2), kind)
    whole = list(ensembles.ensemble(scope, kind, 1e-4, 2).members())
    for state, expected in zip(states, whole, strict=True):
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name.removeprefix("backbone.")])
    same = expected.keys() - {name.removeprefix("backbone.") for name in state}
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(expected[name], saved[name]) for name in same)
    assert len(state) == (1 if scope == "last layer" else 13)


class TestPlan:
    def test_given_scales_are_all_that_is_tried(self) -> None:
        asked: list[Settings] = []

        def watched(settings: Settings) -> Scores:
            asked.append(settings)
            return bowl(settings)

        plan = Plan(trials=3, scalings=(0.2, 0.5, 3.0))
        assert plan.search(BY_NAME["InputGram, Cauchy"], watched, 0).settings == Settings(0.5, ETA)
        assert asked == [Settings(scaling, ETA) for scaling in plan.scalings]
        assert plan.search(ARITHMETIC, watched, 0).settings == Settings(0.5, 0.0)
        assert plan.search(AVERAGE, watched, 0).settings == Settings(1.0, 0.0)

    def test_the_note_says_the_budget(self, suite: Suite) -> None:
        plan = Plan(trials=2, scalings=(0.5, 1.0), validation=7)
        note = plan.note(suite.limited(plan.validation, plan.test))
        count = len(suite.labels("test")["one"])
        assert "2 settings for each method (λ among 0.5, 1, η = 0.1) on 7 validation examples" in note
        assert f"judged on {count} test examples a task; 10 members" in note


class TestDemo:
    budget = Budget(2, temperatures=2, refinements=0, walk_temperatures=2, everywhere=(GIBBS, NOISE), warmup=1, thin=1)
    plan = Plan((*BASELINES, BY_NAME["Directional, Cauchy"], BY_NAME["InputGram, Gaussian"]), trials=2, budget=budget)

    def test_from_end_to_end(self, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(page, "DRAWS", 100)  # of each chain of the report
        out, console = tmp_path / "out", Console(width=140, quiet=True)
        rows, outcomes = demo.run(suite, out, self.plan, 0, console)
        assert [row.name for row in rows] == ["base", EXPERTS, *(method.name for method in self.plan.methods)]
        assert {path.name for path in out.iterdir()} == {
            *("merged", "results.csv", "results.md", "results.png"),
            *("ensembles.md", "temperatures.csv", "temperatures.png", "draws", "predictions.npz", "report.html"),
        }
        method, best = demo.best_of(rows[2:], self.plan.methods)
        merged = load_file(out / "merged" / "model.safetensors")
        suite.network.open(merged)
        got = mean_scores(evaluate(suite, merged, "test"))
        assert dataclasses.astuple(got) == pytest.approx(dataclasses.astuple(best.on(MEAN)), rel=1e-3, abs=1e-4)
        assert method.energy is not None
        check_outcomes(outcomes, best, suite, out)

    def test_again_in_the_same_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        suite, out, console = toy_language(tmp_path), tmp_path / "out", Console(quiet=True)
        monkeypatch.setattr(demo, "report", lambda *_: (out / "report.html", ()))
        monkeypatch.setattr(page, "DRAWS", 100)
        plan = dataclasses.replace(self.plan, methods=(ARITHMETIC, BY_NAME["InputGram, Gaussian"]))
        first, again = (demo.run(suite, out, plan, 0, console) for _ in range(2))
        assert [row.scores for row in again[0]] == [row.scores for row in first[0]]
        assert [outcome.scores for outcome in again[1]] == [outcome.scores for outcome in first[1]]
        design = Design(BY_NAME["InputGram, Gaussian"].design(tuple(suite.experts), 0.1))
        kept, other = (
            (save_span_draws(suite, design, out, seed) / "draws.safetensors").read_bytes() for seed in (0, 1)
        )
        assert kept != other

    def test_a_folder_of_somebody_else_is_kept(self, tmp_path: Path) -> None:
        suite = toy_suite(tmp_path)
        with pytest.raises(FileExistsError, match="not a merged model"):
            demo.save_merge(BY_NAME["InputGram, Gaussian"], Settings(1.0, 0.1), suite, tmp_path / "one")
        assert (tmp_path / "one" / "model.safetensors").is_file()

    def test_nothing_is_solved_twice(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        suite = toy_language(tmp_path)
        asked: list[tuple[str, float]] = []

        def counting(method: Method, vectors: Loaded, eta: float) -> object:
            asked.append((method.name, eta))
            return solve(method, vectors, eta)

        monkeypatch.setattr(plan_module, "solve", counting)
        methods = (ARITHMETIC, BY_NAME["Directional, Gaussian"], BY_NAME["Directional, Cauchy"])
        scalings = (0.3, 0.5, 1.0)
        rows, tails = demo.compare(suite, Plan(methods, 3, scalings), 0, lambda _: None)
        assert asked == [("task arithmetic", 0.0), ("Directional, Gaussian", ETA), ("Directional, Cauchy", ETA)]
        assert [row.name for row, _ in tails] == ["Directional, Cauchy"]
        twin = tails[0][1]
        assert twin.settings == rows[2].settings  # the Gaussian of the same family is the twin
        state = solve(methods[1], suite.vectors(), ETA).state(twin.settings.scaling if twin.settings else 0.0)
        assert twin.scores == evaluate(suite, state, "test")
