"""Ensembles drawn from the posterior of the best merge, beside its MAP: is the merge calibrated, and at what cost?

For the last layer (the two kernels that end fire9; [BMM] samples the last MLP matrix only) and for all layers:
exact Gibbs draws, draws of Laplace's approximation and of the Gaussian twin, and white noise as the control, each
member as far from the MAP as the Gibbs draw of that number. Every one of these has the temperature that validation NLL
chooses for it, judged with as many members as are used in the end, and the members that were judged are the ones used.
For the last layer the whole range of temperatures is tried ([BMM] Figure 4); for all layers, where every member runs
the whole network, the search walks from the last layer's best. The point estimate to beat is the MAP with its logits
divided by one temperature, which minimises the same mean over tasks of the validation NLL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from benchmarks.harness.evaluate import Scores, mean_scores, score, task_logits
from benchmarks.harness.parallel import run_all
from benchmarks.harness.suite import Head, Suite
from benchmarks.vision.model import SqueezeNet, SqueezeNetwork, prepared
from diagnostics.estimates import Estimate
from diagnostics.predictions.comparison import SCORES, Comparison, compare_methods
from inference.models.design import Design
from inference.models.ensemble import MergedEnsemble
from inference.models.full_draws import noise_control, sample_full
from inference.models.model_draws import FullDraws, ModelDraws
from inference.tempering import Tempering, fit_logit_temperature, temper, temperature_range
from poe_models import TaskVectors

ALL, LAST = "all layers", "last layer"
SCOPES = {ALL: "", LAST: r"fire9\.expand"}
CUTS = {ALL: None, LAST: "backbone.fire9"}
MAP, SCALED_MAP = "MAP", "MAP, scaled logits"
KINDS = (GIBBS, LAPLACE, TWIN, NOISE) = ("Gibbs", "Laplace", "Gaussian twin, Gibbs", "white noise")
NO_CLASS = -1e4
"""Logit of classes that a task does not have."""


@dataclass(frozen=True)
class Budget:
    """How much is drawn. In Full coordinates temperatures are small: mixture weights hardly move, and a few steps mix.

    Args:
        members: Of every ensemble, at every temperature that is tried on validation and in the end; 10 in [BMM].
        temperatures: Size of the last layer's grid of temperatures.
        refinements: How often that grid is refined around its best point.
        walk_temperatures: Size of all layers' grid, on which the search walks from the last layer's best.
        warmup: Gibbs steps before the first member.
        thin: Gibbs steps between members.
    """

    members: int = 10
    temperatures: int = 4
    refinements: int = 2
    walk_temperatures: int = 16
    warmup: int = 20
    thin: int = 2


Result = TypeVar("Result")


class Trunk(nn.Module):
    """What comes before fire9 as one module, so that a cut at fire9 leaves out all of it; it has no weights of its own.

    Args:
        backbone: Whose layers it calls.
    """

    def __init__(self, backbone: SqueezeNet) -> None:
        super().__init__()
        self._backbone = (backbone,)  # not registered a second time

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Output of fire8 (B, 512, h, w)."""
        return self._backbone[0].before_fire9(inputs)


class SuiteModel(nn.Module):
    """A backbone with the frozen heads of all tasks, whose logits are filled up to the same number of classes.

    Args:
        state: The backbone.
        heads: Task name -> head; a batch names its task by position.
    """

    def __init__(self, state: Mapping[str, Tensor], heads: Mapping[str, Head]) -> None:
        super().__init__()
        self.backbone = SqueezeNetwork().open(state)
        self.heads = list(heads.values())
        self.classes = max(len(head.bias) for head in self.heads)
        self.trunk = Trunk(self.backbone)

    @override
    def forward(self, inputs: Tensor, task: int) -> Tensor:
        """Logits (b, classes) of the backbone's inputs of one task."""
        features = self.backbone.fire9(self.trunk(inputs)).mean((2, 3))
        return filled(self.heads[task](features), self.classes)


def filled(logits: Tensor, classes: int) -> Tensor:
    """Logits (..., classes) with the classes that a task lacks."""
    return F.pad(logits, (0, classes - logits.shape[1]), value=NO_CLASS)


