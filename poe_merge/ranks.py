"""Commands under ``torchrun``: which of them share their work, and what the processes behind the first one print."""

from __future__ import annotations

import os
from collections.abc import Sequence

SHARED = ("merge", "stats", "sample", "activations", "search", "evaluate", "score")
"""Commands whose work several processes share."""


def rank_number() -> int:
    """Number of this process among those that ``torchrun`` has started; 0 without it."""
    return int(os.environ.get("RANK", "0")) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def require_shared(arguments: Sequence[str]) -> None:
    """Refuse commands that several processes would each do as a whole.

    Args:
        arguments: What was typed after ``poe-merge``.

    Raises:
        ValueError: If there are several processes, and the command is not one that they share.
    """
    command = next((word for word in arguments if not word.startswith("-")), "")
    alone = "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1"
    if alone or command in SHARED:
        return
    raise ValueError(
        f"`torchrun ... -m poe_merge {command}`: {', '.join(SHARED[:-1])} and {SHARED[-1]} share their work between "
        "processes, other commands do not. Run it as `poe-merge`."
    )
