"""Search of a design space: the outer loop of Bayesian model merging ([BMM] section 4.2).

Settings are proposed by Optuna, each is solved and scored, and the study may live in a database that several workers
share and that a later run goes on with::

    space = DesignSpace(make, {"eta": Searched(Range(1e-4, 1, log=True), bmm_groups(vectors.treatments))})
    found = search(space, score, ModelMerges(vectors), trials=60, seed=0)      # score(state_dict) -> a number
    merge_checkpoint(vectors, found.designs, "merged")
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, GridSampler, RandomSampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError, OperationalError
from torch import Tensor

from inference.models.averages import ModelDesigns
from inference.models.digest import Progress, Silent, digest_inputs
from inference.models.method_design import AnyDesign
from inference.models.plan import inputs_of
from inference.search.solves import ModelMerges
from inference.search.space import Choice, DesignSpace, Range, Value
from poe_models.printing import Brief

if TYPE_CHECKING:
    import pandas as pd

Sampler = Literal["gp", "random", "grid"]
"""Gaussian process with expected improvement, as in [BMM]; independent draws; a grid of equal steps."""

Score = Callable[[dict[str, Tensor]], float]
"""Value of a merged model, a state dict, to be made large (or small)."""

_STARTUP = 10
"""Random trials before the Gaussian process proposes."""


class StudyError(ValueError):
    """A study that cannot be searched or gone on with."""


@dataclass(frozen=True)
class SearchTrial:
    """One trial of a search.

    Attributes:
        number: Its number in the study.
        values: Value of each parameter.
        score: Its score; nan if it failed.
        solve_seconds: CPU seconds of the merge, of all threads.
        score_seconds: CPU seconds of the score.
        error: What went wrong; empty if nothing did.
    """

    number: int
    values: Mapping[str, Value]
    score: float
    solve_seconds: float
    score_seconds: float
    error: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class SearchResult(Brief):
    """Result of a search.

    Attributes:
        values: Best value of each parameter.
        score: Its score.
        trials: All trials in order, the failed ones with what went wrong.
        minimize: Whether a smaller score is better.
        overhead_seconds: CPU seconds of this run beside merges and scores: the proposals and the storage.
        designs: The best designs, for ``merge_checkpoint``.
    """

    values: Mapping[str, Value]
    score: float
    trials: tuple[SearchTrial, ...]
    minimize: bool
    overhead_seconds: float
    designs: ModelDesigns[AnyDesign]

    def to_dataframe(self) -> pd.DataFrame:
        """The trials as a table: number, a column for each parameter, score, seconds, error."""
        import pandas as pd

        rows = [
            {
                "trial": trial.number,
                **trial.values,
                "score": trial.score,
                "solve_seconds": trial.solve_seconds,
                "score_seconds": trial.score_seconds,
                "error": trial.error,
            }
            for trial in self.trials
        ]
        return pd.DataFrame(rows)

    def record(self) -> dict[str, Any]:
        """The study as plain data, for the record of a merge."""
        trials = [
            {"number": t.number, "values": dict(t.values), "score": None if math.isnan(t.score) else t.score}
            | ({"error": t.error} if t.error else {})
            for t in self.trials
        ]
        return {"values": dict(self.values), "score": self.score, "trials": trials}


def search(
    space: DesignSpace,
    score: Score,
    merges: ModelMerges,
    *,
    trials: int = 60,
    seed: int = 0,
    sampler: Sampler = "gp",
    minimize: bool = False,
    storage: str | None = None,
    name: str = "poe-merge",
    worker: int = 0,
    scored_by: str = "",
    progress: Progress | None = None,
) -> SearchResult:
    """Choose the settings of a design space by the score of the merged model.

    The first trial is the middle of the space, then come the sampler's. A trial that fails, by a design that cannot be
    solved or a score that is not finite, is recorded with its reason and the search goes on. Interrupted, a study in a
    database is gone on with by the same call.

    Args:
        space: The settings and their ranges.
        score: Maps a state dict, on the CPU and in the compute dtype, to a number.
        merges: Merges of the model; what trials share is kept there.
        trials: Trials of the study in all, those of earlier runs and other workers included.
        seed: Of the proposals.
        sampler: ``"gp"``, ``"random"``, or ``"grid"``, whose number of values per parameter follows from ``trials``.
        minimize: Whether a smaller score is better, as of a negative log-likelihood.
        storage: URL of the database that holds the study, such as ``sqlite:///study.db``; None keeps it in memory.
        name: Name of the study in the database.
        worker: Number of this worker among several on one study, so that they draw different proposals.
        scored_by: What the score is, in words; a study goes on only with the same one.
        progress: Told about every trial.

    Returns:
        The best settings, with all trials.

    Raises:
        StudyError: If the study is one of another space, score or model, the storage cannot be reached, all trials
            failed, or all had the same score.
    """
    progress = progress or Silent()
    if sampler == "grid":
        trials = math.prod(map(len, _grid(space, trials).values()))
    identity = _identity(space, merges, minimize, scored_by)
    began, spent = time.process_time(), [0.0]

    def objective(trial: optuna.Trial) -> float:
        values = {key: _suggested(trial, key, each) for key, each in space.parameters.items()}  # the sampler's work
        started = time.process_time()
        try:
            state = merges.state(space.designs(values))
            solved = time.process_time()
            trial.set_user_attr("solve_seconds", solved - started)
            found = float(score(state))
            trial.set_user_attr("score_seconds", time.process_time() - solved)
        finally:
            spent[0] += time.process_time() - started
        if not math.isfinite(found):
            raise ValueError(f"the score is {found}")
        return found

    def noted(trial: optuna.Trial) -> float:
        try:
            return objective(trial)
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            if isinstance(error, optuna.TrialPruned):  # a failed trial here, which counts
                raise ValueError("pruned") from error
            raise

    with _quiet(), _database(storage, trials) as database:
        study = _opened(space, trials, seed, sampler, minimize, storage, database, name, worker, identity)
        done = len(_finished(study))
        progress.begin("searching", max(trials - done, 0), 0)
        while len(_finished(study)) < trials:
            study.optimize(noted, n_trials=1, catch=(Exception,))
            progress.advance(1, 0)
        overhead = time.process_time() - began - spent[0]
        return _result(study, space, merges, overhead, minimize)


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))


def _suggested(trial: optuna.Trial, key: str, values: Range | Choice) -> Value:
    if isinstance(values, Range):
        return trial.suggest_float(key, values.low, values.high, log=values.log)
    chosen: Value = trial.suggest_categorical(key, values.options)  # type: ignore[assignment]
    return chosen


@contextmanager
def _database(url: str | None, trials: int) -> Iterator[RDBStorage | None]:
    """A database for a study, closed in the end; None keeps the study in memory.

    Args:
        url: Where it is.
        trials: Trials of the study, of which nothing is opened if there are none.

    Yields:
        The database.

    Raises:
        StudyError: If there are no trials, or it cannot be opened.
    """
    if trials < 1:
        raise StudyError(f"`search(trials={trials})`: give at least one.")
    if url is None:
        yield None
        return
    try:
        database = _connected(url)
    except Exception as error:  # of any database driver
        raise _unusable(url, error) from error
    try:
        yield database
    finally:
        database.remove_session()
        database.engine.dispose()


def _connected(url: str) -> RDBStorage:
    """The database, in which another worker may be making tables at the same moment: they are there a little later."""
    for pause in (0.1, 0.3, 1.0):
        try:
            return RDBStorage(url)
        except (IntegrityError, OperationalError):
            time.sleep(pause)
    return RDBStorage(url)


def _unusable(url: str | None, error: Exception) -> StudyError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return StudyError(
        f"the storage {url} cannot be used: {reason}. Give a URL such as sqlite:///study.db of a place that exists, "
        "may be written and has space."
    )


def _opened(
    space: DesignSpace,
    trials: int,
    seed: int,
    sampler: Sampler,
    minimize: bool,
    storage: str | None,
    database: RDBStorage | None,
    name: str,
    worker: int,
    identity: Mapping[str, str],
) -> optuna.Study:
    """The study, made or found again; one of something else is refused."""
    try:
        study = optuna.create_study(
            storage=database,
            study_name=name,
            direction="minimize" if minimize else "maximize",
            load_if_exists=True,
        )
        # Trials are looked for first: another worker writes who the study is before it begins one.
        begun = bool(study.get_trials(deepcopy=False))
        known = study.user_attrs
        for key, value in identity.items():
            turned = key == "score" and _minimizes(study) != minimize
            if turned or known.get(key, None if begun else value) != value:
                raise StudyError(
                    f"the study {name!r} in {storage} is of another {key}. Give the search a name of its own (`name`, "
                    "`--study`) or another storage."
                )
            if key not in known:
                study.set_user_attr(key, value)
    except StudyError:
        raise
    except Exception as error:  # of any database driver
        raise _unusable(storage, error) from error
    study.sampler = _sampler(space, sampler, trials, seed + 1000 * worker + len(study.trials))
    if sampler != "grid" and not study.trials and worker == 0:
        study.enqueue_trial({key: values.grid(1)[0] for key, values in space.parameters.items()})
    return study


def _minimizes(study: optuna.Study) -> bool:
    return study.direction == optuna.study.StudyDirection.MINIMIZE


def _sampler(space: DesignSpace, sampler: Sampler, trials: int, seed: int) -> BaseSampler:
    if sampler == "random":
        return RandomSampler(seed=seed)
    if sampler == "gp":
        return GPSampler(seed=seed, n_startup_trials=_STARTUP, deterministic_objective=True)
    if sampler != "grid":
        raise StudyError(f"`search(sampler={sampler!r})`: known are 'gp', 'random' and 'grid'.")
    return GridSampler(_grid(space, trials), seed=seed)


def _grid(space: DesignSpace, trials: int) -> dict[str, list[Value]]:
    """Values of every parameter, as many of each range as make no more than so many trials."""
    ranges = [values for values in space.parameters.values() if isinstance(values, Range)]
    choices = math.prod(len(v.options) for v in space.parameters.values() if isinstance(v, Choice))
    steps = int((trials / choices) ** (1 / len(ranges)) + 1e-9) if ranges else 1
    if choices > trials or (ranges and steps < 2):
        raise StudyError(
            f"`search(sampler='grid', trials={trials})`: {len(space.parameters)} parameters have more than so many "
            "combinations of two values each. Give more trials, or one value for all modules: `space.shared()`, no "
            "`groups`."
        )
    return {key: values.grid(steps) for key, values in space.parameters.items()}


def _identity(space: DesignSpace, merges: ModelMerges, minimize: bool, scored_by: str) -> dict[str, str]:
    """Checksums of the space, the checkpoints and the score, by which a study is known again."""
    vectors = merges.task_vectors
    middle = {key: values.grid(1)[0] for key, values in space.parameters.items()}
    settings = [middle]
    for key, values in space.parameters.items():
        settings += [{**middle, key: option} for option in values.options] if isinstance(values, Choice) else []
    found = [(name, designs(name)) for designs in map(space.designs, settings) for name in merges.modules]
    inputs = digest_inputs(inputs_of(vectors, [design for _, design in found]), (), Silent())
    fixed = [(name, sorted(design.describe().items())) for name, design in found]
    treated = [(name, str(each), str(each.view)) for name, each in vectors.treatments.items()]
    return {
        "set of checkpoints": _short(str({role: each["sha256"] for role, each in inputs.items()})),
        "design space": _short(f"{space.text()}{fixed}{treated}{vectors.dtype}"),
        "score": _short(f"{'smallest' if minimize else 'largest'} {scored_by}"),
    }


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _result(
    study: optuna.Study, space: DesignSpace, merges: ModelMerges, overhead: float, minimize: bool
) -> SearchResult:
    trials = tuple(
        SearchTrial(
            number=trial.number,
            values=dict(trial.params),
            score=math.nan if trial.value is None else trial.value,
            solve_seconds=trial.user_attrs.get("solve_seconds", math.nan),
            score_seconds=trial.user_attrs.get("score_seconds", math.nan),
            error=trial.user_attrs.get("error", "" if trial.state == TrialState.COMPLETE else "interrupted"),
        )
        for trial in _finished(study)
    )
    scored = [trial for trial in trials if not trial.error]
    if not scored:
        raise StudyError(f"all {len(trials)} trials failed; the first one: {trials[0].error}.")
    if len(scored) > 1 and len({trial.score for trial in scored}) == 1:
        raise StudyError(
            f"all {len(scored)} trials have the score {scored[0].score:g}: it does not depend on what is searched. "
            "Look at the score's use of the merged weights, and at the ranges."
        )
    best = (min if minimize else max)(scored, key=lambda trial: trial.score)
    return SearchResult(
        best.values, best.score, trials, minimize, overhead, merges.complete(space.designs(best.values))
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block Optuna logs nothing; failed trials are in the result."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
