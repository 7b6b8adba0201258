"""Models evaluated on tasks: against scores of their probability tables, by hand for tokens, and each bad input."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from scipy.stats import spearmanr
from torch import Tensor, nn

import diagnostics as dx
from diagnostics.estimates import resamples
from diagnostics.predictions import model_outputs, model_scores
from inference import MergedEnsemble, Task, sample_full
from poe_models import AbsolutePrecision, Anchor, ProductOfExperts, TaskVectors
from tests.helpers import assert_close
from tests.seeds import seeded

CLASSES = 3


def networks(count: int = 3) -> list[nn.Linear]:
    found = []
    for seed in range(count):
        model = nn.Linear(4, CLASSES).double()
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=seeded(seed), dtype=torch.float64)
        found.append(model)
    return found


def batches(seed: int, count: int = 60, classes: int = CLASSES, size: int = 25) -> list[tuple[Tensor, Tensor]]:
    generator = seeded(100 + seed)
    inputs = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (count,), generator=generator)
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def joined(loader: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([batch[0] for batch in loader]), torch.cat([batch[1] for batch in loader])


def two_tasks() -> list[Task]:
    head = nn.Linear(CLASSES, 2).double()
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=seeded(50), dtype=torch.float64)
    return [Task("plain", batches(0)), Task("headed", batches(1, 47, 2), head=head)]


def tables(model: nn.Module, tasks: list[Task]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {task.name: torch.cat([task.logits(model, batch) for batch in task.loader]).softmax(1) for task in tasks}


def test_scores_are_those_of_the_probabilities() -> None:
    one, two, expert = networks()
    tasks = two_tasks()
    labels = {task.name: joined(list(task.loader))[1] for task in tasks}
    found = dx.evaluate({"one": one, "two": two}, tasks, seed=3, experts=dict.fromkeys(labels, expert), reference="one")
    other = dx.compare_methods(
        {"one": tables(one, tasks), "two": tables(two, tasks)}, labels, seed=3, experts=tables(expert, tasks)
    )
    for metric in ("accuracy", "nll", "brier", "ece"):
        for name in ("one", "two"):
            assert str(found.score(name, metric)) == str(other.mean(name, metric))
            for task in labels:
                assert str(found.score(name, metric, task)) == str(other.on_task(name, task, metric))
        assert str(found.difference("two", metric)) == str(other.difference("two", "one", metric))
    assert str(found.normalised("two")) == str(other.normalised("two"))
    whole = dx.calibration(tables(one, tasks)["plain"], labels["plain"], seed=4)
    assert str(found.score("one", "ece", "plain")) == str(whole.ece)
    assert found.examples == {"plain": 60, "headed": 47}


def test_weights_of_every_kind_are_the_same_model(tmp_path: Path) -> None:
    one, two, three = networks()
    state = {name: value.detach() for name, value in one.state_dict().items()}
    (tmp_path / "folder").mkdir()
    save_file(state, tmp_path / "folder" / "model.safetensors")
    torch.save(state, tmp_path / "one.pt")
    models: dict[str, Any] = {"state": state, "folder": tmp_path / "folder", "file": str(tmp_path / "one.pt")}
    network = copy.deepcopy(two)
    found = dx.evaluate({"module": one, **models}, two_tasks(), seed=0, network=network)
    assert [str(found.score(name, "nll")) for name in models] == [str(found.score("module", "nll"))] * 3
    assert all(torch.equal(own, other) for own, other in zip(network.parameters(), two.parameters(), strict=True))
    wrapped = nn.ModuleDict({"backbone": three, "rest": nn.Linear(1, 1)})
    forward = lambda model, batch: model["backbone"](batch[0])  # noqa: E731
    tasks = [Task("plain", batches(0), forward=forward)]
    again = dx.evaluate({"state": state}, tasks, seed=0, network=wrapped, submodule="backbone")
    assert again.score("state", "nll").value == found.score("state", "nll", "plain").value


def ensemble() -> MergedEnsemble:
    base, *tuned = networks()
    vectors = TaskVectors(
        base.state_dict(), {f"e{i}": each.state_dict() for i, each in enumerate(tuned)}, dtype=torch.float64
    )
    poe = ProductOfExperts.of(vectors.names, anchor=Anchor(precision=AbsolutePrecision(0.5)))
    return MergedEnsemble(vectors, poe, sample_full(vectors, poe, 3, generator=seeded(9), chains=1))


@pytest.mark.parametrize("budget", [1, 700, 1 << 28])
def test_ensembles_are_scored_by_their_mean(budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_outputs, "CHUNK_BYTES", budget)
    drawn, network, tasks = ensemble(), networks(1)[0], two_tasks()
    folders, every = [], []
    for number, state in enumerate(drawn.members()):
        folders.append(tmp_path / f"member-{number}")
        folders[-1].mkdir()
        save_file(state, folders[-1] / "model.safetensors")
        member = copy.deepcopy(network)
        member.load_state_dict(state)
        every.append(tables(member, tasks))
    found = dx.evaluate({"drawn": drawn, "folders": folders}, tasks, seed=0, network=network, num_resamples=20)
    for task in tasks:
        mean = torch.stack([table[task.name] for table in every]).mean(0)
        expected = dx.calibration(mean, joined(list(task.loader))[1], seed=0, num_resamples=20)
        for name in ("drawn", "folders"):
            for metric in ("accuracy", "nll", "brier", "ece"):
                assert found.score(name, metric, task.name).value == pytest.approx(
                    expected.scores[metric].value, rel=1e-12
                )


# --- tokens ---


class Bigrams(nn.Module):
    """Logits of the next token by a table; the name says that they are about the next label."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 7, generator=seeded(5), dtype=torch.float64))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.table[input_ids]}


