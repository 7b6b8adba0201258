"""Make the language suite once: frozen few-shot heads, a base, and one fine-tuned expert a task, as checkpoint folders.

The head of a task is a logistic regression on the base's features of a few texts per class; it stays frozen while the
encoder is tuned. `python -m benchmarks.language.train` makes what is missing in the cache and prints the accuracies.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from benchmarks.folders import key_of, move_into_place
from benchmarks.harness.parallel import run_all
from benchmarks.language.model import base_folder, features, open_encoder, open_tokenizer, pooled
from benchmarks.language.sources import MINILM, SENTIMENT, cache_folder
from benchmarks.language.tasks import Split, SplitSizes, load_tasks

VERSION = 1  # raise it when this file makes other experts from the same recipe


@dataclass(frozen=True)
class Recipe:
    """How experts are made.

    Args:
        epochs: Passes over the training texts.
        learning_rate: Of Adam, without weight decay; dropout is off.
        batch_size: Texts a step.
        head_c: Inverse penalty of the head's logistic regression, scikit-learn's `C`.
        seed: Of the order of training texts.
        sizes: How the tasks are split.
    """

    epochs: int = 1
    learning_rate: float = 5e-5
    batch_size: int = 32
    head_c: float = 10.0
    seed: int = 0
    sizes: SplitSizes = field(default_factory=SplitSizes)


@dataclass(frozen=True)
class Suite:
    """What there is to merge.

    Args:
        base: Checkpoint folder of the base.
        experts: Task name -> checkpoint folder of its expert.
        records: Task name -> accuracies and seconds of the training, as plain data.
    """

    base: Path
    experts: Mapping[str, Path]
    records: Mapping[str, dict[str, Any]]


def fit_head(encoder: Any, tokenizer: Any, examples: Split, c: float) -> tuple[Tensor, Tensor]:
    """Logistic regression on the base's features.

    Args:
        encoder: The base.
        tokenizer: Its tokenizer.
        examples: The few-shot split.
        c: Inverse penalty.

    Returns:
        Weight (384,) and bias () of the logit of a positive text.
    """
    inputs = features(encoder, tokenizer, examples.texts)
    fitted = LogisticRegression(C=c, max_iter=5000).fit(inputs.numpy(), examples.labels.numpy())
    return torch.from_numpy(fitted.coef_[0]).float(), torch.from_numpy(fitted.intercept_).float()[0]


def fine_tune(
    encoder: Any,
    tokenizer: Any,
    head: tuple[Tensor, Tensor],
    examples: Split,
    recipe: Recipe,
    progress: Progress,
    stop: threading.Event,
) -> None:
    """Tune the whole encoder under a frozen head, in place.

    Args:
        encoder: The base, which becomes the expert.
        tokenizer: Its tokenizer.
        head: Weight and bias.
        examples: The training split.
        recipe: Epochs, step size and so on.
        progress: Where to show the steps.
        stop: Ends the training early once it is set.

    Raises:
        KeyboardInterrupt: If `stop` was set.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=recipe.learning_rate)
    orders = [torch.randperm(len(examples), generator=generator) for _ in range(recipe.epochs)]
    for batch in progress.track([batch for order in orders for batch in order.split(recipe.batch_size)]):
        if stop.is_set():
            raise KeyboardInterrupt
        inputs = pooled(encoder, tokenizer, [examples.texts[index] for index in batch.tolist()])
        loss = F.binary_cross_entropy_with_logits(inputs @ head[0] + head[1], examples.labels[batch].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def make_suite(recipe: Recipe | None = None, cache: Path | None = None, console: Console | None = None) -> Suite:
    """Load the suite, making what the cache lacks; each expert is complete or absent, so interrupting is safe.

    Args:
        recipe: How experts are made; default `Recipe()`.
        cache: Cache folder; default `cache_folder()`.
        console: Where progress is shown.

    Returns:
        The suite.

    Raises:
        MissingSourceError: If weights or texts are not there and cannot be downloaded.
    """
    recipe, cache, console = recipe or Recipe(), cache or cache_folder(), console or Console()
    root = cache / "suite"
    root.mkdir(parents=True, exist_ok=True)
    base, tasks = base_folder(root, cache), load_tasks(recipe.sizes, cache)
    digests = (MINILM.sha256, SENTIMENT.sha256)
    folders = {name: root / f"{name}-{key_of(VERSION, name, digests, asdict(recipe))}" for name in tasks}
    stop = threading.Event()
    with Progress(console=console) as progress:

        def make(name: str) -> None:
            _make_expert(folders[name], base, name, tasks[name], recipe, progress, stop)

        run_all(make, [name for name, folder in folders.items() if not folder.exists()], stop)
    records = {name: json.loads((folder / "training.json").read_text()) for name, folder in folders.items()}
    return Suite(base, {name: folder / "expert" for name, folder in folders.items()}, records)


def _make_expert(
    folder: Path,
    base: Path,
    name: str,
    splits: Mapping[str, Split],
    recipe: Recipe,
    progress: Progress,
    stop: threading.Event,
) -> None:
    started = time.perf_counter()
    encoder, tokenizer = open_encoder(base), open_tokenizer(base)
    head = fit_head(encoder, tokenizer, splits["head"], recipe.head_c)
    record: dict[str, Any] = {"task": name, "recipe": asdict(recipe)}
    record["base_accuracy"] = _accuracy(encoder, tokenizer, head, splits["test"])
    fine_tune(encoder, tokenizer, head, splits["train"], recipe, progress, stop)
    record["expert_accuracy"] = _accuracy(encoder, tokenizer, head, splits["test"])
    record["seconds"] = time.perf_counter() - started
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".expert-") as temporary:
        made = Path(temporary) / "made"
        encoder.save_pretrained(made / "expert")
        (made / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        move_into_place(made, folder)


def _accuracy(encoder: Any, tokenizer: Any, head: tuple[Tensor, Tensor], examples: Split) -> float:
    logits = features(encoder, tokenizer, examples.texts) @ head[0] + head[1]
    return float(((logits > 0).long() == examples.labels).double().mean())


def accuracy_table(suite: Suite) -> Table:
    """Test accuracy of base and experts, each on its own task."""
    table = Table("task", "base", "expert", "seconds", title="test accuracy")
    for name, record in suite.records.items():
        scores = (record["base_accuracy"], record["expert_accuracy"])
        table.add_row(name, *(f"{value:.3f}" for value in scores), f"{record['seconds']:.0f}")
    return table


def main() -> None:
    """Make the suite and print the accuracies."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0, help="order of the training texts")
    parser.add_argument("--cache", type=Path, default=None, help="cache folder (default: the user's)")
    arguments = parser.parse_args()
    console = Console()
    console.print(accuracy_table(make_suite(Recipe(seed=arguments.seed), arguments.cache, console)))


if __name__ == "__main__":
    main()
