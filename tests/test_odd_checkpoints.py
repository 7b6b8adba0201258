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
from torch import Tensor

from diagnostics.arviz_adapter import compare_leave_one_out, leave_one_out
from diagnostics.chains import chain_convergence
from diagnostics.verdicts import Level
from inference.models.design import Design
from inference.models.merge import merge_checkpoint
from inference.models.method_design import MethodDesign
from inference.models.model_draws import SpanDraws
from poe_models.experts import Anchor, Expert, ProductOfExperts
from poe_models.methods import Average
from poe_models.scales import Absolute
from poe_models.weights.loading import CheckpointError, open_checkpoint
from poe_models.weights.rules import DEFAULT_RULES
from poe_models.weights.task_vectors import TaskVectors

State = dict[str, Tensor]


def weights(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.fc.weight": torch.randn(4, 4, generator=generator) for i in range(3)}


def moved(state: State, by: float = 0.1) -> State:
    return {name: value + by if value.is_floating_point() else value for name, value in state.items()}


def merge(base: Any, expert: Any, out: Path, design: Any = None, **settings: Any) -> State:
    vectors = TaskVectors(base, {"x": expert}, **settings)
    merge_checkpoint(vectors, design or Design(ProductOfExperts.of(vectors.names)), out)
    return load_file(out / "model.safetensors")


def remedy(message: str) -> list[dict[str, Any]]:
    """The rules that a message suggests, read as YAML as a user would give them."""
    return [yaml.safe_load(each) for each in re.findall(r"\{match: .*?, action: base\}", message)]


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "transformer.", "base_model.model."])
@pytest.mark.parametrize("whose", ["expert", "base"])
def test_a_prefix_of_all_names_is_seen_and_the_remedy_helps(prefix: str, whose: str) -> None:
    short, long = weights(), {prefix + name: value + 0.1 for name, value in weights().items()}
    base, expert = (short, long) if whose == "expert" else (long, short)
    for rules in (DEFAULT_RULES, DEFAULT_RULES.extended([{"match": "fc", "action": "base"}])):
        with pytest.raises(CheckpointError, match=re.escape(repr(prefix))) as caught:
            TaskVectors(base, {"x": expert}, rules)
    (code,) = re.findall(r": (\{name.*\})\.$", str(caught.value))
    renamed = eval(code, {"state_dict": expert, "base": base})
    assert TaskVectors(base, {"x": renamed}).base.tensors.keys() == base.keys()


def test_an_expert_without_a_name_of_the_base_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"1 of its 1 tensors .'other.weight'"):
        TaskVectors(weights(), {"x": {"other.weight": torch.ones(4, 4)}})


def test_the_suggested_rule_matches_its_tensor_and_no_other() -> None:
    base = {**weights(), "odd'[0].fc.weight": torch.ones(4, 4), "layers.0.fc.weight_2": torch.ones(4, 4)}
    expert = moved(base)
    expert["odd'[0].fc.weight"] = torch.full((4, 4), torch.nan)
    vectors = TaskVectors(base, {"x": expert})
    with pytest.raises(CheckpointError) as caught:
        vectors.modules("odd'[0].fc.weight")
    helped = TaskVectors(base, {"x": expert}, DEFAULT_RULES.extended(remedy(str(caught.value))))
    assert [name for name, each in helped.treatments.items() if each.action == "base"] == ["odd'[0].fc.weight"]


@pytest.mark.parametrize("name", ["center", "merge"])
def test_names_that_draws_take_are_refused_early(name: str) -> None:
    with pytest.raises(ValueError, match=f"called '{name}'.*'{name}_model'"):
        TaskVectors(weights(), {name: moved(weights())})


