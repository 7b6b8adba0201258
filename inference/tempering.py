r"""The posterior's temperature chosen on validation, and the calibration baseline that it has to beat.

A posterior at ``T = 1`` is not calibrated: its energies are in the experts' own units. ``(1 + q / s^2)^(-kappa / T)``
in ``D`` dimensions has a finite integral only if ``2 kappa / T > D``, so the experts hold the merged update by
themselves only below ``T = 2 sum_i kappa_i / D``; above it one samples the anchor. The search goes from there down to
a thousandth of it, where the ensemble is the MAP. In Full coordinates ``D`` counts the directions that experts act on
(thousands); in Span coordinates it is the dimension of the span, at most ``N + 1``, or ``N + 2`` through a merge.

The best temperature of an ensemble depends on how many members it has and on what they are. So all temperatures of a
search are judged with the same number, the chosen members are kept (``Tempering.draws``), and every kind of ensemble
(Gibbs draws, Laplace's, noise) wants a search of its own.

>>> labels = torch.tensor([0, 1, 1])
>>> logits = torch.tensor([[4.0, 0.0], [0.0, 4.0], [4.0, 0.0]], dtype=torch.float64)
>>> round(fit_logit_temperature(logits, labels), 4)               # two thirds right: logit gap log 2 instead of 4
5.7708
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from scipy.optimize import brentq
from torch import Tensor

from inference import scores
from inference.models.model_draws import ModelDraws
from poe_models.energies import StudentT
from poe_models.least_squares import quadratic_of
from poe_models.posterior import Posterior
from poe_models.printing import Brief

COLDEST = 1e-3
"""The lowest temperature of a search as a share of the highest."""
LOGIT_TEMPERATURES = (0.01, 100.0)
"""Where a logit temperature is looked for."""
_LOWEST = torch.finfo(torch.float64).min

Members = TypeVar("Members", bound=Iterable[Any])
"""The draws of an ensemble's members: a list, ``SpanDraws``, ``FullDraws`` and so on."""
PerTask = Tensor | Mapping[str, Tensor]
"""A tensor, or one for each of several tasks, whose scores are averaged."""


