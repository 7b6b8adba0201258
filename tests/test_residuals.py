"""Residuals of merges: against dense formulas, the solver's own, and whole checkpoints."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diagnostics.residuals import Residuals, module_residuals, residuals
from inference.map import fixed_point
from inference.models.merge import merge_checkpoint
from poe_models import (
    Activation,
    Cauchy,
    CheckpointError,
    Directional,
    Energy,
    Fisher,
    Gaussian,
    Identity,
    InputGram,
    Mixed,
    ModuleMoments,
    ModuleUpdates,
    NormScaled,
    OutputGram,
    ProductOfExperts,
    Relative,
    ResidualMap,
    Rule,
    StudentT,
    TaskVectors,
)
from poe_models.weights.rules import DEFAULT_RULES
from tests.helpers import assert_close, name_of, random_updates

NAMES = ("mnist", "emoji", "animals")


PLAIN: list[ResidualMap] = [Identity(), Directional(), OutputGram(), InputGram()]


def module(generator: torch.Generator, d_out: int = 4, d_in: int = 6) -> ModuleUpdates:
    updates = random_updates(generator, 1, 3, d_out, d_in)[0]
    return ModuleUpdates("fc.weight", "fc.weight", NAMES, torch.zeros(d_out, d_in, dtype=torch.float64), updates)


def statistics(generator: torch.Generator, d_out: int, d_in: int) -> tuple[ModuleMoments, ModuleMoments]:
    fisher, activations = {}, {}
    for name in NAMES:
        inputs = torch.randn(d_in, 3, generator=generator, dtype=torch.float64)
        activations[name] = {"fc.weight": inputs @ inputs.T / 3}
        fisher[name] = {"fc.weight": torch.rand(d_out, d_in, generator=generator, dtype=torch.float64)}
    return ModuleMoments("fisher", fisher), ModuleMoments("activations", activations)


def state_dicts(generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    shapes = {"a.weight": (5, 3), "b.weight": (3, 5), "norm.weight": (5,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    experts = {
        name: {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in base.items()}
        for name in NAMES
    }
    return base, experts


@pytest.mark.parametrize("residual_map", PLAIN, ids=name_of)
def test_squares_of_the_parts_sum_to_q(residual_map: ResidualMap, generator: torch.Generator) -> None:
    given, z = module(generator), torch.randn(4, 6, generator=generator, dtype=torch.float64)
    for i, entry in enumerate(module_residuals(z, given, residual_map)):
        expected = float(residual_map.operator(given.updates[i]).quadratic(z - given.updates[i]))
        assert entry.squared == pytest.approx(expected, rel=1e-13)
        assert np.square(entry.own).sum() == pytest.approx(
            float(residual_map.operator(given.updates[i]).quadratic(given.updates[i])), rel=1e-13
        )
        assert np.all(np.abs(entry.signed) <= entry.lengths * (1 + 1e-12))


def test_parts_and_signs_in_dense_algebra(generator: torch.Generator) -> None:
    given, z = module(generator), torch.randn(4, 6, generator=generator, dtype=torch.float64)
    for i, update in enumerate(given.updates):
        away = z - update
        by_map = {type(m).__name__: module_residuals(z, given, m)[i] for m in PLAIN}
        rows, own_rows = away @ update.T, update @ update.T
        columns, own_columns = update.T @ away, update.T @ update
        dense = {
            "Identity": (away, update, 1),
            "InputGram": (rows, own_rows, 1),
            "OutputGram": (columns, own_columns, 0),
        }
        for name, (residual, own, axis) in dense.items():
            assert_close(torch.from_numpy(by_map[name].lengths), residual.norm(dim=axis))
            assert_close(torch.from_numpy(by_map[name].signed), (residual * own).sum(axis) / own.norm(dim=axis))
        assert by_map["Directional"].signed == pytest.approx([float((away * update).sum())])
        assert [by_map[n].along for n in by_map] == ["rows", "whole", "columns", "rows"]
        assert [len(by_map[n].lengths) for n in by_map] == [4, 1, 6, 4]


def test_maps_on_given_statistics_are_bound_to_the_module(generator: torch.Generator) -> None:
    given, z = module(generator), torch.randn(4, 6, generator=generator, dtype=torch.float64)
    fisher, activations = statistics(generator, 4, 6)
    for i, name in enumerate(NAMES):
        away = z - given.updates[i]
        information = fisher.experts[name].read("fc.weight")
        moments = activations.experts[name].read("fc.weight")
        expected = {
            Fisher(fisher): (information * away.square()).sum(1),
            Activation(activations): ((away @ moments) * away).sum(1),
            Mixed(activations, share=1.0, unit_trace=False): ((away @ moments) * away).sum(1),
        }
        for residual_map, squares in expected.items():
            entry = module_residuals(z, given, residual_map)[i]
            assert_close(torch.from_numpy(entry.lengths).square(), squares, 1e-9)


@pytest.mark.parametrize("residual_map", PLAIN, ids=name_of)
def test_nothing_merged_falls_short_by_everything_and_an_expert_itself_by_nothing(
    residual_map: ResidualMap, generator: torch.Generator
) -> None:
    given = module(generator)
    poe = ProductOfExperts.of(NAMES, residual_map, Cauchy(), Relative(1.0))
    for entry in module_residuals(torch.zeros(4, 6, dtype=torch.float64), given, poe):
        np.testing.assert_allclose(entry.signed, -entry.own, rtol=1e-12)
        np.testing.assert_allclose(entry.values("own"), -1.0, rtol=1e-12)
        assert entry.squared == pytest.approx(entry.scale**2)
    own = module_residuals(given.updates[1], given, poe)[1]
    assert own.squared == 0.0
    assert own.weight == 1.0


def test_experts_agree_with_the_solver(generator: torch.Generator) -> None:
    given = module(generator)
    poe = ProductOfExperts.of(NAMES, (InputGram(), OutputGram()), Cauchy())
    solution = fixed_point(poe.bind(given))
    found = Residuals(module_residuals(solution.value[0], given, poe))
    table = found.squared() / np.square([[entry.scale for entry in found.entries]])
    np.testing.assert_allclose(table, solution.info.residuals.numpy(), rtol=1e-9)
    np.testing.assert_allclose(found.weights(), 1 / (1 + table), rtol=1e-12)
    np.testing.assert_allclose(found.weight_spread(), solution.info.weight_spread.numpy(), rtol=1e-9)
    assert found.experts == tuple(expert.name for expert in poe.experts)
    assert [entry.along for entry in found.entries] == ["rows"] * 3 + ["columns"] * 3


@pytest.mark.parametrize("energy", [Gaussian(), StudentT(4.0), StudentT(4.0, "multivariate")], ids=name_of)
def test_relative_weights_are_one_for_a_gaussian_and_fall_with_the_residual(
    energy: Energy, generator: torch.Generator
) -> None:
    given = module(generator)
    poe = ProductOfExperts.of(NAMES, InputGram(), energy, Relative(1.0))
    found = Residuals(module_residuals(torch.zeros(4, 6, dtype=torch.float64), given, poe))
    expected = 1.0 if isinstance(energy, Gaussian) else 4 / (4 + 1.0)  # q / s^2 = 1 at Z = 0
    np.testing.assert_allclose(found.weights(), expected)
    assert found.weight_spread() == pytest.approx([1.0])


def test_factors_of_adapters_change_nothing(generator: torch.Generator) -> None:
    left = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    right = torch.randn(3, 2, 6, generator=generator, dtype=torch.float64)
    dense = replace(module(generator), updates=left @ right)
    thin = replace(dense, low_rank=(left, right))
    z = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    for residual_map in PLAIN:
        for one, other in zip(
            module_residuals(z, dense, residual_map), module_residuals(z, thin, residual_map), strict=True
        ):
            for name in ("lengths", "signed", "own"):
                np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-12)


def test_more_experts_than_dimensions_identical_and_one_alone(generator: torch.Generator) -> None:
    one = torch.randn(1, 2, 3, generator=generator, dtype=torch.float64)
    names = tuple(f"e{i}" for i in range(7))
    many = ModuleUpdates("m", "m", names, torch.zeros(2, 3, dtype=torch.float64), one.expand(7, -1, -1))
    entries = module_residuals(one[0] / 2, many, OutputGram())
    for entry in entries:
        np.testing.assert_allclose(entry.signed, -entry.own / 2)
    alone = ModuleUpdates("m", "m", ("e0",), many.base, one)
    (single,) = module_residuals(one[0] / 2, alone, OutputGram())
    np.testing.assert_array_equal(single.signed, entries[0].signed)


def test_zero_experts_are_inactive_and_zero_rows_have_no_sign(generator: torch.Generator) -> None:
    given = module(generator)
    updates = given.updates.clone()
    updates[0] = 0.0
    updates[1, 2] = 0.0
    z = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    found = Residuals(module_residuals(z, replace(given, updates=updates), InputGram()))
    zero, holed, _ = found.entries
    assert not zero.active
    assert np.isnan(found.squared()[0, 0])
    assert np.isnan(found.weights()[0, 0])
    assert np.isnan(holed.signed[2])
    assert holed.lengths[2] > 0
    assert len(holed.values("own")) == 3
    assert len(found.values()) == 3 + 4
    nothing = Residuals(module_residuals(z, replace(given, updates=torch.zeros_like(updates)), InputGram()))
    assert nothing.values().shape == (0,)
    assert np.isnan(nothing.mean_squared()).all()
    assert nothing.weight_spread() == pytest.approx([1.0])


def test_lambda_divides_the_merged_update(generator: torch.Generator) -> None:
    given, z = module(generator), torch.randn(4, 6, generator=generator, dtype=torch.float64)
    for one, other in zip(
        module_residuals(z, given, InputGram()), module_residuals(0.3 * z, given, InputGram(), scaling=0.3), strict=True
    ):
        np.testing.assert_allclose(one.signed, other.signed, rtol=1e-12)


@pytest.mark.parametrize("scaling", [0.0, -1.0, math.nan, math.inf])
def test_lambda_must_be_positive(scaling: float, generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="must be a positive finite number"):
        module_residuals(torch.zeros(4, 6), module(generator), InputGram(), scaling=scaling)


def test_merged_updates_of_another_shape_or_not_finite_are_refused(generator: torch.Generator) -> None:
    given = module(generator)
    for bad in (torch.zeros(6, 4), torch.full((4, 6), math.nan)):
        with pytest.raises(ValueError, match=r"'fc.weight' is \(\d, \d\), the module \(4, 6\)"):
            module_residuals(bad, given, InputGram())


def test_a_streamed_average_is_what_is_in_memory(generator: torch.Generator) -> None:
    base, experts = state_dicts(generator)
    vectors = TaskVectors(base, experts, dtype=torch.float64)
    average = {name: torch.stack([expert[name] for expert in experts.values()]).mean(0) for name in base}
    poe = ProductOfExperts.of(NAMES, InputGram(), Cauchy(), Relative(1.0))
    found = residuals(average, vectors, poe)
    expected = [e for m in vectors for e in module_residuals(average[m.name].double() - m.base, m, poe)]
    assert found.modules == ("a.weight", "b.weight")
    assert found.experts == NAMES
    for one, other in zip(found.entries, expected, strict=True):
        np.testing.assert_allclose(one.signed, other.signed, rtol=1e-10)
    squared = [[e.squared for e in expected[:3]], [e.squared for e in expected[3:]]]
    np.testing.assert_allclose(found.squared(), squared, rtol=1e-10)
    np.testing.assert_allclose(found.mean_squared("raw"), np.mean(squared, 1), rtol=1e-10)
    np.testing.assert_allclose(found.mean_squared("scale"), found.mean_squared("own"), rtol=1e-6)


def test_a_merged_folder_has_the_residuals_of_its_solution(tmp_path: Path, generator: torch.Generator) -> None:
    base, experts = state_dicts(generator)
    vectors = TaskVectors(base, experts)
    poe = ProductOfExperts.of(NAMES, OutputGram(), Cauchy(), NormScaled(0.01))
    merge_checkpoint(vectors, poe, tmp_path / "merged")
    found = residuals(tmp_path / "merged", vectors, poe)
    for row, given in enumerate(vectors):
        info = fixed_point(poe.bind(given)).info
        scales = [entry.scale**2 for entry in found.where(module=given.name).entries]
        np.testing.assert_allclose(found.squared()[row] / scales, info.residuals[0].numpy(), rtol=1e-3)
        np.testing.assert_allclose(found.weight_spread()[row], float(info.weight_spread), rtol=1e-3)


def test_an_adapter_as_a_merge_added_nothing_where_it_has_no_factors(
    tmp_path: Path, generator: torch.Generator
) -> None:
    base, experts = state_dicts(generator)
    vectors = TaskVectors(base, experts)
    left, right = torch.randn(5, 2, generator=generator), torch.randn(2, 3, generator=generator)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    factors = {"base_model.model.a.lora_A.weight": right, "base_model.model.a.lora_B.weight": left}
    save_file(factors, tmp_path / "adapter_model.safetensors")
    found = residuals(tmp_path, vectors, InputGram())
    whole = {**base, "a.weight": base["a.weight"] + left @ right}
    expected = residuals(whole, vectors, InputGram())
    np.testing.assert_allclose(found.values(), expected.values(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.where(module="b.weight").values("own"), -1.0, rtol=1e-5)


def test_maps_and_lambdas_may_differ_by_tensor(generator: torch.Generator) -> None:
    base, experts = state_dicts(generator)
    vectors = TaskVectors(base, experts)
    merged = {name: 2 * value for name, value in base.items()}
    found = residuals(
        merged,
        vectors,
        lambda tensor: InputGram() if tensor == "a.weight" else Directional(),
        scaling=lambda tensor: 1.0 if tensor == "a.weight" else 0.5,
    )
    assert [entry.along for entry in found.entries] == ["rows"] * 3 + ["whole"] * 3
    update = experts["mnist"]["b.weight"] - base["b.weight"]
    expected = float(((base["b.weight"] / 0.5 - update) * update).sum())
    assert found.where(module="b.weight", expert="mnist").values("raw") == pytest.approx([expected], rel=1e-4)
    assert set(found.groups()) == {f"a.weight / {name}" for name in NAMES} | {"b.weight"}


def test_half_precision_and_strided_merges_are_taken(generator: torch.Generator) -> None:
    base, experts = state_dicts(generator)
    vectors = TaskVectors(base, experts)
    rounded = {name: value.bfloat16() for name, value in base.items()}
    strided = {name: value.mT.contiguous().mT if value.ndim == 2 else value for name, value in rounded.items()}
    assert not strided["a.weight"].is_contiguous()
    found = residuals(strided, vectors, InputGram())
    same = residuals({name: value.float() for name, value in rounded.items()}, vectors, InputGram())
    np.testing.assert_array_equal(found.values(), same.values())


def test_fused_projections_and_transposed_layers_are_the_modules_of_the_task_vectors() -> None:
    base = {"h.attn.c_attn.weight": torch.zeros(2, 6)}
    tuned = {"h.attn.c_attn.weight": torch.arange(12.0).reshape(2, 6)}
    vectors = TaskVectors(base, {"one": tuned})
    found = residuals(tuned, vectors, InputGram())
    assert found.modules == tuple(m.name for m in vectors)
    np.testing.assert_allclose(found.values(), 0.0, atol=1e-6)


def test_what_does_not_fit_is_refused(generator: torch.Generator) -> None:
    base, experts = state_dicts(generator)
    vectors = TaskVectors(base, experts)
    with pytest.raises(CheckpointError):
        residuals({"a.weight": base["a.weight"]}, vectors, InputGram())
    with pytest.raises(CheckpointError, match="NaN"):
        residuals({**base, "b.weight": torch.full_like(base["b.weight"], math.nan)}, vectors, InputGram())
    with pytest.raises(ValueError, match="'somebody'"):
        residuals(base, vectors, ProductOfExperts.of(["somebody"], InputGram()))
    with pytest.warns(UserWarning, match="the rules keep all"):
        kept = TaskVectors(base, experts, DEFAULT_RULES.extended([Rule(".*", "base")]))
    with pytest.raises(ValueError, match="the rules merge no tensor"):
        residuals(base, kept, InputGram())
    found = residuals(base, vectors, InputGram())
    with pytest.raises(ValueError, match="there are none"):
        found.where(expert="somebody")
    with pytest.raises(ValueError, match="the units are"):
        found.values("metres")  # type: ignore[arg-type]


def test_directional_residuals_of_a_module_are_one_group(generator: torch.Generator) -> None:
    base, experts = state_dicts(generator)
    found = residuals(base, TaskVectors(base, experts), Directional())
    assert {name: len(group) for name, group in found.groups().items()} == {"a.weight": 3, "b.weight": 3}
    np.testing.assert_allclose(found.values("own"), -1.0, rtol=1e-5)


def test_nothing_given_is_changed(generator: torch.Generator) -> None:
    given, z = module(generator), torch.randn(4, 6, generator=generator, dtype=torch.float64)
    before = given.updates.clone(), z.clone()
    module_residuals(z, given, InputGram())
    assert torch.equal(given.updates, before[0])
    assert torch.equal(z, before[1])


def test_updates_beyond_what_can_be_measured_are_refused_by_name(generator: torch.Generator) -> None:
    updates = module(generator)
    huge = replace(updates, updates=1e140 * updates.updates)
    with pytest.raises(ValueError, match=r"expert 'mnist' at 'fc.weight' is beyond float64.*Divide"):
        module_residuals(huge.updates[0], huge, InputGram())