@pytest.mark.parametrize(("name", "other"), [("../q", "q"), ("./q", "q"), ("../../", "mine")])
def test_names_that_records_take_for_paths_are_refused_early(name: str, other: str) -> None:
    with pytest.raises(ValueError, match=f"Give it another name, such as '{other}'"):
        TaskVectors(weights(), {name: moved(weights())})
    assert TaskVectors(weights(), {"..": moved(weights()), "a/b": moved(weights(), 2.0)}).names == ("..", "a/b")


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "module", "net", "weights", "ema", "model_ema"])
def test_state_dicts_one_level_down(wrapper: str, tmp_path: Path) -> None:
    torch.save({wrapper: weights(), "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "m.pt")
    assert open_checkpoint(tmp_path / "m.pt").tensors.keys() == weights().keys()


def test_a_tensor_that_safetensors_cannot_name() -> None:
    with pytest.raises(CheckpointError, match="'__metadata__'.*Rename"):
        open_checkpoint({**weights(), "__metadata__": torch.ones(2, 2)})


def test_metadata_is_not_taken_for_names(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.ones(2, 2)}, tmp_path / "m.safetensors", metadata={"best": "fc.weight"})
    assert not open_checkpoint(tmp_path / "m.safetensors").aliases


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("position", ["a", "layers.1", "z"])
@pytest.mark.parametrize("shape", [(0,), (0, 8), (8, 0), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.complex64])
def test_tensors_without_entries_stay(
    position: str, shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    base = {f"{position}.weight": torch.empty(shape, dtype=dtype), **weights()}
    for number, design in enumerate((None, MethodDesign(Average()))):
        merged = merge(
            base, moved(weights() | {f"{position}.weight": base[f"{position}.weight"]}), tmp_path / str(number), design
        )
        assert merged[f"{position}.weight"].shape == shape


def test_a_buffer_that_is_infinite_by_design_can_be_kept(tmp_path: Path) -> None:
    base = {
        **weights(),
        "attn.causal": torch.full((4, 4), -torch.inf).triu(1),
        "attn.table": torch.tensor([-torch.inf]),
    }
    expert = {**moved(weights()), "attn.causal": base["attn.causal"], "attn.table": base["attn.table"]}
    with pytest.raises(CheckpointError, match="'attn.table' has 1 values that are NaN or infinite") as caught:
        merge(base, expert, tmp_path / "refused")
    merged = merge(base, expert, tmp_path / "kept", rules=DEFAULT_RULES.extended(remedy(str(caught.value))))
    for name in ("attn.causal", "attn.table"):
        assert torch.equal(merged[name], base[name])


def test_values_that_only_float64_holds(tmp_path: Path) -> None:
    base = {"fc.weight": torch.eye(3, dtype=torch.float64)}
    expert = {"fc.weight": 1e150 * torch.ones(3, 3, dtype=torch.float64)}
    with pytest.warns(UserWarning, match="float64.*`dtype: float64`"):
        vectors = TaskVectors(base, {"x": expert}, dtype=None)
    with pytest.raises(CheckpointError, match="'fc.weight' has 9 values that are too large for .*`dtype: float64`"):
        vectors.modules("fc.weight")
    merged = merge(base, expert, tmp_path / "out", dtype=torch.float64)
    assert bool(merged["fc.weight"].isfinite().all())
    assert float(merged["fc.weight"].mean()) > 1e149


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float64, s) for s in (1e-300, 1e-150, 1e-45, 1e150, 1e300)]
    + [(torch.float32, s) for s in (1e-30, 1e-15, 1e15, 1e30)],
)
def test_the_merge_of_updates_of_any_size(dtype: torch.dtype, size: float) -> None:
    updates = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    design = Design(ProductOfExperts.of(["a", "b", "c"]))
    expected, found = design.solve(updates.to(dtype)), design.solve((size * updates).to(dtype))
    assert all(status.converged for status in found.status)
    torch.testing.assert_close(found.value.double() / size, expected.value.double(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.info.retention.kept, expected.info.retention.kept, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.info.retention.norm / size, expected.info.retention.norm, rtol=1e-4, atol=0.0)


def test_units_are_told_in_the_record() -> None:
    """Weights and anchor of a rescaled solve are those of the updates as they are."""
    updates = torch.randn(1, 3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    design, size = Design(ProductOfExperts.of(["a", "b", "c"])), 2.0**-30
    found, plain = design.solve(size * updates).info, design._solve(size * updates, None, None).info
    torch.testing.assert_close(found.weights, plain.weights, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found.anchor_precision, plain.anchor_precision, rtol=1e-6, atol=0.0)


def test_absolute_scales_are_not_in_units_of_the_updates() -> None:
    experts = tuple(Expert(name, scale=Absolute(1.0)) for name in "ab")
    design = Design(ProductOfExperts(experts, Anchor()))
    updates = 2.0**-30 * torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(design.solve(updates).value, design._solve(updates, None, None).value)


def test_experts_of_very_different_size_are_compared_in_float64() -> None:
    updates = torch.randn(1, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    updates[:, 0] *= 1e12
    design = Design(ProductOfExperts.of(["a", "b", "c"]))
    torch.testing.assert_close(design.solve(updates).value, design.solve(updates.double()).value.float())
    updates = updates.double()
    updates[:, 1] *= 1e-70
    with pytest.raises(ValueError, match="module 0 of the batch has updates that differ by a factor of"):
        design.solve(updates)


def test_one_unit_in_the_last_place_does_not_stop_a_merge(tmp_path: Path) -> None:
    base = {"frozen.weight": torch.full((8, 8), 1e-4), "fc.weight": torch.eye(8)}
    expert = {"frozen.weight": base["frozen.weight"].clone(), "fc.weight": torch.eye(8) + 1e-3}
    expert["frozen.weight"][0, 0] = torch.nextafter(torch.tensor(1e-4), torch.tensor(1.0))
    merged = merge(base, expert, tmp_path / "out")
    assert bool(merged["frozen.weight"].isfinite().all())


@pytest.mark.parametrize("form", ["metadata", "torch", "dtype", "narrow", "shards"])
def test_the_base_again_is_noticed_whatever_its_form(form: str, tmp_path: Path) -> None:
    base = {name: value.bfloat16() for name, value in weights().items()}
    other: Any = tmp_path / "copy.safetensors"
    if form == "metadata":
        save_file(base, other, metadata={"format": "pt"})
    elif form == "torch":
        other = tmp_path / "copy.pt"
        torch.save(base, other)
    elif form == "dtype":
        save_file({name: value.float() for name, value in base.items()}, other)
    elif form == "narrow":
        base, other = weights(), {name: value.bfloat16() for name, value in weights().items()}
    else:
        other = {name: value.clone() for name, value in reversed(base.items())}
    with pytest.raises(CheckpointError, match="holds the same weights as the base"):
        merge(base, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "dtype"), [("tril", torch.uint8), ("causal", torch.uint8), ("relative_coords", torch.int8)]
)
def test_integer_buffers_are_no_quantised_weights(name: str, dtype: torch.dtype) -> None:
    assert name in open_checkpoint({name: torch.ones(5, 5, dtype=dtype), **weights()}).tensors
    with pytest.raises(CheckpointError, match="packed integer weights"):
        open_checkpoint({"h.0.c_proj.weight": torch.ones(5, 5, dtype=dtype)})


# ------------------------------------------------------------------------------------------------ folders


def folder(path: Path, state: State, **config: Any) -> Path:
    path.mkdir()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_tied_copies_are_one_tensor(tmp_path: Path) -> None:
    embedding = torch.randn(6, 4)
    apart = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone(), **weights()}
    for tie in (True, False):
        base = open_checkpoint(folder(tmp_path / f"base{tie}", apart, tie_word_embeddings=tie))
        assert base.aliases == ({"lm_head.weight": "model.embed_tokens.weight"} if tie else {})
    once = moved({name: value for name, value in apart.items() if name != "lm_head.weight"})
    merged = merge(tmp_path / "baseTrue", once, tmp_path / "out", MethodDesign(Average()))
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    torch.testing.assert_close(merged["lm_head.weight"], once["model.embed_tokens.weight"])


def test_other_architectures_and_tokenizers_are_refused(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", weights(), model_type="llama", num_attention_heads=4)
    for number, config in enumerate(({"model_type": "mistral"}, {"model_type": "llama", "num_attention_heads": 2})):
        other = folder(tmp_path / f"other{number}", moved(weights()), **config)
        with pytest.raises(CheckpointError, match="another model"):
            TaskVectors(base, {"x": other})
    tuned = folder(tmp_path / "tuned", moved(weights()), model_type="llama", num_attention_heads=4, rope_theta=1e6)
    vocab = {"a": 0, "b": 1, "c": 2}
    (base / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    (tuned / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {**vocab, "d": 3}}}))
    TaskVectors(base, {"x": tuned})  # a token more is no other vocabulary
    (tuned / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {**vocab, "b": 2, "c": 1}}}))
    with pytest.raises(CheckpointError, match="2 tokens other numbers .*'b' is 2, the base's 1"):
        TaskVectors(base, {"x": tuned})


