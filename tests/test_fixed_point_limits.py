"""The fixed point at its limits: starts, statuses, precision, large modules, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from inference import Status, fixed_point, minimize
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Cauchy,
    Custom,
    Directional,
    Energy,
    Expert,
    FactorExpert,
    GeneralizedGaussian,
    Identity,
    InputGram,
    ModuleUpdates,
    Operator,
    OutputGram,
    ProductOfExperts,
    Relative,
    RelativePrecision,
    ResidualMap,
    StudentT,
    Welsch,
    average,
    span_statistics,
)
from tests.helpers import ENERGIES, MAPS, assert_close, merged, name_of, random_updates
from tests.seeds import seeded

NAMES = ["a", "b", "c"]


def test_several_starts_find_the_lower_of_two_minima() -> None:
    # Two opposed experts far apart in their scales: Welsch has one minimum near each, the heavier is lower.
    updates = torch.tensor([[[[4.0]], [[-4.0]]]], dtype=torch.float64)
    experts = Expert("light", Identity(), Welsch(), Absolute(1.0)) * Expert(
        "heavy", Identity(), Welsch(), Absolute(1.0), 3.0
    )
    poe = experts * Anchor(precision=AbsolutePrecision(1e-3))
    stuck = fixed_point(poe.bind(updates), starts=[torch.tensor([[[4.0]]], dtype=torch.float64)])
    best = fixed_point(poe.bind(updates), starts=["experts"])
    assert float(stuck.value) > 3.5
    assert float(best.value) < -3.5
    assert best.info.start == ("expert:heavy",)
    assert best.info.start_energies[0, 0] > best.info.start_energies[0, 1]


def test_convex_energies_in_q_say_that_they_searched(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 4, 5)
    poe = ProductOfExperts.of(NAMES, InputGram(), GeneralizedGaussian(6.0), Relative(0.3))
    solution = fixed_point(poe.bind(updates), acceleration=False, max_steps=2000)
    assert solution.status == (Status.CONVERGED_LINE_SEARCH,)
    assert "not concave" in str(solution.status[0])


def test_too_few_steps_is_a_status_and_not_a_result_in_disguise(generator: torch.Generator) -> None:
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy(), Relative(0.1))
    solution = fixed_point(poe.bind(random_updates(generator, 1, 3, 4, 5)), max_steps=2, starts=["ones"])
    assert not solution.converged
    assert solution.status[0] is Status.MAX_STEPS
    assert "raise max_steps" in str(solution.status[0])


def test_float32_converges_to_its_default_tolerance_and_is_near_float64(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 4, 60, 80)
    for residual_map in (Directional(), OutputGram(), InputGram(), (OutputGram(), InputGram())):
        poe = ProductOfExperts.of(list("abcd"), residual_map, Cauchy(), Relative(0.5))
        single, double = fixed_point(poe.bind(updates.float())), fixed_point(poe.bind(updates))
        assert single.converged
        assert_close(single.value.double(), double.value, 1e-4)


def test_half_precision_is_computed_in_float32(generator: torch.Generator) -> None:
    poe = ProductOfExperts.of(NAMES)
    for dtype in (torch.bfloat16, torch.float16):
        updates = random_updates(generator, 1, 3, 4, 5).to(dtype)
        posterior = poe.bind(updates)
        value = fixed_point(posterior).value
        assert value.dtype == posterior.dtype == torch.float32
        assert torch.equal(value, fixed_point(poe.bind(updates.float())).value)
        assert_close(value.double(), fixed_point(poe.bind(updates.double())).value, 1e-4)


def test_inputs_are_not_changed_and_may_be_non_contiguous(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 5, 4)
    view = updates.mT
    assert not view.is_contiguous()
    for residual_map in MAPS:
        poe = ProductOfExperts.of(NAMES, residual_map, anchor=Anchor(average))  # type: ignore[arg-type]
        before = view.clone()
        value = fixed_point(poe.bind(view)).value
        assert torch.equal(view, before)
        assert_close(value, fixed_point(poe.bind(view.contiguous())).value, 1e-12)


def test_batched_modules_are_solved_as_if_alone(generator: torch.Generator) -> None:
    updates = random_updates(generator, 4, 3, 5, 6)
    updates[2] *= 100
    poe = ProductOfExperts.of(NAMES, InputGram(), StudentT(2.0), Relative(0.2))
    together = fixed_point(poe.bind(updates))
    for module in range(4):
        alone = fixed_point(poe.bind(updates[module]))
        assert alone.value.shape == (1, 5, 6)
        assert_close(together.value[module], alone.value[0], 1e-8)
        assert int(alone.info.steps) == int(together.info.steps[module])


def test_module_updates_are_matched_by_name(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 4, 5)[0]
    module = ModuleUpdates("layer.weight", "layer.weight", ("c", "a", "b"), torch.zeros(4, 5), updates)
    poe = ProductOfExperts.of(NAMES, importance=[1.0, 2.0, 3.0])
    assert_close(fixed_point(poe.bind(module)).value, fixed_point(poe.bind(updates[[1, 2, 0]])).value, 1e-12)
    with pytest.raises(ValueError, match="'d', but the task vectors are c, a, b"):
        fixed_point(ProductOfExperts.of(["a", "d"]).bind(module))


def test_an_undetermined_direction_is_one_clear_error(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 2, 3, 6)
    updates[..., 3:] = 0  # nobody says anything about three of the inputs
    poe = ProductOfExperts.of(["a", "b"], InputGram(), anchor=Anchor(precision=AbsolutePrecision(0.0)))
    with pytest.raises(ValueError, match="Raise the anchor's precision"):
        fixed_point(poe.bind(updates.repeat(1, 1, 2, 1)))


def test_factor_experts_are_sent_to_lbfgs_which_agrees_with_the_fixed_point(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 4, 5)
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy(), Relative(0.5))
    with_factor = poe * FactorExpert("tilt", lambda c: c.sum(-1), coordinates="span")
    with pytest.raises(ValueError, match="minimize"):
        fixed_point(with_factor.bind(updates, coordinates="span"))
    posterior = poe.bind(updates, coordinates="span")
    coefficients = posterior.coefficients(fixed_point(posterior).value)
    assert posterior.span is not None
    generic = minimize(posterior, posterior.span.latents(coefficients + 0.01))
    assert generic.converged
    assert_close(posterior.coefficients(generic.value)[..., :3], coefficients[..., :3], 1e-5)
    tilted = with_factor.bind(span_statistics(with_factor, updates))
    moved = minimize(tilted)
    assert moved.converged
    assert float(moved.info.joint_energy) < float(tilted.joint_energy(generic.value))


@pytest.mark.parametrize(
    "residual_map", ["OutputGram()", "InputGram()", "(OutputGram(), InputGram())", "Directional()"]
)
def test_an_embedding_of_30000_rows_merges_in_ordinary_memory(residual_map: str) -> None:
    # A 30,000 x 30,000 Gram matrix alone would take 3.6 GB in float32.
    code = (
        "import resource, torch; torch.set_num_threads(1)\n"
        "from inference import fixed_point\nfrom poe_models import *\n"
        "updates = 0.02 * torch.randn(1, 3, 30_000, 64, generator=torch.Generator().manual_seed(0))\n"
        "start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"solution = fixed_point(ProductOfExperts.of(list('abc'), {residual_map}).bind(updates), starts=['twin'])\n"
        "assert solution.converged, solution.status\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)\n"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert grown < 700_000  # kB; the updates themselves are 23,000


@pytest.mark.parametrize("energy", ENERGIES, ids=name_of)
def test_small_scales_in_float32_do_not_break_the_acceleration(energy: Energy) -> None:
    for seed in range(4):
        updates = torch.randn(4, 3, 12, 16, generator=seeded(seed))
        for residual_map in (InputGram(), OutputGram(), Directional()):
            poe = ProductOfExperts.of(NAMES, residual_map, energy, Relative(0.05))
            solution = fixed_point(poe.bind(updates), max_steps=500)
            assert bool(solution.value.isfinite().all())
            assert bool((solution.info.energy_trace.diff() <= 1e-5 * solution.info.energy_trace[:, 1:].abs()).all())


@pytest.mark.parametrize("residual_map", [InputGram(), OutputGram()], ids=name_of)
@pytest.mark.parametrize("eta", [1e-2, 1e-4, 1e-5])
def test_low_rank_updates_in_float32_are_right_or_say_so(
    residual_map: ResidualMap, eta: float, generator: torch.Generator
) -> None:
    left = torch.randn(1, 4, 64, 4, generator=generator, dtype=torch.float64)
    right = torch.randn(1, 4, 4, 96, generator=generator, dtype=torch.float64)
    updates = (left @ right).float()
    poe = ProductOfExperts.of(list("abcd"), residual_map, anchor=Anchor(precision=RelativePrecision(eta)))
    single, double = fixed_point(poe.bind(updates)), fixed_point(poe.bind(updates.double()))
    assert double.converged
    error = float((single.value - double.value).norm() / double.value.norm())
    assert error < 1e-4 or not single.converged
    if eta >= 1e-4:
        assert single.converged


def test_identical_experts_without_an_anchor_are_refused_and_not_answered_with_noise(
    generator: torch.Generator,
) -> None:
    updates = random_updates(generator, 1, 1, 12, 16).expand(1, 2, 12, 16)
    poe = ProductOfExperts.of(["a", "b"], Directional(), anchor=Anchor(precision=AbsolutePrecision(0.0)))
    with pytest.raises(ValueError, match="Raise the anchor's precision"):
        fixed_point(poe.bind(updates))


def test_an_update_that_is_rounding_beside_the_others_drops_out(generator: torch.Generator) -> None:
    updates = 0.01 * random_updates(generator, 1, 3, 12, 16).float()
    updates[0, 0] = 0
    without = fixed_point(ProductOfExperts.of(NAMES).bind(updates))
    updates[0, 0, 0, 0] = 2e-10
    solution = fixed_point(ProductOfExperts.of(NAMES).bind(updates))
    assert solution.record()["inactive"] == ["a"]
    assert_close(solution.value, without.value, 1e-5)


def test_scaling_holds_with_a_zero_expert_on_both_sides(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 4, 5)
    updates[:, 1] = 0
    poe = ProductOfExperts.of(NAMES, (Identity(), InputGram()), Cauchy(), Relative(0.5))
    assert_close(fixed_point(poe.bind(1e-3 * updates)).value, 1e-3 * fixed_point(poe.bind(updates)).value, 1e-7)


def test_span_keeps_small_updates_as_directions(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 4, 5)
    updates[:, 0] *= 1e-6
    poe = ProductOfExperts.of(NAMES, Directional(), Cauchy(), Relative(0.5))
    assert_close(merged(poe.bind(updates, coordinates="span")), merged(poe.bind(updates)), 1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinates": "Full"}, "'full' or 'span'"),
        ({"coordinates": "span", "low_rank": (torch.ones(1), torch.ones(1))}, "save nothing in Span"),
        ({"through": torch.ones(4, 5)}, "a span goes through a merge"),
    ],
)
def test_coordinates_that_cannot_be_bound_are_refused(
    arguments: dict[str, object], message: str, generator: torch.Generator
) -> None:
    with pytest.raises(ValueError, match=message):
        ProductOfExperts.of(NAMES).bind(random_updates(generator, 1, 3, 4, 5), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"starts": "twin"}, "a sequence of starts"),
        ({"starts": ["nowhere"]}, "no start is called 'nowhere'"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, object], message: str, generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=message):
        fixed_point(ProductOfExperts.of(NAMES).bind(random_updates(generator, 1, 3, 4, 5)), **arguments)  # type: ignore[arg-type]


def test_an_energy_with_an_infinite_weight_is_named(generator: torch.Generator) -> None:
    poe = ProductOfExperts.of(NAMES, InputGram(), Custom(lambda q: q.sqrt()))
    with pytest.raises(ValueError, match="finite slope at q = 0"):
        fixed_point(poe.bind(random_updates(generator, 1, 3, 4, 5)))


def test_an_unknown_operator_is_not_taken_for_another(generator: torch.Generator) -> None:
    class Other(Operator):
        def __init__(self, update: Tensor) -> None:
            self.update = update

        def root(self, x: Tensor) -> Tensor:
            return x.cumsum(-1)

        def apply(self, x: Tensor) -> Tensor:
            return x.cumsum(-1).flip(-1).cumsum(-1).flip(-1)

        def mean_curvature(self, num_updates: int) -> Tensor:
            return torch.ones(len(self.update), dtype=torch.float64)

        def dimension(self) -> Tensor:
            return torch.full((len(self.update),), 20.0, dtype=torch.float64)

        def log_pseudo_determinant(self) -> Tensor:
            return torch.zeros(len(self.update), dtype=torch.float64)

        def module(self, one: slice) -> Operator:
            return Other(self.update[one])

        def to(self, dtype: torch.dtype) -> Operator:
            return Other(self.update.to(dtype))

    class Cumulative(ResidualMap):
        def operator(self, update: Tensor) -> Operator:
            return Other(update)

    updates = random_updates(generator, 1, 3, 4, 5)
    poe = ProductOfExperts.of(NAMES, Cumulative())
    with pytest.raises(TypeError, match="no factorisation"):
        fixed_point(poe.bind(updates))
    assert fixed_point(poe.bind(updates, coordinates="span")).converged


@pytest.mark.gpu
@pytest.mark.parametrize("residual_map", MAPS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cpu_and_device_agree(
    residual_map: object, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    updates = random_updates(generator, 3, 4, 60, 80, dtype=dtype)
    poe = ProductOfExperts.of(list("abcd"), residual_map, Cauchy(), Relative(0.5), anchor=Anchor(average))  # type: ignore[arg-type]
    tolerance = 1e-3 if dtype == torch.float32 else 1e-8
    for coordinates in ("full", "span"):
        cpu = merged(poe.bind(updates, coordinates=coordinates))  # type: ignore[arg-type]
        there = merged(poe.bind(updates.to(device), coordinates=coordinates))  # type: ignore[arg-type]
        assert there.device.type == device.type
        assert_close(there.cpu(), cpu, tolerance)
    one, other = span_statistics(poe, updates), span_statistics(poe, updates.to(device))
    assert_close(other.forms.cpu(), one.forms, 1e-5 if dtype == torch.float32 else 1e-12)
    assert_close(other.gram.cpu(), one.gram, 1e-12)
