"""The comparison under shift: predictions by a second route, and every number of the page."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.harness import demo, shift_bench, shift_report
from benchmarks.harness.corruptions import Corruptions
from benchmarks.harness.ensembles import Ensembles
from benchmarks.harness.evaluate import task_logits
from benchmarks.harness.methods import METHODS
from benchmarks.harness.outcomes import GIBBS, MAP, NOISE, SCALED, SCALED_MAP, TWIN, Budget
from benchmarks.harness.search import Settings
from benchmarks.harness.shift_bench import CLEAN, OTHERS, Best, Predictions, Shift, conditions, mixture, read_demo
from benchmarks.harness.suite import Suite
from benchmarks.harness.suite_model import SuiteModel
from benchmarks.language.corruptions import EDITS, TEXTS, corrupted
from benchmarks.language.tasks import Split
from benchmarks.vision.corruptions import IMAGES
from inference.logit_temperature import fit_logit_temperature, scaled_mean
from inference.models.ensemble import Prediction
from tests.toy_suites import toy_language, toy_suite

INPUT = next(method for method in METHODS if method.name == "InputGram, Cauchy")
BUDGET = Budget(warmup=1, thin=1)
OTHERS_HEAT = {
    GIBBS + SCALED: (5e-3, 1.25),
    TWIN: (2e-3, 1.0),
    TWIN + SCALED: (1e-3, 0.8),
    NOISE: (5e-4, 1.0),
    NOISE + SCALED: (1e-4, 1.5),
}

# How far ensembles are from the merge is a column of the demo's table.
pytestmark = pytest.mark.filterwarnings("ignore:.*standard deviations of the draws from the merge")


def write_demo(folder: Path, suite: Suite, rows: Mapping[str, float], path: Mapping[float, float]) -> None:
    """What the demo leaves behind: validation accuracy by method, NLL by temperature."""
    demo.save_merge(INPUT, Settings(0.8, 0.1), suite, folder / "merged")
    lines = ["method,task,scaling,eta,validation_accuracy"]
    lines += [f'"{name}",mean,0.8,0.1,{value}\n"{name}",one,0.8,0.1,' for name, value in rows.items()]
    (folder / "results.csv").write_text("\n".join(lines) + "\n")
    lines = ["members,sampled,temperature,nll,num_members,logit_temperature"]
    lines += ["Gibbs,all layers,1e-9,0,5,1", "Laplace,last layer,1e-9,0,5,1"]
    lines += [f"Gibbs,last layer,{temperature},{nll},2,1" for temperature, nll in path.items()]
    lines += [f'"{way}",last layer,{temperature},1,2,{divisor}' for way, (temperature, divisor) in OTHERS_HEAT.items()]
    (folder / "temperatures.csv").write_text("\n".join(lines) + "\n")


KNOWN = dataclasses.replace(TEXTS, kinds=tuple(kind for kind in TEXTS.kinds if kind != "unknown"))
"""What a vocabulary of fifty tokens has."""
SUITES = {"vision": (toy_suite, IMAGES, "shot_noise"), "language": (toy_language, KNOWN, "replacement")}


@pytest.fixture(scope="module", params=list(SUITES))
def suite(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Suite:
    """A demo's toy, with heads that are less sure."""
    made = SUITES[request.param][0](tmp_path_factory.mktemp("suite"))
    heads = {name: dataclasses.replace(head, weight=0.1 * head.weight) for name, head in made.heads.items()}
    return dataclasses.replace(made, heads=heads)


