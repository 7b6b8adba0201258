"""Task vectors: differences of checkpoints and adapters, seen as matrices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from poe_models.weights.loading import CheckpointError, open_checkpoint
from poe_models.weights.lora import LoraCheckpoint
from poe_models.weights.rules import DEFAULT_RULES
from poe_models.weights.task_vectors import ModuleUpdates, TaskVectors
from tests.seeds import seeded
from tests.toy_adapters import Small, adapter, state, write


def vectors(*seeds: int, **arguments: Any) -> TaskVectors:
    experts = {f"e{seed}": state(seed) for seed in seeds}
    return TaskVectors(state(0), experts, dtype=torch.float64, **arguments)


def test_updates_are_differences_seen_as_matrices() -> None:
    base, one, two = state(0), state(1), state(2)
    modules = {module.name: module for module in vectors(1, 2)}
    assert list(modules) == [
        "layer.weight",
        *(f"attn.in_proj_weight[{i}]" for i in range(3)),
        "conv.weight",
        *(f"experts.down_proj[{i}]" for i in range(3)),
    ]
    layer = modules["layer.weight"]
    assert (layer.tensor, layer.names, layer.low_rank) == ("layer.weight", ("e1", "e2"), None)
    assert torch.equal(layer.base, base["layer.weight"])
    expected = torch.stack([e["layer.weight"] - base["layer.weight"] for e in (one, two)])
    assert torch.equal(layer.updates, expected)
    key = modules["attn.in_proj_weight[1]"]
    assert key.tensor == "attn.in_proj_weight"
    assert torch.equal(key.base, base["attn.in_proj_weight"][4:8])
    assert torch.equal(key.updates[1], (two["attn.in_proj_weight"] - base["attn.in_proj_weight"])[4:8])
    conv = modules["conv.weight"]
    assert torch.equal(conv.updates[0], (one["conv.weight"] - base["conv.weight"]).reshape(5, 12))
    expert = modules["experts.down_proj[2]"]
    assert torch.equal(expert.updates[0], (one["experts.down_proj"] - base["experts.down_proj"])[2])
    assert all(module.base.is_contiguous() and module.updates.is_contiguous() for module in modules.values())


def test_the_view_joins_the_modules_again() -> None:
    task_vectors = vectors(1)
    expert = state(1)
    for tensor, treatment in task_vectors.treatments.items():
        if treatment.view is not None:
            modules = task_vectors.modules(tensor)
            merged = treatment.view.join([m.base + m.updates[0] for m in modules], expert[tensor].shape)
            torch.testing.assert_close(merged, expert[tensor])


def test_averages() -> None:
    base, task_vectors = state(0), vectors(1, 2, 3)
    for tensor in ("embed_tokens.weight", "layer.bias", "norm.weight", "layer.weight", "conv.weight"):
        mean = sum(state(seed)[tensor] - base[tensor] for seed in (1, 2, 3)) / 3
        torch.testing.assert_close(task_vectors.average(tensor), base[tensor] + mean)
        assert task_vectors.average(tensor).shape == base[tensor].shape
    with pytest.raises(ValueError, match=r"position_ids'.*base \(int64 buffer.*base\.read"):
        task_vectors.average("position_ids")
    with pytest.raises(ValueError, match=r"modules\('norm.weight'\).*average"):
        task_vectors.modules("norm.weight")
    with pytest.raises(ValueError, match=r"no tensor 'layer.wieght'; the nearest is 'layer.weight'"):
        task_vectors.modules("layer.wieght")


def test_names_and_treatments() -> None:
    task_vectors = vectors(2, 1)
    assert task_vectors.names == ("e2", "e1")
    assert {name: t.action for name, t in task_vectors.treatments.items()} == {
        "embed_tokens.weight": "average",
        "layer.weight": "merge",
        "layer.bias": "average",
        "attn.in_proj_weight": "merge",
        "conv.weight": "merge",
        "experts.down_proj": "merge",
        "norm.weight": "average",
        "position_ids": "base",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_differenced_in_the_compute_dtype(dtype: torch.dtype) -> None:
    base, tuned = state(0, dtype), state(0, dtype)
    tuned["layer.weight"] = torch.nextafter(base["layer.weight"], torch.full_like(base["layer.weight"], 9))
    (module,) = TaskVectors(base, {"e": tuned}).modules("layer.weight")
    assert module.updates.dtype == module.base.dtype == torch.float32
    exact = tuned["layer.weight"].double() - base["layer.weight"].double()
    assert torch.equal(module.updates[0].double(), exact)
    assert (exact != 0).all()
    assert TaskVectors(base, {"e": tuned}).average("norm.weight").dtype == torch.float32


def test_dtypes_of_base_and_experts_may_differ() -> None:
    task_vectors = TaskVectors(state(0, torch.bfloat16), {"a": state(1, torch.float16), "b": state(2)})
    (module,) = task_vectors.modules("layer.weight")
    expected = state(2)["layer.weight"].float() - state(0, torch.bfloat16)["layer.weight"].float()
    assert torch.equal(module.updates[1], expected)


def test_inputs_are_never_written_to() -> None:
    base, tuned = state(0), state(1)
    base["layer.weight"] = base["layer.weight"].T.contiguous().T  # not contiguous
    tuned["layer.weight"] = torch.cat([tuned["layer.weight"]] * 2)[::2]
    kept = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in (base, tuned)]
    expected = tuned["layer.weight"] - base["layer.weight"]
    task_vectors = TaskVectors(base, {"e": tuned}, dtype=torch.float64)
    assert torch.equal(task_vectors.modules("layer.weight")[0].updates[0], expected)
    for module in task_vectors:
        module.base.zero_()
        module.updates.zero_()
    for tensor in ("norm.weight", "embed_tokens.weight"):
        task_vectors.average(tensor).zero_()
    for tensors, before in zip((base, tuned), kept, strict=True):
        assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


def test_gpt2_from_transformers(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    base, tuned = transformers.GPT2LMHeadModel(config), transformers.GPT2LMHeadModel(config)
    tuned.save_pretrained(tmp_path / "tuned")  # one of the tied names, in safetensors
    task_vectors = TaskVectors(base.state_dict(), {"e": tmp_path / "tuned"})  # both of them, in memory
    assert task_vectors.base.aliases == {"lm_head.weight": "transformer.wte.weight"}
    name = "transformer.h.0.attn.c_attn.weight"
    update = (tuned.state_dict()[name] - base.state_dict()[name]).T
    modules = task_vectors.modules(name)
    assert [module.updates.shape for module in modules] == [(1, 8, 8)] * 3
    assert torch.equal(torch.cat([module.updates[0] for module in modules]), update)
    head = task_vectors.average("lm_head.weight")
    torch.testing.assert_close(head, tuned.state_dict()["lm_head.weight"])

    base.save_pretrained(tmp_path / "base")
    other_way = TaskVectors(tmp_path / "base", {"e": tuned.state_dict()})
    assert "lm_head.weight" not in other_way.treatments
    assert other_way.model_type == "gpt2"
    torch.testing.assert_close(other_way.average("transformer.wte.weight"), head)


@pytest.mark.gpu
def test_updates_go_to_the_device(device: torch.device) -> None:
    task_vectors = TaskVectors(state(0), {"e1": state(1)}, device=device)
    for cpu, gpu in zip(TaskVectors(state(0), {"e1": state(1)}), task_vectors, strict=True):
        assert gpu.updates.device.type == gpu.base.device.type == device.type
        assert torch.equal(gpu.updates.cpu(), cpu.updates)
    assert task_vectors.average("norm.weight").device.type == device.type


def tied(seed: int, first: str = "wte", second: str = "head") -> dict[str, Tensor]:
    weight = torch.randn(5, 3, generator=seeded(seed))
    return {first: weight, "fc": torch.ones(3, 3) * seed, second: weight}


def test_tied_weights_in_every_order_and_form(tmp_path: Path) -> None:
    expected = tied(1)["wte"]
    one_name = write(tmp_path / "one", {k: v for k, v in tied(1).items() if k != "head"})
    other_name = write(tmp_path / "other", {k: v for k, v in tied(1).items() if k != "wte"})
    copies = write(tmp_path / "copies", {k: v.clone() for k, v in tied(1).items()})
    for expert in (tied(1), tied(1, "head", "wte"), one_name, other_name, copies):
        for base in (tied(0), tied(0, "head", "wte")):
            task_vectors = TaskVectors(base, {"e": expert})
            assert len(task_vectors.treatments) == 2
            torch.testing.assert_close(task_vectors.average("wte"), expected)
            torch.testing.assert_close(task_vectors.average("head"), expected)
    single = write(tmp_path / "base", {k: v for k, v in tied(0).items() if k != "head"})
    for expert in (tied(1), tied(1, "head", "wte"), one_name):
        torch.testing.assert_close(TaskVectors(single, {"e": expert}).average("wte"), expected)


def test_an_untied_expert_is_refused_with_both_names(tmp_path: Path) -> None:
    apart = {**tied(1), "head": tied(2)["head"]}
    for expert in (apart, write(tmp_path / "apart", apart)):
        task_vectors = TaskVectors(tied(0), {"tuned": expert})
        with pytest.raises(CheckpointError, match=r"'tuned' has untied '(wte|head)' and '(head|wte)'"):
            task_vectors.average("wte")


def test_a_base_that_stores_them_apart_takes_a_tied_expert() -> None:
    base = {name: tensor.clone() for name, tensor in tied(0).items()}
    task_vectors = TaskVectors(base, {"e": tied(1)})
    assert set(task_vectors.treatments) == {"wte", "fc", "head"}
    torch.testing.assert_close(task_vectors.average("head"), tied(1)["head"])


def test_rules_reach_tied_tensors_by_any_name() -> None:
    rules = DEFAULT_RULES.extended([{"match": "head", "action": "base"}])
    assert TaskVectors(tied(0), {"e": tied(1)}, rules=rules).treatments["wte"].action == "base"


def low_rank_product(module: ModuleUpdates) -> Tensor:
    assert module.low_rank is not None
    return module.low_rank[0] @ module.low_rank[1]


def test_adapters_give_low_rank_updates(tmp_path: Path) -> None:
    base = Small().double().state_dict()
    experts = {
        "a": adapter(tmp_path / "a", 1, target_modules=["fc", "conv", "qkv", "emb"], r=2),
        "b": adapter(tmp_path / "b", 2, target_modules=["fc", "conv", "qkv"], r=3),
        "c": adapter(tmp_path / "c", 3, target_modules=["fc"], r=1, modules_to_save=["head"]),
    }
    task_vectors = TaskVectors(base, experts, dtype=torch.float64)
    modules = {module.name: module for module in task_vectors}
    assert list(modules) == ["fc.weight", "conv.weight", *(f"qkv.weight[{i}]" for i in range(3)), "head.weight"]
    for name, rank in (("fc.weight", 3), ("conv.weight", 3), ("qkv.weight[1]", 3)):
        module = modules[name]
        assert module.low_rank is not None
        assert module.low_rank[0].shape == (3, module.updates.shape[1], rank)
        torch.testing.assert_close(low_rank_product(module), module.updates)
    for i, folder in enumerate(experts.values()):
        lora = open_checkpoint(folder, base=task_vectors.base)
        torch.testing.assert_close(modules["fc.weight"].updates[i], lora.read("fc.weight") - base["fc.weight"])
    assert (modules["conv.weight"].updates[2] == 0).all()  # c does not touch it
    head = modules["head.weight"]  # replaced whole: not of low rank
    assert head.low_rank is None
    assert (head.updates[2] != 0).all()
    assert (head.updates[:2] == 0).all()
    emb = base["emb.weight"]
    lora = open_checkpoint(experts["a"], base=task_vectors.base)
    torch.testing.assert_close(task_vectors.average("emb.weight"), emb + (lora.read("emb.weight") - emb) / 3)


def test_what_no_adapter_changes_stays_the_bases(tmp_path: Path) -> None:
    base = Small().state_dict()
    folder = adapter(tmp_path / "a", 1, target_modules=["fc"])
    alone = TaskVectors(base, {"a": folder})
    assert str(alone.treatments["untouched.weight"]) == "base (no adapter changes it)"
    assert [module.name for module in alone] == ["fc.weight"]
    mixed = TaskVectors(base, {"a": folder, "b": Small().state_dict()})
    assert mixed.treatments["untouched.weight"].action == "merge"
    (module,) = mixed.modules("fc.weight")
    assert module.low_rank is None
    assert torch.linalg.matrix_rank(module.updates[0]) <= 8
    (zero,) = mixed.modules("untouched.weight")
    assert (zero.updates[0] == 0).all()


def test_an_adapter_on_another_base_is_a_difference(tmp_path: Path) -> None:
    base, other = Small().double().state_dict(), Small().double().state_dict()
    lora = open_checkpoint(adapter(tmp_path / "a", 1, target_modules=["fc"]), base=open_checkpoint(other))
    assert isinstance(lora, LoraCheckpoint)
    task_vectors = TaskVectors(base, {"a": lora}, dtype=torch.float64)
    (module,) = task_vectors.modules("fc.weight")
    assert module.low_rank is None
    torch.testing.assert_close(module.updates[0], lora.read("fc.weight") - base["fc.weight"])
    assert task_vectors.treatments["untouched.weight"].action == "merge"


def test_an_adapter_on_a_bfloat16_base_keeps_its_precision(tmp_path: Path) -> None:
    base = {name: tensor.bfloat16() for name, tensor in Small().state_dict().items()}
    task_vectors = TaskVectors(base, {"a": adapter(tmp_path / "a", 1, target_modules=["fc"], r=2)})
    (module,) = task_vectors.modules("fc.weight")
    torch.testing.assert_close(module.updates, low_rank_product(module), rtol=1e-6, atol=1e-6)
    assert torch.linalg.matrix_rank(module.updates[0]) == 2


def test_low_rank_is_given_up_where_the_view_has_no_factors(tmp_path: Path) -> None:
    rules = DEFAULT_RULES.extended([{"match": "conv.weight", "action": "merge", "view": {"transpose": True}}])
    base = Small().state_dict()
    folder = adapter(tmp_path / "a", 1, target_modules=["conv"], r=2)
    (module,) = TaskVectors(base, {"a": folder}, rules=rules)
    assert module.updates.shape == (1, 3, 45)
    assert module.low_rank is None


def test_rules_that_fit_nothing_are_listed() -> None:
    rules = DEFAULT_RULES.extended([{"match": "lm_haed", "action": "base"}, {"match": "norm", "action": "base"}])
    with pytest.warns(UserWarning, match="fits no tensor of the base"):
        found = vectors(1, rules=rules)
    assert [rule.match for rule in found.unused_rules] == ["lm_haed"]
    assert vectors(1).unused_rules == ()


MEASURE = """
import re, sys
from pathlib import Path
from poe_models.weights.task_vectors import TaskVectors
from safetensors.torch import load_file
folder, how = Path(sys.argv[1]), sys.argv[2]
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
start = peak()
experts = {f"e{i}": folder / f"e{i}" for i in range(4)}
if how == "loaded":
    experts = {name: load_file(path / "model.safetensors") for name, path in experts.items()}
    assert all(float(tensor.sum()) > 0 for state in experts.values() for tensor in state.values())
