"""The registry's merging rules as the benchmark runs them: what is tuned of each, and where the search begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.harness.calibration import Calibration
from benchmarks.harness.methods import Method
from benchmarks.harness.search import Settings
from poe_models.methods import (
    METHODS,
    AdaMerging,
    Average,
    ConcreteTaskArithmetic,
    Dare,
    DareTies,
    DogeTA,
    FisherMerging,
    GradientMatching,
    IsoCTS,
    KnotsDareTies,
    KnotsTies,
    MergingMethod,
    RegMean,
    TaskArithmetic,
    Ties,
    WeightedDare,
    Wudi,
    WudiAdam,
)


@dataclass(frozen=True)
class Rule:
    """A merging method and what is tuned of it.

    Args:
        method: With the settings of its paper, and a coefficient of 1.
        scaling: λ of the first trial.
        parameter: The field of its own that is tuned, if there is one.
        choices: What that may be; the method's own value is among them.
    """

    method: MergingMethod
    scaling: float = 1.0
    parameter: str = ""
    choices: tuple[float, ...] = ()

    def at(self, settings: Settings) -> Method:
        """The method as a row of a comparison."""
        own = {self.parameter: settings.own} if self.parameter else {}
        title = self.method.about.title
        return Method(title, title, replace(self.method, **own), tuned=("scaling",))  # type: ignore[type-var]

    @property
    def first(self) -> tuple[Settings]:
        """The first trial: the paper's settings."""
        return (Settings(self.scaling, 0.0, getattr(self.method, self.parameter) if self.parameter else None),)

    @property
    def tuned(self) -> tuple[str, ...]:
        """What is searched for; averaging is what it is."""
        if isinstance(self.method, Average):
            return ()
        return ("scaling", "own") if self.parameter else ("scaling",)


def _as_it_stands(name: str) -> Callable[[Calibration], Rule]:
    return lambda _: Rule(METHODS[name]())


DENSITIES = (0.05, 0.1, 0.2, 0.4, 0.7)
DROPS = (0.1, 0.3, 0.5, 0.7, 0.9)
RULES: dict[str, Callable[[Calibration], Rule]] = {name: _as_it_stands(name) for name in METHODS} | {
    "TaskArithmetic": lambda _: Rule(TaskArithmetic(1.0), 0.3),
    "Ties": lambda _: Rule(Ties(), 1.0, "density", DENSITIES),
    "Dare": lambda _: Rule(Dare(scale=1.0), 0.3, "drop", DROPS),
    "DareTies": lambda _: Rule(DareTies(), 1.0, "drop", DROPS),
    "WeightedDare": lambda _: Rule(WeightedDare(normalize=False, density=0.4), 0.3, "density", DENSITIES),
    "KnotsTies": lambda _: Rule(KnotsTies(), 1.0, "density", DENSITIES),
    "KnotsDareTies": lambda _: Rule(KnotsDareTies(), 1.0, "drop", DROPS),
    "IsoCTS": lambda _: Rule(IsoCTS(), 1.0, "common", (0.2, 0.4, 0.6, 0.8, 1.0)),
    "Wudi": lambda _: Rule(Wudi(), 1.0, "rank_tolerance", (1e-5, 1e-3, 1e-2, 3e-2, 1e-1)),
    "WudiAdam": lambda _: Rule(WudiAdam(), 1.0, "learning_rate", (1e-5, 3e-5, 1e-4, 3e-4)),
    "DogeTA": lambda _: Rule(DogeTA(), 1.0, "density", (0.1, 0.3, 0.6, 1.0)),
    "FisherMerging": lambda c: Rule(FisherMerging(c.fisher), 1.0, "floor", (1e-6, 1e-4, 1e-2)),
    "RegMean": lambda c: Rule(RegMean(c.activations), 1.0, "off_diagonal", (0.0, 0.5, 0.9, 1.0)),
    "GradientMatching": lambda c: Rule(GradientMatching(c.fisher), 1.0, "floor", (1e-6, 1e-4, 1e-2, 1.0)),
    "AdaMerging": lambda _: Rule(AdaMerging(steps=200), 1.0, "learning_rate", (1e-3, 1e-2)),
    "ConcreteTaskArithmetic": lambda _: Rule(
        ConcreteTaskArithmetic(steps=200, learning_rate=1e-2), 1.0, "learning_rate", (1e-2, 1e-1)
    ),
}
"""The registry's methods, some with a parameter that is tuned. Those that learn take fewer steps than published."""
