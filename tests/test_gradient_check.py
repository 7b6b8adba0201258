"""Success that is none: the gradient judges the solver, and energies that cannot pull are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from inference import fixed_point, merge_checkpoint
from inference.gradient_check import judged, relative_gradient
from inference.models.design import Design
from inference.models.plan import plan
from inference.reweighting import SolverOptions
from inference.solution import Status
from poe_merge.cli import run
from poe_merge.specs import ENERGY, SpecError, parse_spec
from poe_models import (
    Anchor,
    Balanced,
    Cauchy,
    Custom,
    Directional,
    GeneralizedGaussian,
    InputGram,
    ProductOfExperts,
    RelativePrecision,
    TaskVectors,
)
from tests.helpers import ENERGIES, assert_close, name_of, random_updates

NAMES = ("a", "b", "c")


def statuses(updates: torch.Tensor, *, options: dict[str, Any] | None = None, **design: Any) -> set[Status]:
    posterior = ProductOfExperts.of(NAMES, **design).bind(updates)
    return set(judged(posterior, fixed_point(posterior, **(options or {}))).status)


@pytest.mark.parametrize("energy", ENERGIES, ids=name_of)
def test_minima_pass(energy: Any, generator: torch.Generator) -> None:
    posterior = ProductOfExperts.of(NAMES, energy=energy).bind(random_updates(generator, 2, 3, 6, 5))
    solution = fixed_point(posterior)
    for status, size in zip(solution.status, relative_gradient(posterior, solution.value), strict=True):
        assert not status.converged or float(size) < 1e-6


def test_modules_are_checked_together_as_alone(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = ProductOfExperts.of(NAMES, energy=Cauchy()).bind(random_updates(generator, 5, 3, 6, 5))
    points = torch.randn(5, 6, 5, generator=generator, dtype=torch.float64)
    points[1] = fixed_point(posterior).value[1]
    together = relative_gradient(posterior, points)
    monkeypatch.setattr("inference.gradient_check.CHUNK", 1)
    assert_close(together, relative_gradient(posterior, points), 1e-12)
    assert float(together[1]) < 1e-6 < float(together[0])


def test_what_is_no_minimum_is_not_called_converged(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 8, 6)
    assert Status.CONVERGED not in statuses(updates, options={"tolerance": 0.9})
    assert Status.CONVERGED not in statuses(updates.float(), energy=GeneralizedGaussian(0.1))


def test_experts_that_are_all_satisfied_are_a_minimum(generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 8, 6)
    design = {"residual_map": Directional(), "anchor": Anchor(None, RelativePrecision(0.0))}
    assert Status.NO_MINIMUM not in statuses(updates, **design)


def test_the_check_is_independent_of_the_weights(generator: torch.Generator) -> None:
    class Wrong(Custom):
        def weight(self, q: torch.Tensor) -> torch.Tensor:
            return super().weight(q) * (1 + q)  # not rho's derivative

    updates = random_updates(generator, 2, 3, 8, 6)
    found = statuses(updates, energy=Wrong(lambda q: q / (1 + q)))
    assert not any(status.converged for status in found)


def test_a_merge_says_so(generator: torch.Generator, tmp_path: Path) -> None:
    weights = [f"layers.{i}.weight" for i in range(6)]  # one of 30 stops so near that it is a minimum all the same
    base = {each: torch.randn(6, 5, generator=generator) for each in weights}
    experts = {name: {each: torch.randn(6, 5, generator=generator) for each in weights} for name in NAMES}
    options = SolverOptions(tolerance=0.9)
    report = merge_checkpoint(
        TaskVectors(base, experts),
        Design(ProductOfExperts.of(NAMES, InputGram(), Cauchy(), Balanced(0.1)), options=options),
        tmp_path / "out",
    )
    assert report.status["no_minimum"] >= 3
    assert len(report.not_converged) == report.status["no_minimum"]
    assert set(report.not_converged) <= set(weights)


@pytest.mark.parametrize(
    "rho", ["q.detach() + 0 * q", "(q > 1).double()", "torch.as_tensor(q.detach().numpy())", "0 * q"]
)
def test_an_energy_without_a_gradient_is_refused(rho: str, tmp_path: Path) -> None:
    imports = "import torch\nfrom poe_models import Energy\n"
    (tmp_path / "own.py").write_text(f"{imports}class Own(Energy):\n    def rho(self, q):\n        return {rho}\n")
    with pytest.raises(SpecError, match="rho"):
        parse_spec("own.py:Own", ENERGY, [tmp_path])


@pytest.mark.parametrize("rho", ["q / (1 + q.mean())", "q * q.sum()", "q * torch.rand(())", "q.cumsum(0)"])
def test_an_energy_of_several_residuals_together_is_refused(rho: str, tmp_path: Path) -> None:
    imports = "import torch\nfrom poe_models import Energy\n"
    (tmp_path / "own.py").write_text(f"{imports}class Own(Energy):\n    def rho(self, q):\n        return {rho}\n")
    with pytest.raises(SpecError, match="alone"):
        parse_spec("own.py:Own", ENERGY, [tmp_path])


def test_a_design_that_random_updates_leave_undetermined_names_them(generator: torch.Generator) -> None:
    base = {"fc.weight": torch.randn(6, 5, generator=generator)}
    experts = {name: {"fc.weight": torch.randn(6, 5, generator=generator)} for name in NAMES}
    dead = Custom(lambda q: (q - 1e3).clamp(min=0))
    with pytest.raises(ValueError, match="a module of random updates") as found:
        plan(TaskVectors(base, experts), ProductOfExperts.of(NAMES, energy=dead))
    assert "of the batch" not in str(found.value)


def test_a_merge_that_is_the_base_is_warned_about(
    generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tuned"):
        Path(name).mkdir()
        state = {"fc.weight": torch.randn(4, 4, generator=generator), "fc.bias": torch.randn(4, generator=generator)}
        save_file(state, f"{name}/model.safetensors")
    models = ["--base-model", "base", "--model", "tuned"]
    assert run(["merge", *models, "--scaling", "0", "--out", "zero"]) == 0
    assert "the merge is equal to the base" in capsys.readouterr().err
    assert run(["merge", *models, "--out", "one"]) == 0
    assert "equal to the base" not in capsys.readouterr().err
