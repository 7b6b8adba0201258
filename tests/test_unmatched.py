"""Patterns that fit nothing, and names that differ by a prefix, are said in Python as in the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from inference.models.design import Design
from inference.models.plan import plan
from poe_models import DEFAULT_RULES, CheckpointError, ProductOfExperts, TaskVectors
from poe_models.weights.loading import open_checkpoint
from poe_models.weights.rule import Rule
from poe_models.weights.views import View

State = dict[str, Tensor]


@pytest.fixture
def base(generator: torch.Generator) -> State:
    names = ("body.0.attn.weight", "body.0.mlp.weight", "body.1.attn.weight", "body.1.mlp.weight", "head.weight")
    return {name: torch.randn(3, 3, generator=generator) for name in names}


def moved(state: State) -> State:
    return {name: value + 1.0 for name, value in state.items()}


def test_a_rule_that_fits_nothing_is_warned_about(base: State) -> None:
    rules = DEFAULT_RULES.extended([{"match": r"^body\.\d\.atn", "action": "base"}])
    with pytest.warns(
        UserWarning, match=r"the rule .*atn, action: base} fits no tensor of the base. Did you mean `attn`"
    ):
        TaskVectors(base, {"x": moved(base)}, rules)


@pytest.mark.parametrize("action", ["merge", "average"])
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.ones(2, 2, dtype=torch.complex64), "complex64 buffer"),
        (torch.ones(4, dtype=torch.int64), "int64 buffer"),
        (torch.ones(0, 3), "no entries"),
    ],
)
def test_a_rule_about_tensors_that_cannot_change_is_warned_about(
    action: str, value: torch.Tensor, kind: str, base: State
) -> None:
    base["rotary.table"] = value
    expert = {name: each + 1.0 if name != "rotary.table" else each for name, each in base.items()}
    rules = DEFAULT_RULES.extended([{"match": "rotary", "action": action}])
    with pytest.warns(UserWarning, match=rf"action: {action}}} changes nothing: it fits 'rotary.table', {kind}"):
        TaskVectors(base, {"x": expert}, rules)
    TaskVectors(base, {"x": expert}, DEFAULT_RULES.extended([{"match": "rotary", "action": "base"}]))  # true: silent
    TaskVectors(base, {"x": expert}, DEFAULT_RULES.extended([{"match": "rotary|mlp", "action": action}]))


def test_rules_of_lists_are_rules(base: State) -> None:
    rule = Rule("head", "merge", View(rows=[1, 2]), model_types=["gpt2"])  # type: ignore[arg-type]
    found = TaskVectors(base, {"x": moved(base)}, DEFAULT_RULES.extended([rule]))
    assert [module.name for module in found if module.name.startswith("head")] == ["head.weight[0]", "head.weight[1]"]


def test_rules_that_keep_everything_are_warned_about(base: State) -> None:
    rules = DEFAULT_RULES.extended([{"match": "weight", "action": "base"}])
    with pytest.warns(UserWarning, match=r"the rules keep all 5 tensors of the base, .*so that the merge is the base"):
        TaskVectors(base, {"x": moved(base)}, rules)


def adapter(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    factors = {f"base_model.model.body.0.attn.lora_{side}.weight": torch.ones(3, 3) for side in "AB"}
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 3, **config}))
    return folder


@pytest.mark.parametrize("table", ["rank_pattern", "alpha_pattern"])
def test_an_adapters_pattern_that_fits_nothing_is_warned_about(table: str, base: State, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=rf"'atn' of `{table}` fits none of the adapter's 1 modules.*mean `attn`"):
        found = open_checkpoint(adapter(tmp_path / "lora", **{table: {"atn": 6}}), open_checkpoint(base))
    torch.testing.assert_close(found.read("body.0.attn.weight"), base["body.0.attn.weight"] + 3.0)


WRAPPED: list[Callable[[State], State]] = [
    lambda state: {f"module.{name}": value for name, value in state.items()},
    lambda state: {name if "head" in name else f"transformer.{name}": value for name, value in state.items()},
    lambda state: {name.replace("body.", "body._checkpoint_wrapped_module."): value for name, value in state.items()},
    lambda state: {name.replace("attn", "_orig_mod.attn"): value for name, value in state.items()},
    lambda state: {name.replace("weight", "gamma"): value for name, value in state.items()},
    lambda state: {name.replace("weight", "parametrizations.weight.original"): v for name, v in state.items()},
    lambda state: {name.replace("body", "h"): value for name, value in state.items()},
    lambda state: {name.replace("attn", "att").replace("mlp", "ffn"): value for name, value in state.items()},
    lambda state: {name.replace("body", "h").replace("weight", "w"): value for name, value in state.items()},
]


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("which", ["expert", "base"])
def test_names_of_wrapped_models_are_renamed_as_the_error_says(
    which: str, wrapped: Callable[[State], State], base: State
) -> None:
    ours, theirs = (base, wrapped(moved(base))) if which == "expert" else (wrapped(base), moved(base))
    for state in (ours, theirs):
        state["norm.bias"] = torch.ones(3)  # a name in common
    with pytest.raises(CheckpointError, match=r"its names have .* the base's (have|lack)") as told:
        TaskVectors(ours, {"x": theirs})
    assert "action: base" not in str(told.value)
    text = str(told.value)
    remedy = text[text.index("state dict: {") + len("state dict: ") : text.rindex("}") + 1]
    renamed = eval(remedy, {"state_dict": theirs, "base": ours})
    assert renamed.keys() == ours.keys()
    assert [treatment.action for treatment in TaskVectors(ours, {"x": renamed}).treatments.values()] == [
        *["merge"] * 5,
        "average",
    ]


def test_an_anchors_names_are_told_as_an_experts(base: State) -> None:
    vectors = TaskVectors(base, {"x": moved(base)})
    center = open_checkpoint({f"module.{name}": value for name, value in base.items()})
    with pytest.raises(CheckpointError, match=r"anchor <memory>: tensor .* is missing\. .*'module\.' in them.*replace"):
        plan(vectors, Design(ProductOfExperts.of(vectors.names), center=center))


def test_a_layer_of_another_name_is_not_renamed(base: State) -> None:
    expert = {**moved(base), "score.weight": torch.ones(3, 3), "norm.weight": torch.ones(3)}
    del expert["head.weight"]
    with pytest.raises(CheckpointError, match="add a rule"):
        TaskVectors(base, {"x": expert})


def test_no_rule_is_offered_that_leaves_no_matrix() -> None:
    base = {"fc.weight": torch.zeros(3, 3), "fc.bias": torch.zeros(3)}
    expert = {"fc.weight": torch.ones(4, 3), "fc.bias": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"4 rows against 3.*\n.*No rule helps") as told:
        TaskVectors(base, {"x": expert})
    assert "{match" not in str(told.value)


def test_packed_weights_are_not_taken_for_another_vocabulary() -> None:
    base = {name: torch.zeros(8, 3) for name in ("fc.weight", "head.weight")}
    expert = {"fc.weight": torch.ones(2, 3, dtype=torch.int32), "head.weight": torch.ones(8, 3)}
    with pytest.raises(CheckpointError, match="'fc.weight' is torch.int32, .*: packed weights"):
        TaskVectors(base, {"x": expert})


def test_a_merge_without_a_matrix_is_warned_about(base: State) -> None:
    base["norm.bias"] = torch.ones(3)
    rules = DEFAULT_RULES.extended([{"match": "weight", "action": "base"}])
    with pytest.warns(UserWarning, match=r"no matrix is merged: 1 tensors are averaged, .*, and 5 kept"):
        TaskVectors(base, {"x": moved(base)}, rules)
