"""Data in the files that the hub has: Parquet, with a card that names configurations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.papers.clip import zero_shot_tasks
from benchmarks.papers.glue import DATA, PROMPTS
from tests.papers.toys import IMAGES, TEXTS, images_of, sentences_of


def local_hub(models: Path, folder: Path, datasets: Any) -> Path:
    """A folder with the models of another, and data beside them."""
    folder.mkdir()
    for owner in models.iterdir():
        os.symlink(owner, folder / owner.name)
    for task in IMAGES:
        known = zero_shot_tasks()[task]
        rows = datasets.Dataset.from_list(images_of(task)).cast_column(known.image, datasets.Image())
        if task == "pcam":
            rows = rows.cast_column(known.label, datasets.Value("bool"))
        _write(rows, folder, known.data, known.config, known.test)
    for task in TEXTS:
        _write(datasets.Dataset.from_list(sentences_of(task)), folder, DATA, task, PROMPTS[task].split)
    return folder


def _write(rows: Any, folder: Path, name: str, config: str | None, split: str) -> None:
    """One split, and its entry in the card."""
    place = Path(config or "data") / f"{split}-00000-of-00001.parquet"
    (folder / name / place.parent).mkdir(parents=True, exist_ok=True)
    rows.to_parquet(str(folder / name / place))
    card = folder / name / "README.md"
    before = card.read_text().removesuffix("---\n") if card.exists() else "---\nconfigs:\n"
    files = f"  data_files:\n  - split: {split}\n    path: {place}\n"
    card.write_text(f"{before}- config_name: {config or 'default'}\n{files}---\n")