@dataclass(frozen=True)
class TemperaturePoint:
    """Scores of the ensemble at one temperature; with several tasks their unweighted means.

    Attributes:
        temperature: Temperature of the posterior.
        nll: Negative log-likelihood of the labels under the members' mean probabilities, nats per example.
        accuracy: Share of correct predictions.
        ece: Expected calibration error over 20 equal-width bins of the largest probability (Naeini et al., 2015).
        num_members: Number of members that were averaged.
    """

    temperature: float
    nll: float
    accuracy: float
    ece: float
    num_members: int


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
    cache: MutableMapping[str, Mapping[str, Tensor]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tempering[Members]:
    """Choose the posterior's temperature by the ensemble's negative log-likelihood on validation.

    A grid over the log temperature, or a walk on it downhill from ``start``, then points halfway to the neighbours of
    the best one, as often as asked for.

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
    search = _Search(sample, predict, _by_task(labels), {} if cache is None else cache, total, progress)
    if start is None:
        search.visit(*grid)
    else:
        search.descend(grid, start)
    for _ in range(refinements):
        step /= 2
        best = search.best.temperature
        search.visit(*(near for near in (best * math.exp(-step), best * math.exp(step)) if low <= near <= high))
    return search.result(low, high)


def fit_logit_temperature(logits: PerTask, labels: PerTask) -> float:
    """The calibration baseline: one number that divides the logits (Guo et al., 2017, arXiv 1706.04599).

    It minimises the mean negative log-likelihood, with several tasks the unweighted mean of the tasks' means. That is
    convex in the inverse of the number, so that the root of the derivative is the minimum.

    Args:
        logits: ``(n, classes)`` on validation, or a dict of these by task; tasks may have different numbers of classes.
            A logit of -inf rules a class out.
        labels: ``(n,)`` integers, or a dict of these by task.

    Returns:
        The logit temperature, between 0.01 (predictions that are all right have no better one) and 100 (logits that say
        less than nothing); 1 if every example's logits are equal, which no temperature changes.

    Raises:
        ValueError: If shapes or tasks do not fit, a logit is NaN or +inf, or one of a label is -inf.
    """
    tables = _labelled_logits(_by_task(logits), _by_task(labels))
    if all(bool((z.isneginf() | (z == z.amax(1, keepdim=True))).all()) for z, _ in tables):
        return 1.0

    def slope(inverse: float) -> float:
        """Derivative of the mean negative log-likelihood in the inverse temperature: expected less observed logit."""
        expected = (((inverse * z).softmax(1) * z.clamp(min=_LOWEST)).sum(1) for z, _ in tables)
        gaps = (float((each - own).mean()) for each, (_, own) in zip(expected, tables, strict=True))
        return sum(gaps) / len(tables)

    coldest, hottest = LOGIT_TEMPERATURES
    if slope(1 / coldest) <= 0:
        return coldest
    if slope(1 / hottest) >= 0:
        return hottest
    return 1 / float(brentq(slope, 1 / hottest, 1 / coldest, xtol=1e-12, rtol=1e-12))


def _labelled_logits(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of every task the logits ``(n, classes)`` and those of the labels ``(n,)``, float64."""
    if not labels or logits.keys() != labels.keys():
        raise ValueError(
            f"`fit_logit_temperature(...)`: logits of {', '.join(logits)}; labels of {', '.join(labels)}. Give both "
            "for the same tasks."
        )
    found = []
    for task, own in labels.items():
        table = logits[task]
        if table.ndim != 2 or own.shape != table.shape[:1] or len(own) == 0:
            raise ValueError(
                f"`fit_logit_temperature(...)`: logits {tuple(table.shape)} and labels {tuple(own.shape)} of {task}; "
                "give (n, classes) and (n,) of validation examples."
            )
        z = table.detach().double().cpu()
        of_label = z.gather(1, own.detach().cpu().long().unsqueeze(1)).squeeze(1)
        if not bool((z.isfinite() | z.isneginf()).all() and of_label.isfinite().all()):
            raise ValueError(
                f"`fit_logit_temperature(...)`: logits of {task} are NaN or +inf, or -inf for a label, which no "
                "temperature mends. Look at the model that gave them, or leave these examples out."
            )
        found.append((z, of_label))
    return found


@dataclass(eq=False)
class _Search(Generic[Members]):
    """The points of a path, each evaluated once, and the members of the best one."""

    sample: Callable[[float], Members]
    predict: Callable[[Any], PerTask]
    labels: Mapping[str, Tensor]
    cache: MutableMapping[str, Mapping[str, Tensor]]
    total: int
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
        total: dict[str, Tensor] = {}
        members = 0
        for draw in draws:
            found = self._member(draw)
            total = {task: torch.logaddexp(total[task], found[task]) for task in found} if total else dict(found)
            members += 1
        self._check_number(members, temperature)
        self.points[temperature] = self._scored(total, members, temperature)
        if self.best.temperature == temperature:
            self.best_draws = [draws]

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

    def _scored(self, total: Mapping[str, Tensor], members: int, temperature: float) -> TemperaturePoint:
        """Scores of the mean of ``members`` whose probabilities sum to ``exp(total)``."""
        mean = {task: values - math.log(members) for task, values in total.items()}
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
        found = {task: _checked(values, self.labels, task) for task, values in _by_task(self.predict(draw)).items()}
        if found.keys() != self.labels.keys():
            raise ValueError(
                f"`temper(predict=...)`: predictions are about {', '.join(found)}; labels about "
                f"{', '.join(self.labels)}. Give both for the same tasks."
            )
        self.evaluations += 1
        if key is not None:
            self.cache[key] = found
        return found


def _by_task(values: PerTask) -> dict[str, Tensor]:
    return {"all": values} if isinstance(values, Tensor) else dict(values)


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
    return values


def _dimension(posterior: Posterior) -> Tensor:
    """Number of directions that experts act on, ``(M,)`` float64."""
    if posterior.span is not None:
        return posterior.span.known.sum(-1).double().cpu()
    size = math.prod(quadratic_of(posterior, for_draws=True).event_shape)
    return torch.full((posterior.num_modules,), float(size), dtype=torch.float64)
