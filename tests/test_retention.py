"""How much of every expert a merge kept, and what is said about it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from inference import Design, fixed_point, merge_checkpoint, minimize
from inference.models.method_design import MethodDesign
from inference.retention import ExpertRetention, concerns, totals
from poe_merge.cli import app
from poe_merge.console import _kept
from poe_models import (
    Anchor,
    Balanced,
    Cauchy,
    Gaussian,
    InputGram,
    ProductOfExperts,
    Relative,
    RelativePrecision,
    TaskArithmetic,
    TaskVectors,
    span_statistics,
)
from tests.helpers import assert_close, random_updates

NAMES = ["a", "b", "c"]


def product(scale: Balanced | Relative | None = None, eta: float = 0.1) -> ProductOfExperts:
    """Cauchy experts with everything said."""
    anchor = Anchor(precision=RelativePrecision(eta))
    return ProductOfExperts.of(NAMES, InputGram(), Cauchy(), scale or Balanced(1.0), anchor=anchor)


def models(updates: dict[str, Tensor]) -> TaskVectors:
    """A base and experts with the modules `(N, d_out, d_in)` by name."""
    base = {f"{name}.weight": torch.zeros_like(value[0]) for name, value in updates.items()}
    experts = {e: {f"{name}.weight": value[i] for name, value in updates.items()} for i, e in enumerate(NAMES)}
    return TaskVectors(base, experts)


@pytest.mark.parametrize("coordinates", ["full", "span"])
def test_kept_and_left_are_their_formulas(coordinates: str, generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 6, 5)
    posterior = product().bind(updates, coordinates=coordinates)  # type: ignore[arg-type]
    solution = fixed_point(posterior)
    z, found = posterior.update(solution.value), solution.info.retention
    for i in range(3):
        u = updates[:, i]
        assert_close(found.kept[:, i], (z * u).sum((-2, -1)) / u.square().sum((-2, -1)), 1e-10)
        left = ((z - u) @ u.mT).square().sum((-2, -1)) / (u @ u.mT).square().sum((-2, -1))
        assert_close(found.residual_left[:, i], left, 1e-10)
    assert_close(found.norm, z.square().sum((-2, -1)).sqrt(), 1e-10)
    assert_close(found.update_norms, updates.square().sum((-2, -1)).sqrt(), 1e-10)


@pytest.mark.parametrize("scaling", [0.25, 1.0, -2.0])
def test_multiples_of_a_merge_keep_what_they_keep(scaling: float, generator: torch.Generator) -> None:
    updates = random_updates(generator, 2, 3, 6, 5)
    solution = fixed_point(product().bind(updates))
    z, found = scaling * solution.value, solution.info.retention.scaled(scaling)
    for i in range(3):
        u = updates[:, i]
        assert_close(found.kept[:, i], (z * u).sum((-2, -1)) / u.square().sum((-2, -1)), 1e-10)
        left = ((z - u) @ u.mT).square().sum((-2, -1)) / (u @ u.mT).square().sum((-2, -1))
        assert_close(found.residual_left[:, i], left, 1e-9)
    assert_close(found.norm, z.square().sum((-2, -1)).sqrt(), 1e-10)


def test_every_solver_says_what_was_kept(generator: torch.Generator) -> None:
    updates = random_updates(generator, 1, 3, 6, 5)
    posterior = product().bind(span_statistics(product(), updates))
    exact = fixed_point(product().bind(updates, coordinates="span")).info.retention
    assert_close(minimize(posterior).info.retention.kept, exact.kept, 1e-4)


def test_totals_weigh_modules_by_their_size_and_know_lambda(tmp_path: Path, generator: torch.Generator) -> None:
    updates = {
        "one": random_updates(generator, 1, 3, 6, 5)[0],
        "two": 3 * random_updates(generator, 1, 3, 4, 7)[0],
    }
    updates["two"][1] = 0  # b did not change it
    report = merge_checkpoint(models(updates), Design(product(), scaling=0.5), tmp_path / "out")
    merged = {name: fixed_point(product().bind(value.float())).value[0].double() for name, value in updates.items()}
    for i, expert in enumerate(report.experts):
        inner = sum((merged[n] * u[i]).sum() for n, u in updates.items())
        squared = sum(u[i].square().sum() for u in updates.values())
        assert expert.name == NAMES[i]
        assert expert.kept == pytest.approx(float(0.5 * inner / squared), rel=1e-4)
    about_b = report.experts[1]
    assert about_b.length == pytest.approx(float(0.5 * merged["one"].norm() / updates["one"][1].norm()), rel=1e-4)
    u, z = updates["one"][1], 0.5 * merged["one"]
    left = ((z - u) @ u.mT).square().sum() / (u @ u.mT).square().sum()  # of what is written
    assert about_b.residual_left == pytest.approx(float(left), rel=1e-4)
    record = json.loads((tmp_path / "out" / "poe_merge.json").read_text())
    assert record["summary"]["experts"] == [each.record() for each in report.experts]


def test_merging_methods_say_what_was_kept(tmp_path: Path, generator: torch.Generator) -> None:
    updates = {"one": random_updates(generator, 1, 3, 6, 5)[0]}
    design = MethodDesign(TaskArithmetic(1.0), scaling=0.4)
    report = merge_checkpoint(models(updates), design, tmp_path / "out")
    z = 0.4 * updates["one"].sum(0)
    for i, expert in enumerate(report.experts):
        u = updates["one"][i]
        assert expert.kept == pytest.approx(float((z * u).sum() / u.square().sum()), rel=1e-5)
        assert math.isnan(expert.residual_left)


def test_a_fair_merge_raises_no_concern(generator: torch.Generator) -> None:
    updates = torch.randn(1, 3, 32, 24, generator=generator, dtype=torch.float64)
    info = fixed_point(product().bind(updates)).info.retention
    assert concerns(totals([info.record(0)])) == []


def test_the_shortest_expert_in_command_is_said(generator: torch.Generator) -> None:
    updates = torch.randn(1, 3, 32, 24, generator=generator, dtype=torch.float64)
    updates[:, 2] *= 0.8
    of_relative = fixed_point(product(Relative(1.0)).bind(updates)).info.retention
    updates[:, 2] /= 80
    shortest = fixed_point(product(Relative(1.0)).bind(updates)).info.retention
    assert concerns(totals([of_relative.record(0)])) == []  # a little shorter: the others keep their share
    (said,) = concerns(totals([shortest.record(0)]))
    assert said.startswith("the merge is little more than the base")
    assert "as long as 'c' is" in said
    balanced = fixed_point(product().bind(updates)).info.retention
    (drowned,) = concerns(totals([balanced.record(0)]))  # by what the others change in its few directions
    assert drowned.startswith("expert 'c': its squared residual grew ")


@pytest.mark.parametrize("eta", [1e3, 1e6])
def test_a_merge_that_the_anchor_holds_is_said(eta: float, generator: torch.Generator) -> None:
    updates = torch.randn(1, 3, 32, 24, generator=generator, dtype=torch.float64)
    info = fixed_point(product(eta=eta).bind(updates)).info.retention
    (said,) = concerns(totals([info.record(0)]))
    assert said.startswith("the merge is little more than the base")


def test_one_expert_alone_and_one_passed_by_are_said() -> None:
    fair, passed = ExpertRetention("a", 0.4, 0.4, 1.0), ExpertRetention("b", 0.03, 0.97, 1.0)
    assert concerns([fair, fair]) == []
    assert concerns([fair, fair, passed]) == ["expert 'b': 97 % of its squared residual left, 3 % of its update kept."]
    alone = concerns([fair, passed, passed])
    assert len(alone) == 3
    assert alone[0].startswith("the merge is little more than the expert 'a'")
    (nobody,) = concerns([passed, passed])
    assert nobody.startswith("no expert has its share")
    unknown = ExpertRetention("z", math.nan, math.nan, math.nan)
    nothing = f"{unknown.name!r} has no update in any merged tensor. Leave it out, or look for copies of the base."
    assert concerns([unknown]) == [nothing]
    assert concerns([fair, unknown, fair]) == [nothing]
    (both,) = concerns([unknown, fair, unknown])
    assert "have no update" in both


def test_averages_of_many_models_are_not_called_the_base(generator: torch.Generator) -> None:
    updates = torch.randn(8, 32, 24, generator=generator, dtype=torch.float64)
    names = list("abcdefgh")
    poe = ProductOfExperts.of(names, InputGram(), Gaussian(), Balanced(1.0))
    assert concerns(totals([fixed_point(poe.bind(updates)).info.retention.record(0)])) == []


def test_a_residual_that_grew_is_printed_as_a_factor() -> None:
    assert _kept(ExpertRetention("a", 0.48, 6.66, 1.0)) == "a 48% (its squared residual grew 7-fold)"
    assert _kept(ExpertRetention("a", 0.48, 0.2, 1.0)) == "a 48% (20% of its squared residual left)"


def test_merge_prints_what_was_kept(tmp_path: Path, generator: torch.Generator) -> None:
    from safetensors.torch import save_file

    updates = torch.randn(2, 8, 6, generator=generator)
    updates[1] *= 1e-3
    for name, value in (("base", torch.zeros(8, 6)), ("a", updates[0]), ("b", updates[1])):
        (tmp_path / name).mkdir()
        save_file({"layer.weight": value}, tmp_path / name / "model.safetensors")
    arguments = ["merge", "--base-model", "base", "--model", "a=a", "--model", "b=b", "--out", "out"]
    here = [str(tmp_path / each) if each in ("base", "out") else each for each in arguments]
    here = [each.replace("=", f"={tmp_path}/") if each in ("a=a", "b=b") else each for each in here]
    done = CliRunner().invoke(app, [*here, "--scale", "Relative(1)"])
    assert done.exit_code == 0
    assert "Kept of the experts' updates: a 0% (100% of its squared residual left)" in done.output
    assert "the merge is little more than the expert 'b'" in done.output.replace("\n", " ")
