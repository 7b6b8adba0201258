"""Flan-T5 on GLUE as text to text: prompts, answers, and three ways to judge them.

Prompts and answers are those that the experts were trained on (FusionBench; the misspelling is part of them). The
score of a task with answers is `exact_match`: the share of examples whose every target token, the end included, has the
largest logit given the true ones before it. Those are the examples that greedy generation answers word for word, which
is how FusionBench scores them. Accuracy, NLL and ECE are of the likelihoods of the answers, normalised over them. For
STS-B a number is generated, and Spearman's correlation with the raters' taken; a text that is no number counts as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.papers.setups import Setup
from benchmarks.papers.sources import Data, SourceError, Sources, picked
from inference.models.tasks import Task
from poe_models.weights.checkpoint import Checkpoint
from poe_models.weights.loading import open_checkpoint

DATA = "nyu-mll/glue"
CHOICES = ", likelihood"
"""End of the name of a task that is judged by the likelihoods of its answers."""
NEW_TOKENS = 9
LENGTH = 512
"""Most tokens of a prompt, the length that Flan-T5 was trained with."""


@dataclass(frozen=True)
class Prompt:
    """Texts of a task.

    Args:
        text: The prompt, with the names of columns.
        answers: Of each label; none where the label is a number.
        split: Of the data that is scored.
    """

    text: str
    answers: tuple[str, ...] = ()
    split: str = "validation"


PROMPTS: Mapping[str, Prompt] = {
    "cola": Prompt(
        "Indicate if the following sentence is grammatically correct or not: \"{sentence}\". Answere 'acceptable' or "
        "'unacceptable'.",
        ("unacceptable", "acceptable"),
    ),
    "mnli": Prompt(
        "Does the premise: '{premise}' logically imply, contradict, or is neutral to the hypothesis: '{hypothesis}'? "
        "Answere with 'entailment', 'contradiction', or 'neutral'.",
        ("entailment", "neutral", "contradiction"),
        "validation_matched",
    ),
    "mrpc": Prompt(
        "Are the following sentences '{sentence1}' and '{sentence2}' conveying the same meaning? Answere with 'yes' or "
        "'no'.",
        ("no", "yes"),
    ),
    "qnli": Prompt(
        "Given the context: '{sentence}', does the question '{question}' have an answer based on the information "
        "provided? Answer with 'yes' or 'no'.",
        ("yes", "no"),
    ),
    "qqp": Prompt(
        "Do the questions '{question1}' and '{question2}' have the same intent? Answere with 'yes' or 'no'.",
        ("no", "yes"),
    ),
    "rte": Prompt(
        "Does the text: '{sentence1}' entail that '{sentence2}' is true? Provide 'yes' or 'no'.", ("yes", "no")
    ),
    "sst2": Prompt(
        "Given the sentence '{sentence}', determine the sentiment. Is it positive or negative?",
        ("negative", "positive"),
    ),
    "stsb": Prompt(
        "Consider the sentences '{sentence1}' and '{sentence2}'. On a scale from 1 (completely different) to 5 "
        "(completely similar), rate the similarity."
    ),
}


@dataclass(frozen=True, eq=False)
class Glue:
    """A set-up of Flan-T5, opened.

    Args:
        setup: Its models and tasks.
        sources: Where these come from.
        limit: Most examples of each task.
        seed: Of the choice of these.
        device: Where the network is.
        batch: Prompts in a batch.
    """

    setup: Setup
    sources: Sources
    limit: int | None = None
    seed: int = 0
    device: str = "cpu"
    batch: int = 32
    submodule = ""

    def opened(self) -> tuple[nn.Module, Checkpoint, dict[str, Checkpoint]]:
        """Network, base and experts."""
        from transformers import AutoModelForSeq2SeqLM

        folder = self.sources.folder(self.setup.base)
        network = AutoModelForSeq2SeqLM.from_pretrained(folder, use_safetensors=True).to(self.device).eval()
        base = open_checkpoint(folder)
        experts = {
            task: open_checkpoint(self.sources.folder(model), base=base) for task, model in self.setup.experts.items()
        }
        return network, base, experts

    def tasks(self) -> list[Task]:
        """Examples of every task, twice where it has answers: as they are generated, and by their likelihoods."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.sources.folder(self.setup.base))
        return [task for name in self.setup.tasks for task in self._of(name, tokenizer)]

    def _of(self, name: str, tokenizer: Any) -> list[Task]:
        prompt = PROMPTS[name]
        texts, labels = self._examples(name, prompt)
        starts = range(0, len(texts), self.batch)
        inputs = [_tokens(tokenizer, texts[first : first + self.batch]) for first in starts]

        def labelled(values: Tensor) -> list[dict[str, Tensor]]:
            return [{**i, "labels": part} for i, part in zip(inputs, values.split(self.batch), strict=True)]

        if not prompt.answers:
            numbers = labelled(torch.tensor(labels, dtype=torch.float64))
            return [Task(name, numbers, generated_numbers(tokenizer), metrics=("spearman",))]
        answers, places = targets(tokenizer, prompt.answers), torch.tensor(labels)
        return [
            Task(name, labelled(answers[places]), token_logits, metrics=("exact_match",)),
            Task(name + CHOICES, labelled(places), answer_likelihoods(answers), metrics=("accuracy", "nll", "ece")),
        ]

    def _examples(self, name: str, prompt: Prompt) -> tuple[list[str], list[Any]]:
        """Prompts and labels, short prompts first, which saves padding."""
        rows = self.sources.rows(Data(DATA, prompt.split, name))
        found = [rows[number] for number in picked(len(rows), self.limit, self.seed)]
        try:
            pairs = [(prompt.text.format(**row), row["label"]) for row in found]
        except KeyError as error:
            raise SourceError(
                f"data {DATA}, {name}: no column {error}, but {', '.join(found[0])}. Give GLUE as the hub has it."
            ) from error
        pairs.sort(key=lambda pair: len(pair[0]))
        return [text for text, _ in pairs], [label for _, label in pairs]


