"""Base, experts, tasks and settings of each table, by the ids that the hub has them under.

Ids of full fine-tunes, of adapters on Flan-T5 and of the Llama families are those that FusionBench (Tang et al., 2024)
lists, ids of adapters on CLIP those of KnOTS (Stoica et al., 2025). No revisions are known that the numbers were made
with, so none is pinned: `ORG/NAME@REVISION` pins one. The base of ViT-B/32 is at the revision that has safetensors.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["images", "texts", "chat"]
EIGHT = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
FOURTEEN = (*EIGHT, "oxford_flowers102", "pcam", "fer2013", "oxford-iiit-pet", "stl10", "cifar100")
TWENTY = (*FOURTEEN, "cifar10", "food101", "fashion_mnist", "emnist_letters", "kmnist", "rendered-sst2")
GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
FAMILIES = ("instruction", "math", "coding", "multilingual", "safety")
_B32 = "openai/clip-vit-base-patch32@refs/pr/15"
_L14 = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class Setup:
    """Models and settings of one table.

    Args:
        name: Of the command.
        about: What is merged, in one line.
        kind: What the models read: images (CLIP), texts (Flan-T5) or prompts of a chat (Llama).
        base: Hub id of the base.
        experts: Task to the hub id of its expert.
        adapters: Whether the experts are LoRA adapters.
        preset: Settings of [PoE] Table 5; None where it has none for these models.
    """

    name: str
    about: str
    kind: Kind
    base: str
    experts: Mapping[str, str]
    adapters: bool = False
    preset: str | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the table."""
        return tuple(self.experts)

    def of(self, tasks: Sequence[str]) -> Setup:
        """The same table of some of its tasks.

        Raises:
            ValueError: If it does not have one of them, or is given none.
        """
        odd = next((task for task in tasks if task not in self.experts), None)
        if odd is not None or not tasks:
            raise ValueError(
                f"set-up {self.name}: {f'no task {odd!r}' if odd else 'no tasks'}. It has {', '.join(self.experts)}."
            )
        return replace(self, experts={task: self.experts[task] for task in dict.fromkeys(tasks)})

    def given(self, base: str | None, experts: Mapping[str, str]) -> Setup:
        """The same tasks with other models.

        Args:
            base: Id of the base; None for the set-up's own.
            experts: Ids of experts that replace the set-up's own, by task.
        """
        self.of([*experts] or self.tasks)
        return replace(self, base=base or self.base, experts={**self.experts, **experts})


def _full(size: str, about: str, base: str, pattern: str, preset: str) -> dict[str, Setup]:
    tables = {len(tasks): {task: pattern.format(task) for task in tasks} for tasks in (EIGHT, FOURTEEN, TWENTY)}
    return {
        f"{size}-{count}": Setup(f"{size}-{count}", f"{about}, {count} tasks", "images", base, experts, preset=preset)
        for count, experts in tables.items()
    }


def _adapted(name: str, about: str, base: str, pattern: str, preset: str | None) -> dict[str, Setup]:
    experts = {task: pattern.format(task.replace("-", "_")) for task in EIGHT}
    return {name: Setup(name, about, "images", base, experts, adapters=True, preset=preset)}


def _flan(size: str) -> dict[str, Setup]:
    name, base = f"flan-t5-{size}-glue", f"flan-t5-{size}"
    experts = {task: f"tanganke/{base}_glue-{task}_lora-16" for task in GLUE}
    about = f"Flan-T5-{size}, LoRA of rank 16, eight tasks of GLUE"
    return {name: Setup(name, about, "texts", f"google/{base}", experts, adapters=True, preset=f"poe-{base}-lora")}


def _llama(name: str, model: str) -> dict[str, Setup]:
    experts = {family: f"MergeBench/{model}_{family}" for family in FAMILIES}
    return {name: Setup(name, f"{model}, five families of tasks", "chat", f"meta-llama/{model}", experts)}


SETUPS: Mapping[str, Setup] = {
    **_full("clip-b32", "CLIP ViT-B/32", _B32, "tanganke/clip-vit-base-patch32_{}", "poe-vit-b32-full"),
    **_full("clip-l14", "CLIP ViT-L/14", _L14, "tanganke/clip-vit-large-patch14_{}", "poe-vit-l14-full"),
    **_adapted(
        "clip-b32-8-lora",
        "CLIP ViT-B/32, LoRA of rank 16, 8 tasks",
        _B32,
        "hoffman-lab/KnOTS-ViT-B-32_lora_R16_{}",
        None,
    ),
    **_adapted(
        "clip-l14-8-lora",
        "CLIP ViT-L/14, LoRA of rank 16, 8 tasks",
        _L14,
        "hoffman-lab/KnOTS-ViT-L-14_lora_R16_{}",
        "poe-vit-l14-lora",
    ),
    **_flan("base"),
    **_flan("large"),
    **_llama("llama-3b", "Llama-3.2-3B"),
    **_llama("llama-8b", "Llama-3.1-8B"),
}
"""By the name of the command."""


def setup_named(name: str) -> Setup:
    """A set-up by its name.

    Raises:
        ValueError: If there is none of this name.

    >>> setup_named("clip-l14-8").experts["dtd"]
    'tanganke/clip-vit-large-patch14_dtd'
    """
    if name not in SETUPS:
        near = difflib.get_close_matches(name, SETUPS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"set-up {name!r}: unknown; {hint}There are {', '.join(SETUPS)}.")
    return SETUPS[name]
