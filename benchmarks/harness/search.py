"""Choose a method's scaling and anchor precision on validation, with the same small budget for every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import optuna

from benchmarks.harness.evaluate import Scores

SCALINGS = (0.05, 2.0)
ETA_HALF_DECADES = (-6, 2)  # 1e-3 to 10: a grid, so that a trial can reuse a merge that is already solved


@dataclass(frozen=True)
class Settings:
    """What is tuned.

    Args:
        scaling: λ, the factor on the merged update.
        eta: Relative anchor precision; 0 for methods without an anchor.
        own: A parameter that only this method has; None without one.
    """

    scaling: float
    eta: float
    own: float | None = None


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
    evaluate: Callable[[Settings], Scores],
    tuned: tuple[str, ...],
    trials: int,
    seed: int,
    choices: Sequence[float] = (),
    first: Sequence[Settings] = (),
    eta_half_decades: tuple[int, int] = ETA_HALF_DECADES,
    scalings: tuple[float, float] = SCALINGS,
) -> tuple[Trial, list[Trial]]:
    """Try `trials` settings, the first given, the others proposed by a tree-structured Parzen estimator.

    Args:
        evaluate: Mean validation scores of a setting.
        tuned: Which of `"scaling"`, `"eta"` and `"own"`; of the others the very first trial's values are kept.
        trials: Budget; a method with nothing to tune takes one.
        seed: Of the proposals.
        choices: What a method's own parameter may be.
        first: The first trials; by default scaling 0.3, or with a tuned eta scaling 1 and eta 0.1.
        eta_half_decades: Least and largest log10 of eta, times two.
        scalings: Least and largest scaling.

    Returns:
        The best trial and all of them in order.
    """
    if not tuned:
        only = [*first, Settings(1.0, 0.0)][0]
        done = [Trial(only, evaluate(only))]
        return done[0], done
    start = first or [Settings(1.0, 0.1) if "eta" in tuned else Settings(0.3, 0.0)]
    done = []

    def objective(trial: optuna.Trial) -> float:
        settings = Settings(
            trial.suggest_float("scaling", *scalings, log=True) if "scaling" in tuned else start[0].scaling,
            10.0 ** (trial.suggest_int("eta_half_decade", *eta_half_decades) / 2) if "eta" in tuned else start[0].eta,
            trial.suggest_categorical("own", choices) if "own" in tuned else start[0].own,
        )
        done.append(Trial(settings, evaluate(settings)))
        # The NLL only breaks ties: one more correct answer in the smallest task weighs 1e-4.
        return done[-1].scores.accuracy - 1e-7 * min(done[-1].scores.nll, 100.0)

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for settings in start:
            study.enqueue_trial(_proposal(settings, tuned, scalings))
        study.optimize(objective, n_trials=trials)
    finally:
        optuna.logging.set_verbosity(verbosity)
    return max(done, key=lambda trial: trial.rank), done


def _proposal(settings: Settings, tuned: tuple[str, ...], scalings: tuple[float, float]) -> dict[str, float | None]:
    """Settings by the names that the search gives to what is tuned, with the nearest scaling that it may try."""
    half_decade = {"eta_half_decade": round(2 * math.log10(settings.eta))} if "eta" in tuned else {}
    least, most = scalings
    plain = {"scaling": min(max(settings.scaling, least), most), "own": settings.own}
    return {name: value for name, value in plain.items() if name in tuned} | half_decade
