"""Numbers over the layers of a model, and random masks, beside mergekit 0.1.5's own output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from poe_merge.build import designs_of
from poe_merge.by_tensor import Gradient, Layers
from poe_merge.cli import run
from poe_merge.config import ConfigError, load_config
from poe_models.methods import WeightedDare
from poe_models.weights.loading import open_checkpoint

DEPTHS = {"embed.weight": 0.0, **{f"layers.{i}.mlp.weight": i / 4 for i in range(5)}, "norm.bias": 0.0}
MERGEKIT_GRADIENTS = {
    (0.0, 0.5, 1.0): (0.0, 0.25, 0.5, 0.75, 1.0),
    (0.2, 0.9): (0.2, 0.375, 0.55, 0.725, 0.9),
    (0.0, 1.0, 0.0, 0.5): (0.0, 0.75, 0.5, 0.125, 0.5),
    (0.7,): (0.7,) * 5,
    (0.5, 0.4, 0.3, 0.2, 0.1, 0.0): (0.5, 0.375, 0.25, 0.125, 0.0),
}
"""What mergekit's ``evaluate_setting`` gives at t = 0, 1/4, 1/2, 3/4 and 1."""
State = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "b"):
        shapes = {tensor: (6,) if "bias" in tensor else (6, 4) for tensor in DEPTHS}
        made = {key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in shapes.items()}
        (tmp_path / name).mkdir()
        save_file(made, tmp_path / name / "model.safetensors")
    return tmp_path


def merged(folder: Path, document: dict[str, Any]) -> State:
    (folder / "c.yaml").write_text(yaml.safe_dump({"dtype": "float64", **document}))
    assert run(["merge", "c.yaml", "--out", "out"]) == 0
    return load_file(folder / "out" / "model.safetensors")


def of(name: str, **parameters: Any) -> dict[str, Any]:
    return {"model": name, "parameters": parameters}


@pytest.mark.parametrize("values", MERGEKIT_GRADIENTS)
def test_numbers_between_those_given_are_mergekits(values: tuple[float, ...]) -> None:
    found = [Gradient(values).at(depth / 4) for depth in range(5)]
    np.testing.assert_allclose(found, MERGEKIT_GRADIENTS[values], rtol=1e-12)


def test_layers_are_found_by_the_names_of_tensors() -> None:
    stacks = [f"model.{stack}.{i}.w" for stack, n in (("encoder.layer", 3), ("decoder.block", 2)) for i in range(n)]
    layers = Layers([*stacks, "blocks.0.w", "h.0.experts.0.w", "h.2.experts.7.w", "conv.4.w", "my_layers.5.w"])
    found = {name: layers.depth(name) for name in ("model.encoder.layer.1.w", "model.decoder.block.1.w", "blocks.0.w")}
    assert found == {"model.encoder.layer.1.w": 0.5, "model.decoder.block.1.w": 1.0, "blocks.0.w": 1.0}
    assert layers.depth("h.2.experts.7.w") == 1.0
    assert layers.depth("conv.4.w") == layers.depth("my_layers.5.w") == 0.0


def test_task_arithmetic_over_layers(folder: Path) -> None:
    models = [of("a", weight=[0, 0.5, 1]), of("b", weight=[{"filter": "mlp", "value": [1.0, 0.2]}, {"value": 0.7}])]
    document = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
    found = merged(folder, {**document, "parameters": {"lambda": [2.0, 1.0]}})
    base, one, two = (load_file(f"{name}/model.safetensors") for name in ("base", "a", "b"))
    for name, depth in DEPTHS.items():
        second = 1 - 0.8 * depth if "mlp" in name else 0.7
        update = depth * (one[name] - base[name]) + second * (two[name] - base[name])
        torch.testing.assert_close(found[name], base[name] + (2 - depth) * update, rtol=1e-12, atol=1e-12)


def test_linear_over_layers(folder: Path) -> None:
    models = [of("base", weight=[1, 0.5]), of("a", weight=[0, 0.5, 1]), of("b", weight=0.3)]
    found = merged(folder, {"merge_method": "linear", "models": models})
    states = [load_file(f"{name}/model.safetensors") for name in ("base", "a", "b")]
    for name, depth in DEPTHS.items():
        weights = (1 - 0.5 * depth, depth, 0.3)
        mean = sum(w * s[name] for w, s in zip(weights, states, strict=True)) / sum(weights)
        torch.testing.assert_close(found[name], mean, rtol=1e-12, atol=1e-12)


