"""Choose a method's scale and anchor precision on validation, with the same small budget for every method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import optuna

from benchmarks.vision.evaluate import Scores

SCALES = (0.05, 2.0)
ETA_HALF_DECADES = (-6, 2)  # 1e-3 to 10: a grid, so that a trial can reuse a merge that is already solved


@dataclass(frozen=True)
class Settings:
    """What is tuned.

    Args:
        scale: Factor on the merged update.
        eta: Relative anchor precision; 0 for methods without an anchor.
    """

    scale: float
    eta: float


@dataclass(frozen=True)
class Trial:
    """One evaluated setting.

    Args:
        settings: The setting.
        scores: Mean validation scores over tasks.
    """

    settings: Settings
    scores: Scores

    @property
    def rank(self) -> tuple[float, float]:
        """The criterion: mean accuracy, ties by the lower NLL."""
        return self.scores.accuracy, -self.scores.nll


def search(
    evaluate: Callable[[Settings], Scores], tuned: tuple[str, ...], trials: int, seed: int
) -> tuple[Trial, list[Trial]]:
    """Try `trials` settings, the first a default, the others proposed by a tree-structured Parzen estimator.

    Args:
        evaluate: Mean validation scores of a setting.
        tuned: `()`, `("scale",)` or `("scale", "eta")`.
        trials: Budget; a method with nothing to tune takes one.
        seed: Of the proposals.

    Returns:
        The best trial and all of them in order.
    """
    if not tuned:
        only = Trial(Settings(1.0, 0.0), evaluate(Settings(1.0, 0.0)))
        return only, [only]
    with_eta = "eta" in tuned
    done: list[Trial] = []

    def objective(trial: optuna.Trial) -> float:
        scale = trial.suggest_float("scale", *SCALES, log=True)
        eta = 10.0 ** (trial.suggest_int("eta_half_decade", *ETA_HALF_DECADES) / 2) if with_eta else 0.0
        done.append(Trial(Settings(scale, eta), evaluate(Settings(scale, eta))))
        # The NLL only breaks ties: one more correct answer in the smallest task weighs 1e-4.
        return done[-1].scores.accuracy - 1e-7 * min(done[-1].scores.nll, 100.0)

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.enqueue_trial({"scale": 1.0, "eta_half_decade": -2} if with_eta else {"scale": 0.3})
        study.optimize(objective, n_trials=trials)
    finally:
        optuna.logging.set_verbosity(verbosity)
    return max(done, key=lambda trial: trial.rank), done
