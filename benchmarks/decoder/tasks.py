"""Three tasks as prompts with choices: texts of the language suite, cut to fit, between a beginning and a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.archives import fetch
from benchmarks.decoder.prompts import Split
from benchmarks.decoder.sources import SMOLLM2
from benchmarks.folders import key_of
from benchmarks.harness.splits import load_all, split_rows
from benchmarks.harness.task_files import Task as TextTask
from benchmarks.language import sources
from benchmarks.language.tasks import SplitSizes
from benchmarks.language.texts import READERS

MOST_TOKENS = 24
"""Tokens of a text that the network reads at most."""
VERSION = 2  # raise it when the meaning of a prompt changes


@dataclass(frozen=True)
class Prompt:
    """How a text is asked about.

    Args:
        before: What comes before it.
        after: What comes behind it; the answer follows.
        choices: The answers of the classes, one token each; by default their names.
    """

    before: str
    after: str
    choices: tuple[str, ...] | None = None

    def answers(self, classes: Sequence[str]) -> tuple[str, ...]:
        """The answers, with the space before them.

        Args:
            classes: Names of the classes.
        """
        return tuple(f" {word}" for word in self.choices or classes)


PROMPTS = {
    "movies": Prompt("Review:", "\nThe sentiment is"),
    "spam": Prompt("Email:", "\nIs this spam? Answer:", ("no", "yes")),
    "supersense": Prompt("Definition:", "\nThis is a kind of"),
}


@dataclass(frozen=True)
class Task(TextTask[Split]):
    """A task with its choices; further arguments are those of `benchmarks.harness.task_files.Task`.

    Args:
        splits: One `Split` for each of `SPLITS`.
        choices: Tokens of the answers, one a class.
    """

    splits: Mapping[str, Split]
    choices: tuple[int, ...] = ()


def prompts(tokenizer: Tokenizer, prompt: Prompt, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens of prompts.

    Args:
        tokenizer: It adds no tokens of its own.
        prompt: How the texts are asked about.
        texts: Of n texts.

    Returns:
        (n, longest) int32, zero behind a prompt's end; and lengths (n,) int64.
    """
    before, after = (tokenizer.encode(part).ids for part in (prompt.before, prompt.after))
    encoded = tokenizer.encode_batch([f" {text}" for text in texts])
    rows = [torch.tensor([*before, *each.ids[:MOST_TOKENS], *after], dtype=torch.int32) for each in encoded]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def choice_tokens(tokenizer: Tokenizer, answers: Sequence[str]) -> tuple[int, ...]:
    """Tokens of answers.

    Raises:
        ValueError: If one is of several tokens.
    """
    found = [tokenizer.encode(choice).ids for choice in answers]
    long = next((choice for choice, ids in zip(answers, found, strict=True) if len(ids) != 1), None)
    if long is not None:
        raise ValueError(f"`choice_tokens`: {long!r} is of several tokens. Choose answers of one.")
    return tuple(ids[0] for ids in found)


def load_task(name: str, sizes: SplitSizes, base: Path, cache: Path) -> Task:
    """One task, from its archive.

    Args:
        name: One of `PROMPTS`.
        sizes: How its texts are split.
        base: Folder of the base, which has the tokenizer.
        cache: Cache folder of the language suite, whose archives these are.

    Raises:
        MissingSourceError: If the archive is not there and cannot be downloaded.
    """
    (source, reader), prompt = READERS[name], PROMPTS[name]
    found, tokenizer = reader(fetch(source, cache)), Tokenizer.from_file(str(base / "tokenizer.json"))
    tokens, lengths = prompts(tokenizer, prompt, found.texts)
    whole = Split(tokens, lengths, found.labels, torch.arange(len(found.labels)), found.groups)
    kept = whole.without_duplicates()
    splits = {split: kept.take(rows) for split, rows in split_rows(kept.labels, kept.groups, sizes).items()}
    answers = prompt.answers(found.classes)
    key = key_of(VERSION, name, MOST_TOKENS, asdict(prompt), SMOLLM2.sha256, source.sha256, asdict(sizes))
    return Task(name, found.classes, splits, len(whole) - len(kept), key, choice_tokens(tokenizer, answers))


def load_tasks(sizes: SplitSizes, base: Path, cache: Path | None = None) -> tuple[dict[str, Task], dict[str, str]]:
    """Every task whose archives are there or can be downloaded, and for each skipped one the line that says why."""
    folder = cache or sources.cache_folder()
    return load_all(PROMPTS, lambda name: load_task(name, sizes, base, folder))
