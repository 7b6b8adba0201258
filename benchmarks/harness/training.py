"""Make a suite once: frozen few-shot heads and one fine-tuned expert a task, as checkpoint folders.

The head of a task is a logistic regression on the base's features of a few examples per class; it stays frozen while
the backbone is tuned, as the zero-shot head is for CLIP.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.folders import key_of, move_into_place
from benchmarks.harness.evaluate import features, own_logits, score
from benchmarks.harness.parallel import run_all
from benchmarks.harness.suite import Head, Network, Suite, Task

VERSION = 1  # raise it when this file makes other experts from the same recipe


@dataclass(frozen=True)
class Recipe:
    """How experts are made.

    Args:
        epochs: Passes over the training examples.
        learning_rate: Of Adam, without weight decay.
        batch_size: Examples a step.
        head_c: Inverse penalty of the head's logistic regression, scikit-learn's `C`.
        seed: Of the order of training examples.
    """

    epochs: int = 1
    learning_rate: float = 1e-4
    batch_size: int = 32
    head_c: float = 1.0
    seed: int = 0

    def head(self, network: Network, state: Mapping[str, Tensor], task: Task) -> Head:
        """The frozen head of a task, by the weights of the base: logistic regression."""
        return fit_head(network, state, task, self.head_c)

    def adapted(self, model: nn.Module) -> nn.Module:
        """What is tuned of an open backbone, as a module to call in its place: all of it."""
        return model

    def loss(self, model: nn.Module, head: Head, task: Any, features: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of a batch: the cross entropy of the frozen head's logits.

        Args:
            model: What `adapted` gave.
            head: The task's.
            task: The task.
            features: (b, features).
            labels: (b,) int64.

        Returns:
            Scalar, nats.
        """
        return F.cross_entropy(head(features), labels)

    def save(self, model: nn.Module, folder: Path, config: Mapping[str, object]) -> dict[str, Tensor]:
        """Save what `adapted` gave once it is tuned, as the folder `expert` in `folder`.

        Returns:
            State dict of the expert, on the CPU.
        """
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        save_folder(folder / "expert", state, config)
        return state


def fit_head(network: Network, state: Mapping[str, Tensor], task: Task, c: float) -> Head:
    """Logistic regression on the base's features of the few-shot split.

    Args:
        network: The backbone.
        state: Weights of the base.
        task: The task.
        c: Inverse penalty.

    Returns:
        The head, float32; of two classes the first has logit zero.
    """
    examples = task.splits["head"]
    inputs = features(network, network.open(state), examples)
    fitted = LogisticRegression(C=c, max_iter=5000).fit(inputs.numpy(), examples.labels.numpy())
    weight, bias = (torch.from_numpy(array).float().contiguous() for array in (fitted.coef_, fitted.intercept_))
    if len(task.classes) == 2:
        weight, bias = (torch.cat([torch.zeros_like(part), part]) for part in (weight, bias))
    return Head(weight, bias)