@pytest.fixture(scope="module")
def best(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Best:
    """A merge of it, as the demo leaves it."""
    folder = tmp_path_factory.mktemp("demo")
    accuracies = {"task arithmetic": 0.9, "InputGram, Cauchy": 0.7, "OutputGram, Cauchy": 0.6}
    write_demo(folder, suite, accuracies, {1e-4: 1.0, 1e-3: 0.5, 1e-2: 0.7})
    return read_demo(folder, tuple(suite.experts))


@pytest.fixture(scope="module")
def corruptions(suite: Suite) -> Corruptions:
    """Of the suite's inputs."""
    return SUITES[suite.name][1]


@pytest.fixture(scope="module")
def found(suite: Suite, best: Best, corruptions: Corruptions) -> dict[str, Predictions]:
    """All predictions."""
    told: list[tuple[int, int]] = []
    shift = Shift(suite, best, corruptions, 3, BUDGET)
    predictions = shift.predictions(lambda done, total: told.append((done, total)))
    total = 2 + 3 * len(corruptions.kinds)
    assert sorted(told) == [(i + 1, total) for i in range(total)]
    return predictions


class TestReadDemo:
    def test_best_product_of_experts_and_its_temperature(self, best: Best) -> None:
        assert (best.name, best.members, best.design.scaling) == ("InputGram, Cauchy", 2, 0.8)
        assert best.heat == {GIBBS: (1e-3, 1.0), **OTHERS_HEAT}
        assert best.design.poe == INPUT.design(("one", "two"), 0.1)

    def test_another_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="Run the suite's demo first"):
            read_demo(tmp_path, ("one",))


class TestPredictions:
    def test_the_map_is_the_merged_model(self, suite: Suite, best: Best, found: dict[str, Predictions]) -> None:
        logits = task_logits(suite, best.merged, "test")
        for task, values in logits.items():
            expected = values.double().softmax(1)
            torch.testing.assert_close(found[MAP][CLEAN][task].probabilities, expected, rtol=1e-4, atol=1e-6)
            assert found[MAP][CLEAN][task].num_members == 1

    @pytest.mark.parametrize("kind", [GIBBS, TWIN, NOISE])
    def test_ensembles_are_those_of_the_demo(
        self, kind: str, suite: Suite, best: Best, found: dict[str, Predictions], corruptions: Corruptions
    ) -> None:
        """By `MergedEnsemble.predict` on corrupted examples."""
        ensembles = Ensembles(suite, best.design, best.merged, 3, BUDGET)
        ensemble, corruption = ensembles.ensemble("last layer", kind, best.heat[kind][0], 2), SUITES[suite.name][2]
        changed = corruptions.corrupted(suite.tasks["two"].splits["test"], corruption, 2, 3)
        inputs = suite.network.inputs(changed, torch.arange(len(changed)), suite.device)
        expected = ensemble.predict(
            SuiteModel(suite, best.merged),
            [(inputs, 1)],
            forward=lambda m, batch: m(*batch),
            submodule="backbone",
        )
        got = found[kind][corruption, 2]["two"]
        probabilities = expected.probabilities[:, : got.probabilities.shape[1]]
        torch.testing.assert_close(got.probabilities, probabilities, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.mutual_information, expected.mutual_information, rtol=1e-2, atol=1e-6)
        assert got.num_members == 2
        others = [found[each][corruption, 2]["two"] for each in (MAP, GIBBS, TWIN, NOISE) if each != kind]
        assert min(float((got.probabilities - other.probabilities).abs().max()) for other in others) > 1e-3

    def test_other_tasks_examples(
        self, suite: Suite, best: Best, found: dict[str, Predictions], corruptions: Corruptions
    ) -> None:
        shown = Shift(suite, best, corruptions, 3, BUDGET).shown(OTHERS)
        assert shown["one"] == [suite.tasks["two"].splits["test"]]
        crossed = {"one": suite.tasks["two"], "two": suite.tasks["one"]}
        logits = task_logits(dataclasses.replace(suite, tasks=crossed), best.merged, "test")
        got = found[MAP][OTHERS]["one"].probabilities
        torch.testing.assert_close(got, logits["one"].double().softmax(1), rtol=1e-4, atol=1e-6)

    def test_scaled_logits(self, suite: Suite, best: Best, found: dict[str, Predictions]) -> None:
        logits = {split: task_logits(suite, best.merged, split) for split in ("validation", "test")}
        divisor = fit_logit_temperature(logits["validation"], suite.labels("validation"))
        expected = (logits["test"]["one"].double() / divisor).softmax(1)
        torch.testing.assert_close(found[SCALED_MAP][CLEAN]["one"].probabilities, expected, rtol=1e-4, atol=1e-5)
        assert float((expected - found[MAP][CLEAN]["one"].probabilities).abs().max()) > 1e-3

    @pytest.mark.parametrize("kind", [GIBBS, TWIN, NOISE])
    def test_scaled_members(self, kind: str, suite: Suite, best: Best, found: dict[str, Predictions]) -> None:
        """At the temperature that belongs to the divisor, which is that of every member's logits."""
        temperature, divisor = best.heat[kind + SCALED]
        ensembles = Ensembles(suite, best.design, best.merged, 3, BUDGET)
        members = ensembles.ensemble("last layer", kind, temperature, 2).members()
        logits = torch.stack([task_logits(suite, state, "test")["two"] for state in members])
        got = found[kind + SCALED][CLEAN]["two"].probabilities
        torch.testing.assert_close(got, scaled_mean(logits, divisor).exp(), rtol=1e-4, atol=1e-5)
        assert float((got - scaled_mean(logits, 1.0).exp()).abs().max()) > 1e-3

    def test_mixture_of_members_that_disagree(self) -> None:
        pair = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]], dtype=torch.float64)
        got = mixture(pair.log())
        log_two = torch.tensor([2.0, 2.0], dtype=torch.float64).log()
        torch.testing.assert_close(got.entropy, log_two)
        torch.testing.assert_close(got.mutual_information, log_two * torch.tensor([1.0, 0.0], dtype=torch.float64))


