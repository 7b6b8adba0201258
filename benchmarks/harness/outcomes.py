"""What is drawn around a merge, how much of it, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from benchmarks.harness.evaluate import Scores, mean_scores
from diagnostics.estimates import Estimate
from inference.models.model_draws import FullDraws
from inference.tempering import Tempering

SCOPES = (ALL, LAST) = ("all layers", "last layer")
SCALED = ", scaled logits"
MAP = "MAP"
SCALED_MAP = MAP + SCALED
KINDS = (GIBBS, LAPLACE, TWIN, NOISE) = ("Gibbs", "Laplace", "Gaussian twin, Gibbs", "white noise")


@dataclass(frozen=True)
class Budget:
    """How much is drawn. In Full coordinates temperatures are small: mixture weights hardly move, and a few steps mix.

    Args:
        members: Of every ensemble, at every temperature that is tried on validation and in the end; 10 in [BMM].
        temperatures: Size of the last layer's grid of temperatures.
        refinements: How often that grid is refined around its best point.
        walk_temperatures: Size of all layers' grid, on which the searches walk.
        everywhere: Kinds that are drawn in all layers; where the first is best, the others' searches start.
        last: Kinds that are drawn in the last layer.
        warmup: Gibbs steps before the first member.
        thin: Gibbs steps between members.
    """

    members: int = 10
    temperatures: int = 4
    refinements: int = 1
    walk_temperatures: int = 10
    everywhere: tuple[str, ...] = KINDS
    last: tuple[str, ...] = KINDS
    warmup: int = 5
    thin: int = 1

    def kinds(self, scope: str) -> tuple[str, ...]:
        """What is drawn in these layers."""
        return self.last if scope == LAST else self.everywhere


@dataclass(frozen=True, eq=False)
class Search:
    """Searches over temperatures of one kind of ensemble, which share their draws.

    Args:
        plain: The chosen temperature and the path, logits as they are.
        scaled: The same, chosen together with a logit temperature.
        probabilities: Temperature of the plain path -> task -> (n, classes), the members' mean on validation.
    """

    plain: Tempering[FullDraws]
    scaled: Tempering[FullDraws]
    probabilities: Mapping[float, Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Outcome:
    """One way to predict, on the test images.

    Args:
        name: What the members are, or which point estimate it is.
        probabilities: Task -> (n, classes), the members' mean.
        scores: Task -> scores.
        scope: Which layers differ between members; empty for a point estimate.
        temperature: Of the posterior; None for a point estimate.
        logit_temperature: What the logits were divided by, those of every member.
        tempering: The search over temperatures; None for a point estimate.
        validation: Temperature -> task -> (n, classes) along that search; empty where logits are scaled.
        differences: Score -> mean over tasks minus the MAP's, with a paired bootstrap interval. The intervals of one
            score hold for all rows together.
        nll_from_scaled: Mean NLL minus that of the MAP with scaled logits, by intervals that hold for all ensembles
            together; None for a point estimate.
        distance: Of the members' centre from the MAP, in standard deviations of the draws, in the farthest module;
            None for a point estimate.
    """

    name: str
    probabilities: Mapping[str, Tensor]
    scores: Mapping[str, Scores]
    scope: str = ""
    temperature: float | None = None
    logit_temperature: float = 1.0
    tempering: Tempering[FullDraws] | None = None
    validation: Mapping[float, Mapping[str, Tensor]] = field(default_factory=dict)
    differences: Mapping[str, Estimate] = field(default_factory=dict)
    nll_from_scaled: Estimate | None = None
    distance: float | None = None

    @property
    def kind(self) -> str:
        """What the members are, whether their logits are scaled or not."""
        return self.name.removesuffix(SCALED)

    @property
    def label(self) -> str:
        """Name and scope."""
        return f"{self.name}, {self.scope}" if self.scope else self.name

    @property
    def mean(self) -> Scores:
        """Unweighted mean over tasks."""
        return mean_scores(self.scores)
