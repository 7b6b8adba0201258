"""Several processes at one job: whose work is whose, and where they wait for each other.

``torchrun --nproc-per-node=4 -m poe_merge merge config.yaml --out merged`` starts four ranks of one merge. Every rank
reads the same plan and works on its share of the batches of tensors; the output does not depend on the number of ranks.
Rank 0 alone begins, ends and publishes it. If a rank dies, torchrun ends the others, and what is finished stays.

>>> Ranks(1, 2).share([5, 1, 1, 2])
frozenset({1, 2, 3})
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from inference.models.disk import OutputError
from poe_models.weights.checkpoint import Checkpoint, CheckpointError

T = TypeVar("T")
_PATIENCE = timedelta(days=30)
"""Longest wait for another rank, which may be at a large tensor."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a job; alone by default.

    Args:
        rank: Its number, from 0.
        size: Number of processes.

    Raises:
        ValueError: If there is no such rank.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"`Ranks({self.rank}, {self.size})`: ranks go from 0 to size - 1.")

    @property
    def first(self) -> bool:
        """True for the rank that begins and ends the job."""
        return self.rank == 0

    def share(self, costs: Sequence[float]) -> frozenset[int]:
        """Places of this rank's tasks, the same division in all ranks: the costliest first, to whoever has least.

        Args:
            costs: Of every task, in any unit.
        """
        loads, mine = [0.0] * self.size, []
        for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
            rank = loads.index(min(loads))
            loads[rank] += costs[place]
            if rank == self.rank:
                mine.append(place)
        return frozenset(mine)

    def wait(self) -> None:
        """Wait until every rank is here.

        Raises:
            OutputError: If one of them has ended.
        """
        self.gather(None)

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in the order of the ranks, in every rank; plain data and CPU tensors.

        Raises:
            OutputError: If one of them has ended.
        """
        found: list[T] = [value] * self.size
        if self.size > 1:
            try:
                dist.all_gather_object(found, value)
            except RuntimeError as error:
                raise OutputError(
                    "another process has ended before the work was done: its message says why. Run the same command "
                    "again, with --resume (`resume=True`) if it has that option, in as many processes as you like."
                ) from error
        return found

    def results(self, calls: Sequence[Callable[[], T]], progress: Callable[[int, int], None] | None = None) -> list[T]:
        """Results of calls that the ranks divide between them, in their order, in every rank.

        Args:
            calls: Give plain data and CPU tensors.
            progress: Called with the number of this rank's calls that are done, and of all of its own.

        Raises:
            OutputError: If a rank has ended.
        """
        own = sorted(self.share([1.0] * len(calls)))
        made: dict[int, T] = {}
        for done, place in enumerate(own, 1):
            made[place] = calls[place]()
            if progress is not None:
                progress(done, len(own))
        every = {place: result for each in self.gather(made) for place, result in each.items()}
        return [every[place] for place in range(len(calls))]

    def device(self, device: torch.device) -> torch.device:
        """A device of this rank's own: ``cuda`` becomes the one of its number on this machine."""
        if self.size == 1 or device.type != "cuda" or device.index is not None:
            return device
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.rank)) % torch.cuda.device_count())


ALONE = Ranks()


@contextmanager
def launched_ranks() -> Iterator[Ranks]:
    """The process group that ``torchrun`` has started this process in; alone otherwise.

    Yields:
        The rank of this process; the group is left when the block ends.
    """
    if not dist.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()  # its threads must not outlive the interpreter


def require_same_files(ranks: Ranks, checkpoints: Iterable[Checkpoint]) -> None:
    """Refuse ranks that have opened other files than the first, whose digests the record has.

    Raises:
        CheckpointError: If a file is not the same in all of them.
    """
    stamps = ranks.gather([checkpoint.stamps for checkpoint in checkpoints])
    if any(each != stamps[0] for each in stamps):
        raise CheckpointError(
            "`Ranks`: the processes have opened different files, or one was written to as they "
            "began. Give all of them the same inputs, on a disk that each of them sees, and run again."
        )


def require_same_state(ranks: Ranks, state: Mapping[str, Any]) -> None:
    """Refuse ranks that are about to write something else than the first.

    Args:
        ranks: The processes.
        state: What this one is about to write, as plain data; ``inputs`` are the first one's to tell.

    Raises:
        OutputError: If they differ; names what does.
    """
    told = ranks.gather({key: value for key, value in state.items() if key != "inputs"})
    differing = sorted({key for each in told for key in {**told[0], **each} if told[0].get(key) != each.get(key)})
    if differing:
        raise OutputError(
            f"`Ranks`: the processes are about to write different things: `{differing[0]}` is not the same in all. "
            "Give all the same arguments, checkpoints and code, and one kind of processor and one number of threads "
            "(OMP_NUM_THREADS), or run in one process."
        )
