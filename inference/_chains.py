"""The loop over steps that samplers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

State = TypeVar("State")


def kept_states(
    step: Callable[[State, int], State],
    state: State,
    num_samples: int,
    warmup: int,
    thin: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[State]:
    """Run all chains of a sampler.

    Args:
        step: maps a state of all chains and the number of the step, from 1, to the next state.
        state: the first state.
        num_samples: states to keep.
        warmup: steps before the first one that counts.
        thin: steps per kept state.
        progress: called with the number of finished steps and their total.

    Yields:
        The states that are kept.
    """
    total = warmup + num_samples * thin
    for count in range(1, total + 1):
        state = step(state, count)
        if progress is not None:
            progress(count, total)
        if count > warmup and (count - warmup) % thin == 0:
            yield state


def require_counts(sampler: str, *, num_samples: int, chains: int, thin: int, warmup: int) -> None:
    """Refuse numbers of draws, chains and steps that cannot be used.

    Args:
        sampler: name of the function that was called.
        num_samples: draws kept per chain.
        chains: independent chains.
        thin: steps per kept draw.
        warmup: steps before the first kept draw.

    Raises:
        ValueError: one is too small.
    """
    if num_samples < 1 or chains < 1 or thin < 1 or warmup < 0:
        raise ValueError(
            f"`{sampler}(num_samples={num_samples}, chains={chains}, thin={thin}, warmup={warmup})`: at least one "
            "draw, one chain and one step per draw are needed, and no negative warmup."
        )
