"""Convergence: records against solutions, verdicts that can go either way, what gamma does."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diagnostics.chains import chain_convergence
from diagnostics.sensitivity import gamma_sensitivity, with_gamma
from diagnostics.solver import FixedPointConvergence, fixed_point_convergence, solution_records
from diagnostics.verdicts import Level
from inference import SolverOptions, Status, fixed_point, merge_checkpoint, slice_sample
from inference.models.design import Design
from inference.models.full_draws import sample_full
from inference.models.model_draws import SpanDraws
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Gaussian,
    InputGram,
    ModuleUpdates,
    NormScaled,
    ProductOfExperts,
    Relative,
    Scale,
    StudentT,
    TaskVectors,
    average,
    span_statistics,
)
from tests.helpers import assert_close, random_updates
from tests.seeds import seeded

NAMES = ("mnist", "emoji", "animals")


MODULES = ["a.weight", "b.weight"]


@pytest.fixture
def updates(generator: torch.Generator) -> Tensor:
    return random_updates(generator, 2, 3, 4, 5)


def product(**options: Any) -> ProductOfExperts:
    return ProductOfExperts.of(NAMES, InputGram(), options.pop("energy", Cauchy()), **options)


def convergence(updates: Tensor, poe: ProductOfExperts | None = None, **options: Any) -> FixedPointConvergence:
    solution = fixed_point((poe or product()).bind(updates), **options)
    return fixed_point_convergence(solution_records(solution, MODULES))


def test_records_and_solution_say_the_same(updates: Tensor) -> None:
    solution = fixed_point(product().bind(updates))
    found, info = fixed_point_convergence(solution_records(solution, MODULES)), solution.info
    assert found.modules == tuple(MODULES)
    assert found.experts == NAMES
    assert found.status == solution.status
    for name in ("weight_spread", "gradient_norm"):
        assert_close(torch.from_numpy(getattr(found, name)), getattr(info, name))
    assert_close(torch.from_numpy(found.rate), info.contraction_rate)
    assert_close(torch.from_numpy(found.bound), info.contraction_bound)
    assert_close(torch.from_numpy(found.relative_weights), info.relative_weights)
    for trace, steps, full in zip(found.traces, info.steps.tolist(), info.energy_trace, strict=True):
        assert len(trace) == steps
        assert_close(torch.from_numpy(trace), full[:steps])
        assert bool((full[steps:] == full[steps - 1]).all())


def test_relative_weights_are_those_over_the_twins(updates: Tensor) -> None:
    info = fixed_point(product().bind(updates)).info
    assert_close(info.relative_weights, 1 / (1 + info.residuals), 1e-8)  # Cauchy: rho'(q) / rho'(0)
    assert_close(info.relative_weights.amax(-1) / info.relative_weights.amin(-1), info.weight_spread)


def test_a_gaussian_has_relative_weights_of_one(updates: Tensor) -> None:
    found = convergence(updates, product(energy=Gaussian()))
    assert np.allclose(found.relative_weights, 1)
    assert "as by a Gaussian" in found.verdicts[2].text


def test_a_silent_expert_has_no_relative_weight(updates: Tensor) -> None:
    updates[0, 1] = 0.0
    found = convergence(updates)
    assert np.isnan(found.relative_weights).tolist() == [[False, True, False], [False, False, False]]
    assert max(verdict.level for verdict in found.verdicts) is Level.GOOD


def test_experts_of_one_module_alone(updates: Tensor) -> None:
    first = solution_records(fixed_point(product().bind(updates[:1])), ["a.weight"])
    second = solution_records(fixed_point(ProductOfExperts.of(NAMES[:2]).bind(updates[1:, :2])), ["b.weight"])
    found = fixed_point_convergence([*first, *second])
    assert found.experts == NAMES
    assert np.isnan(found.relative_weights[1, 2])
    assert [len(trace) for trace in found.traces] == found.steps.tolist()


def test_the_record_of_a_merged_folder(tmp_path: Path, updates: Tensor) -> None:
    states = {name: {"a.weight": updates[0, i], "b.weight": updates[1, i]} for i, name in enumerate(NAMES)}
    vectors = TaskVectors({name: torch.zeros(4, 5) for name in MODULES}, states)
    merge_checkpoint(vectors, product(), tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "poe_merge.json").read_text())
    found = fixed_point_convergence(m for tensor in record["tensors"] for m in tensor.get("modules", ()))
    assert found.modules == tuple(MODULES)
    for trace in found.traces:
        assert (np.diff(trace) <= 1e-5 * abs(trace[0])).all()


def test_verdicts_tell_what_did_not_converge(updates: Tensor) -> None:
    found = convergence(updates, product(scale=Relative(0.05)), max_steps=1, starts=("ones",))
    verdict = found.verdicts[0]
    assert verdict.level is Level.BAD
    assert "0 of 2 modules converged; a.weight, b.weight: not converged: raise max_steps" in verdict.text
    rounding = replace(found, status=(Status.CONVERGED, Status.ROUNDING))
    assert rounding.verdicts[0].level is Level.CAUTION
    assert "float64" in rounding.verdicts[0].text


def test_a_point_that_is_no_minimum_is_a_caution(updates: Tensor) -> None:
    statuses = (Status.CONVERGED, Status.SADDLE)
    found = replace(convergence(updates), status=statuses, rate=np.array([0.5, 1.2]))
    assert [verdict.level for verdict in found.verdicts] == [Level.CAUTION, Level.CAUTION, Level.NOTE]
    assert "1 of 2 modules converged; b.weight: stopped at a saddle" in found.verdicts[0].text
    worse = replace(found, status=(Status.MAX_STEPS, Status.SADDLE)).verdicts[0]
    assert worse.level is Level.BAD
    assert "raise max_steps" in worse.text


def test_rates_that_are_not_known_are_not_good(updates: Tensor) -> None:
    found = convergence(updates)
    nan = np.array([np.nan, 0.1])
    verdicts = replace(found, rate=nan, bound=nan, weight_spread=np.array([np.nan, 1.4])).verdicts
    assert verdicts[1].level is Level.UNKNOWN
    assert "1 of 2" in verdicts[1].text
    assert "most 1.4" in verdicts[2].text
    assert replace(found, weight_spread=nan * np.nan).verdicts[2].level is Level.UNKNOWN


def test_the_bound_is_no_smaller_than_the_rate(updates: Tensor) -> None:
    found = convergence(updates, product(scale=Relative(0.3)))
    assert (found.bound >= found.rate).all()
    assert found.rate.max() > 0.01


@pytest.mark.parametrize(("records", "words"), [([], "only averages"), ([{"module": "a"}], "incomplete")])
def test_records_that_are_none(records: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fixed_point_convergence(records)


def test_names_that_do_not_fit(updates: Tensor) -> None:
    with pytest.raises(ValueError, match="1 names for 2 modules"):
        solution_records(fixed_point(product().bind(updates)), ["a"])


def modules_of(updates: Tensor) -> list[ModuleUpdates]:
    base = torch.zeros_like(updates[0, 0])
    return [ModuleUpdates(n, n, NAMES, base, u) for n, u in zip(MODULES, updates, strict=True)]


def test_gamma_sensitivity_against_solves_of_its_own(updates: Tensor) -> None:
    poe, gammas = product(energy=StudentT(3.0)), [0.1, 1.0, 10.0]
    found = gamma_sensitivity(poe, modules_of(updates), gammas[::-1])
    z = torch.stack([fixed_point(with_gamma(poe, gamma).bind(updates)).value for gamma in gammas])
    twins = torch.stack([fixed_point(with_gamma(poe, gamma).twin().bind(updates)).value for gamma in gammas])
    norm = z.flatten(-2).norm(dim=-1)
    assert_close(torch.from_numpy(found.distance), (z - z[1]).flatten(-2).norm(dim=-1) / norm[1], 1e-7)
    expected = (z - twins).flatten(-2).norm(dim=-1) / twins.flatten(-2).norm(dim=-1)
    assert_close(torch.from_numpy(found.from_twin), expected, 1e-7)
    assert found.gammas.tolist() == gammas
    assert found.converged.all()
    assert found.scores is None


def test_gamma_does_nothing_to_a_gaussian_with_a_relative_anchor(updates: Tensor) -> None:
    found = gamma_sensitivity(product(energy=Gaussian()), modules_of(updates), [0.1, 1.0, 10.0])
    assert found.distance.max() < 1e-8
    assert found.verdict.level is Level.GOOD


def test_a_merge_of_zero_is_not_called_insensitive(updates: Tensor) -> None:
    frozen = torch.zeros_like(updates)
    nothing = gamma_sensitivity(product(), modules_of(frozen), [0.1, 1.0, 10.0])
    assert np.isnan(nothing.distance).all()
    assert nothing.verdict.level is Level.UNKNOWN
    frozen[0] = updates[0]
    text = gamma_sensitivity(product(), modules_of(frozen), [0.1, 1.0, 10.0]).verdict.text
    assert f"{len(frozen) - 1} modules whose merge is zero" in text


def test_scores_see_the_whole_merge(updates: Tensor) -> None:
    poe, seen = product(), []

    def score(merged: Any) -> float:
        seen.append(sorted(merged))
        return -float(sum(each.norm() for each in merged.values()))

    found = gamma_sensitivity(poe, modules_of(updates), [0.3, 3.0], score, reference=0)
    assert seen == [MODULES, MODULES]
    assert found.scores is not None
    sizes = [
        fixed_point(with_gamma(poe, gamma).bind(updates)).value.flatten(-2).norm(dim=-1).sum() for gamma in (0.3, 3.0)
    ]
    assert np.allclose(found.scores, [-float(size) for size in sizes])
    assert found.distance[0].tolist() == [0, 0]
    assert "best at" in found.verdict.text


@pytest.mark.parametrize("scale", [Relative(2.0), NormScaled(2.0), Absolute(2.0)])
def test_gamma_of_any_scale(scale: Scale) -> None:
    assert with_gamma(product(scale=scale), 2.0) == product(scale=scale)
    assert with_gamma(product(scale=scale), 1.0) != product(scale=scale)


def test_gammas_that_do_not_make_a_grid(updates: Tensor) -> None:
    modules = modules_of(updates)
    for bad in ([1.0], [1.0, 1.0]):
        with pytest.raises(ValueError, match="two or more"):
            gamma_sensitivity(product(), modules, bad)
    with pytest.raises(ValueError, match="iterator"):
        gamma_sensitivity(product(), iter(modules), [0.5, 1.0])
    with pytest.raises(ValueError, match="nothing to merge"):
        gamma_sensitivity(product(), [], [0.5, 1.0])
    with pytest.raises(ValueError, match=r"scores are \[nan, nan\] at gamma \[0.5, 1.0\]"):
        gamma_sensitivity(product(), modules, [0.5, 1.0], lambda merged: math.nan)
    with pytest.raises(ValueError, match="position"):
        gamma_sensitivity(product(), modules, [0.5, 1.0], reference=2)


def test_draws_of_the_slice_sampler(updates: Tensor) -> None:
    statistics = span_statistics(product(anchor=Anchor(average)), updates, MODULES)
    posterior = product(anchor=Anchor(average)).bind(statistics)
    draws = SpanDraws.of(slice_sample(posterior, 100, generator=seeded(0), warmup=100), posterior)
    found = chain_convergence(draws)
    assert found.quantities == (*NAMES, "center")
    assert found.summary.r_hat.shape == (2, 4)
    assert found.divergences is None
    assert_close(torch.from_numpy(found.values), draws.coefficients)


def test_full_draws_are_judged_by_their_weights(updates: Tensor) -> None:
    states = {name: {"a.weight": updates[0, i], "b.weight": updates[1, i]} for i, name in enumerate(NAMES)}
    vectors = TaskVectors({name: torch.zeros(4, 5) for name in MODULES}, states)
    poe = product(anchor=Anchor(precision=AbsolutePrecision(0.1)))
    generator = seeded(0)
    found = chain_convergence(sample_full(vectors, poe, 100, generator=generator))
    assert found.quantities == ("log density", *(f"log weight of {name}" for name in NAMES))
    assert found.summary.r_hat.shape == (2, 4)
    assert not found.silent.any()
    for state in states.values():
        state["a.weight"] = states[NAMES[1]]["a.weight"]
    states[NAMES[1]] = {**states[NAMES[1]], "a.weight": torch.zeros(4, 5)}
    without = TaskVectors({name: torch.zeros(4, 5) for name in MODULES}, states)
    found = chain_convergence(sample_full(without, poe, 100, generator=generator))
    assert found.silent.tolist() == [[False, False, True, False], [False] * 4]
    assert "draws" not in {verdict.about for verdict in found.verdicts}
    with pytest.raises(ValueError, match="independent"):
        chain_convergence(sample_full(vectors, poe, 5, generator=generator, sampler="laplace"))


def test_weights_are_named_by_expert_whatever_its_place_in_a_design(updates: Tensor) -> None:
    states = {name: {"a.weight": updates[0, i], "b.weight": updates[1, i]} for i, name in enumerate(NAMES)}
    vectors = TaskVectors({name: torch.zeros(4, 5) for name in MODULES}, states)
    whole = product(anchor=Anchor(precision=AbsolutePrecision(0.1)))
    fewer = replace(whole, experts=whole.experts[::-1][:2])  # of the last two task vectors, the last one first
    draws = sample_full(
        vectors, lambda tensor: Design(whole if tensor == "a.weight" else fewer), 50, generator=seeded(0)
    )
    found = chain_convergence(draws)
    assert found.quantities == ("log density", *(f"log weight of {name}" for name in NAMES))
    assert found.silent.tolist() == [[False] * 4, [False, True, False, False]]
    np.testing.assert_array_equal(found.values[..., 0, 1], draws.weights[..., 0, 0].log())
    np.testing.assert_array_equal(found.values[..., 1, 3], draws.weights[..., 1, 0].log())
    table = found.to_dataframe()
    assert f"log weight of {NAMES[0]}" not in table[table["module"] == "b.weight"]["quantity"].tolist()


def test_verdicts_have_an_order() -> None:
    assert Level.NOTE < Level.GOOD < Level.UNKNOWN < Level.CAUTION < Level.BAD


def test_designs_keep_their_options(updates: Tensor) -> None:
    """The trace that is recorded is the winning start's."""
    solution = Design(product(scale=Relative(0.2)), options=SolverOptions(starts=("twin", "experts"))).solve(updates)
    found = fixed_point_convergence(solution_records(solution, MODULES))
    for trace, energies in zip(found.traces, found.start_energies, strict=True):
        assert trace[-1] == pytest.approx(energies.min(), rel=1e-9)
