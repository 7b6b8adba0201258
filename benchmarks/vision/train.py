"""Make the suite once: frozen few-shot heads, a base, and one fine-tuned expert a task, as checkpoint folders.

The head of a task is a logistic regression on the base's features of five examples per class; it stays frozen while the
backbone is tuned, as the zero-shot head is for CLIP. `python -m benchmarks.vision.train` makes what is missing in the
cache and prints the accuracies.
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
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from benchmarks.folders import key_of, move_into_place
from benchmarks.vision.evaluate import Head, backbone, features, score
from benchmarks.vision.model import CONFIG, base_state, preprocess
from benchmarks.vision.parallel import run_all
from benchmarks.vision.sources import SQUEEZENET, cache_folder
from benchmarks.vision.tasks import SplitSizes, Task, load_tasks

VERSION = 1  # raise it when this file makes other experts from the same recipe


@dataclass(frozen=True)
class Recipe:
    """How experts are made.

    Args:
        epochs: Passes over the training images.
        learning_rate: Of Adam, without weight decay.
        batch_size: Images a step.
        head_c: Inverse penalty of the head's logistic regression, scikit-learn's `C`.
        seed: Seed of the order of training images.
        sizes: How the tasks are split.
    """

    epochs: int = 4
    learning_rate: float = 1e-4
    batch_size: int = 32
    head_c: float = 1.0
    seed: int = 0
    sizes: SplitSizes = field(default_factory=SplitSizes)


@dataclass(frozen=True)
class Suite:
    """What there is to merge and to judge it by.

    Args:
        base: Checkpoint folder of the base.
        experts: Task name -> checkpoint folder of its expert.
        tasks: Task name -> its examples.
        heads: Task name -> its frozen head.
        records: Task name -> accuracies and seconds of the training, as plain data.
        skipped: Task name -> why it is not there.
    """

    base: Path
    experts: Mapping[str, Path]
    tasks: Mapping[str, Task]
    heads: Mapping[str, Head]
    records: Mapping[str, dict[str, Any]]
    skipped: Mapping[str, str]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Different seeds of the experts' trainings, as far as they are recorded."""
        return tuple(sorted({record["recipe"]["seed"] for record in self.records.values()}))


def fit_head(state: Mapping[str, Tensor], task: Task, c: float) -> Head:
    """Logistic regression on the base's features of the few-shot split.

    Args:
        state: The base backbone.
        task: The task.
        c: Inverse penalty.

    Returns:
        The head, float32.
    """
    examples = task.splits["head"]
    inputs = features(backbone(state), examples.images)
    fitted = LogisticRegression(C=c, max_iter=5000).fit(inputs.numpy(), examples.labels.numpy())
    weight, bias = (torch.from_numpy(array).float().contiguous() for array in (fitted.coef_, fitted.intercept_))
    return Head(weight, bias)


def fine_tune(
    state: Mapping[str, Tensor], head: Head, task: Task, recipe: Recipe, progress: Progress, stop: threading.Event
) -> dict[str, Tensor]:
    """Tune the whole backbone under a frozen head.

    Args:
        state: The base backbone; it is copied.
        head: The frozen head.
        task: The task.
        recipe: Epochs, step size and so on.
        progress: Where to show the steps.
        stop: Ends the training early once it is set.

    Returns:
        State dict of the expert.

    Raises:
        KeyboardInterrupt: If `stop` was set.
    """
    examples = task.splits["train"]
    generator = torch.Generator().manual_seed(recipe.seed)
    model = backbone(state).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    orders = [torch.randperm(len(examples), generator=generator) for _ in range(recipe.epochs)]
    batches = [batch for order in orders for batch in order.split(recipe.batch_size)]
    for batch in progress.track(batches, description=f"fine-tuning on {task.name}"):
        if stop.is_set():
            raise KeyboardInterrupt
        inputs = preprocess(examples.images[batch]).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(head(model(inputs)), examples.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach().contiguous() for name, value in model.state_dict().items()}