def fine_tune(
    suite: Suite, state: Mapping[str, Tensor], task: Task, recipe: Recipe, progress: Progress, stop: threading.Event
) -> nn.Module:
    """Tune what the recipe adapts of the backbone under a frozen head.

    Args:
        suite: The network, the task's head and the device.
        state: Weights of the base; they are copied.
        task: The task.
        recipe: Epochs, step size and so on.
        progress: Where to show the steps.
        stop: Ends the training early once it is set.

    Returns:
        What the recipe adapted, tuned.

    Raises:
        KeyboardInterrupt: If `stop` was set.
    """
    examples, head = task.splits["train"], suite.heads[task.name]
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = recipe.adapted(suite.network.open(state)).to(
            suite.device
        )  # no dropout: a suite is to be the same again
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=recipe.learning_rate)
    orders = [torch.randperm(len(examples), generator=generator) for _ in range(recipe.epochs)]
    batches = [batch for order in orders for batch in order.split(recipe.batch_size)]
    for batch in progress.track(batches, description=f"fine-tuning on {task.name}"):
        if stop.is_set():
            raise KeyboardInterrupt
        found = model(suite.network.inputs(examples, batch, suite.device))
        loss = recipe.loss(model, head, task, found, examples.labels[batch].to(suite.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def save_folder(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
    """Write `config.json` and `model.safetensors`, as model hubs lay them out.

    Args:
        folder: Made if it is not there.
        state: The backbone.
        config: What goes into `config.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})


def suite_from_sources(
    bare: Suite,
    key: str,
    base_state: Callable[[], Mapping[str, Tensor]],
    load_tasks: Callable[[], tuple[dict[str, Any], dict[str, str]]],
    recipe: Recipe,
    cache: Path,
    console: Console | None,
) -> Suite:
    """Load a suite from its archives, making what the cache lacks.

    Args:
        bare: Name, network and device; base and tasks are filled in.
        key: Key of the base, which changes with what it is made of.
        base_state: Makes the weights of the base.
        load_tasks: Fetches and splits the tasks: those that could be had, and a sentence about each other.
        recipe: How experts are made.
        cache: Cache folder.
        console: Where progress and skipped tasks are shown.

    Returns:
        The suite; errors are those of `make_suite`.
    """
    console, root = console or Console(), cache / "suite"
    root.mkdir(parents=True, exist_ok=True)
    base = root / f"base-{key}"
    with console.status("fetching and splitting the tasks (once)"):
        tasks, skipped = load_tasks()
        if not base.exists():
            with tempfile.TemporaryDirectory(dir=root, prefix=".base-") as temporary:
                save_folder(Path(temporary) / "base", base_state(), bare.network.config)
                move_into_place(Path(temporary) / "base", base)
    return make_suite(replace(bare, base=base, tasks=tasks, skipped=skipped), recipe, root, console)


def make_suite(suite: Suite, recipe: Recipe, root: Path, console: Console) -> Suite:
    """Load heads and experts, making what the cache lacks; each is complete or absent, so interrupting is safe.

    Args:
        suite: With base, tasks and network, and as yet without experts and heads.
        recipe: How experts are made.
        root: Folder that everything is kept in.
        console: Where progress and skipped tasks are shown.

    Returns:
        The suite with experts, heads and records.

    Raises:
        RuntimeError: If the suite has no task.
    """
    for line in suite.skipped.values():
        console.print(line, style="yellow", highlight=False)
    if not suite.tasks:
        raise RuntimeError("`make_suite`: no task could be loaded, for the reasons above. Check the network.")
    recipes = (VERSION, suite.base.name, asdict(recipe))
    folders = {
        name: root / f"{name}-{key_of(recipes[0], recipes[1], task.key, recipes[2])}"
        for name, task in suite.tasks.items()
    }
    stop = threading.Event()
    with Progress(console=console) as progress:

        def make(name: str) -> None:
            _make_expert(folders[name], suite, suite.tasks[name], recipe, progress, stop)

        run_all(make, [name for name, folder in folders.items() if not folder.exists()], stop)
    return replace(
        suite,
        experts={name: folder / "expert" for name, folder in folders.items()},
        heads={name: Head(**load_file(folder / "heads.safetensors")) for name, folder in folders.items()},
        records={name: json.loads((folder / "training.json").read_text()) for name, folder in folders.items()},
    )


def _make_expert(
    folder: Path, suite: Suite, task: Task, recipe: Recipe, progress: Progress, stop: threading.Event
) -> None:
    started = time.perf_counter()
    state = load_file(suite.base / "model.safetensors")
    head = recipe.head(suite.network, state, task)
    alone = replace(suite, heads={task.name: head})
    tuned = fine_tune(alone, state, task, recipe, progress, stop)
    record: dict[str, Any] = {"task": task.name, "recipe": asdict(recipe), "device": suite.device.type}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".expert-") as temporary:
        made = Path(temporary) / "made"
        expert = recipe.save(tuned, made, suite.network.config)
        for model_name, weights in (("base", state), ("expert", expert)):
            model = suite.model(weights)
            for split in ("validation", "test"):
                logits = own_logits(alone, model, task.name, split)
                record[f"{model_name}_{split}"] = asdict(score(logits, task.splits[split].labels))
        record["seconds"] = time.perf_counter() - started
        save_file({"weight": head.weight, "bias": head.bias}, made / "heads.safetensors")
        (made / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        move_into_place(made, folder)


def accuracy_table(suite: Suite) -> Table:
    """Test accuracy of base and experts, each on its own task."""
    table = Table("task", "classes", "train", "test", "base", "expert", "seconds", title="test accuracy")
    for name, task in suite.tasks.items():
        record, sizes = suite.records[name], [str(len(task.splits[split])) for split in ("train", "test")]
        cells = (f"{record['base_test']['accuracy']:.3f}", f"{record['expert_test']['accuracy']:.3f}")
        table.add_row(name, str(len(task.classes)), *sizes, *cells, f"{record['seconds']:.0f}")
    return table


def show_suite(suite: Suite, console: Console) -> None:
    """Print the accuracies, and where base and experts are."""
    console.print(accuracy_table(suite))
    console.print(f"base: {suite.base}", *(f"{name}: {path}" for name, path in suite.experts.items()), sep="\n")
