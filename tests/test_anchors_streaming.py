"""Merging methods on whole checkpoints: in the place of a product, and as the centre of one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inference import fixed_point
from inference.models.design import Design
from inference.models.merge import merge_checkpoint, plan
from inference.models.method_design import MethodDesign, as_any_function
from inference.models.preparing import prepare_designs
from poe_models import Anchor, Gaussian, ProductOfExperts, RelativePrecision, TaskVectors
from poe_models.methods import (
    METHODS,
    TSVM,
    About,
    Average,
    Dare,
    DareTies,
    DogeTA,
    IsoC,
    IsoCTS,
    KnotsTies,
    MergingMethod,
    MetaGPT,
    ModuleBatch,
    Ties,
    Wudi,
    WudiAdam,
)
from tests import dense_anchors as dense
from tests.helpers import assert_close, name_of

SHAPES = {
    "embed.weight": (10, 4),
    "layers.0.attn.in_proj_weight": (12, 4),
    "layers.0.mlp.weight": (8, 4),
    "layers.0.mlp.bias": (8,),
    "layers.1.attn.in_proj_weight": (12, 4),
    "layers.1.mlp.weight": (8, 4),
    "layers.1.conv.weight": (4, 2, 3, 3),
}
NAMES = ("mnist", "emoji", "animals")
DATA_FREE: list[MergingMethod] = [
    *(cls() for name, cls in METHODS.items() if cls.about.data == "none" and name not in ("DogeTA", "WudiAdam")),
    DogeTA(steps=5),
    WudiAdam(steps=5),
]
State = dict[str, Tensor]


def states(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict[str, State]:
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    made = {"base": base}
    for name in NAMES:
        made[name] = {k: (w + 0.1 * torch.randn(w.shape, generator=generator)).to(dtype) for k, w in base.items()}
    for state in made.values():
        state["position_ids"] = torch.arange(7)
    return made


@pytest.fixture
def folders(tmp_path: Path, generator: torch.Generator) -> dict[str, Path]:
    found = {name: tmp_path / name for name in ("base", *NAMES)}
    for name, state in states(generator).items():
        found[name].mkdir()
        save_file(state, found[name] / "model.safetensors")
    return found


def opened(folders: dict[str, Path], names: tuple[str, ...] = NAMES) -> TaskVectors:
    return TaskVectors(folders["base"], {name: folders[name] for name in names}, dtype=torch.float64)


def weights(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def in_memory(method: MergingMethod, vectors: TaskVectors, scaling: float = 1.0) -> State:
    """The merged tensors by `prepare` and `merge` on modules, one by one."""
    ready = method.prepare(vectors) if method.about.data == "none" else method
    made = {}
    for tensor, treatment in vectors.treatments.items():
        if treatment.view is not None:
            parts = [m.base + scaling * ready.merge(ModuleBatch.of_module(m))[0] for m in vectors.modules(tensor)]
            made[tensor] = treatment.view.join(parts, SHAPES[tensor]).float()
    return made


def merged(vectors: TaskVectors, design: Any, out: Path, **options: Any) -> State:
    merge_checkpoint(vectors, design, out, **options)
    return weights(out)


@pytest.mark.parametrize("method", DATA_FREE, ids=name_of)
def test_every_method_merges_a_checkpoint(method: MergingMethod, folders: dict[str, Path], tmp_path: Path) -> None:
    vectors = opened(folders)
    together = merged(vectors, method, tmp_path / "together")
    alone = merged(vectors, MethodDesign(method), tmp_path / "alone", batch_bytes=1)
    expected = in_memory(method, vectors)
    assert len(expected) == 5
    for name, value in expected.items():
        assert_close(together[name], value, 2e-7)
        assert_close(alone[name], value, 2e-7)
    assert_close(together["layers.0.mlp.bias"], vectors.average("layers.0.mlp.bias").float(), 1e-7)
    assert torch.equal(together["position_ids"], torch.arange(7))


def test_ties_trims_over_all_merged_matrices(folders: dict[str, Path], tmp_path: Path) -> None:
    vectors = opened(folders)
    model = {module.name: module.updates.numpy() for module in vectors}
    assert len(model) == 2 * 3 + 2 + 1  # fused projections are three matrices each
    found = merged(vectors, MethodDesign(Ties(0.3), scaling=0.5), tmp_path / "out")
    expected = {name: torch.from_numpy(value) for name, value in dense.ties(model, 0.3).items()}
    for name in ("layers.0.mlp.weight", "layers.1.mlp.weight"):
        assert_close(found[name], (vectors.base.read(name) + 0.5 * expected[name]).float(), 2e-7)
    rows = torch.cat([expected[f"layers.1.attn.in_proj_weight[{i}]"] for i in range(3)])
    base = vectors.base.read("layers.1.attn.in_proj_weight")
    assert_close(found["layers.1.attn.in_proj_weight"], (base + 0.5 * rows).float(), 2e-7)


def test_the_record_says_what_was_found_and_whom_to_cite(folders: dict[str, Path], tmp_path: Path) -> None:
    vectors = opened(folders)
    report = merge_checkpoint(vectors, Ties(0.3), tmp_path / "out")
    assert report.status == {"computed": 9}
    assert report.not_converged == ()
    record = json.loads((tmp_path / "out" / "poe_merge.json").read_text())
    (design,) = record["designs"]
    assert design["method"] == repr(Ties(0.3).prepare(vectors))
    assert design["citation"] == Ties.about.citation
    module = next(t for t in record["tensors"] if t["tensor"] == "layers.0.mlp.weight")["modules"][0]
    norm = Ties(0.3).prepare(vectors).merge(ModuleBatch.of_module(vectors.modules("layers.0.mlp.weight")[0])).norm()
    assert module["norm"] == pytest.approx(float(norm))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "by TIES on matrices" in card
    assert Ties.about.citation in card
    assert "9 of 9 matrices: computed" in card


def test_draws_depend_on_names_and_seed_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    design = MethodDesign(Dare(seed=3))
    first = merged(opened(folders), design, tmp_path / "first", seed=0)
    other_order = opened(folders, ("animals", "mnist", "emoji"))
    second = merged(other_order, design, tmp_path / "second", seed=1, batch_bytes=1)
    third = merged(opened(folders), Dare(seed=4), tmp_path / "third")
    for name in ("layers.0.mlp.weight", "layers.1.conv.weight"):
        assert_close(second[name], first[name], 1e-7)
        assert not torch.equal(third[name], first[name])


@pytest.fixture
def adapters(tmp_path: Path, generator: torch.Generator) -> TaskVectors:
    """Two adapters of different rank on one matrix."""
    base = states(generator)["base"]
    experts = {}
    for index, name in enumerate(("mnist", "emoji")):
        experts[name] = tmp_path / f"adapter-{name}"
        experts[name].mkdir()
        rank = 1 + index
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["mlp"]}
        (experts[name] / "adapter_config.json").write_text(json.dumps(settings))
        prefix = "base_model.model.layers.0.mlp"
        a, b = torch.randn(rank, 4, generator=generator), torch.randn(8, rank, generator=generator)
        factors = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        save_file(factors, experts[name] / "adapter_model.safetensors")
    return TaskVectors(base, experts, dtype=torch.float64)


@pytest.mark.parametrize("method", [TSVM(), IsoC(), IsoCTS(), Wudi(), KnotsTies(1.0), Ties()], ids=name_of)
def test_adapters_are_merged_by_their_factors(method: MergingMethod, adapters: TaskVectors, tmp_path: Path) -> None:
    (module,) = adapters
    assert module.low_rank is not None
    by_matrices = [replace(module, low_rank=None)]
    expected = method.prepare(by_matrices).merge(ModuleBatch.of_module(by_matrices[0]))[0]
    found = merged(adapters, method, tmp_path / "out")
    assert_close(found[module.name], (module.base + expected).float(), 1e-6)


class Stops:
    """A progress that counts passes and interrupts the merge itself."""

    def __init__(self, after: int | None = None) -> None:
        self.stages: list[str] = []
        self.after = after
        self.done = 0

    def begin(self, stage: str, modules: int, nbytes: int) -> None:
        self.stages.append(stage)
        self.done = 0

    def advance(self, modules: int, nbytes: int) -> None:
        self.done += 1
        if self.stages[-1] == "merging" and self.done == self.after:
            raise KeyboardInterrupt


def test_passes_and_resume(folders: dict[str, Path], tmp_path: Path) -> None:
    vectors = opened(folders)
    progress = Stops(after=3)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(vectors, DareTies(), tmp_path / "out", batch_bytes=1, progress=progress)
    passes = [f"preparing, pass {i}" for i in range(1, len(progress.stages) - 1)]
    assert progress.stages == ["checksums", *passes, "merging"]
    report = merge_checkpoint(vectors, DareTies(), tmp_path / "out", batch_bytes=1, resume=True)
    assert report.resumed_batches == 3
    expected = merged(vectors, DareTies(), tmp_path / "whole")
    for name, value in weights(tmp_path / "out").items():
        assert_close(value.double(), expected[name].double(), 1e-7)


def test_single_precision_takes_two_passes_for_the_thresholds_and_one_for_the_sign(folders: dict[str, Path]) -> None:
    vectors = TaskVectors(folders["base"], {name: folders[name] for name in NAMES})
    for method, count in ((Ties(), 3), (MetaGPT(), 1), (KnotsTies(), 3), (Average(), 0)):
        progress = Stops()
        prepare_designs(vectors, as_any_function(method), progress)
        assert len(progress.stages) == count


def test_half_precision_checkpoints(tmp_path: Path, generator: torch.Generator) -> None:
    made = states(generator, torch.bfloat16)
    vectors = TaskVectors(made.pop("base"), made)
    found = merged(vectors, Ties(0.5), tmp_path / "out")
    expected = in_memory(Ties(0.5), vectors)
    for name, value in expected.items():
        assert torch.equal(found[name], value.bfloat16())


def test_some_tensors_by_one_method_and_some_by_another(folders: dict[str, Path], tmp_path: Path) -> None:
    vectors = opened(folders)
    poe = Design(ProductOfExperts.of(NAMES, energy=Gaussian()))
    ties = MethodDesign(Ties(0.5))
    found = merged(vectors, lambda tensor: ties if "mlp" in tensor else poe, tmp_path / "out")
    own = [vectors.modules(f"layers.{i}.mlp.weight")[0] for i in range(2)]
    ready = Ties(0.5).prepare(own)  # trims over the tensors that it merges
    for module in own:
        expected = module.base + ready.merge(ModuleBatch.of_module(module))[0]
        assert_close(found[module.name], expected.float(), 2e-7)
    conv = vectors.modules("layers.1.conv.weight")[0]
    expected = conv.base + fixed_point(poe.poe.bind(conv)).value[0]
    assert_close(found["layers.1.conv.weight"], expected.view(4, 2, 3, 3).float(), 2e-7)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "by TIES on matrices" in card
    assert "; each model is an expert" in card


def test_designs_with_one_method_are_one_model_to_it(folders: dict[str, Path]) -> None:
    vectors = opened(folders)
    designs = {name: MethodDesign(Ties(0.3), scaling) for name, scaling in (("mlp", 1.0), ("attn", 0.5), ("conv", 0.2))}
    progress = Stops()
    ready = prepare_designs(vectors, lambda tensor: designs[tensor.split(".")[2]], progress)
    assert len(progress.stages) == 5
    assert ready("layers.0.mlp.weight") is ready("layers.1.mlp.weight")
    for name, scaling in (("layers.0.mlp.weight", 1.0), ("layers.1.conv.weight", 0.2)):
        assert ready(name).method == Ties(0.3).prepare(vectors)
        assert ready(name).scaling == scaling


# --- as an anchor's centre ---


@pytest.mark.parametrize("method", [Ties(0.4), Dare(seed=2), DareTies(), MetaGPT()], ids=name_of)
def test_a_method_as_the_centre_of_a_product(method: MergingMethod, folders: dict[str, Path], tmp_path: Path) -> None:
    vectors = opened(folders)
    poe = ProductOfExperts.of(("emoji", "mnist"), energy=Gaussian(), anchor=Anchor(method, RelativePrecision(0.5)))
    found = merged(vectors, poe, tmp_path / "out")
    again = merged(vectors, poe, tmp_path / "again", batch_bytes=1)
    pair = opened(folders, ("emoji", "mnist"))  # the product is about two of the three
    ready = method.prepare(pair)
    for module in pair:
        if module.name in SHAPES:
            center = ready.merge(ModuleBatch.of_module(module))[0]
            z = fixed_point((poe * Anchor(center, RelativePrecision(0.5))).bind(module.updates)).value[0]
            assert_close(found[module.name], (module.base + z).reshape(SHAPES[module.name]).float(), 3e-7)
            assert_close(again[module.name], found[module.name], 3e-7)
    record = json.loads((tmp_path / "out" / "poe_merge.json").read_text())
    assert record["designs"][0]["anchor"]["center"] == repr(ready)


def test_named_updates_give_the_named_draws(folders: dict[str, Path]) -> None:
    module = opened(folders).modules("layers.0.mlp.weight")[0]
    poe = ProductOfExperts.of(NAMES, anchor=Anchor(Dare(seed=5), RelativePrecision(1e9)))
    expected = Dare(seed=5).merge(ModuleBatch.of_module(module))[0]
    assert_close(fixed_point(poe.bind(module)).value, expected, 1e-6)


# --- refusals ---


class Needy(MergingMethod):
    about = About("needy", "nobody, 2026", scope="model", data="inputs")

    def merged(self, batch: ModuleBatch) -> Tensor:
        return batch.updates[:, 0]

    @property
    def ready(self) -> bool:
        return False


def test_what_needs_data_is_refused_before_anything_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    vectors = opened(folders)
    for design in (Needy(), ProductOfExperts.of(NAMES, anchor=Anchor(Needy()))):
        with pytest.raises(ValueError, match=r"it needs data \(inputs\). Give what `.prepare\(task_vectors, data\)`"):
            plan(vectors, design)


def test_plan_reads_headers_only(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = opened(folders)
    monkeypatch.setattr(TaskVectors, "modules", lambda *_: pytest.fail("read"))
    planned = plan(vectors, Ties())
    assert planned.modules == 9
    assert planned.peak_bytes > 0