LABELS = {"s": torch.arange(80) % 2, "t": torch.arange(40) % 2}


def predicted(labels: Tensor, wrong: int, sure: float) -> Prediction:
    """The first few wrong, all with the same confidence."""
    right = torch.arange(len(labels)) >= wrong
    top = torch.where(right, labels, 1 - labels)
    return mixture(torch.where(torch.arange(2) == top.unsqueeze(1), sure, 1 - sure).double().log().unsqueeze(0))


def synthetic(sure: float, unsure: float) -> Predictions:
    """One more wrong for each severity; confidence is as given on images of the own and of other tasks."""
    made: dict[shift_bench.Condition, dict[str, Prediction]] = {
        condition: {task: predicted(labels, 4 * condition[1], sure) for task, labels in LABELS.items()}
        for condition in conditions(IMAGES)
    }
    made[OTHERS] = {task: predicted(labels, 0, unsure) for task, labels in LABELS.items()}
    return made


class TestReport:
    found = {
        MAP: synthetic(0.9, 0.9),
        SCALED_MAP: synthetic(0.8, 0.8),
        GIBBS: synthetic(0.9, 0.6),
        GIBBS + SCALED: synthetic(0.8, 0.6),
        TWIN: synthetic(0.6, 0.9),
        TWIN + SCALED: synthetic(0.7, 0.9),
        NOISE: synthetic(0.7, 0.7),
        NOISE + SCALED: synthetic(0.8, 0.8),
    }

    def test_page_and_csv(self, tmp_path: Path) -> None:
        path, about = tmp_path / "shift.md", ("a merge", IMAGES, "the command")
        text = shift_report.write_report(path, self.found, LABELS, *about, 0, 3.0)
        assert "Made by `the command` in 3 seconds" in text
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:2] == "| "]
        clean = next(row for row in rows if row[:2] == ["clean", "MAP"])
        assert (clean[2], clean[6]) == ("1.000", "0.100")
        worst = {row[1]: row for row in rows if row[0] == "5"}
        wrong = (12 / 80 + 12 / 40) / 2
        nll = {sure: -(1 - wrong) * math.log(sure) - wrong * math.log(1 - sure) for sure in (0.9, 0.8)}
        assert worst[MAP][2] == f"{1 - wrong:.3f}"
        assert float(worst[MAP][4]) == pytest.approx(nll[0.9], abs=6e-4)
        gap = float(worst[SCALED_MAP][5].split(" ")[0])
        assert gap == pytest.approx(nll[0.8] - nll[0.9], abs=6e-4)
        assert worst[GIBBS][3] == "+0.000 [+0.000, +0.000]"
        heads = {row[0]: row for row in rows if row[0] in LABELS}
        assert heads["s"][1].startswith("0.500")
        assert heads["s"][2].startswith("+0.500 [+0.500")  # Gibbs is never as unsure of its own as of others
        assert heads["s"][3].startswith("-0.500")  # the twin always is
        assert "Gibbs: the entropy is better in 2, worse in 0, not told apart in 0" in text
        with (tmp_path / "shift.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert len(lines) == 19 * 8 * 2 * 4 + 3 * 2 * 3
        (area,) = (x for x in lines if (x["members"], x["task"], x["score"]) == (GIBBS, "t", "AUROC, entropy"))
        assert float(area["value"]) == 1.0

    def test_pooled_differences_are_paired_over_conditions(self) -> None:
        """The same test image under every corruption: its mean over them is what is resampled."""
        scored = {c: shift_report.compared(self.found, c, LABELS, 0) for c in conditions(IMAGES) if c != OTHERS}
        one = scored["contrast", 2].difference(SCALED_MAP, MAP, "nll")
        all_equal = shift_report.at_severity(scored, 2).difference(SCALED_MAP, MAP, "nll")
        assert all_equal.value == pytest.approx(one.value)
        assert all_equal.error == pytest.approx(one.error)  # six copies of the same images are not six times as many
        assert one.error > 1e-3
        mixed = shift_report.pooled([scored["contrast", 1], scored["contrast", 3]])
        expected = (scored["contrast", 1].mean(MAP).value + scored["contrast", 3].mean(MAP).value) / 2
        assert mixed.mean(MAP).value == pytest.approx(expected)


class TestTexts:
    def texts(self, count: int = 200, inner: int = 20) -> Split:
        """Marks 7 and 8 around tokens 200, 201, ..."""
        tokens = torch.arange(200, 200 + inner).repeat(count, 1)
        ends = torch.tensor([7, 8]).repeat(count, 1)
        whole, zeros = torch.cat([ends[:, :1], tokens, ends[:, 1:]], 1).short(), torch.zeros(count).long()
        return Split(whole, zeros + inner + 2, *[zeros] * 3)

    @pytest.mark.parametrize("severity", [1, 2, 3])
    @pytest.mark.parametrize("kind", list(EDITS))
    def test_as_many_edits_as_said_and_whole_ends(self, kind: str, severity: int) -> None:
        """A count's bounds are five standard deviations of the binomial."""
        split, rate = self.texts(), (0.1, 0.25, 0.5)[severity - 1]
        made = corrupted(split, kind, severity, seed=5)
        assert torch.equal(made.tokens, corrupted(split, kind, severity, seed=5).tokens)
        assert not torch.equal(made.lengths, made.lengths[:1]) if kind in ("deletion", "insertion") else True
        last = made.tokens[torch.arange(200), made.lengths - 1]
        assert bool((made.tokens[:, 0] == 7).all() & (last == 8).all())
        assert not bool(made.tokens[torch.arange(made.tokens.shape[1]) >= made.lengths.unsqueeze(1)].any())
        edits = {
            "deletion": lambda: float((split.lengths - made.lengths).sum()),
            "insertion": lambda: float((made.lengths - split.lengths).sum()),
            "replacement": lambda: float((made.tokens != split.tokens).sum()) / (19 / 20),
            "unknown": lambda: float((made.tokens == 100).sum()),
            "swap": lambda: self.swaps(made) * 20 / 19,
        }[kind]()
        assert abs(edits - 4000 * rate) < 5 * (4000 * rate * (1 - rate)) ** 0.5 + 5 * (4000 * rate / 20) ** 0.5

    @staticmethod
    def swaps(made: Split) -> float:
        """A token that moved back by one each: those that moved forward went over as many."""
        inner = made.tokens[:, 1:21].long() - 200
        assert torch.equal(inner.sort(1).values, torch.arange(20).repeat(200, 1))
        return float((inner > torch.arange(20)).sum())

    def test_short_texts_stay_texts(self) -> None:
        zeros = torch.zeros(2).long()
        split = Split(torch.tensor([[7, 8, 0], [7, 9, 8]]).short(), torch.tensor([2, 3]), *[zeros] * 3)
        for kind in EDITS:
            made = corrupted(split, kind, 3, seed=0)
            assert made.tokens[0, :2].tolist() == [7, 8]
            assert int(made.lengths[1]) >= 3

    def test_no_text_grows_beyond_what_the_network_reads(self) -> None:
        made = corrupted(self.texts(inner=62), "insertion", 3, seed=0)
        assert int(made.lengths.max()) == made.tokens.shape[1] == 64
        assert bool((made.tokens[:, -1] == 8).all())
