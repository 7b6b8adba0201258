"""Merging of every floating tensor, as methods of entries were published, against dense NumPy versions of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inference.models.design import Design
from inference.models.merge import merge_checkpoint, plan
from inference.models.method_design import MethodDesign
from inference.models.statistics_files import collect_statistics
from poe_merge.cli import run
from poe_models import (
    ALL_TENSORS,
    DEFAULT_RULES,
    Anchor,
    Directional,
    Expert,
    Gaussian,
    Identity,
    InputGram,
    OutputGram,
    ProductOfExperts,
    RelativePrecision,
    TaskVectors,
)
from poe_models.methods import METHODS, TSVM, Dare, MergingMethod, TaskArithmetic, Ties
from poe_models.methods.method import named_generator
from poe_models.weights.views import View
from tests import dense_anchors as dense
from tests.helpers import assert_close

SHAPES = {
    "embed_tokens.weight": (10, 4),
    "layers.0.attn.in_proj_weight": (12, 4),
    "layers.0.mlp.weight": (8, 4),
    "layers.0.mlp.bias": (8,),
    "layers.0.norm.weight": (4,),
    "conv.weight": (4, 2, 3, 3),
    "depthwise.weight": (6, 1, 3),
    "logit_scale": (),
}
MATRICES = ("layers.0.attn.in_proj_weight", "layers.0.mlp.weight", "conv.weight")
KEPT = {"attn_mask": torch.full((2, 2), -5.0, dtype=torch.float64), "position_ids": torch.arange(7)}
NAMES = ("mnist", "emoji", "animals")
State = dict[str, Tensor]


@pytest.fixture
def models(generator: torch.Generator) -> dict[str, State]:
    base = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    made = {"base": base | KEPT}
    for name in NAMES:
        noise = {k: torch.randn(w.shape, generator=generator, dtype=torch.float64) for k, w in base.items()}
        made[name] = {k: w + 0.1 * noise[k] for k, w in base.items()} | KEPT
    return made


@pytest.fixture
def folders(models: dict[str, State], tmp_path: Path) -> dict[str, Path]:
    for name, state in models.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    return {name: tmp_path / name for name in models}


def opened(folders: dict[str, Path]) -> TaskVectors:
    return TaskVectors(folders["base"], {n: folders[n] for n in NAMES}, rules=ALL_TENSORS, dtype=torch.float64)


def flat_updates(models: dict[str, State]) -> np.ndarray:
    """Updates of all floating parameters side by side, (N, n)."""
    rows = [torch.cat([(models[name][k] - models["base"][k]).flatten() for k in sorted(SHAPES)]) for name in NAMES]
    return torch.stack(rows).numpy()


def arithmetic(updates: np.ndarray, models: dict[str, State]) -> np.ndarray:
    return 0.4 * updates.sum(0)


def ties(updates: np.ndarray, models: dict[str, State]) -> np.ndarray:
    return dense.ties_vector(updates, 0.3, "mean")


def dare(updates: np.ndarray, models: dict[str, State]) -> np.ndarray:
    total = np.zeros(updates.shape[1])
    for vector, expert in zip(updates, NAMES, strict=True):
        total += vector * np.concatenate([dare_mask(tensor, expert) for tensor in sorted(SHAPES)]) / (1 - 0.5)
    return 0.4 * total


def dare_mask(tensor: str, expert: str) -> np.ndarray:
    """Kept entries of a tensor: drawn for each of its modules, of which the fused projection has three."""
    parts = [f"{tensor}[{i}]" for i in range(3)] if "in_proj" in tensor else [tensor]
    size = int(np.prod(SHAPES[tensor])) // len(parts)
    drawn = [torch.rand(size, generator=named_generator(2, part, expert)) for part in parts]
    return (torch.cat(drawn) >= 0.5).numpy()


PUBLISHED: list[tuple[MergingMethod, Callable[[np.ndarray, dict[str, State]], np.ndarray]]] = [
    (TaskArithmetic(0.4), arithmetic),
    (Ties(density=0.3), ties),
    (Dare(drop=0.5, scale=0.4, seed=2), dare),
]


@pytest.mark.parametrize(("method", "reference"), PUBLISHED, ids=["task arithmetic", "TIES", "DARE"])
def test_a_method_on_all_tensors_is_the_published_one(
    method: MergingMethod,
    reference: Callable[[np.ndarray, dict[str, State]], np.ndarray],
    models: dict[str, State],
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    merge_checkpoint(opened(folders), MethodDesign(method, scaling=0.7), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    expected, at = torch.from_numpy(reference(flat_updates(models), models)), 0
    for name in sorted(SHAPES):
        base = models["base"][name]
        update = expected[at : at + base.numel()].reshape(base.shape)
        assert_close(merged[name], base + 0.7 * update, 1e-12)
        at += base.numel()
    for name, value in KEPT.items():
        assert torch.equal(merged[name], value)


def test_importance_and_scaling_reach_every_tensor(
    models: dict[str, State], folders: dict[str, Path], tmp_path: Path
) -> None:
    experts = [Expert(n, Identity(), Gaussian(), importance=w) for n, w in zip(NAMES, (3.0, 1.0, 1e-12), strict=True)]
    poe = ProductOfExperts(tuple(experts), Anchor(precision=RelativePrecision(1e-12)))
    merge_checkpoint(opened(folders), Design(poe, scaling=0.5), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name in SHAPES:
        base, first, second = (models[which][name] for which in ("base", "mnist", "emoji"))
        assert_close(merged[name], base + 0.5 * (0.75 * (first - base) + 0.25 * (second - base)), 1e-9)


def test_the_table_merges_every_floating_tensor_but_masks(folders: dict[str, Path]) -> None:
    treatments = opened(folders).treatments
    assert {name for name, each in treatments.items() if each.action == "base"} == set(KEPT)
    rows = {name for name, each in treatments.items() if each.view == View(vector=True)}
    assert rows == set(SHAPES) - set(MATRICES)
    default = TaskVectors(folders["base"], {"mnist": folders["mnist"]}, dtype=torch.float64)
    assert {name for name, each in default.treatments.items() if each.action == "average"} == rows
    assert not opened(folders).unused_rules


@pytest.mark.parametrize("method", [cls for cls in METHODS.values() if cls.about.matrices and cls.about.data == "none"])
def test_a_method_of_matrices_is_refused_by_name(method: type[MergingMethod], folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=rf"one row, and {method.__name__}.*tensors: matrices"):
        plan(opened(folders), method())
    center = ProductOfExperts.of(NAMES, residual_map=Identity(), anchor=Anchor(method(), RelativePrecision(0.1)))
    with pytest.raises(ValueError, match=f"one row, and {method.__name__}"):
        plan(opened(folders), center)


@pytest.mark.parametrize("residual_map", [InputGram(), OutputGram()])
def test_a_map_of_matrices_is_refused_by_name(residual_map: InputGram, folders: dict[str, Path]) -> None:
    poe, name = ProductOfExperts.of(NAMES, residual_map=residual_map), type(residual_map).__name__
    for refused in (plan, collect_statistics):
        with pytest.raises(ValueError, match=f"depthwise.weight' is seen as one row, and {name}"):
            refused(opened(folders), poe)
    plan(opened(folders), ProductOfExperts.of(NAMES, residual_map=Directional()))


def command(folders: dict[str, Path], *words: str) -> int:
    models = [word for name in NAMES for word in ("--model", f"{name}={folders[name]}")]
    return run([words[0], "--base-model", str(folders["base"]), *models, "--dtype", "float64", *words[1:]])


@pytest.mark.parametrize(
    ("words", "told", "card"),
    [
        (["--method", "Ties"], "matrices; 5 averaged", "TIES on matrices; 5 averaged (published for all parameters)"),
        (["--method", "Ties", "--tensors", "all"], "all tensors", "TIES on all tensors, as published"),
        (["--method", "tsvm"], "matrices; 5 averaged", "TSV-M on matrices; 5 averaged."),
        (
            ["--method", "Ties", "--tensors", "all", "--rule", "{match: embed, action: base}"],
            "7 of 8 tensors; 1 kept from the base",
            "TIES on 7 of 8 tensors; 1 kept from the base (published for all parameters)",
        ),
    ],
)
def test_plan_record_and_card_say_what_is_merged(
    words: list[str],
    told: str,
    card: str,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(folders, "plan", *words) == 0
    assert told in " ".join(capsys.readouterr().out.split())
    assert command(folders, "merge", *words, "--out", str(tmp_path / "out")) == 0
    record = json.loads((tmp_path / "out" / "poe_merge.json").read_text())
    assert record["summary"]["reach"] == told
    assert record["settings"]["config"]["tensors"] == ("all" if "all" in words else "matrices")
    assert card in (tmp_path / "out" / "README.md").read_text()


def test_the_command_line_and_yaml_merge_the_same(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(folders, "merge", "--method", "Ties", "--tensors", "all", "--out", str(tmp_path / "typed")) == 0
    models = "".join(f"  - model: {name}\n" for name in NAMES)
    text = f"base_model: base\nmodels:\n{models}merge_method: ties\ntensors: all\ndtype: float64\n"
    (tmp_path / "merge.yaml").write_text(text)
    assert run(["merge", str(tmp_path / "merge.yaml"), "--out", str(tmp_path / "written")]) == 0
    merge_checkpoint(opened(folders), Ties(), tmp_path / "python")
    typed, written, python = (load_file(tmp_path / n / "model.safetensors") for n in ("typed", "written", "python"))
    assert all(torch.equal(typed[k], written[k]) and torch.equal(typed[k], python[k]) for k in typed)
    assert command(folders, "merge", "--method", "tsvm", "--tensors", "all", "--out", str(tmp_path / "no")) == 2
    assert "TSVM" in capsys.readouterr().err
    models = [word for name in NAMES for word in ("--model", f"{name}={folders[name]}")]
    words = ["--base-model", str(folders["base"]), *models, "--dtype", "float64", "--tensors", "all"]
    assert run(["check", "TSVM", *words]) == 2
    assert "seen as one row, and TSVM" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "no").exists()


def test_one_row_is_also_a_rule_of_the_user(folders: dict[str, Path], tmp_path: Path) -> None:
    rule = {"match": "norm", "action": "merge", "view": {"vector": True}}
    vectors = TaskVectors(folders["base"], {"mnist": folders["mnist"]}, DEFAULT_RULES.extended([rule]), torch.float64)
    assert str(vectors.treatments["layers.0.norm.weight"].view) == "one row"
    assert plan(vectors, TaskArithmetic()).reach == "4 of 8 tensors; 4 averaged"
    with pytest.raises(ValueError, match="one row is neither turned nor cut"):
        View(vector=True, blocks=2)
    with pytest.raises(ValueError, match="norm.weight' is seen as one row, and TSVM"):
        plan(vectors, TSVM())
