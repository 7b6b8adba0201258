"""Ensembles drawn from the posterior of the best merge, beside its MAP: is the merge calibrated, and at what cost?

For the network's last layer ([BMM] samples the last MLP matrix only) and for all layers: exact Gibbs draws, draws of
Laplace's approximation and of the Gaussian twin, and white noise as the control, each member as far from the MAP as the
Gibbs draw of that number. Every one of these has the temperature that validation NLL chooses for it, judged with as
many members as are used in the end, and the members that were judged are the ones used. For the last layer the whole
range of temperatures is tried ([BMM] Figure 4); for all layers, where every member runs the whole network, the search
walks: that of the first kind from its best in the last layer, those of the others from the first's in all layers.

The point estimate to beat is the MAP with its logits divided by one temperature, which minimises the same mean over
tasks of the validation NLL. Every ensemble is shown twice as well: as it is, and with its members' logits divided by
one number that is chosen together with the posterior's temperature.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.evaluate import score, task_logits
from benchmarks.harness.outcomes import (
    ALL,
    GIBBS,
    LAPLACE,
    LAST,
    MAP,
    NOISE,
    SCALED,
    SCALED_MAP,
    SCOPES,
    TWIN,
    Budget,
    Outcome,
    Search,
)
from benchmarks.harness.parallel import run_all
from benchmarks.harness.suite import Suite
from benchmarks.harness.suite_model import Examples, SuiteModel
from diagnostics.predictions.comparison import SCORES, Comparison, compare_methods
from inference.logit_temperature import fit_logit_temperature, scaled_mean
from inference.models.design import Design
from inference.models.ensemble import MergedEnsemble
from inference.models.full_draws import noise_control, sample_full
from inference.models.model_draws import FullDraws, ModelDraws
from inference.models.modules import Module, module_names, read_modules
from inference.models.predictor import Runner
from inference.tempering import temper, temperature_range
from poe_models import TaskVectors

PREFIX = "backbone."
"""Where in the suite's model the checkpoint is."""


