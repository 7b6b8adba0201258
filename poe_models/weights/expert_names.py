"""Names of experts: distinct, and none that draws or records use for something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from poe_models.span_labels import CENTER, MERGE

S = TypeVar("S")


def unique_names(experts: Mapping[str, S] | Sequence[tuple[str, S]]) -> dict[str, S]:
    """Experts by their names.

    Raises:
        ValueError: If there are none, or a name is no name, that of two, or one that draws or records use for something
            else.
    """
    pairs = list(experts.items()) if isinstance(experts, Mapping) else list(experts)
    if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
        raise ValueError(
            "`TaskVectors(experts=...)`: experts have names. Give a dict {'mnist': 'path/to/mnist', ...}, or (name, "
            "expert) pairs."
        )
    names = [name for name, _ in pairs]
    if not names:
        raise ValueError("`TaskVectors(experts={})`: there are no experts. Give at least one fine-tuned model.")
    taken = next((name for name in names if name in (CENTER, MERGE)), None)
    if taken is not None:
        raise ValueError(
            f"`TaskVectors(experts=...)`: an expert called {taken!r}: draws call the anchor's centre {CENTER!r} and a "
            f"merge in the span {MERGE!r}. Give it another name, such as '{taken}_model'."
        )
    bad = [name for name in names if not isinstance(name, str) or not name]
    path = next((name for name in names if name not in bad and name.startswith(("./", "../"))), None)
    if path is not None:
        raise ValueError(
            f"`TaskVectors(experts=...)`: an expert called {path!r}: records take what begins like that for a path. "
            f"Give it another name, such as {path.strip('./') or 'mine'!r}."
        )
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if bad or twice:
        what = f"{twice[0]!r} is the name of several experts" if twice else f"{bad[0]!r} is no name"
        raise ValueError(f"`TaskVectors(experts=...)`: {what}. Give every expert a name of its own.")
    return dict(pairs)
