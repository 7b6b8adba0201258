"""Merged folders: companion files, modes of files, the model card, the record, and what loads them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from inference import Status, fixed_point
from inference.models.merge import Design, merge_checkpoint
from poe_models import DEFAULT_RULES, StudentT, TaskVectors
from tests.streaming.toys import SHAPES, contents, poe, record_of, save_folder, states


def test_companion_files(models: Any, out: Path) -> None:
    vectors = models()
    base = Path(vectors.base.source)
    kept = ["tokenizer.json", "vocab.txt", "LICENSE", "1_Pooling/config.json"]
    left = ["README.md", "training_args.bin", ".gitattributes", "onnx/model.onnx", "other.safetensors", "big.txt"]
    for name in kept + left:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(f"this is {name}")
    with (base / "big.txt").open("wb") as file:
        file.truncate(2**30)
    vectors = TaskVectors(base, vectors.experts)
    merge_checkpoint(vectors, poe(vectors), out)
    ours = {"model.safetensors", "config.json", "poe_merge.json", "README.md"}
    assert set(contents(out)) == {*kept, *ours}
    assert all((out / name).read_bytes() == (base / name).read_bytes() for name in [*kept, "config.json"])
    assert "this is" not in (out / "README.md").read_text()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o007, 0o660)])
def test_all_files_have_the_mode_that_the_umask_gives(umask: int, mode: int, models: Any, out: Path) -> None:
    vectors = models(shards=2)
    before = os.umask(umask)
    try:
        merge_checkpoint(vectors, poe(vectors), out)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert len(modes) > 4
    assert set(modes.values()) == {mode}, modes


def test_the_model_card(models: Any, out: Path) -> None:
    vectors = models(torch.bfloat16)
    rules = DEFAULT_RULES.extended([{"match": "head", "action": "base"}])
    vectors = TaskVectors(vectors.base, vectors.experts, rules=rules)
    merge_checkpoint(vectors, Design(poe(vectors, energy=StudentT(4.0)), scaling=0.5), out)
    card = ModelCard.load(out / "README.md")
    assert card.data.tags == ["merge", "model-merging", "poe-merge"]
    assert (card.data.base_model, card.data.library_name) == (None, "transformers")
    for expected in (
        "**Base:** `base`",
        "**Expert emoji:** `emoji`",
        "W = W_0 + 0.5 Z, anchored at the base with `RelativePrecision(eta=0.1)`",
        "| mnist | `InputGram()` | `StudentT(df=4.0, exponent=None)` | `Balanced(gamma=1.0)` | 1 |",
        "| 2 | merged | split into 3 equal row blocks | fused [q; k; v] |",
        "| 1 | base kept |  | rule {match: 'head', action: base} |",
        "9 of 9 matrices: converged",
        "arXiv:2607.01689",
        "arXiv:2605.12843",
    ):
        assert expected in card.text
    assert str(out.parent) not in card.text  # folders of this machine are nobody's business


def test_the_card_names_models_of_the_hub(tmp_path: Path, out: Path, generator: torch.Generator) -> None:
    made = states(generator)
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "0123abc"
    vectors = TaskVectors(save_folder(snapshot, made["base"]), {"mnist": made["mnist"]})
    merge_checkpoint(vectors, poe(vectors), out)
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == ["org/tiny"]
    assert "**Base:** `org/tiny`" in card.text


_NEW_SETTING = """
import sys, torch
from inference import merge_checkpoint
from poe_models import ProductOfExperts, TaskVectors
torch.backends.cuda.matmul.fp32_precision = "tf32"
vectors = TaskVectors({"fc.weight": torch.zeros(3, 2)}, {"a": {"fc.weight": torch.ones(3, 2)}})
merge_checkpoint(vectors, ProductOfExperts.of(vectors.names), sys.argv[1])
"""


def test_the_newer_setting_of_precision_is_recorded(out: Path) -> None:
    """Torch refuses to tell the older one then."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("a torch without it")
    subprocess.run([sys.executable, "-c", _NEW_SETTING, str(out)], check=True, cwd=Path(__file__).parents[2])
    assert record_of(out)["matmul_precision"] == "tf32"


