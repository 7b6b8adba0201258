"""mergekit's configurations: results against dense NumPy versions of its definitions, and mistakes in the files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from poe_merge.cli import run
from poe_merge.config import ConfigError, load_config, parse_config
from poe_merge.mergekit import read_as_mergekit
from poe_merge.settings import Document
from poe_models.methods import Weighted
from poe_models.methods.method import named_generator

SHAPES = {
    "embed_tokens.weight": (9, 4),
    "layers.0.mlp.weight": (6, 4),
    "layers.1.attn.weight": (4, 4),
    "norm.bias": (5,),
}
NAMES = ("a", "b", "c")
State = dict[str, np.ndarray]


@pytest.fixture
def folder(tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("base", *NAMES):
        (tmp_path / name).mkdir()
        made = {key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in SHAPES.items()}
        save_file(made, tmp_path / name / "model.safetensors")
    return tmp_path


def state(folder: Path) -> State:
    return {key: value.numpy() for key, value in load_file(folder / "model.safetensors").items()}


def merged(folder: Path, document: dict[str, Any], *flags: str) -> State:
    path = folder / "mergekit.yaml"
    path.write_text(yaml.safe_dump(document))
    assert run(["merge", str(path), "--out", str(folder / "out"), *flags]) == 0
    return state(folder / "out")


def largest(update: np.ndarray, density: float, tensor: str, expert: str) -> np.ndarray:
    """mergekit's `magnitude`: the int(density * n) largest entries of a tensor."""
    kept = np.zeros(update.size, dtype=bool)
    kept[np.argsort(-np.abs(update).ravel(), kind="stable")[: max(1, int(density * update.size))]] = True
    return np.where(kept.reshape(update.shape), update, 0)


def dropped(update: np.ndarray, density: float, tensor: str, expert: str) -> np.ndarray:
    """mergekit's `bernoulli` with the L1 norm kept, by the masks of this project."""
    shape = update.shape if update.ndim == 2 else (1, update.size)
    drawn = torch.rand(shape, generator=named_generator(0, tensor, expert)).numpy().reshape(update.shape)
    kept = np.where(drawn >= 1 - density, update, 0)
    return kept * np.abs(update).sum() / np.abs(kept).sum()


def generalised(parts: list[np.ndarray], weights: list[float], *, elect: bool, normalize: bool) -> np.ndarray:
    """mergekit's `GeneralizedTaskArithmeticMerge` after sparsification."""
    deltas = np.stack([weight * part for weight, part in zip(weights, parts, strict=True)])
    column = np.reshape(weights, (-1, *(1,) * parts[0].ndim))
    mask = np.ones_like(deltas)
    if elect:
        mask = (np.sign(deltas) == np.where(deltas.sum(0) >= 0, 1, -1)).astype(float)
    divisor = (column * mask).sum(0)
    divisor = np.where(divisor == 0, 1, divisor) if normalize else 1
    return (deltas * mask).sum(0) / divisor


WEIGHTS = {"a": 0.5, "b": 1.0, "c": -0.25}
DENSITIES = {"a": 0.5, "b": 0.3, "c": 1.0}
FAMILY = {
    "task_arithmetic": (largest, False, False),
    "ties": (largest, True, True),
    "dare_linear": (dropped, False, False),
    "dare_ties": (dropped, True, False),
}


def of_family(method: str, **shared: Any) -> dict[str, Any]:
    models = [
        {"model": name, "parameters": {"weight": [{"filter": "mlp", "value": 0.4}, {"value": WEIGHTS[name]}]}}
        for name in NAMES
    ]
    for entry in models if method != "task_arithmetic" else ():
        entry["parameters"]["density"] = DENSITIES[entry["model"]]
    return {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": "base"}, *models],
        "parameters": {"int8_mask": True, **shared},
        "dtype": "float64",
    }


@pytest.mark.parametrize("normalize", [None, True, False])
@pytest.mark.parametrize("method", FAMILY)
def test_a_configuration_gives_what_mergekit_defines(method: str, normalize: bool | None, folder: Path) -> None:
    thin, elect, default = FAMILY[method]
    switch = {} if normalize is None else {"normalize": normalize}
    found = merged(folder, of_family(method, **switch, **{"lambda": 0.7}))
    base, experts = state(folder / "base"), {name: state(folder / name) for name in NAMES}
    for tensor in SHAPES:
        weights = [0.4 if "mlp" in tensor else WEIGHTS[name] for name in NAMES]
        densities = [1.0 if method == "task_arithmetic" else DENSITIES[name] for name in NAMES]
        parts = [
            update if density == 1 else thin(update, density, tensor, name)
            for name, density in zip(NAMES, densities, strict=True)
            for update in [experts[name][tensor] - base[tensor]]
        ]
        expected = generalised(parts, weights, elect=elect, normalize=default if normalize is None else normalize)
        np.testing.assert_allclose(found[tensor], base[tensor] + 0.7 * expected, rtol=1e-12, atol=1e-12)


