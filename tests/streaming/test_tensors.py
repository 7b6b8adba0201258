"""Merged folders: tensors against their treatment, layouts of shards, tied weights, dtypes, designs of tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inference import fixed_point
from inference.models.merge import Design, merge_checkpoint, plan
from poe_models import (
    Anchor,
    CheckpointError,
    OutputGram,
    ProductOfExperts,
    RelativePrecision,
    StudentT,
    TaskVectors,
    open_checkpoint,
)
from tests.helpers import assert_close
from tests.streaming.toys import SHAPES, Ticks, contents, poe, record_of, save_folder, states

MERGED = [name for name in SHAPES if len(SHAPES[name]) > 1 and name != "embed.weight"]


def test_tensors_are_what_their_treatment_says(models: Any, out: Path) -> None:
    vectors = models()
    design = Design(poe(vectors, energy=StudentT(4.0)), scaling=0.7)
    report = merge_checkpoint(vectors, design, out)
    merged = load_file(out / "model.safetensors")
    assert set(merged) == {*SHAPES, "position_ids"}
    for name in MERGED:
        modules = vectors.modules(name)
        blocks = [each.base + 0.7 * fixed_point(design.poe.bind(each)).value[0] for each in modules]
        assert_close(merged[name], vectors.treatments[name].view.join(blocks, SHAPES[name]), 1e-5)
    for name in ("embed.weight", "layers.0.mlp.bias"):
        base, experts = vectors.base.read(name), [vectors.experts[expert].read(name) for expert in vectors.names]
        assert_close(merged[name], base + 0.7 * (torch.stack(experts).mean(0) - base), 1e-6)
    assert torch.equal(merged["position_ids"], torch.arange(7))
    assert report.tensors == {"merge": 6, "average": 2, "base": 1}
    assert (report.modules, report.status) == (10, {"converged": 10})
    assert report.not_converged == ()
    assert report.nbytes == sum(t.nbytes for t in merged.values())


@pytest.mark.parametrize("batch_bytes", [1, 2000, 2**30])
def test_batches_change_nothing(batch_bytes: int, models: Any, out: Path) -> None:
    vectors = models(torch.float64, dtype=torch.float64)
    product = poe(vectors)
    planned = plan(vectors, product, batch_bytes=batch_bytes)
    for batch in planned.batches:
        size = sum(math.prod(t.shape) * 8 * (3 if t.design is not None else 1) for t in batch.tensors)
        assert size <= batch_bytes or len(batch.tensors) == 1
    assert len(planned.batches) == {1: 9, 2000: 7, 2**30: 6}[batch_bytes]
    merge_checkpoint(vectors, product, out, batch_bytes=batch_bytes)
    merged = load_file(out / "model.safetensors")
    for name in MERGED:
        blocks = [each.base + fixed_point(product.bind(each)).value[0] for each in vectors.modules(name)]
        assert_close(merged[name], vectors.treatments[name].view.join(blocks, SHAPES[name]), 1e-9)


@pytest.mark.parametrize("bytes_together", [1, 2**40])
def test_what_a_processor_solves_together_changes_nothing(
    bytes_together: int, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = models(torch.float64, dtype=torch.float64)
    merge_checkpoint(vectors, poe(vectors), tmp_path / "plain")
    monkeypatch.setattr("inference.models.memory.TOGETHER", bytes_together)
    sizes: list[int] = []

    def counted(design: Design, updates: Tensor, *given: Any) -> Any:
        sizes.append(len(updates))
        return solve(design, updates, *given)

    solve = Design.solve
    monkeypatch.setattr(Design, "solve", counted)
    merge_checkpoint(vectors, poe(vectors), tmp_path / "parts")
    assert (max(sizes) == 1) is (bytes_together == 1)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "parts"))
    for name, value in one.items():
        assert_close(other[name], value, 1e-9)
    labels = [[t["tensor"] for t in record_of(tmp_path / name)["tensors"]] for name in ("plain", "parts")]
    assert labels[0] == labels[1]


def test_the_bases_shards(models: Any, out: Path) -> None:
    vectors = models(shards=3)
    merge_checkpoint(vectors, poe(vectors), out)
    source = Path(vectors.base.source)
    before, after = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (source, out))
    assert after["weight_map"] == before["weight_map"]
    for file in set(before["weight_map"].values()):
        old, new = load_file(source / file), load_file(out / file)
        assert {n: (t.shape, t.dtype) for n, t in old.items()} == {n: (t.shape, t.dtype) for n, t in new.items()}
    total = sum(t.nbytes for file in set(before["weight_map"].values()) for t in load_file(out / file).values())
    assert after["metadata"]["total_size"] == total


def test_the_same_merge_whatever_the_layout(models: Any, tmp_path: Path, generator: torch.Generator) -> None:
    made = states(generator)
    experts = {name: made[name] for name in ("mnist", "emoji")}
    torch.save(made["base"], tmp_path / "base.pt")
    bases = {
        "memory": made["base"],
        "pt": tmp_path / "base.pt",
        "sharded": save_folder(tmp_path / "sharded", made["base"], shards=2),
    }
    merged = {}
    for name, base in bases.items():
        vectors = TaskVectors(base, experts)
        merge_checkpoint(vectors, poe(vectors), tmp_path / "out" / name, batch_bytes=1)
        files = (tmp_path / "out" / name).glob("*.safetensors")
        merged[name] = {key: tensor for file in files for key, tensor in load_file(file).items()}
    for name in ("pt", "sharded"):
        assert merged[name].keys() == merged["memory"].keys()
        assert all(torch.equal(merged[name][key], merged["memory"][key]) for key in merged["memory"])


def test_pytorch_shards_become_safetensors(tmp_path: Path, out: Path, generator: torch.Generator) -> None:
    made = states(generator)
    folder = tmp_path / "base"
    folder.mkdir()
    files = {"pytorch_model-00001-of-00002.bin": ["embed.weight"], "pytorch_model-00002-of-00002.bin": ["head.weight"]}
    for file, names in files.items():
        torch.save({name: made["base"][name] for name in names}, folder / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    vectors = TaskVectors(folder, {"mnist": {name: made["mnist"][name] for name in weight_map}})
    merge_checkpoint(vectors, poe(vectors), out)
    assert json.loads((out / "model.safetensors.index.json").read_text())["weight_map"] == {
        "embed.weight": "model-00001-of-00002.safetensors",
        "head.weight": "model-00002-of-00002.safetensors",
    }
    assert not list(out.glob("pytorch_model*"))


def test_tied_weights_of_a_state_dict_are_written_once(out: Path, generator: torch.Generator) -> None:
    made = states(generator)
    tied = {name: {**state, "lm_head.weight": state["embed.weight"]} for name, state in made.items()}
    vectors = TaskVectors(tied.pop("base"), tied)
    planned = plan(vectors, poe(vectors))
    merge_checkpoint(vectors, poe(vectors), out)
    merged = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in merged
    assert open_checkpoint(out).tied_names("embed.weight") == ("embed.weight", "lm_head.weight")
    assert not torch.equal(merged["embed.weight"], made["base"]["embed.weight"])
    assert planned.write_bytes == sum(t.nbytes for t in merged.values())
    assert next(r for r in record_of(out)["tensors"] if r["tensor"] == "embed.weight")["aliases"] == ["lm_head.weight"]


def test_tied_weights_of_a_sharded_base(tmp_path: Path, out: Path, generator: torch.Generator) -> None:
    made = states(generator)
    folder = save_folder(tmp_path / "base", made["base"], shards=2)
    first = folder / "model-00001-of-00002.safetensors"
    save_file(
        load_file(first), first, metadata={"lm_head.weight": "embed.weight"}
    )  # as safetensors' save_model notes it
    vectors = TaskVectors(folder, {"mnist": made["mnist"]})
    merge_checkpoint(vectors, poe(vectors), out)
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map["embed.weight"] == first.name
    assert "lm_head.weight" not in {*weight_map, *load_file(out / first.name)}
    merged = open_checkpoint(out)
    assert merged.tied_names("lm_head.weight") == ("embed.weight", "lm_head.weight")
    assert torch.equal(merged.read("lm_head.weight"), load_file(out / first.name)["embed.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_and_its_rounding_is_counted(dtype: torch.dtype, models: Any, out: Path) -> None:
    vectors = models(dtype)
    report = merge_checkpoint(vectors, Design(poe(vectors), scaling=0.02), out)
    merged = load_file(out / "model.safetensors")
    base = load_file(Path(vectors.base.source) / "model.safetensors")
    assert {t.dtype for t in merged.values()} == {dtype, torch.int64}
    # in half precision the updates of an entry are zero at times, or cancel in the mean: no merge changes it
    updates = {n: torch.stack([e.read(n).float() - base[n].float() for e in vectors.experts.values()]) for n in SHAPES}
    averaged = ("embed.weight", "layers.0.mlp.bias")
    changed = {n: (u.sum(0) if n in averaged else u.abs().sum(0)) != 0 for n, u in updates.items()}
    updated = sum(int(each.sum()) for each in changed.values())
    back = sum(int(((merged[name] == base[name]) & changed[name]).sum()) for name in SHAPES)
    assert updated > 0.9 * sum(map(math.prod, SHAPES.values()))
    assert (report.updated, report.rounded_back) == (updated, back)
    assert 0 < back < updated
    assert f"Rounding left {back / updated:.1%} of the {updated:,} changed weights" in (out / "README.md").read_text()
    assert record_of(out)["summary"]["rounding"] == {"updated": updated, "rounded_back": back}
    (record,) = (r for r in record_of(out)["tensors"] if r["tensor"] == "head.weight")
    assert record["rounding"] == {
        "updated": int(changed["head.weight"].sum()),
        "rounded_back": int(((merged["head.weight"] == base["head.weight"]) & changed["head.weight"]).sum()),
    }


def test_another_output_dtype(models: Any, out: Path) -> None:
    vectors = models()
    merge_checkpoint(vectors, poe(vectors), out, out_dtype=torch.bfloat16)
    merged = load_file(out / "model.safetensors")
    assert {name: t.dtype for name, t in merged.items() if t.dtype != torch.bfloat16} == {"position_ids": torch.int64}
    assert json.loads((out / "config.json").read_text()) == {"model_type": "toy", "torch_dtype": "bfloat16"}


def test_values_that_the_output_dtype_lacks_are_refused(out: Path) -> None:
    base = {"fc.weight": torch.full((2, 2), 1e5), "head.weight": torch.eye(2)}
    vectors = TaskVectors(base, {"a": {name: w + torch.eye(2) for name, w in base.items()}})
    with pytest.raises(
        CheckpointError, match=r"'fc.weight' of the merge has values that are not finite as torch.float16"
    ):
        merge_checkpoint(vectors, poe(vectors), out, out_dtype=torch.float16)
    assert list(out.parent.iterdir()) == []


def test_a_design_for_each_tensor(models: Any, out: Path) -> None:
    vectors = models()
    mlp, rest = Design(poe(vectors, residual_map=OutputGram()), scaling=0.5), Design(poe(vectors))
    with pytest.warns(UserWarning, match="2 averaged tensors .* follow none of them"):
        merge_checkpoint(vectors, lambda tensor: mlp if "mlp" in tensor else rest, out)
    merged, record = load_file(out / "model.safetensors"), record_of(out)
    for name, design in {"layers.0.mlp.weight": mlp, "head.weight": rest}.items():
        (module,) = vectors.modules(name)
        assert_close(merged[name], module.base + design.scaling * fixed_point(design.poe.bind(module)).value[0], 1e-5)
        (found,) = (each for each in record["tensors"] if each["tensor"] == name)
        assert record["designs"][found["design"]] == design.describe()
    assert len(record["designs"]) == 2


def test_a_product_about_some_of_the_experts_in_another_order(models: Any, out: Path) -> None:
    vectors = models()
    product = ProductOfExperts.of(["emoji", "mnist"], importance=[3.0, 1.0])
    merge_checkpoint(vectors, product, out)
    (module,) = vectors.modules("head.weight")
    expected = fixed_point(product.bind(module.updates[[1, 0]])).value[0] + module.base
    assert_close(load_file(out / "model.safetensors")["head.weight"], expected, 1e-5)


def test_a_checkpoint_as_the_anchors_centre(models: Any, out: Path, generator: torch.Generator) -> None:
    vectors = models()
    state = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    center = open_checkpoint(state)
    anchored = poe(vectors, anchor=Anchor(precision=RelativePrecision(1e9)))
    merge_checkpoint(vectors, Design(anchored, center=center), out)
    merged = load_file(out / "model.safetensors")
    for name in MERGED:
        assert_close(merged[name], state[name], 1e-5)
    assert record_of(out)["inputs"]["anchor <memory>"]["sha256"].keys() == {"memory"}
    lacking = open_checkpoint({name: tensor for name, tensor in state.items() if name != "head.weight"})
    with pytest.raises(CheckpointError, match=r"anchor <memory>: tensor 'head.weight' is missing"):
        plan(vectors, Design(anchored, center=lacking))


def test_adapters_are_merged_by_their_factors(tmp_path: Path, out: Path, generator: torch.Generator) -> None:
    base = states(generator)["base"]
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    experts = {}
    for index, name in enumerate(("one", "two")):
        a, b = torch.randn(2 + index, 4, generator=generator), torch.randn(8, 2 + index, generator=generator)
        pairs[name] = (a, b)
        experts[name] = tmp_path / name
        experts[name].mkdir()
        settings = {"peft_type": "LORA", "r": 2 + index, "lora_alpha": 2 * (2 + index), "target_modules": ["mlp"]}
        (experts[name] / "adapter_config.json").write_text(json.dumps(settings))
        prefix = "base_model.model.layers.0.mlp"
        factors = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        save_file(factors, experts[name] / "adapter_model.safetensors")
    vectors = TaskVectors(save_folder(tmp_path / "base", base), experts)
    merge_checkpoint(vectors, poe(vectors, residual_map=OutputGram()), out)
    merged = load_file(out / "model.safetensors")
    updates = torch.stack([2 * b @ a for a, b in pairs.values()])
    z = fixed_point(poe(vectors, residual_map=OutputGram()).bind(updates)).value[0]
    assert_close(merged["layers.0.mlp.weight"], base["layers.0.mlp.weight"] + z, 1e-5)
    assert torch.equal(merged["head.weight"], base["head.weight"])
    record = record_of(out)
    assert set(record["inputs"]["expert one"]["sha256"]) == {"adapter_model.safetensors", "adapter_config.json"}
    assert [r["tensor"] for r in record["tensors"] if r["action"] == "merge"] == ["layers.0.mlp.weight"]


def test_inputs_are_not_changed(models: Any, out: Path) -> None:
    vectors = models()
    folder = Path(vectors.base.source).parent
    before = contents(folder)
    merge_checkpoint(vectors, poe(vectors), out)
    assert contents(folder) == before


def test_state_dicts_in_memory_are_not_changed(out: Path, generator: torch.Generator) -> None:
    made = states(generator)
    copies = {name: {key: tensor.clone() for key, tensor in state.items()} for name, state in made.items()}
    vectors = TaskVectors(made["base"], {"mnist": made["mnist"]})
    merge_checkpoint(vectors, poe(vectors), out)
    for name, state in made.items():
        assert all(torch.equal(tensor, copies[name][key]) for key, tensor in state.items())


def test_two_runs_are_byte_identical_and_progress_adds_up(models: Any, out: Path) -> None:
    vectors = models(shards=2)
    ticks = Ticks()
    merge_checkpoint(vectors, poe(vectors), out, progress=ticks)
    again = out.with_name("again")
    merge_checkpoint(vectors, poe(vectors), again)
    assert contents(out) == contents(again)
    assert ticks.announced == {stage: tuple(done) for stage, done in ticks.done.items()}
    assert ticks.announced["merging"] == (10, plan(vectors, poe(vectors)).write_bytes)


@pytest.mark.gpu
def test_a_device_agrees_with_the_cpu(models: Any, out: Path, device: torch.device) -> None:
    vectors = models(shards=2)
    merge_checkpoint(vectors, poe(vectors), out)
    on_gpu = TaskVectors(vectors.base, vectors.experts, device=device)
    merge_checkpoint(on_gpu, poe(vectors), out.with_name("gpu"))
    for file in out.glob("*.safetensors"):
        cpu, gpu = load_file(file), load_file(out.with_name("gpu") / file.name)
        for name, tensor in cpu.items():
            assert_close(gpu[name], tensor, 1e-5)
