"""The posterior's temperature chosen on validation, by itself or together with a logit temperature.

A posterior at ``T = 1`` is not calibrated: its energies are in the experts' own units. ``(1 + q / s^2)^(-kappa / T)``
in ``D`` dimensions has a finite integral only if ``2 kappa / T > D``, so the experts hold the merged update by
themselves only below ``T = 2 sum_i kappa_i / D``; above it one samples the anchor. The search goes from there down to
a thousandth of it, where the ensemble is the MAP. In Full coordinates ``D`` counts the directions that experts act on
(thousands); in Span coordinates it is the dimension of the span, at most ``N + 1``, or ``N + 2`` through a merge.

The best temperature of an ensemble depends on how many members it has and on what they are. So all temperatures of a
search are judged with the same number, the chosen members are kept (``Tempering.draws``), and every kind of ensemble
(Gibbs draws, Laplace's, noise) wants a search of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from inference import scores
from inference.logit_temperature import PerTask, by_task, fit_ensemble_temperature, scaled_mean
from inference.models.model_draws import ModelDraws
from poe_models.energies import StudentT
from poe_models.least_squares import quadratic_of
from poe_models.posterior import Posterior
from poe_models.printing import Brief
from poe_models.weights.batches import require_classes

COLDEST = 1e-3
"""The lowest temperature of a search as a share of the highest."""
Members = TypeVar("Members", bound=Iterable[Any])
"""The draws of an ensemble's members: a list, ``SpanDraws``, ``FullDraws`` and so on."""


@dataclass(frozen=True)
class TemperaturePoint:
    """Scores of the ensemble at one temperature; with several tasks their unweighted means.

    Attributes:
        temperature: Temperature of the posterior.
        nll: Negative log-likelihood of the labels under the members' mean probabilities, nats per example.
        accuracy: Share of correct predictions.
        ece: Expected calibration error over 20 equal-width bins of the largest probability (Naeini et al., 2015).
        num_members: Number of members that were averaged.
        logit_temperature: What every member's logits were divided by, before the scores above; 1 if nothing was.
    """

    temperature: float
    nll: float
    accuracy: float
    ece: float
    num_members: int
    logit_temperature: float = 1.0


@dataclass(frozen=True, eq=False, repr=False)
class Tempering(Brief, Generic[Members]):
    """The whole path of a search.

    Attributes:
        temperature: The one with the lowest validation NLL.
        draws: What ``sample`` gave there, the members that were judged: make the final ensemble of these.
        path: Every temperature that was tried, ascending.
        status: What to make of it, in words.
        num_evaluations: Members that were evaluated, those from the cache not counted.
    """

    temperature: float
    draws: Members
    path: tuple[TemperaturePoint, ...]
    status: str
    num_evaluations: int

    @property
    def best(self) -> TemperaturePoint:
        """The chosen point of the path."""
        return next(point for point in self.path if point.temperature == self.temperature)


def temperature_range(posterior: Posterior) -> tuple[float, float]:
    r"""Range in which to look for a temperature: from a thousandth of ``2 sum_i kappa_i / D`` up to it.

    ``kappa_i = a_i k`` for Cauchy and Student-t. For other energies it is ``a_i rho(q_i(0) / s_i^2)``, what the expert
    pays if nothing is merged: there the thermal energy ``D T / 2`` (equipartition, for a quadratic energy) is as large
    as that of leaving the model at the base. Experts with a zero update do not count.

    The posterior's own temperature does not matter. The range is over all modules.

    Raises:
        ValueError: If no expert has anything to say.
    """
    at_zero = posterior.residuals(posterior.like.new_zeros(posterior.num_modules, *posterior.event_shape))
    strengths = []
    for i, expert in enumerate(posterior.experts):
        if isinstance(expert.rho, StudentT):
            strength = torch.as_tensor(expert.importance * expert.rho.k, dtype=torch.float64)
        else:
            strength = expert.energy_of(at_zero[..., i])
        strengths.append(torch.where(expert.active.cpu(), strength.cpu(), 0.0))
    total, dimension = torch.stack(strengths).sum(0), _dimension(posterior)
    told = (total > 0) & (dimension > 0)
    if not bool(told.any()):
        raise ValueError(
            "`temperature_range(...)`: every update is zero, so that there is nothing to be uncertain about."
        )
    highest = 2 * total[told] / dimension[told]
    return COLDEST * float(highest.min()), float(highest.max())


