"""Peak memory of a block of code, as the operating system sees it."""

from __future__ import annotations

import ctypes
import gc
import re
import threading
from pathlib import Path
from types import TracebackType

import psutil
from typing_extensions import override


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


class Anonymous(threading.Thread):
    """Watches the anonymous memory of this process; what is mapped from files does not count."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.done = threading.Event()

    @staticmethod
    def now() -> int:
        """Bytes."""
        found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
        assert found is not None
        return 1024 * int(found[1])

    @override
    def run(self) -> None:
        """Look every few milliseconds."""
        while not self.done.wait(0.003):
            self.peak = max(self.peak, self.now())


def _return_freed_memory() -> None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return  # another C library
    trim(0)