def _tokens(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    found = tokenizer(list(texts), padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    return {key: found[key] for key in ("input_ids", "attention_mask")}


def targets(tokenizer: Any, answers: Sequence[str]) -> Tensor:
    """Tokens of the answers with their ends, (answers, tokens); -100 behind the end."""
    found = _tokens(tokenizer, answers)
    return found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)


def token_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits of every target token given the true ones before it, (b, tokens, vocabulary)."""
    logits: Tensor = model(**batch).logits
    return logits


def answer_likelihoods(answers: Tensor) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor]:
    """A function that gives the log probability of each answer, (b, answers), in nats.

    Args:
        answers: Their tokens, (answers, tokens), -100 behind the end.
    """

    def forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        mask, columns = batch["attention_mask"], []
        encoded = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask)  # type: ignore[operator]
        for answer in answers.to(mask.device):
            kept = answer[answer >= 0]
            wanted = kept.repeat(len(mask), 1)
            logits = model(encoder_outputs=encoded, attention_mask=mask, labels=wanted).logits
            columns.append(logits.log_softmax(-1).gather(-1, wanted.unsqueeze(-1)).sum((1, 2)))
        return torch.stack(columns, 1)

    return forward


def generated_numbers(tokenizer: Any) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor]:
    """A function that generates a text greedily and reads it as a number, (b,)."""

    def forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        found = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)  # type: ignore[operator]
        texts = tokenizer.batch_decode(found, skip_special_tokens=True)
        return torch.tensor([number_in(text) for text in texts], dtype=torch.float64)

    return forward


def number_in(text: str) -> float:
    """A text as a number; 0 if it is none.

    >>> number_in("3.8"), number_in("very"), number_in("nan")
    (3.8, 0.0, 0.0)
    """
    try:
        found = float(text)
    except ValueError:
        return 0.0
    return found if math.isfinite(found) else 0.0
