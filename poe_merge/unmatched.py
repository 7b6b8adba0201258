"""Words of a configuration that fit no tensor: in all likelihood misspelt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from poe_merge.config import MergeConfig, ModelParameters
from poe_models.weights.unmatched import nearest_part

if TYPE_CHECKING:
    from poe_models.weights.task_vectors import TaskVectors


def unmatched(settings: MergeConfig, task_vectors: TaskVectors) -> Iterator[str]:
    """Filters that fit no tensor that is merged or averaged.

    Args:
        settings: The configuration.
        task_vectors: Base and experts.

    Yields:
        A sentence about each, with the nearest name.
    """
    changed = [name for name, treatment in task_vectors.treatments.items() if treatment.action != "base"]
    for word, where in _filters(settings).items():
        if not any(word in name for name in changed):
            yield (
                f"the filter {word!r} of {where} fits no tensor that is merged or averaged. "
                f"{nearest_part(word, changed)}`poe-merge plan` lists them."
            )


def _filters(settings: MergeConfig) -> dict[str, str]:
    """Words of filters, each with the key that it is written at."""
    sections: list[tuple[str, ModelParameters]] = [("parameters", settings.parameters)]
    sections += [(f"models.{entry.label}", entry.parameters) for entry in settings.models]
    return {
        word: f"{section}.{key}"
        for section, parameters in sections
        for key, setting in parameters.settings().items()
        for word, _ in setting.cases
        if word is not None
    }
