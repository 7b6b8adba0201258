"""The table of all methods on several suites: entries by hand, pages from known predictions, runs that go on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.harness.contest import ABOUT, BASE, LABELS, OWN, Contest, Entry, Results, entry_file, run
from benchmarks.harness.contest_report import NAMED, compared, pairs_of, write_report
from benchmarks.harness.evaluate import mean_scores, score, task_logits
from benchmarks.harness.methods import MAPS, solve
from benchmarks.harness.rule_bench import Bench
from benchmarks.harness.rulebook import RULES
from benchmarks.harness.suite import Suite
from inference.logit_temperature import fit_logit_temperature
from tests.toy_suites import toy_suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """The demo's toy, which calibrates on its test images."""
    made = toy_suite(tmp_path_factory.mktemp("suite"))
    tasks = {
        name: dataclasses.replace(task, splits={**task.splits, "train": task.splits["test"]})
        for name, task in made.tasks.items()
    }
    return dataclasses.replace(made, tasks=tasks)


def test_every_method_is_there(suite: Suite) -> None:
    names = Contest(Bench(suite, 1, 0, 4)).methods
    assert {BASE, OWN, *RULES, *(method.name for method in MAPS)} < set(names)
    assert {"Activation, Cauchy", "Mixed, Gaussian"} < set(names)
    assert {name for pair in NAMED for name in pair} <= set(names)


@pytest.mark.parametrize("name", ["InputGram, Cauchy", "Activation, Gaussian", "IsoC"])
def test_an_entry_is_the_merge_that_was_chosen(name: str, suite: Suite) -> None:
    contest = Contest(Bench(suite, 1, 0, 4))
    entry = contest.methods[name]()
    assert entry.facts["data"] == ("activations" if name.startswith("Activation") else "none")
    assert entry.facts["scaling"] == 1.0
    if name == "InputGram, Cauchy":
        (method,) = (each for each in MAPS if each.name == name)
        state = solve(method, suite.vectors(), 0.1).state(1.0)
        expected = {task: logits.double().softmax(1) for task, logits in task_logits(suite, state, "test").items()}
        for task, table in entry.probabilities.items():
            torch.testing.assert_close(table.double(), expected[task], rtol=1e-6, atol=1e-7)
        divisor = fit_logit_temperature(task_logits(suite, state, "validation"), suite.labels("validation"))
        assert entry.facts["divisor"] == pytest.approx(divisor)


def test_own_experts_answer_their_own_tasks(suite: Suite) -> None:
    entry = Contest(Bench(suite, 1, 0, 4)).own()
    for task, folder in suite.experts.items():
        expected = task_logits(suite, folder, "test")[task].double().softmax(1)
        torch.testing.assert_close(entry.probabilities[task].double(), expected, rtol=1e-6, atol=1e-7)


def test_scaled_probabilities_are_those_of_divided_logits() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]], dtype=torch.float64)
    entry = Entry("m", {"t": logits.softmax(1)}, {"divisor": 2.5})
    torch.testing.assert_close(entry.scaled["t"], (logits / 2.5).softmax(1))


def test_a_run_goes_on_and_is_read_back(suite: Suite, tmp_path: Path) -> None:
    contest, told = Contest(Bench(suite, 1, 0, 4)), []
    run(contest, tmp_path, [BASE], lambda name, *_: told.append(name))
    kept = entry_file(tmp_path, BASE).read_bytes()
    run(contest, tmp_path, [BASE, "Average"], lambda name, *_: told.append(name))
    assert told == [BASE, BASE, "Average"]
    assert entry_file(tmp_path, BASE).read_bytes() == kept
    assert {path.name for path in tmp_path.iterdir()} == {ABOUT, LABELS, "base.safetensors", "Average.safetensors"}
    flipped = {}
    for name, task in suite.tasks.items():
        test = dataclasses.replace(task.splits["test"], labels=task.splits["test"].labels.flip(0))
        flipped[name] = dataclasses.replace(task, splits={**task.splits, "test": test})
    with pytest.raises(ValueError, match="other test examples"):
        run(Contest(Bench(dataclasses.replace(suite, tasks=flipped), 1, 0, 4)), tmp_path, [], lambda *_: None)
    read = Results.read(tmp_path)
    assert list(read.entries) == ["Average", BASE]
    assert read.about["suite"] == "vision"
    expected = mean_scores(
        {task: score(read.entries[BASE].probabilities[task].double().log(), read.labels[task]) for task in read.labels}
    )
    assert compared([read]).mean(BASE).value == pytest.approx(expected.accuracy)
    assert compared([read]).mean(BASE, "nll").value == pytest.approx(expected.nll, rel=1e-5)


def results(seed: int, right: dict[str, int]) -> Results:
    """Methods that are right on the first so many of 40 examples of two classes, with probability 0.9."""
    labels = torch.arange(40) % 2

    def table(count: int) -> Tensor:
        answer = torch.where(torch.arange(40) < count, labels, 1 - labels)
        return 0.1 + 0.8 * torch.nn.functional.one_hot(answer, 2).float()

    facts = {
        "data": "none",
        "scaling": 1.0,
        "eta": 0.1,
        "own": None,
        "validation": 0.5,
        "divisor": 2.0,
        "unconverged": 0,
    }
    entries = {
        name: Entry(name, {"t": table(count)}, {**facts, "data": "labels" if name == OWN else "none"})
        for name, count in right.items()
    }
    about = {"suite": "toy", "network": "net", "seeds": [seed], "machine": "an abacus"}
    return Results(about, {"t": labels}, entries)


def test_page(tmp_path: Path) -> None:
    right = {BASE: 10, OWN: 40, "InputGram, Gaussian": 30, "InputGram, Cauchy": 20, "TaskArithmetic": 16}
    runs = [results(0, right), results(1, {**right, "InputGram, Gaussian": 34})]
    text = write_report(tmp_path / "page.md", {"toy": runs}, "the command")
    assert "training seeds 0, 1; on an abacus" in text
    assert "| InputGram, Gaussian | none | 0.800 [" in text
    assert "InputGram, Cauchy minus InputGram, Gaussian | -0.300 [" in text
    assert "InputGram, Cauchy minus TaskArithmetic | +0.100 [" in text
    assert "Most accurate without data: InputGram, Gaussian, above all others" in text
    assert "λ 1.00 η 0.1; λ 1.00 η 0.1" in text
    rows = (tmp_path / "page.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * len(right)
    assert any(row.startswith('toy,"InputGram, Gaussian",t,0.8,') for row in rows)


def test_pairs_are_of_methods_that_are_there() -> None:
    pairs = pairs_of(["InputGram, Cauchy", "InputGram, Gaussian", "RegMean"])
    assert pairs == [("InputGram, Cauchy", "InputGram, Gaussian"), ("RegMean", "InputGram, Cauchy")]