@dataclass(frozen=True, eq=False)
class Examples:
    """One split of all tasks, one task after another.

    Args:
        batches: Inputs of the backbone (b, 3, 64, 64) and the position of their task.
        labels: Task name -> (n,).
    """

    batches: list[tuple[Tensor, int]]
    labels: dict[str, Tensor]

    @classmethod
    def of(cls, suite: Suite, split: str, batch_size: int = 50) -> Examples:
        """The split of this name."""
        splits = {name: task.splits[split] for name, task in suite.tasks.items()}
        batches = [
            (prepared(part), i) for i, each in enumerate(splits.values()) for part in each.images.split(batch_size)
        ]
        return cls(batches, {name: each.labels for name, each in splits.items()})

    def by_task(self, values: Tensor) -> dict[str, Tensor]:
        """Rows of all examples (n, ...) by task."""
        parts = values.split([len(labels) for labels in self.labels.values()])
        return dict(zip(self.labels, parts, strict=True))


@dataclass(frozen=True, eq=False)
class Search:
    """A search over temperatures.

    Args:
        tempering: The chosen temperature and the path.
        probabilities: Temperature -> task -> (n, classes), the members' mean on validation.
    """

    tempering: Tempering[ModelDraws]
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
        logit_temperature: What the logits were divided by.
        mutual_information: Task -> (n,) nats; empty for a point estimate.
        search: The search over temperatures; None for a point estimate.
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
    mutual_information: Mapping[str, Tensor] = field(default_factory=dict)
    search: Search | None = None
    differences: Mapping[str, Estimate] = field(default_factory=dict)
    nll_from_scaled: Estimate | None = None
    distance: float | None = None

    @property
    def label(self) -> str:
        """Name and scope."""
        return f"{self.name}, {self.scope}" if self.scope else self.name

    @property
    def mean(self) -> Scores:
        """Unweighted mean over tasks."""
        return mean_scores(self.scores)


