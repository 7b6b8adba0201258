"""The null of heavy tails: sizes against the likelihood, surrogates against what they keep, level and power by rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from benchmarks import tails_null, tails_suites
from benchmarks.tails_null import SIMULATIONS, Simulated, p_values
from diagnostics.residuals import Residuals, module_residuals, residuals
from diagnostics.tails import (
    Merge,
    Sizes,
    Surrogates,
    fit_sizes,
    null_control,
    pooled_tails,
    surrogate_residuals,
)
from diagnostics.tails.null import student_gain
from inference.map import fixed_point
from inference.models.design import Design
from inference.models.method_design import MethodDesign
from poe_models import (
    Activation,
    Average,
    Cauchy,
    Directional,
    Gaussian,
    InputGram,
    IsoC,
    ModuleMoments,
    ModuleUpdates,
    OutputGram,
    ProductOfExperts,
    Relative,
    TaskArithmetic,
    TaskVectors,
    Ties,
)
from poe_models.methods import AdaMerging
from tests.helpers import assert_close
from tests.seeds import seeded

NAMES = ("mnist", "emoji", "animals")
BOTH: list[Sizes] = ["own", "shared"]
ERROR = 1e-6


def updates_of(seed: int = 0, shape: tuple[int, int] = (12, 7), common: float = 0.5) -> Tensor:
    g = seeded(seed)
    drawn = torch.randn(3, *shape, generator=g, dtype=torch.float64)
    drawn = drawn + common * torch.randn(shape, generator=g, dtype=torch.float64)
    rows = torch.randn(shape[0], 1, generator=g, dtype=torch.float64).exp()
    columns = torch.randn(shape[1], generator=g, dtype=torch.float64).mul(0.5).exp()
    return drawn * rows * columns * torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)[:, None, None]


def vectors(seed: int = 0) -> TaskVectors:
    shapes = {"a.weight": (12, 7), "b.weight": (7, 12)}
    made = {name: updates_of(seed + i, shape) for i, (name, shape) in enumerate(shapes.items())}
    base = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    experts = {name: {tensor: each[i] for tensor, each in made.items()} for i, name in enumerate(NAMES)}
    return TaskVectors(base, experts, dtype=torch.float64)


def seen(surrogates: Surrogates) -> list[list[float]]:
    return [each.values("raw").tolist() for each in surrogates.residuals]


# Sizes


def test_own_sizes_are_those_of_greatest_likelihood() -> None:
    update = updates_of()[:1]
    logs = torch.zeros(19, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logs], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def negative() -> Tensor:
        spread = (logs[:12, None] + logs[12:]).exp()
        return -torch.distributions.Normal(torch.zeros_like(spread), spread).log_prob(update[0]).sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = negative()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    found = fit_sizes(update)
    expected = (logs[:12, None] + logs[12:]).exp().detach()
    assert_close((found.rows * found.columns)[0], expected, 1e-5)


def test_shared_sizes_have_no_slope_of_the_joint_likelihood() -> None:
    updates = updates_of()
    found = fit_sizes(updates, "shared")
    log_rows = found.rows[0, :, 0].log().requires_grad_()
    log_columns = found.columns[0, 0].log().requires_grad_()
    factor = torch.linalg.cholesky(found.root @ found.root.mT).requires_grad_()
    entries = (updates / (log_rows[:, None] + log_columns).exp()).flatten(1).mT
    normal = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), scale_tril=factor)
    log_likelihood = normal.log_prob(entries).sum() - 3 * (log_rows[:, None] + log_columns).sum()
    slopes = torch.autograd.grad(log_likelihood, (log_rows, log_columns, factor))
    assert max(float(slope.tril().abs().max() if slope.ndim == 2 else slope.abs().max()) for slope in slopes) < 1e-6


@pytest.mark.parametrize("sizes", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_surrogate_has_the_fitted_sizes_of_the_real_updates(sizes: Sizes, dtype: torch.dtype) -> None:
    updates = updates_of().to(dtype)
    found = fit_sizes(updates, sizes)
    made = found.surrogate(seeded(5))
    again = fit_sizes(made, sizes)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-8
    assert made.dtype == dtype
    assert_close(again.rows * again.columns, found.rows * found.columns, tolerance)
    assert_close(again.row_spread, found.row_spread, tolerance)
    if sizes == "shared":
        assert_close(again.root @ again.root.mT, found.root @ found.root.mT, tolerance)
    assert float((made - updates).abs().max()) > 0.1


@pytest.mark.parametrize("sizes", BOTH)
def test_standardised_surrogates_do_not_depend_on_the_sizes(sizes: Sizes) -> None:
    updates = updates_of()
    factor = torch.linspace(0.1, 9, 12, dtype=torch.float64)[:, None] * torch.linspace(3, 0.5, 7, dtype=torch.float64)
    one, other = (fit_sizes(u, sizes).surrogate(seeded(1)) for u in (updates, updates * factor))
    assert_close(one * factor, other, 1e-7)


@pytest.mark.parametrize("sizes", BOTH)
def test_surrogates_are_as_correlated_as_the_experts(sizes: Sizes) -> None:
    updates = updates_of(shape=(60, 50), common=1.0)
    made = fit_sizes(updates, sizes).surrogate(seeded(2))

    def correlation(u: Tensor) -> Tensor:
        found = fit_sizes(u)
        return torch.corrcoef((u / (found.rows * found.columns)).flatten(1))

    assert_close(correlation(made), correlation(updates), 0.02)
    same = fit_sizes(updates[:1].expand(3, -1, -1), sizes).surrogate(seeded(2))
    assert_close(same[0], same[2], 1e-9)


@pytest.mark.parametrize("sizes", BOTH)
def test_zero_rows_columns_and_experts_stay_zero(sizes: Sizes) -> None:
    updates = updates_of()
    updates[:, 3], updates[:, :, 2], updates[1] = 0.0, 0.0, 0.0
    made = fit_sizes(updates, sizes).surrogate(seeded(0))
    assert torch.equal(made == 0, updates == 0)
    nothing = fit_sizes(torch.zeros_like(updates), sizes)
    assert not nothing.surrogate(torch.Generator()).any()
    assert nothing.row_spread.isnan().all()
    with pytest.raises(ValueError, match="sizes are 'own' or 'shared'"):
        fit_sizes(updates, "none")  # type: ignore[arg-type]


# Surrogates


@pytest.mark.parametrize("sizes", BOTH)
def test_a_row_that_one_expert_never_touched_stays_zero_in_it_alone(sizes: Sizes) -> None:
    updates = updates_of()
    updates[1, 2] = 0.0
    updates[0, :, 3] = 0.0
    made = fit_sizes(updates, sizes).surrogate(seeded(1))
    assert torch.equal(made.ne(0), updates.ne(0))
    given = TaskVectors(
        {"m.weight": torch.zeros(12, 7)},
        {name: {"m.weight": u.float()} for name, u in zip(NAMES, updates, strict=True)},
    )
    poe = ProductOfExperts.of(NAMES, InputGram(), Gaussian(), Relative(1.0))
    found = [e for m in given for e in module_residuals(fixed_point(poe.bind(m)).value[0], m, poe)]
    surrogates = surrogate_residuals(given, poe, num_surrogates=3, sizes=sizes)
    assert 0 < null_control(Residuals(tuple(found)), surrogates, level=0.25).p_value <= 1


@pytest.mark.parametrize("sizes", BOTH)
def test_surrogates_are_merged_and_measured_as_the_updates_are(sizes: Sizes) -> None:
    given, poe = vectors(), ProductOfExperts.of(NAMES, OutputGram(), Cauchy(), Relative(1.0))
    found = surrogate_residuals(given, poe, num_surrogates=2, sizes=sizes, seed=4)
    kept: list[ModuleUpdates] = []

    def by_hand(module: ModuleUpdates) -> Tensor:
        kept.append(module)
        return fixed_point(poe.bind(module)).value[0]

    same = surrogate_residuals(given, by_hand, poe, num_surrogates=2, sizes=sizes, seed=4)
    assert seen(same) == seen(found)
    expected = [e for m in kept[::2] for e in module_residuals(fixed_point(poe.bind(m)).value[0], m, poe)]
    assert Residuals(tuple(expected)).values("raw").tolist() == found.residuals[0].values("raw").tolist()
    for module, made in zip(given, kept[::2], strict=True):
        assert (made.name, made.names, made.updates.shape) == (module.name, module.names, module.updates.shape)
        fitted = fit_sizes(module.updates, sizes)
        assert found.row_spread > 0
        assert_close(fit_sizes(made.updates, sizes).row_spread, fitted.row_spread, 1e-8)
    assert seen(found)[0] != seen(found)[1]
    assert seen(surrogate_residuals(given, poe, num_surrogates=1, sizes=sizes, seed=5))[0] != seen(found)[0]


@pytest.mark.parametrize(
    ("merge", "by_hand"),
    [
        (TaskArithmetic(0.3), lambda module: 0.3 * module.updates.sum(0)),
        (MethodDesign(Average(), 0.5), lambda module: module.updates.mean(0)),
        (
            {"a.weight": MethodDesign(Average()), "b.weight": MethodDesign(TaskArithmetic(1.0))},
            lambda module: module.updates.mean(0) if module.tensor == "a.weight" else module.updates.sum(0),
        ),
    ],
    ids=["method", "design", "by tensor"],
)
def test_methods_and_designs_are_taken(merge: Merge, by_hand: Callable[[ModuleUpdates], Tensor]) -> None:
    one = surrogate_residuals(vectors(), merge, InputGram(), num_surrogates=1)
    other = surrogate_residuals(vectors(), by_hand, InputGram(), num_surrogates=1)
    np.testing.assert_allclose(seen(one), seen(other), rtol=1e-9, atol=1e-12)


def test_a_method_of_the_whole_model_sees_each_surrogate_model() -> None:
    kept: list[ModuleUpdates] = []

    def keep(module: ModuleUpdates) -> Tensor:
        kept.append(module)
        return module.updates[0]

    surrogate_residuals(vectors(), keep, InputGram(), num_surrogates=2)
    method = Ties(density=0.4)
    found = surrogate_residuals(vectors(), method, InputGram(), num_surrogates=2)
    for index, residual_set in enumerate(found.residuals):
        model = kept[index::2]
        ready = method.prepare(model)
        expected = [e for m in model for e in module_residuals(ready(m.updates), m, InputGram())]
        assert Residuals(tuple(expected)).values("raw").tolist() == residual_set.values("raw").tolist()
    for seen_already in (method.prepare(vectors()), AdaMerging()):
        with pytest.raises(ValueError, match="would go into the merges of surrogates"):
            surrogate_residuals(vectors(), seen_already, InputGram(), num_surrogates=1)


def test_experts_in_another_order_and_a_checkpoint_as_the_centre() -> None:
    given = vectors()
    center = TaskVectors(given.base, {"c": given.experts["emoji"]}, dtype=torch.float64).experts["c"]
    poe = ProductOfExperts.of(NAMES[:0:-1], InputGram(), Gaussian(), Relative(1.0))
    found = surrogate_residuals(given, Design(poe, center=center), num_surrogates=1)

    def by_hand(module: ModuleUpdates) -> Tensor:
        z0 = center.read(module.tensor)
        return fixed_point(replace(poe, anchor=replace(poe.anchor, center=z0.unsqueeze(0))).bind(module)).value[0]

    np.testing.assert_allclose(seen(found), seen(surrogate_residuals(given, by_hand, poe, num_surrogates=1)), rtol=1e-9)
    assert found.residuals[0].experts == NAMES[:0:-1]


def test_given_statistics_stay_what_they_are() -> None:
    moments = {name: {"a.weight": torch.eye(7).double(), "b.weight": torch.eye(12).double()} for name in NAMES}
    residual_map = Activation(ModuleMoments("activations", moments))
    found = surrogate_residuals(vectors(), lambda module: 0 * module.updates[0], residual_map, num_surrogates=1)
    for entry, module in zip(found.residuals[0].entries[::3], vectors(), strict=True):
        lengths = module.updates[0].norm(dim=1)
        np.testing.assert_allclose(-entry.signed, entry.lengths)
        assert abs(np.log(entry.lengths) - lengths.log().numpy()).max() < 1.0


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one is needed"):
        surrogate_residuals(vectors(), Average(), InputGram(), num_surrogates=0)
    with pytest.raises(ValueError, match="has no experts to measure residuals"):
        surrogate_residuals(vectors(), IsoC())


# Null control


def control(given: TaskVectors, num_surrogates: int = 3) -> tuple[Residuals, Surrogates]:
    average = {n: torch.stack([e.read(n) for e in given.experts.values()]).mean(0) for n in given.treatments}
    real = residuals(average, given, InputGram())
    return real, surrogate_residuals(given, Average(), InputGram(), num_surrogates=num_surrogates)


def test_p_values_are_ranks() -> None:
    real, made = control(vectors())
    found = null_control(real, made, level=0.25)
    gains = [found.gain, *found.surrogate_gains]
    assert found.p_value == sum(gain >= found.gain for gain in gains) / 4
    assert found.p_lighter == sum(gain <= found.gain for gain in gains) / 4
    pooled = [student_gain(each.values()) for each in (real, *made.residuals)]
    np.testing.assert_allclose([found.pooled_gain, *found.surrogate_pooled_gains], pooled)
    assert f"p = {found.p_value:.3g}" in found.verdict
    heavy = replace(found, gain=1e9)
    assert (heavy.heavy_tailed, heavy.lighter, heavy.p_value) == (True, False, 0.25)
    assert heavy.verdict.startswith("heavier-tailed than Gaussian updates of the same sizes")
    light = replace(found, gain=-1e9)
    assert light.verdict.startswith("not heavy-tailed but lighter-tailed")


def test_a_part_is_compared_with_the_same_part() -> None:
    real, made = control(vectors())
    part = real.where(expert="emoji")
    assert made.of(part).residuals[0].values().tolist() == made.residuals[0].where(expert="emoji").values().tolist()
    tails = pooled_tails(real.split("expert")["emoji"], ["Gaussian", "Student-t"], surrogates=made, level=0.25)
    null = tails.null
    assert null is not None
    assert null.gain == null_control(part, made, level=0.25).gain
    assert tails.surrogate is not None
    assert "one merge of Gaussian updates" in tails.verdict


def test_surrogates_of_something_else_are_refused() -> None:
    real, made = control(vectors())
    with pytest.raises(ValueError, match="never reaches the level"):
        null_control(real, made)
    others = surrogate_residuals(vectors(), Average(), OutputGram(), num_surrogates=3)
    with pytest.raises(ValueError, match="the surrogates have other residuals"):
        null_control(real, others, level=0.25)
    with pytest.raises(ValueError, match="have no residuals of"):
        made.of(Residuals(tuple(replace(entry, module="c.weight") for entry in real.entries)))
    with pytest.raises(ValueError, match="Give the `Residuals`"):
        pooled_tails({"a": np.arange(20.0)}, surrogates=made)


def test_numbers_per_expert_are_tested_too() -> None:
    given = vectors()
    average = {n: torch.stack([e.read(n) for e in given.experts.values()]).mean(0) for n in given.treatments}
    made = surrogate_residuals(given, Average(), Directional(), num_surrogates=3)
    found = null_control(residuals(average, given, Directional()), made, unit="own", level=0.25)
    assert found.warnings == ("only 6 residuals",)
    assert "not to be trusted: only 6 residuals" in found.verdict


SEEDS = 14


@pytest.mark.parametrize(
    "case",
    [case for case in SIMULATIONS if case.null and case.merge == Average()],
    ids=lambda case: case.name,
)
def test_gaussian_updates_are_not_called_heavy_tailed(case: Simulated) -> None:
    rejected = int((p_values(case, SEEDS) <= 0.05).sum())
    assert rejected <= binom.isf(ERROR, SEEDS, 0.05)


@pytest.mark.parametrize(
    "case",
    [
        Simulated("entries", False, degrees=1.5),
        Simulated("rows", False, degrees=2.0, by_row=True, sizes="shared"),
    ],
    ids=lambda case: case.name,
)
def test_heavy_tails_are_called_so_far_more_often_than_the_level(case: Simulated) -> None:
    rejected = int((p_values(case, SEEDS) <= 0.05).sum())
    assert rejected > binom.isf(ERROR, SEEDS, 0.05)


@pytest.mark.parametrize("case", [case for case in SIMULATIONS if case.merge != Average()], ids=lambda case: case.name)
def test_products_of_experts_are_simulated_too(case: Simulated) -> None:
    (p,) = p_values(case, 1)
    assert round(20 * float(p), 9) in range(1, 21)  # a rank among 19 surrogates


# The benchmarks' pages


def test_the_pages_say_what_was_found() -> None:
    found = {case.name: np.full(20, 0.05 if not case.null else 1.0) for case in SIMULATIONS}
    page = tails_null.report(found, 7.0)
    assert "| rows of equal size | holds | 0% | 1.00 |" in page
    assert "| Student-t(4) entries, sd 0.3 | does not hold | 100% | 0.05 |" in page
    real, made = control(vectors())
    poe = ProductOfExperts.of(vectors().names, InputGram(), Gaussian())
    assert [entry.tensor for entry in tails_suites.merged_residuals(vectors(), poe).entries]
    chosen = tails_suites.parts(real, {"first": r"^a\.", "none": "nothing"})
    assert list(chosen) == ["all modules", "first"]
    assert {entry.tensor for entry in chosen["first"].entries} == {"a.weight"}
    null = null_control(real, made, level=0.25)
    answer = tails_suites.Answer.of("toy", 0, "Gaussian", "own", "all modules", null)
    page = tails_suites.report([answer], 3, "the command")
    assert f"| toy, seed 0 | Gaussian | own | all modules | {null.gain:.1f} |" in page
    how = "heavier-tailed than" if null.heavy_tailed else "lighter-tailed than" if null.lighter else "like"
    assert f"- toy, Gaussian, own sizes: {how} Gaussian updates (seed 0, p = {null.p_value:.2f})." in page
