"""Every merge of the decoder's experts, judged as a language model and as a classifier, kept merge by merge."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from benchmarks.decoder.merges import DATA_FREE, FACTORED, REGMEAN, Merger
from benchmarks.decoder.model import DecoderNetwork
from benchmarks.harness.evaluate import features
from benchmarks.harness.suite import Suite
from diagnostics.predictions.model_scores import ModelScores, evaluate
from inference.models.tasks import Task

BASE, OWN = "base", "own experts"
AS_IT_IS = 1.0
"""The λ of the definition."""
BATCH = 50
TOKENS = "{}, all tokens"
"""A task whose answer is to be found among all tokens."""
Answers = Mapping[str, Tensor]
"""Task name to the features (n, hidden) at the prompts' ends."""


@dataclass(frozen=True, eq=False)
class Entry:
    """Test predictions of one merge.

    Args:
        name: Of the merge.
        answers: Row of the table to features by task: as it is, at the λ of validation, and cut to a rank.
        facts: Rank, errors, seconds, λ and validation scores, as plain data.
    """

    name: str
    answers: Mapping[str, Answers]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write it as one file, whole or not at all."""
        with tempfile.TemporaryDirectory(dir=folder, prefix=".entry-") as temporary:
            tensors = {f"{row}/{task}": t for row, answers in self.answers.items() for task, t in answers.items()}
            metadata = {"name": self.name, "facts": json.dumps(dict(self.facts))}
            save_file(tensors, Path(temporary) / "entry", metadata=metadata)
            os.replace(Path(temporary) / "entry", entry_file(folder, self.name))

    @classmethod
    def read(cls, file: Path) -> Entry:
        """Read what `save` wrote."""
        answers: dict[str, dict[str, Tensor]] = {}
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            for key in opened.keys():  # noqa: SIM118
                row, task = key.rsplit("/", 1)
                answers.setdefault(row, {})[task] = opened.get_tensor(key)
        return cls(metadata["name"], answers, json.loads(metadata["facts"]))


def entry_file(folder: Path, name: str) -> Path:
    """Where a merge's entry is kept."""
    return folder / f"{name.replace(', ', '-').replace(' ', '_')}.safetensors"


class Judge:
    """One open backbone, which is given the tensors of one merge after another.

    Args:
        suite: Tasks and network.
    """

    def __init__(self, suite: Suite) -> None:
        self.suite, self.model = suite, suite.model(suite.base)
        self.parameters = dict(self.model.named_parameters())

    def answers(self, base: Mapping[str, Tensor], updates: Mapping[str, Tensor], scaling: float, split: str) -> Answers:
        """Features of a split under `W_0 + λ Z`.

        Args:
            base: Tensors that the merge changes.
            updates: The merged updates of these.
            scaling: λ.
            split: Name of the split.
        """
        with torch.no_grad():
            for name, update in updates.items():
                self.parameters[name].copy_(base[name] + scaling * update)
        return {task: self.on(task, split, self.model) for task in self.suite.tasks}

    def on(self, task: str, split: str, model: nn.Module) -> Tensor:
        """Features of one task under an open model."""
        return features(self.suite.network, model, self.suite.tasks[task].splits[split], BATCH)


