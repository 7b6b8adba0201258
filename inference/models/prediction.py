"""Predictions of ensembles: mean class probabilities, or mean and spread of values; members one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.models.member_tensors import MemberTensors
from inference.models.model_draws import ModelDraws
from inference.models.predictor import Runner
from poe_models.printing import Brief

Progress = Callable[[int, int], None] | None
"""Called with the number of finished members and their total."""


@dataclass(frozen=True, eq=False, repr=False)
class Prediction(Brief):
    """Prediction of an ensemble for ``n`` examples.

    Attributes:
        probabilities: Mean of the members' class probabilities, ``(n, classes)`` float64.
        entropy: Entropy of the mean in nats, ``(n,)``: total uncertainty.
        mutual_information: Between class and member in nats, ``(n,)``: the entropy of the mean less the mean entropy,
            that is how much the members disagree (Houlsby et al., 2011, arXiv 1112.5745).
        num_members: How many members.
        reused: The submodule before which features were computed once; None if every member ran in full.
        labels: The batches' own labels of these examples, ``(n,)``; None where they have none.
    """

    probabilities: Tensor
    entropy: Tensor
    mutual_information: Tensor
    num_members: int
    reused: str | None
    labels: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class ValuePrediction(Brief):
    """Values that an ensemble predicts for ``n`` examples: regressions, embeddings, scores.

    Attributes:
        mean: Mean over members, ``(n, *shape)`` float64.
        standard_deviation: Between members, ``(n, *shape)``: how much they disagree. The sum of squares is divided by
            the number of members, so that one member has none.
        num_members: How many members.
        reused: The submodule before which features were computed once; None if every member ran in full.
    """

    mean: Tensor
    standard_deviation: Tensor
    num_members: int
    reused: str | None


class MemberPredictor:
    """Outputs of one member after another, log probabilities by default; see ``MergedEnsemble.predictor``."""

    def __init__(self, tensors: MemberTensors, runner: Runner, prefix: str) -> None:
        self._tensors, self._runner, self._prefix = tensors, runner, prefix

    @property
    def reused(self) -> str | None:
        """The submodule before which features are computed once; None where every member runs in full."""
        return self._runner.reused

    @property
    def labels(self) -> Tensor | None:
        """Labels of the rows of the last member, ``(n,)``; None where the batches have none."""
        return self._runner.labels

    @property
    def examples(self) -> Tensor:
        """Number of the example that each row of the last member belongs to, ``(n,)``: of several tokens the same."""
        return self._runner.examples

    def __call__(self, draw: ModelDraws) -> Tensor:
        """Log probabilities of one member, ``(n, classes)`` float64 on the CPU, or what is kept of them.

        Args:
            draw: One draw of the ensemble's modules, its own or from another temperature.

        Raises:
            ValueError: If it is not one draw of these modules, or the model's output cannot be read.
        """
        self._tensors.check_draw(draw)
        tied_names = self._tensors.base.tied_names
        sampled = self._tensors.all_sampled(draw)
        return self._runner({self._prefix + name: value for key, value in sampled.items() for name in tied_names(key)})


def predicted_classes(predictor: MemberPredictor, draws: ModelDraws, progress: Progress) -> Prediction:
    """Mean class probabilities over draws, and how much their members disagree."""
    total, entropies = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for rows in _rows(predictor, draws, progress):
        probabilities = rows.exp()
        total = total + probabilities
        entropies = entropies + torch.special.entr(probabilities).sum(-1)
    mean = total / len(draws)
    entropy = torch.special.entr(mean).sum(-1)
    disagreement = (entropy - entropies / len(draws)).clamp(min=0)  # below zero only by rounding
    return Prediction(mean, entropy, disagreement, len(draws), predictor.reused, predictor.labels)


def predicted_values(predictor: MemberPredictor, draws: ModelDraws, progress: Progress) -> ValuePrediction:
    """Mean and standard deviation over draws, updated member by member (Welford, 1962)."""
    mean, squares = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for done, values in enumerate(_rows(predictor, draws, progress), 1):
        away = values - mean
        mean = mean + away / done
        squares = squares + away * (values - mean)
    return ValuePrediction(mean, (squares / len(draws)).sqrt(), len(draws), predictor.reused)


def scored(predictor: MemberPredictor, draws: ModelDraws, progress: Progress) -> Tensor:
    """Numbers that the predictor keeps of every example and member, ``(members, n, ...)``."""
    return torch.stack(list(_rows(predictor, draws, progress)))


def _rows(predictor: MemberPredictor, draws: ModelDraws, progress: Progress) -> Iterator[Tensor]:
    # Rows of one member after another, (n, ...); a member counts as done when the next is asked for.
    for done, draw in enumerate(draws, 1):
        yield predictor(draw)
        if progress is not None:
            progress(done, len(draws))