class Ensembles:
    """Ensembles around one merge, drawn and judged.

    Args:
        suite: Tasks, heads and experts.
        design: The merge.
        merged: The merge as a checkpoint folder: the MAP, and everything that is not sampled.
        seed: Of all draws and resamples.
        budget: How much is drawn.
    """

    def __init__(self, suite: Suite, design: Design, merged: Path, seed: int, budget: Budget) -> None:
        self.suite, self.design, self.merged, self.seed, self.budget = suite, design, merged, seed, budget
        self.validation, self.test = Examples.of(suite, "validation"), Examples.of(suite, "test")

    def compare(self, progress: Callable[[int, int], None]) -> list[Outcome]:
        """The point estimates and all ensembles, judged on the test images; the MAP comes first.

        Args:
            progress: Called with the number of finished searches and ensembles, and their total.

        Returns:
            One outcome each.
        """
        done = count()

        def told(result: Result) -> Result:
            progress(next(done) + 1, 2 * len(SCOPES) * len(KINDS))
            return result

        def searched(kind: str) -> dict[tuple[str, str], Search]:
            last = told(self.search(LAST, kind))
            everywhere = told(self.search(ALL, kind, start=last.tempering.temperature))
            return {(ALL, kind): everywhere, (LAST, kind): last}

        found = {key: search for each in run_all(searched, KINDS) for key, search in each.items()}
        jobs = [(scope, kind) for scope in SCOPES for kind in KINDS]
        outcomes = [*self._points(), *run_all(lambda job: told(self._judge(*job, found[job])), jobs)]
        predictions = {each.label: each.probabilities for each in outcomes}
        return _with_differences(outcomes, compare_methods(predictions, self.test.labels, seed=self.seed))

    def search(self, scope: str, kind: str, start: float | None = None) -> Search:
        """Choose the temperature of one kind of ensemble by validation NLL.

        Args:
            scope: Which layers are sampled, a key of `SCOPES`.
            kind: What the members are.
            start: Where to walk from on the finer grid; None tries the whole range.

        Returns:
            The temperature with its members and the whole path, and the ensembles' predictions along it.
        """
        low, high = self._temperatures(scope)
        tried: dict[float, list[Tensor]] = {}
        predictor = self.ensemble(scope, kind, high, 1).predictor(
            self._model(), self.validation.batches, forward=_forward, submodule="backbone", cut=CUTS[scope]
        )

        def predict(draw: ModelDraws) -> dict[str, Tensor]:
            log_probabilities = predictor(draw)
            tried.setdefault(_temperature(draw), []).append(log_probabilities.exp())
            return self.validation.by_task(log_probabilities)

        tempering = temper(
            lambda temperature: self.ensemble(scope, kind, temperature, self.budget.members).draws,
            predict,
            self.validation.labels,
            (low, high),
            num_temperatures=self.budget.temperatures if start is None else self.budget.walk_temperatures,
            refinements=self.budget.refinements if start is None else 0,
            start=start,
        )
        means = {point.temperature: torch.stack(tried[point.temperature]).mean(0) for point in tempering.path}
        return Search(tempering, {t: self._own(self.validation.by_task(mean)) for t, mean in means.items()})

    def ensemble(self, scope: str, kind: str, temperature: float, members: int) -> MergedEnsemble:
        """An ensemble of one kind; the same seed at every temperature.

        Args:
            scope: Which layers are sampled, a key of `SCOPES`.
            kind: What the members are.
            temperature: Of the posterior.
            members: How many.

        Returns:
            The ensemble.
        """
        generator = torch.Generator().manual_seed(self.seed)
        vectors, design = self._tempered(kind, temperature)
        draw = partial(sample_full, vectors, design, members, generator=generator, chains=1, pattern=SCOPES[scope])
        draws = draw(sampler="laplace") if kind == LAPLACE else draw(warmup=self.budget.warmup, thin=self.budget.thin)
        if kind == NOISE:
            draws = noise_control(draws, vectors, design, generator=generator)
        return MergedEnsemble(vectors, design, draws, elsewhere=self.merged)

    def _tempered(self, kind: str, temperature: float) -> tuple[TaskVectors, Design]:
        """Task vectors of its own, because ensembles are drawn side by side, and the design at this temperature."""
        poe = self.design.poe.twin() if kind == TWIN else self.design.poe
        design = replace(self.design, poe=replace(poe, temperature=temperature))
        return self.suite.vectors(), design

    def _judge(self, scope: str, kind: str, search: Search) -> Outcome:
        """The members that the search chose, on the test images."""
        temperature = search.tempering.temperature
        vectors, design = self._tempered(kind, temperature)
        draws = search.tempering.draws
        assert isinstance(draws, FullDraws)
        ensemble = MergedEnsemble(vectors, design, draws, elsewhere=self.merged)
        prediction = ensemble.predict(
            self._model(), self.test.batches, forward=_forward, submodule="backbone", cut=CUTS[scope]
        )
        return replace(
            self._outcome(kind, self.test.by_task(prediction.probabilities)),
            scope=scope,
            temperature=temperature,
            mutual_information=self.test.by_task(prediction.mutual_information),
            search=search,
            distance=None if draws.from_merge is None else draws.from_merge.worst,
        )

    def _points(self) -> tuple[Outcome, Outcome]:
        """The MAP, and the MAP with its logits divided by what is best on validation."""
        validation, test = (task_logits(self.suite, self.merged, split) for split in ("validation", "test"))
        divisor = fit_logit_temperature(validation, self.validation.labels)
        scaled = {task: (logits.double() / divisor).softmax(1) for task, logits in test.items()}
        point = {task: logits.double().softmax(1) for task, logits in test.items()}
        return self._outcome(MAP, point), replace(self._outcome(SCALED_MAP, scaled), logit_temperature=divisor)

    def _outcome(self, name: str, probabilities: Mapping[str, Tensor]) -> Outcome:
        own = self._own(probabilities)
        return Outcome(name, own, {task: score(table.log(), self.test.labels[task]) for task, table in own.items()})

    def _own(self, probabilities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Without the classes that a task does not have."""
        return {task: table[:, : len(self.suite.heads[task].bias)] for task, table in probabilities.items()}

    def _temperatures(self, scope: str) -> tuple[float, float]:
        """From the lowest to the highest that any sampled module's energies imply."""
        poe = self.design.poe
        ranges = [
            temperature_range(poe.bind(module.updates.unsqueeze(0)))
            for module in self.suite.vectors()
            if re.search(SCOPES[scope], module.name)
        ]
        return min(low for low, _ in ranges), max(high for _, high in ranges)

    def _model(self) -> SuiteModel:
        return SuiteModel(load_file(self.merged / "model.safetensors"), self.suite.heads)


def _with_differences(outcomes: Sequence[Outcome], compared: Comparison) -> list[Outcome]:
    """Every way to predict minus the point estimates, which come first."""
    point, scaled, *drawn = outcomes
    others = [(each.label, point.label) for each in (scaled, *drawn)]
    found = {score: compared.differences(others, score) for score in SCORES}
    from_scaled = compared.differences([(each.label, scaled.label) for each in drawn], "nll")
    return [
        point,
        *(
            replace(
                each,
                differences={score: found[score][each.label, point.label] for score in SCORES},
                nll_from_scaled=from_scaled.get((each.label, scaled.label)),
            )
            for each in (scaled, *drawn)
        ),
    ]


def _temperature(draw: ModelDraws) -> float:
    return draw.temperatures[0]


def _forward(model: nn.Module, batch: tuple[Tensor, int]) -> Tensor:
    logits: Tensor = model(*batch)
    return logits