def test_densities_over_layers(folder: Path) -> None:
    document = {"merge_method": "ties", "base_model": "base", "models": [of("a", density=[1.0, 0.25], weight=1.0)]}
    found, base = merged(folder, document), load_file("base/model.safetensors")
    for name, depth in DEPTHS.items():
        changed = int((found[name] != base[name]).sum())
        assert changed == int((1 - 0.75 * depth) * base[name].numel()), name


def test_weights_of_experts_over_layers_are_recorded_and_read_again(folder: Path) -> None:
    (folder / "c.yaml").write_text(
        "base_model: base\nmodels: [{model: a, parameters: {weight: [0.5, 2]}}, {model: b}]\n"
    )
    config = load_config(folder / "c.yaml")
    table = designs_of(config, open_checkpoint("base"))
    for name, depth in DEPTHS.items():
        assert table(name).importance(("a", "b")) == (0.5 + 1.5 * depth, 1.0)
    (folder / "again.yaml").write_text(yaml.safe_dump(config.resolved()))
    assert load_config(folder / "again.yaml").resolved() == config.resolved()
    assert run(["plan", "c.yaml"]) == 0


def test_lists_without_layers_or_below_zero_are_refused(folder: Path) -> None:
    flat = {name.replace("layers.", "part"): value for name, value in load_file("base/model.safetensors").items()}
    save_file(flat, folder / "base" / "model.safetensors")
    document = "base_model: base\nmodels: [{{model: a, parameters: {{weight: [{}, 2]}}}}]\n"
    (folder / "c.yaml").write_text(document.format(1))
    config = load_config(folder / "c.yaml")
    with pytest.raises(ConfigError, match="has no tensor of a numbered layer"):
        designs_of(config, open_checkpoint("base"))
    (folder / "c.yaml").write_text(document.format(-1))
    with pytest.raises(ConfigError, match="-1 is not a finite number of at least 0"):
        load_config(folder / "c.yaml")


DRAWS = 40_000
UPDATE = torch.tensor([[3, -1, 2, -5], [4, -2, 1, 6], [-7, 8, -9, 10.0]]) / 100
MERGEKIT_MEAN = (
    *(0.031809, -0.011007, 0.02151, -0.051415, 0.041735, -0.021493),
    *(0.010899, 0.061051, -0.070088, 0.0773, -0.086869, 0.094795),
)
MERGEKIT_DEVIATION = (
    *(0.03067, 0.011078, 0.021123, 0.047759, 0.03953, 0.020996),
    *(0.011089, 0.056041, 0.063428, 0.070359, 0.077429, 0.083653),
)
"""Mean and deviation of mergekit's ``sparsify(UPDATE, 0.6, random, rescale_norm=l1)`` over ``DRAWS`` seeds.

Its masks are of torch's global generator, in the order of its work, so that no seed here gives the same mask.
"""


def test_random_masks_have_mergekits_distribution() -> None:
    copies = UPDATE.repeat(DRAWS, 1, 1)[:, None]  # a mask for each, by the name of its module
    drawn = WeightedDare(density=0.6, normalize=False)(copies).double().flatten(1)
    mean, deviation = torch.tensor(MERGEKIT_MEAN).double(), torch.tensor(MERGEKIT_DEVIATION).double()
    error = deviation * (2 / DRAWS) ** 0.5  # of a difference of two means
    assert bool(((drawn.mean(0) - mean).abs() < 5 * error).all())
    fourth = (drawn - drawn.mean(0)).pow(4).mean(0)
    of_variance = ((fourth - deviation**4).clamp(min=0) * 2 / DRAWS).sqrt() + 1e-6 * deviation
    assert bool(((drawn.var(0) - deviation**2).abs() < 5 * of_variance).all())
    unscaled = WeightedDare(density=0.6, normalize=False, rescale=False)(copies).double().flatten(1)
    assert bool(((unscaled.mean(0) - mean).abs() > 5 * error).all())  # which the bound tells apart
