"""Make the decoder suite once: SmolLM2 as the base, and LoRA experts of three tasks, as adapters and as whole models.

`python -m benchmarks.decoder.train` makes what is missing in the cache and prints the accuracies.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from torch import Tensor, nn
from typing_extensions import override

from benchmarks.decoder.model import DecoderNetwork
from benchmarks.decoder.sources import base_folder, cache_folder
from benchmarks.decoder.tasks import load_tasks
from benchmarks.harness import training
from benchmarks.harness.suite import Head, Network, Suite
from benchmarks.harness.training import accuracy_table, save_folder
from benchmarks.language.tasks import SplitSizes


@dataclass(frozen=True)
class Recipe(training.Recipe):
    """How experts are made; further arguments are those of `training.Recipe`.

    Args:
        rank: Of the factors, on all attention projections; alpha is twice it.
        sizes: How the tasks are split.
    """

    epochs: int = 1
    learning_rate: float = 5e-4
    batch_size: int = 16
    rank: int = 8
    sizes: SplitSizes = field(default_factory=lambda: SplitSizes(test=300, validation=150, shots=1, train=480))

    @override
    def head(self, network: Network, state: Mapping[str, Tensor], task: Any) -> Head:
        """The rows of the output embedding, which is tied, of the choices' tokens."""
        weight = state["embed_tokens.weight"][list(task.choices)].float().contiguous()
        return Head(weight, torch.zeros(len(weight)))

    @override
    def adapted(self, model: nn.Module) -> nn.Module:
        """LoRA on the attention's projections."""
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        config = peft.LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=targets)
        return peft.get_peft_model(model, config)

    @override
    def save(self, model: Any, folder: Path, config: Mapping[str, object]) -> dict[str, Tensor]:
        """Save the adapter as `adapter`, and the model that it makes as `expert`."""
        model.save_pretrained(folder / "adapter")
        merged = model.cpu().merge_and_unload()
        state = {name: value.detach().contiguous() for name, value in merged.state_dict().items()}
        save_folder(folder / "expert", state, config)
        return state


def adapters(suite: Suite) -> dict[str, Path]:
    """Task name to the folder of its adapter."""
    return {name: folder.parent / "adapter" for name, folder in suite.experts.items()}


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
    bare = Suite("decoder", DecoderNetwork(base), base, {}, tasks, {}, {}, skipped, torch.device(device))
    return training.make_suite(bare, recipe, cache / "suite", console)


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