def test_two_saves_in_one_folder(tmp_path: Path) -> None:
    path = folder(tmp_path / "base", {"old.weight": torch.ones(2, 2)})
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights(), "model-00001-of-00001.safetensors")}))
    with pytest.raises(CheckpointError, match=r"not in the folder: model-00001.*if that is the model, move model"):
        open_checkpoint(path)
    index.rename(tmp_path / "away")
    assert list(open_checkpoint(path).tensors) == ["old.weight"]
    (tmp_path / "away").rename(index)
    save_file(weights(), path / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"shards of another save.*Move model\.safetensors out"):
        open_checkpoint(path)
    (path / "model.safetensors").rename(tmp_path / "model.safetensors")
    assert open_checkpoint(path).tensors.keys() == weights().keys()


def test_two_saves_of_one_models_tensors(tmp_path: Path) -> None:
    path, shard = folder(tmp_path / "base", weights()), "model-00001-of-00001.safetensors"
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights(), "model.safetensors")}))
    open_checkpoint(path)  # of this very file
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights(), shard)}))
    save_file(moved(weights()), path / shard)
    with pytest.warns(UserWarning, match=r"of the same names and shapes.*model\.safetensors is read"):
        found = open_checkpoint(path)
    assert all(torch.equal(found.read(name), value) for name, value in weights().items())
    for other in (torch.zeros(1, 7), torch.zeros(1, 7, dtype=torch.float16)):
        name = next(iter(weights()))
        save_file({**weights(), name: other}, path / shard)
        with pytest.raises(CheckpointError, match=rf"1 tensors are in one of them only, or of another.*'{name}'"):
            open_checkpoint(path)