vectors = TaskVectors(folder / "base", experts)
assert sum(float(module.updates.sum()) for module in vectors) == 80 * 10 * 2**19
print((peak() - start) / 2**10)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_iterating_does_not_hold_the_models(tmp_path: Path) -> None:
    """Five models of 80 MiB in bfloat16; a tensor is 1 MiB there and 2 MiB in float32."""
    for name, value in [("base", 0.0), *((f"e{i}", float(i + 1)) for i in range(4))]:
        weights = {f"layer.{i}.weight": torch.full((1024, 512), value, dtype=torch.bfloat16) for i in range(80)}
        write(tmp_path / name, weights)

    def peak(how: str) -> float:
        command = [sys.executable, "-c", MEASURE, str(tmp_path), how]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    assert peak("loaded") > 320  # the measurement sees models that are held
    assert peak("lazy") < 220


def test_task_vectors_print_in_a_line_without_tensors() -> None:
    made = vectors(1, 2)
    assert repr(made) == (
        "TaskVectors(base <memory>, experts e1, e2; tensors: 4 merged, 3 averaged, 1 of the base; torch.float64 on cpu)"
    )
    assert repr(next(iter(made))) == "ModuleUpdates('layer.weight', (6, 4), of e1, e2)"
    assert repr(made.rules) == f"RuleTable({len(DEFAULT_RULES.rules)} rules)"
