"""Peak memory of a block of code, as the operating system sees it."""

from __future__ import annotations

import ctypes
import gc
import threading
from types import TracebackType

import psutil


class PeakMemory:
    """Highest resident memory of this process while the block runs, above what it was at the start.

    Resident memory is sampled every two milliseconds. Memory that earlier code has freed but the C library still holds
    would hide what the block takes, so it is handed back first where the C library can do that (glibc).

    Attributes:
        mib: The peak in MiB, after the block.
    """

    mib = 0.0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        _return_freed_memory()
        self._process = psutil.Process()
        self._start = self._peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._peak = max(self._peak, self._process.memory_info().rss)
        self.mib = (self._peak - self._start) / 2**20

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self._peak = max(self._peak, self._process.memory_info().rss)


def _return_freed_memory() -> None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return  # another C library
    trim(0)