class Members:
    """Log probabilities of members, whose weights are made for all members of one temperature together.

    Args:
        runner: The model.
        states: From draws to the sampled tensors of each member.
    """

    def __init__(self, runner: Runner, states: Callable[[FullDraws], list[dict[str, Tensor]]]) -> None:
        self._runner, self._states = runner, states
        self._made: dict[str, dict[str, Tensor]] = {}

    def __call__(self, draw: ModelDraws, whole: FullDraws) -> Tensor:
        """Log probabilities (n, classes) of one member of `whole`."""
        key = draw.digest()
        if key not in self._made:
            self._made = {each.digest(): state for each, state in zip(whole, self._states(whole), strict=True)}
        return self._runner(self._made[key])


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
        self._modes: dict[str, Tensor] = {}
        self._ranges: dict[str, tuple[float, float]] = {}
        self._drawn: dict[tuple[str, str, float, int], FullDraws] = {}

    def compare(self, progress: Callable[[int, int], None]) -> list[Outcome]:
        """The point estimates and all ensembles, judged on the test examples; the MAP comes first.

        Args:
            progress: Called with the number of finished searches and ensembles, and their total.

        Returns:
            One outcome each.
        """
        done = count(1)
        jobs = [(scope, kind) for scope in SCOPES for kind in self.budget.kinds(scope)]

        def searched(job: tuple[str, str], start: float | None = None) -> Search:
            found = self.search(*job, start=start)
            progress(next(done), 2 * len(jobs))
            return found

        def judged(job: tuple[str, str]) -> tuple[Outcome, Outcome]:
            pair = self._judge(*job, found[job])
            progress(next(done), 2 * len(jobs))
            return pair

        last = [job for job in jobs if job[0] == LAST]
        found = dict(zip(last, run_all(searched, last), strict=True))
        if self.budget.everywhere:
            first, *others = (job for job in jobs if job[0] == ALL)
            found[first] = searched(first, found[LAST, first[1]].plain.temperature)
            start = found[first].plain.temperature
            found |= dict(zip(others, run_all(lambda job: searched(job, start), others), strict=True))
        outcomes = [*self._points(), *(each for pair in run_all(judged, jobs) for each in pair)]
        predictions = {each.label: each.probabilities for each in outcomes}
        return _with_differences(outcomes, compare_methods(predictions, self.test.labels, seed=self.seed))

    def search(self, scope: str, kind: str, start: float | None = None) -> Search:
        """Choose the temperature of one kind of ensemble by validation NLL, with logits as they are and scaled.

        Args:
            scope: Which layers are sampled, one of `SCOPES`.
            kind: What the members are.
            start: Where to walk from on the finer grid; None tries the whole range.

        Returns:
            The temperatures with their members and the whole paths, and the ensembles' predictions along them.
        """
        low, high = self.temperatures(scope)
        tried: dict[float, list[Tensor]] = {}
        members = Members(self.runner(scope, kind, self.validation), lambda draws: self.states(draws, kind))

        def predict(draw: ModelDraws) -> dict[str, Tensor]:
            whole = self.draw(scope, kind, draw.temperatures[0], self.budget.members)
            log_probabilities = members(draw, whole)
            tried.setdefault(draw.temperatures[0], []).append(log_probabilities.exp())
            return self.validation.by_task(log_probabilities)

        cache: dict[str, Mapping[str, Tensor]] = {}
        chosen = partial(
            temper,
            lambda temperature: self.draw(scope, kind, temperature, self.budget.members),
            predict,
            self.validation.labels,
            (low, high),
            num_temperatures=self.budget.temperatures if start is None else self.budget.walk_temperatures,
            refinements=self.budget.refinements if start is None else 0,
            cache=cache,
        )
        plain = chosen(start=start)
        scaled = chosen(start=start if start is None else plain.temperature, scale_logits=True)
        means = {point.temperature: torch.stack(tried[point.temperature]).mean(0) for point in plain.path}
        return Search(plain, scaled, {t: self.own(self.validation.by_task(mean)) for t, mean in means.items()})

    def ensemble(self, scope: str, kind: str, temperature: float, members: int) -> MergedEnsemble:
        """An ensemble of one kind; the same seed at every temperature.

        Args:
            scope: Which layers are sampled, one of `SCOPES`.
            kind: What the members are.
            temperature: Of the posterior.
            members: How many.

        Returns:
            The ensemble.
        """
        vectors, design = self._tempered(kind, temperature)
        return MergedEnsemble(vectors, design, self.draw(scope, kind, temperature, members), elsewhere=self.merged)

    def draw(self, scope: str, kind: str, temperature: float, members: int) -> FullDraws:
        """Draws of one kind, made once: noise is as far away as Gibbs's draws, and both searches try them.

        Args:
            scope: Which layers are sampled, one of `SCOPES`.
            kind: What the members are.
            temperature: Of the posterior.
            members: How many.
        """
        key = (scope, kind, temperature, members)
        if key not in self._drawn:
            vectors, design = self._tempered(kind, temperature)
            if kind == NOISE:
                generator = torch.Generator().manual_seed(self.seed + 1)
                draws = noise_control(
                    self.draw(scope, GIBBS, temperature, members), vectors, design, generator=generator
                )
            else:
                draws = sample_full(
                    vectors,
                    design,
                    members,
                    generator=torch.Generator().manual_seed(self.seed),
                    sampler="laplace" if kind == LAPLACE else "gibbs",
                    chains=1,
                    warmup=self.budget.warmup,
                    thin=self.budget.thin,
                    pattern=self.suite.network.last_layer if scope == LAST else "",
                )
            self._drawn[key] = draws
        return self._drawn[key]

    def predictions(self, scope: str, kind: str, temperature: float, members: int) -> dict[str, Tensor]:
        """Mean probabilities of an ensemble on the test examples.

        Args:
            scope: Which layers are sampled, one of `SCOPES`.
            kind: What the members are.
            temperature: Of the posterior.
            members: How many.

        Returns:
            Task to ``(n, classes)``.
        """
        runner = self.runner(scope, kind, self.test)
        tables = torch.stack(
            [runner(state) for state in self.states(self.draw(scope, kind, temperature, members), kind)]
        )
        return self.own(self.test.by_task(scaled_mean(tables, 1.0).exp()))

    def runner(self, scope: str, kind: str, examples: Examples) -> Runner:
        """Log probabilities of all examples under the merge with some of its tensors replaced.

        Args:
            scope: Which layers are replaced, one of `SCOPES`.
            kind: What the members are.
            examples: Of all tasks.
        """
        cut = f"backbone.{self.suite.network.cut}" if scope == LAST else None
        model = SuiteModel(self.suite, self.merged)
        modules = set(self.draw(scope, kind, self.temperatures(scope)[1], 1).modules)
        base = self.suite.vectors().base.tensors
        changing = {f"{PREFIX}{name}": base[name].shape for name in self._tensors(modules)}
        return Runner(model, examples.batches, {}, changing, _forward, cut)

    def _tensors(self, modules: Collection[str]) -> list[str]:
        """Names of the tensors that these modules are in."""
        vectors = self.suite.vectors()
        return [name for name in vectors.treatments if not set(module_names(vectors, name)).isdisjoint(modules)]

    def states(self, draws: FullDraws, kind: str) -> list[dict[str, Tensor]]:
        """The sampled tensors of every member: what `MergedEnsemble` makes, a module at a time for all members.

        Args:
            draws: One for each member.
            kind: What they are.

        Returns:
            Tensors by their names in the suite's model.
        """
        vectors, design = self._tempered(kind, draws.temperatures[0])
        states: list[dict[str, Tensor]] = [{} for _ in range(len(draws))]
        for tensor in self._tensors(draws.modules):
            view, shape = vectors.treatments[tensor].view, vectors.base.tensors[tensor].shape
            assert view is not None
            made = [self._weights(module, design, draws) for module in read_modules(vectors, tensor, design)]
            for state, blocks in zip(states, zip(*made, strict=True), strict=True):
                state[f"{PREFIX}{tensor}"] = view.join(list(blocks), shape).cpu()
        return states

    def _weights(self, module: Module, design: Design, draws: FullDraws) -> list[Tensor]:
        """`W_0 + λ Z` of one module in every draw; a mode is solved for once."""
        if draws.uses_modes:
            module = replace(module, known_mode=self._modes.get(module.name))
            self._modes[module.name] = module.mode
        made = draws.maker(module)
        return [module.base + design.scaling * made(member) for member in range(len(draws))]

    def _tempered(self, kind: str, temperature: float) -> tuple[TaskVectors, Design]:
        """Task vectors of its own, because ensembles are drawn side by side, and the design at this temperature."""
        poe = self.design.poe.twin() if kind == TWIN else self.design.poe
        design = replace(self.design, poe=replace(poe, temperature=temperature))
        return self.suite.vectors(), design

    def _judge(self, scope: str, kind: str, search: Search) -> tuple[Outcome, Outcome]:
        """The members that the searches chose, on the test examples: as they are, and with scaled logits."""
        runner, tables = self.runner(scope, kind, self.test), dict[float, Tensor]()
        outcomes = []
        for tempering, name in ((search.plain, kind), (search.scaled, kind + SCALED)):
            draws, divisor = tempering.draws, tempering.best.logit_temperature
            if tempering.temperature not in tables:
                states = self.states(draws, kind)
                tables[tempering.temperature] = torch.stack([runner(state) for state in states])
            mean = scaled_mean(tables[tempering.temperature], divisor).exp()
            outcome = replace(
                self._outcome(name, self.test.by_task(mean)),
                scope=scope,
                temperature=tempering.temperature,
                logit_temperature=divisor,
                tempering=tempering,
                validation=search.probabilities if name == kind else {},
                distance=None if draws.from_merge is None else draws.from_merge.worst,
            )
            outcomes.append(outcome)
        return outcomes[0], outcomes[1]

    def _points(self) -> tuple[Outcome, Outcome]:
        """The MAP, and the MAP with its logits divided by what is best on validation."""
        validation, test = (task_logits(self.suite, self.merged, split) for split in ("validation", "test"))
        divisor = fit_logit_temperature(validation, self.validation.labels)
        scaled = {task: (logits.double() / divisor).softmax(1) for task, logits in test.items()}
        point = {task: logits.double().softmax(1) for task, logits in test.items()}
        return self._outcome(MAP, point), replace(self._outcome(SCALED_MAP, scaled), logit_temperature=divisor)

    def _outcome(self, name: str, probabilities: Mapping[str, Tensor]) -> Outcome:
        own = self.own(probabilities)
        return Outcome(name, own, {task: score(table.log(), self.test.labels[task]) for task, table in own.items()})

    def own(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tables (..., classes) without the classes that a task does not have."""
        return {task: table[..., : len(self.suite.heads[task].bias)] for task, table in tables.items()}

    def temperatures(self, scope: str) -> tuple[float, float]:
        """From the lowest to the highest temperature that any sampled module's energies imply; updates are read once.

        Args:
            scope: Which layers are sampled, one of `SCOPES`.
        """
        if scope not in self._ranges:
            poe = self.design.poe
            pattern = self.suite.network.last_layer if scope == LAST else ""
            ranges = [
                temperature_range(poe.bind(module.updates.unsqueeze(0)))
                for module in self.suite.vectors()
                if re.search(pattern, module.name)
            ]
            self._ranges[scope] = min(low for low, _ in ranges), max(high for _, high in ranges)
        return self._ranges[scope]


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


def _forward(model: nn.Module, batch: tuple[Any, int]) -> Tensor:
    logits: Tensor = model(*batch)
    return logits