BigramsForCausalLM = type("BigramsForCausalLM", (Bigrams,), {})


def texts() -> list[dict[str, Tensor]]:
    ids = torch.randint(7, (30, 6), generator=seeded(6))
    mask = torch.ones(30, 6, dtype=torch.int64)
    mask[::3, 4:] = 0
    labels = ids.masked_fill(torch.arange(6) < 2, -100)  # a prompt of two tokens
    labels[5] = -100  # nothing is asked of this text
    parts = (
        {"input_ids": ids, "attention_mask": mask, "labels": labels}[key].split(8)
        for key in ("input_ids", "attention_mask", "labels")
    )
    return [
        dict(zip(("input_ids", "attention_mask", "labels"), each, strict=True)) for each in zip(*parts, strict=True)
    ]


def test_language_models_by_hand() -> None:
    model, loader = BigramsForCausalLM(), texts()
    task = Task("texts", loader, metrics=("perplexity", "nll", "exact_match", "accuracy", "ece"))
    found = dx.evaluate({"model": model}, [task], seed=0, num_resamples=50)
    log_p = model.table.detach().log_softmax(1)
    sums, counts, whole = [], [], []
    for batch in loader:
        for ids, mask, labels in zip(*batch.values(), strict=True):
            own = [
                (int(a), int(b)) for a, b, m, y in zip(ids, ids[1:], mask[1:], labels[1:], strict=False) if m and y >= 0
            ]
            if own:
                sums.append(-sum(float(log_p[a, b]) for a, b in own))
                counts.append(len(own))
                whole.append(float(all(int(log_p[a].argmax()) == b for a, b in own)))
    assert found.examples["texts"] == len(sums) == 29
    nll = found.score("model", "nll", "texts")
    assert nll.value == pytest.approx(sum(sums) / sum(counts), rel=1e-12)
    assert found.score("model", "perplexity", "texts").value == pytest.approx(
        math.exp(sum(sums) / sum(counts)), rel=1e-12
    )
    assert found.score("model", "exact_match", "texts").value == pytest.approx(sum(whole) / 29, rel=1e-12)
    weights = torch.cat(list(resamples(29, 50, seed=1)))
    texts_together = weights @ torch.tensor(sums, dtype=torch.float64) / (weights @ torch.tensor(counts).double())
    assert nll.error == pytest.approx(float(texts_together.std()), rel=1e-12)


def test_only_four_numbers_of_a_token_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    real = model_outputs.Kept.of_classes
    monkeypatch.setattr(
        model_outputs.Kept, "of_classes", lambda rows, ids: (seen.append(tuple(rows.shape)), real(rows, ids))[1]
    )
    dx.evaluate({"model": BigramsForCausalLM()}, [Task("texts", texts())], seed=0, num_resamples=5)
    assert [shape[1] for shape in seen] == [4]


# --- values ---


def test_spearman_is_scipys_on_every_resample() -> None:
    model = nn.Linear(4, 1).double()
    inputs = torch.randn(40, 4, generator=seeded(7), dtype=torch.float64)
    labels = torch.randint(5, (40,), generator=seeded(8)).double()  # ties
    task = Task("similarity", list(zip(inputs.split(16), labels.split(16), strict=True)), metrics=("spearman",))
    found = dx.evaluate({"model": model}, [task], seed=2, num_resamples=20)
    predicted = model(inputs).detach().flatten()
    weights = torch.cat(list(resamples(40, 20, seed=3)))
    expected = []
    for weight in [torch.ones(40), *weights]:
        copies = weight.long()
        expected.append(spearmanr(predicted.repeat_interleave(copies), labels.repeat_interleave(copies)).statistic)
    assert found.score("model", "spearman").value == pytest.approx(expected[0], rel=1e-12)
    assert_close(found.replicates["similarity", "spearman"][:, 0], torch.tensor(expected[1:]), 1e-12)


