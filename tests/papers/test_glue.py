"""Flan-T5's scores against generation and against transformers' own loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from benchmarks.papers.glue import (
    DATA,
    NEW_TOKENS,
    PROMPTS,
    Glue,
    answer_likelihoods,
    generated_numbers,
    targets,
    token_logits,
)
from benchmarks.papers.setups import GLUE, SETUPS
from benchmarks.papers.sources import SourceError
from diagnostics.predictions.model_scores import evaluate
from inference.models.tasks import Task
from tests.papers.toys import MadeUp, made_up

SETUP = SETUPS["flan-t5-base-glue"]


@pytest.fixture
def flan(hub: Path) -> transformers.T5ForConditionalGeneration:
    return transformers.T5ForConditionalGeneration.from_pretrained(hub / SETUP.base).eval()


@pytest.fixture
def tokenizer(hub: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(hub / SETUP.base)


def prompts() -> dict[str, torch.Tensor]:
    """Four prompts of different lengths."""
    ids = torch.tensor([[3, 4, 5, 1], [6, 7, 1, 0], [8, 1, 0, 0], [9, 10, 11, 1]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def test_an_exact_match_is_what_greedy_generation_says(flan: transformers.T5ForConditionalGeneration) -> None:
    """Targets are the model's own greedy texts; in two of them the first or the last token is another."""
    inputs = prompts()
    with torch.no_grad():
        labels = flan.generate(**inputs, max_new_tokens=4, do_sample=False)[:, 1:].clone()
    ended = (labels == flan.config.eos_token_id).cumsum(1)
    labels[ended - (labels == flan.config.eos_token_id).long() > 0] = -100
    last = int((labels[3] != -100).sum()) - 1
    labels[1, 0], labels[3, last] = (labels[1, 0] + 1) % 14, (labels[3, last] + 1) % 14
    task = Task("texts", [{**inputs, "labels": labels}], token_logits, metrics=("exact_match",))
    assert evaluate({"flan": flan}, [task], seed=0, num_resamples=2).score("flan", "exact_match").value == 0.5


def test_likelihoods_are_the_models_own_losses(
    flan: transformers.T5ForConditionalGeneration, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    """Answers of one and of two words: the loss is the mean over tokens, the likelihood their sum."""
    answers, inputs = targets(tokenizer, ("yes", "no neutral")), prompts()
    assert (answers != -100).sum(1).tolist() == [2, 3]
    with torch.no_grad():
        found = answer_likelihoods(answers)(flan, inputs)
        for place in range(4):
            one = {
                key: value[place : place + 1][:, : int(inputs["attention_mask"][place].sum())]
                for key, value in inputs.items()
            }
            for number, answer in enumerate(answers):
                kept = answer[answer != -100]
                loss = flan(**one, labels=kept[None]).loss
                torch.testing.assert_close(found[place, number], -len(kept) * loss)


class Writer(nn.Module):
    """A model that writes the same tokens whatever it reads."""

    def generate(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, **settings: object) -> torch.Tensor:
        assert settings == {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        return torch.tensor([[0, 12, 1], [0, 13, 1], [0, 3, 1], [0, 12, 13]])


def test_a_generated_text_is_read_as_a_number(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    assert generated_numbers(tokenizer)(Writer(), prompts()).tolist() == [3.0, 4.5, 0.0, 0.0]


def test_spearman_is_of_the_generated_numbers(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    labels = torch.tensor([2.0, 3.0, 0.5, 0.0])
    task = Task("stsb", [{**prompts(), "labels": labels}], generated_numbers(tokenizer), metrics=("spearman",))
    found = evaluate({"writer": Writer()}, [task], seed=0, num_resamples=2).score("writer", "spearman").value
    assert found == pytest.approx(4.5 / (4.5 * 5) ** 0.5)  # ranks 3, 4, 1.5, 1.5 and 3, 4, 2, 1


def test_examples_carry_their_own_labels(hub: Path) -> None:
    """Prompts are sorted by length; the label stays with its sentence."""
    rows = [{"sentence": "one " * (9 - number), "label": number % 2} for number in range(8)]
    sources = MadeUp(hub, {(DATA, "cola", "validation"): rows})
    words, choices = Glue(SETUP.of(("cola",)), sources, batch=3).tasks()
    assert (words.name, choices.name) == ("cola", "cola, likelihood")
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in choices.loader])
    assert torch.equal(lengths, lengths.sort().values)
    wanted = [number % 2 for number in range(7, -1, -1)]
    assert torch.cat([batch["labels"] for batch in choices.loader]).tolist() == wanted
    first = torch.cat([batch["labels"][:, 0] for batch in words.loader])
    assert first.tolist() == [4 - label for label in wanted]  # "acceptable" is token 3, "unacceptable" 4


def test_numbers_are_the_labels_of_stsb(hub: Path) -> None:
    rows = [
        {"sentence1": "one", "sentence2": "two", "label": 2.6},
        {"sentence1": "one", "sentence2": "no", "label": 5.0},
    ]
    (task,) = Glue(SETUP.of(("stsb",)), MadeUp(hub, {(DATA, "stsb", "validation"): rows})).tasks()
    assert isinstance(task.loader, list)
    assert sorted(task.loader[0]["labels"].tolist()) == [2.6, 5.0]
    assert task.metrics == ("spearman",)


def test_a_column_that_is_not_there_is_named(hub: Path) -> None:
    sources = MadeUp(hub, {(DATA, "cola", "validation"): [{"text": "one", "label": 0}]})
    with pytest.raises(SourceError, match="cola: no column 'sentence', but text, label"):
        Glue(SETUP.of(("cola",)), sources).tasks()


def test_answers_are_in_the_order_of_glues_labels() -> None:
    """GLUE's names of the labels, of which "yes" is the one that says that the prompt's question holds."""
    names = {
        "mrpc": ("not_equivalent", "equivalent"),
        "qnli": ("entailment", "not_entailment"),
        "qqp": ("not_duplicate", "duplicate"),
        "rte": ("entailment", "not_entailment"),
    }
    for task, labels in names.items():
        assert PROMPTS[task].answers == tuple("no" if label.startswith("not_") else "yes" for label in labels)
    same = {"cola": ("unacceptable", "acceptable"), "mnli": ("entailment", "neutral", "contradiction")}
    assert {task: PROMPTS[task].answers for task in (*same, "sst2")} == {**same, "sst2": ("negative", "positive")}


def test_every_task_has_a_prompt_with_its_columns() -> None:
    assert tuple(PROMPTS) == GLUE == SETUP.tasks
    counts = {task: len(prompt.answers) for task, prompt in PROMPTS.items()}
    assert counts == {**dict.fromkeys(GLUE, 2), "mnli": 3, "stsb": 0}


def test_adapters_are_opened_on_the_base(hub: Path) -> None:
    setup = SETUP.of(("cola", "mnli"))
    _, base, experts = Glue(setup, made_up(hub)).opened()
    changed = {name for name in base.tensors if not torch.equal(base.read(name), experts["cola"].read(name))}
    assert {name.split(".")[-2] for name in changed} == {"q", "v"}
    assert set(experts["mnli"].tensors) == set(base.tensors)
