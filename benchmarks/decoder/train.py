"""Make the decoder suite once: SmolLM2 as the base, and LoRA experts of three tasks, as adapters and as whole models.

`python -m benchmarks.decoder.train` makes what is missing in the cache and prints the accuracies.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from benchmarks.decoder.model import EMBEDDING, TIED, Decoder, DecoderNetwork
from benchmarks.decoder.prompts import Split
from benchmarks.decoder.sources import base_folder, cache_folder
from benchmarks.decoder.tasks import Task, load_tasks
from benchmarks.folders import key_of
from benchmarks.harness import training
from benchmarks.harness.suite import Head, Network, Suite
from benchmarks.harness.training import accuracy_table, save_folder
from benchmarks.language.tasks import SplitSizes

AT_ONCE = 16
"""Prompts at a time on their way through the blocks that no adapter changes."""
FULL = SplitSizes(test=1000, validation=300, shots=1, train=6000)
"""More prompts of every kind, for a GPU."""


@dataclass(frozen=True)
class Recipe(training.Recipe):
    """How experts are made; further arguments are those of `training.Recipe`.

    Args:
        rank: Of the factors, on all attention projections; alpha is twice it.
        blocks: How many blocks are tuned, the last ones; None for all. What the others make of a prompt is kept.
        sizes: How the tasks are split.
    """

    epochs: int = 1
    learning_rate: float = 1e-3
    batch_size: int = 16
    rank: int = 8
    blocks: int | None = 8
    sizes: SplitSizes = field(default_factory=lambda: SplitSizes(test=150, validation=60, shots=1, train=640))

    @override
    def head(self, network: Network, state: Mapping[str, Tensor], task: Any) -> Head:
        """The rows of the output embedding, which is tied, of the choices' tokens."""
        weight = state[EMBEDDING][list(task.choices)].float().contiguous()
        return Head(weight, torch.zeros(len(weight)))

    @override
    def adapted(self, model: nn.Module) -> nn.Module:
        """LoRA on the attention's projections of the tuned blocks."""
        assert isinstance(model, Decoder)
        total = model.config.num_hidden_layers
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            layers_to_transform=None if self.blocks is None else list(range(total - self.blocks, total)),
        )
        return peft.get_peft_model(model, config)

    @override
    def loss(self, model: Any, head: Head, task: Any, features: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of a batch: the cross entropy of the answer among all tokens."""
        targets = torch.tensor(task.choices, device=labels.device)[labels]
        return F.cross_entropy(features @ model.get_input_embeddings().weight.T, targets)

    @override
    def save(self, model: Any, folder: Path, config: Mapping[str, object]) -> dict[str, Tensor]:
        """Save the adapter of a causal LM as `adapter`, and the model that it makes as `expert`."""
        for each in model.peft_config.values():
            each.task_type, each.base_model_name_or_path = peft.TaskType.CAUSAL_LM, None
        model.save_pretrained(folder / "adapter")
        merged = model.cpu().merge_and_unload()
        state = {name: value.detach().contiguous() for name, value in merged.state_dict().items() if name != TIED}
        save_folder(folder / "expert", state, config)
        return state


def adapters(suite: Suite) -> dict[str, Path]:
    """Task name to the folder of its adapter."""
    return {name: folder.parent / "adapter" for name, folder in suite.experts.items()}


def with_states(task: Task, network: DecoderNetwork, root: Path, device: torch.device, progress: Progress) -> Task:
    """The task with the states before the first tuned block, from the cache or made.

    Args:
        task: The task.
        network: Whose first blocks no adapter changes.
        root: Folder that everything is kept in.
        device: Where the blocks run.
        progress: Where to show them.
    """
    file = root / f"states-{key_of(network.folder.name, task.key, network.start)}.safetensors"
    if not file.exists():
        model = network.open(load_file(network.folder / "model.safetensors"))
        model.to(device)  # type: ignore[arg-type]
        parts = [(name, rows) for name, split in task.splits.items() for rows in _batches(split)]
        found: dict[str, list[Tensor]] = {name: [] for name in task.splits}
        for name, rows in progress.track(parts, description=f"first {network.start} blocks on {task.name}"):
            embedded = network.embedding[task.splits[name].tokens[rows].long()].to(device)
            with torch.inference_mode():
                found[name].append(model.through(embedded, 0, network.start).cpu())
        with tempfile.TemporaryDirectory(dir=root, prefix=".states-") as temporary:
            made = Path(temporary) / "states.safetensors"
            save_file({name: torch.cat(states) for name, states in found.items()}, made)
            os.replace(made, file)
    states = load_file(file)
    return replace(task, splits={name: replace(split, hidden=states[name]) for name, split in task.splits.items()})


def _batches(split: Split) -> tuple[Tensor, ...]:
    return torch.arange(len(split)).split(AT_ONCE)


def make_suite(
    recipe: Recipe | None = None,
    cache: Path | None = None,
    console: Console | None = None,
    device: torch.device | str = "cpu",
) -> Suite:
    """Load the suite, making what the cache lacks; arguments as of `benchmarks.language.train.make_suite`.

    Raises:
        RuntimeError: If no task is left.
        MissingSourceError: If the base is not there and cannot be downloaded.
    """
    recipe, cache, console = recipe or Recipe(), cache or cache_folder(), console or Console()
    with console.status("fetching the base and the tasks (once)"):
        base = base_folder(cache)
        tasks, skipped = load_tasks(recipe.sizes, base)
    return suite_of(base, tasks, skipped, recipe, cache / "suite", console, torch.device(device))


def suite_of(
    base: Path,
    tasks: Mapping[str, Task],
    skipped: Mapping[str, str],
    recipe: Recipe,
    root: Path,
    console: Console,
    device: torch.device,
) -> Suite:
    """The suite of a base and tasks, whose experts are made where the cache lacks them.

    Args:
        base: Checkpoint folder of the base.
        tasks: The tasks by name.
        skipped: A sentence about each other one.
        recipe: How experts are made.
        root: Folder that everything is kept in.
        console: Where progress is shown.
        device: Where models run.
    """
    network = DecoderNetwork(base)
    if recipe.blocks is not None:
        network = replace(network, start=int(str(network.config["num_hidden_layers"])) - recipe.blocks)
        with Progress(console=console) as progress:
            tasks = {name: with_states(task, network, root, device, progress) for name, task in tasks.items()}
    bare = Suite("decoder", network, base, {}, tasks, {}, {}, skipped, device)
    return training.make_suite(bare, recipe, root, console)


def main() -> None:
    """Make the suite and print the accuracies."""
    usual = Recipe()
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=int, default=usual.seed, help="order of the training texts, and start of LoRA")
    parser.add_argument("--train", type=int, default=usual.sizes.train, help="most texts to tune on")
    parser.add_argument("--test", type=int, default=usual.sizes.test, help="most texts to judge by")
    parser.add_argument("--cache", type=Path, default=None, help="cache folder; None is the user's")
    parser.add_argument("--device", default="cpu", help="where to train")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see `parallel`
    sizes = SplitSizes(arguments.test, usual.sizes.validation, usual.sizes.shots, arguments.train)
    console = Console()
    suite = make_suite(Recipe(seed=arguments.seed, sizes=sizes), arguments.cache, console, arguments.device)
    console.print(accuracy_table(suite))
    console.print(f"base: {suite.base}", *(f"{name}: {path}" for name, path in adapters(suite).items()), sep="\n")


if __name__ == "__main__":
    main()
