"""``poe-merge search``: a configuration whose parameters may be ranges, and the merge with the best of their values.

::

    parameters:
      energy: Gaussian()
      residual_map: {choices: [InputGram, OutputGram]}
      eta: {low: 1e-4, high: 1, log: true, groups: bmm, blocks: 3}    # one for each role and block of layers
      scaling: {low: 1.0, high: 1.3, groups: blocks, blocks: 3}
      anchor: "Ties(density=0.2)"

``groups`` is ``bmm``, ``blocks`` (of consecutive layers), or a mapping of names to regular expressions; without it all
tensors share one value. ``as: Mixed(activations, share=$)`` writes a number into a text, at the ``$``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator
from typing_extensions import override

from inference.models.ranks import ALONE, Ranks
from poe_merge.config import MergeConfig, Parameters, parse_config
from poe_merge.sections import Section, validated
from poe_merge.settings import ConfigError, Document, Place

if TYPE_CHECKING:
    from inference.models.digest import Progress
    from inference.models.merge import MergeReport
    from inference.search import Choice, DesignSpace, Range, SearchResult
    from poe_merge.scoring import Scoring
    from poe_models.weights.task_vectors import TaskVectors


_WORDS = ("low", "high", "choices")
"""Keys by which a range is told from a value."""


class RangeSection(Section):
    """Values of a parameter that is searched."""

    low: float | None = None
    """Smallest number."""
    high: float | None = None
    """Largest number."""
    log: bool = False
    """Whether its logarithm is searched."""
    choices: tuple[bool | float | str, ...] = ()
    """The values, instead of a range."""
    groups: str | dict[str, str] = ""
    """Tensors that share a value: bmm, blocks, or names with regular expressions."""
    blocks: int = Field(default=3, ge=1)
    """Blocks of consecutive layers of ``bmm`` and ``blocks``."""
    template: str = Field(default="$", alias="as")
    """Text with a $ for the number."""

    @model_validator(mode="after")
    def _complete(self) -> RangeSection:
        if bool(self.choices) == (self.low is not None) or (self.low is None) != (self.high is None):
            raise ValueError("give `low` and `high`, or `choices`")
        if "$" not in self.template:
            raise ValueError(f"`as: {self.template}` has no $ for the number")
        if isinstance(self.groups, str) and self.groups not in ("", "bmm", "blocks"):
            raise ValueError(f"`groups: {self.groups}`: write bmm, blocks, or a mapping of names to patterns")
        return self

    @classmethod
    @override
    def valid_keys(cls) -> list[str]:
        """The keys as they are written in YAML."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    def text(self, value: float | str) -> Any:
        """A value as the configuration has it."""
        return value if self.template == "$" else self.template.replace("$", str(value))


@dataclass(frozen=True, eq=False)
class Space:
    """A configuration with ranges.

    Attributes:
        document: The rest of it.
        ranges: Parameter to its range.
        folders: Relative paths refer to these.
        allow_code: Whether modules that it names may be imported.
    """

    document: Document
    ranges: Mapping[str, RangeSection]
    folders: tuple[Path, ...]
    allow_code: bool

    def config(self, values: Mapping[str, Any]) -> MergeConfig:
        """The configuration with a value, or cases by filter, for every range.

        Raises:
            ConfigError: If there are mistakes.
        """
        document = copy.deepcopy(self.document)
        for key, value in values.items():
            document.put(("parameters", key), value, document.origins.get(("parameters", key), f"search of {key}"))
        return parse_config(document, self.folders, allow_code=self.allow_code)

    def middle(self) -> MergeConfig:
        """The configuration in the middle of every range, after a look at all choices.

        Raises:
            ConfigError: If there are mistakes.
        """
        middle = {key: each.text(_values(each).grid(1)[0]) for key, each in self.ranges.items()}
        for key, each in self.ranges.items():
            for choice in each.choices[1:]:
                self.config({**middle, key: each.text(choice)})
        return self.config(middle)

    def designs(self, task_vectors: TaskVectors) -> DesignSpace:
        """The design space of a model.

        Raises:
            ConfigError: If groups fit nothing or overlap.
        """
        from inference.search import DesignSpace, Searched
        from poe_merge.build import designs_of

        searched = {}
        for key, each in self.ranges.items():
            try:
                searched[key] = Searched(_values(each), _groups(each, task_vectors))
            except ValueError as error:
                raise ConfigError(f"{self._origin(key)}: parameters.{key}: {error}") from error

        def make(**settings: Any) -> Any:
            texts = {key: self.ranges[key].text(value) for key, value in settings.items()}
            return designs_of(self.config(texts), task_vectors.base)

        return DesignSpace(make, searched)

    def best(self, space: DesignSpace, values: Mapping[str, Any], task_vectors: TaskVectors) -> MergeConfig:
        """The configuration with the best values, by filters where tensors differ."""
        tensors = [name for name, each in task_vectors.treatments.items() if each.action != "base"]
        settings = {tensor: space.settings(values, tensor) for tensor in tensors}
        cases: dict[str, Any] = {}
        for key, each in self.ranges.items():
            by_value: dict[Any, list[str]] = {}
            for tensor in tensors:
                by_value.setdefault(each.text(settings[tensor][key]), []).append(tensor)
            most = max(by_value, key=lambda value: len(by_value[value]))
            filters = [
                {"filter": tensor, "value": value}
                for value, named in by_value.items()
                if value != most
                for tensor in named
            ]
            longer = [
                {"filter": tensor, "value": most}
                for tensor in by_value[most]
                if any(case["filter"] in tensor for case in filters)
            ]
            # A name may be part of a longer one, which goes first.
            ordered = sorted([*longer, *filters], key=lambda case: -len(case["filter"]))
            cases[key] = [*ordered, {"value": most}] if filters else most
        return self.config(cases)

    def _origin(self, key: str) -> str:
        return self.document.origins.get(("parameters", key), "parameters")


