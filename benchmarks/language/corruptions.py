"""Corruptions of the language suite's texts: random edits of their tokens, after Wei and Zou, 2019 (arXiv 1901.11196).

Each inner token of a text is edited with a probability of .1, .25 or .5; the marks at its ends stay. Deletions are
theirs; a swap is of neighbours; a token is inserted behind another, or put in its place, as often as the split's texts
have it, where they take synonyms, and what no longer fits into `MOST_TOKENS` is cut; *unknown* puts the tokenizer's
mark of an unknown word there.

>>> split = Split(torch.tensor([[7, 1, 2, 3, 8, 0]]).short(), torch.tensor([5]), *torch.zeros(3, 1).long())
>>> corrupted(split, "unknown", 3, seed=1).tokens
tensor([[  7,   1, 100, 100,   8]], dtype=torch.int16)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.harness.corruptions import Corruptions
from benchmarks.language.tasks import Split
from benchmarks.language.tokens import MOST_TOKENS

RATES = (0.1, 0.25, 0.5)
UNKNOWN = 100
"""BERT's number of the mark of an unknown word."""
Edit = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Inner tokens of a text (n,), which of them to edit (n,) bool, and as many tokens of the split, to the edited ones."""


def corrupted(split: Split, kind: str, severity: int, seed: int) -> Split:
    """A split of edited texts.

    Args:
        split: The texts, with a mark at either end.
        kind: One of `EDITS`.
        severity: 1, 2 or 3.
        seed: Of the edits.
    """
    generator, edit = torch.Generator().manual_seed(seed), EDITS[kind]
    texts = [row[:length] for row, length in zip(split.tokens, split.lengths.tolist(), strict=True)]
    pool, rows = torch.cat([text[1:-1] for text in texts]), []
    for text in texts:
        inner = text[1:-1]
        chosen = torch.rand(inner.shape, generator=generator) < RATES[severity - 1]
        others = pool[torch.randint(len(pool), inner.shape, generator=generator)]
        rows.append(torch.cat([text[:1], edit(inner, chosen, others)[: MOST_TOKENS - 2], text[-1:]]))
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return replace(split, tokens=tokens, lengths=torch.tensor([len(row) for row in rows]))


def _swapped(inner: Tensor, chosen: Tensor, _: Tensor) -> Tensor:
    """A chosen token changes places with the next one, from the first to the last."""
    order = list(range(len(inner)))
    for place in chosen[:-1].nonzero().flatten().tolist():
        order[place], order[place + 1] = order[place + 1], order[place]
    return inner[order]


def _deleted(inner: Tensor, chosen: Tensor, _: Tensor) -> Tensor:
    """The others, or the first if none would be left."""
    return inner[~chosen] if not bool(chosen.all()) else inner[:1]


def _inserted(inner: Tensor, chosen: Tensor, others: Tensor) -> Tensor:
    """Another token behind each chosen one."""
    return torch.stack([inner, others], 1)[torch.stack([torch.ones_like(chosen), chosen], 1)]


EDITS: dict[str, Edit] = {
    "swap": _swapped,
    "deletion": _deleted,
    "insertion": _inserted,
    "replacement": lambda inner, chosen, others: torch.where(chosen, others, inner),
    "unknown": lambda inner, chosen, _: torch.where(chosen, UNKNOWN, inner),
}
TEXTS = Corruptions(
    tuple(EDITS),
    ("10 %", "25 %", "50 %"),
    "10, 25 and 50 % of a text's tokens edited at random, after Wei and Zou (2019)",
    corrupted,
)
