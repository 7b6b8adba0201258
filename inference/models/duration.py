"""Time that a merge takes on this machine: its work over rates that are measured in a moment.

What is counted is in :mod:`inference.models.work`. The constants here and there were fitted once to rows of
``benchmarks/results/speed.md``; what depends on the machine is measured.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, thread_time

import torch

from inference.models.digest import nbytes_of
from inference.models.method_design import AnyDesign
from inference.models.plan import Plan, inputs_of
from inference.models.work import Tried, Work, shrunk, tried
from poe_models.weights.task_vectors import TaskVectors

SIDE, ENTRIES, HASHED = 512, 10 * 2**20, 2**21
"""Sizes that rates are measured at: side of the matrices, entries of the copy, bytes that are hashed."""
TRIES = 3
"""Times that each is tried; the fastest counts."""
PASSES = 5.0
"""Passes over an input tensor beside solving: its bytes come from the system, and are converted, subtracted, and
compared with the base's. From the rows of averages in ``benchmarks/results/speed.md``."""
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")
AGAIN = 0.5
"""Share of them for each look of a method at the whole model before it merges: nothing is compared or written."""
START = 0.025
"""Seconds of every merge, however small, on one machine: opening, the plan, the records of the folder."""
PER_TENSOR = 4e-4
"""Seconds for each tensor of the output: its record, and calls of the system."""


@dataclass(frozen=True)
class Rates:
    """Work of each kind that this machine does in a second, with torch's threads as they are, if nothing else uses it.

    Attributes:
        products: Floating-point operations of matrix products in float32.
        solves: Those of a Cholesky factorisation.
        passes: Bytes read and written by a copy into new memory.
        hashed: Bytes of which a checksum is made.
    """

    products: float
    solves: float
    passes: float
    hashed: float

    def seconds(self, work: Work) -> float:
        """Time of some work, its calls not counted."""
        return work.products / self.products + work.solves / self.solves + work.passes / self.passes


def measured_rates(device: torch.device) -> Rates:
    """Measure the rates: the fastest of a few tries each, about a tenth of a second in all."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(SIDE, SIDE, generator=generator).to(device)
    definite = matrix @ matrix.mT + SIDE * torch.eye(SIDE, device=device)
    vector, text = torch.ones(ENTRIES, device=device), bytes(HASHED)

    def rate(amount: float, work: Callable[[], object]) -> float:
        return amount / min(_time(work, device) for _ in range(TRIES))

    return Rates(
        products=rate(2 * SIDE**3, lambda: matrix @ matrix),
        solves=rate(SIDE**3 / 3, lambda: torch.linalg.cholesky(definite)),
        passes=rate(2 * 4 * ENTRIES, vector.clone),
        hashed=HASHED / _time(lambda: hashlib.sha256(text).digest(), torch.device("cpu")),
    )


def _time(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of this thread, which takes part in all that torch's threads do; of the clock, on other devices."""
    clock = thread_time if device.type == "cpu" else perf_counter
    began = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(clock() - began, 1e-9)


def predicted_seconds(task_vectors: TaskVectors, planned: Plan, rates: Rates) -> float | None:
    """Seconds that a merge takes in one process, from headers alone.

    Args:
        task_vectors: Base and experts.
        planned: Its plan.
        rates: Of this machine.

    Returns:
        The time; None where a design needs data or works on modules of given shapes only.
    """
    inputs = sum(nbytes_of(each) for each in inputs_of(task_vectors, planned.designs).values())
    total = START + inputs / rates.hashed + PER_TENSOR * len(planned.tensors)
    trials, reads = _Trials(task_vectors), 1.0
    for batch in planned.batches:
        for shape, count in Counter(shape for tensor in batch.tensors for shape in tensor.matrices).items():
            found = trials.of(batch.tensors[0].design, shape)
            if found is None:
                return None
            work = found.on(shape)
            total += work.calls + count * rates.seconds(work)
            reads = max(reads, 1 + AGAIN * found.reads)
    used = sum(math.prod(t.shape) for t in planned.tensors if t.treatment.action != "base")
    models = 1 + len(task_vectors.names)
    return total + reads * PASSES * 2 * models * used * task_vectors.dtype.itemsize / rates.passes


class _Trials:
    """Trials of designs on small modules, one for designs that differ in numbers and for shapes that are alike."""

    def __init__(self, task_vectors: TaskVectors) -> None:
        self.names, self.dtype = task_vectors.names, task_vectors.dtype
        self.known: dict[tuple[str, int, int], Tried | None] = {}

    def of(self, design: AnyDesign | None, shape: tuple[int, int]) -> Tried | None:
        """The trial for a design and a shape."""
        assert design is not None
        small = shrunk(shape)
        kind = _NUMBER.sub("", json.dumps(design.describe(), sort_keys=True))
        key = (kind, round(math.log2(small[0])), round(math.log2(small[1])))
        if key not in self.known:
            self.known[key] = tried(design, self.names, small, self.dtype)
        return self.known[key]
