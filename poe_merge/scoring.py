"""The score of ``poe-merge search``, from what was typed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from poe_merge.config import MergeConfig

if TYPE_CHECKING:
    import torch

    from inference.search.study import Score


@dataclass(frozen=True, eq=False)
class Scoring:
    """Objective of a search.

    Attributes:
        score: Maps a state dict to a number.
        minimize: Whether smaller is better.
        about: What it is, in words.
    """

    score: Score
    minimize: bool
    about: str


def scoring(
    text: str,
    tasks: str | None,
    config: MergeConfig,
    folders: tuple[Path, ...],
    fraction: float = 1.0,
    submodule: str = "",
    device: torch.device | None = None,
) -> Scoring:
    """The score of a search, from what was typed.

    Args:
        text: A metric of ``poe-merge evaluate``, ``functional``, or a function ``FILE.py:NAME`` of a state dict.
        tasks: The user's module of tasks, for the former two.
        config: The merge, for the base and the experts.
        folders: Where the user's modules are looked for.
        fraction: Share of the batches of each task.
        submodule: Where in the module's network the checkpoints are.
        device: Device of the network; the configuration's by default.

    Raises:
        ValueError: If the module or the function does not fit, or the metric is unknown.
    """
    from diagnostics.predictions.task_score import TaskScore
    from poe_merge.specs import names_code
    from poe_merge.user_tasks import read_function, read_tasks

    if names_code(text):
        if tasks is not None or submodule or fraction != 1.0:
            raise ValueError(
                f"--score {text}: a function of a state dict has no use for --tasks, --submodule or --fraction. Leave "
                "them out."
            )
        function = read_function(f"score `{text}`", text, folders)
        return Scoring(lambda state: float(function.call(state)), False, f"{text} ({_digest(function.source)})")
    if tasks is None:
        raise ValueError(f"--score {text}: judged on what? Give --tasks FILE.py, a module with `network` and `tasks`.")
    user = read_tasks(tasks, folders)
    made = TaskScore(
        user.tasks,
        user.network(config.base_model).to(device or config.device),
        text,
        experts={entry.label: entry.model for entry in config.models},
        base=config.base_model,
        submodule=submodule,
        fraction=fraction,
    )
    names = ", ".join(task.name for task in user.tasks)
    where = f" in {submodule}" if submodule else ""
    about = f"{text} of {names}{where}, {fraction:g} of the batches ({_digest(user.source)})"
    return Scoring(made, made.minimize, about)


def _digest(source: Path) -> str:
    """Checksum of a user's file, so that a study is not gone on with after an edit."""
    return hashlib.sha256(source.read_bytes()).hexdigest()[:12]
