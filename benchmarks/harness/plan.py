"""What a demo does and how much of it, and merges that are solved once for all of their scalings."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.evaluate import Scores
from benchmarks.harness.memory import PeakMemory
from benchmarks.harness.methods import METHODS, Loaded, Merge, Method, solve
from benchmarks.harness.outcomes import Budget
from benchmarks.harness.search import Settings, Trial, search
from benchmarks.harness.suite import Suite

ETA = 0.1
"""Anchor precision of plans that do not choose it."""


@dataclass(frozen=True)
class Plan:
    """What a demo does and how much of it.

    Args:
        methods: What to compare: task arithmetic and at least one product of experts among them.
        trials: Settings each method may try on validation.
        scalings: Each λ to try, as many as `trials`, all at the first trial's anchor precision; if there are none, a
            search proposes λ and anchor precision.
        validation: Most validation examples of a task; None for all.
        test: Most test examples of a task; None for all.
        budget: How much is drawn for ensembles.
        examples: Unlabelled training examples of each task for experts on predictions; 0 for none.
    """

    methods: tuple[Method, ...] = METHODS
    trials: int = 8
    scalings: tuple[float, ...] = ()
    validation: int | None = None
    test: int | None = None
    budget: Budget = Budget()
    examples: int = 0

    def search(self, method: Method, validation: Callable[[Settings], Scores], seed: int) -> Trial:
        """The best of the settings that a method may try.

        Args:
            method: The method.
            validation: Mean validation scores of a setting.
            seed: Of the proposals.
        """
        if not self.scalings or not method.tuned:
            return search(validation, method.tuned, self.trials, seed)[0]
        eta = ETA if "eta" in method.tuned else 0.0
        first = [Settings(scaling, eta) for scaling in self.scalings[: self.trials]]
        bounds = (min(self.scalings), max(self.scalings))
        return search(validation, ("scaling",), len(first), seed, first=first, scalings=bounds)[0]

    def note(self, suite: Suite) -> str:
        """The budget, in words.

        Args:
            suite: What it was spent on, with the plan's examples only.
        """
        validation, test = (
            " to ".join(dict.fromkeys(str(n) for n in (min(sizes), max(sizes))))
            for sizes in ([len(each) for each in suite.labels(split).values()] for split in ("validation", "test"))
        )
        chosen = (
            f"λ among {', '.join(f'{scaling:g}' for scaling in self.scalings)}, η = {ETA:g}"
            if self.scalings
            else "λ and η"
        )
        drawn = self.budget
        walked = f"walks on {drawn.walk_temperatures} temperatures ({', '.join(drawn.everywhere)})"
        return (
            f"The budget: {self.trials} settings for each method ({chosen}) on {validation} validation examples a "
            f"task, judged on {test} test examples a task; {drawn.members} members of every ensemble, "
            f"{drawn.temperatures} temperatures of the last layer refined {drawn.refinements} time(s); all layers are "
            f"{f'sampled in {walked}' if drawn.everywhere else 'not sampled together'}."
        )


@dataclass(frozen=True, eq=False)
class Solved:
    """A merge and what it took, with the updates in memory.

    Args:
        merge: The merge.
        seconds: Of the solve.
        mib: Its peak memory beside the updates.
    """

    merge: Merge
    seconds: float
    mib: float


class Merges:
    """Merges of a suite, each solved once while its family is compared.

    Args:
        vectors: The updates, read once.
    """

    def __init__(self, vectors: Loaded) -> None:
        self.vectors, self._family = vectors, ""
        _ = vectors.modules, vectors.base, vectors.averages, vectors.others  # so that no solve has to read them
        self._solved: dict[tuple[Any, ...], Solved] = {}

    def of(self, method: Method, eta: float) -> Solved:
        """The merge of a method at an anchor precision; methods that differ by name alone share it."""
        if method.family != self._family:
            self._solved, self._family = {}, method.family
        key = (method.rule, method.residual_map, method.energy, eta)
        if key not in self._solved:
            with PeakMemory() as memory:
                started = time.perf_counter()
                merge = solve(method, self.vectors, eta)
                seconds = time.perf_counter() - started
            self._solved[key] = Solved(merge, seconds, memory.mib)
        return self._solved[key]