# --- tables ---


def test_one_table_is_printed_and_written() -> None:
    one, two, expert = networks()
    found = dx.evaluate(
        {"[red]one": one, "two": two},
        two_tasks(),
        seed=0,
        metrics=("accuracy", "ece"),
        reference="two",
        experts={"plain": expert},
    )
    frame = found.to_dataframe()
    assert len(frame) == 2 * (4 + 2)
    row = frame.set_index(["model", "task", "metric"]).loc["[red]one", "plain", "accuracy"]
    assert row["value"] == found.score("[red]one", "accuracy", "plain").value
    assert row["normalised_low"] == found.normalised("[red]one", task="plain").low
    assert row["difference_high"] == found.difference("[red]one", "accuracy", "plain").high
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(found)
    text = console.export_text()
    assert [word for word in ("[red]one", "less two", "over expert", "mean") if word not in text] == []


# --- one error for each bad input ---


def nan_in(batch: int) -> list[tuple[Tensor, Tensor]]:
    loader = batches(0)
    loader[batch][0][1] = torch.nan
    return loader


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no batches": ({"tasks": [Task("t", [])]}, r"'m' on task 't': the loader has no batches"),
    "NaN": ({"tasks": [Task("t", nan_in(1))]}, r"'m' on task 't': batch 1: .*NaN"),
    "labels": ({"tasks": [Task("t", batches(0, classes=9))]}, r"batch 0: label \d with 3 classes"),
    "no labels": ({"tasks": [Task("t", [torch.zeros(2, 4).double()])]}, "batch 0 has no integer labels"),
    "metric": ({"metrics": ["acuracy"]}, "unknown metric 'acuracy'; did you mean 'accuracy'?"),
    "kinds": ({"metrics": ["accuracy", "spearman"]}, "metrics of class predictions or of values"),
    "values": ({"tasks": [Task("t", batches(0), metrics=("spearman",))]}, r"values \(60, 3\) for 60 labels"),
    "no network": ({"models": {"m": {}}}, "'m' is weights without an architecture"),
    "lacking": (
        {"models": {"m": {"weight": torch.zeros(3, 4)}}, "network": nn.Linear(4, 3)},
        "'m' .* lacks 'bias' of the network",
    ),
    "shape": (
        {"models": {"m": {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}}, "network": nn.Linear(4, 3)},
        r"'weight' of shape \(2, 4\), the model has \(3, 4\)",
    ),
    "reference": ({"reference": "n"}, "no model 'n'"),
    "expert": ({"experts": {"plane": nn.Linear(4, 3)}}, "no task 'plane'; did you mean 'plain'?"),
    "twice": ({"tasks": [Task("t", batches(0)), Task("t", batches(1))]}, "two tasks are called 't'"),
    "nothing": ({"models": {}}, "0 models and 1 tasks"),
    "members": ({"models": {"m": []}, "network": nn.Linear(4, 3)}, "'m' has no members"),
}


@pytest.mark.parametrize("what", BAD)
def test_one_error_for_each_bad_input(what: str) -> None:
    given, message = BAD[what]
    arguments = {"models": {"m": networks(1)[0]}, "tasks": [Task("plain", batches(0))], **given}
    with pytest.raises(ValueError, match=message):
        dx.evaluate(**arguments, seed=0)


def test_a_loader_that_shuffles_is_refused() -> None:
    class Shuffled:
        def __init__(self) -> None:
            self.passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            return iter(texts()[:: 1 if self.passes == 1 else -1])

    model = BigramsForCausalLM()
    with pytest.raises(ValueError, match="other examples than those of the model before it"):
        dx.evaluate({"a": model, "b": model}, [Task("t", Shuffled())], seed=0)
    with pytest.raises(ValueError, match="got an iterator"):
        Task("t", iter(batches(0)))


def test_scores_ask_for_what_is_there() -> None:
    found = dx.evaluate({"m": networks(1)[0]}, [Task("plain", batches(0))], seed=0, num_resamples=5)
    for wrong, message in (
        (lambda: found.score("n", "nll"), "no model 'n'"),
        (lambda: found.score("m", "spearman"), "no 'spearman'; there are accuracy on plain"),
        (lambda: found.difference("m", "nll"), "compared with what"),
        (lambda: found.normalised("m"), "has no expert to divide by"),
        (lambda: found.normalised("m", "nll"), "lower is better"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    assert model_scores.MEAN not in found.to_dataframe()["task"].tolist()