def test_mergekits_own_numbers(folder: Path) -> None:
    """What mergekit 0.1.5 gives for one tensor of two models."""
    base = torch.arange(12.0).reshape(3, 4) / 10
    a = base + torch.tensor([[3, -1, 2, -5], [4, -2, 1, 6], [-7, 8, -9, 10.0]]) / 100
    b = base + torch.tensor([[-2, -4, 1, 3], [9, -8, 7, -6], [5, -3, 2, -1.0]]) / 100
    for name, weight in {"base": base, "a": a, "b": b}.items():
        save_file({"x.weight": weight}, folder / name / "model.safetensors")
    models = [
        {"model": "a", "parameters": {"weight": 0.5, "density": 0.5}},
        {"model": "b", "parameters": {"weight": 1.0, "density": 0.3}},
    ]
    found = merged(folder, {"merge_method": "ties", "base_model": "base", "models": models})
    np.testing.assert_allclose(found["x.weight"].ravel(), MERGEKIT_TIES, rtol=0, atol=2e-6)


MERGEKIT_TIES = (0.0, 0.1, 0.2, 0.25, 0.49, 0.42, 0.67, 0.76, 0.73, 0.98, 0.91, 1.2)


def test_a_weighted_average_needs_no_base(folder: Path) -> None:
    weights = {"a": 1.0, "b": 0.3, "c": 0.5}
    models = [{"model": name, "parameters": {"weight": weight}} for name, weight in weights.items()]
    found = merged(folder, {"merge_method": "linear", "models": models, "dtype": "float64"})
    for tensor in SHAPES:
        expected = sum(weight * state(folder / name)[tensor] for name, weight in weights.items()) / 1.8
        np.testing.assert_allclose(found[tensor], expected, rtol=1e-12, atol=1e-12)


def test_matrices_only_is_one_switch(folder: Path) -> None:
    """Vectors are then averaged by the same weights, and the record says which of the two it was."""
    found = merged(folder, of_family("ties"), "--tensors", "matrices")
    base, weights = state(folder / "base"), np.array([WEIGHTS[name] for name in NAMES])
    updates = np.stack([state(folder / name)["norm.bias"] - base["norm.bias"] for name in NAMES])
    expected = base["norm.bias"] + np.tensordot(weights, updates, 1) / weights.sum()
    np.testing.assert_allclose(found["norm.bias"], expected, rtol=1e-12, atol=1e-12)
    assert json.loads((folder / "out" / "poe_merge.json").read_text())["settings"]["config"]["tensors"] == "matrices"


def test_what_was_read_is_a_configuration_of_this_project(folder: Path) -> None:
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(of_family("dare_ties", **{"lambda": 0.7})))
    plain = load_config(folder / "mergekit.yaml").resolved()
    assert plain["tensors"] == "all"
    assert plain["parameters"]["scaling"] == 0.7
    assert plain["merge_method"].startswith("WeightedDare(elect=True, normalize=False, rescale=True")
    assert [model["name"] for model in plain["models"]] == list(NAMES)
    assert parse_config(Document(plain)).resolved() == plain


def test_plan_knows_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(of_family("ties")))
    assert run(["plan", "mergekit.yaml"]) == 0
    assert "4 merged, 0 averaged" in capsys.readouterr().out


def test_an_adapter_on_a_model(folder: Path) -> None:
    """mergekit's `path+adapter`, on another model than the base."""
    torch.manual_seed(0)
    factors = {"lora_A": torch.randn(2, 4), "lora_B": torch.randn(6, 2)}
    (folder / "lora").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["mlp"], "base_model_name_or_path": "a"}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(config))
    names = {f"base_model.model.layers.0.mlp.{key}.weight": value for key, value in factors.items()}
    save_file(names, folder / "lora" / "adapter_model.safetensors")
    models = [{"model": "a+lora", "parameters": {"weight": 0.5}}]
    document = {"merge_method": "task_arithmetic", "base_model": "base", "models": models, "dtype": "float64"}
    found = merged(folder, document)["layers.0.mlp.weight"]
    base, tuned = (state(folder / name)["layers.0.mlp.weight"] for name in ("base", "a"))
    added = 2.0 * (factors["lora_B"].double() @ factors["lora_A"].double()).numpy()
    np.testing.assert_allclose(found, 0.5 * (base + tuned + added), rtol=1e-5, atol=1e-5)


