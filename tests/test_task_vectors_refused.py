"""Checkpoints and adapters that do not fit, and arguments that make no sense."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from poe_models.weights.loading import CheckpointError, open_checkpoint
from poe_models.weights.rules import DEFAULT_RULES
from poe_models.weights.task_vectors import TaskVectors
from tests.toy_adapters import Small, adapter, state, write


def test_a_vocabulary_of_another_size_names_the_rule_that_helps(tmp_path: Path) -> None:
    base = write(
        tmp_path / "base", {"model.embed_tokens.weight": torch.zeros(128256, 2), "fc.weight": torch.zeros(2, 2)}
    )
    tuned = write(
        tmp_path / "tuned", {"model.embed_tokens.weight": torch.ones(128320, 2), "fc.weight": torch.ones(2, 2)}
    )
    with pytest.raises(CheckpointError) as caught:
        TaskVectors(base, {"chat": tuned})
    message = str(caught.value)
    for words in (
        "expert 'chat'",
        "model.embed_tokens.weight",
        "128,320 rows against 128,256",
        "1 tensor does not fit",
    ):
        assert words in message
    assert r"{match: '^model\.embed_tokens\.weight$', action: base}" in message
    rules = DEFAULT_RULES.extended([{"match": "embed_tokens", "action": "base"}])
    task_vectors = TaskVectors(base, {"chat": tuned}, rules=rules)
    assert [module.name for module in task_vectors] == ["fc.weight"]


def test_missing_extra_and_misshapen_tensors_are_one_error() -> None:
    tuned = state(1)
    del tuned["layer.weight"], tuned["layer.bias"]
    tuned["conv.weight"] = tuned["conv.weight"][:, :2].contiguous()
    tuned["score.weight"] = torch.zeros(2, 4)
    tuned["norm.weight"] = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(CheckpointError) as caught:
        TaskVectors(state(0), {"good": state(2), "bad": tuned})
    message = str(caught.value)
    assert "5 tensors do not fit" in message
    for words in (
        "expert 'bad': tensor 'layer.weight' (6, 4) is missing",
        "expert 'bad': tensor 'layer.bias' (6,) is missing",
        "tensor 'conv.weight' is (5, 2, 2, 2), the base's (5, 3, 2, 2)",
        "tensor 'norm.weight' is torch.int64, the base's torch.float64",
        "tensor 'score.weight' (2, 4) is not in the base",
    ):
        assert words in message, message
    rule = message.rpartition("here ")[2].removesuffix(".")
    advised = DEFAULT_RULES.extended([yaml.safe_load(rule)])
    kept = {n for n, t in TaskVectors(state(0), {"bad": tuned}, rules=advised).treatments.items() if t.action == "base"}
    assert kept == {"layer.weight", "layer.bias", "conv.weight", "norm.weight", "position_ids"}
    assert "good" not in message
    rules = DEFAULT_RULES.extended([{"match": "^(layer|conv|score|norm)", "action": "base"}])
    task_vectors = TaskVectors(state(0), {"good": state(2), "bad": tuned}, rules=rules)
    assert {m.tensor for m in task_vectors} == {"attn.in_proj_weight", "experts.down_proj"}


def test_only_the_first_problems_are_listed() -> None:
    base = {f"w{i}": torch.zeros(2, 2) for i in range(9)}
    with pytest.raises(CheckpointError) as caught:
        TaskVectors(base, {"a": {"w8": torch.ones(2, 2)}, "b": {"w8": torch.ones(2, 2)}})
    message = str(caught.value)
    assert "16 tensors do not fit <memory>, the first 5 are" in message
    assert message.count("\n  - ") == 5


def test_integer_buffers_may_differ() -> None:
    tuned = state(1)
    del tuned["position_ids"]
    tuned["num_batches_tracked"] = torch.tensor(3)
    assert TaskVectors(state(0), {"e": tuned}).treatments["position_ids"].action == "base"


def test_the_base_as_an_expert_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base", state(0))
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "hard").mkdir()
    memory = state(0)
    opened = open_checkpoint(base)
    for one, other in [
        (base, base),
        (base, str(base) + "/"),
        (base, tmp_path / "link"),
        (base, base / "model.safetensors"),
        (opened, opened),
        (memory, memory),
        (memory, dict(memory)),
    ]:
        with pytest.raises(CheckpointError, match=r"expert 'oops' is the base itself"):
            TaskVectors(one, {"good": state(1), "oops": other})
    copy = write(tmp_path / "copy", state(0))  # a copy is a legal expert whose update is zero
    assert all((module.updates == 0).all() for module in TaskVectors(base, {"zero": copy}))


def test_experts_need_names_of_their_own() -> None:
    with pytest.raises(ValueError, match="there are no experts"):
        TaskVectors(state(0), {})
    with pytest.raises(ValueError, match="there are no experts"):
        TaskVectors(state(0), [])
    with pytest.raises(ValueError, match="'a' is the name of several experts"):
        TaskVectors(state(0), [("a", state(1)), ("b", state(2)), ("a", state(3))])
    with pytest.raises(ValueError, match="'' is no name"):
        TaskVectors(state(0), {"": state(1)})
    assert TaskVectors(state(0), [("b", state(1)), ("a", state(2))]).names == ("b", "a")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tensor", ["layer.weight", "norm.weight"])
def test_nan_and_infinity_name_expert_and_tensor(value: float, tensor: str) -> None:
    bad = state(1)
    bad[tensor].view(-1)[0] = value
    task_vectors = TaskVectors(state(0), {"good": state(2), "bad": bad})
    read = task_vectors.average if tensor == "norm.weight" else task_vectors.modules
    with pytest.raises(
        CheckpointError, match=rf"expert 'bad': tensor '{tensor}' has 1 values that are NaN or infinite"
    ):
        read(tensor)
    task_vectors = TaskVectors(bad, {"good": state(2)})
    with pytest.raises(CheckpointError, match=rf"the base \(<memory>\): tensor '{tensor}' has 1 values"):
        (task_vectors.average if tensor == "norm.weight" else task_vectors.modules)(tensor)


def test_nan_in_an_adapter_names_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = adapter(tmp_path / "a", 1, target_modules=["fc"])
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path)
    task_vectors = TaskVectors(Small().state_dict(), {"a": folder})
    with pytest.raises(CheckpointError, match=r"expert 'a': tensor 'fc.weight' has \d+ values"):
        task_vectors.modules("fc.weight")


def test_arguments_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"dtype=torch.bfloat16.*float32 or torch.float64"):
        TaskVectors(state(0), {"e": state(1)}, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"expected a `RuleTable`; `DEFAULT_RULES.extended"):
        TaskVectors(state(0), {"e": state(1)}, rules=[])  # type: ignore[arg-type]


def test_rules_that_do_not_fit_are_one_error() -> None:
    rules = DEFAULT_RULES.extended([{"match": "bias|norm|layer", "action": "merge"}])
    with pytest.raises(CheckpointError) as caught:
        TaskVectors(state(0), {"e": state(1)}, rules=rules)
    assert "2 of the tensors cannot be treated" in str(caught.value)
    assert "'norm.weight'" in str(caught.value)
