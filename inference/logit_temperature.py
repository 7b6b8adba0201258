r"""Numbers that divide logits: the calibration baseline of a point estimate, and the same for an ensemble.

>>> labels = torch.tensor([0, 1, 1])
>>> logits = torch.tensor([[4.0, 0.0], [0.0, 4.0], [4.0, 0.0]], dtype=torch.float64)
>>> round(fit_logit_temperature(logits, labels), 4)               # two thirds right: logit gap log 2 instead of 4
5.7708
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from poe_models.weights.batches import require_classes

LOGIT_TEMPERATURES = (0.01, 100.0)
"""Range in which a logit temperature is looked for."""
_LOWEST = torch.finfo(torch.float64).min
_GRID = 24
"""Steps of the grid of logit temperatures of an ensemble, a factor of 1.5 each."""
PerTask = Tensor | Mapping[str, Tensor]
"""A tensor, or one for each of several tasks, whose scores are averaged."""


def by_task(values: PerTask) -> dict[str, Tensor]:
    """Tables by task; one without a task is called "all"."""
    return {"all": values} if isinstance(values, Tensor) else dict(values)


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
        ValueError: If shapes, labels or tasks do not fit, a logit is NaN or +inf, or one of a label is -inf.
    """
    tables = _labelled_logits(by_task(logits), by_task(labels))
    if all(_says_nothing(z) for z, _ in tables):
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
    from scipy.optimize import brentq  # which takes half a second to import, for every command

    return 1 / float(brentq(slope, 1 / hottest, 1 / coldest, xtol=1e-12, rtol=1e-12))


def fit_ensemble_temperature(members: PerTask, labels: PerTask) -> float:
    r"""One number that divides the logits of every member of an ensemble before their probabilities are averaged.

    It minimises ``-mean log((1/S) sum_s softmax(f_s / tau)[label])``, with several tasks the unweighted mean of the
    tasks' means. Of one member that is ``fit_logit_temperature``; of several it need not be convex, so the best of a
    grid over ``log tau`` is refined between its neighbours.

    Args:
        members: Logits or log probabilities ``(S, n, classes)`` on validation, or a dict of these by task.
        labels: ``(n,)`` integers, or a dict of these by task.

    Returns:
        The logit temperature, between 0.01 and 100; 1 if every example's logits are equal, which none changes.

    Raises:
        ValueError: If shapes or tasks do not fit, a logit is NaN or +inf, or one of a label is -inf.
    """
    tables = {task: table.flatten(0, -2) for task, table in by_task(members).items()}
    own = by_task(labels)
    counts = {task: len(tables[task]) // max(1, len(own[task])) for task in own if task in tables}
    repeated = {task: each.repeat(counts.get(task, 1)) for task, each in own.items()}
    flat = _labelled_logits(tables, repeated)
    if all(_says_nothing(z) for z, _ in flat):
        return 1.0
    stacked = [(z, right.view(count, -1)) for (z, right), count in zip(flat, counts.values(), strict=True)]

    def nll(log_temperature: float) -> float:
        """Mean negative log-likelihood of the scaled members' mean."""
        found = 0.0
        for z, right in stacked:
            scaled = z * math.exp(-log_temperature)
            own = right * math.exp(-log_temperature) - scaled.logsumexp(-1).view(right.shape)
            found += math.log(len(right)) - float(own.logsumexp(0).mean())
        return found / len(stacked)

    low, high = (math.log(bound) for bound in LOGIT_TEMPERATURES)
    from scipy.optimize import minimize_scalar  # see above

    grid = [low + (high - low) * i / _GRID for i in range(_GRID + 1)]
    best = min(range(len(grid)), key=lambda i: nll(grid[i]))
    around = (grid[max(best - 1, 0)], grid[min(best + 1, _GRID)])
    found = float(minimize_scalar(nll, bounds=around, method="bounded", options={"xatol": 1e-8}).x)
    return math.exp(min(found, grid[best], key=nll))


def scaled_mean(members: Tensor, logit_temperature: float) -> Tensor:
    """Log of the mean over members of their probabilities with divided logits.

    Args:
        members: Logits or log probabilities ``(S, n, classes)``.
        logit_temperature: What divides them.

    Returns:
        ``(n, classes)`` float64.
    """
    scaled = (members.double() / logit_temperature).log_softmax(-1)
    return scaled.logsumexp(0) - math.log(len(members))


def _says_nothing(logits: Tensor) -> bool:
    """Return whether the logits of every example ``(n, classes)`` are equal, but for classes that are ruled out."""
    return bool((logits.isneginf() | (logits == logits.amax(1, keepdim=True))).all())


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
        require_classes(own, table.shape[1], f"`fit_logit_temperature(labels=...)`, {task}")
        z = table.detach().double().cpu()
        of_label = z.gather(1, own.detach().cpu().long().unsqueeze(1)).squeeze(1)
        if not bool((z.isfinite() | z.isneginf()).all() and of_label.isfinite().all()):
            raise ValueError(
                f"`fit_logit_temperature(...)`: logits of {task} are NaN or +inf, or -inf for a label, which no "
                "temperature mends. Look at the model that gave them, or leave these examples out."
            )
        found.append((z, of_label))
    return found
