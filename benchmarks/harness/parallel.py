"""Work side by side: one Python thread a core, one torch thread in each.

torch's own threads wait for each other after every operation by spinning. On a machine that is busy with something
else that made training over twenty times slower here; independent threads only share what is left. And sums do not
depend on the number of cores.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """How many threads to use: `OMP_NUM_THREADS` if it is set, else the cores this process may run on."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: torch.device | None = None) -> str:
    """The machine in words.

    Args:
        device: Where the work was done; default the CPU.
    """
    processors = f"{cores()} {'core' if cores() == 1 else 'cores'} of a {platform.machine()} CPU"
    if device is None or device.type == "cpu":
        return processors
    return f"one {torch.cuda.get_device_name(device)} GPU and {processors}"


def run_all(
    function: Callable[[Item], Result], items: Iterable[Item], stop: threading.Event | None = None
) -> list[Result]:
    """Results of `function` on every item, in order.

    Args:
        function: Must not change what it shares with others.
        items: What to work on.
        stop: Set when one call failed or the caller was interrupted, for `function` to look at; those that have not
            begun are dropped.

    Returns:
        One result for each item.
    """
    _initialise_linear_algebra()
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that begin from now on start with this, too
    pool = ThreadPoolExecutor(cores())
    try:
        return [future.result() for future in [pool.submit(function, item) for item in items]]
    except BaseException:
        if stop is not None:
            stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _initialise_linear_algebra() -> None:
    """Load torch's linear algebra on the GPU in this thread: loading it in two threads at once fails."""
    if torch.cuda.is_initialized():
        torch.linalg.inv(torch.ones(1, 1, device="cuda"))
