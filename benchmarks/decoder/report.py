"""The page of the decoder: every merge as a language model and as a classifier, both forms of adapters, an ensemble."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from benchmarks.decoder.bench import BASE, OWN, TOKENS, Entry, tuned
from benchmarks.decoder.merges import ETA, PRODUCTS
from benchmarks.harness.parallel import machine
from benchmarks.harness.rule_report import interval, markdown_table, signed
from benchmarks.harness.suite import Suite
from diagnostics.predictions.model_scores import ModelScores

CHOICES = ("accuracy", "nll", "ece")
AMONG_ALL = ("exact_match", "perplexity")
HEADER = ("merge", "accuracy", "NLL", "ECE", "exact match", "perplexity")


def page(suite: Suite, entries: Sequence[Entry], scores: ModelScores, ensemble: str, command: str) -> str:
    """The page as Markdown.

    Args:
        suite: What was merged.
        entries: The merges.
        scores: All rows on all tasks.
        ensemble: The section about an ensemble.
        command: What made them.
    """
    parts = [
        f"LoRA experts of a language model, merged as adapters and as whole matrices. Made by `{command}` on "
        f"{machine(suite.device)}.",
        about(suite),
        explanation(suite, entries),
        "## As they are, and at the λ of validation",
        markdown_table(HEADER, [row(scores, name) for name in scores.models]),
        "## Task by task",
        "Choice accuracy, and the perplexity of the answer.",
        by_task(suite, entries, scores),
        "## Differences",
        "Means over tasks of the choices' scores at the λ of validation, paired over test prompts. Each interval is "
        "for one pair that was named before it was looked at.",
        markdown_table(("pair", "accuracy", "NLL", "ECE"), differences(scores)),
        "## Two forms of one merge",
        forms_note(entries),
        markdown_table(FORMS, forms(entries)),
        "## An ensemble",
        ensemble,
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def about(suite: Suite) -> str:
    """Base, experts and tasks in words."""
    recipe = next(iter(suite.records.values()))["recipe"]
    blocks = "all blocks" if recipe["blocks"] is None else f"the last {recipe['blocks']} blocks"
    tasks = "; ".join(
        f"{name} ({len(task.classes)} choices; {len(task.splits['train'])} prompts to train, "
        f"{len(task.splits['validation'])} to choose, {len(task.splits['test'])} to test)"
        for name, task in suite.tasks.items()
    )
    return (
        f"Base: {suite.network.name}-Instruct, whose published weights of 4 bits are dequantised to float32. Experts: "
        f"LoRA by peft, rank {recipe['rank']}, alpha {2 * recipe['rank']}, on the attention projections of {blocks}, "
        f"{recipe['epochs']} epoch(s) of batches of {recipe['batch_size']}, Adam with learning rate "
        f"{recipe['learning_rate']:g}, by the cross entropy of the answer among all tokens; training seed "
        f"{', '.join(map(str, suite.seeds))}. Tasks: {tasks}."
    )


def explanation(suite: Suite, entries: Sequence[Entry]) -> str:
    """What the columns are."""
    tried = next(entry.facts["validation_nll"] for entry in entries if entry.name not in (BASE, OWN))
    chance = ", ".join(f"{name} 1 of {len(task.classes)}" for name, task in suite.tasks.items())
    return (
        "The answer of a prompt is one token. *Accuracy*, *NLL* (nats) and *ECE* (20 bins) are of the probabilities of "
        f"a task's choices ({chance}); *exact match* and *perplexity* of the answer are among all tokens of the "
        "vocabulary. Means over tasks with 95 % bootstrap intervals over test prompts, which do not cover another "
        f"training of the experts. λ is among {', '.join(tried)} and has the lowest NLL of the choices on validation; "
        f"the anchor of the products is at the base with η = {ETA:g}."
    )


def row(scores: ModelScores, name: str) -> list[str]:
    """Scores of one row of the table, means over tasks."""
    return [name, *(interval(scores.score(name, metric)) for metric in (*CHOICES, *AMONG_ALL))]


def by_task(suite: Suite, entries: Sequence[Entry], scores: ModelScores) -> str:
    """Accuracy and perplexity of base, experts and merges at their chosen λ."""
    header = ["merge", *(f"{name}, {what}" for name in suite.tasks for what in ("accuracy", "perplexity"))]
    body = []
    for entry in entries:
        name = tuned(entry.name) if tuned(entry.name) in scores.models else entry.name
        label = f"{entry.name}, λ = {entry.facts['scaling']:g}" if "scaling" in entry.facts else entry.name
        cells = [
            f"{scores.score(name, metric, TOKENS.format(task) if metric == 'perplexity' else task).value:.3f}"
            for task in suite.tasks
            for metric in ("accuracy", "perplexity")
        ]
        body.append([label, *cells])
    return markdown_table(header, body)


def pairs() -> list[tuple[str, str]]:
    """What is held against what: Cauchy against Gaussian, sides, products against task arithmetic, and RegMean."""
    families = dict.fromkeys(product.family for product in PRODUCTS)
    tails = [(f"{family}, Cauchy", f"{family}, Gaussian") for family in families]
    against = [(f"{family}, Cauchy", "task arithmetic") for family in families]
    return [
        *tails,
        ("InputGram, Cauchy", "OutputGram, Cauchy"),
        *against,
        ("InputGram, Cauchy", "TIES"),
        ("InputGram, Cauchy", "TSV-M"),
        ("RegMean", "InputGram, Cauchy"),
    ]


def differences(scores: ModelScores) -> list[list[str]]:
    """Rows of the table of differences."""
    return [
        [f"{one} minus {two}"]
        + [signed(scores.difference(tuned(one), metric, reference=tuned(two))) for metric in CHOICES]
        for one, two in pairs()
    ]


FORMS = ("merge", "rank", "adapter against dense", "cut to rank", "error of cutting", "adapter, s", "dense, s")


def forms_note(entries: Sequence[Entry]) -> str:
    """How far both forms are apart."""
    farthest = max(entry.facts["between_forms"] for entry in entries if "between_forms" in entry.facts)
    return (
        "A merge in the space of the factors is an adapter of rank N r at most, which peft loads. *Adapter against "
        "dense* is the relative Frobenius distance of all its updates from the merge of whole matrices, "
        f"{farthest:.1e} at most: what the adapter's float32 leaves. *Error of cutting* is the same between the "
        "adapter and its best approximation of the experts' rank, which the rows above judge, too. Seconds are of the "
        "merge in float64, of an adapter with reading its inputs and writing its files."
    )


def forms(entries: Sequence[Entry]) -> list[list[str]]:
    """Rows of the table of forms; rules without factors have one only."""
    body = []
    for entry in entries:
        facts = entry.facts
        if "rank" in facts:
            cells = [
                str(facts["rank"]),
                f"{facts['between_forms']:.1e}",
                str(facts["cut"]),
                f"{facts['cut_error']:.3f}",
            ]
            body.append([entry.name, *cells, f"{facts['adapter_seconds']:.1f}", f"{facts['dense_seconds']:.1f}"])
        elif "dense_seconds" in facts:
            body.append([entry.name, "no adapter", "", "", "", "", f"{facts['dense_seconds']:.1f}"])
    return body


def write_csv(path: Path, scores: ModelScores) -> None:
    """All scores, task by task.

    Args:
        path: The file.
        scores: All rows on all tasks.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("merge", "task", "metric", "value", "low", "high"))
        for (task, metric), _ in scores.values.items():
            for name in scores.models:
                found = scores.score(name, metric, task)
                writer.writerow((name, task, metric, *(f"{v:.6g}" for v in (found.value, found.low, found.high))))
