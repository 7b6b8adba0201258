"""Importance and λ mean the same for tensors that are averaged as for those that are merged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from inference import merge_checkpoint, sample_full
from inference.models.averages import Average, ModelDesigns
from inference.models.design import Design
from inference.models.ensemble import MergedEnsemble
from inference.models.method_design import MethodDesign
from poe_models import ProductOfExperts, TaskVectors, Ties
from tests.helpers import assert_close

SHAPES = {"fc.weight": (6, 5), "fc.bias": (6,), "embeddings.weight": (9, 4)}


@pytest.fixture
def vectors(generator: torch.Generator) -> TaskVectors:
    def state() -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}

    return TaskVectors(state(), {"one": state(), "two": state()})


def merged(vectors: TaskVectors, design: Design | MethodDesign, out: Path) -> dict[str, Tensor]:
    merge_checkpoint(vectors, design, out)
    return load_file(out / "model.safetensors")


def weighted(vectors: TaskVectors, importance: list[float]) -> Design:
    poe = ProductOfExperts.of(vectors.names)
    experts = [each for each, weight in zip(poe.experts, importance, strict=True) if weight]
    made = [replace(each, importance=w) for each, w in zip(experts, filter(None, importance), strict=True)]
    return Design(ProductOfExperts(tuple(made), poe.anchor))


def test_an_expert_of_weight_0_changes_nothing(vectors: TaskVectors, tmp_path: Path) -> None:
    alone = TaskVectors(vectors.base, {"one": vectors.experts["one"]})
    with_other = merged(vectors, weighted(vectors, [1.0, 0.0]), tmp_path / "with")
    without = merged(alone, weighted(alone, [1.0]), tmp_path / "without")
    for name, value in without.items():
        assert_close(with_other[name], value, 1e-5)


@pytest.mark.parametrize("of_method", [False, True])
def test_lambda_0_is_the_base(of_method: bool, vectors: TaskVectors, tmp_path: Path) -> None:
    design = MethodDesign(Ties(), 0.0) if of_method else Design(ProductOfExperts.of(vectors.names), scaling=0.0)
    for name, value in merged(vectors, design, tmp_path / "out").items():
        assert torch.equal(value, vectors.base.read(name))


def test_averages_are_weighted_and_scaled(vectors: TaskVectors, tmp_path: Path) -> None:
    design = Design(weighted(vectors, [3.0, 1.0]).poe, scaling=0.5)
    found = merged(vectors, design, tmp_path / "out")
    for name in ("fc.bias", "embeddings.weight"):
        base, one, two = (each.read(name) for each in (vectors.base, *vectors.experts.values()))
        assert_close(found[name], base + 0.5 * (0.75 * (one - base) + 0.25 * (two - base)), 1e-6)
    assert "averaged tensors are W_0 + λ times" in (tmp_path / "out" / "README.md").read_text()


def test_members_have_the_merges_averages(vectors: TaskVectors, generator: torch.Generator, tmp_path: Path) -> None:
    design = Design(weighted(vectors, [3.0, 1.0]).poe, scaling=0.5)
    found = merged(vectors, design, tmp_path / "out")
    draws = sample_full(vectors, design, 2, generator=generator, chains=1)
    for member in MergedEnsemble(vectors, design, draws).members():
        assert torch.equal(member["fc.bias"], found["fc.bias"])


# --- designs by a function of the user's ---


def test_a_function_is_asked_about_merged_tensors_only(vectors: TaskVectors, tmp_path: Path) -> None:
    table = {"fc.weight": replace(weighted(vectors, [3.0, 1.0]), scaling=0.5)}
    found, expected = tmp_path / "found", tmp_path / "expected"
    merge_checkpoint(vectors, table.__getitem__, found)  # no entry for the others, which follow its only design
    merge_checkpoint(vectors, table["fc.weight"], expected)
    for name, value in load_file(expected / "model.safetensors").items():
        assert torch.equal(load_file(found / "model.safetensors")[name], value)


@pytest.fixture
def two_scalings(generator: torch.Generator) -> tuple[TaskVectors, dict[str, Design]]:
    def state() -> dict[str, Tensor]:
        return {name: torch.randn(4, 4, generator=generator) for name in ("a.weight", "b.weight", "embeddings.weight")}

    vectors = TaskVectors(state(), {"one": state(), "two": state()})
    poe = ProductOfExperts.of(vectors.names)
    return vectors, {"a.weight": Design(poe, scaling=0.5), "b.weight": Design(poe, scaling=0.2)}


def test_averages_that_follow_no_design_are_warned_about(
    two_scalings: tuple[TaskVectors, dict[str, Design]], tmp_path: Path
) -> None:
    vectors, table = two_scalings
    with pytest.warns(UserWarning, match=r"1 averaged tensors \(0.33 of all parameters\) follow none of them") as told:
        merge_checkpoint(vectors, table.__getitem__, tmp_path / "out")
    assert len(told) == 1
    mean = torch.stack([each.read("embeddings.weight") for each in vectors.experts.values()]).mean(0)
    assert_close(load_file(tmp_path / "out" / "model.safetensors")["embeddings.weight"], mean, 1e-6)


def test_averages_may_be_said(two_scalings: tuple[TaskVectors, dict[str, Design]], tmp_path: Path) -> None:
    vectors, table = two_scalings
    designs = ModelDesigns(table.__getitem__, lambda tensor: Average((1.0, 0.0), 0.25))
    merge_checkpoint(vectors, designs, tmp_path / "out")
    base, one = vectors.base.read("embeddings.weight"), vectors.experts["one"].read("embeddings.weight")
    found = load_file(tmp_path / "out" / "model.safetensors")["embeddings.weight"]
    assert_close(found, base + 0.25 * (one - base), 1e-6)