def test_the_record(models: Any, out: Path) -> None:
    vectors = models()
    merge_checkpoint(vectors, Design(poe(vectors), scaling=0.5), out, seed=3, settings={"note": "mine"})
    record = record_of(out)
    assert (record["settings"], record["seed"], record["compute_dtype"]) == ({"note": "mine"}, 3, "float32")
    assert record["versions"].keys() == {"poe-merge", "torch", "safetensors", "numpy", "python"}
    for role, checkpoint in {"base": vectors.base, "expert emoji": vectors.experts["emoji"]}.items():
        path = Path(checkpoint.source) / "model.safetensors"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert record["inputs"][role]["sha256"]["model.safetensors"] == digest
        assert (out / record["inputs"][role]["source"]).resolve() == Path(checkpoint.source)
    experts = record["summary"].pop("experts")
    counts = {"merge": 6, "average": 2, "base": 1}
    expected = {"tensors": counts, "matrices": {"converged": 10}, "reach": "matrices; 2 averaged"}
    assert record["summary"] == expected
    assert [each["name"] for each in experts] == list(vectors.names)
    by_name = {each["tensor"]: each for each in record["tensors"]}
    assert by_name.keys() == {*SHAPES, "position_ids"}
    fused = by_name["layers.1.attn.in_proj_weight"]
    assert (fused["action"], fused["view"], fused["matrices"]) == (
        "merge",
        "split into 3 equal row blocks",
        [[4, 4]] * 3,
    )
    assert [m["module"] for m in fused["modules"]] == [f"layers.1.attn.in_proj_weight[{i}]" for i in range(3)]
    assert record["designs"][fused["design"]]["scaling"] == 0.5
    solution = fixed_point(poe(vectors).bind(vectors.modules("head.weight")[0]))
    module = by_name["head.weight"]["modules"][0]
    assert module["status"] == "converged" == solution.status[0].name.lower()
    assert module["energy"] == pytest.approx(float(solution.info.energy[0]), rel=1e-6)
    assert module["weights"].keys() == set(vectors.names)
    assert (by_name["layers.0.mlp.bias"]["action"], by_name["position_ids"]["action"]) == ("average", "base")
    assert "modules" not in by_name["layers.0.mlp.bias"]


def test_what_did_not_converge_is_named(models: Any, out: Path) -> None:
    vectors = models()
    design = Design(poe(vectors), options=dataclass_options(max_steps=1, starts=("ones",)))
    report = merge_checkpoint(vectors, design, out)
    assert report.status == {"max_steps": 10}
    assert "head.weight" in report.not_converged
    assert not Status.MAX_STEPS.converged
    assert "10 of 10 matrices: max steps" in (out / "README.md").read_text()


def dataclass_options(**values: Any) -> Any:
    from inference import SolverOptions

    return SolverOptions(**values)


def test_the_folder_loads_with_transformers(tmp_path: Path, out: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    base = GPT2LMHeadModel(config)
    base.save_pretrained(tmp_path / "base")
    for name in ("one", "two"):
        for parameter in base.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        base.save_pretrained(tmp_path / name)
    vectors = TaskVectors(tmp_path / "base", {name: tmp_path / name for name in ("one", "two")})
    merge_checkpoint(vectors, poe(vectors), out)
    merged = GPT2LMHeadModel.from_pretrained(out)
    assert merged.lm_head.weight.data_ptr() == merged.transformer.wte.weight.data_ptr()
    saved = load_file(out / "model.safetensors")
    state = merged.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())
    assert not torch.equal(
        state["transformer.h.0.mlp.c_fc.weight"], vectors.base.read("transformer.h.0.mlp.c_fc.weight")
    )
