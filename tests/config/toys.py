"""Configurations beside a small checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from poe_merge.build import DesignTable
from poe_merge.config import MergeConfig, parse_config
from poe_merge.settings import Document
from poe_models import open_checkpoint

MINIMAL: dict[str, Any] = {"base_model": "base", "models": [{"model": "one"}, {"model": "two"}]}


SHAPES = {"0.mlp.weight": (6, 4), "0.attn.weight": (4, 4), "0.bias": (6,)}


def config(folder: Path, **changes: Any) -> MergeConfig:
    return parse_config(Document({**MINIMAL, **changes}), [folder])


def designs(folder: Path, **changes: Any) -> DesignTable:
    made = config(folder, **changes)
    return DesignTable(made, open_checkpoint(made.base_model))


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path