@dataclass(frozen=True, eq=False)
class Bench:
    """What is merged, and how λ is chosen.

    Args:
        merger: The merges.
        scalings: Each λ that is tried on validation, where the lowest NLL of the choices decides.
        rank: What adapters are cut to.
    """

    merger: Merger
    scalings: Sequence[float]
    rank: int

    @property
    def suite(self) -> Suite:
        """The suite."""
        return self.merger.suite

    @property
    def entries(self) -> dict[str, Callable[[Judge], Entry]]:
        """Name to what makes its entry."""
        merges = [method.name for method in DATA_FREE] + [REGMEAN]
        made: dict[str, Callable[[Judge], Entry]] = {name: partial(self.merged, name) for name in merges}
        return {BASE: self.base, OWN: self.own, **made}

    def base(self, judge: Judge) -> Entry:
        """The base."""
        zero = {name: torch.zeros_like(tensor) for name, tensor in self.merger.base.items()}
        return Entry(BASE, {BASE: judge.answers(self.merger.base, zero, 0.0, "test")})

    def own(self, judge: Judge) -> Entry:
        """Every expert on its own task."""
        found = {task: judge.on(task, "test", self.suite.model(folder)) for task, folder in self.suite.experts.items()}
        return Entry(OWN, {OWN: found})

    def merged(self, name: str, judge: Judge) -> Entry:
        """A merge: in both forms if it has both, at λ = 1 and the chosen one, and cut."""
        whole = self.merger.whole(name)
        facts: dict[str, Any] = {"dense_seconds": whole.seconds}
        best, cut = whole, None
        if name in FACTORED:
            best, cut = self.merger.adapter(name), self.merger.adapter(name, self.rank)
            facts |= {"adapter_seconds": best.seconds, "rank": best.rank, "between_forms": best.distance(whole)}
            facts |= {"cut": self.rank, "cut_error": cut.error}
        judged = partial(judge.answers, self.merger.base)
        validation = {scaling: self.nll(judged(best.updates, scaling, "validation")) for scaling in self.scalings}
        chosen = min(validation, key=validation.__getitem__)
        rows = {f"{name}, λ = 1": judged(best.updates, AS_IT_IS, "test")}
        rows[tuned(name)] = judged(best.updates, chosen, "test") if chosen != AS_IT_IS else next(iter(rows.values()))
        if cut is not None:
            rows[truncated(name, self.rank)] = judged(cut.updates, chosen, "test")
        return Entry(name, _apart(rows), {**facts, "scaling": chosen, "validation_nll": validation})

    def nll(self, answers: Answers) -> float:
        """Mean over tasks of the choices' NLL on validation."""
        labels, heads = self.suite.labels("validation"), self.suite.heads
        return sum(float(F.cross_entropy(heads[t](a).double(), labels[t])) for t, a in answers.items()) / len(answers)


def tuned(name: str) -> str:
    """Row of a merge at the λ that validation chose."""
    return f"{name}, λ chosen"


def truncated(name: str, rank: int) -> str:
    """Row of a merge that is cut to a rank."""
    return f"{tuned(name)}, rank {rank}"


def _apart(rows: Mapping[str, Answers]) -> dict[str, Answers]:
    """Copies, because a file of tensors cannot hold one twice."""
    return {row: {task: tensor.clone() for task, tensor in answers.items()} for row, answers in rows.items()}


def run(bench: Bench, folder: Path, tell: Callable[[str], None]) -> Iterator[Entry]:
    """Make the entries that a folder lacks; an interrupted run goes on where it stopped.

    Args:
        bench: What is merged.
        folder: Where entries are kept.
        tell: Called with the name of each entry that is there.

    Yields:
        The entries.
    """
    folder.mkdir(parents=True, exist_ok=True)
    judge = None
    for name, make in bench.entries.items():
        if not entry_file(folder, name).exists():
            judge = judge or Judge(bench.suite)
            make(judge).save(folder)
        tell(name)
        yield Entry.read(entry_file(folder, name))


class Answered(nn.Module):
    """A model that was run already: its features by task.

    Args:
        answers: Features of the test examples.
    """

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self.answers = answers

    @override
    def forward(self, task: str, rows: Tensor) -> Tensor:
        """Features of some examples."""
        return self.answers[task][rows]


def scores(suite: Suite, entries: Sequence[Entry], *, reference: str, seed: int) -> ModelScores:
    """All rows on all tasks: accuracy, NLL and ECE of the choices; exact match and perplexity among all tokens.

    Args:
        suite: Tasks, heads and labels.
        entries: The merges.
        reference: Row that the others are compared with.
        seed: Of the resamples.
    """
    assert isinstance(suite.network, DecoderNetwork)
    vocabulary = suite.network.embedding.cpu().T
    tasks = []
    for name, task in suite.tasks.items():
        labels = task.splits["test"].labels
        targets, rows = torch.tensor(task.choices)[labels], torch.arange(len(labels)).split(BATCH)
        told = partial(_told, name)
        choices = [(part, labels[part]) for part in rows]
        tasks.append(Task(name, choices, told, suite.heads[name], ("accuracy", "nll", "ece")))
        words = [(part, targets[part]) for part in rows]
        tasks.append(Task(TOKENS.format(name), words, told, lambda x: x @ vocabulary, ("exact_match", "perplexity")))
    models = {row: Answered(answers) for entry in entries for row, answers in entry.answers.items()}
    return evaluate(models, tasks, seed=seed, reference=reference)


def _told(task: str, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    found: Tensor = model(task, batch[0])
    return found