def read_space(document: Document, folders: tuple[Path, ...], *, allow_code: bool = False) -> Space:
    """Take the ranges out of a configuration.

    Raises:
        ConfigError: If a range is no range, or there is none.
    """
    document = copy.deepcopy(document)
    parameters = document.data.get("parameters")
    ranges: dict[str, RangeSection] = {}
    for key, raw in dict(parameters if isinstance(parameters, dict) else {}).items():
        if isinstance(raw, dict) and not set(_WORDS).isdisjoint(raw):
            if key not in Parameters.valid_keys():
                continue  # an unknown key, which validation will say
            part = Document(raw, _origins_below(document, ("parameters", key)))
            ranges[key] = validated(part, RangeSection, {(): RangeSection}, folders)
            try:
                _values(ranges[key])
            except ValueError as error:
                raise ConfigError(f"{document.origins[('parameters', key)]}: parameters.{key}: {error}") from error
            del parameters[key]  # type: ignore[union-attr]
    if not ranges:
        raise ConfigError(
            f"{document.origins.get((), 'the configuration')}: no parameter is a range. Write one, such as "
            "`eta: {low: 1e-4, high: 1, log: true}`, or use `poe-merge merge`."
        )
    return Space(document, ranges, folders, allow_code)


@dataclass(frozen=True)
class Budget:
    """Number of trials, their proposals, and the study that they belong to.

    Attributes:
        trials: Trials of the study in all.
        sampler: What proposes: gp, random or grid.
        storage: URL of the study's database; None for memory.
        study: Name of the study there.
        worker: Number of this worker.
        seed: Of the proposals.
    """

    trials: int
    sampler: str
    storage: str | None
    study: str
    worker: int
    seed: int


def search(
    space: Space,
    task_vectors: TaskVectors,
    by: Scoring,
    out: Path,
    budget: Budget,
    progress: Progress,
    *,
    resume: bool = False,
    ranks: Ranks = ALONE,
) -> tuple[SearchResult, MergeReport]:
    """Search the ranges of a configuration, and merge with the best values.

    Several processes are as many workers on the study, and share the merge.

    Args:
        space: The configuration.
        task_vectors: Base and experts.
        by: The score.
        out: The folder to make; its record has the best configuration and the whole study.
        budget: Of the search.
        progress: Told about every trial, then about the merge.
        resume: Go on with an interrupted merge of the best values.
        ranks: The processes that share the work.

    Raises:
        ValueError: If the study cannot be searched; see ``inference.search.search``. Or several processes have none to
            share, which takes a database.
    """
    from inference.models.merge import merge_checkpoint
    from poe_merge.build import batch_bytes_of, custom_sources, designs_of

    if ranks.size > 1 and budget.storage is None:
        raise ValueError(
            f"{ranks.size} processes share a study by a database. Name one: --storage sqlite:///study.db, or run the "
            "search as `poe-merge`, in one process."
        )
    designs = space.designs(task_vectors)
    found = _searched(designs, task_vectors, by, budget, progress, ranks)
    config = space.best(designs, found.values, task_vectors)
    best = designs_of(config, task_vectors.base)
    report = merge_checkpoint(
        task_vectors,
        best,
        out,
        out_dtype=config.output_dtype,
        batch_bytes=batch_bytes_of(config, task_vectors, best),
        seed=config.seed,
        settings={
            "preset": config.preset,
            "config": config.resolved(),
            "search": {"score": by.about, "sampler": budget.sampler, "seed": budget.seed, **found.record()},
        },
        code=custom_sources(config),
        resume=resume,
        progress=progress,
        ranks=ranks,
    )
    return found, report


def _searched(
    designs: DesignSpace, task_vectors: TaskVectors, by: Scoring, budget: Budget, progress: Progress, ranks: Ranks
) -> SearchResult:
    """The study with the trials of all processes."""
    from inference.search import ModelMerges, search

    merges = ModelMerges(task_vectors)
    run = partial(
        search,
        designs,
        by.score,
        merges,
        trials=budget.trials,
        seed=budget.seed,
        sampler=budget.sampler,  # type: ignore[arg-type]  # refused there if unknown
        minimize=by.minimize,
        storage=budget.storage,
        name=budget.study,
        worker=budget.worker * ranks.size + ranks.rank,
        scored_by=by.about,
    )
    found = run(progress=progress)
    if ranks.size == 1:
        return found
    ranks.wait()
    last = run() if ranks.first else found  # the trials that ended behind its last one, as one process sees them
    values, score, trials = ranks.gather((last.values, last.score, last.trials))[0]
    return replace(found, values=values, score=score, trials=trials, designs=merges.complete(designs.designs(values)))


def _values(each: RangeSection) -> Range | Choice:
    from inference.search import Choice, Range

    if each.low is None or each.high is None:
        return Choice(each.choices)
    return Range(each.low, each.high, each.log)


def _groups(each: RangeSection, task_vectors: TaskVectors) -> Mapping[str, tuple[str, ...]]:
    from inference.search import bmm_groups, layer_blocks, pattern_groups

    tensors = [name for name, treatment in task_vectors.treatments.items() if treatment.action != "base"]
    if isinstance(each.groups, dict):
        return pattern_groups(tensors, each.groups)
    if each.groups == "bmm":
        return bmm_groups(tensors, each.blocks)
    return layer_blocks(tensors, each.blocks) if each.groups == "blocks" else {}


def _origins_below(document: Document, place: Place) -> dict[Place, str]:
    size = len(place)
    return {other[size:]: text for other, text in document.origins.items() if other[:size] == place}
