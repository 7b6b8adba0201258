"""Models and data by their hub ids, from the hub or from a local folder that has them under the same names.

Of a model only safetensors, JSON and the tokenizer's files are fetched; code of the hub never runs. With
`HF_HUB_OFFLINE=1` only the cache is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download

PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model")
INSTALL = 'Install it: `pip install "poe-merge[papers]"`.'


class SourceError(ValueError):
    """A model or a data set that cannot be had."""


class Rows(Protocol):
    """Rows of a data set by number."""

    def __len__(self) -> int:
        """Number of rows."""

    def __getitem__(self, row: int, /) -> Mapping[str, Any]:
        """One row: column to value."""


@dataclass(frozen=True)
class Data:
    """One split of a data set of the hub.

    Args:
        name: Its id.
        split: The split.
        config: Name of the configuration, where it has several.
    """

    name: str
    split: str
    config: str | None = None


@dataclass(frozen=True)
class Sources:
    """Where models and data come from.

    Args:
        local: Folder with `ORG/NAME` for every model and every data set, each as the hub has it; None for the hub.
    """

    local: Path | None = None

    def folder(self, model: str) -> Path:
        """Folder of a model's files.

        Args:
            model: Its id, `ORG/NAME` or `ORG/NAME@REVISION`; a local folder has one revision.

        Raises:
            SourceError: If it cannot be had, or has no safetensors.
        """
        name, _, revision = model.partition("@")
        found = self._fetched(name, revision or None) if self.local is None else self.local / name
        if not found.is_dir():
            raise SourceError(
                f"model {model}: {found} is not there. Put the model's folder there, or leave out --local."
            )
        if not any(found.glob("*.safetensors")):
            raise SourceError(
                f"model {model}: {found} has no safetensors, and other weight files are not read. Name a revision that "
                "has them, ORG/NAME@REVISION, by --base or --expert, or convert the model."
            )
        return found

    def _fetched(self, name: str, revision: str | None) -> Path:
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
        except Exception as error:  # network, cache, authorisation: one message for all
            reason = (str(error).splitlines() or [""])[0]
            raise SourceError(
                f"model {name}{f'@{revision}' if revision else ''}: not to be had from the hub "
                f"({type(error).__name__}: {reason}). Check the connection and your access to it, or give a folder of "
                "models by --local."
            ) from error

    def require_data(self) -> Any:
        """The package `datasets`, before anything is fetched.

        Raises:
            SourceError: If it is not installed.
        """
        try:
            import datasets
        except ImportError as error:
            raise SourceError(f"data: the package `datasets` is not installed. {INSTALL}") from error
        return datasets

    def rows(self, data: Data) -> Rows:
        """Rows of a split.

        Raises:
            SourceError: If `datasets` is not installed, or the split cannot be had.
        """
        datasets = self.require_data()
        where = data.name if self.local is None else str(self.local / data.name)
        if self.local is not None and not Path(where).is_dir():
            raise SourceError(f"data {data.name}: {where} is not there. Put it there, or leave out --local.")
        try:
            found: Rows = datasets.load_dataset(where, data.config, split=data.split)
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise SourceError(
                f"data {data.name}, split {data.split!r}: cannot be loaded ({type(error).__name__}: {reason}). Check "
                "the connection, or what the folder of --local has."
            ) from error
        return found


def picked(size: int, limit: int | None, seed: int) -> Sequence[int]:
    """Numbers of the rows to use: all, or some of them by chance, in the order of the data.

    Args:
        size: Number of rows.
        limit: Largest number to use.
        seed: Of the choice.

    >>> picked(5, None, 0), len(picked(100, 3, 0))
    (range(0, 5), 3)
    """
    if limit is None or limit >= size:
        return range(size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:limit].tolist())
