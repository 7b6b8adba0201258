"""Matrices that are stored (in, out) in models of types that the rules do not know."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from inference import merge_checkpoint
from poe_models import DEFAULT_RULES, Directional, InputGram, OutputGram, ProductOfExperts, TaskVectors
from poe_models.residual_maps import ResidualMap
from poe_models.weights.rules import RuleTable

State = dict[str, Tensor]
WIDTH = 4
SHAPES = {"attn.c_attn": (3 * WIDTH, WIDTH), "attn.c_proj": (WIDTH, WIDTH), "mlp.c_fc": (16, WIDTH)} | {
    "mlp.c_proj": (WIDTH, 16),
    "mixer.project": (WIDTH, WIDTH),
    "mixer.expand": (8, WIDTH),
}


def states(generator: torch.Generator, bias: bool) -> dict[str, State]:
    """A base and two experts with linear layers, stored (out, in)."""

    def made(size: float) -> State:
        state = {}
        for layer in range(2):
            for name, shape in SHAPES.items():
                state[f"h.{layer}.{name}.weight"] = size * torch.randn(shape, generator=generator)
                if bias:
                    state[f"h.{layer}.{name}.bias"] = size * torch.randn(shape[0], generator=generator)
        return {**state, "lm_head.weight": size * torch.randn(9, WIDTH, generator=generator)}

    base = made(1.0)
    return {"base": base} | {
        n: {k: w + d for (k, w), d in zip(base.items(), made(0.1).values(), strict=True)} for n in "ab"
    }


def transposed(state: State) -> State:
    return {name: w.T.contiguous() if w.ndim == 2 and name != "lm_head.weight" else w for name, w in state.items()}


def vectors_of(where: Path, models: dict[str, State], config: object, rules: RuleTable = DEFAULT_RULES) -> TaskVectors:
    for name, state in models.items():
        (where / name).mkdir(parents=True)
        save_file(state, where / name / "model.safetensors")
        (where / name / "config.json").write_text(json.dumps(config))
    return TaskVectors(where / "base", {n: where / n for n in models if n != "base"}, rules, dtype=torch.float64)


@pytest.mark.parametrize("config", [{"model_type": "nobody_knows"}, {}])
@pytest.mark.parametrize("residual_map", [Directional(), InputGram(), OutputGram()])
def test_a_model_in_two_layouts_merges_alike(
    residual_map: ResidualMap, config: dict[str, str], tmp_path: Path, generator: torch.Generator
) -> None:
    linear = states(generator, bias=True)
    merged = {}
    for kind, models in (("linear", linear), ("conv1d", {n: transposed(s) for n, s in linear.items()})):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is unclear
            vectors = vectors_of(tmp_path / kind, models, config)
        poe = ProductOfExperts.of(vectors.names, residual_map=residual_map)
        merge_checkpoint(vectors, poe, tmp_path / f"{kind}-merged", out_dtype=torch.float64)
        merged[kind] = load_file(tmp_path / f"{kind}-merged" / "model.safetensors")
    back = transposed(merged["conv1d"])
    for name, value in merged["linear"].items():
        torch.testing.assert_close(back[name], value, rtol=1e-9, atol=1e-11)
        assert value.ndim < 2 or not torch.equal(value, linear["base"][name].double())
    wrong = merge_as_stored(tmp_path / "conv1d", residual_map)
    assert isinstance(residual_map, Directional) or not torch.allclose(
        wrong["h.0.mlp.c_fc.weight"].T, merged["linear"]["h.0.mlp.c_fc.weight"], rtol=1e-6
    )


def merge_as_stored(where: Path, residual_map: ResidualMap) -> State:
    """The same with every matrix taken for (out, in), as the rule of a user asks."""
    rules = DEFAULT_RULES.extended([{"match": r"c_fc\.weight", "action": "merge", "view": {}}])
    vectors = TaskVectors(where / "base", {n: where / n for n in "ab"}, rules, dtype=torch.float64)
    poe = ProductOfExperts.of(vectors.names, residual_map=residual_map)
    merge_checkpoint(vectors, poe, where.with_name("as-stored"), out_dtype=torch.float64)
    return load_file(where.with_name("as-stored") / "model.safetensors")


def test_names_tell_without_biases(tmp_path: Path, generator: torch.Generator) -> None:
    models = {n: {k: w for k, w in s.items() if "mixer" not in k} for n, s in states(generator, bias=False).items()}
    config = {"model_type": "nobody_knows"}
    linear = vectors_of(tmp_path / "linear", models, config)
    turned = vectors_of(tmp_path / "turned", {n: transposed(s) for n, s in models.items()}, config)
    for name, view in linear.views.items():
        assert not view.transpose
        assert turned.views[name].transpose == (name != "lm_head.weight")
        assert turned.views[name].blocks == view.blocks


def test_what_nothing_tells_is_named_and_the_remedy_helps(tmp_path: Path, generator: torch.Generator) -> None:
    models = {
        name: {f"h.{i}.attn.c_proj.weight": torch.randn(4, 4, generator=generator) for i in range(2)}
        for name in ("base", "a")
    }
    config = {"model_type": "nobody_knows"}
    with pytest.warns(
        UserWarning, match=r"2 matrices may be stored \(in, out\).*'h\.0\.attn\.c_proj\.weight'"
    ) as caught:
        vectors = vectors_of(tmp_path / "unclear", models, config)
    assert not any(view.transpose for view in vectors.views.values())
    (rule,) = re.findall(r"the rule (\{.*\}\});", str(caught[0].message))
    for given, wanted in ((rule, True), (rule.replace("transpose: true", ""), False)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rules = DEFAULT_RULES.extended([yaml.safe_load(given)])
            helped = TaskVectors(tmp_path / "unclear" / "base", {"a": tmp_path / "unclear" / "a"}, rules)
        assert {view.transpose for view in helped.views.values()} == {wanted}