MISTAKES = """\
merge_method: linear
models:
  - model: a
    parameters: {weight: 1.0, density: 0.5}
  - model: b
    parameters: {weight: [], normalize: true}
parameters: {normalize: false, lambda: 0.5, t: 1}
tokenizer_source: union
slices: []
"""


def test_all_mistakes_at_once_with_their_places(folder: Path) -> None:
    path = folder / "mergekit.yaml"
    path.write_text(MISTAKES)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    first, *lines = str(raised.value).splitlines()
    assert first == "8 mistakes in the configuration:"
    expected = {
        "4:31": "models[0].parameters.density: mergekit's linear does nothing with `density`",
        "6:18": "[] is not a finite number; only weights",
        "6:30": "`normalize` is of all models",
        "7:14": "would weigh the base",
        "7:32": "mergekit's linear does nothing with `lambda`",
        "7:45": "unknown key `t`",
        "8:1": "`tokenizer_source` is refused: the base's tokenizer is copied",
        "9:1": "experts share the base's layers",
    }
    for place, text in expected.items():
        assert [line.strip().startswith(f"{path}:{place}: ") for line in lines if text in line] == [True], text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "poe"}, "`density` belongs to a weighted method, and `merge_method` is poe"),
        (
            {"merge_method": "poe", "models": [{"model": "a", "parameters": {"weight": -1}}]},
            "-1 is not a finite number of at least 0",
        ),
        ({"models": [{"model": "a", "parameters": {"density": 20}}]}, "20 is more than 1. For 20 % write 0.2."),
        ({"parameters": {"eta": 0.1}}, "`eta` belongs to a product of experts, and `merge_method` is Weighted"),
        (
            {"merge_method": "task_arithmetic", "models": [{"model": "a", "parameters": {"density": 0.5}}]},
            "models[0].parameters.density: mergekit's task_arithmetic does nothing with `density`. Leave it out",
        ),
        ({"merge_method": "linear", "base_model": "base"}, "counts the base among the models, and base has no weight"),
    ],
)
def test_what_does_not_belong_is_refused(change: dict[str, Any], message: str, folder: Path) -> None:
    models = [{"model": "a", "parameters": {"weight": 1.0, "density": 0.5}}]
    if change.get("merge_method") == "linear":
        models = [{"model": "a", "parameters": {"weight": 1.0}}]
    (folder / "mergekit.yaml").write_text(
        yaml.safe_dump({"merge_method": "ties", "base_model": "base", "models": models, **change})
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(folder / "mergekit.yaml")


def test_nothing_at_the_base_or_beside_lambda_is_lost() -> None:
    document = Document(
        {
            "merge_method": "ties",
            "base_model": "b",
            "models": [{"model": "b", "parameters": {"gamma": 3}}, {"model": "x", "parameters": {"weight": 1}}],
            "parameters": {"lambda": 0.5, "scaling": 2},
        },
        {},
    )
    found = " ".join(read_as_mergekit(document).problems)
    assert "no `gamma`" in found
    assert "Leave one of them out" in found


@pytest.mark.parametrize("weights", [(float("nan"), 1.0), (float("inf"), 1.0), 0.5, "ab"])
def test_weights_are_finite_numbers(weights: Any) -> None:
    with pytest.raises(ValueError, match="a finite number for each expert"):
        Weighted(weights=weights)
    with pytest.raises(ValueError, match="each expert|at least 0"):
        Weighted(densities=weights)


def test_the_base_is_listed_once_and_has_a_weight() -> None:
    def problems(**data: Any) -> str:
        return " ".join(read_as_mergekit(Document({"merge_method": "linear", **data}, {})).problems)

    weighted = {"model": "b", "parameters": {"weight": 0.5}}
    expert = {"model": "x", "parameters": {"weight": 1}}
    assert "listed twice" in problems(base_model="b", models=[weighted, weighted, expert])
    misspelt = problems(models=[{"model": "b", "parameters": {"weigth": 0.7}}, expert])
    assert "no `weigth`" in misspelt
    assert "Give the first model, which is the base, a `weight`" in misspelt
    assert "List it in `models`" in problems(base_model="b", models=[expert])
    assert not problems(models=[weighted, expert])
