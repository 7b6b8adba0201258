"""Llama families: merges written as whole models, and the commands that score them.

The five families are scored by a harness of its own (`lm_eval`), whose tasks generate answers, run code and follow
instructions; it is not part of this project. FusionBench (Tang et al., 2024) names the tasks of each family.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.papers.merges import config_of, task_vectors
from benchmarks.papers.setups import Setup
from benchmarks.papers.sources import Sources
from inference.models.merge import merge_checkpoint
from poe_merge.build import designs_of
from poe_models.weights.loading import open_checkpoint

_LANGUAGES = ("fr", "es", "de", "ru")
FAMILY_TASKS: Mapping[str, Sequence[str]] = {
    "instruction": ("ifeval",),
    "math": ("gsm8k_cot",),
    "coding": ("humaneval_plus", "mbpp_plus"),
    "multilingual": tuple(f"{task}_{code}" for code in _LANGUAGES for task in ("m_mmlu", "arc", "hellaswag")),
    "safety": ("truthfulqa", "toxigen", "winogender"),
}


@dataclass(frozen=True)
class Llama:
    """A set-up of Llama.

    Args:
        setup: Its models and families.
        sources: Where these come from.
        device: Where merges are computed.
    """

    setup: Setup
    sources: Sources
    device: str = "cpu"

    def merge(self, name: str, configuration: Mapping[str, Any], out: Path) -> Path:
        """Write one merge as a model that transformers loads.

        Args:
            name: Of the merge, and of its folder.
            configuration: Method or parameters.
            out: Folder of all merges.
        """
        config, folder = config_of(self.setup, configuration, self.device), out / folder_name(name)
        base = open_checkpoint(self.sources.folder(self.setup.base))
        experts = {task: open_checkpoint(self.sources.folder(model)) for task, model in self.setup.experts.items()}
        vectors = task_vectors(config, base, experts)
        merge_checkpoint(vectors, designs_of(config, base), folder, settings={"config": config.resolved()})
        return folder

    def script(self, models: Mapping[str, str | Path], out: Path) -> str:
        """Shell commands that score models on every family, and then write the table.

        Args:
            models: Name to folder or hub id.
            out: Folder of the run.
        """
        tasks = ",".join(task for family in self.setup.tasks for task in FAMILY_TASKS[family])
        harness = ("lm_eval", "--model", "hf", "--tasks", tasks, "--batch_size", "8", "--confirm_run_unsafe_code")
        lines = []
        for name, model in models.items():
            place = str(out / "scores" / folder_name(name))
            words = ("--model_args", f"pretrained={model},dtype=bfloat16", "--output_path", place)
            lines.append(shlex.join([*harness, *words]))
        end = (sys.executable, "-m", "benchmarks.papers", self.setup.name, "--collect", "--out", str(out))
        return "\n".join(["#!/bin/sh", "set -e", *lines, shlex.join(end), ""])


def folder_name(name: str) -> str:
    """Name of a merge as that of a folder.

    >>> folder_name("InputGram, Cauchy")
    'InputGram-Cauchy'
    """
    return name.replace(", ", "-").replace(" ", "-")
