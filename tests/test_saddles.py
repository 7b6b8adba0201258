"""A stationary point that is no strict minimum is not converged: the solver, `merge` and the command line say so."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from inference import Status, fixed_point, minimize
from inference.curvature import least_curvature
from inference.models.merge import Design, merge_checkpoint
from inference.reweighting import SolverOptions
from poe_merge.cli import run
from poe_models import (
    Absolute,
    AbsolutePrecision,
    Anchor,
    Balanced,
    Cauchy,
    Directional,
    Expert,
    FactorExpert,
    Gaussian,
    Huber,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    Relative,
    RelativePrecision,
    ResidualMap,
    TaskVectors,
    Welsch,
)
from tests.helpers import assert_close, name_of, random_updates

NAMES = ["a", "b"]


def opposed(generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """Three modules of two experts that are each other's negative, `(3, 2, 4, 5)`."""
    update = random_updates(generator, 3, 1, 4, 5, dtype=dtype)
    return torch.cat([update, -update], 1)


def product(
    residual_map: ResidualMap, gamma: float = 0.7, energy: type[Cauchy] | type[Welsch] = Cauchy
) -> ProductOfExperts:
    anchor = Anchor(precision=AbsolutePrecision(1e-3))
    return ProductOfExperts.of(NAMES, residual_map, energy(), Relative(gamma), anchor=anchor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("energy", [Cauchy, Welsch])
@pytest.mark.parametrize("residual_map", [Identity(), OutputGram(), InputGram()], ids=name_of)
def test_opposed_experts_have_a_saddle_at_zero_and_minima_beside_it(
    residual_map: ResidualMap, energy: type[Cauchy], dtype: torch.dtype, generator: torch.Generator
) -> None:
    updates, poe = opposed(generator, dtype), product(residual_map, energy=energy)
    stuck = fixed_point(poe.bind(updates), starts=["twin"])
    assert stuck.status == (Status.SADDLE,) * 3
    assert not stuck.converged
    assert not bool(stuck.info.strict_minimum.any())
    assert_close(stuck.value, torch.zeros_like(updates[:, 0]))
    # By the dense Hessian: downwards along the experts, upwards elsewhere.
    posterior = poe.bind(updates[:1].double())
    hessian = torch.func.hessian(lambda z: posterior.energy(z.view(1, 4, 5)).sum())(
        torch.zeros(20, dtype=torch.float64)
    )
    assert float(torch.linalg.eigvalsh(hessian)[0]) < 0 < float(torch.linalg.eigvalsh(hessian)[-1])
    # The default starts leave it for a minimum with a lower energy.
    best = fixed_point(poe.bind(updates))
    assert best.status == (Status.CONVERGED,) * 3
    assert bool(best.info.strict_minimum.all())
    assert bool((best.info.energy < stuck.info.energy - 0.1).all())
    assert set(best.info.start) <= {"expert:a", "expert:b"}
    assert_close(best.info.start_energies[:, 0], stuck.info.energy, 1e-6)


def test_opposed_directional_experts_on_one_line_too(generator: torch.Generator) -> None:
    updates = opposed(generator)
    assert fixed_point(product(Directional()).bind(updates), starts=["twin"]).status == (Status.SADDLE,) * 3
    assert fixed_point(product(Directional()).bind(updates)).converged


def test_a_wide_scale_makes_the_middle_a_minimum(generator: torch.Generator) -> None:
    solution = fixed_point(product(Identity(), gamma=3.0).bind(opposed(generator)), starts=["twin"])
    assert solution.status == (Status.CONVERGED,) * 3
    assert bool(solution.info.strict_minimum.all())


@pytest.mark.parametrize(
    ("widening", "status"), [(-1e-3, Status.SADDLE), (0.0, Status.SADDLE), (1e-3, Status.CONVERGED)]
)
def test_where_the_minimum_turns_into_a_saddle_it_is_too_flat_to_tell(widening: float, status: Status) -> None:
    # Cauchy at 1 and -1 with s = 1: (1 + (z - 1)^2) (1 + (z + 1)^2) = 4 + z^4 has no curvature at z = 0.
    updates = torch.tensor([[[1.0]], [[-1.0]]], dtype=torch.float64)
    anchor = Anchor(precision=AbsolutePrecision(1e-12))
    poe = ProductOfExperts.of(NAMES, Identity(), Cauchy(), Absolute(1.0 + widening), anchor=anchor)
    assert fixed_point(poe.bind(updates), starts=["twin"]).status == (status,)


def test_a_start_beside_a_saddle_is_not_taken_for_on_its_way_there() -> None:
    updates = torch.tensor([[[1.0]], [[-1.0]]], dtype=torch.float64)
    anchor = Anchor(precision=AbsolutePrecision(1e-3))
    poe = ProductOfExperts.of(NAMES, Identity(), Cauchy(), Absolute(0.5), anchor=anchor)
    saddle, beside = (torch.full((1, 1, 1), z, dtype=torch.float64) for z in (0.0, 1e-3))
    solution = fixed_point(poe.bind(updates), starts=[saddle, beside])
    assert solution.converged
    assert float(solution.value) > 0.5


def test_merge_counts_a_saddle_as_not_converged(tmp_path: Path, generator: torch.Generator) -> None:
    update = random_updates(generator, 1, 1, 4, 5)[0, 0]
    states = {"a": {"up.weight": update, "down.weight": update}, "b": {"up.weight": -update, "down.weight": update}}
    vectors = TaskVectors({name: torch.zeros(4, 5) for name in ("up.weight", "down.weight")}, states)
    design = Design(product(Identity()), options=SolverOptions(starts=("twin",)))
    report = merge_checkpoint(vectors, design, tmp_path / "merged")
    assert report.status == {"saddle": 1, "converged": 1}
    assert report.not_converged == ("up.weight",)
    record = json.loads((tmp_path / "merged" / "poe_merge.json").read_text())
    found = {m["module"]: m["status"] for tensor in record["tensors"] for m in tensor.get("modules", ())}
    assert found == {"up.weight": "saddle", "down.weight": "converged"}
    assert "1 of 2 matrices: saddle" in (tmp_path / "merged" / "README.md").read_text()
    assert merge_checkpoint(vectors, Design(product(Identity())), tmp_path / "again").status == {"converged": 2}


def test_the_command_line_warns_of_a_saddle_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], generator: torch.Generator
) -> None:
    monkeypatch.chdir(tmp_path)
    update = random_updates(generator, 1, 1, 4, 5)[0, 0]
    for name, factor in {"base": 0.0, "a": 1.0, "b": -1.0}.items():
        Path(name).mkdir()
        save_file({"mlp.weight": (factor * update).clone()}, Path(name) / "model.safetensors")
    config = {
        "merge_method": "poe",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
        "dtype": "float64",
        "parameters": {
            "energy": "Cauchy",
            "residual_map": "Identity",
            "scale": "Relative(0.7)",
            "eta": 0.05,
            "starts": ["twin"],
        },
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert run(["merge", "config.yaml", "--out", "out"]) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "warning: 1 of 1 matrices stopped at a saddle" in err
    assert "add starts" in err
    assert "warning: not converged: mlp.weight" in err


@pytest.mark.parametrize("coordinates", ["full", "span"])
@pytest.mark.parametrize("energy", [Cauchy, Welsch])
@pytest.mark.parametrize("residual_map", [Identity(), InputGram(), Directional()], ids=name_of)
def test_the_generic_map_leaves_the_saddle_where_it_starts(
    residual_map: ResidualMap,
    energy: type[Cauchy],
    coordinates: Any,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The average of opposed updates, the default start, has no gradient at all."""
    posterior = product(residual_map, energy=energy).bind(opposed(generator), coordinates=coordinates)
    found, best = minimize(posterior, tolerance=1e-5), fixed_point(posterior)
    assert found.status == (Status.CONVERGED,) * 3
    torch.testing.assert_close(found.info.energy, best.info.energy, rtol=1e-6, atol=0.0)
    monkeypatch.setattr(sys.modules["inference.minimize"], "STEPS_OFF", ())
    stuck = minimize(posterior, tolerance=1e-5)
    assert stuck.status == (Status.SADDLE,) * 3
    assert bool((stuck.info.energy > found.info.energy + 1e-3).all())


def test_factors_that_join_modules_are_left_together(generator: torch.Generator) -> None:
    """At zero no module curves down by itself, but the product of two coefficients does."""
    well = FactorExpert("well", lambda c: (c[..., 0, 0] * c[..., 1, 0] - 1).square(), "span", "model")
    pair = [Expert(name, Identity(), Gaussian(), Absolute(1.0), importance=1e-3) for name in NAMES]
    poe = ProductOfExperts(tuple(pair), anchor=Anchor(precision=AbsolutePrecision(1e-4))) * well
    posterior = poe.bind(opposed(generator)[:2], coordinates="span")
    zero = torch.zeros_like(posterior.experts[0].update)
    at_zero = float(posterior.joint_energy(zero))
    found = minimize(posterior, zero)
    assert found.converged
    assert float(found.info.joint_energy) < at_zero - 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_least_curvature_is_the_hessians(dtype: torch.dtype, generator: torch.Generator) -> None:
    root = torch.randn(3, 12, 12, generator=generator, dtype=dtype)
    hessian = root + root.mT

    def gradient(x: Tensor) -> Tensor:
        return (hessian @ x.flatten(1).unsqueeze(-1)).reshape(x.shape)

    x = torch.randn(3, 3, 4, generator=generator, dtype=dtype)
    ratio, direction = least_curvature(gradient, x)
    values, vectors = torch.linalg.eigh(hessian.double())
    tolerance = 1e-7 if dtype == torch.float64 else 5e-3
    torch.testing.assert_close(ratio, values[:, 0] / values.abs().amax(-1), rtol=tolerance, atol=tolerance)
    along = (direction.flatten(1).double() * vectors[..., 0]).sum(-1).abs()
    torch.testing.assert_close(along, torch.ones(3, dtype=torch.float64), rtol=tolerance, atol=tolerance)


def test_a_curvature_that_one_vector_shows_is_enough() -> None:
    """Where the first direction is an eigenvector, as all are of a multiple of the identity, the next is drawn anew."""
    ratio, direction = least_curvature(lambda x: -2 * x, torch.zeros(2, 5, dtype=torch.float64))
    torch.testing.assert_close(ratio, -torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(direction.norm(dim=1), torch.ones(2, dtype=torch.float64), rtol=1e-9, atol=0.0)


def test_modules_of_unequal_size_leave_their_saddles_under_a_factor(generator: torch.Generator) -> None:
    """A factor that hardly counts joins the modules, one of which is a thousand times as large."""
    factor = FactorExpert("tiny", lambda c: 1e-9 * c[..., 0, 0].sum(-1).square(), "span", "model")
    updates = opposed(generator)[:2] * torch.tensor([1.0, 1000.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    anchor = Anchor(precision=RelativePrecision(0.01))
    poe = ProductOfExperts.of(NAMES, Identity(), Cauchy(), Balanced(0.3), anchor=anchor)
    found, best = minimize((poe * factor).bind(updates, coordinates="span")), fixed_point(poe.bind(updates))
    torch.testing.assert_close(found.info.energy, best.info.energy, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("eta", [1e-7, 1e-6])
@pytest.mark.parametrize("delta", [0.01, 0.05, 0.1])
def test_a_flat_minimum_of_a_convex_energy_is_no_saddle(delta: float, eta: float, generator: torch.Generator) -> None:
    update = random_updates(generator, 1, 1, 4, 5)
    anchor = Anchor(precision=AbsolutePrecision(eta))
    poe = ProductOfExperts.of(NAMES, Identity(), Huber(delta), Absolute(1.0), anchor=anchor)
    found = minimize(poe.bind(torch.cat([update, 3 * update], 1), coordinates="span"))
    assert Status.SADDLE not in found.status


def test_a_curvature_that_is_not_finite_is_unknown() -> None:
    ratio, direction = least_curvature(lambda x: x * torch.nan, torch.ones(1, 3, dtype=torch.float64))
    assert float(ratio) == 0.0
    assert bool(direction.isfinite().all())