def temper(
    sample: Callable[[float], Members],
    predict: Callable[[Any], PerTask],
    labels: PerTask,
    temperatures: tuple[float, float],
    *,
    num_temperatures: int = 10,
    refinements: int = 1,
    start: float | None = None,
    scale_logits: bool = False,
    cache: MutableMapping[str, Mapping[str, Tensor]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tempering[Members]:
    """Choose the posterior's temperature by the ensemble's negative log-likelihood on validation.

    A grid over the log temperature, or a walk on it downhill from ``start``, then points halfway to the neighbours of
    the best one, as often as asked for.

    An ensemble is compared with a point estimate of scaled logits on equal terms only if its own logits may be scaled,
    and then the best temperature of the posterior is lower: a choice without scaling lets the draws do what one
    divisor does. ``scale_logits`` chooses both together.

    Args:
        sample: Maps a temperature to the draws of the members, for instance ``lambda t: SpanDraws.of(gibbs(
            replace(posterior, temperature=t), ...), posterior).thinned(10)``: as many as the final ensemble is to have.
            The same seed at every temperature makes the path smoother.
        predict: Maps a draw to the log probabilities of its member on validation, ``(n, classes)``, or to a dict of
            these by task; ``MergedEnsemble.predictor`` makes such functions.
        labels: ``(n,)`` integers, or a dict of these by task.
        temperatures: The lowest and the highest, as ``temperature_range`` gives them.
        num_temperatures: Size of the grid.
        refinements: Refinements of the grid around the best point.
        start: Where to walk from to a local minimum, for instance the best temperature of a cheaper ensemble of the
            same kind.
        scale_logits: Whether to divide every member's logits by the number that is best at each temperature
            (``fit_ensemble_temperature``), and to compare temperatures with their logits so divided.
        cache: Evaluated members by the digest of their draw; hand the same dict to several searches with the same
            ``predict``. The digest knows nothing of λ, of what is not sampled, or of the data.
        progress: Called with the number of finished temperatures and the most that there can be.

    Returns:
        The chosen temperature with its members and the whole path. The final ensemble is
        ``MergedEnsemble(task_vectors, design, found.draws)``.

    Raises:
        ValueError: If the range is empty, there are no members or not everywhere the same number, they can be iterated
            once only, or a prediction is no table of log probabilities.
    """
    low, high = temperatures
    if not 0 < low < high < math.inf or num_temperatures < 2 or refinements < 0:
        raise ValueError(
            f"`temper(temperatures=({low:g}, {high:g}), num_temperatures={num_temperatures}, "
            f"refinements={refinements})`: give 0 < lowest < highest, at least 2 temperatures, and 0 or more "
            "refinements."
        )
    if start is not None and not 0 < start < math.inf:
        raise ValueError(f"`temper(start={start:g})`: give a temperature, positive and finite.")
    step = math.log(high / low) / (num_temperatures - 1)
    grid = [*(low * math.exp(index * step) for index in range(num_temperatures - 1)), high]
    total = num_temperatures + 2 * refinements
    kept = {} if cache is None else cache
    search = _Search(sample, predict, by_task(labels), kept, total, scale_logits, progress)
    if start is None:
        search.visit(*grid)
    else:
        search.descend(grid, start)
    for _ in range(refinements):
        step /= 2
        best = search.best.temperature
        search.visit(*(near for near in (best * math.exp(-step), best * math.exp(step)) if low <= near <= high))
    return search.result(low, high)


@dataclass(eq=False)
class _Search(Generic[Members]):
    """The points of a path, each evaluated once, and the members of the best one."""

    sample: Callable[[float], Members]
    predict: Callable[[Any], PerTask]
    labels: Mapping[str, Tensor]
    cache: MutableMapping[str, Mapping[str, Tensor]]
    total: int
    scale_logits: bool
    progress: Callable[[int, int], None] | None
    points: dict[float, TemperaturePoint] = field(default_factory=dict)
    best_draws: list[Members] = field(default_factory=list)
    evaluations: int = 0

    @property
    def best(self) -> TemperaturePoint:
        return min(self.points.values(), key=lambda point: (point.nll, point.temperature))

    def visit(self, *temperatures: float) -> None:
        """Sample and score temperatures that have not been tried."""
        for temperature in temperatures:
            if temperature not in self.points:
                self._try(temperature)
                if self.progress is not None:
                    self.progress(len(self.points), self.total)

    def descend(self, grid: Sequence[float], start: float) -> None:
        """Try the grid's points outwards from the one nearest to ``start`` until both neighbours of the best are."""
        place = min(range(len(grid)), key=lambda index: abs(math.log(grid[index] / start)))
        while True:
            self.visit(*grid[max(place - 1, 0) : place + 2])
            best = grid.index(self.best.temperature)
            if best == place:
                return
            place = best

    def _try(self, temperature: float) -> None:
        draws = self.sample(temperature)
        if isinstance(draws, Iterator):
            raise ValueError(
                f"`temper(sample=...)`: it gave a {type(draws).__name__}, which can be iterated once only, so that the "
                "chosen members could not be kept. Return the draws themselves, or a list."
            )
        if self.scale_logits:
            tables = [self._member(draw) for draw in draws]
            self._check_number(len(tables), temperature)
            self.points[temperature] = self._scaled(tables, temperature)
        else:
            self.points[temperature] = self._averaged(draws, temperature)
        if self.best.temperature == temperature:
            self.best_draws = [draws]

    def _averaged(self, draws: Iterable[Any], temperature: float) -> TemperaturePoint:
        """Scores of the members' mean; they are added up one by one."""
        total: dict[str, Tensor] = {}
        members = 0
        for draw in draws:
            found = self._member(draw)
            total = {task: torch.logaddexp(total[task], found[task]) for task in found} if total else dict(found)
            members += 1
        self._check_number(members, temperature)
        mean = {task: values - math.log(members) for task, values in total.items()}
        return self._scored(mean, members, temperature)

    def _scaled(self, tables: Sequence[Mapping[str, Tensor]], temperature: float) -> TemperaturePoint:
        """Scores of the members' mean at the logit temperature that is best for it."""
        stacked = {task: torch.stack([table[task] for table in tables]) for task in self.labels}
        divisor = fit_ensemble_temperature(stacked, self.labels)
        mean = {task: scaled_mean(values, divisor) for task, values in stacked.items()}
        return replace(self._scored(mean, len(tables), temperature), logit_temperature=divisor)

    def result(self, low: float, high: float) -> Tempering[Members]:
        path = tuple(self.points[temperature] for temperature in sorted(self.points))
        best = self.best.temperature
        status = "the best temperature is inside the range"
        if best <= low:
            status = "the lowest temperature is the best: no ensemble here is better than a point estimate"
        elif best >= high:
            status = "the highest temperature is the best: look further up, or use energies that hold the update there"
        return Tempering(best, self.best_draws[0], path, status, self.evaluations)

    def _check_number(self, members: int, temperature: float) -> None:
        if members == 0:
            raise ValueError(f"`temper(sample=...)`: no members at temperature {temperature:g}. Return some draws.")
        others = {point.num_members for point in self.points.values()} - {members}
        if others:
            raise ValueError(
                f"`temper(sample=...)`: {members} members at temperature {temperature:g}, {others.pop()} at another. "
                "Larger ensembles are better at higher temperatures: return the same number at every temperature."
            )

    def _scored(self, mean: Mapping[str, Tensor], members: int, temperature: float) -> TemperaturePoint:
        """Scores of the log of the mean probabilities of ``members``."""
        pairs = [(mean[task], labels.detach().cpu()) for task, labels in self.labels.items()]
        nll = sum(scores.nll(values, labels) for values, labels in pairs) / len(pairs)
        accuracy, ece = (
            sum(score(values.exp(), labels) for values, labels in pairs) / len(pairs)
            for score in (scores.accuracy, scores.ece)
        )
        return TemperaturePoint(temperature, nll, accuracy, ece, members)

    def _member(self, draw: object) -> Mapping[str, Tensor]:
        key = _key(draw)
        if key is not None and key in self.cache:
            return self.cache[key]
        found = {task: _checked(values, self.labels, task) for task, values in by_task(self.predict(draw)).items()}
        if found.keys() != self.labels.keys():
            raise ValueError(
                f"`temper(predict=...)`: predictions are about {', '.join(found)}; labels about "
                f"{', '.join(self.labels)}. Give both for the same tasks."
            )
        self.evaluations += 1
        if key is not None:
            self.cache[key] = found
        return found


def _key(draw: object) -> str | None:
    """Digest of a draw; None for an object of unknown kind, which is not cached."""
    if isinstance(draw, ModelDraws):
        return draw.digest()
    if isinstance(draw, Tensor):
        values = draw.detach().cpu().contiguous()
        return hashlib.sha256(f"{values.dtype}{tuple(values.shape)}".encode() + values.numpy().tobytes()).hexdigest()
    return None


def _checked(log_probabilities: Tensor, labels: Mapping[str, Tensor], task: str) -> Tensor:
    values = log_probabilities.detach().double().cpu()
    count = len(labels[task]) if task in labels else len(values)
    if values.ndim != 2 or len(values) != count or not bool((values.exp().sum(1) - 1).abs().max() < 1e-3):
        raise ValueError(
            f"`temper(predict=...)`: expected log probabilities ({count}, classes) whose exponentials sum to 1 in each "
            f"row, got {tuple(values.shape)}. Return `logits.log_softmax(-1)`."
        )
    if task in labels:
        require_classes(labels[task], values.shape[1], f"`temper(labels=...)`, {task}")
    return values


def _dimension(posterior: Posterior) -> Tensor:
    """Number of directions that experts act on, ``(M,)`` float64."""
    if posterior.span is not None:
        return posterior.span.known.sum(-1).double().cpu()
    size = math.prod(quadratic_of(posterior, for_draws=True).event_shape)
    return torch.full((posterior.num_modules,), float(size), dtype=torch.float64)