def test_adapters_given_by_their_file_or_their_parent(tmp_path: Path) -> None:
    key = "base_model.model.layers.0.fc.lora_"
    factors = {key + "A.weight": torch.ones(2, 4), key + "B.weight": torch.ones(4, 2)}
    inner = tmp_path / "named" / "default"
    inner.mkdir(parents=True)
    (inner / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    save_file(factors, inner / "adapter_model.safetensors")
    for wrong, words in (
        (inner / "adapter_model.safetensors", "a LoRA adapter"),
        (inner.parent, r"adapter is in default/"),
    ):
        with pytest.raises(CheckpointError, match=words) as caught:
            open_checkpoint(wrong)
        assert str(inner) in str(caught.value)
    assert TaskVectors(weights(), {"x": inner}).treatments["layers.0.fc.weight"].action == "merge"
    save_file({name: value * (1 + 1j) for name, value in factors.items()}, inner / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="complex64"):
        TaskVectors(weights(), {"x": inner})


# ------------------------------------------------------------------------------------------------ diagnostics


@pytest.mark.parametrize(("chains", "draws"), [(4, 1000), (3, 128)])
def test_chains_that_are_each_stuck_are_bad(chains: int, draws: int) -> None:
    moving = torch.randn(chains, draws, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stuck = torch.arange(chains, dtype=torch.float64).reshape(chains, 1, 1, 1).expand(chains, draws, 1, 1)
    coefficients = torch.cat([moving, stuck, torch.zeros_like(moving)], -1)
    norms = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    found = chain_convergence(SpanDraws(("fc.weight",), norms, "", ("a", "b"), coefficients))
    levels = {verdict.about: verdict.level for verdict in found.verdicts}
    assert levels["R-hat"] == levels["effective sample size"] == Level.BAD


def test_a_density_that_is_not_finite_gets_no_stacking_weight() -> None:
    good = np.random.default_rng(0).normal(size=(200, 5)) - 1
    broken = np.where(np.arange(5) == 3, np.nan, good - 5)
    with pytest.raises(ValueError, match="'broken' has 1 densities"):
        compare_leave_one_out({"good": leave_one_out(good), "broken": leave_one_out(broken)})