def save_folder(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, object] = CONFIG) -> None:
    """Write `config.json` and `model.safetensors`, as model hubs lay them out.

    Args:
        folder: Made if it is not there.
        state: The backbone.
        config: What goes into `config.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})


def _make_base(root: Path, cache: Path) -> Path:
    folder = root / f"base-{key_of(VERSION, SQUEEZENET.sha256)}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=root, prefix=".base-") as temporary:
            save_folder(Path(temporary) / "base", base_state(cache))
            move_into_place(Path(temporary) / "base", folder)
    return folder


def _make_expert(
    folder: Path, base: Path, task: Task, recipe: Recipe, progress: Progress, stop: threading.Event
) -> None:
    started = time.perf_counter()
    state = load_file(base / "model.safetensors")
    head = fit_head(state, task, recipe.head_c)
    expert = fine_tune(state, head, task, recipe, progress, stop)
    record: dict[str, Any] = {"task": task.name, "recipe": asdict(recipe)}
    for model_name, weights in (("base", state), ("expert", expert)):
        model = backbone(weights)
        for split in ("validation", "test"):
            examples = task.splits[split]
            record[f"{model_name}_{split}"] = asdict(score(head(features(model, examples.images)), examples.labels))
    record["seconds"] = time.perf_counter() - started
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".expert-") as temporary:
        made = Path(temporary) / "made"
        save_folder(made / "expert", expert)
        save_file({"weight": head.weight, "bias": head.bias}, made / "heads.safetensors")
        (made / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        move_into_place(made, folder)


def make_suite(recipe: Recipe | None = None, cache: Path | None = None, console: Console | None = None) -> Suite:
    """Load the suite, making what the cache lacks; each expert is complete or absent, so interrupting is safe.

    Args:
        recipe: How experts are made; default `Recipe()`.
        cache: Cache folder; default `sources.cache_folder()`.
        console: Where progress and skipped tasks are shown.

    Returns:
        The suite, without the tasks whose archives could not be had.

    Raises:
        RuntimeError: If no task is left.
    """
    recipe, cache, console = recipe or Recipe(), cache or cache_folder(), console or Console()
    root = cache / "suite"
    root.mkdir(parents=True, exist_ok=True)
    with console.status("fetching and splitting the tasks (once)"):
        tasks, skipped = load_tasks(recipe.sizes, cache)
        base = _make_base(root, cache)
    for line in skipped.values():
        console.print(line, style="yellow", highlight=False)
    if not tasks:
        raise RuntimeError("`make_suite`: no task could be loaded, for the reasons above. Check the network.")
    folders = {
        name: root / f"{name}-{key_of(VERSION, base.name, task.key, asdict(recipe))}" for name, task in tasks.items()
    }
    stop = threading.Event()
    with Progress(console=console) as progress:

        def make(name: str) -> None:
            _make_expert(folders[name], base, tasks[name], recipe, progress, stop)

        run_all(make, [name for name, folder in folders.items() if not folder.exists()], stop)
    return Suite(
        base,
        {name: folder / "expert" for name, folder in folders.items()},
        tasks,
        {name: Head(**load_file(folder / "heads.safetensors")) for name, folder in folders.items()},
        {name: json.loads((folder / "training.json").read_text()) for name, folder in folders.items()},
        skipped,
    )


def accuracy_table(suite: Suite) -> Table:
    """Test accuracy of base and experts, each on its own task."""
    table = Table("task", "classes", "train", "test", "base", "expert", "seconds", title="test accuracy")
    for name, task in suite.tasks.items():
        record, sizes = suite.records[name], [str(len(task.splits[split])) for split in ("train", "test")]
        cells = (f"{record['base_test']['accuracy']:.3f}", f"{record['expert_test']['accuracy']:.3f}")
        table.add_row(name, str(len(task.classes)), *sizes, *cells, f"{record['seconds']:.0f}")
    return table


def main() -> None:
    """Make the suite and print the accuracies."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0, help="order of the training images")
    parser.add_argument("--cache", type=Path, default=None, help="cache folder (default: the user's)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    console = Console()
    suite = make_suite(Recipe(seed=arguments.seed), arguments.cache, console)
    console.print(accuracy_table(suite))
    console.print(f"base: {suite.base}", *(f"{name}: {path}" for name, path in suite.experts.items()), sep="\n")


if __name__ == "__main__":
    main()
