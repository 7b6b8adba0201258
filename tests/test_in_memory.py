"""Merges in memory against what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import poe_merge as pm
from inference import collect_statistics
from poe_models import Relative


@pytest.fixture
def states(generator: torch.Generator) -> dict[str, dict[str, torch.Tensor]]:
    made = {}
    for name in ("base", "mnist", "emoji"):
        matrix = torch.randn(6, 4, generator=generator)
        made[name] = {
            "embed.weight": matrix,
            "fc.weight": torch.randn(4, 4, generator=generator),
            "fc.bias": torch.randn(4, generator=generator),
            "head.weight": matrix,
            "steps": torch.tensor(7),
        }
    return made


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("design", ["poe", pm.Ties(density=0.3), pm.Dare(seed=3)], ids=str)
def test_a_merge_in_memory_is_what_is_written(design: Any, out_dtype: Any, states: Any, tmp_path: Path) -> None:
    base = states.pop("base")
    vectors = pm.TaskVectors(base, states)
    design = pm.ProductOfExperts.of(vectors.names) if design == "poe" else design
    found = pm.merge(vectors, design, out_dtype=out_dtype)
    pm.merge_checkpoint(vectors, design, tmp_path / "out", out_dtype=out_dtype)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(base)
    assert found["head.weight"] is found["embed.weight"]
    for name, value in written.items():
        assert torch.equal(found[name], value)
        assert found[name].dtype == value.dtype
    assert not torch.equal(found["fc.weight"].float(), base["fc.weight"])


def test_the_result_is_the_callers_own(states: Any) -> None:
    base = states.pop("base")
    found = pm.merge(pm.TaskVectors(base, states), pm.Ties())
    for value in found.values():
        value.zero_()
    assert base["steps"] == 7
    assert base["fc.weight"].any()


def test_a_copy_of_the_base_is_refused(states: Any) -> None:
    base = states["base"]
    copy = {name: value.clone() for name, value in base.items()}
    with pytest.raises(ValueError, match="copy"):
        pm.merge(pm.TaskVectors(base, {"copy": copy}), pm.Ties())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [("ties", "'ties'"), (None, "None"), (pm.InputGram(), r"InputGram\("), (pm.Ties, "the class Ties")],
)
def test_what_is_no_design_is_refused_with_what_is(wrong: Any, told: str, states: Any) -> None:
    vectors = pm.TaskVectors(states.pop("base"), states)
    with pytest.raises(TypeError, match=told + r".* is no design here\. Give a product of experts"):
        pm.merge(vectors, wrong)
    with pytest.raises(TypeError, match="is no design here"):
        collect_statistics(vectors, wrong)


def test_a_method_has_no_statistics(states: Any) -> None:
    vectors = pm.TaskVectors(states.pop("base"), states)
    with pytest.raises(TypeError, match=r"Ties\(.* is no design here"):
        collect_statistics(vectors, pm.Ties())


def test_a_merge_that_one_expert_holds_is_a_warning(states: Any) -> None:
    base = states.pop("base")
    near = {
        name: torch.lerp(base[name].float(), value.float(), 0.003).to(value) for name, value in states["emoji"].items()
    }
    vectors = pm.TaskVectors(base, {"mnist": states["mnist"], "emoji": near})
    poe = pm.ProductOfExperts.of(vectors.names, scale=Relative(1.0))
    with pytest.warns(UserWarning, match="expert") as found:
        pm.merge(vectors, poe)
    first, second = (str(each.message) for each in found)
    assert first.startswith(
        "the merge is little more than the expert 'emoji'. Under Relative scales the shortest expert decides"
    )
    assert second.startswith("expert 'mnist': ")
